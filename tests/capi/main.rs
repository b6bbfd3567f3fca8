//! The C interface: its header, the programs that use it, the projects that find it, what it refuses, and the kernels by themselves.

mod abi;
mod bad_input;
mod consumers;
mod cpp;
mod header;
mod kernels;
mod programs;
mod python;
mod release;
