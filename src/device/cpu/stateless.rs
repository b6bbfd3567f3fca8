//! The kernels by themselves, over the caller's memory.

use super::head::{CpuHead, ELSEWHERE};
use super::operands::Operands;
use super::products::{self, pitch, ForwardOutput, Pass, Shape, Targets, UpdateInput, CHUNK};
use super::vector::{self, Softmax};
use super::Cpu;
use crate::device::gemm::{gemm_into, GemmShape, Operand, Store};
use crate::device::host_math::inverse_norm;
use crate::device::stateless::{checked_shape, checked_targets, checked_weight, given_offset, must_be_f32, GivenSums, RowShare};
use crate::device::workspace::WorkspaceCutter;
use crate::device::{Device, FusedBackward, FusedForward, HeadDevice, HeadSpec, RowState, SampleDraw, Workspace};
use crate::margin::{self, Margin};
use crate::matrix::Matrix;
use crate::memory::{zeros, Parts};
use crate::optimizer::{Optimizer, UpdateRule};
use crate::sample::{self, Draw};
use crate::Result;

/// Rows that one task of a row-wise kernel takes.
const ROWS: usize = 64;

/// The rows of a caller's matrix as a sample.
struct MatrixRows<'a>(&'a Matrix);

impl products::RowSource for MatrixRows<'_> {
    fn read(&self, column: usize, out: &mut [f32], _: &mut [f32]) {
        // SAFETY: the caller of the kernel gave a matrix of its host memory; columns are its rows.
        unsafe { self.0.read_row(column, out) }
    }
}

/// What cuts a caller's workspace up: float64s first, since it is aligned to 8 bytes, then float32s.
fn cutter(workspace: Workspace, needed: u64) -> Result<WorkspaceCutter> {
    workspace.check(needed, 8)?;
    Ok(WorkspaceCutter::new(workspace.data, size_of::<f32>() as u64))
}

/// A caller's memory, of which several threads write different elements.
struct Shared(*mut f32);
// SAFETY: each element is written by one task.
unsafe impl Sync for Shared {}

/// E^, its transpose and the inverse norms, in a workspace.
struct Embedded<'a> {
    unit: &'a mut [f32],
    transposed: &'a [f32],
    inverse_norms: &'a [f32],
}

impl<'a> Embedded<'a> {
    fn new(embeddings: &Matrix, shape: &Shape, cutter: &mut WorkspaceCutter) -> Embedded<'a> {
        let (row_pitch, batch_pitch) = (shape.row_pitch(), shape.batch_pitch());
        // SAFETY: what `fused_bytes` counts.
        let unit = unsafe { cutter.slice::<f32>(shape.rows * row_pitch) };
        let transposed = unsafe { cutter.slice::<f32>(shape.dim * batch_pitch) };
        let inverse_norms = unsafe { cutter.slice::<f32>(shape.rows) };
        for (row, inverse) in inverse_norms.iter_mut().enumerate() {
            let out = &mut unit[row * row_pitch..row * row_pitch + shape.dim];
            // SAFETY: the caller's matrix has this row.
            unsafe { embeddings.read_row(row, out) };
            *inverse = normalize(out);
            for (column, &x) in out.iter().enumerate() {
                transposed[column * batch_pitch + row] = x;
            }
        }
        Embedded { unit, transposed, inverse_norms }
    }
}

impl Cpu {
    /// Bytes of a fused kernel's workspace: f64s first, then E^ and its transpose, and what forward or backward needs beside the
    /// threads' scratch, whichever is more.
    fn fused_bytes(&self, shape: &Shape) -> u64 {
        let split_rows = shape.splits() * shape.rows;
        let embedded = shape.rows * shape.row_pitch() + shape.dim * shape.batch_pitch() + shape.rows;
        let forward = split_rows * shape.row_pitch() + split_rows + shape.classes;
        let backward = shape.rows * shape.row_pitch() + shape.rows;
        let elements = embedded + forward.max(backward) + self.pool.threads() * shape.scratch_elements();
        (8 * split_rows.max(shape.chunks()) + 4 * elements) as u64
    }

