//! Callers' matrices: used where they are when they are on the GPU, copied there and back when they are the host's.

use std::mem::{size_of, MaybeUninit};
use std::sync::Arc;

use super::driver::{Context, DeviceBuffer, Place, Stream};
use super::shared_structs::MatrixView;
use crate::matrix::Matrix;
use crate::memory::{Buffer, Plain};
use crate::{error, Result};

/// Bytes that are fetched, or go through the staging memory, at a time where there are many.
pub(super) const PIECE: usize = 16 << 20;

/// Room on the GPU for one host matrix at a time and one list of classes; it grows to the largest so far.
pub(super) struct Staging {
    matrix: Option<DeviceBuffer<u8>>,
    classes: Option<DeviceBuffer<u32>>,
}

impl Staging {
    pub fn new() -> Staging {
        Staging { matrix: None, classes: None }
    }

    /// A matrix to be read by what `stream` runs next.
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
        // SAFETY: the driver has copied pageable memory away when it returns; the staging memory lives as long as the head.
        unsafe { stream.upload(view.data.cast(), bytes.as_ptr().cast(), bytes.len()) }?;
        Ok(view)
    }

    /// Where what `stream` runs next is to write a matrix; `download` brings it home.
    pub fn target(&mut self, stream: &Stream, name: &str, matrix: &Matrix) -> Result<MatrixView> {
        match on_device(stream.context(), name, matrix)? {
            true => Ok(MatrixView::from(matrix)),
            false => self.compact(stream, matrix),
        }
    }

    /// Copies to a host matrix what was written to its `target`, and waits for it.
    pub fn download(&self, stream: &Stream, target: &MatrixView, matrix: &Matrix) -> Result<()> {
        if target.data == matrix.data || matrix.rows == 0 {
            return Ok(());
        }
        let row = matrix.cols * matrix.dtype.size();
        let mut bytes = host_bytes(matrix.rows * row, "a matrix")?;
        // SAFETY: the target is as large; the bytes outlive the wait.
        unsafe { stream.download(bytes.as_mut_ptr().cast(), target.data.cast(), bytes.len()) }?;
        stream.synchronize()?;
        for (number, values) in bytes.chunks_exact(row).enumerate() {
            // SAFETY: as in `upload`.
            unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), row_of(matrix, number), row) };
        }
        Ok(())
    }

    /// Puts a list of classes where what `stream` runs next can read it.
    pub fn classes(&mut self, stream: &Stream, classes: &[u32]) -> Result<*mut u32> {
        let buffer = grown(&mut self.classes, stream, classes.len(), "the caller's sample")?;
        // SAFETY: as in `upload`.
        unsafe { stream.upload(buffer.as_mut_ptr().cast(), classes.as_ptr().cast(), size_of_val(classes)) }?;
        Ok(buffer.as_mut_ptr())
    }

    fn compact(&mut self, stream: &Stream, matrix: &Matrix) -> Result<MatrixView> {
        let bytes = matrix.rows * matrix.cols * matrix.dtype.size();
        let buffer = grown(&mut self.matrix, stream, bytes, "a matrix of the host's")?;
        Ok(MatrixView { data: buffer.as_mut_ptr(), stride: matrix.cols as u64, ..MatrixView::from(matrix) })
    }
}

fn on_device(context: &Arc<Context>, name: &str, matrix: &Matrix) -> Result<bool> {
    Ok(matrix.rows > 0 && context.place(name, matrix.data.cast())? == Place::Device)
}

/// The buffer of a slot, of `length` at least: made anew, and zero, where it was shorter.
pub(super) fn grown<'a, T: Plain>(
    slot: &'a mut Option<DeviceBuffer<T>>,
    stream: &Stream,
    length: usize,
    what: &str,
) -> Result<&'a DeviceBuffer<T>> {
    if slot.as_ref().is_none_or(|buffer| buffer.len() < length.max(1)) {
        // The old one first: there may be no room for both.
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

/// Copies `count` values from the device once `stream` has come so far.
pub(super) fn fetch<T: Plain>(stream: &Stream, from: *const T, count: usize) -> Result<Vec<T>> {
    let mut values: Vec<MaybeUninit<T>> = Vec::with_capacity(count);
    values.resize_with(count, MaybeUninit::uninit);
    // SAFETY: the caller names an array of its own of at least so many; the values outlive the wait.
    unsafe { stream.download(values.as_mut_ptr().cast(), from.cast(), count * size_of::<T>()) }?;
    stream.synchronize()?;
    // SAFETY: all of them have been written, and any bytes are a plain value.
    Ok(values.into_iter().map(|value| unsafe { value.assume_init() }).collect())
}

/// Copies a caller's bytes to the host, once `stream` has come so far.
///
/// # Safety
/// There are as many at `from`, in the host's memory or the device's.
pub(super) unsafe fn read(stream: &Stream, name: &str, from: *const u8, to: &mut [u8]) -> Result<()> {
    match stream.context().place(name, from.cast())? {
        Place::Host => std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()),
        Place::Device => {
            stream.download(to.as_mut_ptr().cast(), from.cast(), to.len())?;
            stream.synchronize()?;
        }
    }
    Ok(())
}

/// Copies bytes to a caller, after all that is on `stream`; they are there when it returns.
///
/// # Safety
/// There is room for as many at `to`, in the host's memory or the device's.
pub(super) unsafe fn write(stream: &Stream, name: &str, to: *mut u8, from: &[u8]) -> Result<()> {
    match stream.context().place(name, to.cast_const().cast())? {
        Place::Host => std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()),
        Place::Device => {
            stream.upload(to.cast(), from.as_ptr().cast(), from.len())?;
            stream.synchronize()?;
        }
    }
    Ok(())
}

/// The first row of a matrix that holds a NaN or an infinity. One on the device is fetched a piece at a time.
pub(super) fn not_finite(stream: &Stream, name: &str, matrix: &Matrix) -> Result<Option<usize>> {
    let row = matrix.row_stride * matrix.dtype.size();
    let piece = match on_device(stream.context(), name, matrix)? {
        true => (PIECE / row.max(1)).clamp(1, matrix.rows),
        false => return Ok(first_not_finite(matrix)),
    };
    // What lies after the last row is not the matrix's.
    let bytes_of = |rows: usize| (rows - 1) * row + matrix.cols * matrix.dtype.size();
    let mut bytes = Buffer::<u8>::zeroed(bytes_of(piece), name)?;
    for start in (0..matrix.rows).step_by(piece) {
        let part = part_of(matrix, start, piece);
        // SAFETY: the caller's matrix; the bytes outlive the wait.
        unsafe { stream.download(bytes.as_mut_ptr().cast(), part.data.cast_const().cast(), bytes_of(part.rows)) }?;
        stream.synchronize()?;
        if let Some(number) = first_not_finite(&Matrix { data: bytes.as_mut_ptr(), ..part }) {
            return Ok(Some(start + number));
        }
    }
    Ok(None)
}

/// As `not_finite`, of a matrix that the host can read.
fn first_not_finite(matrix: &Matrix) -> Option<usize> {
    let mut values = vec![0f32; matrix.cols];
    (0..matrix.rows).find(|&number| {
        // SAFETY: a row of it.
        unsafe { matrix.read_row(number, &mut values) };
        values.iter().any(|value| !value.is_finite())
    })
}

/// At most `piece` rows of a matrix.
pub(super) fn part_of(rows: &Matrix, start: usize, piece: usize) -> Matrix {
    Matrix { data: row_of(rows, start), rows: piece.min(rows.rows - start), ..*rows }
}
