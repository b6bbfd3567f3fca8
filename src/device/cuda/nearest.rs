//! The class centers nearest to each query: cosines chunk by chunk, and the best of each row kept in lists on the GPU.
//!
//! Lists of more than [`LONGEST`] do not fit a warp's registers: for those the host reads the rows once, some at a time, and
//! searches itself.

use super::context::Gpu;
use super::driver::DeviceBuffer;
use super::shared_structs::{HeadArrays, MatrixView, TILE_COLUMNS, TILE_ROWS};
use super::staging::fetch;
use crate::device::gemm::{gemm, GemmShape, Operand, Store};
use crate::device::host_math::{center_inverse_norm, inverse_norm};
use crate::device::nearest::{keep_best, not_finite, offer, Nearest};
use crate::matrix::{DType, Matrix};
use crate::memory::{zeros, Plain};
use crate::Result;

/// kernels/nearest.cu kLongest: what evaluation asks for (1, 5, 100) fits four 64-bit registers a lane.
const LONGEST: usize = 128;
/// Columns and queries that are handled at once: 33 MB of cosines.
const COLUMNS: u32 = 4096;
const QUERIES: usize = 2048;
/// The most warps that share a row: more lists would cost more to merge than they save.
const MAX_WARPS_PER_ROW: u32 = 32;
/// Rows that the host reads at once.
const HOST_ROWS: usize = 4096;

/// A head's class centers, as a search reads them.
pub(super) struct CenterSource<'a> {
    pub gpu: &'a Gpu,
    /// The head's, for its class numbers and sizes.
    pub arrays: HeadArrays,
    /// Reads rows from the one named on, brought up to date, into a matrix in host or device memory.
    pub read: &'a dyn Fn(usize, &Matrix) -> Result<()>,
}

