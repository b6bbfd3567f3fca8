//! The network that turns an image into an embedding: three strided convolutions and a dense layer, each with batch normalization,
//! on candle's graph; and its optimizer, SGD with momentum.
//!
//! All parameters and running moments lie in one flat buffer, and so do their gradients: data-parallel ranks need one all-reduce.

use std::sync::{Arc, Mutex};

use candle_core::{Device, Tensor, Var};

use anyhow::{Context, Result};

use crate::block::{Block, Geometry, Moments, Normalize};
use crate::random::{Purpose, Random};
use crate::render::{PIXELS, SIDE};

/// Share of a new batch in the running moments.
const FRESH: f32 = 0.05;

fn geometries(dim: usize) -> [Geometry; 4] {
    let conv = |side, inputs, kernel, outputs| Geometry { side, inputs, kernel, stride: 2, outputs, relu: true };
    let convolutions = [conv(SIDE, 1, 5, 32), conv(SIDE / 2, 32, 3, 64), conv(SIDE / 4, 64, 3, 128)];
    let dense = Geometry { side: 1, inputs: convolutions[2].image_out(), kernel: 1, stride: 1, outputs: dim, relu: false };
    let [first, second, third] = convolutions;
    [first, second, third, dense]
}

struct Layer {
    geometry: Geometry,
    weight: Var,
    /// Scale and shift of the normalization.
    affine: Var,
}

pub struct Backbone {
    layers: Vec<Layer>,
    /// Every layer's weight and affine, then every layer's running mean and variance.
    state: Vec<f32>,
    momentum: Vec<f32>,
    /// Length of the parameters in `state`; running moments follow.
    parameters: usize,
    dim: usize,
}

/// What forward leaves for backward.
pub struct Trace {
    embeddings: Tensor,
    moments: Vec<Arc<Mutex<Moments>>>,
}

#[derive(Clone, Copy, Debug)]
pub struct Sgd {
    pub learning_rate: f32,
    pub momentum: f32,
    /// On weights, not on the normalization's scale and shift.
    pub weight_decay: f32,
}

impl Backbone {
    /// Start weights depend on the seed alone: replicas start equal.
    pub fn new(dim: usize, seed: u64) -> Result<Self> {
        let geometries = geometries(dim);
        let mut state = Vec::new();
        for (at, g) in geometries.iter().enumerate() {
            let mut random = Random::new(seed, Purpose::Weights, at as u64, 0);
            let spread = (2.0 / g.column() as f32).sqrt();
            state.extend((0..g.column() * g.outputs).map(|_| random.normal() * spread));
            state.extend((0..2 * g.outputs).map(|at| if at < g.outputs { 1.0 } else { 0.0 }));
        }
        let parameters = state.len();
        for g in &geometries {
            state.extend((0..2 * g.outputs).map(|at| if at < g.outputs { 0.0 } else { 1.0 }));
        }
        let zeros = |shape: (usize, usize)| Var::zeros(shape, candle_core::DType::F32, &Device::Cpu);
        let layers = geometries
            .into_iter()
            .map(|g| Ok(Layer { geometry: g, weight: zeros((g.column(), g.outputs))?, affine: zeros((2, g.outputs))? }))
            .collect::<Result<_>>()?;
        let mut backbone = Backbone { layers, momentum: vec![0.0; parameters], state: Vec::new(), parameters, dim };
        backbone.set_state(state)?;
        Ok(backbone)
    }

    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Parameters and running moments.
    pub fn state(&self) -> &[f32] {
        &self.state
    }

    pub fn parameters(&self) -> usize {
        self.parameters
    }

    pub fn set_state(&mut self, state: Vec<f32>) -> Result<()> {
        self.state = state;
        let mut rest = &self.state[..];
        for layer in &self.layers {
            for var in [&layer.weight, &layer.affine] {
                let (values, others) = rest.split_at(var.elem_count());
                var.set(&Tensor::from_slice(values, var.shape(), &Device::Cpu)?)?;
                rest = others;
            }
        }
        Ok(())
    }

