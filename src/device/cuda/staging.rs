//! Callers' matrices: used where they are when they are on the GPU, copied there and back when they are in host memory.

use std::mem::{size_of, MaybeUninit};
use std::sync::Arc;

use super::driver::{Context, DeviceBuffer, MemorySpace, Stream};
use super::shared_structs::MatrixView;
use super::upload_slots::{UploadSlots, MOST_BYTES};
use crate::matrix::Matrix;
use crate::memory::{reserve, zeros, Buffer, Plain};
use crate::{error, Result};

/// The most bytes of a large matrix that are copied at a time.
pub(super) const COPIED_BYTES: usize = 16 << 20;

/// Small copies under way: of two steps embeddings, three terms and a list of classes each.
const SLOTS: usize = 10;

/// Memory on the GPU for one host matrix at a time and one list of classes; it grows to the largest so far.
pub(super) struct Staging {
    matrix: Option<DeviceBuffer<u8>>,
    classes: Option<DeviceBuffer<u32>>,
    row_arrays: Option<DeviceBuffer<f32>>,
    /// For what is small.
    slots: Option<UploadSlots<u8>>,
}

impl Staging {
    pub fn new() -> Staging {
        Staging { matrix: None, classes: None, row_arrays: None, slots: None }
    }

    /// One that has all of its host memory from the beginning.
    pub fn with_slots(context: &Arc<Context>) -> Result<Staging> {
        Ok(Staging { slots: Some(new_slots(context)?), ..Staging::new() })
    }

    /// A matrix that the kernels which `stream` runs next read.
    pub fn upload(&mut self, stream: &Stream, name: &str, matrix: &Matrix) -> Result<MatrixView> {
        if on_device(stream.context(), name, matrix)? {
            return Ok(MatrixView::from(matrix));
        }
        let view = self.compact(stream, matrix)?;
        let row = matrix.cols * matrix.dtype.size();
        let mut bytes = host_bytes(matrix.rows * row, name)?;
        for number in 0..matrix.rows {
            // SAFETY: the caller's matrix is host memory of this many rows; the bytes have room for as many.
            unsafe { std::ptr::copy_nonoverlapping(row_of(matrix, number), bytes.as_mut_ptr().add(number * row), row) };
        }
        // SAFETY: the staging memory has room for them.
        unsafe { self.copy(stream, view.data, &bytes) }?;
        Ok(view)
    }

    /// Memory to which the kernels that `stream` runs next write a matrix; `download` copies it to the caller.
    pub fn output(&mut self, stream: &Stream, name: &str, matrix: &Matrix) -> Result<MatrixView> {
        match on_device(stream.context(), name, matrix)? {
            true => Ok(MatrixView::from(matrix)),
            false => self.compact(stream, matrix),
        }
    }

    /// Copies to a host matrix what was written to its `output`, and waits for it.
    pub fn download(&self, stream: &Stream, destination: &Matrix, output: &MatrixView) -> Result<()> {
        if output.data == destination.data || destination.rows == 0 {
            return Ok(());
        }
        let row = destination.cols * destination.dtype.size();
        let mut bytes = host_bytes(destination.rows * row, "a matrix")?;
        // SAFETY: the output is as large; the bytes outlive the wait.
        unsafe { stream.download(bytes.as_mut_ptr().cast(), output.data.cast(), bytes.len()) }?;
        stream.synchronize()?;
        for (number, values) in bytes.chunks_exact(row).enumerate() {
            // SAFETY: as in `upload`.
            unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), row_of(destination, number), row) };
        }
        Ok(())
    }

    /// Copies a list of classes to the GPU, for the kernels that `stream` runs next.
    pub fn upload_classes(&mut self, stream: &Stream, classes: &[u32]) -> Result<*mut u32> {
        let room = grown(&mut self.classes, stream, classes.len(), "the caller's sample")?.as_mut_ptr();
        // SAFETY: as in `upload`; numbers are bytes.
        unsafe { self.copy(stream, room.cast(), std::slice::from_raw_parts(classes.as_ptr().cast(), size_of_val(classes))) }?;
        Ok(room)
    }

    /// Copies bytes that may change when it returns. It waits for many, since the driver may read them late.
    ///
    /// # Safety
    /// There is room for them at `destination` on the device until the stream has done it.
    pub unsafe fn copy(&mut self, stream: &Stream, destination: *mut u8, bytes: &[u8]) -> Result<()> {
        if bytes.len() > MOST_BYTES {
            return stream.upload_now(destination.cast(), bytes.as_ptr().cast(), bytes.len());
        }
        let slots = match self.slots.take() {
            Some(slots) => slots,
            None => new_slots(stream.context())?,
        };
        self.slots.insert(slots).upload(stream, destination, bytes)
    }

    /// Three arrays with a number for each row of a batch.
    pub fn row_arrays(&mut self, stream: &Stream, max_batch: usize) -> Result<[*mut f32; 3]> {
        let first = grown(&mut self.row_arrays, stream, 3 * max_batch, "the rows' terms")?.as_mut_ptr();
        Ok([0, 1, 2].map(|number| first.wrapping_add(number * max_batch)))
    }

    fn compact(&mut self, stream: &Stream, matrix: &Matrix) -> Result<MatrixView> {
        let bytes = matrix.rows * matrix.cols * matrix.dtype.size();
        let buffer = grown(&mut self.matrix, stream, bytes, "a matrix of the host's")?;
        Ok(MatrixView { data: buffer.as_mut_ptr(), stride: matrix.cols as u64, ..MatrixView::from(matrix) })
    }
}

