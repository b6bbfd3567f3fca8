//! The backbone's one building block, as an operation of candle's graph: convolution, batch normalization, ReLU.
//!
//! Fused, and for a reason: candle's own convolution and element-wise operations, put together to the same block, take twelve times
//! as long on two cores, most of it in the convolution's backward. Here images are lowered to columns a few at a time, so that the
//! columns stay in the cache, and the normalization's sums are taken while a product is still warm. Images lie as [image, y, x,
//! channel]; a dense layer is the block with a side and a kernel of 1.
//!
//! Sums are taken lane by lane in a fixed order: the same bits for any number of threads.

use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Storage, Tensor};
use rayon::prelude::*;

use crate::product::{product, View};

/// Parts a batch is cut into; parts run side by side, and their sums are added in order.
const LANES: usize = 4;
/// Columns lowered at a time: half a megabyte, half of a common core's second-level cache.
const COLUMNS: usize = 128 * 1024;
/// Added to the variance before its root.
const EPSILON: f32 = 1e-5;

/// What a block computes.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Pixels along a side of the input; images are square.
    pub side: usize,
    pub inputs: usize,
    /// Pixels along a side of the kernel, odd.
    pub kernel: usize,
    pub stride: usize,
    pub outputs: usize,
    pub relu: bool,
}

impl Geometry {
    pub fn side_out(&self) -> usize {
        (self.side - 1) / self.stride + 1
    }
    /// Length of a column: the weights of one output.
    pub fn column(&self) -> usize {
        self.kernel * self.kernel * self.inputs
    }
    fn image(&self) -> usize {
        self.side * self.side * self.inputs
    }
    fn rows(&self) -> usize {
        self.side_out() * self.side_out()
    }
    pub fn image_out(&self) -> usize {
        self.rows() * self.outputs
    }
    /// Images lowered at a time.
    fn chunk(&self) -> usize {
        (COLUMNS / (self.rows() * self.column())).max(1)
    }
}

/// Mean and variance of every channel, one after the other.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Moments {
    pub mean: Vec<f32>,
    pub variance: Vec<f32>,
}

/// Where the normalization takes its moments from.
pub enum Normalize {
    /// This batch's, which are left here.
    Batch(Arc<Mutex<Moments>>),
    /// Given ones.
    Fixed(Moments),
}

/// One application of a block: x [n, side, side, inputs], weight [column, outputs], affine [2, outputs] (scale, shift).
pub struct Block {
    pub geometry: Geometry,
    pub normalize: Normalize,
    /// Whether x wants a gradient; the first block's images do not.
    pub input_gradient: bool,
    /// The convolution before the normalization, kept for backward.
    pub kept: Mutex<Vec<f32>>,
}

/// A lane's images: the first one and how many.
fn lanes(images: usize) -> Vec<(usize, usize)> {
    (0..LANES).map(|lane| (lane * images / LANES, (lane + 1) * images / LANES)).map(|(from, to)| (from, to - from)).collect()
}

/// Cuts a buffer of `each` elements an image into its lanes.
fn split<'a, T>(mut buffer: &'a mut [T], lanes: &[(usize, usize)], each: usize) -> Vec<&'a mut [T]> {
    let mut parts = Vec::with_capacity(lanes.len());
    for &(_, count) in lanes {
        let (part, rest) = buffer.split_at_mut(count * each);
        parts.push(part);
        buffer = rest;
    }
    parts
}

/// Two sums a channel, added over lanes in order.
fn add_sums(lanes: Vec<[Vec<f64>; 2]>, channels: usize) -> [Vec<f64>; 2] {
    let mut total = [vec![0.0; channels], vec![0.0; channels]];
    for lane in lanes {
        for (sums, more) in total.iter_mut().zip(lane) {
            sums.iter_mut().zip(more).for_each(|(sum, value)| *sum += value);
        }
    }
    total
}

// The four loops over rows below stay functions of their own: inlined, the compiler no longer knows that their slices do not
// overlap, and gives up vectorizing them (measured: four times slower).

