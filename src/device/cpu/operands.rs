//! The three products of a step in the operands of the head's precision: cosines, P @ W^ and P^T @ E'.
//!
//! In precision half the operands of the last two, the gradients', are rounded to bfloat16, halves to even; their sums are float32. Cosines
//! are as in f32, or on a matrix unit off by 2^-15: there a rounding would be multiplied by the scale. A processor that multiplies pairs of
//! bfloat16s does so ([`PairUnit`]); on another one the operands are rounded all the same, and multiplied in float32.
//!
//! P that is kept takes half the memory then.

use super::passes::transpose;
use super::pool::Pool;
use super::products::Shape;
use crate::device::gemm::{as_bf16, as_bf16_mut, as_pairs, gemm, pair_rows, split_columns, GemmShape, Operand, PairUnit, Store};
use crate::memory::Buffer;
use crate::rounding;
use crate::simd::Simd;

/// How operands are multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operands {
    /// As they are.
    F32,
    /// Rounded, in pairs.
    Pairs(PairUnit),
    /// Rounded, in float32.
    Rounded,
}

impl Operands {
    /// Those of a step.
    pub fn of(shape: &Shape) -> Operands {
        if !shape.half {
            return Operands::F32;
        }
        PairUnit::of(Simd::best()).map_or(Operands::Rounded, Operands::Pairs)
    }

    /// Lays out E^ [rows, row_pitch] for [`Operands::cosines`]: transposed, [d, batch_pitch], or in two terms of pairs, [d / 2, batch_pitch]
    /// each.
    pub fn transpose_units(self, pool: &Pool, shape: &Shape, units: &[f32], out: &mut Buffer<f32>) {
        match self {
            Operands::Pairs(unit) if takes_terms(unit, shape) => {
                let (row_pitch, pitch, pairs) = (shape.row_pitch(), shape.batch_pitch(), shape.dim.div_ceil(2));
                let (units, out) = (&units[..shape.rows * row_pitch], out.parts());
                pool.run(pairs.div_ceil(PAIRS_A_TASK), &|task, _| {
                    for pair in task * PAIRS_A_TASK..((task + 1) * PAIRS_A_TASK).min(pairs) {
                        // SAFETY: a pair of columns is in one task.
                        let terms = [pair, pairs + pair].map(|line| unsafe { out.range(line * pitch..line * pitch + shape.rows) });
                        split_columns(units, row_pitch, pair, shape.dim, terms);
                    }
                });
            }
            _ => transpose(pool, units, shape.row_pitch(), out, shape.rows, shape.dim),
        }
    }

    /// out [columns, rows] = W^ [columns, d] @ E^.T [d, rows]. Of E^ there are its lines and what they are apart.
    pub fn cosines(self, shape: &Shape, columns: usize, centers: &[f32], units: (&[f32], usize), out: &mut [f32]) {
        let (product, pitch) = (GemmShape { m: columns, n: shape.rows, k: shape.dim }, shape.batch_pitch());
        let left = Operand::rows(centers, shape.row_pitch());
        match self {
            Operands::Pairs(unit) if takes_terms(unit, shape) => {
                unit.gemm_terms(product, out, pitch, left, Operand::rows(as_pairs(units.0), units.1));
            }
            _ => gemm(product, out, pitch, left, Operand::rows(units.0, units.1), Store::Replace),
        }
    }

    /// Makes of rows of E', `pitch` apart, what [`Operands::center_gradients`] multiplies: all rows, or an even number of them.
    pub fn round_scaled(self, scaled: &mut [f32], pitch: usize, dim: usize) {
        match self {
            Operands::F32 => {}
            Operands::Pairs(_) => pair_rows(scaled, pitch, dim),
            Operands::Rounded => rounding::narrow(scaled),
        }
    }

    /// Keeps numerators of a class for the update: a row of P^T, or a part of one.
    pub fn keep(self, numerators: &[f32], kept: &mut [f32]) {
        match self {
            Operands::F32 => kept.copy_from_slice(numerators),
            Operands::Pairs(_) | Operands::Rounded => store_row(numerators, kept),
        }
    }

