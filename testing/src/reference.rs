//! The head as one reads it: naive, float64, all ranks in one object. Tests compare every backend with it.
//!
//! It draws no sample (the caller hands each step's), sends no message, keeps every logit, and moves every row in every update
//! where rows are dense. It shares no code with the head it judges.
//!
//! ```text
//! z_ij   = scale * cos_ij, the target's z with margin, a filtered negative's 0
//! loss_i = -log softmax(z_i)[y_i] = softplus(log sum over negatives of exp(z_ij) - z_iy)
//! dz_ij  = p_ij for a negative, -(1 - p_iy) for the target; times the row's weight, where rows have one
//! dE_i   = d normalize: sum_j dz_ij * scale * psi'_ij * W^_j
//! dW_j   = d normalize: sum_i dz_ij * scale * psi'_ij * E^_i
//! ```

use std::f64::consts::PI;
use std::ops::Range;

use half::{bf16, f16};

use partialfc::margin::{Margin, MarginGradient};
use partialfc::optimizer::Optimizer;
use partialfc::options::{HeadOptions, Placement, RowUpdate};
use partialfc::{ensure, error, Result};

/// A norm below it is none: the row has cosine 0 with everything and gradient 0.
const SMALLEST_NORM: f64 = 1e-12;
/// Bounds psi' where theta is 0 or pi.
const SMALLEST_SIN: f64 = 1e-4;

/// Numerators relative to exp(c) of which all are below its exponential are taken relative to the largest, at scales above 75.
const FAR: f64 = -60.0;

/// What the three products of a step multiply. The targets are apart from them and always exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operands {
    Exact,
    /// As precision half has them on a GPU: E^ and W^ in f16 for the cosines; exp(z - c), E^ * scale / L and W^ in bf16 for the gradients.
    Half,
    /// As it has them on a CPU: exact cosines, and the same for the gradients.
    HalfGradients,
}

/// A head over all ranks: W and its optimizer state, C x d, and how often they were updated.
#[derive(Clone, Debug)]
pub struct Head {
    pub options: HeadOptions,
    pub operands: Operands,
    /// What cosines of the head under test may be off by: a numerator that lies so near to the middle of two bfloat16s may become either.
    pub cosine_error: f64,
    pub ranks: usize,
    pub centers: Vec<f64>,
    /// SGD's m or AdamW's first moment.
    pub momentum: Vec<f64>,
    pub second_moment: Vec<f64>,
    pub updates: u64,
}

/// What one rank brings to a step.
#[derive(Clone, Copy, Debug)]
pub struct RankInput<'a> {
    /// batch x d, not normalized.
    pub embeddings: &'a [f64],
    pub labels: &'a [i64],
    /// Ascending class ids, positives included. Sharded: of this rank's shard; replicated: the same on all ranks.
    pub sample: &'a [i64],
}

/// The margins and the weight of each row of a rank, where rows have their own.
#[derive(Clone, Debug, Default)]
pub struct RowTerms {
    pub m2: Vec<f64>,
    pub m3: Vec<f64>,
    pub weight: Vec<f64>,
}

/// What a step comes to. The gradients are those of the mean loss: loss_weight, loss_scale and gradient_scale are left to the reader.
#[derive(Clone, Debug, Default)]
pub struct Step {
    /// Mean over the valid rows of all ranks.
    pub loss: f64,
    /// Rows whose label is not ignore_label, over all ranks.
    pub valid_rows: usize,
    /// By rank: batch x d.
    pub grad_embeddings: Vec<Vec<f64>>,
    /// By rank and row: by the row's m2 and by its m3, of the formula, however the margin's gradient by theta is taken.
    pub grad_m2: Vec<Vec<f64>>,
    pub grad_m3: Vec<Vec<f64>>,
    /// By rank: sample x d. Replicated: the sum over ranks, on each.
    pub grad_centers: Vec<Vec<f64>>,
    pub samples: Vec<Vec<i64>>,
    /// By rank and row: the target's cosine without margin, 0 for an ignored row.
    pub target_cosines: Vec<Vec<f64>>,
    /// Share of valid rows whose target cosine, without margin, is the largest of the sample.
    pub top1: f64,
    /// What a test needs to know before it compares a float32 head with this one.
    pub conditioning: Conditioning,
}

