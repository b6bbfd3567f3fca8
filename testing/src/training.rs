//! Short training runs whose every output is kept, for tests that compare runs with each other.

use partialfc::matrix::DType;
use partialfc::optimizer::{Adamw, Optimizer};
use partialfc::options::{HeadOptions, Placement, RowUpdate};

use crate::capi::{on_cuda, Device, Head, Rows};
use crate::numbers::Random;
use crate::ranks::Rank;

pub const ADAMW: Optimizer = Optimizer::Adamw(Adamw { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.1 });

/// These options with both placements, lazy and dense rows, the optimizer as it is and AdamW. On the emulated GPU three of the eight:
/// each of them takes its time where every thread of every kernel is emulated.
pub fn ways_to_update(base: &HeadOptions) -> Vec<HeadOptions> {
    let mut heads = Vec::new();
    for placement in [Placement::Sharded, Placement::Replicated] {
        for row_update in [RowUpdate::Lazy, RowUpdate::Dense] {
            heads.push(HeadOptions { placement, row_update, ..base.clone() });
            heads.push(HeadOptions { placement, row_update, optimizer: ADAMW, ..base.clone() });
        }
    }
    match on_cuda() {
        true => [0, 3, 5].map(|number| heads[number].clone()).to_vec(),
        false => heads,
    }
}

/// These options with rows in float32 and in bfloat16.
pub fn stored_both_ways(options: HeadOptions) -> [HeadOptions; 2] {
    let narrow = HeadOptions { weight_dtype: DType::Bf16, state_dtype: DType::Bf16, ..options.clone() };
    [options, narrow]
}

/// One rank's rows of one step.
#[derive(Clone, Debug)]
pub struct Batch {
    pub embeddings: Vec<f32>,
    pub labels: Vec<i64>,
}

impl Batch {
    /// The same numbers for the same rank and step, whatever else is asked for.
    pub fn draw(options: &HeadOptions, rank: usize, step: usize, rows: usize) -> Batch {
        let mut random = Random(1000 * rank as u64 + step as u64 + options.seed);
        let labels = random.labels(rows, options.num_classes as usize);
        Batch { embeddings: random.normals(rows * options.embedding_dim as usize, 1.0), labels }
    }

    pub fn rows(&self, dim: usize) -> Rows {
        Rows::f32(&self.embeddings, dim)
    }
}

/// Everything a run gave, in bits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    pub losses: Vec<u64>,
    pub grads: Vec<Vec<u32>>,
    pub samples: Vec<Vec<i64>>,
    pub centers: Vec<u32>,
    pub momentum: Vec<u32>,
    pub second_moment: Vec<u32>,
}

impl Trace {
    pub fn saw_step(&mut self, loss: f64, grad: &Rows, sample: Vec<i64>) {
        self.losses.push(loss.to_bits());
        self.grads.push(bits(&grad.values_f32()));
        self.samples.push(sample);
    }

    pub fn saw_rows(&mut self, head: &mut Head, options: &HeadOptions) {
        self.centers = bits(&head.centers());
        self.momentum = bits(&head.momentum());
        if matches!(options.optimizer, Optimizer::Adamw(_)) {
            self.second_moment = bits(&head.second_moment());
        }
    }

    pub fn losses(&self) -> Vec<f64> {
        self.losses.iter().map(|&loss| f64::from_bits(loss)).collect()
    }

    pub fn centers(&self) -> Vec<f64> {
        numbers(&self.centers)
    }

    pub fn momentum(&self) -> Vec<f64> {
        numbers(&self.momentum)
    }

    pub fn grads(&self) -> Vec<f64> {
        numbers(&self.grads.concat())
    }
}

fn numbers(bits: &[u32]) -> Vec<f64> {
    bits.iter().map(|&bits| f64::from(f32::from_bits(bits))).collect()
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Asserts that two runs gave the same bits on every rank, and names what differs first.
#[track_caller]
pub fn assert_same_bits(what: &str, found: &[Trace], expected: &[Trace]) {
    assert_eq!(found.len(), expected.len(), "{what}: ranks");
    for (rank, (f, e)) in found.iter().zip(expected).enumerate() {
        assert_eq!(f.samples, e.samples, "{what}: samples of rank {rank}");
        assert_eq!(f.losses(), e.losses(), "{what}: losses of rank {rank}");
        for (step, (f, e)) in f.grads.iter().zip(&e.grads).enumerate() {
            assert_no_difference(&format!("{what}: dE of rank {rank} in step {step}"), f, e);
        }
        assert_no_difference(&format!("{what}: W of rank {rank}"), &f.centers, &e.centers);
        assert_no_difference(&format!("{what}: momentum of rank {rank}"), &f.momentum, &e.momentum);
        assert_no_difference(&format!("{what}: second moment of rank {rank}"), &f.second_moment, &e.second_moment);
        assert_eq!(f, e, "{what}: rank {rank}");
    }
}

#[track_caller]
fn assert_no_difference(what: &str, found: &[u32], expected: &[u32]) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths");
    if let Some(at) = (0..found.len()).find(|&at| found[at] != expected[at]) {
        let (f, e) = (f32::from_bits(found[at]), f32::from_bits(expected[at]));
        let count = found.iter().zip(expected).filter(|(f, e)| f != e).count();
        panic!("{what}: element {at} is {f:e}, expected {e:e}; {count} of {} differ", found.len());
    }
}

/// The learning rate of a step, never the same twice.
pub fn learning_rate(step: usize) -> f64 {
    0.1 / (1.0 + 0.3 * step as f64)
}

/// Rows of a rank in a step: uneven.
pub fn batch_rows(options: &HeadOptions, rank: usize, step: usize) -> usize {
    (options.max_batch as usize).saturating_sub(3 * rank + step % 3)
}

/// Plain training: forward, backward, update.
pub fn train(place: &Rank, options: &HeadOptions, threads: u32, steps: usize) -> Trace {
    let device = Device::under_test(threads);
    let mut head = Head::new(&device, &place.comm, options);
    let mut trace = Trace::default();
    for step in 0..steps {
        train_step(&mut head, place, options, step, &mut trace);
    }
    trace.saw_rows(&mut head, options);
    trace
}

pub fn train_step(head: &mut Head, place: &Rank, options: &HeadOptions, step: usize, trace: &mut Trace) {
    let batch = Batch::draw(options, place.rank, step, batch_rows(options, place.rank, step));
    let mut grad = Rows::output(batch.labels.len(), head.dim);
    let loss = head.forward(&mut batch.rows(head.dim), Some(&batch.labels)).expect("forward");
    head.backward(1.0, 1.0, &mut grad).expect("backward");
    let sample = head.sample_ids().expect("the sample");
    head.update(learning_rate(step)).expect("update");
    trace.saw_step(loss, &grad, sample);
}
