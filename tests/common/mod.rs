//! What the test suites share: conformance vectors, numbers, the C interface with handles that free themselves.

// Each suite uses a part of it.
#![allow(dead_code)]

pub mod carrier;
pub mod ffi;
pub mod gpu;
pub mod nccl;
pub mod numbers;
pub mod ranks;
pub mod training;
pub mod vectors;

pub use cuda_emulator as simt;
