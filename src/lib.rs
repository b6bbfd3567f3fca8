//! The classification head of face recognition and extreme classification: millions of class centers, sharded over ranks, of which
//! each step touches the positives and a random sample of the negatives (PartialFC, arXiv:2010.05222 and arXiv:2203.15565).
//!
//! C and C++ programs use `include/partialfc.h`, which is generated from [`capi`]; the modules beneath it are the same library for
//! Rust programs.

pub mod capi;
pub mod comm;
pub mod device;
pub mod error;
pub mod exchange;
pub mod head;
pub mod margin;
pub mod matrix;
pub mod optimizer;
pub mod options;
pub mod plan;
pub mod random;
pub mod rounding;
pub mod row_terms;
pub mod sample;
pub mod shard;
pub mod stream;
pub mod trace;

mod agreement;
mod available_memory;
mod cancellation;
mod checkpoint;
mod environment;
mod file;
mod float_environment;

mod memory;
mod protocol;
mod simd;

pub use error::{Contribution, Error, Result, Status};