/// How far float32 may stray: near a discontinuity, where sums underflow, where terms cancel.
#[derive(Clone, Debug)]
pub struct Conditioning {
    /// Least |cosine - interclass_filter| of a negative; infinite without a filter.
    pub filter_distance: f64,
    /// Least |m1 * theta + m2 - pi| of a target; infinite without a guard.
    pub guard_distance: f64,
    /// Least |target cosine - largest negative cosine|: whether top1 is a matter of rounding.
    pub top1_distance: f64,
    /// What is lost of a class's gradient, at unit norm, where each numerator below exp(-87) is taken for 0: relative to exp(c),
    /// c = max(0, scale - 64), or, where all of a row's are below exp(-60), to the largest.
    pub underflow: f64,
    /// As grad_embeddings and grad_centers, one number for each row: the sum of the magnitudes of the terms that make the gradient.
    pub gross_embeddings: Vec<Vec<f64>>,
    pub gross_centers: Vec<Vec<f64>>,
    /// Likewise what a gradient changes by where each operand so near the middle of two bf16 numbers that float32 may round it either
    /// way is rounded the other way.
    pub tied_embeddings: Vec<Vec<f64>>,
    pub tied_centers: Vec<Vec<f64>>,
}

impl Default for Conditioning {
    fn default() -> Conditioning {
        Conditioning {
            filter_distance: f64::INFINITY,
            guard_distance: f64::INFINITY,
            top1_distance: f64::INFINITY,
            underflow: 0.0,
            gross_embeddings: Vec::new(),
            gross_centers: Vec::new(),
            tied_embeddings: Vec::new(),
            tied_centers: Vec::new(),
        }
    }
}

/// A target logit over scale, and what a change of the cosine does to it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    pub psi: f64,
    pub slope: f64,
    /// What a change of m2 does to psi.
    pub by_m2: f64,
}

/// The margin at angle `theta`: psi = cos(m1 * theta + m2) - m3 and its derivative by cos(theta).
pub fn target(margin: &Margin, theta: f64) -> Target {
    // Below 0 only where a row has an m2 of its own.
    let angle = (margin.m1 * theta + margin.m2).max(0.0);
    let guarded = margin.guard && angle > PI;
    let (sin_m2, cos_m2) = margin.m2.sin_cos();
    let (psi, by_m2) = if !guarded {
        (angle.cos() - margin.m3, -angle.sin())
    } else if margin.m1 == 1.0 {
        // Beyond m2 = 2.33 ArcFace's constant would let psi jump up.
        let (arcface, least) = (margin.m2 * sin_m2, 1.0 - cos_m2);
        let by_m2 = if arcface > least { -sin_m2 - margin.m2 * cos_m2 } else { -sin_m2 };
        (theta.cos() - arcface.max(least) - margin.m3, by_m2)
    } else {
        let edge = (PI - margin.m2) / margin.m1;
        (theta.cos() - 1.0 - edge.cos() - margin.m3, -edge.sin() / margin.m1)
    };
    let slope = if guarded || margin.gradient == MarginGradient::StraightThrough {
        1.0
    } else {
        margin.m1 * angle.sin() / theta.sin().max(SMALLEST_SIN)
    };
    Target { psi, slope, by_m2 }
}

/// A row divided by its norm, or zeros.
struct Unit {
    direction: Vec<f64>,
    /// The same as a float32 head has it: what operands are rounded from.
    single: Vec<f32>,
    /// 0 for a row without direction.
    inverse_norm: f64,
}

impl Unit {
    fn of(row: &[f64]) -> Unit {
        let norm = dot(row, row).sqrt();
        let inverse_norm = if norm < SMALLEST_NORM { 0.0 } else { 1.0 / norm };
        let single = row.iter().map(|&x| x as f32 * inverse_norm as f32).collect();
        Unit { direction: row.iter().map(|x| x * inverse_norm).collect(), single, inverse_norm }
    }

    /// As an operand of the cosines.
    fn narrow(&self, operands: Operands) -> Vec<f64> {
        match operands {
            Operands::Exact | Operands::HalfGradients => self.direction.clone(),
            Operands::Half => self.single.iter().map(|&x| f16::from_f32(x).to_f64()).collect(),
        }
    }

    /// As an operand of the gradients.
    fn wide(&self, operands: Operands) -> Vec<f64> {
        match operands {
            Operands::Exact => self.direction.clone(),
            Operands::Half | Operands::HalfGradients => self.single.iter().map(|&x| bf16::from_f32(x).to_f64()).collect(),
        }
    }

