//! Precision half: operands of the products are rounded, on a GPU of all three, on a CPU of those of the gradients; and nothing else is.
//!
//! Held to a float64 head that rounds the same operands, whatever is drawn: there a fault shows that rounding would hide. And to the
//! exact one, which says what the precision is worth.
//!
//! `PROPTEST_RNG_SEED=n PROPTEST_CASES=m cargo test --test properties half` draws others than the ordinary run.

use std::ffi::CStr;

use partialfc::capi::device::pfc_device_info;
use partialfc::margin::MarginGradient;
use partialfc::matrix::DType;
use partialfc::options::{HeadOptions, Placement, Precision};
use partialfc_testing::capi::{on_cuda, Device, Failure, Head, Rows};
use partialfc_testing::cases::{cases, cases_of, Calls, Case, Input, Sizes};
use partialfc_testing::numbers::{distance, norm, widen};
use partialfc_testing::ranks::{on_ranks, Rank};
use partialfc_testing::reference::{self, Operands, RankInput};
use proptest::prelude::prop_oneof;
use proptest::strategy::Strategy;
use proptest::test_runner::{TestCaseError, TestError, TestRunner};

use super::{config, count};

/// Relative L2 of loss and gradients against a head that rounds the same operands.
const SAME_OPERANDS: f64 = 3e-4;
/// Against the exact head from this dimension on: below it a few rounded elements are all there is.
const EXACT: f64 = 4e-3;
const EXACT_FROM: usize = 64;
/// Of many cases this share may be further off, where few terms are rounded the same way. Not of the few that an emulator has time for.
const FURTHER_OFF: f64 = 0.02;

/// One step from class centers of the case's, on one rank.
struct Found {
    loss: f64,
    sample: Vec<i64>,
    grad_embeddings: Vec<f64>,
    grad_centers: Vec<f64>,
}

/// What can be compared to the last bit that float32 has: one step, whose gradients come as they are.
fn plain(case: Case) -> Case {
    Case { steps: 1, grads: DType::F32, padding: 0, weight_decay: 0.0, loss_scale: 1.0, gradient_scale: 1.0, ..case }
}

fn options(case: &Case) -> HeadOptions {
    HeadOptions { precision: Precision::Half, ..case.options() }
}

fn run(case: &Case, place: &Rank, start: &[f32]) -> Result<Found, Failure> {
    let device = Device::under_test(case.threads);
    let mut head = Head::new(&device, &place.comm, &options(case));
    let (first, count) = head.shard();
    let shard = first as usize * case.dim..(first + count) as usize * case.dim;
    head.write_centers(first, &start[shard]).expect("start values");
    let Input { mut embeddings, labels, sample, .. } = case.inputs(0, start).swap_remove(place.rank);
    let mut grad = Rows::output(labels.len(), case.dim);
    if case.given_sample {
        head.set_sample(&sample).expect("a sample");
    }
    let loss = if case.calls == Calls::Step {
        head.step(&mut embeddings, &labels, 0.1, &mut grad)
    } else {
        head.forward(&mut embeddings, Some(&labels))
    };
    let sample = head.sample_ids().expect("the sample");
    let loss = loss?;
    if case.calls != Calls::Step {
        head.backward(case.loss_weight, 1.0, &mut grad).expect("backward");
        head.update(0.1).expect("update");
    }
    // The state was zero and nothing decays: what it is now is the gradient.
    let share = if case.adamw { 1.0 - case.momentum } else { 1.0 };
    let (momentum, dim) = (head.momentum(), case.dim);
    let rows = sample.iter().flat_map(|&class| &momentum[(class as usize - first as usize) * dim..][..dim]);
    let grad_centers = rows.map(|&m| f64::from(m) / share / case.loss_weight).collect();
    let grad_embeddings = grad.values().iter().map(|g| g / case.loss_weight).collect();
    Ok(Found { loss, sample, grad_embeddings, grad_centers })
}

/// A reference's step as one list of numbers for each result, and what each may be off by beside its own size: terms that cancel, that
/// underflow, and roundings that float32 may make otherwise.
struct Judge {
    loss: f64,
    tensors: [Vec<f64>; 2],
    spare: [f64; 2],
    /// What the targets' pull may be where the rows all but lie on their class centers: rounding a row turns it.
    turned: f64,
    filter_distance: f64,
    guard_distance: f64,
}

