//! Products of pairs on the tiles of AMX.
//!
//! A tile is 16 rows of 64 bytes. TDPBF16PS adds to a tile of float32 sums, 16 rows and columns, the products of 16 rows of 16 pairs with
//! 16 rows of 16 columns of pairs, 16384 flop in 16 cycles. Of the eight tiles four hold a block of sums, 32 x 32, two the left operand and
//! two the right one: a load a product. The left operand is packed, 32 rows at a time, into tiles one after the other; the right one is
//! read where it lies. Blocks beyond the edges of an operand are padded with zeros.
//!
//! An element is what the destination held, or 0, plus the products of its pairs, 16 pairs at a time: its bits depend on its own row and
//! column alone.
//!
//! The instructions are assembled here since they are no part of Rust's stable ones. A call keeps no tiles, and a product calls nothing that
//! has tiles of its own between its configuration and its release. After that its thread carries no state of them from one context switch
//! to the next.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::pairs::Pair;
use super::{GemmShape, Operand, Product, Store};
use crate::rounding::nearest;

/// Rows of a tile; pairs, or floats, in each.
const SIDE: usize = 16;
const TILE: usize = SIDE * SIDE;
/// Rows and columns of a block of sums.
const BLOCK: usize = 2 * SIDE;
/// Pairs that are summed over before the next rows of the left operand are packed.
const DEPTH: usize = 256;

/// What LDTILECFG reads: eight tiles, all whole.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_a_row: [u16; 16],
    rows: [u8; 16],
}

const CONFIGURATION: Configuration = {
    let (mut bytes_a_row, mut rows) = ([0; 16], [0; 16]);
    let mut tile = 0;
    while tile < 8 {
        bytes_a_row[tile] = (4 * SIDE) as u16;
        rows[tile] = SIDE as u8;
        tile += 1;
    }
    Configuration { palette: 1, start_row: 0, reserved: [0; 14], bytes_a_row, rows }
};

/// The tiles, configured.
struct Tiles;

