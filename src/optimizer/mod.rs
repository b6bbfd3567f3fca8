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
mod tests {
    use super::*;

    pub const COLUMNS: usize = 133;

    /// A row with its state, as the library keeps it and as a dense f64 optimizer would.
    #[derive(Clone)]
    pub struct Row {
        pub w: Vec<f32>,
        pub m: Vec<f32>,
        pub v: Vec<f32>,
        pub truth: Vec<[f64; 3]>,
    }

    pub fn values(seed: u32, scale: f32) -> Vec<f32> {
        (0..COLUMNS as u32).map(|i| (((i + 31 * seed) * 7919 % 1009) as f32 / 504.0 - 1.0) * scale).collect()
    }

    impl Row {
        pub fn new(optimizer: &Optimizer) -> Row {
            let (w, m) = (values(1, 0.05), vec![0.0; COLUMNS]);
            let v = vec![0.0; if optimizer.state_tensors() == 2 { COLUMNS } else { 0 }];
            let truth = w.iter().map(|&w| [f64::from(w), 0.0, 0.0]).collect();
            Row { w, m, v, truth }
        }

        /// From here on the truth is what the row holds.
        pub fn trust(&mut self) {
            for (column, truth) in self.truth.iter_mut().enumerate() {
                *truth = [self.w[column], self.m[column], self.v.get(column).copied().unwrap_or(0.0)].map(f64::from);
            }
        }

        pub fn bits(&self) -> [Vec<u32>; 3] {
            [&self.w, &self.m, &self.v].map(|tensor| tensor.iter().map(|x| x.to_bits()).collect())
        }

        pub fn step_truth(&mut self, optimizer: &Optimizer, lr: f64, update: u64, g: &[f32]) {
            for ([w, m, v], &g) in self.truth.iter_mut().zip(g) {
                let (g, t) = (f64::from(g), update as f64);
                match *optimizer {
                    Optimizer::Sgd(sgd) => {
                        *m = sgd.momentum * *m + (g + sgd.weight_decay * *w);
                        *w -= lr * *m;
                    }
                    Optimizer::Adamw(adamw) => {
                        *w *= 1.0 - lr * adamw.weight_decay;
                        *m = adamw.beta1 * *m + (1.0 - adamw.beta1) * g;
                        *v = adamw.beta2 * *v + (1.0 - adamw.beta2) * g * g;
                        let (m_hat, v_hat) = (*m / (1.0 - adamw.beta1.powf(t)), *v / (1.0 - adamw.beta2.powf(t)));
                        *w -= lr * m_hat / (v_hat.sqrt() + adamw.epsilon);
                    }
                }
            }
        }

        /// Largest error of w, relative to how far it moved from `before` plus its own rounding; and of m, v relative to their
        /// largest.
        pub fn check(&self, before: &[f32], what: &str) {
            let moved = self.truth.iter().zip(before).map(|(t, &b)| (t[0] - f64::from(b)).abs()).fold(0.0, f64::max);
            let largest = self.truth.iter().map(|t| t[1].abs()).fold(1e-30, f64::max);
            for (column, [w, m, v]) in self.truth.iter().enumerate() {
                let error = (f64::from(self.w[column]) - w).abs();
                assert!(
                    error <= 3e-6 * moved + 2.5e-7 * w.abs().max(1e-3),
                    "{what}: w[{column}] is {} for {w}, moved {moved}",
                    self.w[column]
                );
                let error = (f64::from(self.m[column]) - m).abs();
                assert!(error <= 2e-6 * m.abs() + 1e-7 * largest, "{what}: m[{column}] is {} for {m}", self.m[column]);
                if !self.v.is_empty() {
                    assert!(
                        (f64::from(self.v[column]) - v).abs() <= 2e-6 * v.abs() + 1e-30,
                        "{what}: v[{column}] is {} for {v}",
                        self.v[column]
                    );
                }
            }
        }
    }

