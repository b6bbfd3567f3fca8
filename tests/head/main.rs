//! The head: that its numbers are right, and what it promises beyond those of one step.

mod accumulation;
mod background;
mod bits;
mod calls;
mod checkpoint;
mod class_map;
mod conformance;
mod digits;
mod evaluation;
mod factor;
mod faults;
mod growing;
mod half;
mod reference;
mod remap;
mod residency;
mod resume;
mod row_terms;
mod rows;
mod sampling;
mod start;
mod storage;
mod traffic;
