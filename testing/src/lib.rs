//! What the tests of partialfc share. Never published.
//!
//! [`capi`] is the C interface with handles that free themselves; [`mod@reference`] the naive head that every device is held to;
//! [`vectors`] what the implementation of PartialFC's authors computed. [`emulator`] and [`nccl`] stand in for a GPU and for NCCL.

pub mod capi;
pub mod cases;
pub mod collectives;
pub mod gpu;
pub mod nccl;
pub mod numbers;
pub mod processes;
pub mod programs;
pub mod ranks;
pub mod reference;
pub mod training;
pub mod transport;
pub mod vectors;

pub use cuda_emulator as emulator;
pub use safetensors;