    pub fn optimizers() -> Vec<Optimizer> {
        let mut all = Vec::new();
        for weight_decay in [0.0, 5e-2] {
            for momentum in [0.0, 0.9] {
                all.push(Optimizer::Sgd(Sgd { momentum, weight_decay }));
            }
            for (beta1, beta2) in [(0.9, 0.999), (0.5, 0.9), (0.99, 0.9), (0.0, 0.99), (0.9, 0.0), (0.0, 0.0)] {
                all.push(Optimizer::Adamw(Adamw { beta1, beta2, epsilon: 1e-8, weight_decay }));
            }
        }
        all
    }

    /// A warm-up, then stairs: the rate changes inside every long gap.
    pub fn rate(update: u64) -> f64 {
        (0.02 * update as f64).min(0.1) * 0.5f64.powi((update / 300) as i32)
    }

    #[test]
    fn steps_are_those_of_f64() {
        for optimizer in optimizers() {
            let mut row = Row::new(&optimizer);
            for update in 1..=20 {
                let (g, before) = (values(update as u32 * 7, 0.3), row.w.clone());
                let rule = UpdateRule::new(&optimizer, rate(update), update);
                rule.apply(&mut row.w, &mut row.m, &mut row.v, &g);
                row.step_truth(&optimizer, rate(update), update, &g);
                row.check(&before, &format!("{optimizer:?} update {update}"));
                // Errors of one step at a time.
                row.trust();
            }
        }
    }

    #[test]
    fn every_copy_has_the_same_bits() {
        for optimizer in optimizers() {
            let results = Simd::available().into_iter().map(|simd| {
                let mut row = Row::new(&optimizer);
                let rule = UpdateRule { simd, ..UpdateRule::new(&optimizer, 0.1, 3) };
                rule.apply(&mut row.w, &mut row.m, &mut row.v, &values(3, 0.3));
                row.bits()
            });
            let results: Vec<_> = results.collect();
            assert!(results.iter().all(|result| *result == results[0]), "{optimizer:?}");
        }
    }

    #[test]
    fn ranges_are_checked_at_both_ends() {
        let (sgd, adamw) =
            (Sgd { momentum: 0.9, weight_decay: 5e-4 }, Adamw { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 5e-4 });
        type Make = Box<dyn Fn(f64) -> Optimizer>;
        type Ends = (Vec<f64>, Vec<f64>);
        let below_one = (vec![0.0, 0.5, 0.999_999], vec![-0.1, 1.0, f64::NAN, f64::INFINITY]);
        let decays = (vec![0.0, 5e-4, 10.0], vec![-1e-9, f64::NAN, f64::INFINITY]);
        let epsilons = (vec![1e-30, 1e-8, 1.0], vec![0.0, -1.0, 1e-31, f64::NAN, f64::INFINITY]);
        let cases: [(&str, Make, &Ends); 6] = [
            ("momentum", Box::new(move |momentum| Optimizer::Sgd(Sgd { momentum, ..sgd })), &below_one),
            ("weight_decay", Box::new(move |weight_decay| Optimizer::Sgd(Sgd { weight_decay, ..sgd })), &decays),
            ("beta1", Box::new(move |beta1| Optimizer::Adamw(Adamw { beta1, ..adamw })), &below_one),
            ("beta2", Box::new(move |beta2| Optimizer::Adamw(Adamw { beta2, ..adamw })), &below_one),
            ("epsilon", Box::new(move |epsilon| Optimizer::Adamw(Adamw { epsilon, ..adamw })), &epsilons),
            ("weight_decay", Box::new(move |weight_decay| Optimizer::Adamw(Adamw { weight_decay, ..adamw })), &decays),
        ];
        for (name, make, (good, bad)) in cases {
            for &value in good {
                assert_eq!(make(value).check(), Ok(()), "{name} = {value}");
            }
            for &value in bad {
                let refused = make(value).check().unwrap_err();
                assert_eq!(refused.status, crate::Status::InvalidArgument);
                assert!(
                    refused.message.starts_with(&format!("{name} must be "))
                        && refused.message.ends_with(&format!(", got {value:?}")),
                    "{}",
                    refused.message
                );
            }
        }
    }
}
