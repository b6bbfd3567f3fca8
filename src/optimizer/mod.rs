//! Row updates: what an optimizer does to the rows it touches, and to those it did not.
//!
//! Updates are numbered from 1; a row's *last* is the number of the update that it has seen last (0: none). Lazy rows need only
//! [`UpdateRule`]. Dense rows move at every update, also without a gradient, but are stored as they were when last touched: before a
//! row is touched or read, [`Replay`] makes up for the updates it missed.

mod replay;

pub(crate) use replay::replayed_updates;
pub use replay::{History, Replay};

use crate::simd::{clones, Simd};
use crate::{ensure, Result};

/// W or a tensor of the optimizer state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateTensor {
    Centers,
    /// SGD's m, AdamW's first moment.
    Momentum,
    /// AdamW's second moment.
    SecondMoment,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    pub momentum: f64,
    pub weight_decay: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adamw {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Optimizer {
    Sgd(Sgd),
    Adamw(Adamw),
}

impl Optimizer {
    /// Errors: INVALID_ARGUMENT, for a field that is NaN or outside 0 <= momentum, beta1, beta2 < 1, 0 <= weight_decay < inf,
    /// 1e-30 <= epsilon <= 1e30.
    pub fn check(&self) -> Result<()> {
        let below_one = |name: &str, value: f64| {
            ensure!((0.0..1.0).contains(&value), InvalidArgument, "{name} must be at least 0 and below 1, got {value:?}");
            Ok(())
        };
        let decay = |value: f64| {
            let finite = value >= 0.0 && value <= f64::from(f32::MAX);
            ensure!(finite, InvalidArgument, "weight_decay must be finite and at least 0, got {value:?}");
            Ok(())
        };
        match *self {
            Optimizer::Sgd(Sgd { momentum, weight_decay }) => {
                below_one("momentum", momentum)?;
                decay(weight_decay)
            }
            Optimizer::Adamw(Adamw { beta1, beta2, epsilon, weight_decay }) => {
                below_one("beta1", beta1)?;
                below_one("beta2", beta2)?;
                // At 0 a row without gradients would be 0 / 0; a little above, its state of 0 would meet an infinite rate.
                let usable = (1e-30..=1e30).contains(&epsilon);
                ensure!(usable, InvalidArgument, "epsilon must be 1e-30 to 1e30, got {epsilon:?}");
                decay(weight_decay)
            }
        }
    }

    /// Tensors of W's shape beside W: 1 for SGD (m), 2 for AdamW (m, v).
    pub fn state_tensors(&self) -> usize {
        match self {
            Optimizer::Sgd(_) => 1,
            Optimizer::Adamw(_) => 2,
        }
    }
}

/// One update of an optimizer, ready to be applied to any number of rows.
#[derive(Clone, Copy, Debug)]
pub struct UpdateRule {
    simd: Simd,
    pub(crate) coefficients: Coefficients,
}

/// The coefficients, rounded.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Coefficients {
    Sgd(SgdCoefficients),
    Adamw(AdamwCoefficients),
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct SgdCoefficients {
    pub momentum: f32,
    pub weight_decay: f32,
    pub learning_rate: f32,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct AdamwCoefficients {
    pub beta1: f32,
    pub beta2: f32,
    /// 1 - beta1 and 1 - beta2, rounded once.
    pub one_minus_beta1: f32,
    pub one_minus_beta2: f32,
    /// Learning rate * weight decay.
    pub decay_factor: f32,
    /// Learning rate / (1 - beta1^t).
    pub corrected_rate: f32,
    /// 1 / sqrt(1 - beta2^t).
    pub sqrt_v_scale: f32,
    pub epsilon: f32,
}

impl UpdateRule {
    /// Update number `update` (1 is the first), with its learning rate.
    ///
    /// SGD: m = momentum * m + (g + weight_decay * w); w -= lr * m.
    /// AdamW (arXiv:1711.05101): m = beta1 * m + (1 - beta1) * g; v = beta2 * v + (1 - beta2) * g^2;
    /// w -= lr * (weight_decay * w + (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon)), t = `update`.
    ///
    /// # Panics
    /// If `update` is 0.
    pub fn new(optimizer: &Optimizer, learning_rate: f64, update: u64) -> UpdateRule {
        assert!(update > 0, "update is 0; updates are numbered from 1");
        let coefficients = match *optimizer {
            Optimizer::Sgd(Sgd { momentum, weight_decay }) => Coefficients::Sgd(SgdCoefficients {
                momentum: momentum as f32,
                weight_decay: weight_decay as f32,
                learning_rate: learning_rate as f32,
            }),
            Optimizer::Adamw(adamw) => {
                let (corrected_rate, sqrt_v_scale) = bias_corrected(&adamw, learning_rate, update);
                Coefficients::Adamw(AdamwCoefficients {
                    beta1: adamw.beta1 as f32,
                    beta2: adamw.beta2 as f32,
                    one_minus_beta1: (1.0 - adamw.beta1) as f32,
                    one_minus_beta2: (1.0 - adamw.beta2) as f32,
                    decay_factor: (learning_rate * adamw.weight_decay) as f32,
                    corrected_rate: corrected_rate as f32,
                    sqrt_v_scale: sqrt_v_scale as f32,
                    epsilon: adamw.epsilon as f32,
                })
            }
        };
        UpdateRule { simd: Simd::best(), coefficients }
    }

    /// Moves one row by its gradient `g`. `v` is empty for SGD. The same bits on every instruction set.
    ///
    /// # Panics
    /// If the lengths differ.
    ///
    /// Gives whether the row and its state are still finite.
    pub fn apply(&self, w: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]) -> bool {
        assert!(m.len() == w.len() && g.len() == w.len(), "an update needs rows of one length");
        match &self.coefficients {
            Coefficients::Sgd(sgd) => sgd_on(self.simd, sgd, w, m, g),
            Coefficients::Adamw(adamw) => {
                assert_eq!(v.len(), w.len(), "an update needs rows of one length");
                adamw_on(self.simd, adamw, w, m, v, g)
            }
        }
    }
}

/// lr / (1 - beta1^t) and 1 / sqrt(1 - beta2^t).
fn bias_corrected(adamw: &Adamw, learning_rate: f64, update: u64) -> (f64, f64) {
    let t = update as f64;
    (learning_rate / (1.0 - adamw.beta1.powf(t)), 1.0 / (1.0 - adamw.beta2.powf(t)).sqrt())
}

clones! {
    fn sgd_on(coefficients: &SgdCoefficients, w: &mut [f32], m: &mut [f32], g: &[f32]) -> bool = sgd;
}

#[inline(always)]
fn sgd(coefficients: &SgdCoefficients, w: &mut [f32], m: &mut [f32], g: &[f32]) -> bool {
    let SgdCoefficients { momentum, weight_decay, learning_rate } = *coefficients;
    let mut left = 0;
    for ((w, m), g) in w.iter_mut().zip(m).zip(g) {
        *m = momentum * *m + (*g + weight_decay * *w);
        *w -= learning_rate * *m;
        left |= leaves(*w) | leaves(*m);
    }
    left == 0
}

/// Not 0 for a NaN or an infinity. Integers, so that the loop over a row stays a vector loop.
#[inline(always)]
fn leaves(value: f32) -> u32 {
    const EXPONENT: u32 = 0x7f80_0000;
    u32::from(value.to_bits() & EXPONENT == EXPONENT)
}

clones! {
    fn adamw_on(coefficients: &AdamwCoefficients, w: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]) -> bool = adamw;
}

#[inline(always)]
fn adamw(coefficients: &AdamwCoefficients, w: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]) -> bool {
    let AdamwCoefficients { beta1, beta2, one_minus_beta1, one_minus_beta2, decay_factor, corrected_rate, sqrt_v_scale, epsilon } =
        *coefficients;
    let mut left = 0;
    for (((w, m), v), g) in w.iter_mut().zip(m).zip(v).zip(g) {
        *m = beta1 * *m + one_minus_beta1 * *g;
        *v = beta2 * *v + one_minus_beta2 * (*g * *g);
        // One small term, subtracted once: w * (1 - decay) would round the decay away.
        *w -= decay_factor * *w + corrected_rate * *m / (v.sqrt() * sqrt_v_scale + epsilon);
        left |= leaves(*w) | leaves(*m) | leaves(*v);
    }
    left == 0
}

#[cfg(test)]
mod tests;
