//! The class centres nearest to each query: cosines chunk by chunk, and the best of each row kept in lists on the GPU.
//!
//! Lists of more than [`LONGEST`] do not fit a warp's registers: for those the host reads the rows once, a piece at a time, and
//! searches itself.

use super::driver::DeviceBuffer;
use super::kernels::BLOCK;
use super::shared_structs::{HeadArrays, MatrixView, TILE_COLUMNS, TILE_ROWS};
use super::staging::fetch;
use super::stateless::BLOCKS;
use super::Cuda;
use crate::device::host_math::{gemm, inverse_norm};
use crate::device::nearest::{keep_best, offer, Nearest};
use crate::matrix::{DType, Matrix};
use crate::memory::{zeros, Plain};
use crate::Result;

/// kernels/nearest.cu kLongest: what evaluation asks for (1, 5, 100) fits four 64-bit registers a lane.
const LONGEST: usize = 128;
/// Columns and queries that go at a time: 33 MB of cosines.
const COLUMNS: u32 = 4096;
const QUERIES: usize = 2048;
/// Warps that share a row at most: a longer list of lists costs more to merge than it spares.
const MOST_PARTS: u32 = 32;
/// Rows of a piece of the host's.
const PIECE: usize = 4096;

/// Where a head's rows are, and what numbers they have.
pub(super) struct Rows<'a> {
    pub cuda: &'a Cuda,
    /// The head's: what numbers and sizes it has.
    pub view: HeadArrays,
    /// Reads rows from the one named on, as they are now, into a matrix of the host's or the GPU's.
    pub read: &'a dyn Fn(usize, &Matrix) -> Result<()>,
}

impl Rows<'_> {
    /// For each query its `k` nearest centres of the shard, nearest first, equal cosines by ascending id: [queries, k].
    pub fn nearest(&self, queries: &[f32], k: usize) -> Result<Nearest> {
        if k > LONGEST {
            return self.nearest_on_host(queries, k);
        }
        let mut found = Nearest::default();
        for some in queries.chunks(QUERIES * self.view.dim as usize) {
            let (ids, cosines) = self.nearest_of(some, k as u32)?;
            found.ids.extend(ids);
            found.cosines.extend(cosines);
        }
        Ok(found)
    }

    fn nearest_of(&self, queries: &[f32], k: u32) -> Result<(Vec<i64>, Vec<f32>)> {
        let HeadArrays { dim, depth_pitch: pitch, shard_rows, first_class, .. } = self.view;
        let (cuda, stream) = (self.cuda, &self.cuda.stream);
        let count = queries.len() / dim as usize;
        let rows = (count as u64).next_multiple_of(TILE_ROWS);
        let columns = u64::from(shard_rows.min(COLUMNS)).next_multiple_of(TILE_COLUMNS);
        let warps = cuda.grid(BLOCKS) * (BLOCK / 32);
        let parts = (warps / count as u32).clamp(1, MOST_PARTS);

        let raw = buffer::<f32>(cuda, queries.len() as u64, "queries of top_k")?;
        let centers = buffer::<f32>(cuda, columns * u64::from(dim), "rows of top_k")?;
        let unit_operand = buffer::<u16>(cuda, 3 * rows * u64::from(pitch), "queries of top_k")?;
        let center_operand = buffer::<u16>(cuda, 3 * columns * u64::from(pitch), "rows of top_k")?;
        let products = buffer::<f32>(cuda, count as u64 * columns, "cosines of top_k")?;
        let lists = buffer::<u64>(cuda, count as u64 * u64::from(parts) * LONGEST as u64, "lists of top_k")?;
        let ids = buffer::<i64>(cuda, count as u64 * u64::from(k), "ids of top_k")?;
        let cosines = buffer::<f32>(cuda, count as u64 * u64::from(k), "cosines of top_k")?;

        let view = HeadArrays {
            unit_operand: unit_operand.as_mut_ptr(),
            center_operand: center_operand.as_mut_ptr(),
            plane_rows: rows * u64::from(pitch),
            plane_centers: columns * u64::from(pitch),
            first_class,
            dim,
            depth_pitch: pitch,
            ..HeadArrays::zeroed()
        };
        cuda.put(raw.as_mut_ptr(), queries)?;
        let given = MatrixView::from(&whole(raw.as_mut_ptr(), count, dim as usize));
        cuda.unit_rows(&view, given, count as u32)?;
        for first in (0..shard_rows).step_by(COLUMNS as usize) {
            let here = COLUMNS.min(shard_rows - first);
            let piece = whole(centers.as_mut_ptr(), here as usize, dim as usize);
            let some = MatrixView::from(&whole(products.as_mut_ptr(), count, here as usize));
            (self.read)(first as usize, &piece)?;
            cuda.unit_centers(&view, MatrixView::from(&piece), 0, here)?;
            cuda.products.cosines(stream, view, count as u32, here, 0, some)?;
            cuda.run(&cuda.kernels.keep_nearest, (view, some, first, k, parts, lists.as_mut_ptr().cast()))?;
        }
        let (kept, to) = (lists.as_mut_ptr().cast(), (ids.as_mut_ptr().cast(), cosines.as_mut_ptr().cast()));
        cuda.run(&cuda.kernels.merge_nearest, (view, count as u64, k, parts, kept, to.0, to.1))?;
        let all = count * k as usize;
        Ok((fetch(stream, ids.as_mut_ptr(), all)?, fetch(stream, cosines.as_mut_ptr(), all)?))
    }

    fn nearest_on_host(&self, queries: &[f32], k: usize) -> Result<Nearest> {
        let (dim, rows) = (self.view.dim as usize, self.view.shard_rows as usize);
        let count = queries.len() / dim;
        let mut units = zeros(&[count, dim], "queries of top_k")?;
        units.copy_from_slice(queries);
        units.chunks_exact_mut(dim).for_each(normalize);
        let mut centers = zeros(&[PIECE.min(rows), dim], "rows of top_k")?;
        let mut cosines = zeros(&[count, PIECE.min(rows)], "cosines of top_k")?;
        let mut best = vec![Vec::new(); count];
        for first in (0..rows).step_by(PIECE) {
            let piece = PIECE.min(rows - first);
            let centers = &mut centers[..piece * dim];
            (self.read)(first, &Matrix::of_f32(centers, piece, dim))?;
            centers.chunks_exact_mut(dim).for_each(normalize);
            gemm(count, piece, dim, (&mut cosines, piece), (&units, dim, 1), (centers, 1, dim), false);
            for (query, best) in best.iter_mut().enumerate() {
                for (slot, &cosine) in cosines[query * piece..(query + 1) * piece].iter().enumerate() {
                    offer(best, k, (cosine, (self.view.first_class as usize + first + slot) as i64));
                }
            }
        }
        let mut found = Nearest::default();
        for mut best in best {
            keep_best(&mut best, k);
            found.ids.extend(best.iter().map(|hit| hit.1));
            found.cosines.extend(best.iter().map(|hit| hit.0));
        }
        Ok(found)
    }
}

fn whole(data: *mut f32, rows: usize, cols: usize) -> Matrix {
    Matrix { data: data.cast(), dtype: DType::F32, rows, cols, row_stride: cols }
}

fn buffer<T: Plain>(cuda: &Cuda, count: u64, what: &str) -> Result<DeviceBuffer<T>> {
    DeviceBuffer::zeroed(&cuda.stream, count as usize, what)
}

fn normalize(row: &mut [f32]) {
    let squares = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    let inverse = inverse_norm(squares) as f32;
    row.iter_mut().for_each(|x| *x *= inverse);
}
