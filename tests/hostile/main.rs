//! What a library meets on a bad day: memory that is short, callers that make mistakes.

mod fuzz;
mod out_of_memory;