/// Adds up each channel's values and squares.
#[inline(never)]
fn add_moments(y: &[f32], sum: &mut [f32], squares: &mut [f32]) {
    let channels = sum.len();
    let squares = &mut squares[..channels];
    for y in y.chunks_exact(channels) {
        for c in 0..channels {
            sum[c] += y[c];
            squares[c] += y[c] * y[c];
        }
    }
}

/// out = max(slope * y + shift, floor), channel by channel.
#[inline(never)]
fn normalize(out: &mut [f32], y: &[f32], slope: &[f32], shift: &[f32], floor: f32) {
    let channels = slope.len();
    let shift = &shift[..channels];
    for (out, y) in out.chunks_exact_mut(channels).zip(y.chunks_exact(channels)) {
        for c in 0..channels {
            out[c] = (y[c] * slope[c] + shift[c]).max(floor);
        }
    }
}

/// What backward reads of some rows: the output's gradient, the output, the convolution.
#[derive(Clone, Copy)]
struct Rows<'a> {
    grad: &'a [f32],
    out: &'a [f32],
    y: &'a [f32],
}

impl<'a> Rows<'a> {
    fn part(&self, range: std::ops::Range<usize>) -> Rows<'a> {
        Rows { grad: &self.grad[range.clone()], out: &self.out[range.clone()], y: &self.y[range] }
    }

    fn each(&self, channels: usize) -> impl Iterator<Item = ((&'a [f32], &'a [f32]), &'a [f32])> {
        self.grad.chunks_exact(channels).zip(self.out.chunks_exact(channels)).zip(self.y.chunks_exact(channels))
    }
}

/// Adds up each channel's gradient, as it is and times the distance from the mean. What is not above the threshold lets nothing
/// back.
#[inline(never)]
fn add_gradients(rows: Rows, mean: &[f32], threshold: f32, shift: &mut [f32], scale: &mut [f32]) {
    let channels = mean.len();
    let (shift, scale) = (&mut shift[..channels], &mut scale[..channels]);
    for ((grad, out), y) in rows.each(channels) {
        for c in 0..channels {
            let grad = grad[c];
            let passed = if out[c] > threshold { grad } else { 0.0 };
            shift[c] += passed;
            scale[c] += passed * (y[c] - mean[c]);
        }
    }
}

/// The convolution's gradient: slope * passed + a + b * y.
#[inline(never)]
fn denormalize(into: &mut [f32], rows: Rows, slope: &[f32], a: &[f32], b: &[f32], threshold: f32) {
    let channels = slope.len();
    let (a, b) = (&a[..channels], &b[..channels]);
    for (into, ((grad, out), y)) in into.chunks_exact_mut(channels).zip(rows.each(channels)) {
        for c in 0..channels {
            let grad = grad[c];
            let passed = if out[c] > threshold { grad } else { 0.0 };
            into[c] = slope[c] * passed + a[c] + b[c] * y[c];
        }
    }
}

impl Block {
    /// Images to columns: every output pixel's patch as a row; pixels outside are 0.
    fn lower(&self, images: &[f32], columns: &mut [f32]) {
        let g = &self.geometry;
        let (out, reach, pad) = (g.side_out(), g.kernel * g.inputs, g.kernel / 2);
        for (image, rows) in images.chunks_exact(g.image()).zip(columns.chunks_exact_mut(g.rows() * g.column())) {
            for (at, row) in rows.chunks_exact_mut(g.column()).enumerate() {
                let (top, left) = ((at / out * g.stride) as isize - pad as isize, (at % out * g.stride) as isize - pad as isize);
                let (skip, from, count) = self.overlap(left);
                for (ky, part) in row.chunks_exact_mut(reach).enumerate() {
                    let y = top + ky as isize;
                    if y < 0 || y >= g.side as isize {
                        part.fill(0.0);
                        continue;
                    }
                    if count < reach {
                        part.fill(0.0);
                    }
                    part[skip..skip + count].copy_from_slice(&image[y as usize * g.side * g.inputs + from..][..count]);
                }
            }
        }
    }

