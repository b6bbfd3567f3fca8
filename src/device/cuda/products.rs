//! The products of a step, by the GEMM kernels: which entry a head takes, and how it is launched. The numbers are those of
//! kernels/tune.h; a test compares them.

use std::sync::Arc;

use super::driver::{Arguments, Context, Grid, Kernel, Module, Stream};
use super::images::Images;
use super::shared_structs::{HeadArrays, MatrixView};
use crate::Result;

/// Dynamic shared memory.
const NUMERATORS_SHARED: u32 = 49_680;
const WEIGHTED_SHARED: u32 = 49_152;
const COSINES_SHARED: u32 = 49_152;

/// The stages of the center gradient's pipeline and the dynamic shared memory that they take.
#[derive(Clone, Copy)]
struct Pipeline {
    stages: u32,
    shared: u32,
}

/// An entry of the center gradient.
struct CenterGradientEntry {
    /// The longest row that it takes.
    max_dim: u32,
    half: &'static str,
    f32: &'static str,
    pipeline: Pipeline,
    /// For GPUs whose blocks may have as much shared memory.
    deep: Option<Pipeline>,
}

const CENTER_GRADIENT: [CenterGradientEntry; 4] = [
    CenterGradientEntry {
        max_dim: 128,
        half: "gemm_center_gradient_half_128",
        f32: "gemm_center_gradient_f32_128",
        pipeline: Pipeline { stages: 4, shared: 49_920 },
        deep: None,
    },
    CenterGradientEntry {
        max_dim: 256,
        half: "gemm_center_gradient_half_256",
        f32: "gemm_center_gradient_f32_256",
        pipeline: Pipeline { stages: 4, shared: 99_840 },
        deep: None,
    },
    CenterGradientEntry {
        max_dim: 512,
        half: "gemm_center_gradient_half_512",
        f32: "gemm_center_gradient_f32_512",
        pipeline: Pipeline { stages: 2, shared: 74_496 },
        deep: Some(Pipeline { stages: 4, shared: 148_224 }),
    },
    CenterGradientEntry {
        max_dim: 1024,
        half: "gemm_center_gradient_half_1024",
        f32: "gemm_center_gradient_f32_1024",
        pipeline: Pipeline { stages: 2, shared: 67_968 },
        deep: Some(Pipeline { stages: 4, shared: 135_552 }),
    },
];

/// The largest embedding_dim that the accumulators of a block hold.
pub(super) const LARGEST_DIM: u32 = 1024;

impl CenterGradientEntry {
    fn pipeline(&self, largest_shared: u32) -> Pipeline {
        self.deep.filter(|deep| deep.shared <= largest_shared).unwrap_or(self.pipeline)
    }
}

/// A kernel, and the blocks that fill a multiprocessor.
struct Product<A> {
    kernel: Kernel<A>,
    multiprocessors: u32,
    grid: Grid,
}