    /// The angle to another, from their difference and sum: acos loses half its digits near 0 and pi.
    fn angle(&self, other: &Unit) -> f64 {
        if self.inverse_norm == 0.0 || other.inverse_norm == 0.0 {
            return PI / 2.0;
        }
        let norm_of = |sign: f64| {
            let pairs = self.direction.iter().zip(&other.direction);
            pairs.map(|(a, b)| (a + sign * b) * (a + sign * b)).sum::<f64>().sqrt()
        };
        2.0 * norm_of(-1.0).atan2(norm_of(1.0))
    }

    /// From the gradient of the direction to the gradient of the row.
    fn backward(&self, gradient: &[f64]) -> Vec<f64> {
        let along = dot(gradient, &self.direction);
        gradient.iter().zip(&self.direction).map(|(g, u)| (g - along * u) * self.inverse_norm).collect()
    }
}

/// A column of the logits: a class of the sample.
struct Column {
    class: i64,
    unit: Unit,
    narrow: Vec<f64>,
    wide: Vec<f64>,
    /// Gradient of the direction, the magnitudes of its terms, and what ties may change it by.
    gradient: Vec<f64>,
    gross: f64,
    tied: f64,
}

impl Head {
    /// A head with these start values (C x d) and no state yet.
    pub fn new(options: HeadOptions, ranks: usize, centers: Vec<f64>) -> Head {
        assert_eq!(centers.len(), options.num_classes as usize * options.embedding_dim as usize, "W is C x d");
        let zeros = vec![0.0; centers.len()];
        Head {
            options,
            operands: Operands::Exact,
            cosine_error: 2e-7,
            ranks,
            momentum: zeros.clone(),
            second_moment: zeros,
            centers,
            updates: 0,
        }
    }

    /// The classes a rank owns: contiguous, the first C mod N ranks own one more.
    pub fn shard(&self, rank: usize) -> Range<usize> {
        let classes = self.options.num_classes as usize;
        if self.options.placement == Placement::Replicated {
            return 0..classes;
        }
        let (each, more) = (classes / self.ranks, classes % self.ranks);
        let first = rank * each + rank.min(more);
        first..first + each + usize::from(rank < more)
    }

    /// Loss and gradients; changes nothing.
    pub fn forward(&self, inputs: &[RankInput]) -> Result<Step> {
        let Margin { m2, m3, .. } = self.options.margin;
        let terms = inputs.iter().map(|input| {
            let all = |value: f64| vec![value; input.labels.len()];
            RowTerms { m2: all(m2), m3: all(m3), weight: all(1.0) }
        });
        self.forward_with(inputs, &terms.collect::<Vec<_>>())
    }

    /// The same where rows have margins and weights of their own; by rank.
    pub fn forward_with(&self, inputs: &[RankInput], terms: &[RowTerms]) -> Result<Step> {
        let d = self.options.embedding_dim as usize;
        self.check(inputs)?;
        let mut step = Step { samples: inputs.iter().map(|input| input.sample.to_vec()).collect(), ..Step::default() };
        let mut columns = self.columns(inputs);
        let valid = |label: &i64| Some(*label) != self.options.ignore_label;
        step.valid_rows = inputs.iter().flat_map(|input| input.labels).filter(|label| valid(label)).count();
        let mean = if step.valid_rows == 0 { 0.0 } else { 1.0 / step.valid_rows as f64 };

        for (input, terms) in inputs.iter().zip(terms) {
            let batch = input.labels.len();
            let (mut grad_m2, mut grad_m3) = (vec![0.0; batch], vec![0.0; batch]);
            let mut grad = vec![0.0; batch * d];
            let (mut gross, mut tied) = (vec![0.0; batch], vec![0.0; batch]);
            let mut cosines = vec![0.0; batch];
            for (i, &label) in input.labels.iter().enumerate().filter(|(_, label)| valid(label)) {
                let unit = Unit::of(&input.embeddings[i * d..][..d]);
                let margin = Margin { m2: terms.m2[i], m3: terms.m3[i], ..self.options.margin };
                let row = self.row(&unit, label, &margin, terms.weight[i] * mean, mean, &mut columns, &mut step);
                (grad_m2[i], grad_m3[i]) = row.grad_margins;
                grad[i * d..][..d].copy_from_slice(&unit.backward(&row.gradient));
                gross[i] = row.gross * unit.inverse_norm;
                tied[i] = row.tied * unit.inverse_norm;
                cosines[i] = row.target_cosine;
            }
            step.grad_embeddings.push(grad);
            step.conditioning.gross_embeddings.push(gross);
            step.conditioning.tied_embeddings.push(tied);
            step.target_cosines.push(cosines);
            step.grad_m2.push(grad_m2);
            step.grad_m3.push(grad_m3);
        }

        let mut rest = columns.as_slice();
        for input in inputs {
            let own = &rest[..input.sample.len()];
            if self.options.placement == Placement::Sharded {
                rest = &rest[own.len()..];
            }
            step.grad_centers.push(own.iter().flat_map(|column| column.unit.backward(&column.gradient)).collect());
            step.conditioning.tied_centers.push(own.iter().map(|column| column.tied * column.unit.inverse_norm).collect());
            step.conditioning.gross_centers.push(own.iter().map(|column| column.gross * column.unit.inverse_norm).collect());
        }
        Ok(step)
    }