    /// out [rows, d] (+)= P [rows, columns] @ W^ [columns, d]. Rounds P^T and W^ where they are, and may move them.
    pub fn weighted_centers(
        self,
        shape: &Shape,
        columns: usize,
        numerators: &mut [f32],
        centers: &mut [f32],
        out: &mut [f32],
        store: Store,
    ) {
        let (row_pitch, batch_pitch) = (shape.row_pitch(), shape.batch_pitch());
        let (numerators, centers) = (&mut numerators[..columns * batch_pitch], &mut centers[..columns * row_pitch]);
        let product = GemmShape { m: shape.rows, n: shape.dim, k: columns };
        match self {
            Operands::Pairs(unit) => {
                pair_rows(numerators, batch_pitch, shape.rows);
                pair_rows(centers, row_pitch, shape.dim);
                let (left, right) = (as_pairs(numerators), as_pairs(centers));
                let (left, right) = (Operand::transposed(left, 2 * batch_pitch), Operand::rows(right, 2 * row_pitch));
                unit.gemm(GemmShape { k: columns.div_ceil(2), ..product }, out, row_pitch, left, right, store);
                return;
            }
            Operands::Rounded => [&mut *numerators, &mut *centers].into_iter().for_each(rounding::narrow),
            Operands::F32 => {}
        }
        let (left, right) = (Operand::transposed(numerators, batch_pitch), Operand::rows(centers, row_pitch));
        gemm(product, out, row_pitch, left, right, store);
    }

    /// The numerators of a chunk that were kept, as [`Operands::center_gradients`] takes them: where they are, or in `scratch`.
    pub fn kept<'a>(self, shape: &Shape, columns: usize, kept: &'a [f32], scratch: &'a mut [f32]) -> ChunkNumerators<'a> {
        if self == Operands::Rounded {
            let (from, to) = (shape.kept_pitch(), shape.batch_pitch());
            for (from, to) in kept.chunks(from).zip(scratch.chunks_mut(to)).take(columns) {
                rounding::widen(&as_bf16(from)[..shape.rows], &mut to[..shape.rows]);
            }
            return ChunkNumerators { rows: scratch, pitch: to };
        }
        ChunkNumerators { rows: kept, pitch: shape.kept_pitch() }
    }

    /// The same of numerators that have just been computed. `spare` holds a row of them.
    pub fn fresh<'a>(self, shape: &Shape, columns: usize, numerators: &'a mut [f32], spare: &mut [f32]) -> ChunkNumerators<'a> {
        let pitch = shape.batch_pitch();
        match self {
            Operands::F32 => {}
            Operands::Rounded => rounding::narrow(&mut numerators[..columns * pitch]),
            Operands::Pairs(_) => {
                let spare = &mut spare[..shape.rows.div_ceil(2)];
                for row in numerators.chunks_mut(pitch).take(columns) {
                    store_row(&row[..shape.rows], spare);
                    row[..spare.len()].copy_from_slice(spare);
                }
            }
        }
        ChunkNumerators { rows: numerators, pitch }
    }

    /// out [columns, d] = P^T [columns, rows] @ E' [rows, d], of rows that [`Operands::round_scaled`] has rounded.
    pub fn center_gradients(self, shape: &Shape, columns: usize, numerators: ChunkNumerators<'_>, scaled: &[f32], out: &mut [f32]) {
        let pitch = shape.row_pitch();
        let product = GemmShape { m: columns, n: shape.dim, k: shape.rows };
        match self {
            Operands::Pairs(unit) => {
                let left = Operand::rows(as_pairs(numerators.rows), numerators.pitch);
                let right = Operand::rows(as_pairs(scaled), 2 * pitch);
                unit.gemm(GemmShape { k: shape.rows.div_ceil(2), ..product }, out, pitch, left, right, Store::Replace);
            }
            Operands::F32 | Operands::Rounded => {
                let (left, right) = (Operand::rows(numerators.rows, numerators.pitch), Operand::rows(scaled, pitch));
                gemm(product, out, pitch, left, right, Store::Replace);
            }
        }
    }
}

/// From this dimension on cosines are multiplied in terms: the errors of many products make up for each other.
const TERMS_FROM: usize = 64;
/// Pairs of columns of E^ that one task lays out: a cache line of each row.
const PAIRS_A_TASK: usize = 8;

fn takes_terms(unit: PairUnit, shape: &Shape) -> bool {
    unit.multiplies_terms() && shape.dim >= TERMS_FROM
}

/// P^T of a chunk, in what a product takes: rows of floats or of pairs, `pitch` apart.
#[derive(Clone, Copy)]
pub(super) struct ChunkNumerators<'a> {
    rows: &'a [f32],
    pitch: usize,
}

/// Rounds a row into bfloat16s, with a 0 behind an odd number of them, which makes up the last pair.
fn store_row(row: &[f32], out: &mut [f32]) {
    let out = &mut as_bf16_mut(out)[..row.len().next_multiple_of(2)];
    rounding::to_nearest(row, &mut out[..row.len()]);
    out[row.len()..].fill(0);
}