    /// A pass over a caller's matrix that keeps no numerators.
    fn pass<'a>(
        &self,
        shape: &Shape,
        margin: &Margin,
        [offsets, units_transposed]: [&'a [f32]; 2],
        targets: &'a Targets,
        rows: &'a MatrixRows<'a>,
        cutter: &mut WorkspaceCutter,
    ) -> Pass<'a> {
        Pass {
            shape: *shape,
            operands: Operands::F32,
            softmax: Softmax::new(margin),
            offsets,
            units_transposed,
            targets,
            rows,
            numerators: Parts::of(&mut []),
            kept_chunks: 0,
            // SAFETY: what `fused_bytes` counts.
            scratch: Parts::of(unsafe { cutter.slice(self.pool.threads() * shape.scratch_elements()) }),
        }
    }
}

/// Sizes that 32-bit row and column numbers hold.
fn shape(batch: u64, dim: u64, classes: u64) -> Result<Shape> {
    checked_shape(batch, dim, classes)?;
    Ok(Shape { rows: batch as usize, dim: dim as usize, classes: classes as usize, half: false })
}

/// Divides a row by its norm; returns what it was multiplied by.
fn normalize(row: &mut [f32]) -> f32 {
    let inverse = inverse_norm(vector::sum_of_squares(row)) as f32;
    vector::scale(row, inverse);
    inverse
}

fn angle_of(e: &[f32], w: &[f32]) -> f64 {
    let inverse = |row: &[f32]| inverse_norm(vector::sum_of_squares(row));
    margin::angle(e, inverse(e), w, inverse(w))
}

/// The same, and the part of W^ across E^.
fn angle_and_tangent(e: &[f32], w: &[f32], tangent: &mut [f32]) -> f64 {
    let [e_inverse, w_inverse] = [e, w].map(|row| inverse_norm(vector::sum_of_squares(row)));
    let angle = margin::angle(e, e_inverse, w, w_inverse);
    margin::tangent(e, e_inverse, w, w_inverse, angle, tangent);
    angle
}

fn target_pairs(targets: &[i64]) -> Result<Targets> {
    let pairs = targets.iter().enumerate().filter(|(_, &column)| column >= 0);
    Targets::new(pairs.map(|(row, &column)| (column as u32, row as u32)))
}

/// A caller's array of `count` values.
///
/// # Safety
/// It is one, and nobody writes to it for the call.
unsafe fn array<'a, T>(data: *const T, count: usize) -> &'a [T] {
    match count {
        0 => &[],
        _ => std::slice::from_raw_parts(data, count),
    }
}

/// A caller's array of `count` values to write to.
///
/// # Safety
/// It is one, and nothing else refers to it for the call.
unsafe fn array_mut<'a, T>(data: *mut T, count: usize) -> &'a mut [T] {
    match count {
        0 => &mut [],
        _ => std::slice::from_raw_parts_mut(data, count),
    }
}

/// A row of an f32 matrix of the caller's, in place.
///
/// # Safety
/// The matrix is f32 and no other thread uses the row.
unsafe fn row_of<'a>(matrix: &Matrix, row: usize) -> &'a mut [f32] {
    std::slice::from_raw_parts_mut(matrix.data.cast::<f32>().add(row * matrix.row_stride), matrix.cols)
}

impl Device for Cpu {
    fn info(&self) -> &std::ffi::CStr {
        self.info()
    }

    fn process(&self) -> u32 {
        self.pool.process()
    }

    fn open(&self, spec: HeadSpec) -> Result<Box<dyn HeadDevice>> {
        Ok(Box::new(CpuHead::new(spec, self.pool.clone())?))
    }

