//! Rows on their way, with all of their tensors: between a head and a file, or from one head to another.

use std::ops::Range;

use super::Head;
use crate::checkpoint::Tensor;
use crate::device::TensorRows;
use crate::matrix::{DType, Matrix};
use crate::memory::{reserve, Buffer};
use crate::optimizer::StateTensor;
use crate::{error, Result};

/// Bytes of rows, of all tensors, that are on their way at a time.
const STAGED: usize = 16 << 20;

/// The names of W and of the optimizer's tensors in a file.
const TENSORS: [&str; 3] = ["weight", "momentum", "second_moment"];
const STATE: [StateTensor; 3] = [StateTensor::Centers, StateTensor::Momentum, StateTensor::SecondMoment];

impl Head {
    /// W and the optimizer's tensors, in the types that the head stores them in.
    pub(super) fn tensors(&self) -> Vec<Tensor> {
        let all = TENSORS.into_iter().zip(STATE).map(|(name, tensor)| Tensor { name, dtype: self.options.stored_dtype(tensor) });
        all.take(1 + self.options.optimizer.state_tensors()).collect()
    }

    /// Bytes of `rows` rows of all these tensors.
    pub(super) fn bytes(&self, tensors: &[Tensor], rows: u64) -> u64 {
        let elements = rows * u64::from(self.options.embedding_dim);
        tensors.iter().map(|tensor| tensor.dtype.size() as u64 * elements).sum()
    }

    /// Rows that are staged at a time.
    pub(super) fn staged_rows(&self, tensors: &[Tensor]) -> usize {
        (STAGED / self.bytes(tensors, 1) as usize).max(1)
    }

    /// Memory for rows in f32, whatever the head stores them in.
    pub(super) fn staged_f32(&self, most: u64, what: &str) -> Result<Staged> {
        let mut tensors = self.tensors();
        tensors.iter_mut().for_each(|tensor| tensor.dtype = DType::F32);
        let rows = self.staged_rows(&tensors).min(most as usize);
        Staged::new(&tensors, rows, self.options.embedding_dim as usize, what)
    }

    /// Reads rows of the shard, of which `first` is the first one's class, to these places.
    pub(super) fn read_staged(&self, staged: &mut Staged, first: u64, rows: Range<usize>) -> Result<()> {
        let read = self.backend.read_rows(first - self.shard.first, staged.part(rows));
        self.prefer_comm_failure(read)
    }
}

/// The same rows of every tensor, in the types that they travel in.
pub(super) struct Staged {
    tensors: Vec<StagedTensor>,
    /// Rows that there is room for.
    capacity: usize,
    dim: usize,
    /// Some rows of each.
    parts: Vec<TensorRows>,
}

struct StagedTensor {
    tensor: StateTensor,
    dtype: DType,
    /// Words of f32 also for bf16.
    words: Buffer<f32>,
}

impl Staged {
    /// Zeros.
    pub fn new(tensors: &[Tensor], rows: usize, dim: usize, what: &str) -> Result<Staged> {
        let mut staged = Staged { tensors: Vec::new(), capacity: rows, dim, parts: Vec::new() };
        reserve(&mut staged.tensors, tensors.len(), what)?;
        reserve(&mut staged.parts, tensors.len(), what)?;
        for (&Tensor { dtype, .. }, tensor) in tensors.iter().zip(STATE) {
            let words = Buffer::zeroed((rows * dim * dtype.size()).div_ceil(4), what)?;
            staged.tensors.push(StagedTensor { tensor, dtype, words });
        }
        Ok(staged)
    }

    /// Some rows of all tensors.
    pub fn part(&mut self, rows: Range<usize>) -> &[TensorRows] {
        self.parts.clear();
        for &mut StagedTensor { tensor, dtype, ref mut words } in &mut self.tensors {
            let all = Matrix { data: words.as_mut_ptr().cast(), dtype, rows: rows.end, cols: self.dim, row_stride: self.dim };
            self.parts.push(TensorRows { tensor, rows: all.part(rows.clone()) });
        }
        &self.parts
    }

    /// The first rows of a tensor, as they are in a file.
    pub fn bytes(&mut self, tensor: usize, rows: usize) -> &mut [u8] {
        let StagedTensor { dtype, words, .. } = &mut self.tensors[tensor];
        // SAFETY: floats without padding, of which every bit pattern is a value.
        let (_, bytes, _) = unsafe { words.align_to_mut::<u8>() };
        &mut bytes[..dtype.size() * rows * self.dim]
    }

    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Makes all rows zeros.
    pub fn clear(&mut self) {
        self.tensors.iter_mut().for_each(|tensor| tensor.words.fill(0.0));
    }

    /// Copies a row's class center.
    pub fn read_center(&mut self, row: usize, center: &mut [f32]) {
        // SAFETY: the staged rows are our own memory.
        unsafe { self.part(row..row + 1)[0].rows.read_row(0, center) }
    }

    /// A row's class center, where rows are in f32.
    pub fn center(&mut self, row: usize) -> &mut [f32] {
        assert_eq!(self.tensors[0].dtype, DType::F32, "a class center that can be written in place");
        &mut self.tensors[0].words[row * self.dim..(row + 1) * self.dim]
    }

    /// Refuses rows, of which `first` is the first one's class, with a NaN or an infinity: dense rows may have left their type since the
    /// last update looked at them, and no head would take them.
    pub fn require_finite(&self, rows: Range<usize>, first: u64) -> Result<()> {
        for (StagedTensor { dtype, words, .. }, name) in self.tensors.iter().zip(TENSORS) {
            let elements = rows.start * self.dim..rows.end * self.dim;
            let found = match dtype {
                DType::Bf16 => {
                    // SAFETY: floats without padding, of which every bit pattern is two of these.
                    let (_, halves, _) = unsafe { words.align_to::<u16>() };
                    find_first(&halves[elements], |half| half & 0x7f80 == 0x7f80)
                }
                _ => find_first(&words[elements], |value| !value.is_finite()),
            };
            if let Some(at) = found {
                let class = first + (at / self.dim) as u64;
                return Err(error!(NotFinite, "{name} of class {class} is not finite, and no head would take it"));
            }
        }
        Ok(())
    }
}

/// Where the first value is that a test finds.
fn find_first<T: Copy>(values: &[T], finds: impl Fn(T) -> bool) -> Option<usize> {
    /// A vector of values is tested at once where none of them ends the loop.
    const BLOCK: usize = 4096;
    let found = |block: &[T]| block.iter().fold(false, |found, &value| found | finds(value));
    let block = values.chunks(BLOCK).position(found)? * BLOCK;
    Some(block + values[block..].iter().position(|&value| finds(value))?)
}
