//! The products of a step, by the GEMM kernels: which entry a head takes, and how it is launched. The numbers are those of
//! kernels/tune.h; a test compares them.

use std::cell::RefCell;
use std::sync::Arc;

use super::driver::{Arguments, Context, Grid, Kernel, Module, Stream};
use super::images::{Images, Launch, Pipeline};
use super::shared_structs::{HeadArrays, MatrixView};
use crate::{ensure, error, Result};

/// The entries of the numerators have one pipeline, those of the weighted centers another; the cosines have the latter.
const NUMERATORS: Pipeline = Pipeline { shared: 49_680, stages: 3 };
const WEIGHTED: Pipeline = Pipeline { shared: 49_152, stages: 3 };

/// An entry of the center gradient.
struct CenterGradientEntry {
    /// The longest row that it takes.
    max_dim: u32,
    half: &'static str,
    f32: &'static str,
    /// The last is for GPUs whose blocks may have as much shared memory.
    pipelines: &'static [Pipeline],
}

const CENTER_GRADIENT: [CenterGradientEntry; 4] = [
    CenterGradientEntry {
        max_dim: 128,
        half: "gemm_center_gradient_half_128",
        f32: "gemm_center_gradient_f32_128",
        pipelines: &[Pipeline { shared: 49_920, stages: 4 }],
    },
    CenterGradientEntry {
        max_dim: 256,
        half: "gemm_center_gradient_half_256",
        f32: "gemm_center_gradient_f32_256",
        pipelines: &[Pipeline { shared: 99_840, stages: 4 }],
    },
    CenterGradientEntry {
        max_dim: 512,
        half: "gemm_center_gradient_half_512",
        f32: "gemm_center_gradient_f32_512",
        pipelines: &[Pipeline { shared: 74_496, stages: 2 }, Pipeline { shared: 148_224, stages: 4 }],
    },
    CenterGradientEntry {
        max_dim: 1024,
        half: "gemm_center_gradient_half_1024",
        f32: "gemm_center_gradient_f32_1024",
        pipelines: &[Pipeline { shared: 67_968, stages: 2 }, Pipeline { shared: 135_552, stages: 4 }],
    },
];

/// The largest embedding_dim that the accumulators of a block hold.
pub(super) const LARGEST_DIM: u32 = 1024;

/// Loads the products' entries.
struct Loader<'a> {
    context: &'a Arc<Context>,
    images: &'a Images,
    multiprocessors: u32,
    largest_shared: u32,
    /// Entries that were loaded.
    loaded: RefCell<Vec<&'static str>>,
}

impl Loader<'_> {
    fn module(&self, source: &str) -> Result<Arc<Module>> {
        Module::load(self.context, source, self.images.of(source)?)
    }

    /// An entry, launched as the images say, or else with the last of the pipelines that the GPU has the shared memory for.
    fn product<A: Arguments>(&self, module: &Arc<Module>, entry: &'static str, pipelines: &[Pipeline]) -> Result<Product<A>> {
        self.loaded.borrow_mut().push(entry);
        let told = self.images.launches.iter().find(|launch| launch.entry == entry);
        let pipelines = told.map_or(pipelines, |launch| &launch.pipelines);
        let fitting = pipelines.iter().rfind(|pipeline| pipeline.shared <= self.largest_shared);
        Product::load(module, entry, *fitting.unwrap_or(&pipelines[0]), self.multiprocessors)
    }

    /// Refuses launches of kernels that there are not: they would be without effect.
    fn check_launches(&self) -> Result<()> {
        let loaded = self.loaded.borrow();
        match self.images.launches.iter().find(|launch| !loaded.contains(&launch.entry.as_str())) {
            Some(Launch { entry, .. }) => {
                Err(error!(InvalidArgument, "PFC_KERNEL_IMAGES: a launch of {entry:?}, which is no product"))
            }
            None => Ok(()),
        }
    }
}

/// A kernel, and the blocks that fill a multiprocessor.
struct Product<A> {
    kernel: Kernel<A>,
    multiprocessors: u32,
    grid: Grid,
    stages: u32,
}

impl<A: Arguments> Product<A> {
    fn load(module: &Arc<Module>, entry: &str, pipeline: Pipeline, multiprocessors: u32) -> Result<Product<A>> {
        let kernel = module.kernel::<A>(entry)?;
        kernel.allow_shared(pipeline.shared)?;
        // The grid counts on as many blocks a multiprocessor as fit into all of its shared memory. cp.async.cg passes the first-level
        // cache by, so that the products lose nothing; and they leave the memory divided as it is from one to the next.
        kernel.prefer_shared()?;
        // The kernel's launch bounds: a block has them all.
        let threads = kernel.largest_block()?;
        let blocks = kernel.blocks_per_multiprocessor(threads, pipeline.shared)?;
        ensure!(
            blocks > 0,
            Unsupported,
            "no block of the kernel {entry} fits a multiprocessor of this GPU: {threads} threads, {} bytes of shared memory",
            pipeline.shared
        );
        Ok(Product { kernel, multiprocessors, grid: Grid { blocks, threads, shared: pipeline.shared }, stages: pipeline.stages })
    }