    fn normalize_rows(&self, rows: &Matrix, normalized: &Matrix, inverse_norms: *mut f32) -> Result<()> {
        let count = rows.rows;
        let norms = Shared(inverse_norms);
        let mut scratch = zeros(&[self.pool.threads(), rows.cols], "a row for each thread")?;
        let scratch = Parts::of(&mut scratch);
        self.pool.run(count.div_ceil(ROWS), &|task, worker| {
            let norms = &norms;
            // SAFETY: a worker number belongs to one thread.
            let row = unsafe { scratch.range(worker * rows.cols..(worker + 1) * rows.cols) };
            for i in task * ROWS..((task + 1) * ROWS).min(count) {
                // SAFETY: the caller's matrices and array have this row; a row is in one task.
                unsafe {
                    rows.read_row(i, row);
                    let inverse = normalize(row);
                    normalized.write_row(i, row);
                    if !norms.0.is_null() {
                        *norms.0.add(i) = inverse;
                    }
                }
            }
        });
        Ok(())
    }

    fn normalize_gemm(&self, embeddings: &Matrix, centers: &Matrix, cosines: &Matrix, workspace: Workspace) -> Result<()> {
        must_be_f32("cosines", cosines)?;
        let (rows, dim, classes) = (embeddings.rows, embeddings.cols, centers.rows);
        let needed = self.normalize_gemm_workspace(rows as u64, dim as u64, classes as u64)?;
        let mut cutter = cutter(workspace, needed)?;
        let row_pitch = pitch(dim);
        // SAFETY: what `normalize_gemm_workspace` counts, and the caller lends for the call.
        let unit = unsafe { cutter.slice::<f32>(rows * row_pitch) };
        let chunks = unsafe { cutter.slice::<f32>(self.pool.threads() * CHUNK * row_pitch) };
        for (row, out) in unit.chunks_exact_mut(row_pitch).enumerate() {
            // SAFETY: the caller's matrix has this row.
            unsafe { embeddings.read_row(row, &mut out[..dim]) };
            normalize(&mut out[..dim]);
        }
        let (unit, chunks) = (&*unit, Parts::of(chunks));
        let all_cosines = Shared(cosines.data.cast::<f32>());
        self.pool.run(classes.div_ceil(CHUNK), &|chunk, worker| {
            let columns = chunk * CHUNK..((chunk + 1) * CHUNK).min(classes);
            // SAFETY: a worker number belongs to one thread.
            let block = unsafe { chunks.range(worker * CHUNK * row_pitch..(worker + 1) * CHUNK * row_pitch) };
            for (slot, column) in columns.clone().enumerate() {
                let out = &mut block[slot * row_pitch..slot * row_pitch + dim];
                // SAFETY: the caller's matrix has this row.
                unsafe { centers.read_row(column, out) };
                normalize(out);
            }
            let all_cosines = &all_cosines;
            // SAFETY: the caller's matrix has these columns of its rows; the columns are in one task.
            unsafe {
                let out = all_cosines.0.add(columns.start);
                let shape = GemmShape { m: rows, n: columns.len(), k: dim };
                let (unit, block) = (Operand::rows(unit, row_pitch), Operand::transposed(block, row_pitch));
                gemm_into(shape, out, cosines.row_stride, unit, block, Store::Replace);
            }
        });
        Ok(())
    }

    fn normalize_gemm_workspace(&self, batch: u64, dim: u64, classes: u64) -> Result<u64> {
        let shape = shape(batch, dim, classes)?;
        Ok(4 * ((shape.rows + self.pool.threads() * CHUNK) * shape.row_pitch()) as u64)
    }

    fn margin_forward(&self, margin: &Margin, cosines: *const f32, count: usize, logits: *mut f32) -> Result<()> {
        // SAFETY: the caller's arrays of count values.
        // They may be one array, so each is read before it is written.
        for i in 0..count {
            unsafe { *logits.add(i) = margin.target(f64::from(*cosines.add(i)).clamp(-1.0, 1.0).acos()).logit as f32 };
        }
        Ok(())
    }

    fn margin_backward(
        &self,
        margin: &Margin,
        cosines: *const f32,
        grad_logits: *const f32,
        count: usize,
        grad_cosines: *mut f32,
    ) -> Result<()> {
        for i in 0..count {
            // SAFETY: the caller's arrays of count values; the gradients may be one array, so each is read before it is written.
            unsafe {
                let theta = f64::from(*cosines.add(i)).clamp(-1.0, 1.0).acos();
                let slope = margin.scale * margin.target(theta).derivative;
                *grad_cosines.add(i) = (f64::from(*grad_logits.add(i)) * slope) as f32;
            }
        }
        Ok(())
    }

