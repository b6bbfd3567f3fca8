//! What a GPU has that a CPU has not: its faults, its memory, its precision. On the emulator, or with `PFC_TEST_DRIVER=real` on a GPU.

mod accumulation;
mod capture;
mod device;
mod factor;
mod faults;
mod gpus;
mod half;
mod kernels;
mod loss;
mod memory;
mod pointers;
mod row_terms;