    /// The reverse of `lower`: adds columns into the images they came from.
    fn raise(&self, columns: &[f32], images: &mut [f32]) {
        let g = &self.geometry;
        let (out, reach, pad) = (g.side_out(), g.kernel * g.inputs, g.kernel / 2);
        for (image, rows) in images.chunks_exact_mut(g.image()).zip(columns.chunks_exact(g.rows() * g.column())) {
            for (at, row) in rows.chunks_exact(g.column()).enumerate() {
                let (top, left) = ((at / out * g.stride) as isize - pad as isize, (at % out * g.stride) as isize - pad as isize);
                let (skip, from, count) = self.overlap(left);
                for (ky, part) in row.chunks_exact(reach).enumerate() {
                    let y = top + ky as isize;
                    if y >= 0 && y < g.side as isize {
                        let into = &mut image[y as usize * g.side * g.inputs + from..][..count];
                        into.iter_mut().zip(&part[skip..skip + count]).for_each(|(sum, value)| *sum += value);
                    }
                }
            }
        }
    }

    /// A kernel row that starts at pixel `left`: elements outside before it, the first one inside, and how many are inside.
    fn overlap(&self, left: isize) -> (usize, usize, usize) {
        let g = &self.geometry;
        let (from, to) = (left.max(0) as usize, (left + g.kernel as isize).min(g.side as isize) as usize);
        ((from as isize - left) as usize * g.inputs, from * g.inputs, (to - from) * g.inputs)
    }

    /// The convolution, and each channel's sum and sum of squares.
    fn convolve(&self, x: &[f32], weight: &[f32], images: usize) -> (Vec<f32>, [Vec<f64>; 2]) {
        let g = self.geometry;
        let lanes = lanes(images);
        let mut y = vec![0.0f32; images * g.image_out()];
        let sums = split(&mut y, &lanes, g.image_out())
            .into_par_iter()
            .zip(&lanes)
            .map(|(y, &(first, count))| {
                let mut sums = [vec![0.0f64; g.outputs], vec![0.0f64; g.outputs]];
                let mut part = [vec![0.0f32; g.outputs], vec![0.0f32; g.outputs]];
                let mut columns = vec![0.0f32; if g.kernel == 1 { 0 } else { g.chunk().min(count) * g.rows() * g.column() }];
                let x = &x[first * g.image()..][..count * g.image()];
                for (x, y) in x.chunks(g.chunk() * g.image()).zip(y.chunks_mut(g.chunk() * g.image_out())) {
                    let rows = y.len() / g.outputs;
                    let columns = self.columns(x, &mut columns, rows);
                    product(y, View::rows(columns, rows, g.column()), View::rows(weight, g.column(), g.outputs), false);
                    part.iter_mut().for_each(|sums| sums.fill(0.0));
                    let [sum, squares] = &mut part;
                    add_moments(y, sum, squares);
                    for (sums, part) in sums.iter_mut().zip(&part) {
                        sums.iter_mut().zip(part).for_each(|(sum, &value)| *sum += f64::from(value));
                    }
                }
                sums
            })
            .collect();
        (y, add_sums(sums, g.outputs))
    }

    /// The columns of some images; those of a kernel of 1 are the images themselves.
    fn columns<'a>(&self, x: &'a [f32], buffer: &'a mut [f32], rows: usize) -> &'a [f32] {
        if self.geometry.kernel == 1 {
            return x;
        }
        let columns = &mut buffer[..rows * self.geometry.column()];
        self.lower(x, columns);
        columns
    }

