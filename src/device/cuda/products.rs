//! The three GEMM-shaped kernels: which entry a head takes, and how it is launched. The numbers are those of kernels/tune.h.

use std::sync::Arc;

use super::driver::{Arguments, Context, Grid, Kernel, Module, Stream};
use super::images::Images;
use super::view::HeadView;
use crate::Result;

/// Threads of a block of each of them.
const THREADS: u32 = 256;
/// Dynamic shared memory of GEMM1 and GEMM2.
const NUMERATORS_SHARED: u32 = 49_680;
const WEIGHTED_SHARED: u32 = 49_152;

/// An entry of GEMM3: its name's ending and its shared memory.
#[derive(Clone, Copy)]
struct Shape {
    name: &'static str,
    shared: u32,
}

/// GEMM3 by the widest row it takes, with a deeper pipeline for GPUs that have room for it.
struct Width {
    most: u32,
    shape: Shape,
    deep: Option<Shape>,
}

const WIDTHS: [Width; 4] = [
    Width { most: 128, shape: Shape { name: "128", shared: 49_920 }, deep: None },
    Width { most: 256, shape: Shape { name: "256", shared: 99_840 }, deep: None },
    Width { most: 512, shape: Shape { name: "512", shared: 74_496 }, deep: Some(Shape { name: "512_deep", shared: 148_224 }) },
    Width { most: 1024, shape: Shape { name: "1024", shared: 67_968 }, deep: Some(Shape { name: "1024_deep", shared: 135_552 }) },
];

/// The largest embedding_dim that a row of accumulators holds.
pub(super) const LARGEST_WIDTH: u32 = 1024;

/// A kernel, and the blocks that fill a multiprocessor.
struct Product<A> {
    kernel: Kernel<A>,
    multiprocessors: u32,
    grid: Grid,
}

impl<A: Arguments> Product<A> {
    fn load(module: &Arc<Module>, name: &str, shared: u32, multiprocessors: u32) -> Result<Product<A>> {
        let kernel = module.kernel::<A>(name)?;
        kernel.allow_shared(shared)?;
        let blocks = kernel.blocks_per_multiprocessor(THREADS, shared)?.max(1);
        Ok(Product { kernel, multiprocessors, grid: Grid { blocks, threads: THREADS, shared } })
    }

    /// On all multiprocessors but `spared`, and on an eighth of a small GPU's at most less.
    fn launch(&self, stream: &Stream, arguments: A, spared: u32) -> Result<()> {
        let used = self.multiprocessors - spared.min(self.multiprocessors / 8);
        let grid = Grid { blocks: used * self.grid.blocks, ..self.grid };
        // SAFETY: the arrays of a head, as large as its view says.
        unsafe { self.kernel.launch(stream, grid, arguments) }
    }
}

/// One precision's: the view, the chunk's first column; GEMM3: the loss weight and whether to update the rows.
struct Precision {
    numerators: Product<(HeadView, u32)>,
    weighted: Product<(HeadView, u32)>,
    /// In the order of `WIDTHS`.
    centers: Vec<Product<(HeadView, u32, f64, i32)>>,
}

pub(super) struct Products {
    half: Precision,
    f32: Precision,
}

impl Products {
    pub fn load(context: &Arc<Context>, images: &Images, multiprocessors: u32) -> Result<Products> {
        let module = |source: &str| Module::load(context, source, images.of(source)?);
        let modules = (module("gemm_numerators")?, module("gemm_weighted")?, module("gemm_centers")?);
        let largest = context.largest_shared()?;
        let precision = |suffix: &str| -> Result<Precision> {
            let centers = WIDTHS.iter().map(|width| {
                let Shape { name, shared } = width.deep.filter(|deep| deep.shared <= largest).unwrap_or(width.shape);
                Product::load(&modules.2, &format!("multiply_centers_{suffix}_{name}"), shared, multiprocessors)
            });
            Ok(Precision {
                numerators: Product::load(
                    &modules.0,
                    &format!("multiply_numerators_{suffix}"),
                    NUMERATORS_SHARED,
                    multiprocessors,
                )?,
                weighted: Product::load(&modules.1, &format!("multiply_weighted_{suffix}"), WEIGHTED_SHARED, multiprocessors)?,
                centers: centers.collect::<Result<_>>()?,
            })
        };
        Ok(Products { half: precision("half")?, f32: precision("f32")? })
    }

    fn of(&self, view: &HeadView) -> &Precision {
        if view.split_operands != 0 {
            &self.f32
        } else {
            &self.half
        }
    }

    /// GEMM1: P of the chunk that begins at column `first`, and its row sums.
    pub fn numerators(&self, stream: &Stream, view: HeadView, first: u32) -> Result<()> {
        self.of(&view).numerators.launch(stream, (view, first), 0)
    }

    /// GEMM2: P @ W^ of the chunk, beside what runs on the multiprocessors that it spares.
    pub fn weighted(&self, stream: &Stream, view: HeadView, first: u32, spared: u32) -> Result<()> {
        self.of(&view).weighted.launch(stream, (view, first), spared)
    }

    /// GEMM3: dW of the chunk; `fuse` 1 updates the rows, 0 writes their gradient.
    pub fn centers(&self, stream: &Stream, view: HeadView, first: u32, loss_weight: f64, fuse: i32, spared: u32) -> Result<()> {
        let narrowest = WIDTHS.iter().position(|width| view.dim <= width.most).unwrap_or(WIDTHS.len() - 1);
        self.of(&view).centers[narrowest].launch(stream, (view, first, loss_weight, fuse), spared)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_memory_is_what_the_kernels_say() {
        let header = include_str!("../../../kernels/tune.h");
        let says = |gemm: &str, bytes: u32| {
            let line = format!("gemm_shared_bytes(Gemm::{gemm}) == {bytes}");
            assert!(header.contains(&line), "tune.h does not say {line}");
        };
        says("kNumerators", NUMERATORS_SHARED);
        says("kWeighted", WEIGHTED_SHARED);
        for Width { most, shape, deep } in WIDTHS {
            says(&format!("kCenters, {most}"), shape.shared);
            if let Some(deep) = deep {
                says(&format!("kCenters, {most}, true"), deep.shared);
            }
        }
    }
}