    /// One row against all columns: adds to the loss and to the columns' gradients. `weight` is its own, times `mean`, which is every
    /// row's share of the mean.
    #[allow(clippy::too_many_arguments)] // The row, what is made of it, and where that goes.
    fn row(
        &self,
        unit: &Unit,
        label: i64,
        margin: &Margin,
        weight: f64,
        mean: f64,
        columns: &mut [Column],
        step: &mut Step,
    ) -> Row {
        let (scale, filter) = (margin.scale, margin.interclass_filter);
        let seen = &mut step.conditioning;

        // Logits. None: the target, whose logit stands apart, for the margin is on it.
        let mut target_at = None;
        let mut best_negative = f64::NEG_INFINITY;
        let mut logits = vec![None; columns.len()];
        let narrow = unit.narrow(self.operands);
        for (j, column) in columns.iter().enumerate() {
            if column.class == label {
                target_at = Some((j, dot(&unit.direction, &column.unit.direction)));
                continue;
            }
            let cosine = dot(&narrow, &column.narrow);
            best_negative = best_negative.max(cosine);
            let filtered = filter > 0.0 && cosine > filter;
            if filter > 0.0 {
                seen.filter_distance = seen.filter_distance.min((cosine - filter).abs());
            }
            logits[j] = Some((if filtered { 0.0 } else { scale * cosine }, filtered));
        }
        let (at, target_cosine) = target_at.expect("checked: positives are in the sample");
        let theta = unit.angle(&columns[at].unit);
        let Target { psi, slope, by_m2 } = target(margin, theta);
        if margin.guard {
            seen.guard_distance = seen.guard_distance.min((margin.m1 * theta + margin.m2 - PI).abs());
        }
        seen.top1_distance = seen.top1_distance.min((target_cosine - best_negative).abs());

        // The loss. log_n is minus infinity where there is no negative: loss 0, missing 0.
        let log_n = log_sum_exp(logits.iter().flatten().map(|logit| logit.0));
        let excess = log_n - scale * psi;
        step.loss += weight * softplus(excess);
        step.top1 += mean * f64::from(u8::from(target_cosine >= best_negative));
        // 1 - p of the target, without the cancellation.
        let missing = sigmoid(excess);
        if log_n > f64::NEG_INFINITY {
            let log_n_in_f32 = (log_n - common_offset(margin)).max(FAR);
            seen.underflow += weight * scale * missing * (-87.0 - log_n_in_f32).exp();
        }

        // Gradients of the directions.
        let by_m3 = weight * scale * missing;
        let grad_margins = (-by_m2 * by_m3, by_m3);
        let mut row = Row { gradient: vec![0.0; unit.direction.len()], gross: 0.0, tied: 0.0, target_cosine, grad_margins };
        // A rank's numerators have an offset of their own where all of them are far.
        let mut rounded = Vec::new();
        if self.operands != Operands::Exact {
            for rank in 0..if self.options.placement == Placement::Sharded { self.ranks } else { 1 } {
                let shard = self.shard(rank);
                let of_rank = columns.iter().zip(&logits).filter(|(column, _)| shard.contains(&(column.class as usize)));
                let largest = of_rank.filter_map(|(_, logit)| *logit).map(|logit| logit.0).fold(f64::NEG_INFINITY, f64::max);
                let far = scale > 75.0 && largest.is_finite() && largest - common_offset(margin) < FAR;
                let offset = if far { largest } else { common_offset(margin) };
                rounded.push((shard, RoundedRow::new(unit, margin, self.cosine_error, log_n, scale * psi, offset)));
            }
        }
        for (column, logit) in columns.iter_mut().zip(&logits) {
            let rounded = rounded.iter().find(|(shard, _)| shard.contains(&(column.class as usize))).map(|(_, row)| row);
            let (factor, magnitude) = match (*logit, rounded) {
                (Some((_, true)), _) => continue,
                (Some((logit, false)), None) => {
                    let p = missing * (logit - log_n).exp();
                    (p, p)
                }
                (Some((logit, false)), Some(rounded)) => {
                    let (numerator, tie) = rounded.numerator(logit);
                    add(&mut row.gradient, weight * rounded.factor * numerator, &column.wide);
                    add(&mut column.gradient, weight * numerator, &rounded.scaled);
                    let magnitude = weight * rounded.factor * numerator;
                    row.gross += magnitude;
                    column.gross += magnitude;
                    row.tied += weight * rounded.factor * tie;
                    column.tied += weight * (rounded.factor * tie + rounded.tied * numerator);
                    continue;
                }
                // A slope of 0 is a rounded one, too.
                (None, _) => (-missing * slope, missing * slope.abs().max(1.0)),
            };
            add(&mut row.gradient, weight * scale * factor, &column.unit.direction);
            add(&mut column.gradient, weight * scale * factor, &unit.direction);
            row.gross += weight * scale * magnitude;
            column.gross += weight * scale * magnitude;
        }
        row
    }

