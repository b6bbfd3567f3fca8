//! What a property test draws: a head, its ranks, and the steps it is taken through.

use partialfc::margin::{Margin, MarginGradient};
use partialfc::matrix::DType;
use partialfc::optimizer::{Adamw, Optimizer, Sgd};
use partialfc::options::{HeadOptions, Placement, Precision, Residency, RowUpdate};
use proptest::prelude::*;

use crate::capi::{Rows, LEAST};
use crate::numbers::{norm, Random};

/// Which classes the rows belong to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Labels {
    Any,
    One,
    Few,
}

/// How long the rows of the embeddings are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sizes {
    Near1,
    /// As far from 1 as their type lets them.
    Any,
}

/// How a step is asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Calls {
    /// forward, backward, update.
    Separate,
    /// pfc_head_step.
    Step,
    /// prepare, then forward without labels.
    Prepared,
    /// The next step's prepare right after this one's forward.
    Ahead,
}

/// A whole run, as numbers: its Debug text is the reproducer, to be put into `known_cases`.
#[derive(Clone, Debug)]
pub struct Case {
    /// Of W, the embeddings, the labels and the caller's samples.
    pub seed: u64,
    pub classes: usize,
    pub dim: usize,
    /// Rows of each rank in the first step; later steps hand them round.
    pub batches: Vec<usize>,
    pub placement: Placement,
    pub rate: f64,
    /// The caller's own sample in place of the head's draw.
    pub given_sample: bool,
    pub scale: f64,
    pub m1: f64,
    pub m2: f64,
    pub m3: f64,
    pub filter: f64,
    pub gradient: MarginGradient,
    pub guard: bool,
    pub adamw: bool,
    pub momentum: f64,
    pub weight_decay: f64,
    pub rows: RowUpdate,
    pub labels: Labels,
    pub ignore_label: Option<i64>,
    /// Share of rows that carry ignore_label.
    pub ignored: f64,
    pub embeddings: DType,
    pub sizes: Sizes,
    pub gather: Option<DType>,
    pub grads: DType,
    pub padding: usize,
    pub loss_weight: f64,
    pub loss_scale: f64,
    pub gradient_scale: f64,
    /// 0 to 1: how far an update moves W.
    pub pace: f64,
    pub calls: Calls,
    pub steps: usize,
    /// Read the class centers after every step, not only after the last: brings unsampled dense rows up to date early.
    pub peek: bool,
    pub threads: u32,
    /// 0, or counted as `Head::with` does: the numerators of some chunks are kept, the others computed twice.
    pub workspace_limit: u64,
}

/// What one rank brings to one step.
pub struct Input {
    pub embeddings: Rows,
    pub labels: Vec<i64>,
    pub sample: Vec<i64>,
    /// m2, m3 and weight of each row; `None`: those of the options.
    pub terms: [Option<Vec<f32>>; 3],
}

impl Case {
    pub fn ranks(&self) -> usize {
        self.batches.len()
    }

    /// A third of those without a limit of memory make room for the batches as they come.
    fn max_batch(&self) -> u64 {
        match self.workspace_limit == 0 && self.seed.is_multiple_of(3) {
            true => 0,
            false => self.batches.iter().copied().max().unwrap_or(0).max(1) as u64,
        }
    }

    /// A number of its own would have all cases drawn anew.
    fn sample_block(&self) -> u32 {
        [1, 4, 1, 16][(self.seed / 3 % 4) as usize]
    }

    pub fn options(&self) -> HeadOptions {
        HeadOptions {
            num_classes: self.classes as u64,
            embedding_dim: self.dim as u32,
            placement: self.placement,
            sample_rate: self.rate,
            seed: self.seed,
            max_batch: self.max_batch(),
            margin: Margin {
                scale: self.scale,
                m1: self.m1,
                m2: self.m2,
                m3: self.m3,
                interclass_filter: self.filter,
                gradient: self.gradient,
                guard: self.guard,
            },
            row_update: self.rows,
            optimizer: if self.adamw {
                // A small epsilon turns the rounding of a gradient near 0 into a whole step; the kernel's own test has that.
                Optimizer::Adamw(Adamw { beta1: self.momentum, beta2: 0.99, epsilon: 0.25, weight_decay: self.weight_decay })
            } else {
                Optimizer::Sgd(Sgd { momentum: self.momentum, weight_decay: self.weight_decay })
            },
            gradient_scale: self.gradient_scale,
            init_std: 0.01,
            ignore_label: self.ignore_label,
            precision: Precision::Auto,
            gather_dtype: self.gather,
            weight_dtype: DType::F32,
            state_dtype: DType::F32,
            sample_block: self.sample_block(),
            residency: Residency::Device,
            row_terms: self.row_terms(),
            workspace_limit: self.workspace_limit,
        }
    }

