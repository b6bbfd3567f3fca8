//! What a step cannot do without: the floating-point operations of its products, and the bytes that must cross the GPU's memory,
//! each array read once and written once by a kernel. Time at the device's own rates is a kernel's floor.

/// B rows, S classes of the sample, d.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    pub batch: usize,
    pub sample: usize,
    pub dim: usize,
}

/// Rates of the device: operations and bytes a second. A rate that is not known is infinite.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    pub flops: f64,
    pub bytes: f64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Floor {
    pub flops: f64,
    pub bytes: f64,
}

impl Floor {
    /// Microseconds: the larger of the two times.
    pub fn time(&self, rates: Rates) -> f64 {
        1e6 * (self.flops / rates.flops).max(self.bytes / rates.bytes)
    }

    fn times(self, count: f64) -> Floor {
        Floor { flops: count * self.flops, bytes: count * self.bytes }
    }
}

/// The kernels that have a floor, in the order of a step: those with arrays of B x S, S x d or B x d. The others (labels, the draw,
/// rows of scalars) wait for latency.
pub const KERNELS: [&str; 10] = [
    "pack_embeddings",
    "normalize_embeddings",
    "gather_centers",
    "gemm_numerators",
    "gemm_weighted_centers",
    "reduce_rows",
    "scale_embeddings",
    "embedding_gradient",
    "finish_gradient",
    "gemm_center_gradient",
];

/// Of all launches of a kernel in one step: half precision, one rank, lazy SGD with momentum, embeddings and gradients in float32.
/// Where P is not kept, what makes it runs twice. None: no floor.
///
/// With 4 bytes for float32 and 2 for operands, "->" from what is read to what is written:
///
/// - pack_embeddings: E 4Bd -> 4Bd
/// - normalize_embeddings: E 4Bd -> E^ 4Bd, operand 2Bd
/// - gather_centers: W 4Sd -> W^ in fp16 2Sd, in bf16 2Sd
/// - gemm_numerators (2BSd flop): E^ 2Bd, W^ 2Sd -> P 2BS, sums and maxima of 128 columns 8BS/128
/// - gemm_weighted_centers (2BSd flop): P 2BS, W^ 2Sd -> 4Bd
/// - reduce_rows: 8BS/128 -> 8B
/// - scale_embeddings: E^ 4Bd -> E' 2Bd
/// - embedding_gradient: P W^ 4Bd, target rows 4Bd -> 4Bd
/// - finish_gradient: dE^ 4Bd, E^ 4Bd -> 4Bd
/// - gemm_center_gradient (2BSd flop): P 2BS, E' 2Bd, W and m 8Sd -> W and m 8Sd
pub fn of_kernel(name: &str, shape: Shape, keeps: bool) -> Option<Floor> {
    let [b, s, d] = [shape.batch, shape.sample, shape.dim].map(|n| n as f64);
    let kernel = KERNELS.iter().find(|kernel| name.starts_with(*kernel))?;
    let product = 2.0 * b * s * d;
    let (flops, bytes) = match *kernel {
        "pack_embeddings" => (0.0, 8.0 * b * d),
        "normalize_embeddings" => (0.0, 10.0 * b * d),
        "gather_centers" => (0.0, 8.0 * s * d),
        "gemm_numerators" => (product, 2.0 * b * d + 2.0 * s * d + 2.0 * b * s + b * s / 16.0),
        "gemm_weighted_centers" => (product, 2.0 * b * s + 2.0 * s * d + 4.0 * b * d),
        "reduce_rows" => (0.0, b * s / 16.0 + 8.0 * b),
        "scale_embeddings" => (0.0, 6.0 * b * d),
        "embedding_gradient" | "finish_gradient" => (0.0, 12.0 * b * d),
        "gemm_center_gradient" => (product, 2.0 * b * s + 2.0 * b * d + 16.0 * s * d),
        other => unreachable!("{other} has no floor"),
    };
    let again = !keeps && matches!(*kernel, "gather_centers" | "gemm_numerators");
    Some(Floor { flops, bytes }.times(if again { 2.0 } else { 1.0 }))
}

/// Of a whole step: 6BSd flop where P is kept, 8BSd where it is computed twice, and the bytes of all kernels.
pub fn of_step(shape: Shape, keeps: bool) -> Floor {
    KERNELS
        .iter()
        .filter_map(|kernel| of_kernel(kernel, shape, keeps))
        .fold(Floor::default(), |sum, floor| Floor { flops: sum.flops + floor.flops, bytes: sum.bytes + floor.bytes })
}
