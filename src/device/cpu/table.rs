//! A tensor of rows in the type that it is stored in. Rows are computed with in float32: in place where they are stored so, else in a copy.

use std::ops::Range;

use half::bf16;

use super::row_tensors::StartValues;
use crate::matrix::DType;
use crate::memory::{Buffer, Parts};
use crate::{rounding, Result};

pub(super) enum Table {
    F32(Buffer<f32>),
    Bf16(Buffer<u16>),
}

/// What becomes of the bits that a stored row has no room for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rounding {
    Nearest,
    /// [`rounding::at_random`] with this key.
    AtRandom(u32),
}

/// A table that several threads may take different rows of.
#[derive(Clone, Copy)]
pub(super) enum TableParts<'a> {
    F32(Parts<'a, f32>),
    Bf16(Parts<'a, u16>),
}

impl Table {
    /// Zeros. `dtype` is one that [`crate::options::HeadOptions::check`] lets pass.
    pub fn zeroed(dtype: DType, elements: usize, what: &str) -> Result<Table> {
        Ok(match dtype {
            DType::Bf16 => Table::Bf16(Buffer::zeroed(elements, what)?),
            _ => Table::F32(Buffer::zeroed(elements, what)?),
        })
    }

    pub fn dtype(&self) -> DType {
        match self {
            Table::F32(_) => DType::F32,
            Table::Bf16(_) => DType::Bf16,
        }
    }

    pub fn is_empty(&self) -> bool {
        match self {
            Table::F32(values) => values.is_empty(),
            Table::Bf16(values) => values.is_empty(),
        }
    }

    pub fn parts(&mut self) -> TableParts<'_> {
        match self {
            Table::F32(values) => TableParts::F32(values.parts()),
            Table::Bf16(values) => TableParts::Bf16(values.parts()),
        }
    }

    /// Copies the elements of a row.
    pub fn read(&self, at: Range<usize>, out: &mut [f32]) {
        match self {
            Table::F32(values) => out.copy_from_slice(&values[at]),
            Table::Bf16(values) => rounding::widen(&values[at], out),
        }
    }

    /// The class center that [`Table::read`] would give if it were stored at its start.
    pub fn read_start(&self, start: &StartValues, class: u64, out: &mut [f32]) {
        start.values(class, out);
        if let Table::Bf16(_) = self {
            out.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
        }
    }
}

impl<'a> TableParts<'a> {
    /// Copies the elements of a row.
    ///
    /// # Safety
    /// No other thread writes them.
    pub unsafe fn read(&self, at: Range<usize>, out: &mut [f32]) {
        match self {
            TableParts::F32(values) => out.copy_from_slice(values.shared(at)),
            TableParts::Bf16(values) => rounding::widen(values.shared(at), out),
        }
    }

    /// The elements of a row, to be changed and then given to [`TableParts::store`]; `copy` is where they are if they are stored in
    /// another type.
    ///
    /// # Safety
    /// No other thread touches them.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn load<'b>(&self, at: Range<usize>, copy: &'b mut [f32]) -> &'b mut [f32]
    where
        'a: 'b,
    {
        match self {
            TableParts::F32(values) => values.range(at),
            TableParts::Bf16(values) => {
                rounding::widen(values.range(at), copy);
                copy
            }
        }
    }

    /// Stores what `load` gave. Gives false where that makes a number infinite.
    ///
    /// # Safety
    /// No other thread touches the row.
    pub unsafe fn store(&self, at: Range<usize>, row: &[f32], rounding: Rounding) -> bool {
        match (self, rounding) {
            // It is there already.
            (TableParts::F32(_), _) => true,
            (TableParts::Bf16(values), Rounding::Nearest) => rounding::to_nearest(row, values.range(at)),
            (TableParts::Bf16(values), Rounding::AtRandom(key)) => rounding::at_random(key, row, values.range(at)),
        }
    }

    /// The elements of a row as they are stored.
    ///
    /// # Safety
    /// No other thread touches them.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn stored(&self, at: Range<usize>) -> &'a mut [u8] {
        // SAFETY: numbers without padding, of which every bit pattern is a value.
        match self {
            TableParts::F32(values) => values.range(at).align_to_mut().1,
            TableParts::Bf16(values) => values.range(at).align_to_mut().1,
        }
    }

    /// Hints that a row will be touched soon.
    pub fn prefetch(&self, at: Range<usize>) {
        // SAFETY: a hint does not access the memory.
        unsafe {
            match self {
                TableParts::F32(values) => prefetch(values.shared(at)),
                TableParts::Bf16(values) => prefetch(values.shared(at)),
            }
        }
    }
}

/// Asks for every cache line of a row.
fn prefetch<T>(row: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in row.chunks(64 / size_of::<T>()) {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        // SAFETY: a hint; the address is in the row.
        unsafe { _mm_prefetch(line.as_ptr().cast(), _MM_HINT_T0) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
}