    /// Updates W and the state from a step's gradients, as if the loss had been multiplied by `loss_weight`.
    pub fn update(&mut self, step: &Step, loss_weight: f64, learning_rate: f64) {
        self.update_by(&[(step, loss_weight)], learning_rate);
    }

    /// One update by the gradients of several steps, each with the weight of its loss, taken at the same W.
    pub fn update_by(&mut self, steps: &[(&Step, f64)], learning_rate: f64) {
        let d = self.options.embedding_dim as usize;
        self.updates += 1;
        let mut gradients = vec![None; self.options.num_classes as usize];
        for (step, loss_weight) in steps {
            // Replicas have the same sample and the same sum.
            let owners = if self.options.placement == Placement::Sharded { step.samples.len() } else { 1 };
            for (sample, grad) in step.samples.iter().zip(&step.grad_centers).take(owners) {
                for (&class, row) in sample.iter().zip(grad.chunks_exact(d)) {
                    add(gradients[class as usize].get_or_insert_with(|| vec![0.0; d]), *loss_weight, row);
                }
            }
        }
        for (class, gradient) in gradients.into_iter().enumerate() {
            let gradient = match (gradient, self.options.row_update) {
                (Some(row), _) => row,
                (None, RowUpdate::Dense) => vec![0.0; d],
                (None, RowUpdate::Lazy) => continue,
            };
            for (k, g) in gradient.iter().enumerate() {
                self.update_element(class * d + k, *g, learning_rate);
            }
        }
    }

    fn update_element(&mut self, at: usize, g: f64, lr: f64) {
        let (w, m, v) = (&mut self.centers[at], &mut self.momentum[at], &mut self.second_moment[at]);
        match self.options.optimizer {
            Optimizer::Sgd(sgd) => {
                *m = sgd.momentum * *m + g + sgd.weight_decay * *w;
                *w -= lr * *m;
            }
            Optimizer::Adamw(adamw) => {
                let t = self.updates as f64;
                *w *= 1.0 - lr * adamw.weight_decay;
                *m = adamw.beta1 * *m + (1.0 - adamw.beta1) * g;
                *v = adamw.beta2 * *v + (1.0 - adamw.beta2) * g * g;
                let (m_hat, v_hat) = (*m / (1.0 - adamw.beta1.powf(t)), *v / (1.0 - adamw.beta2.powf(t)));
                *w -= lr * m_hat / (v_hat.sqrt() + adamw.epsilon);
            }
        }
    }

    /// The classes that take part: each rank's sample, or the common one.
    fn columns(&self, inputs: &[RankInput]) -> Vec<Column> {
        let d = self.options.embedding_dim as usize;
        let samples = if self.options.placement == Placement::Sharded { inputs } else { &inputs[..1] };
        let classes = samples.iter().flat_map(|input| input.sample);
        classes
            .map(|&class| {
                let unit = Unit::of(&self.centers[class as usize * d..][..d]);
                let (narrow, wide) = (unit.narrow(self.operands), unit.wide(self.operands));
                Column { class, unit, narrow, wide, gradient: vec![0.0; d], gross: 0.0, tied: 0.0 }
            })
            .collect()
    }

