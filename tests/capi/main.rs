//! The C interface: its header, the programs that use it, what it refuses, and the kernels by themselves.

mod abi;
mod bad_input;
mod header;
mod kernels;
mod programs;
mod python;