    /// The embeddings as the arithmetic sees them: those of a sharded head have travelled in this type, None being f32. In f16 each
    /// row is rounded as if its largest magnitude were between 1 and 2, and one without a direction is zero.
    pub fn travelled(&self, embeddings: &Rows, gather: Option<DType>) -> Vec<f64> {
        match (self.placement, gather) {
            (Placement::Sharded, Some(DType::F16)) => embeddings.values().chunks(self.dim).flat_map(in_f16).collect(),
            (Placement::Sharded, Some(dtype)) => Rows::new(&embeddings.values(), self.dim, dtype, 0).values(),
            _ => embeddings.values(),
        }
    }

    /// What a step's update multiplies the gradient by: 1, but for some seeds; NaN: the update is skipped. A number of its own would
    /// have all cases drawn anew.
    pub fn factor(&self, step: usize) -> f64 {
        match (self.calls, self.seed % 5) {
            (Calls::Step, _) | (_, 1..) => 1.0,
            _ => [0.5, f64::NAN, 2.0, 1.0, 0.0][step % 5],
        }
    }

    /// Whether a step's gradient is kept for a later update: two steps of three, for some seeds.
    pub fn accumulates(&self, step: usize) -> bool {
        self.calls != Calls::Step && self.seed.is_multiple_of(7) && step % 3 != 2
    }

    /// Whether the head is one whose rows may have margins and weights of their own: for some seeds.
    pub fn row_terms(&self) -> bool {
        self.seed % 3 == 2
    }

