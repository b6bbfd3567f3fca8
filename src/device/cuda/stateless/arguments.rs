//! A stateless call's arguments: used where they are when they are on the GPU, copied there and back when they are in host memory.

use crate::device::cuda::driver::{DeviceBuffer, MemorySpace, Stream};
use crate::device::cuda::shared_structs::{MatrixView, StepBlock};
use crate::device::cuda::staging::{self, Staging};
use crate::device::Workspace;
use crate::matrix::{check_address, DType, Matrix};
use crate::memory::Plain;
use crate::{ensure, Result};

/// Arrays of a workspace begin at multiples of it, as the kernels' vector accesses require.
pub(super) const ALIGNMENT: u64 = 16;

/// Memory that a device keeps for its stateless calls: it grows to the largest so far. One call at a time fills it; the stream
/// orders the calls' uses of it.
#[derive(Default)]
pub(super) struct StagingPool {
    /// One for each argument of a call.
    staging: Vec<Staging>,
    pub draw: DrawBuffers,
}

/// The arrays of a draw beside the caller's.
#[derive(Default)]
pub(super) struct DrawBuffers {
    pub block: Option<DeviceBuffer<StepBlock>>,
    /// Zero between draws: the kernels leave it so.
    pub counts: Option<DeviceBuffer<u32>>,
    pub selected: Option<DeviceBuffer<u32>>,
    pub sample: Option<DeviceBuffer<u32>>,
    pub positive_of: Option<DeviceBuffer<u32>>,
}

/// An element of a caller's array.
pub(super) trait Element: Plain {
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}

impl Element for i64 {
    const DTYPE: DType = DType::I64;
}

/// A matrix that the call writes for a host's caller.
struct CallOutput {
    /// Number of the argument.
    slot: usize,
    written: MatrixView,
    destination: Matrix,
}

/// One call's arguments.
pub(super) struct CallArguments<'a> {
    stream: &'a Stream,
    staging: &'a mut Vec<Staging>,
    used: usize,
    outputs: Vec<CallOutput>,
}

impl<'a> CallArguments<'a> {
    pub fn new(stream: &'a Stream, pool: &'a mut StagingPool) -> (CallArguments<'a>, &'a mut DrawBuffers) {
        (CallArguments { stream, staging: &mut pool.staging, used: 0, outputs: Vec::new() }, &mut pool.draw)
    }

    fn slot(&mut self) -> usize {
        if self.used == self.staging.len() {
            self.staging.push(Staging::new());
        }
        self.used += 1;
        self.used - 1
    }

    /// A matrix that the call reads.
    pub fn read(&mut self, name: &str, matrix: &Matrix) -> Result<MatrixView> {
        let slot = self.slot();
        self.staging[slot].upload(self.stream, name, matrix)
    }

    /// A matrix that the call overwrites.
    pub fn write(&mut self, name: &str, matrix: &Matrix) -> Result<MatrixView> {
        let slot = self.slot();
        let written = self.staging[slot].output(self.stream, name, matrix)?;
        self.outputs.push(CallOutput { slot, written, destination: *matrix });
        Ok(written)
    }

    /// A matrix that the call changes.
    pub fn change(&mut self, name: &str, matrix: &Matrix) -> Result<MatrixView> {
        let written = self.read(name, matrix)?;
        self.outputs.push(CallOutput { slot: self.used - 1, written, destination: *matrix });
        Ok(written)
    }

    pub fn read_array<T: Element>(&mut self, name: &str, data: *const T, count: usize) -> Result<*mut T> {
        Ok(self.read(name, &array(name, data.cast_mut(), count)?)?.data.cast())
    }

    /// NULL stays NULL.
    pub fn write_array<T: Element>(&mut self, name: &str, data: *mut T, count: usize) -> Result<*mut T> {
        if data.is_null() {
            return Ok(data);
        }
        Ok(self.write(name, &array(name, data, count)?)?.data.cast())
    }

    /// A list of numbers that the host has computed, for the call to read.
    pub fn list(&mut self, numbers: &[u32]) -> Result<*mut u32> {
        let slot = self.slot();
        self.staging[slot].upload_classes(self.stream, numbers)
    }

    /// An array whose contents the host checks; waits for the stream where it is in device memory.
    pub fn on_host<T: Element>(&self, name: &str, data: *const T, count: usize) -> Result<Vec<T>> {
        let array = array(name, data.cast_mut(), count)?;
        if array.rows == 0 {
            return Ok(Vec::new());
        }
        match self.stream.context().memory_space(name, data.cast())? {
            // SAFETY: the caller's array of host memory.
            MemorySpace::Host => Ok(unsafe { std::slice::from_raw_parts(data, count) }.to_vec()),
            MemorySpace::Device => staging::fetch(self.stream, data, count),
        }
    }

    /// Copies the outputs in host memory to the host and waits for them; returns at once if there are none.
    pub fn finish(self) -> Result<()> {
        for CallOutput { slot, written, destination } in &self.outputs {
            if destination.cols > 0 {
                self.staging[*slot].download(self.stream, destination, written)?;
            }
        }
        Ok(())
    }
}

/// An array as a matrix of one row; an empty array has no row.
fn array<T: Element>(name: &str, data: *mut T, count: usize) -> Result<Matrix> {
    check_address(name, data, count as u64)?;
    Ok(Matrix { data: data.cast(), dtype: T::DTYPE, rows: count.min(1), cols: count, row_stride: count })
}

/// Checks that a workspace has the bytes that the call needs, and lies on the GPU.
pub(super) fn check_workspace(stream: &Stream, workspace: Workspace, needed: u64) -> Result<()> {
    workspace.check(needed, ALIGNMENT as usize)?;
    ensure!(
        stream.context().memory_space("workspace", workspace.data.cast())? == MemorySpace::Device,
        InvalidArgument,
        "workspace must be in device memory, got host memory at {:p}",
        workspace.data
    );
    Ok(())
}