/// Gradients of the unit rows, whatever the rows' norms: one long row's would hide all others'.
fn at_unit_norm(gradients: &[f64], embeddings: &[f64], dim: usize) -> Vec<f64> {
    let norms = embeddings.chunks(dim).map(norm).map(|norm| if norm.is_finite() { norm } else { 0.0 });
    let each = gradients.len() * dim / embeddings.len().max(1);
    gradients.chunks(each.max(1)).zip(norms).flat_map(|(row, norm)| row.iter().map(move |g| g * norm)).collect()
}

fn judge(case: &Case, operands: Operands, inputs: &[RankInput], start: &[f32]) -> Judge {
    let mut head = reference::Head::new(case.options(), case.ranks(), widen(start));
    head.operands = operands;
    if multiplies_terms() {
        head.cosine_error = 2e-6;
    }
    let step = head.forward(inputs).expect("inputs that a head takes");
    // The ranks of a replicated head have the same sum of theirs.
    let ranks = if case.placement == Placement::Replicated { 1 } else { case.ranks() };
    let seen = &step.conditioning;
    let of_units = |gradients: &[Vec<f64>]| -> Vec<Vec<f64>> {
        gradients.iter().zip(inputs).map(|(rank, input)| at_unit_norm(rank, input.embeddings, case.dim)).collect()
    };
    let spare = |gross: &[Vec<f64>], tied: &[Vec<f64>], rows: usize| {
        let steepness = case.scale.max(1.0) * case.m1.max(1.0);
        4e-7 * steepness * norm(&gross.concat()) + norm(&tied.concat()) + (1e-30 + 20.0 * seen.underflow) * (rows as f64).sqrt()
    };
    let on_center = step.target_cosines.iter().flatten().filter(|cosine| cosine.abs() > 0.9985).count() as f64;
    let exact = case.gradient == MarginGradient::Exact;
    Judge {
        loss: step.loss,
        turned: if exact { on_center * case.scale * case.m1 / step.valid_rows.max(1) as f64 } else { 0.0 },
        spare: [
            spare(
                &of_units(&seen.gross_embeddings),
                &of_units(&seen.tied_embeddings),
                inputs.iter().map(|input| input.labels.len()).sum(),
            ),
            spare(&seen.gross_centers[..ranks], &seen.tied_centers[..ranks], inputs.iter().map(|input| input.sample.len()).sum()),
        ],
        tensors: [of_units(&step.grad_embeddings).concat(), step.grad_centers[..ranks].concat()],
        filter_distance: seen.filter_distance,
        guard_distance: seen.guard_distance,
    }
}

/// What the device rounds.
fn rounded_operands() -> Operands {
    match on_cuda() {
        true => Operands::Half,
        false => Operands::HalfGradients,
    }
}

/// Whether cosines are products of bfloat16s in two terms.
fn multiplies_terms() -> bool {
    let device = Device::cpu(1);
    // SAFETY: a live device, whose text lives as long.
    !on_cuda() && unsafe { CStr::from_ptr(pfc_device_info(device.0)) }.to_bytes().ends_with(b"amx")
}

/// What a case was compared with.
#[derive(Clone, Copy, PartialEq)]
enum Compared {
    /// Too close to a jump of the loss.
    Not,
    /// A head that rounds the same operands, and the exact one. Of that it is as near as the precision says, or as the rounding lets it be.
    WithBoth {
        near: bool,
    },
    WithRounded,
}