    fn partial_softmax(
        &self,
        margin: &Margin,
        cosines: &Matrix,
        targets: *const i64,
        row_sums: *mut f32,
        row_offsets: *mut f32,
    ) -> Result<()> {
        must_be_f32("cosines", cosines)?;
        // SAFETY: the caller's arrays, a value for each row.
        let targets = unsafe { array(targets, cosines.rows) };
        checked_targets(targets, cosines.cols)?;
        let softmax = Softmax::new(margin);
        let (row_sums, row_offsets) = (Shared(row_sums), Shared(row_offsets));
        self.pool.run(cosines.rows, &|row, _| {
            let (row_sums, row_offsets) = (&row_sums, &row_offsets);
            // SAFETY: the caller's f32 matrix and array have this row; a row is in one task.
            unsafe {
                let values = row_of(cosines, row);
                if targets[row] >= 0 {
                    values[targets[row] as usize] = f32::NEG_INFINITY;
                }
                let mut offset = softmax.offset;
                if !row_offsets.0.is_null() {
                    offset = given_offset(margin, values.iter().fold(ELSEWHERE, |best, &x| if x > best { x } else { best }));
                    *row_offsets.0.add(row) = offset;
                }
                *row_sums.0.add(row) = vector::exp_row(values, softmax.scale, offset, softmax.filter).sum as f32;
            }
        });
        Ok(())
    }

