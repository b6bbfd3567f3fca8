//! The head: that its numbers are right, and what it promises beyond those of one step.

mod bits;
mod calls;
mod conformance;
mod evaluation;
mod faults;
mod reference;
mod rows;
mod sampling;
mod start;
mod traffic;
