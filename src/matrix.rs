//! Element types, how ranks combine them, and the matrices that callers hand over.

use std::ops::Range;

use half::{bf16, f16};

use crate::{ensure, Result};

/// More bytes than any process can have: processors translate 57 bits of an address at most.
const ADDRESS_SPACE: u128 = 1 << 56;
/// Rows of a matrix without columns, which memory does not limit.
const MOST_EMPTY_ROWS: usize = u32::MAX as usize;

/// Refuses an array of `count` elements that no memory can hold at its address. `name` is the argument's, for the message.
pub fn check_address<T>(name: &str, data: *const T, count: u64) -> Result<()> {
    let (size, alignment) = (size_of::<T>(), align_of::<T>());
    ensure!(
        count == 0 || (data as usize).is_multiple_of(alignment),
        InvalidArgument,
        "{name} must be aligned to {alignment} bytes, got {data:p}"
    );
    let bytes = u128::from(count) * size as u128;
    ensure!(
        bytes <= ADDRESS_SPACE && data as usize as u128 + bytes <= usize::MAX as u128,
        InvalidArgument,
        "{name} must fit in the address space, got {count} elements of {size} bytes at {data:p}"
    );
    Ok(())
}

/// Element types, numbered as `pfc_dtype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum DType {
    F32 = 1,
    F16 = 2,
    Bf16 = 3,
    F64 = 4,
    I32 = 5,
    I64 = 6,
}

impl DType {
    pub const ALL: [DType; 6] = [DType::F32, DType::F16, DType::Bf16, DType::F64, DType::I32, DType::I64];

    pub fn from_code(code: i32) -> Option<DType> {
        DType::ALL.into_iter().find(|&t| t as i32 == code)
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F16 | DType::Bf16 => 2,
            DType::F32 | DType::I32 => 4,
            DType::F64 | DType::I64 => 8,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
            DType::F64 => "f64",
            DType::I32 => "i32",
            DType::I64 => "i64",
        }
    }
}

/// How an all-reduce or a reduce-scatter combines the ranks' values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum ReduceOp {
    /// Integers wrap.
    Sum = 1,
    /// A NaN wins.
    Max = 2,
}

impl ReduceOp {
    pub fn from_code(code: i32) -> Option<ReduceOp> {
        [ReduceOp::Sum, ReduceOp::Max].into_iter().find(|&op| op as i32 == code)
    }

    pub fn name(self) -> &'static str {
        match self {
            ReduceOp::Sum => "sum",
            ReduceOp::Max => "max",
        }
    }
}

/// A caller's matrix: rows of `cols` elements, `row_stride` elements apart, in the device's or the host's memory.
///
/// It is a description, not a reference: whoever reads or writes through it answers for the memory.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    pub data: *mut u8,
    pub dtype: DType,
    pub rows: usize,
    pub cols: usize,
    pub row_stride: usize,
}

// SAFETY: a description of memory; every access goes through the unsafe functions below.
unsafe impl Send for Matrix {}
unsafe impl Sync for Matrix {}

impl Matrix {
    /// A matrix over a whole slice, for Rust callers: `rows` rows without gaps.
    pub fn of_f32(data: &mut [f32], rows: usize, cols: usize) -> Matrix {
        assert_eq!(data.len(), rows * cols, "a matrix of {rows} x {cols}");
        Matrix { data: data.as_mut_ptr().cast(), dtype: DType::F32, rows, cols, row_stride: cols }
    }

    /// Some of its rows.
    pub(crate) fn part(&self, rows: Range<usize>) -> Matrix {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "{rows:?} of {} rows", self.rows);
        let data = self.data.wrapping_add(rows.start * self.row_stride * self.dtype.size());
        Matrix { data, rows: rows.len(), ..*self }
    }

    /// Checks what can be checked without touching the memory. `name` is the argument's, for the message.
    pub fn check(&self, name: &str, cols: usize) -> Result<()> {
        ensure!(
            matches!(self.dtype, DType::F32 | DType::F16 | DType::Bf16),
            InvalidArgument,
            "{name}.dtype must be f32, f16 or bf16, got {}",
            self.dtype.name()
        );
        ensure!(self.cols == cols, InvalidArgument, "{name}.cols must be {cols}, got {}", self.cols);
        ensure!(
            self.row_stride >= self.cols,
            InvalidArgument,
            "{name}.row_stride must be at least cols, {}, got {}",
            self.cols,
            self.row_stride
        );
        ensure!(!self.data.is_null() || self.rows == 0, InvalidArgument, "{name}.data must not be NULL for {} rows", self.rows);
        ensure!(
            (self.data as usize).is_multiple_of(self.dtype.size()),
            InvalidArgument,
            "{name}.data must be aligned to its {}-byte elements, got {:p}",
            self.dtype.size(),
            self.data
        );
        // The last row may end with its columns; no matrix comes near where that decides.
        let bytes = (self.rows as u128) * (self.row_stride as u128) * (self.dtype.size() as u128);
        ensure!(
            bytes <= ADDRESS_SPACE && self.data as usize as u128 + bytes <= usize::MAX as u128,
            InvalidArgument,
            "{name} must fit in the address space, got {} rows of {} elements",
            self.rows,
            self.row_stride
        );
        ensure!(
            self.cols > 0 || self.rows <= MOST_EMPTY_ROWS,
            InvalidArgument,
            "{name}.rows must be at most {MOST_EMPTY_ROWS} with 0 columns, got {}",
            self.rows
        );
        Ok(())
    }

    /// Reads row `row` into `out` as f32.
    ///
    /// # Safety
    /// The matrix describes host memory that may be read, and `row < rows`, `out.len() == cols`.
    pub unsafe fn read_row(&self, row: usize, out: &mut [f32]) {
        debug_assert!(row < self.rows && out.len() == self.cols);
        let start = self.data.add(row * self.row_stride * self.dtype.size());
        match self.dtype {
            DType::F32 => out.copy_from_slice(std::slice::from_raw_parts(start.cast::<f32>(), self.cols)),
            DType::F16 => widen(std::slice::from_raw_parts(start.cast::<f16>(), self.cols), out, f16::to_f32),
            DType::Bf16 => widen(std::slice::from_raw_parts(start.cast::<bf16>(), self.cols), out, bf16::to_f32),
            other => unreachable!("checked at the door: {other:?}"),
        }
    }

    /// Writes row `row` from f32, rounding to nearest even.
    ///
    /// # Safety
    /// The matrix describes host memory that may be written, and `row < rows`, `values.len() == cols`.
    pub unsafe fn write_row(&self, row: usize, values: &[f32]) {
        debug_assert!(row < self.rows && values.len() == self.cols);
        let start = self.data.add(row * self.row_stride * self.dtype.size());
        match self.dtype {
            DType::F32 => std::slice::from_raw_parts_mut(start.cast::<f32>(), self.cols).copy_from_slice(values),
            DType::F16 => narrow(values, std::slice::from_raw_parts_mut(start.cast::<f16>(), self.cols), f16::from_f32),
            DType::Bf16 => narrow(values, std::slice::from_raw_parts_mut(start.cast::<bf16>(), self.cols), bf16::from_f32),
            other => unreachable!("checked at the door: {other:?}"),
        }
    }
}

fn widen<T: Copy>(from: &[T], to: &mut [f32], convert: impl Fn(T) -> f32) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = convert(from);
    }
}

fn narrow<T>(from: &[f32], to: &mut [T], convert: impl Fn(f32) -> T) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = convert(from);
    }
}
