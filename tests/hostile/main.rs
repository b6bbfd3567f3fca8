//! What a library meets on a bad day: memory that is short, disks that fail, callers that make mistakes.

mod disk;
mod fuzz;
mod out_of_memory;