/// Compares a case, or tells why its numbers are wrong.
fn check(case: &Case) -> Result<Compared, String> {
    let start = case.centers();
    let found = on_ranks(case.ranks(), |place| run(case, place, &start));
    let found: Vec<Found> = found.into_iter().collect::<Result<_, _>>().map_err(|failure| format!("{failure:?}"))?;
    let samples: Vec<&[i64]> = found.iter().map(|found| &found.sample[..]).collect();
    let inputs = case.inputs(0, &start);
    // Unless a type is asked for they travel in f16; that is a part of what the precision is worth.
    let [rounded, exact] = [(rounded_operands(), Some(DType::F16)), (Operands::Exact, None)].map(|(operands, auto)| {
        let gather = case.gather.or(auto);
        let embeddings: Vec<Vec<f64>> = inputs.iter().map(|input| case.travelled(&input.embeddings, gather)).collect();
        let rank_inputs: Vec<RankInput> = (0..case.ranks())
            .map(|rank| RankInput { embeddings: &embeddings[rank], labels: &inputs[rank].labels, sample: samples[rank] })
            .collect();
        judge(case, operands, &rank_inputs, &start)
    });
    if rounded.filter_distance < 1e-5 || rounded.guard_distance < 1e-5 {
        return Ok(Compared::Not);
    }
    let ranks = if case.placement == Placement::Replicated { 1 } else { case.ranks() };
    let tensors = [
        found
            .iter()
            .zip(&inputs)
            .flat_map(|(run, input)| {
                // The gradient of the row that travelled.
                let travelled = case.travelled(&input.embeddings, case.gather.or(Some(DType::F16)));
                at_unit_norm(&run.grad_embeddings, &travelled, case.dim)
            })
            .collect::<Vec<f64>>(),
        found[..ranks].iter().flat_map(|run| run.grad_centers.iter().copied()).collect(),
    ];
    let loss = found[0].loss;
    let hold = |what: &str, off: f64, allowed: f64| match off <= allowed {
        true => Ok(()),
        false => Err(format!("{what} is off by {off:e}, allowed {allowed:e}")),
    };
    let steeper = (case.scale / 64.0).max(1.0);
    hold("the loss", (loss - rounded.loss).abs(), SAME_OPERANDS * steeper * rounded.loss + 1e-30)?;
    for (at, what) in ["dE", "dW"].into_iter().enumerate() {
        let (tensor, truth) = (&tensors[at], &rounded.tensors[at]);
        hold(what, distance(tensor, truth), SAME_OPERANDS * steeper * norm(truth) + rounded.spare[at])?;
    }
    if exact.filter_distance < 1e-3 {
        return Ok(Compared::WithRounded);
    }
    let mut near = true;
    let mut worth = |what: &str, off: f64, off_by_rounding: f64, size: f64, spare: f64| {
        near &= case.dim < EXACT_FROM || off <= EXACT * steeper * size + spare;
        hold(what, off, 2.0 * off_by_rounding + SAME_OPERANDS * steeper * size + spare)
    };
    worth("the loss, from the exact one,", (loss - exact.loss).abs(), (rounded.loss - exact.loss).abs(), exact.loss, 1e-30)?;
    for (at, what) in ["dE, from the exact one,", "dW, from the exact one,"].into_iter().enumerate() {
        let (tensor, truth) = (&tensors[at], &exact.tensors[at]);
        let spare = rounded.spare[at] + exact.spare[at] + exact.turned;
        worth(what, distance(tensor, truth), distance(&rounded.tensors[at], truth), norm(truth), spare)?;
    }
    Ok(Compared::WithBoth { near })
}

fn agree(cases_drawn: u32, cases: impl Strategy<Value = Case>) {
    let all = std::cell::RefCell::new(Vec::new());
    let outcome = TestRunner::new(config(cases_drawn)).run(&cases.prop_map(plain), |case| {
        all.borrow_mut().push(check(&case).map_err(TestCaseError::fail)?);
        Ok(())
    });
    match outcome {
        Ok(()) => {
            let all = all.borrow();
            let count = |of: &dyn Fn(&Compared) -> bool| all.iter().filter(|compared| of(compared)).count();
            let (drawn, not) = (all.len(), count(&|compared| *compared == Compared::Not));
            assert!(2 * not <= drawn, "{not} of {drawn} cases were not compared");
            let far = count(&|compared| *compared == Compared::WithBoth { near: false });
            let allowed = if on_cuda() { 0.0 } else { FURTHER_OFF };
            assert!(far as f64 <= allowed * drawn as f64, "{far} of {drawn} cases are further off than {EXACT}");
        }
        Err(TestError::Fail(reason, case)) => panic!("{reason}\nreproducer: {case:?}"),
        Err(TestError::Abort(reason)) => panic!("gave up: {reason}"),
    }
}

#[test]
fn half_operands_are_rounded_and_nothing_else_is() {
    agree(count(1800), cases());
}

/// Rows travel in f16 unless another type is asked for, whatever their norm.
#[test]
fn rows_of_any_size_travel_in_half_precision() {
    let types = [DType::F32, DType::F16, DType::Bf16];
    let sharded = cases_of(2..=60usize, 1..=100usize, 1..=20usize).prop_map(move |case| Case {
        placement: Placement::Sharded,
        sizes: Sizes::Any,
        embeddings: types[(case.seed / 3 % 3) as usize],
        gather: [None, None, Some(DType::F16)][(case.seed % 3) as usize],
        ignored: case.ignored.min(0.5),
        ..case
    });
    agree(count(900), sharded);
}

#[test]
fn half_precision_of_wide_rows_is_worth_what_it_says() {
    let wide = prop_oneof![2 => EXACT_FROM..=300usize, 1 => 300..=1024usize];
    agree(count(360), cases_of(20..=200usize, wide, 1..=20usize));
}