    /// On all multiprocessors but `reserved`, which are left to other work; a small GPU reserves an eighth of its own at most.
    fn launch(&self, stream: &Stream, arguments: A, reserved: u32) -> Result<()> {
        let used = self.multiprocessors - reserved.min(self.multiprocessors / 8);
        let grid = Grid { blocks: used * self.grid.blocks, ..self.grid };
        // SAFETY: the arrays of a head, which are as large as its sizes say.
        unsafe { self.kernel.launch(stream, grid, arguments) }
    }
}

/// The arrays and the chunk's first column.
type ChunkArguments = (HeadArrays, u32);
/// The same, and whether tiles are left alone whose rows all have the common offset.
type FarArguments = (HeadArrays, u32, i32);
/// The arrays, the chunk's first column, the loss weight, whether to update the rows, and the stages of the pipeline.
type CenterGradientArguments = (HeadArrays, u32, f64, i32, u32);
/// The arrays, rows, columns, the first column in the matrix, and the matrix.
type CosinesArguments = (HeadArrays, u32, u32, u64, MatrixView);

/// What the numerators are relative to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Offsets {
    /// exp(c).
    Common,
    /// Each row's own; `far_only`: in the tiles of rows alone of which one's is not c.
    Own { far_only: bool },
}

/// The products of one precision.
struct Precision {
    numerators: Product<ChunkArguments>,
    far_numerators: Product<FarArguments>,
    weighted_centers: Product<ChunkArguments>,
    /// In the order of `CENTER_GRADIENT`.
    center_gradient: Vec<Product<CenterGradientArguments>>,
}

pub(super) struct Products {
    half: Precision,
    f32: Precision,
    cosines: Product<CosinesArguments>,
}

impl Products {
    pub fn load(context: &Arc<Context>, images: &Images, multiprocessors: u32) -> Result<Products> {
        let largest_shared = context.largest_shared()?;
        let loader = Loader { context, images, multiprocessors, largest_shared, loaded: RefCell::default() };
        let center_gradient = |source: &str, name: fn(&CenterGradientEntry) -> &'static str| {
            let module = loader.module(source)?;
            CENTER_GRADIENT.iter().map(|entry| loader.product(&module, name(entry), entry.pipelines)).collect::<Result<Vec<_>>>()
        };
        let (numerators, weighted) = (loader.module("gemm_numerators")?, loader.module("gemm_weighted_centers")?);
        let half = Precision {
            numerators: loader.product(&numerators, "gemm_numerators_half", &[NUMERATORS])?,
            far_numerators: loader.product(&numerators, "gemm_numerators_half_far", &[NUMERATORS])?,
            weighted_centers: loader.product(&weighted, "gemm_weighted_centers_half", &[WEIGHTED])?,
            center_gradient: center_gradient("gemm_center_gradient_half", |entry| entry.half)?,
        };
        let f32 = Precision {
            numerators: loader.product(&numerators, "gemm_numerators_f32", &[NUMERATORS])?,
            far_numerators: loader.product(&numerators, "gemm_numerators_f32_far", &[NUMERATORS])?,
            weighted_centers: loader.product(&weighted, "gemm_weighted_centers_f32", &[WEIGHTED])?,
            center_gradient: center_gradient("gemm_center_gradient_f32", |entry| entry.f32)?,
        };
        let cosines = loader.product(&loader.module("gemm_cosines")?, "gemm_cosines", &[WEIGHTED])?;
        loader.check_launches()?;
        Ok(Products { half, f32, cosines })
    }

    fn of(&self, arrays: &HeadArrays) -> &Precision {
        if arrays.split_operands != 0 {
            &self.f32
        } else {
            &self.half
        }
    }

    /// P of the chunk that begins at column `first`, and its row sums.
    pub fn numerators(&self, stream: &Stream, arrays: HeadArrays, first: u32, offsets: Offsets) -> Result<()> {
        let products = self.of(&arrays);
        match offsets {
            Offsets::Common => products.numerators.launch(stream, (arrays, first), 0),
            Offsets::Own { far_only } => products.far_numerators.launch(stream, (arrays, first, far_only.into()), 0),
        }
    }

    /// P W^ of the chunk, beside other work on the reserved multiprocessors.
    pub fn weighted_centers(&self, stream: &Stream, arrays: HeadArrays, first: u32, reserved: u32) -> Result<()> {
        self.of(&arrays).weighted_centers.launch(stream, (arrays, first), reserved)
    }

    /// dW^ of the chunk: `fuse` 1 updates the rows by their dW, 0 writes dW^, the gradient of their directions.
    pub fn center_gradient(
        &self,
        stream: &Stream,
        arrays: HeadArrays,
        first: u32,
        loss_weight: f64,
        fuse: i32,
        reserved: u32,
    ) -> Result<()> {
        let narrowest = CENTER_GRADIENT.iter().position(|entry| arrays.dim <= entry.max_dim).unwrap_or(CENTER_GRADIENT.len() - 1);
        let product = &self.of(&arrays).center_gradient[narrowest];
        product.launch(stream, (arrays, first, loss_weight, fuse, product.stages), reserved)
    }

    /// Cosines of the first `count` rows of E^ with the `columns` of the chunk, to the matrix from column `first` on.
    pub fn cosines(
        &self,
        stream: &Stream,
        arrays: HeadArrays,
        count: u32,
        columns: u32,
        first: u64,
        cosines: MatrixView,
    ) -> Result<()> {
        self.cosines.launch(stream, (arrays, count, columns, first, cosines), 0)
    }
}

#[cfg(test)]
mod tests;