impl Tiles {
    /// # Safety
    /// This process may use them.
    unsafe fn configure() -> Tiles {
        // SAFETY: 64 bytes that the instruction reads.
        unsafe { asm!("ldtilecfg [{0}]", in(reg) &CONFIGURATION, options(nostack, readonly)) };
        Tiles
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: they were configured.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Packed tiles of BLOCK rows; or of BLOCK columns, where the right operand's rows or columns end within a block.
#[repr(align(64))]
struct Panel(#[allow(dead_code)] [u32; BLOCK * DEPTH]);

/// The left operand of a product.
pub(super) enum Left<'a> {
    Pairs(Operand<'a, Pair>),
    Terms(Terms<'a>),
}

/// Rows of floats, of which neighbors make pairs: of the nearest bfloat16s, or of the nearest to what these leave. The sum of both terms is
/// a float's first 16 bits.
pub(super) struct Terms<'a> {
    pub rows: Operand<'a>,
    pub length: usize,
    pub second: bool,
}

/// What [`Product`] says, on the tiles.
///
/// # Safety
/// As [`super::gemm_into`], the operands cover the shape, and this process may use the tiles.
pub(super) unsafe fn multiply(product: &Product<'_, Pair>) {
    // The product of a few rows with columns that lie along memory may have been turned; its destination then has its columns apart.
    let (shape, store) = (product.shape, product.store);
    unsafe {
        run(
            shape,
            product.destination,
            (product.row_stride, product.column_stride),
            &Left::Pairs(product.left),
            product.right,
            store,
        )
    }
}

/// destination [m, n] (+)= left [m, k] @ right [k, n].
///
/// # Safety
/// The destination has these elements, a row's and a column's stride apart, which nobody else uses; the operands cover the shape; and
/// this process may use the tiles.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
pub(super) unsafe fn run(
    shape: GemmShape,
    destination: *mut f32,
    strides: (usize, usize),
    left: &Left<'_>,
    right: Operand<'_, Pair>,
    store: Store,
) {
    let GemmShape { m, n, k } = shape;
    let (mut panel, mut edge) = (MaybeUninit::<Panel>::uninit(), MaybeUninit::<Panel>::uninit());
    let (panel, edge) = (panel.as_mut_ptr().cast::<u32>(), edge.as_mut_ptr().cast::<u32>());
    // SAFETY: as the caller says; a panel and an edge have room for DEPTH pairs of BLOCK rows or columns.
    unsafe {
        let _tiles = Tiles::configure();
        for first in (0..k).step_by(DEPTH) {
            let depth = (k - first).min(DEPTH);
            let steps = depth.div_ceil(SIDE);
            for top in (0..m).step_by(BLOCK) {
                let rows = (m - top).min(BLOCK);
                pack_left(left, top, rows, first, depth, panel);
                for column in (0..n).step_by(BLOCK) {
                    let columns = (n - column).min(BLOCK);
                    let sums = Sums {
                        at: destination.add(top * strides.0 + column * strides.1),
                        strides,
                        rows,
                        columns,
                        add: first > 0 || store == Store::Add,
                    };
                    // Whole tiles of the right operand are read where they lie.
                    let whole = if columns == BLOCK && right.column_stride == 1 { depth / SIDE } else { 0 };
                    pack_right(&right, first + whole * SIDE, depth - whole * SIDE, column, columns, edge);
                    sums.with(|block, pitch| {
                        let lying = Steps {
                            left: panel,
                            right: right.at(first, column).cast::<u32>(),
                            right_pitch: right.row_stride,
                            right_step: SIDE * right.row_stride,
                            second: SIDE,
                            count: whole,
                        };
                        let packed = Steps {
                            left: panel.add(whole * 2 * TILE),
                            right: edge,
                            right_pitch: SIDE,
                            right_step: 2 * TILE,
                            second: TILE,
                            count: steps - whole,
                        };
                        for some in [lying, packed].iter().filter(|some| some.count > 0) {
                            add_steps(some, block, pitch);
                        }
                    });
                }
            }
        }
    }
}

/// A block of sums in the destination.
struct Sums {
    at: *mut f32,
    strides: (usize, usize),
    rows: usize,
    columns: usize,
    /// Adds to what is there.
    add: bool,
}

impl Sums {
    /// Runs `body` on a whole block that begins with what is to be added to, and leaves what it makes of it in the destination.
    ///
    /// # Safety
    /// The destination has this block, which nobody else uses.
    #[inline(always)]
    unsafe fn with(&self, body: impl FnOnce(*mut f32, usize)) {
        let (row_stride, column_stride) = self.strides;
        let at = |row: usize, column: usize| unsafe { self.at.add(row * row_stride + column * column_stride) };
        if self.rows == BLOCK && self.columns == BLOCK && column_stride == 1 {
            if !self.add {
                // SAFETY: as above.
                (0..BLOCK).for_each(|row| unsafe { at(row, 0).write_bytes(0, BLOCK) });
            }
            return body(self.at, row_stride);
        }
        #[repr(align(64))]
        struct Block([f32; BLOCK * BLOCK]);
        let mut block = Block([0.0; BLOCK * BLOCK]);
        let cells = || (0..self.rows).flat_map(|row| (0..self.columns).map(move |column| (row, column)));
        if self.add {
            // SAFETY: as above.
            cells().for_each(|(row, column)| block.0[row * BLOCK + column] = unsafe { *at(row, column) });
        }
        body(block.0.as_mut_ptr(), BLOCK);
        // SAFETY: as above.
        cells().for_each(|(row, column)| unsafe { *at(row, column) = block.0[row * BLOCK + column] });
    }
}

/// Products of some tiles of both operands, one after the other.
struct Steps {
    /// Two tiles a step, packed.
    left: *const u32,
    right: *const u32,
    /// Pairs from a row to the next, from a step to the next, and from a step's first tile to its second.
    right_pitch: usize,
    right_step: usize,
    second: usize,
    count: usize,
}

/// Adds the products to a block of sums, whose rows are `pitch` apart.
///
/// # Safety
/// The tiles are configured; the operands and the block have these elements; `count` is not 0.
#[inline(always)]
unsafe fn add_steps(steps: &Steps, block: *mut f32, pitch: usize) {
    // SAFETY: as above. Assembly reads what `left` and `right` point to, and writes the block.
    unsafe {
        let below = block.add(SIDE * pitch);
        asm!(
            "tileloadd tmm0, [{block} + {pitch}*1]",
            "tileloadd tmm1, [{block} + {pitch}*1 + 64]",
            "tileloadd tmm2, [{below} + {pitch}*1]",
            "tileloadd tmm3, [{below} + {pitch}*1 + 64]",
            "2:",
            "tileloadd tmm4, [{left} + {line}*1]",
            "tileloadd tmm6, [{right} + {right_pitch}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{left} + {line}*1 + 1024]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tileloadd tmm7, [{second} + {right_pitch}*1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {left}, 2048",
            "add {right}, {right_step}",
            "add {second}, {right_step}",
            "dec {count}",
            "jnz 2b",
            "tilestored [{block} + {pitch}*1], tmm0",
            "tilestored [{block} + {pitch}*1 + 64], tmm1",
            "tilestored [{below} + {pitch}*1], tmm2",
            "tilestored [{below} + {pitch}*1 + 64], tmm3",
            block = in(reg) block,
            below = in(reg) below,
            pitch = in(reg) 4 * pitch,
            line = in(reg) 4 * SIDE,
            left = inout(reg) steps.left => _,
            right = inout(reg) steps.right => _,
            second = inout(reg) steps.right.add(steps.second) => _,
            right_pitch = in(reg) 4 * steps.right_pitch,
            right_step = in(reg) 4 * steps.right_step,
            count = inout(reg) steps.count => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// Packs columns of the right operand, their pairs from `first` on, in the same way.
///
/// # Safety
/// As [`pack_left`].
#[inline(always)]
unsafe fn pack_right(right: &Operand<'_, Pair>, first: usize, depth: usize, column: usize, columns: usize, edge: *mut u32) {
    let steps = depth.div_ceil(SIDE);
    // SAFETY: as above.
    unsafe {
        edge.write_bytes(0, steps * 2 * TILE);
        for pair in 0..depth {
            for c in 0..columns {
                let tile = edge.add((pair / SIDE * 2 + c / SIDE) * TILE);
                *tile.add(pair % SIDE * SIDE + c % SIDE) = (*right.at(first + pair, column + c)).bits();
            }
        }
    }
}

/// Packs rows of the left operand, their pairs from `first` on: two tiles for every SIDE pairs, zeros beyond its rows and its depth.
///
/// # Safety
/// It has them, at most BLOCK x DEPTH; the panel has room.
#[inline(always)]
unsafe fn pack_left(left: &Left<'_>, top: usize, rows: usize, first: usize, depth: usize, panel: *mut u32) {
    let steps = depth.div_ceil(SIDE);
    // SAFETY: as above.
    unsafe {
        if rows < BLOCK || depth < steps * SIDE {
            panel.write_bytes(0, steps * 2 * TILE);
        }
        for step in 0..steps {
            let pairs = (depth - step * SIDE).min(SIDE);
            for half in (0..2).filter(|half| half * SIDE < rows) {
                let (row, pair) = (top + half * SIDE, first + step * SIDE);
                let (rows, tile) = ((rows - half * SIDE).min(SIDE), panel.add((2 * step + half) * TILE));
                match left {
                    Left::Pairs(operand) if operand.column_stride == 1 => {
                        for i in 0..rows {
                            tile.add(i * SIDE).copy_from_nonoverlapping(operand.at(row + i, pair).cast::<u32>(), pairs);
                        }
                    }
                    Left::Pairs(operand) if rows == SIDE && pairs == SIDE && operand.row_stride == 1 => {
                        transpose(operand.at(row, pair).cast::<u32>(), operand.column_stride, tile);
                    }
                    Left::Pairs(operand) => {
                        for i in 0..rows {
                            for j in 0..pairs {
                                *tile.add(i * SIDE + j) = (*operand.at(row + i, pair + j)).bits();
                            }
                        }
                    }
                    Left::Terms(terms) => {
                        for i in 0..rows {
                            let count = (terms.length - 2 * pair).min(2 * pairs);
                            let from = std::slice::from_raw_parts(terms.rows.at(row + i, 2 * pair), count);
                            term(from, terms.second, tile.add(i * SIDE));
                        }
                    }
                }
            }
        }
    }
}

/// One term of a row's numbers, in pairs; an odd last one is paired with 0.
///
/// # Safety
/// `to` has room for them.
#[inline(always)]
unsafe fn term(from: &[f32], second: bool, to: *mut u32) {
    let of = |x: f32| match second {
        false => nearest(x),
        true => nearest(x - f32::from_bits(u32::from(nearest(x)) << 16)),
    };
    let (pairs, last) = from.as_chunks::<2>();
    for (place, [first, next]) in pairs.iter().enumerate() {
        // SAFETY: as above.
        unsafe { *to.add(place) = u32::from(of(*first)) | u32::from(of(*next)) << 16 };
    }
    if let [last] = last {
        // SAFETY: as above.
        unsafe { *to.add(pairs.len()) = u32::from(of(*last)) };
    }
}

/// Transposes 16 x 16 words, whose rows are `pitch` apart, into a tile.
///
/// # Safety
/// They are there, and the tile is aligned to 64 bytes.
#[target_feature(enable = "avx512f")]
unsafe fn transpose(from: *const u32, pitch: usize, tile: *mut u32) {
    // SAFETY: as above.
    unsafe {
        let mut rows = [_mm512_setzero_si512(); SIDE];
        for (row, words) in rows.iter_mut().enumerate() {
            *words = _mm512_loadu_si512(from.add(row * pitch).cast());
        }
        // By words, by pairs of words, by quarters of a row, by halves: each step doubles the part of a column that lies together.
        let before = rows;
        for row in 0..SIDE {
            let (a, b) = (before[row & !1], before[row | 1]);
            rows[row] = if row & 1 == 0 { _mm512_unpacklo_epi32(a, b) } else { _mm512_unpackhi_epi32(a, b) };
        }
        let before = rows;
        for row in 0..SIDE {
            let (a, b) = (before[row & !3 | row >> 1 & 1], before[row & !3 | 2 | row >> 1 & 1]);
            rows[row] = if row & 1 == 0 { _mm512_unpacklo_epi64(a, b) } else { _mm512_unpackhi_epi64(a, b) };
        }
        let before = rows;
        for row in 0..SIDE {
            let (a, b) = (before[row & !7 | row & 3], before[row & !7 | 4 | row & 3]);
            rows[row] = if row & 4 == 0 { _mm512_shuffle_i32x4::<0x88>(a, b) } else { _mm512_shuffle_i32x4::<0xdd>(a, b) };
        }
        for row in 0..SIDE {
            let (a, b) = (rows[row & 7], rows[8 | row & 7]);
            let whole = if row & 8 == 0 { _mm512_shuffle_i32x4::<0x88>(a, b) } else { _mm512_shuffle_i32x4::<0xdd>(a, b) };
            _mm512_store_si512(tile.add(row * SIDE).cast(), whole);
        }
    }
}
