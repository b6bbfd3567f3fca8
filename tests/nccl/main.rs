//! Ranks that NCCL joins: in one process, in several, and over a trainer's own communicator.

mod communicator;
mod head;
mod header;
mod processes;
mod standin;
