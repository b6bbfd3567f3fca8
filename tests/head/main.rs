//! What a head promises beyond the numbers of one step: the same bits however it is run, its sampling, its rows between steps, what it
//! tells of itself.

mod bits;
mod evaluation;
mod rows;
mod sampling;
mod start;
mod traffic;
