//! The transports: what carries the collectives between ranks.

pub mod custom;
pub mod nccl;
mod number;
pub mod single;
pub mod threads;