    /// Whether the inputs make a step, with the statuses that a head gives.
    fn check(&self, inputs: &[RankInput]) -> Result<()> {
        let d = self.options.embedding_dim as usize;
        ensure!(inputs.len() == self.ranks, InvalidArgument, "{} inputs for {} ranks", inputs.len(), self.ranks);
        for (rank, input) in inputs.iter().enumerate() {
            let shard = self.shard(rank);
            let sample = input.sample;
            ensure!(sample.windows(2).all(|pair| pair[0] < pair[1]), InvalidArgument, "rank {rank}: the sample is not ascending");
            ensure!(
                sample.iter().all(|&id| id >= 0 && shard.contains(&(id as usize))),
                InvalidArgument,
                "rank {rank}: the sample leaves the shard {shard:?}"
            );
            ensure!(
                self.options.placement == Placement::Sharded || sample == inputs[0].sample,
                Mismatch,
                "rank {rank}: the sample differs from rank 0's"
            );
            ensure!(input.embeddings.len() == input.labels.len() * d, InvalidArgument, "rank {rank}: embeddings are not batch x d");
            for (row, &label) in input.labels.iter().enumerate() {
                if Some(label) == self.options.ignore_label {
                    continue;
                }
                ensure!(
                    label >= 0 && label < self.options.num_classes as i64,
                    Label,
                    "row {row} of rank {rank}: label {label} is not in 0..{}",
                    self.options.num_classes
                );
                if input.embeddings[row * d..][..d].iter().any(|x| !x.is_finite()) {
                    return Err(error!(NotFinite, "row {row} of rank {rank} is not finite"));
                }
                ensure!(
                    inputs.iter().any(|owner| owner.sample.binary_search(&label).is_ok()),
                    InvalidArgument,
                    "row {row} of rank {rank}: its class {label} is in no sample"
                );
            }
        }
        Ok(())
    }
}

/// A row's part of the backward: gradient of its direction, the magnitudes of its terms, its target's cosine.
struct Row {
    gradient: Vec<f64>,
    gross: f64,
    tied: f64,
    target_cosine: f64,
    /// By m2 and by m3.
    grad_margins: (f64, f64),
}

/// A row's operands of the gradients where they are rounded.
struct RoundedRow {
    /// scale / L.
    factor: f64,
    /// E^ times that, and what its ties change it by.
    scaled: Vec<f64>,
    tied: f64,
    offset: f64,
    /// Relative error of float32's exp(z - c).
    unsure: f64,
}

impl RoundedRow {
    fn new(unit: &Unit, margin: &Margin, cosine_error: f64, log_n: f64, target_logit: f64, offset: f64) -> RoundedRow {
        let unsure = 2e-6 + cosine_error * margin.scale;
        let factor = f64::from((margin.scale / ((log_n - offset).exp() + (target_logit - offset).exp())) as f32);
        let (mut scaled, mut squares) = (Vec::new(), 0.0);
        for &x in &unit.single {
            let (value, tie) = round_bf16(f64::from(factor as f32 * x), unsure);
            scaled.push(value);
            squares += tie * tie;
        }
        RoundedRow { factor, scaled, tied: squares.sqrt(), offset, unsure }
    }

    /// exp(z - offset), and what a tie changes it by.
    fn numerator(&self, logit: f64) -> (f64, f64) {
        round_bf16((logit - self.offset).exp(), self.unsure)
    }
}

/// c
fn common_offset(margin: &Margin) -> f64 {
    (margin.scale - 64.0).max(0.0)
}

/// The bf16 number next to `x`; how far the next best is, if an error of `unsure` * x may make that the next one, else 0.
fn round_bf16(x: f64, unsure: f64) -> (f64, f64) {
    let nearest = |x: f64| bf16::from_f32(x as f32).to_f64();
    let (low, high) = (nearest(x * (1.0 - unsure)), nearest(x * (1.0 + unsure)));
    (nearest(x), (high - low).abs())
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(to: &mut [f64], factor: f64, row: &[f64]) {
    for (to, x) in to.iter_mut().zip(row) {
        *to += factor * x;
    }
}

fn log_sum_exp(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let largest = values.clone().fold(f64::NEG_INFINITY, f64::max);
    if largest == f64::NEG_INFINITY {
        return largest;
    }
    largest + values.map(|value| (value - largest).exp()).sum::<f64>().ln()
}

/// log(1 + exp(x))
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// 1 / (1 + exp(-x))
fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}