    fn forward(&self, x: &[f32], weight: &[f32], affine: &[f32], images: usize) -> Vec<f32> {
        let g = self.geometry;
        let (y, [sum, squares]) = self.convolve(x, weight, images);
        let computed;
        let moments = match &self.normalize {
            Normalize::Fixed(moments) => moments,
            Normalize::Batch(left) => {
                let rows = (images * g.rows()).max(1) as f64;
                let mean: Vec<f64> = sum.iter().map(|sum| sum / rows).collect();
                let variance =
                    squares.iter().zip(&mean).map(|(square, mean)| (square / rows - mean * mean).max(0.0) as f32).collect();
                computed = Moments { mean: mean.iter().map(|&mean| mean as f32).collect(), variance };
                *left.lock().unwrap() = computed.clone();
                &computed
            }
        };
        let inverse = moments.variance.iter().map(|variance| 1.0 / (variance + EPSILON).sqrt());
        let slope: Vec<f32> = inverse.zip(&affine[..g.outputs]).map(|(inverse, scale)| inverse * scale).collect();
        let shift: Vec<f32> = (0..g.outputs).map(|c| affine[g.outputs + c] - moments.mean[c] * slope[c]).collect();
        let floor = if g.relu { 0.0 } else { f32::NEG_INFINITY };
        let mut out = vec![0.0f32; y.len()];
        let step = 256 * g.outputs;
        out.par_chunks_mut(step).zip(y.par_chunks(step)).for_each(|(out, y)| normalize(out, y, &slope, &shift, floor));
        if matches!(self.normalize, Normalize::Batch(_)) {
            *self.kept.lock().unwrap() = y;
        }
        out
    }

