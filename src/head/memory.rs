//! Callers' arrays, wherever they are: in the host's memory, or in the device's, which the host does not read.

use super::Head;
use crate::matrix::Matrix;
use crate::memory::{zeros, Buffer, Plain};
use crate::{ensure, Result, Status};

impl Head {
    /// Whether the head can use a caller's array where it lies. The error names the argument.
    pub fn reaches<T>(&self, name: &str, pointer: *const T) -> Result<()> {
        self.rows.holds(name, pointer.cast()).map(|_| ())
    }

    /// Refuses what the host writes by itself and cannot.
    pub fn on_host<T>(&self, name: &str, pointer: *const T) -> Result<()> {
        let held = match self.rows.holds(name, pointer.cast()) {
            // A device that has failed knows no place any more, and what it does not know is the host's.
            Err(error) if error.status == Status::Device => false,
            held => held?,
        };
        ensure!(!held, InvalidArgument, "{name} must be in host memory, got device memory (rank {})", self.rank());
        Ok(())
    }

    /// Writes values to a caller's array; they are there when it returns.
    ///
    /// # Safety
    /// There is room for as many at `to`.
    pub unsafe fn give<T: Plain>(&self, name: &str, to: *mut T, values: &[T]) -> Result<()> {
        match values {
            [] => Ok(()),
            // Plain numbers are their bytes.
            values => {
                let bytes = std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values));
                self.rows.write_values(name, to.cast(), bytes)
            }
        }
    }

    /// The values of a caller's array.
    ///
    /// # Safety
    /// There are as many at `from`.
    pub(super) unsafe fn take<T: Plain + Default>(&self, name: &str, from: *const T, count: usize) -> Result<Vec<T>> {
        let mut values: Vec<T> = zeros(&[count], name)?;
        if count > 0 {
            // Plain numbers are their bytes.
            let bytes = std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values.as_slice()));
            self.rows.read_values(name, from.cast(), bytes)?;
        }
        Ok(values)
    }

    /// A caller's matrix where the host can read it, and the copy that it is of, if it is one.
    ///
    /// # Safety
    /// It describes memory of the host's or the device's.
    pub(super) unsafe fn readable(&self, name: &str, matrix: &Matrix) -> Result<(Matrix, Option<Buffer<u8>>)> {
        if matrix.rows == 0 || !self.rows.holds(name, matrix.data)? {
            return Ok((*matrix, None));
        }
        // What lies after the last row is not the matrix's.
        let elements = (matrix.rows - 1) * matrix.row_stride + matrix.cols;
        let mut copy = Buffer::zeroed(elements * matrix.dtype.size(), name)?;
        self.rows.read_values(name, matrix.data, &mut copy)?;
        Ok((Matrix { data: copy.as_mut_ptr(), ..*matrix }, Some(copy)))
    }
}
