//! How far a float32 head may be from the float64 one: row by row, from the sizes of the terms that were added up.

use partialfc::optimizer::Optimizer;
use partialfc::options::Placement;
use partialfc_testing::reference::{Head, Step};

use partialfc_testing::numbers::norm;

/// Relative error of a float32 operation, with some to spare.
const ROUNDING: f64 = 2.5e-7;
/// Small beside anything that float32 keeps.
const FLOOR: f64 = 1e-30;

/// Allowed of any gradient beside what its size allows: terms that have underflowed.
pub fn floor(step: &Step) -> f64 {
    FLOOR + 20.0 * step.conditioning.underflow
}

/// Allowed L2 distances: by class, for W and its state.
pub struct Budget {
    pub centers: Vec<f64>,
    pub momentum: Vec<f64>,
    /// Of the square root of the second moment: that moves by no more than the gradient does.
    pub second_root: Vec<f64>,
}

/// Allowed for one step's results, given what W may be off by already.
#[derive(Clone, Copy, Debug)]
pub struct Allowance {
    /// Of a result's own size.
    pub relative: f64,
    /// Of the sum of its terms' magnitudes: covers what cancels in it.
    pub gross: f64,
}

impl Budget {
    pub fn new(head: &Head) -> Budget {
        let zeros = vec![0.0; head.options.num_classes as usize];
        Budget { centers: zeros.clone(), momentum: zeros.clone(), second_root: zeros }
    }

    /// Design section 8, plus the logits' error from rounded cosines and from W itself.
    pub fn allowance(&self, head: &Head) -> Allowance {
        let margin = &head.options.margin;
        let d = head.options.embedding_dim as usize;
        let steepness = margin.scale.max(1.0) * margin.m1.max(1.0);
        let off = self.centers.iter().zip(head.centers.chunks_exact(d)).map(|(budget, row)| budget / norm(row).max(1e-6));
        let off = off.fold(0.0, f64::max);
        Allowance { relative: 5e-5 * (margin.scale / 64.0).max(1.0) + 2.0 * steepness * off, gross: steepness * (4e-7 + 2.0 * off) }
    }

    /// What the update by these steps that the reference is about to make adds. Call before `Head::update_by`.
    pub fn update(&mut self, head: &Head, steps: &[(Step, f64, Allowance)], learning_rate: f64) {
        let d = head.options.embedding_dim as usize;
        let t = (head.updates + 1) as f64;
        // By class: size of the gradient, and what it may be off by. None: not in the sample.
        let mut gradients: Vec<Option<(f64, f64)>> = vec![None; self.centers.len()];
        for (step, loss_weight, allowance) in steps {
            let owners = if head.options.placement == Placement::Sharded { step.samples.len() } else { 1 };
            for (rank, sample) in step.samples.iter().enumerate().take(owners) {
                for (j, &class) in sample.iter().enumerate() {
                    let size = loss_weight.abs() * norm(&step.grad_centers[rank][j * d..][..d]);
                    let gross = loss_weight.abs() * step.conditioning.gross_centers[rank][j];
                    let (sum, off) = gradients[class as usize].get_or_insert((0.0, 0.0));
                    *sum += size;
                    *off += allowance.relative * size + allowance.gross * gross + floor(step);
                }
            }
        }
        let dense = head.options.row_update == partialfc::options::RowUpdate::Dense;
        for (class, gradient) in gradients.into_iter().enumerate() {
            let (size, off) = match gradient {
                Some(pair) => pair,
                None if dense => (0.0, 0.0),
                None => continue,
            };
            let row = |values: &[f64]| norm(&values[class * d..][..d]);
            let (w, m) = (row(&head.centers), row(&head.momentum));
            let (bw, bm, bs) = (&mut self.centers[class], &mut self.momentum[class], &mut self.second_root[class]);
            match head.options.optimizer {
                Optimizer::Sgd(sgd) => {
                    let (mu, wd) = (sgd.momentum, sgd.weight_decay);
                    *bm = mu * *bm + off + wd * *bw + ROUNDING * (mu * m + size + wd * w);
                    *bw += learning_rate * *bm + ROUNDING * (w + learning_rate * (mu * m + size + wd * w));
                }
                Optimizer::Adamw(adamw) => {
                    let b1 = adamw.beta1;
                    *bm = b1 * *bm + (1.0 - b1) * off + ROUNDING * (b1 * m + (1.0 - b1) * size);
                    *bs = bs.max(off) + ROUNDING * size;
                    // |m^| / (sqrt(v^) + eps) is a few at most, so an error of sqrt(v^) counts that often over eps.
                    let moments = *bm / (1.0 - b1.powf(t)) + 4.0 * *bs;
                    let update = 4.0 * (d as f64).sqrt();
                    *bw += learning_rate * moments / adamw.epsilon + ROUNDING * (w + learning_rate * update);
                }
            }
        }
    }
}