    /// Gradients of x (empty when it wants none), weight and affine.
    fn backward(&self, x: &[f32], weight: &[f32], affine: &[f32], out: &[f32], grad: &[f32], images: usize) -> [Vec<f32>; 3] {
        let g = self.geometry;
        let lanes = lanes(images);
        let y = std::mem::take(&mut *self.kept.lock().unwrap());
        let Normalize::Batch(moments) = &self.normalize else { panic!("backward through fixed moments") };
        let Moments { mean, variance } = moments.lock().unwrap().clone();
        let inverse: Vec<f32> = variance.iter().map(|variance| 1.0 / (variance + EPSILON).sqrt()).collect();
        // A ReLU that gave 0 lets nothing back; without ReLU everything passes.
        let threshold = if g.relu { 0.0 } else { f32::NEG_INFINITY };

        let rows = Rows { grad, out, y: &y };

        // First pass: the gradients of scale and shift.
        let sums = lanes
            .par_iter()
            .map(|&(first, count)| {
                let mut sums = [vec![0.0f64; g.outputs], vec![0.0f64; g.outputs]];
                let mut part = [vec![0.0f32; g.outputs], vec![0.0f32; g.outputs]];
                let (mut at, end) = (first * g.image_out(), (first + count) * g.image_out());
                while at < end {
                    let next = (at + 256 * g.outputs).min(end);
                    part.iter_mut().for_each(|sums| sums.fill(0.0));
                    let [shift, scale] = &mut part;
                    add_gradients(rows.part(at..next), &mean, threshold, shift, scale);
                    at = next;
                    for (sums, part) in sums.iter_mut().zip(&part) {
                        sums.iter_mut().zip(part).for_each(|(sum, &value)| *sum += f64::from(value));
                    }
                }
                sums
            })
            .collect();
        let [grad_shift, mut grad_scale] = add_sums(sums, g.outputs);
        grad_scale.iter_mut().zip(&inverse).for_each(|(sum, &inverse)| *sum *= f64::from(inverse));

        // dy = scale * inverse * (passed - grad_shift / count - normalized * grad_scale / count), as slope * passed + a + b * y.
        let count = (images * g.rows()).max(1) as f64;
        let slope: Vec<f32> = (0..g.outputs).map(|c| affine[c] * inverse[c]).collect();
        let b: Vec<f32> = (0..g.outputs).map(|c| -slope[c] * inverse[c] * (grad_scale[c] / count) as f32).collect();
        let a: Vec<f32> = (0..g.outputs).map(|c| -slope[c] * (grad_shift[c] / count) as f32 - b[c] * mean[c]).collect();

        // Second pass: the convolution's own gradients.
        let mut grad_x = vec![0.0f32; if self.input_gradient { x.len() } else { 0 }];
        let grad_x_lanes = if self.input_gradient {
            split(&mut grad_x, &lanes, g.image())
        } else {
            lanes.iter().map(|_| Default::default()).collect()
        };
        let weights: Vec<Vec<f32>> = grad_x_lanes
            .into_par_iter()
            .zip(&lanes)
            .map(|(grad_x, &(first, count))| {
                let mut grad_weight = vec![0.0f32; weight.len()];
                let most = g.chunk().min(count);
                let mut columns = vec![0.0f32; if g.kernel == 1 { 0 } else { most * g.rows() * g.column() }];
                let mut grad_columns = columns.clone();
                let mut grad_y = vec![0.0f32; most * g.image_out()];
                let mut done = 0;
                while done < count {
                    let here = most.min(count - done);
                    let at = (first + done) * g.image_out();
                    let grad_y = &mut grad_y[..here * g.image_out()];
                    denormalize(grad_y, rows.part(at..at + here * g.image_out()), &slope, &a, &b, threshold);
                    let height = here * g.rows();
                    let x = &x[(first + done) * g.image()..][..here * g.image()];
                    let columns = self.columns(x, &mut columns, height);
                    product(
                        &mut grad_weight,
                        View::rows(columns, height, g.column()).transposed(),
                        View::rows(grad_y, height, g.outputs),
                        true,
                    );
                    if self.input_gradient {
                        let grad_x = &mut grad_x[done * g.image()..][..here * g.image()];
                        let grad_y = View::rows(grad_y, height, g.outputs);
                        let weight = View::rows(weight, g.column(), g.outputs).transposed();
                        if g.kernel == 1 {
                            product(grad_x, grad_y, weight, false);
                        } else {
                            let grad_columns = &mut grad_columns[..height * g.column()];
                            product(grad_columns, grad_y, weight, false);
                            self.raise(grad_columns, grad_x);
                        }
                    }
                    done += here;
                }
                grad_weight
            })
            .collect();
        let mut lanes = weights.into_iter();
        let mut grad_weight = lanes.next().unwrap_or_default();
        lanes.for_each(|lane| grad_weight.iter_mut().zip(lane).for_each(|(sum, value)| *sum += value));
        let grad_affine = grad_scale.iter().chain(&grad_shift).map(|&value| value as f32).collect();
        [grad_x, grad_weight, grad_affine]
    }
}

/// The elements of a contiguous tensor.
fn elements<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(&storage.as_slice::<f32>()?[from..to]),
        None => candle_core::bail!("a block takes contiguous tensors"),
    }
}