    /// Embeddings of PIXELS numbers an image, with the batch's own moments; what backward needs comes along.
    pub fn forward(&self, images: Vec<f32>) -> Result<(Vec<f32>, Trace)> {
        let mut moments = Vec::new();
        let mut x = stack(images)?;
        for (at, layer) in self.layers.iter().enumerate() {
            let own = Arc::<Mutex<Moments>>::default();
            x = layer.apply(&x, Normalize::Batch(own.clone()), at > 0)?;
            moments.push(own);
        }
        let embeddings = x.flatten_from(1)?;
        Ok((embeddings.flatten_all()?.to_vec1()?, Trace { embeddings, moments }))
    }

    /// Gradients in the order of the state; in the place of running moments, the batch's moments. Over ranks, the mean of both is
    /// due.
    pub fn backward(&self, trace: Trace, grad_embeddings: &[f32]) -> Result<Vec<f32>> {
        let root = Tensor::from_slice(grad_embeddings, trace.embeddings.shape(), &Device::Cpu)?;
        let gradients = (&trace.embeddings * root)?.sum_all()?.backward()?;
        let mut flat = Vec::with_capacity(self.state.len());
        for layer in &self.layers {
            for var in [&layer.weight, &layer.affine] {
                flat.extend(gradients.get(var).context("a parameter got no gradient")?.flatten_all()?.to_vec1::<f32>()?);
            }
        }
        for moments in trace.moments {
            let moments = moments.lock().unwrap();
            flat.extend(moments.mean.iter().chain(&moments.variance));
        }
        Ok(flat)
    }

    /// One step of SGD, and the running moments.
    pub fn update(&mut self, gradients: &[f32], sgd: &Sgd) -> Result<()> {
        let mut state = std::mem::take(&mut self.state);
        let mut at = 0;
        for layer in &self.layers {
            for (var, decay) in [(&layer.weight, sgd.weight_decay), (&layer.affine, 0.0)] {
                let range = at..at + var.elem_count();
                at = range.end;
                let values = state[range.clone()].iter_mut().zip(&mut self.momentum[range.clone()]).zip(&gradients[range]);
                for ((value, momentum), gradient) in values {
                    *momentum = sgd.momentum * *momentum + gradient + decay * *value;
                    *value -= sgd.learning_rate * *momentum;
                }
            }
        }
        let running = state[self.parameters..].iter_mut().zip(&gradients[self.parameters..]);
        running.for_each(|(running, fresh)| *running += FRESH * (fresh - *running));
        self.set_state(state)
    }

    /// Embeddings with the running moments: an image's does not depend on its neighbors.
    pub fn embed(&self, images: Vec<f32>) -> Result<Vec<f32>> {
        let mut running = &self.state[self.parameters..];
        let mut x = stack(images)?;
        for layer in &self.layers {
            let (mean, rest) = running.split_at(layer.geometry.outputs);
            let (variance, rest) = rest.split_at(layer.geometry.outputs);
            running = rest;
            x = layer.apply(&x, Normalize::Fixed(Moments { mean: mean.to_vec(), variance: variance.to_vec() }), false)?.detach();
        }
        Ok(x.flatten_all()?.to_vec1()?)
    }
}

fn stack(images: Vec<f32>) -> Result<Tensor> {
    let count = images.len() / PIXELS;
    Ok(Tensor::from_vec(images, (count, SIDE, SIDE, 1), &Device::Cpu)?)
}

impl Layer {
    fn apply(&self, x: &Tensor, normalize: Normalize, input_gradient: bool) -> Result<Tensor> {
        let block = Block { geometry: self.geometry, normalize, input_gradient, kept: Mutex::default() };
        Ok(x.apply_op3(&self.weight, &self.affine, block)?)
    }
}
