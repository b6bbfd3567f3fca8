//! A stateless call's arguments: used where they are when they are on the GPU, copied there and back when they are the host's.

use std::mem::size_of;

use super::driver::{DeviceBuffer, Place, Stream};
use super::shared_structs::{MatrixView, StepBlock};
use super::staging::{self, Staging};
use crate::device::Workspace;
use crate::matrix::{DType, Matrix};
use crate::memory::Plain;
use crate::{ensure, Result};

/// Where the kernels' vector accesses ask a workspace to begin.
pub(super) const ALIGNMENT: u64 = 16;

/// Memory that a device keeps for its stateless calls: it grows to the largest so far. One call at a time fills it; the stream keeps
/// the calls' uses of it apart.
#[derive(Default)]
pub(super) struct Room {
    /// By the number of a call's argument.
    staging: Vec<Staging>,
    pub draw: Draw,
}

/// What a draw needs beside the caller's arrays.
#[derive(Default)]
pub(super) struct Draw {
    pub block: Option<DeviceBuffer<StepBlock>>,
    /// Zero between draws, as its users leave it.
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

/// One call's arguments.
pub(super) struct Lent<'a> {
    stream: &'a Stream,
    staging: &'a mut Vec<Staging>,
    used: usize,
    /// What was written for the host: the staging's number, where, and whose.
    results: Vec<(usize, MatrixView, Matrix)>,
}

impl<'a> Lent<'a> {
    pub fn new(stream: &'a Stream, room: &'a mut Room) -> (Lent<'a>, &'a mut Draw) {
        (Lent { stream, staging: &mut room.staging, used: 0, results: Vec::new() }, &mut room.draw)
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
        let view = self.staging[slot].target(self.stream, name, matrix)?;
        self.results.push((slot, view, *matrix));
        Ok(view)
    }

    /// A matrix that the call changes.
    pub fn change(&mut self, name: &str, matrix: &Matrix) -> Result<MatrixView> {
        let view = self.read(name, matrix)?;
        self.results.push((self.used - 1, view, *matrix));
        Ok(view)
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

    /// Numbers of the host's own making, where the call can read them.
    pub fn list(&mut self, numbers: &[u32]) -> Result<*mut u32> {
        let slot = self.slot();
        self.staging[slot].classes(self.stream, numbers)
    }

    /// An array whose contents the host checks; waits for the stream where it is in device memory.
    pub fn on_host<T: Element>(&self, name: &str, data: *const T, count: usize) -> Result<Vec<T>> {
        let array = array(name, data.cast_mut(), count)?;
        if array.rows == 0 {
            return Ok(Vec::new());
        }
        match self.stream.context().place(name, data.cast())? {
            // SAFETY: the caller's array of host memory.
            Place::Host => Ok(unsafe { std::slice::from_raw_parts(data, count) }.to_vec()),
            Place::Device => staging::fetch(self.stream, data, count),
        }
    }

    /// Copies to the host what is the host's, and waits for it; without any returns at once.
    pub fn finish(self) -> Result<()> {
        for (slot, view, matrix) in &self.results {
            if matrix.cols > 0 {
                self.staging[*slot].download(self.stream, view, matrix)?;
            }
        }
        Ok(())
    }
}

/// An array as a matrix of one row; none has no row.
fn array<T: Element>(name: &str, data: *mut T, count: usize) -> Result<Matrix> {
    ensure!(data.is_aligned(), InvalidArgument, "{name} must be aligned to its {}-byte elements, got {data:p}", size_of::<T>());
    Ok(Matrix { data: data.cast(), dtype: T::DTYPE, rows: count.min(1), cols: count, row_stride: count })
}

/// Cuts arrays off a workspace, or counts its bytes where there is none yet.
pub(super) struct Cut {
    start: *mut u8,
    pub bytes: u64,
}

impl Cut {
    pub fn new(start: *mut u8) -> Cut {
        Cut { start, bytes: 0 }
    }

    /// The next `count` elements. What no memory holds stays more than any memory.
    pub fn take<T>(&mut self, count: u64) -> *mut T {
        let at = self.start.wrapping_add(self.bytes as usize);
        let bytes = count.saturating_mul(size_of::<T>() as u64);
        self.bytes = self.bytes.saturating_add(bytes.checked_next_multiple_of(ALIGNMENT).unwrap_or(u64::MAX));
        at.cast()
    }
}

/// That a workspace is what the call needs, and on the GPU.
pub(super) fn check_workspace(stream: &Stream, workspace: Workspace, needed: u64) -> Result<()> {
    workspace.check(needed, ALIGNMENT as usize)?;
    ensure!(
        stream.context().place("workspace", workspace.data.cast())? == Place::Device,
        InvalidArgument,
        "workspace must be in device memory, got host memory at {:p}",
        workspace.data
    );
    Ok(())
}