    fn fused_forward(&self, arguments: &FusedForward<'_>) -> Result<()> {
        let FusedForward { margin, embeddings, centers, weighted, .. } = *arguments;
        must_be_f32("weighted", weighted)?;
        let shape = shape(embeddings.rows as u64, embeddings.cols as u64, centers.rows as u64)?;
        // SAFETY: the caller's arrays, a value for each row.
        let (targets, row_sums, logits) = unsafe {
            (
                array(arguments.targets, shape.rows),
                array_mut(arguments.row_sums, shape.rows),
                array_mut(arguments.target_logits, shape.rows),
            )
        };
        checked_targets(targets, shape.classes)?;
        let mut cutter = cutter(arguments.workspace, self.fused_bytes(&shape))?;
        let split_rows = shape.splits() * shape.rows;
        // SAFETY: these and those below are what `fused_bytes` counts, and the caller lends for the call.
        let sums = unsafe { cutter.slice::<f64>(split_rows) };
        let embedded = Embedded::new(embeddings, &shape, &mut cutter);
        let accumulators = unsafe { cutter.slice::<f32>(split_rows * shape.row_pitch()) };
        let best = unsafe { cutter.slice::<f32>(split_rows) };
        let inverse_norms = unsafe { cutter.slice::<f32>(shape.classes) };
        let pairs = target_pairs(targets)?;
        let mut offsets = zeros(&[shape.rows], "offsets of rows")?;
        offsets.fill(margin.offset() as f32);
        let rows = MatrixRows(centers);
        let pass = self.pass(&shape, margin, [&offsets, embedded.transposed], &pairs, &rows, &mut cutter);
        let mut own = zeros(&[shape.rows], "offsets of rows")?;
        let mut forward = |pass: &Pass<'_>, own: &mut [f32]| {
            let output = ForwardOutput {
                inverse_norms: Parts::of(inverse_norms),
                sums: Parts::of(sums),
                best: Parts::of(best),
                weighted_centers: Parts::of(accumulators),
            };
            products::forward(&self.pool, pass, &output);
            let largest = |row: usize| (0..shape.splits()).map(|split| best[split * shape.rows + row]).fold(ELSEWHERE, f32::max);
            for (row, offset) in own.iter_mut().enumerate() {
                *offset = given_offset(margin, largest(row));
            }
        };
        forward(&pass, &mut own);
        if !arguments.row_offsets.is_null() {
            if own != offsets {
                let mut again = zeros(&[shape.rows], "offsets of rows")?;
                forward(&Pass { offsets: &own, ..pass }, &mut again);
            }
            // SAFETY: the caller's array, a value for each row.
            unsafe { array_mut(arguments.row_offsets, shape.rows) }.copy_from_slice(&own);
        }
        let (mut raw, mut center) = (zeros(&[shape.dim], "a row")?, zeros(&[shape.dim], "a row")?);
        for row in 0..shape.rows {
            row_sums[row] = (0..shape.splits()).map(|split| sums[split * shape.rows + row]).sum::<f64>() as f32;
            logits[row] = 0.0;
            // SAFETY: the caller's matrices have these rows.
            unsafe {
                if targets[row] >= 0 {
                    embeddings.read_row(row, &mut raw);
                    centers.read_row(targets[row] as usize, &mut center);
                    logits[row] = margin.target(angle_of(&raw, &center)).logit as f32;
                }
                let out = row_of(weighted, row);
                out.fill(0.0);
                for split in 0..shape.splits() {
                    let at = (split * shape.rows + row) * shape.row_pitch();
                    vector::add_scaled(out, 1.0, &accumulators[at..at + shape.dim]);
                }
            }
        }
        Ok(())
    }

    fn fused_backward(&self, arguments: &FusedBackward<'_>) -> Result<()> {
        let FusedBackward { margin, embeddings, centers, weighted, grad_embeddings, grad_centers, .. } = *arguments;
        must_be_f32("weighted", weighted)?;
        let weight = arguments.loss_weight;
        checked_weight(weight)?;
        let shape = shape(embeddings.rows as u64, embeddings.cols as u64, centers.rows as u64)?;
        // SAFETY: the caller's arrays, a value for each row.
        let (targets, row_sums, logits) = unsafe {
            (
                array(arguments.targets, shape.rows),
                array(arguments.row_sums, shape.rows),
                array(arguments.target_logits, shape.rows),
            )
        };
        checked_targets(targets, shape.classes)?;
        let mut cutter = cutter(arguments.workspace, self.fused_bytes(&shape))?;
        // SAFETY: these and those below are what `fused_bytes` counts, and the caller lends for the call.
        let totals = unsafe { cutter.slice::<f64>(shape.chunks()) };
        // SAFETY: the caller's arrays, a value for each row.
        let offsets = arguments.offsets.map(|o| [o.of_rank, o.of_sums].map(|offsets| unsafe { array(offsets, shape.rows) }));
        let given = GivenSums { margin, row_sums, target_logits: logits, offsets };
        given.check(targets, shape.classes)?;
        let embedded = Embedded::new(embeddings, &shape, &mut cutter);
        let scaled = unsafe { cutter.slice::<f32>(shape.rows * shape.row_pitch()) };
        let coefficients = unsafe { cutter.slice::<f32>(shape.rows) };
        let pitch = shape.row_pitch();
        let row = || zeros(&[shape.dim], "a row");
        let (mut raw, mut center, mut tangent, mut gradient) = (row()?, row()?, row()?, row()?);
        for row in 0..shape.rows {
            let unit = &mut embedded.unit[row * pitch..row * pitch + shape.dim];
            let RowShare { missing, factor } = given.of_row(row);
            vector::scale_into(unit, factor, &mut scaled[row * pitch..row * pitch + shape.dim]);
            // SAFETY: the caller's matrices have these rows.
            unsafe {
                weighted.read_row(row, &mut gradient);
                vector::scale(&mut gradient, factor);
                coefficients[row] = 0.0;
                if targets[row] >= 0 && missing > 0.0 {
                    embeddings.read_row(row, &mut raw);
                    centers.read_row(targets[row] as usize, &mut center);
                    let angle = angle_and_tangent(&raw, &center, &mut tangent);
                    coefficients[row] = (-margin.scale * missing * margin.target(angle).derivative) as f32;
                    vector::add_scaled(&mut gradient, coefficients[row], &tangent);
                    vector::turn_tangent(&mut tangent, unit, margin::cosine(angle) as f32);
                }
                vector::normalize_backward(&mut gradient, unit, 1.0, embedded.inverse_norms[row] * weight as f32);
                grad_embeddings.write_row(row, &gradient);
            }
            // Its last use was above: from here on the row's place has E^ - cos W^.
            unit.copy_from_slice(&tangent);
        }
        let pairs = target_pairs(targets)?;
        let mut row_offsets = zeros(&[shape.rows], "offsets of rows")?;
        match offsets {
            Some([of_rank, _]) => row_offsets.copy_from_slice(of_rank),
            None => row_offsets.fill(margin.offset() as f32),
        }
        let offsets = row_offsets;
        let rows = MatrixRows(centers);
        let pass = self.pass(&shape, margin, [&offsets, embedded.transposed], &pairs, &rows, &mut cutter);
        let input = UpdateInput { scaled, tangents: embedded.unit, coefficients };
        let sink = |column: usize, gradient: &mut [f32], scratch_rows: &mut [f32]| {
            let center = &mut scratch_rows[..shape.dim];
            // SAFETY: the caller's matrices have these rows; a column is in one task.
            unsafe {
                centers.read_row(column, center);
                let inverse = inverse_norm(vector::sum_of_squares(center)) as f32;
                vector::normalize_backward(gradient, center, inverse, inverse * weight as f32);
                grad_centers.write_row(column, gradient);
            }
            0.0
        };
        products::update(&self.pool, &pass, &input, &Parts::of(totals), &sink, &|_| (), || ());
        Ok(())
    }

    fn fused_workspace(&self, batch: u64, dim: u64, classes: u64) -> Result<u64> {
        Ok(self.fused_bytes(&shape(batch, dim, classes)?))
    }

    fn sample_classes(&self, draw: &SampleDraw, ids: *mut i64) -> Result<u64> {
        draw.check()?;
        // SAFETY: the caller's array.
        let positives = unsafe { array(draw.positives, draw.positive_count) };
        draw.check_positives(positives)?;
        let mut drawn = Vec::new();
        let parallel = |tasks: usize, body: &(dyn Fn(usize) + Sync)| self.pool.run(tasks, &|task, _| body(task));
        let size = draw.sample_size as usize;
        let request = Draw { seed: draw.seed, number: draw.step, shard: draw.shard(), positives, size, block: 1 };
        sample::draw(&request, &parallel, &mut drawn)?;
        // SAFETY: the caller's array holds max(positive_count, sample_size) ids.
        unsafe { array_mut(ids, drawn.len()) }.copy_from_slice(&drawn);
        Ok(drawn.len() as u64)
    }

    fn update_rows(
        &self,
        optimizer: &Optimizer,
        state: &RowState<'_>,
        ids: *const i64,
        gradients: &Matrix,
        learning_rate: f64,
        update: u64,
    ) -> Result<()> {
        state.check(optimizer, learning_rate, update)?;
        let second = optimizer.state_tensors() > 1;
        // SAFETY: the caller's array, an id for each gradient.
        let ids = unsafe { array(ids, gradients.rows) };
        state.check_ids(ids)?;
        let rule = UpdateRule::new(optimizer, learning_rate, update);
        let cols = state.centers.cols;
        let mut scratch = zeros(&[self.pool.threads(), cols], "a row for each thread")?;
        let scratch = Parts::of(&mut scratch);
        self.pool.run(ids.len().div_ceil(ROWS), &|task, worker| {
            // SAFETY: a worker number belongs to one thread.
            let gradient = unsafe { scratch.range(worker * cols..(worker + 1) * cols) };
            for (i, &id) in ids.iter().enumerate().skip(task * ROWS).take(ROWS) {
                let row = id as usize;
                // SAFETY: the caller's f32 matrices have this row; ids do not repeat, so it is in one task.
                unsafe {
                    gradients.read_row(i, gradient);
                    let v: &mut [f32] = match state.second_moment {
                        Some(matrix) if second => row_of(matrix, row),
                        _ => &mut [],
                    };
                    rule.apply(row_of(state.centers, row), row_of(state.momentum, row), v, gradient);
                }
            }
        });
        Ok(())
    }
}
