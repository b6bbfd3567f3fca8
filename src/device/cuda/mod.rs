//! The CUDA backend: a GPU, its kernels, heads on it, and the kernels by themselves.
//!
//! Work is enqueued on the caller's stream, in the caller's context. The driver is loaded when a device is made; without one
//! everything else in the library works.
//!
//! Each file imports only from files above it in this list. `driver`: owners of what the CUDA driver hands out. `images`: the
//! compiled kernels of this build. `upload_slots`: values on their way to the GPU. `shared_structs`: the structures that kernels and host share. `entries` and `products`: the
//! kernels and how they are launched. `context`: a GPU as all share it. `stream_memory`: the same for communicators. `staging`:
//! copies of callers' memory. `sizes`: how large a head's arrays are. `streams`: a head's streams. `nearest`: searches. `head`: a
//! head's step. `stateless`: the device, which makes heads and offers the kernels without one.

mod context;
mod driver;
mod entries;
mod head;
pub(crate) mod images;
mod nearest;
mod products;
mod shared_structs;
mod sizes;
mod staging;
mod stateless;
mod stream_memory;
mod streams;
mod upload_slots;

pub(crate) use sizes::memory_needed;
pub(super) use stateless::CudaDevice;
