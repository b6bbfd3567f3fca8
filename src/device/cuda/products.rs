//! The GEMM-shaped kernels: which entry a head takes, and how it is launched. The numbers are those of kernels/tune.h.

use std::sync::Arc;

use super::driver::{Arguments, Context, Grid, Kernel, Module, Stream};
use super::images::Images;
use super::view::{HeadView, MatrixView};
use crate::Result;

/// Threads of a block of each of them.
const THREADS: u32 = 256;
/// Dynamic shared memory of GEMM1 and GEMM2.
const NUMERATORS_SHARED: u32 = 49_680;
const WEIGHTED_SHARED: u32 = 49_152;
/// Of the cosines: the pipeline of GEMM1 alone.
const UNITS_SHARED: u32 = 49_152;

/// The stages of GEMM3's pipeline and the dynamic shared memory that they take.
#[derive(Clone, Copy)]
struct Pipeline {
    stages: u32,
    shared: u32,
}

/// GEMM3 by the widest row it takes, with a deeper pipeline for GPUs that have room for it.
struct Width {
    most: u32,
    pipeline: Pipeline,
    deep: Option<Pipeline>,
}

const WIDTHS: [Width; 4] = [
    Width { most: 128, pipeline: Pipeline { stages: 4, shared: 49_920 }, deep: None },
    Width { most: 256, pipeline: Pipeline { stages: 4, shared: 99_840 }, deep: None },
    Width { most: 512, pipeline: Pipeline { stages: 2, shared: 74_496 }, deep: Some(Pipeline { stages: 4, shared: 148_224 }) },
    Width { most: 1024, pipeline: Pipeline { stages: 2, shared: 67_968 }, deep: Some(Pipeline { stages: 4, shared: 135_552 }) },
];

impl Width {
    fn pipeline(&self, largest_shared: u32) -> Pipeline {
        self.deep.filter(|deep| deep.shared <= largest_shared).unwrap_or(self.pipeline)
    }
}

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

    /// On all multiprocessors but `spared`; a small GPU spares an eighth of its own at most.
    fn launch(&self, stream: &Stream, arguments: A, spared: u32) -> Result<()> {
        let used = self.multiprocessors - spared.min(self.multiprocessors / 8);
        let grid = Grid { blocks: used * self.grid.blocks, ..self.grid };
        // SAFETY: the arrays of a head, as large as its view says.
        unsafe { self.kernel.launch(stream, grid, arguments) }
    }
}

/// The view, the chunk's first column, the loss weight, whether to update the rows, and the stages.
type CentersArguments = (HeadView, u32, f64, i32, u32);

/// One precision's; GEMM1 and GEMM2 take the view and the chunk's first column.
struct Precision {
    numerators: Product<(HeadView, u32)>,
    weighted: Product<(HeadView, u32)>,
    /// In the order of `WIDTHS`, with the stages.
    centers: Vec<(Product<CentersArguments>, u32)>,
}

pub(super) struct Products {
    half: Precision,
    f32: Precision,
    units: Product<(HeadView, u32, u32, u64, MatrixView)>,
}

impl Products {
    pub fn load(context: &Arc<Context>, images: &Images, multiprocessors: u32) -> Result<Products> {
        let module = |source: &str| Module::load(context, source, images.of(source)?);
        let (numerators, weighted) = (module("gemm_numerators")?, module("gemm_weighted")?);
        let largest = context.largest_shared()?;
        let precision = |suffix: &str| -> Result<Precision> {
            let entry = |gemm: &str| format!("multiply_{gemm}_{suffix}");
            let centers = module(&format!("gemm_centers_{suffix}"))?;
            let centers = WIDTHS.iter().map(|width| {
                let (Pipeline { stages, shared }, name) = (width.pipeline(largest), entry("centers"));
                Ok((Product::load(&centers, &format!("{name}_{}", width.most), shared, multiprocessors)?, stages))
            });
            Ok(Precision {
                numerators: Product::load(&numerators, &entry("numerators"), NUMERATORS_SHARED, multiprocessors)?,
                weighted: Product::load(&weighted, &entry("weighted"), WEIGHTED_SHARED, multiprocessors)?,
                centers: centers.collect::<Result<_>>()?,
            })
        };
        let units = Product::load(&module("gemm_cosines")?, "multiply_units", UNITS_SHARED, multiprocessors)?;
        Ok(Products { half: precision("half")?, f32: precision("f32")?, units })
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

    /// Cosines of the first `count` rows of E^ with the `columns` of the chunk, to the matrix from column `first` on.
    pub fn units(&self, stream: &Stream, view: HeadView, count: u32, columns: u32, first: u64, cosines: MatrixView) -> Result<()> {
        self.units.launch(stream, (view, count, columns, first, cosines), 0)
    }

    /// GEMM2: P @ W^ of the chunk, beside what runs on the multiprocessors that it spares.
    pub fn weighted(&self, stream: &Stream, view: HeadView, first: u32, spared: u32) -> Result<()> {
        self.of(&view).weighted.launch(stream, (view, first), spared)
    }

    /// GEMM3: `fuse` 1 updates the rows of the chunk by their dW, 0 writes dW^, the gradient of their directions.
    pub fn centers(&self, stream: &Stream, view: HeadView, first: u32, loss_weight: f64, fuse: i32, spared: u32) -> Result<()> {
        let narrowest = WIDTHS.iter().position(|width| view.dim <= width.most).unwrap_or(WIDTHS.len() - 1);
        let (product, stages) = &self.of(&view).centers[narrowest];
        product.launch(stream, (view, first, loss_weight, fuse, *stages), spared)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launches_are_what_the_kernels_say() {
        let header = include_str!("../../../kernels/tune.h");
        let says = |gemm: &str, bytes: u32| {
            let line = format!("gemm_shared_bytes(Gemm::{gemm}) == {bytes}");
            assert!(header.contains(&line), "tune.h does not say {line}");
        };
        says("kNumerators", NUMERATORS_SHARED);
        says("kWeighted", WEIGHTED_SHARED);
        let stages = |width: &str, stages: u32| {
            let line = format!("gemm_tile(Gemm::kCenters, {width}).stages == {stages}");
            assert!(header.contains(&line), "tune.h does not say {line}");
        };
        for Width { most, pipeline, deep } in WIDTHS {
            says(&format!("kCenters, {most}"), pipeline.shared);
            stages(&most.to_string(), pipeline.stages);
            if let Some(deep) = deep {
                says(&format!("kCenters, {most}, true"), deep.shared);
                stages(&format!("{most}, true"), deep.stages);
            }
        }
    }
}