impl CustomOp3 for Block {
    fn name(&self) -> &'static str {
        "conv-norm-relu"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        affine: &CpuStorage,
        affine_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let g = &self.geometry;
        let images = x_layout.dims()[0];
        if x_layout.shape().elem_count() != images * g.image() || weight_layout.dims() != [g.column(), g.outputs] {
            candle_core::bail!("a block of {g:?} got images {:?} and weights {:?}", x_layout.shape(), weight_layout.shape());
        }
        let out = self.forward(elements(x, x_layout)?, elements(weight, weight_layout)?, elements(affine, affine_layout)?, images);
        Ok((CpuStorage::F32(out), (images, g.side_out(), g.side_out(), g.outputs).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        affine: &Tensor,
        out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let guards = [x, weight, affine, out, &grad].map(|tensor| tensor.storage_and_layout());
        let mut slices = Vec::with_capacity(guards.len());
        for (storage, layout) in &guards {
            match &**storage {
                Storage::Cpu(storage) => slices.push(elements(storage, layout)?),
                _ => candle_core::bail!("a block computes on the CPU"),
            }
        }
        let [grad_x, grad_weight, grad_affine] = self.backward(slices[0], slices[1], slices[2], slices[3], slices[4], x.dims()[0]);
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        let grad_x = if self.input_gradient { Some(tensor(grad_x, x)?) } else { None };
        Ok((grad_x, Some(tensor(grad_weight, weight)?), Some(tensor(grad_affine, affine)?)))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::random::{Purpose, Random};

    fn random(count: usize, stream: u64) -> Vec<f32> {
        let mut random = Random::new(1, Purpose::Weights, stream, 0);
        (0..count).map(|_| random.normal()).collect()
    }

    /// The same block from candle's own operations.
    fn plain(g: &Geometry, x: &Tensor, weight: &Tensor, affine: &Tensor) -> Result<Tensor> {
        let kernel = weight.reshape((g.kernel, g.kernel, g.inputs, g.outputs))?.permute((3, 2, 0, 1))?.contiguous()?;
        let x = x.permute((0, 3, 1, 2))?.contiguous()?;
        let y = x.conv2d(&kernel, g.kernel / 2, g.stride, 1, 1)?.permute((0, 2, 3, 1))?.contiguous()?;
        let rows = y.elem_count() / g.outputs;
        let flat = y.reshape((rows, g.outputs))?;
        let mean = flat.mean_keepdim(0)?;
        let centerd = flat.broadcast_sub(&mean)?;
        let variance = centerd.sqr()?.mean_keepdim(0)?;
        let normal = centerd.broadcast_div(&(variance + f64::from(EPSILON))?.sqrt()?)?;
        let out = normal.broadcast_mul(&affine.narrow(0, 0, 1)?)?.broadcast_add(&affine.narrow(0, 1, 1)?)?.reshape(y.shape())?;
        if g.relu {
            out.relu()
        } else {
            Ok(out)
        }
    }

    #[test]
    fn equals_candles_own_operations() {
        let geometries = [
            Geometry { side: 9, inputs: 3, kernel: 3, stride: 2, outputs: 8, relu: true },
            Geometry { side: 6, inputs: 2, kernel: 5, stride: 1, outputs: 5, relu: true },
            Geometry { side: 1, inputs: 24, kernel: 1, stride: 1, outputs: 7, relu: false },
        ];
        for g in geometries {
            let images = 10;
            let device = Device::Cpu;
            let var = |values, shape: &[usize]| Var::from_tensor(&Tensor::from_vec(values, shape, &device).unwrap()).unwrap();
            let x = var(random(images * g.image(), 1), &[images, g.side, g.side, g.inputs]);
            let weight = var(random(g.column() * g.outputs, 2), &[g.column(), g.outputs]);
            let affine = var(random(2 * g.outputs, 3), &[2, g.outputs]);
            let root =
                Tensor::from_vec(random(images * g.image_out(), 4), (images, g.side_out(), g.side_out(), g.outputs), &device)
                    .unwrap();
            let normalize = Normalize::Batch(Arc::default());
            let block = Block { geometry: g, normalize, input_gradient: true, kept: Mutex::default() };
            let ours = x.apply_op3(&weight, &affine, block).unwrap();
            let theirs = plain(&g, &x, &weight, &affine).unwrap();
            let mut gradients = Vec::new();
            for out in [&ours, &theirs] {
                let store = (out * &root).unwrap().sum_all().unwrap().backward().unwrap();
                gradients.push(
                    [&x, &weight, &affine].map(|var| store.get(var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()),
                );
            }
            let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let mut pairs = vec![(flat(&ours), flat(&theirs))];
            pairs.extend(gradients[0].clone().into_iter().zip(gradients[1].clone()));
            for (at, (ours, theirs)) in pairs.iter().enumerate() {
                let largest = theirs.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
                for (a, b) in ours.iter().zip(theirs) {
                    assert!((a - b).abs() <= 1e-4 * largest, "{g:?}, result {at}: {a} and {b}");
                }
            }
        }
    }
}