fn new_slots(context: &Arc<Context>) -> Result<UploadSlots<u8>> {
    UploadSlots::new(context, SLOTS, MOST_BYTES, "numbers under way")
}

fn on_device(context: &Arc<Context>, name: &str, matrix: &Matrix) -> Result<bool> {
    Ok(matrix.rows > 0 && context.memory_space(name, matrix.data.cast())? == MemorySpace::Device)
}

/// The buffer of a slot, of `length` at least: made anew, and zero, where it was shorter.
pub(super) fn grown<'a, T: Plain>(
    slot: &'a mut Option<DeviceBuffer<T>>,
    stream: &Stream,
    length: usize,
    what: &str,
) -> Result<&'a DeviceBuffer<T>> {
    if slot.as_ref().is_none_or(|buffer| buffer.len() < length.max(1)) {
        // The old buffer is freed first: both together may not fit.
        *slot = None;
        *slot = Some(DeviceBuffer::zeroed(stream, length.max(1), what)?);
    }
    slot.as_ref().ok_or_else(|| error!(Device, "{what}: no memory was made"))
}

fn host_bytes(bytes: usize, what: &str) -> Result<Vec<u8>> {
    crate::memory::zeros(&[bytes], what)
}

fn row_of(matrix: &Matrix, row: usize) -> *mut u8 {
    matrix.data.wrapping_add(row * matrix.row_stride * matrix.dtype.size())
}

/// Copies `count` values from the device in the order of `stream`, and waits for them.
pub(super) fn fetch<T: Plain>(stream: &Stream, source: *const T, count: usize) -> Result<Vec<T>> {
    let mut values: Vec<MaybeUninit<T>> = Vec::new();
    reserve(&mut values, count, "values of the GPU")?;
    values.resize_with(count, MaybeUninit::uninit);
    // SAFETY: the caller names an array of its own of at least so many; the values outlive the wait.
    unsafe { stream.download(values.as_mut_ptr().cast(), source.cast(), count * size_of::<T>()) }?;
    stream.synchronize()?;
    // SAFETY: all of them have been written, and any bytes are a plain value.
    Ok(values.into_iter().map(|value| unsafe { value.assume_init() }).collect())
}

/// Copies a caller's bytes to the host in the order of `stream`, and waits for them.
///
/// # Safety
/// There are as many at `source`, in host or device memory.
pub(super) unsafe fn read_values(stream: &Stream, name: &str, destination: &mut [u8], source: *const u8) -> Result<()> {
    match stream.context().memory_space(name, source.cast())? {
        MemorySpace::Host => std::ptr::copy_nonoverlapping(source, destination.as_mut_ptr(), destination.len()),
        MemorySpace::Device => {
            stream.download(destination.as_mut_ptr().cast(), source.cast(), destination.len())?;
            stream.synchronize()?;
        }
    }
    Ok(())
}

/// Copies bytes to a caller, after all that is on `stream`; they are there when it returns.
///
/// # Safety
/// There is room for as many at `destination`, in host or device memory.
pub(super) unsafe fn write_values(stream: &Stream, name: &str, destination: *mut u8, source: &[u8]) -> Result<()> {
    match stream.context().memory_space(name, destination.cast_const().cast())? {
        MemorySpace::Host => std::ptr::copy_nonoverlapping(source.as_ptr(), destination, source.len()),
        MemorySpace::Device => {
            stream.upload_now(destination.cast(), source.as_ptr().cast(), source.len())?;
        }
    }
    Ok(())
}

/// Gives the rows of a matrix to `body`, each with its number, until one is an error. A matrix on the device is fetched some rows at a time.
pub(super) fn for_each_row(stream: &Stream, name: &str, matrix: &Matrix, body: impl Fn(usize, &[f32]) -> Result<()>) -> Result<()> {
    let mut values = zeros(&[matrix.cols], "a row")?;
    let mut some_of_host = |first: usize, some: &Matrix| {
        (0..some.rows).try_for_each(|row| {
            // SAFETY: a row of a matrix that the host can read.
            unsafe { some.read_row(row, &mut values) };
            body(first + row, &values)
        })
    };
    let row = matrix.row_stride * matrix.dtype.size();
    let rows_at_once = match on_device(stream.context(), name, matrix)? {
        true => (COPIED_BYTES / row.max(1)).clamp(1, matrix.rows),
        false => return some_of_host(0, matrix),
    };
    // The gap after the last row need not be the matrix's memory.
    let bytes_of = |rows: usize| (rows - 1) * row + matrix.cols * matrix.dtype.size();
    let mut bytes = Buffer::<u8>::zeroed(bytes_of(rows_at_once), name)?;
    for start in (0..matrix.rows).step_by(rows_at_once) {
        let some = some_rows(matrix, start, rows_at_once);
        // SAFETY: the caller's matrix; the bytes outlive the wait.
        unsafe { stream.download(bytes.as_mut_ptr().cast(), some.data.cast_const().cast(), bytes_of(some.rows)) }?;
        stream.synchronize()?;
        some_of_host(start, &Matrix { data: bytes.as_mut_ptr(), ..some })?;
    }
    Ok(())
}

/// The rows of a matrix from `start`, at most `count`.
pub(super) fn some_rows(matrix: &Matrix, start: usize, count: usize) -> Matrix {
    Matrix { data: row_of(matrix, start), rows: count.min(matrix.rows - start), ..*matrix }
}
