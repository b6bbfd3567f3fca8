//! Communicators without a GPU.

mod check;
mod collectives;
mod custom;
mod fake_device;
mod rows;
mod streams;
mod tables;
mod turns;