impl<A: Arguments> Product<A> {
    fn load(module: &Arc<Module>, entry: &str, shared: u32, multiprocessors: u32) -> Result<Product<A>> {
        let kernel = module.kernel::<A>(entry)?;
        kernel.allow_shared(shared)?;
        // The grid counts on as many blocks a multiprocessor as fit into all of its shared memory. cp.async.cg passes the first-level
        // cache by, so that the products lose nothing; and they leave the memory divided as it is from one to the next.
        kernel.prefer_shared()?;
        // The kernel's launch bounds: a block has them all.
        let threads = kernel.largest_block()?;
        let blocks = kernel.blocks_per_multiprocessor(threads, shared)?.max(1);
        Ok(Product { kernel, multiprocessors, grid: Grid { blocks, threads, shared } })
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

/// An entry of the center gradient for this GPU.
struct CenterGradient {
    product: Product<CenterGradientArguments>,
    stages: u32,
}

/// The products of one precision.
struct Precision {
    numerators: Product<ChunkArguments>,
    far_numerators: Product<FarArguments>,
    weighted_centers: Product<ChunkArguments>,
    /// In the order of `CENTER_GRADIENT`.
    center_gradient: Vec<CenterGradient>,
}

pub(super) struct Products {
    half: Precision,
    f32: Precision,
    cosines: Product<CosinesArguments>,
}

impl Products {
    pub fn load(context: &Arc<Context>, images: &Images, multiprocessors: u32) -> Result<Products> {
        let module = |source: &str| Module::load(context, source, images.of(source)?);
        let largest_shared = context.largest_shared()?;
        let center_gradient = |module: &Arc<Module>, name: fn(&CenterGradientEntry) -> &'static str| {
            let load = |entry: &CenterGradientEntry| {
                let Pipeline { stages, shared } = entry.pipeline(largest_shared);
                let product = Product::load(module, name(entry), shared, multiprocessors)?;
                Ok(CenterGradient { product, stages })
            };
            CENTER_GRADIENT.iter().map(load).collect::<Result<Vec<_>>>()
        };
        let (numerators, weighted) = (module("gemm_numerators")?, module("gemm_weighted_centers")?);
        let half = Precision {
            numerators: Product::load(&numerators, "gemm_numerators_half", NUMERATORS_SHARED, multiprocessors)?,
            far_numerators: Product::load(&numerators, "gemm_numerators_half_far", NUMERATORS_SHARED, multiprocessors)?,
            weighted_centers: Product::load(&weighted, "gemm_weighted_centers_half", WEIGHTED_SHARED, multiprocessors)?,
            center_gradient: center_gradient(&module("gemm_center_gradient_half")?, |entry| entry.half)?,
        };
        let f32 = Precision {
            numerators: Product::load(&numerators, "gemm_numerators_f32", NUMERATORS_SHARED, multiprocessors)?,
            far_numerators: Product::load(&numerators, "gemm_numerators_f32_far", NUMERATORS_SHARED, multiprocessors)?,
            weighted_centers: Product::load(&weighted, "gemm_weighted_centers_f32", WEIGHTED_SHARED, multiprocessors)?,
            center_gradient: center_gradient(&module("gemm_center_gradient_f32")?, |entry| entry.f32)?,
        };
        let cosines = Product::load(&module("gemm_cosines")?, "gemm_cosines", COSINES_SHARED, multiprocessors)?;
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
        let CenterGradient { product, stages } = &self.of(&arrays).center_gradient[narrowest];
        product.launch(stream, (arrays, first, loss_weight, fuse, *stages), reserved)
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
mod tests {
    use super::*;

    #[test]
    fn launches_are_what_the_kernels_say() {
        let header = include_str!("../../../kernels/tune.h");
        let says = |line: String| assert!(header.contains(&line), "tune.h does not say {line}");
        let shared = |name: &str, bytes: u32| says(format!("static_assert({name} == {bytes}, "));
        shared("kNumeratorsShared", NUMERATORS_SHARED);
        shared("kWeightedShared", WEIGHTED_SHARED);
        shared("kCosinesShared", COSINES_SHARED);
        let stages = |width: &str, stages: u32| {
            says(format!("static_assert(gemm_tile(Gemm::kCenterGradient, {width}).stages == {stages}, "));
        };
        for CenterGradientEntry { max_dim, half, f32, pipeline, deep } in CENTER_GRADIENT {
            says(format!("// gate: {half} registers "));
            says(format!("// gate: {f32} registers "));
            assert!(half.ends_with(&format!("_half_{max_dim}")) && f32.ends_with(&format!("_f32_{max_dim}")));
            shared(&format!("kGradShared{max_dim}"), pipeline.shared);
            stages(&max_dim.to_string(), pipeline.stages);
            if let Some(deep) = deep {
                shared(&format!("kGradShared{max_dim}Deep"), deep.shared);
                stages(&format!("{max_dim}, true"), deep.stages);
            }
        }
    }
}