    /// The terms of a rank's rows in a step: some of the three, of some ranks. Ignored rows have NaN.
    fn terms(&self, step: usize, rank: usize, labels: &[i64]) -> [Option<Vec<f32>>; 3] {
        let mut random = Random(self.seed ^ (1000 * step as u64 + rank as u64 + 7).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let given = random.below(8);
        let mut draw = |term: usize, of: &mut dyn FnMut(&mut Random) -> f64| {
            let has = self.row_terms() && self.calls != Calls::Step && (given >> term & 1 == 1 || given == 0);
            let of_row = |&label: &i64| if Some(label) == self.ignore_label { f32::NAN } else { of(&mut random) as f32 };
            has.then(|| labels.iter().map(of_row).collect())
        };
        [
            draw(0, &mut |random| [0.0, random.between(-0.5, 0.5), random.between(0.0, 1.2 * self.m2.min(2.6))][random.below(3)]),
            draw(1, &mut |random| random.between(0.0, 0.6)),
            draw(2, &mut |random| [0.0, 1.0, random.between(0.1, 3.0)][random.below(3)]),
        ]
    }

    /// Small enough that W moves by a few percent a step at most: what this test compares are steps, not the chaos of training.
    pub fn learning_rate(&self, step: usize) -> f64 {
        let size = if self.adamw { 0.01 } else { 0.05 / (1.0 + self.scale * self.m1) };
        self.pace * size / (1.0 + step as f64)
    }

    /// W, C x d: rows of norms 0.3 to 3, some of them zero.
    pub fn centers(&self) -> Vec<f32> {
        let mut random = Random(self.seed);
        let mut centers = Vec::with_capacity(self.classes * self.dim);
        for _ in 0..self.classes {
            let row: Vec<f64> = (0..self.dim).map(|_| random.normal()).collect();
            let size = if random.unit() < 0.02 { 0.0 } else { random.between(0.3, 3.0) / norm(&row).max(1e-3) };
            centers.extend(row.iter().map(|x| (x * size) as f32));
        }
        centers
    }

    /// By rank: the rows of a step. Near rows lean on the start values of W, which later steps have left a little.
    pub fn inputs(&self, step: usize, centers: &[f32]) -> Vec<Input> {
        let mut random = Random(self.seed ^ (step as u64 + 1).wrapping_mul(0x5851_f42d_4c95_7f2d));
        let mut sizes = random.clone();
        let few: Vec<i64> = random.labels(3, self.classes);
        let common: Vec<i64> = self.subset(0..self.classes, &mut random);
        (0..self.ranks())
            .map(|rank| {
                let batch = self.batches[(rank + step) % self.ranks()];
                let labels: Vec<i64> = (0..batch)
                    .map(|_| match (self.ignore_label, self.labels) {
                        (Some(label), _) if random.unit() < self.ignored => label,
                        (_, Labels::Any) => random.below(self.classes) as i64,
                        (_, Labels::One) => few[0],
                        (_, Labels::Few) => few[random.below(3)],
                    })
                    .collect();
                let row = |label| self.sized(self.embedding(label, centers, &mut random), &mut sizes);
                let embeddings: Vec<f64> = labels.iter().copied().flat_map(row).collect();
                let sample = match self.placement {
                    Placement::Sharded => self.subset(self.shard(rank), &mut random),
                    Placement::Replicated => common.clone(),
                };
                let terms = self.terms(step, rank, &labels);
                Input { embeddings: Rows::new(&embeddings, self.dim, self.embeddings, self.padding), labels, sample, terms }
            })
            .collect()
    }

    fn shard(&self, rank: usize) -> std::ops::Range<usize> {
        let (each, more) = (self.classes / self.ranks(), self.classes % self.ranks());
        let first = rank * each + rank.min(more);
        first..first + each + usize::from(rank < more)
    }

    fn subset(&self, classes: std::ops::Range<usize>, random: &mut Random) -> Vec<i64> {
        classes.filter(|_| random.unit() < self.rate).map(|class| class as i64).collect()
    }

    fn sized(&self, row: Vec<f64>, random: &mut Random) -> Vec<f64> {
        let factors = match (self.sizes, self.embeddings) {
            (Sizes::Near1, _) => [1.0; 5],
            (Sizes::Any, DType::F16) => [1e-5, 1e-3, 1.0, 30.0, 500.0],
            (Sizes::Any, _) => [1e-10, 1e-5, 1.0, 1e5, 1e30],
        };
        let factor = factors[random.below(5)];
        row.iter().map(|x| x * factor).collect()
    }

    fn embedding(&self, label: i64, centers: &[f32], random: &mut Random) -> Vec<f64> {
        if Some(label) == self.ignore_label {
            let fill = [f64::NAN, f64::INFINITY, 1.0][random.below(3)];
            return vec![fill; self.dim];
        }
        let center = &centers[label as usize * self.dim..][..self.dim];
        let noise: Vec<f64> = (0..self.dim).map(|_| random.normal()).collect();
        let center_norm = center.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        let size = 10f64.powf(random.between(-1.0, 1.0));
        let toward = |factor: f64| center.iter().map(|&x| f64::from(x) * factor).collect::<Vec<f64>>();
        match random.below(20) {
            // Theta 0 and pi; a power of two keeps the direction's bits.
            0 => toward(4.0),
            1 => toward(-0.3),
            // No direction at all.
            2 => vec![0.0; self.dim],
            3 => vec![1e-20; self.dim],
            // Far from the next classes: from all that there are, where there are few.
            11..=12 => {
                let others = (1..4).map(|next| (label as usize + next) % self.classes).filter(|&other| other != label as usize);
                let away = others.flat_map(|other| centers[other * self.dim..][..self.dim].iter().enumerate());
                let mut row: Vec<f64> = noise.iter().map(|n| 0.05 * n).collect();
                away.for_each(|(at, &w)| row[at] -= f64::from(w));
                row
            }
            // Converged: target cosine 0.8 to 0.999.
            4..=10 if center_norm > 0.0 => {
                let unit = toward(1.0 / center_norm);
                let along: f64 = noise.iter().zip(&unit).map(|(n, u)| n * u).sum();
                let across: Vec<f64> = noise.iter().zip(&unit).map(|(n, u)| n - along * u).collect();
                let cosine = random.between(0.8, 0.999);
                let sine = (1.0 - cosine * cosine).sqrt() / norm(&across).max(1e-3);
                unit.iter().zip(&across).map(|(u, a)| size * (cosine * u + sine * a)).collect()
            }
            _ => noise.iter().map(|n| size * n).collect(),
        }
    }
}

fn in_f16(row: &[f64]) -> Vec<f64> {
    let largest = row.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
    if !row.iter().all(|x| x.is_finite()) {
        return row.to_vec();
    }
    if norm(row) < 1e-12 {
        return vec![0.0; row.len()];
    }
    let scale = 2f64.powi(-(largest.log2().floor() as i32));
    let scaled: Vec<f64> = row.iter().map(|x| x * scale).collect();
    Rows::new(&scaled, row.len(), DType::F16, 0).values().iter().map(|x| x / scale).collect()
}

/// Cases, drawn freely: small ones, of which there can be many.
pub fn cases() -> impl Strategy<Value = Case> {
    let classes = prop_oneof![3 => 1..=40usize, 1 => 1..=4usize, 1 => 1..=300usize];
    let batch = prop_oneof![1 => Just(0usize), 1 => Just(1), 4 => 0..=12usize, 1 => 0..=40usize];
    cases_of(classes, 1..=70usize, batch)
}

/// Cases that go beyond one block of whatever the head cuts its work into.
pub fn large_cases() -> impl Strategy<Value = Case> {
    cases_of(300..=3000usize, prop_oneof![3 => 1..=40usize, 1 => 100..=600usize], 0..=90usize)
}

pub fn cases_of(
    classes: impl Strategy<Value = usize>,
    dim: impl Strategy<Value = usize>,
    batch: impl Strategy<Value = usize>,
) -> impl Strategy<Value = Case> {
    let shape = (
        any::<u64>(),
        classes,
        dim,
        prop::collection::vec(batch, 1..=4),
        prop_oneof![Just(Placement::Sharded), Just(Placement::Replicated)],
        prop_oneof![Just(0.0), Just(1.0), 0.0..=1.0],
        any::<bool>(),
    );
    let margin = (
        prop_oneof![
            2 => Just(64.0),
            1 => Just(128.0),
            2 => 70.0..=128.0,
            1 => Just(1e-3),
            4 => (-3.0..=2.1f64).prop_map(|e| 10f64.powf(e)),
        ],
        prop_oneof![3 => Just(1.0), 1 => 0.5..=2.0, 1 => Just(4.0)],
        prop_oneof![2 => Just(0.0), 2 => Just(0.5), 4 => 0.0..=1.5, 1 => 1.5..=std::f64::consts::PI],
        prop_oneof![2 => Just(0.0), 1 => 0.0..=1.0],
        prop_oneof![3 => Just(0.0), 1 => 0.02..=0.9],
        prop_oneof![Just(MarginGradient::Exact), Just(MarginGradient::StraightThrough)],
        any::<bool>(),
    );
    let update = (
        any::<bool>(),
        prop_oneof![Just(0.9), 0.0..0.95],
        prop_oneof![Just(5e-4), 0.0..0.1],
        prop_oneof![Just(RowUpdate::Lazy), Just(RowUpdate::Dense)],
        0.0..=1.0,
    );
    let rows = (
        prop_oneof![3 => Just(Labels::Any), 1 => Just(Labels::One), 1 => Just(Labels::Few)],
        prop_oneof![Just(None), Just(Some(-1)), Just(Some(i64::MAX)), Just(Some(10_000))],
        prop_oneof![2 => 0.0..=0.5, 1 => Just(1.0)],
        prop_oneof![2 => Just(DType::F32), 1 => Just(DType::F16), 1 => Just(DType::Bf16)],
        prop_oneof![3 => Just(None), 1 => prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::Bf16)].prop_map(Some)],
        prop_oneof![2 => Just(DType::F32), 1 => Just(DType::F16), 1 => Just(DType::Bf16)],
        prop_oneof![Just(0usize), 1..=5usize],
    );
    let factors =
        (prop_oneof![Just(1.0), 0.1..=2.0], prop_oneof![Just(1.0), Just(128.0)], prop_oneof![Just(1.0), Just(4.0), 0.1..=2.0]);
    let run = (
        prop_oneof![Just(Calls::Separate), Just(Calls::Step), Just(Calls::Prepared), Just(Calls::Ahead)],
        1..=5usize,
        any::<bool>(),
        1..=2u32,
        prop_oneof![2 => Just(0u64), 2 => Just(LEAST), 1 => LEAST..LEAST + 1_000_000],
    );
    (shape, margin, update, rows, factors, run).prop_map(|(shape, margin, update, rows, factors, run)| {
        let (seed, classes, dim, batches, placement, rate, given_sample) = shape;
        let (scale, m1, m2, m3, filter, gradient, guard) = margin;
        let (adamw, momentum, weight_decay, row_update, pace) = update;
        let (labels, ignore_label, ignored, embeddings, gather, grads, padding) = rows;
        let (loss_weight, loss_scale, gradient_scale) = factors;
        let (calls, steps, peek, threads, workspace_limit) = run;
        let classes = classes.max(batches.len());
        // pfc_head_step has no weights.
        let (loss_weight, loss_scale) = if calls == Calls::Step { (1.0, 1.0) } else { (loss_weight, loss_scale) };
        Case {
            seed,
            classes,
            dim,
            batches,
            placement,
            rate,
            given_sample,
            scale,
            m1,
            m2,
            m3,
            filter,
            gradient,
            guard,
            adamw,
            momentum,
            weight_decay,
            rows: row_update,
            labels,
            ignore_label,
            ignored,
            embeddings,
            // A number of its own would have all cases drawn anew.
            sizes: if seed % 4 == 0 { Sizes::Any } else { Sizes::Near1 },
            gather,
            grads,
            padding,
            loss_weight,
            loss_scale,
            gradient_scale,
            pace,
            calls,
            steps,
            peek,
            threads,
            workspace_limit,
        }
    })
}
