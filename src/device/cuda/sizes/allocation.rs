//! A head's memory: allocated once, and replaced in part where a caller's sample or a batch outgrows it.

use super::Sizes;
use crate::available_memory::AvailableMemory;
use crate::device::cuda::driver::{DeviceBuffer, Stream};
use crate::device::cuda::shared_structs::HeadArrays;
use crate::Result;

/// A head's memory, and the pointers of the two steps that may be in progress.
pub(in crate::device::cuda) struct HeadMemory {
    pub arrays: [HeadArrays; 2],
    /// In the order of the list of arrays, each copy after the other.
    pub buffers: Vec<DeviceBuffer<u8>>,
}

/// Larger arrays, which a head does not use yet.
pub(in crate::device::cuda) struct LargerArrays {
    sizes: Sizes,
    /// The pointers of both steps, with the new arrays.
    arrays: [HeadArrays; 2],
    /// By their numbers among the buffers.
    made: Vec<(usize, DeviceBuffer<u8>)>,
}

/// The result of [`HeadMemory::replace`].
pub(in crate::device::cuda) struct Replaced {
    pub sizes: Sizes,
    pub arrays: [HeadArrays; 2],
    /// The arrays that were replaced: earlier `HeadArrays` still point to them.
    pub buffers: Vec<DeviceBuffer<u8>>,
}

impl HeadMemory {
    /// Makes all arrays, zeroed in the order of `stream`.
    ///
    /// Errors: OUT_OF_MEMORY, naming the array; the arrays made before it are freed.
    pub fn allocate(sizes: &Sizes, stream: &Stream) -> Result<HeadMemory> {
        AvailableMemory::now().require(sizes.host_bytes(), "class centers and optimizer state in page-locked memory")?;
        let mut arrays = [sizes.head_arrays(); 2];
        let mut buffers = Vec::new();
        for array in sizes.list() {
            let mut data = std::ptr::null_mut();
            for (copy, of_step) in arrays.iter_mut().enumerate() {
                if copy < array.copies {
                    let bytes = usize::try_from(array.bytes).unwrap_or(usize::MAX);
                    let buffer = DeviceBuffer::<u8>::zeroed_in(sizes.space(&array), stream, bytes, array.name)?;
                    data = buffer.as_mut_ptr();
                    buffers.push(buffer);
                }
                (array.assign)(of_step, data);
            }
        }
        Ok(HeadMemory { arrays, buffers })
    }

    /// Makes the arrays that have another size in `sizes`, zeroed in the order of `stream`. W and the state keep their memory.
    ///
    /// Errors: OUT_OF_MEMORY, naming the array.
    pub fn larger(&self, sizes: Sizes, stream: &Stream) -> Result<LargerArrays> {
        let mut arrays = [sizes.head_arrays(); 2];
        let (mut number, mut made) = (0, Vec::new());
        for array in sizes.list() {
            let mut data = std::ptr::null_mut();
            for (copy, of_step) in arrays.iter_mut().enumerate() {
                if copy < array.copies {
                    let current = &self.buffers[number];
                    data = current.as_mut_ptr();
                    if current.len() as u64 != array.bytes {
                        let bytes = usize::try_from(array.bytes).unwrap_or(usize::MAX);
                        let buffer = DeviceBuffer::zeroed(stream, bytes, array.name)?;
                        data = buffer.as_mut_ptr();
                        made.push((number, buffer));
                    }
                    number += 1;
                }
                (array.assign)(of_step, data);
            }
        }
        Ok(LargerArrays { sizes, arrays, made })
    }

    /// Takes them. `arrays` stays as it is.
    pub fn replace(&mut self, LargerArrays { sizes, arrays, made }: LargerArrays) -> Replaced {
        let buffers = made.into_iter().map(|(number, buffer)| std::mem::replace(&mut self.buffers[number], buffer)).collect();
        Replaced { sizes, arrays, buffers }
    }
}