impl CenterSource<'_> {
    /// For each query its `k` nearest centers of the shard, nearest first, equal cosines by ascending id: [queries, k].
    pub fn nearest(&self, queries: &[f32], k: usize) -> Result<Nearest> {
        if k > LONGEST {
            return self.nearest_on_host(queries, k);
        }
        let mut found = Nearest::default();
        for some in queries.chunks(QUERIES * self.arrays.dim as usize) {
            let Nearest { ids, cosines } = self.nearest_of(some, k as u32)?;
            found.ids.extend(ids);
            found.cosines.extend(cosines);
        }
        Ok(found)
    }

    fn nearest_of(&self, queries: &[f32], k: u32) -> Result<Nearest> {
        let HeadArrays { dim, depth_pitch: pitch, shard_rows, first_class, .. } = self.arrays;
        let (gpu, stream) = (self.gpu, &self.gpu.stream);
        let count = queries.len() / dim as usize;
        let rows = (count as u64).next_multiple_of(TILE_ROWS);
        let columns = u64::from(shard_rows.min(COLUMNS)).next_multiple_of(TILE_COLUMNS);
        let warps_per_row = (gpu.entries.keep_nearest.warps() / count as u32).clamp(1, MAX_WARPS_PER_ROW);

        let raw = buffer::<f32>(gpu, queries.len() as u64, "queries of top_k")?;
        let centers = buffer::<f32>(gpu, columns * u64::from(dim), "rows of top_k")?;
        let unit_operand = buffer::<u16>(gpu, 3 * rows * u64::from(pitch), "queries of top_k")?;
        let center_operand = buffer::<u16>(gpu, 3 * columns * u64::from(pitch), "rows of top_k")?;
        let products = buffer::<f32>(gpu, count as u64 * columns, "cosines of top_k")?;
        let lists = buffer::<u64>(gpu, count as u64 * u64::from(warps_per_row) * LONGEST as u64, "lists of top_k")?;
        let ids = buffer::<i64>(gpu, count as u64 * u64::from(k), "ids of top_k")?;
        let cosines = buffer::<f32>(gpu, count as u64 * u64::from(k), "cosines of top_k")?;

        let arrays = HeadArrays {
            unit_operand: unit_operand.as_mut_ptr(),
            center_operand: center_operand.as_mut_ptr(),
            plane_rows: rows * u64::from(pitch),
            plane_centers: columns * u64::from(pitch),
            first_class,
            dim,
            depth_pitch: pitch,
            ..HeadArrays::zeroed()
        };
        gpu.upload(raw.as_mut_ptr(), queries)?;
        let given = MatrixView::from(&f32_matrix(raw.as_mut_ptr(), count, dim as usize));
        gpu.write_unit_rows(&arrays, given, count as u32)?;
        for first in (0..shard_rows).step_by(COLUMNS as usize) {
            let here = COLUMNS.min(shard_rows - first);
            let rows_here = f32_matrix(centers.as_mut_ptr(), here as usize, dim as usize);
            let some = MatrixView::from(&f32_matrix(products.as_mut_ptr(), count, here as usize));
            (self.read)(first as usize, &rows_here)?;
            gpu.write_unit_centers(&arrays, MatrixView::from(&rows_here), 0, here)?;
            gpu.products.cosines(stream, arrays, count as u32, here, 0, some)?;
            gpu.run(&gpu.entries.keep_nearest, (arrays, some, first, k, warps_per_row, lists.as_mut_ptr().cast()))?;
        }
        let lists = lists.as_mut_ptr().cast();
        let (id_list, cosine_list) = (ids.as_mut_ptr().cast(), cosines.as_mut_ptr().cast());
        gpu.run(&gpu.entries.merge_nearest, (arrays, count as u64, k, warps_per_row, lists, id_list, cosine_list))?;
        let all = count * k as usize;
        let found = Nearest { ids: fetch(stream, ids.as_mut_ptr(), all)?, cosines: fetch(stream, cosines.as_mut_ptr(), all)? };
        // Queries are finite: a NaN, which is above all cosines, comes of a class center.
        match found.cosines.iter().position(|cosine| cosine.is_nan()) {
            Some(hit) => Err(not_finite(found.ids[hit] as u64)),
            None => Ok(found),
        }
    }

    fn nearest_on_host(&self, queries: &[f32], k: usize) -> Result<Nearest> {
        let (dim, rows) = (self.arrays.dim as usize, self.arrays.shard_rows as usize);
        let count = queries.len() / dim;
        let mut units = zeros(&[count, dim], "queries of top_k")?;
        units.copy_from_slice(queries);
        units.chunks_exact_mut(dim).for_each(normalize);
        let mut centers = zeros(&[HOST_ROWS.min(rows), dim], "rows of top_k")?;
        let mut cosines = zeros(&[count, HOST_ROWS.min(rows)], "cosines of top_k")?;
        let mut best = vec![Vec::new(); count];
        for first in (0..rows).step_by(HOST_ROWS) {
            let rows_here = HOST_ROWS.min(rows - first);
            let centers = &mut centers[..rows_here * dim];
            (self.read)(first, &Matrix::of_f32(centers, rows_here, dim))?;
            for (row, center) in centers.chunks_exact_mut(dim).enumerate() {
                let inverse = center_inverse_norm(sum_of_squares(center)) as f32;
                if inverse.is_nan() {
                    return Err(not_finite(self.arrays.first_class + (first + row) as u64));
                }
                center.iter_mut().for_each(|x| *x *= inverse);
            }
            let shape = GemmShape { m: count, n: rows_here, k: dim };
            gemm(shape, &mut cosines, rows_here, Operand::rows(&units, dim), Operand::transposed(centers, dim), Store::Replace);
            for (query, best) in best.iter_mut().enumerate() {
                for (slot, &cosine) in cosines[query * rows_here..(query + 1) * rows_here].iter().enumerate() {
                    offer(best, k, (cosine, (self.arrays.first_class as usize + first + slot) as i64));
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

fn f32_matrix(data: *mut f32, rows: usize, cols: usize) -> Matrix {
    Matrix { data: data.cast(), dtype: DType::F32, rows, cols, row_stride: cols }
}

fn buffer<T: Plain>(gpu: &Gpu, count: u64, what: &str) -> Result<DeviceBuffer<T>> {
    DeviceBuffer::zeroed(&gpu.stream, count as usize, what)
}

fn sum_of_squares(row: &[f32]) -> f64 {
    row.iter().map(|&x| f64::from(x) * f64::from(x)).sum()
}

fn normalize(row: &mut [f32]) {
    let inverse = inverse_norm(sum_of_squares(row)) as f32;
    row.iter_mut().for_each(|x| *x *= inverse);
}
