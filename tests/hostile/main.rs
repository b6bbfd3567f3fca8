//! What a program meets on a bad day: memory that is short.

mod out_of_memory;
