//! Precision half: the operands of the three products are rounded, and nothing else is.
//!
//! Held to a float64 head that rounds the same operands, whatever is drawn: there a fault shows that rounding would hide. And to the
//! exact one, which says what the precision is worth. On the emulator, or with `PFC_TEST_DRIVER=real` on a GPU.
//!
//! `PROPTEST_RNG_SEED=n PROPTEST_CASES=m cargo test --test cuda half` draws others than the ordinary run.

use partialfc::margin::MarginGradient;
use partialfc::matrix::DType;
use partialfc::options::{HeadOptions, Placement, Precision};
use partialfc::Status;
use partialfc_testing::capi::{self, plan, plan_cuda, to_c, traffic_between, Failure, Head, Rows};
use partialfc_testing::cases::{cases, cases_of, Calls, Case, Input, Sizes};
use partialfc_testing::emulator;
use partialfc_testing::gpu::gpu;
use partialfc_testing::numbers::{distance, norm, widen};
use partialfc_testing::ranks::{on_ranks, Rank};
use partialfc_testing::reference::{self, Operands, RankInput};
use partialfc_testing::training::Batch;
use proptest::prelude::prop_oneof;
use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestError, TestRunner};

/// Relative L2 of loss and gradients against a head that rounds the same operands.
const SAME_OPERANDS: f64 = 3e-4;
/// Against the exact head from this dimension on: below it a few rounded elements are all there is.
const EXACT: f64 = 4e-3;
const EXACT_FROM: usize = 64;

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
    let device = gpu();
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

/// Whether the numbers were compared, or why they are wrong.
fn check(case: &Case) -> Result<bool, String> {
    let start = case.centers();
    let found = on_ranks(case.ranks(), |place| run(case, place, &start));
    let found: Vec<Found> = found.into_iter().collect::<Result<_, _>>().map_err(|failure| format!("{failure:?}"))?;
    let samples: Vec<&[i64]> = found.iter().map(|found| &found.sample[..]).collect();
    let inputs = case.inputs(0, &start);
    // Unless a type is asked for they travel in f16; that is a part of what the precision is worth.
    let [rounded, exact] = [(Operands::Half, Some(DType::F16)), (Operands::Exact, None)].map(|(operands, auto)| {
        let gather = case.gather.or(auto);
        let embeddings: Vec<Vec<f64>> = inputs.iter().map(|input| case.travelled(&input.embeddings, gather)).collect();
        let rank_inputs: Vec<RankInput> = (0..case.ranks())
            .map(|rank| RankInput { embeddings: &embeddings[rank], labels: &inputs[rank].labels, sample: samples[rank] })
            .collect();
        judge(case, operands, &rank_inputs, &start)
    });
    if rounded.filter_distance < 1e-5 || rounded.guard_distance < 1e-5 {
        return Ok(false);
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
        return Ok(true);
    }
    let worth = |off_by_rounding: f64, size: f64| match case.dim >= EXACT_FROM {
        true => EXACT * steeper * size,
        false => 2.0 * off_by_rounding + SAME_OPERANDS * steeper * size,
    };
    let loss_rounding = (rounded.loss - exact.loss).abs();
    hold("the loss, from the exact one,", (loss - exact.loss).abs(), worth(loss_rounding, exact.loss) + 1e-30)?;
    for (at, what) in ["dE, from the exact one,", "dW, from the exact one,"].into_iter().enumerate() {
        let (tensor, truth) = (&tensors[at], &exact.tensors[at]);
        let spare = rounded.spare[at] + exact.spare[at] + exact.turned;
        let allowed = worth(distance(&rounded.tensors[at], truth), norm(truth)) + spare;
        hold(what, distance(tensor, truth), allowed)?;
    }
    Ok(true)
}

fn agree(cases: impl Strategy<Value = Case>, count: u32) {
    let _turn = emulator::turn(2);
    let mut config = Config { failure_persistence: None, max_shrink_iters: 60, ..Config::default() };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = count;
    }
    if matches!(config.rng_seed, RngSeed::Random) {
        config.rng_seed = RngSeed::Fixed(20_221_005);
    }
    let (drawn, compared) = (std::cell::Cell::new(0), std::cell::Cell::new(0));
    let outcome = TestRunner::new(config).run(&cases.prop_map(plain), |case| {
        drawn.set(drawn.get() + 1);
        compared.set(compared.get() + u32::from(check(&case).map_err(TestCaseError::fail)?));
        Ok(())
    });
    match outcome {
        Ok(()) => assert!(2 * compared.get() >= drawn.get(), "{} of {} cases were compared", compared.get(), drawn.get()),
        Err(TestError::Fail(reason, case)) => panic!("{reason}\nreproducer: {case:?}"),
        Err(TestError::Abort(reason)) => panic!("gave up: {reason}"),
    }
}

#[test]
fn half_operands_are_rounded_and_nothing_else_is() {
    agree(cases(), 60);
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
    agree(sharded, 30);
}

#[test]
fn half_precision_of_wide_rows_is_worth_what_it_says() {
    let wide = prop_oneof![2 => EXACT_FROM..=300usize, 1 => 300..=1024usize];
    agree(cases_of(20..=200usize, wide, 1..=20usize), 12);
}

/// What a communicator counts of a step is what the plan of a GPU says, and that of a CPU in the same precision.
#[test]
fn full_batches_hand_over_the_bytes_that_the_plan_names() {
    let _turn = emulator::turn(3);
    for precision in [Precision::Half, Precision::F32, Precision::Auto] {
        for gather_dtype in [None, Some(DType::F32), Some(DType::F16), Some(DType::Bf16)] {
            let options = HeadOptions { precision, gather_dtype, ..capi::options(101, 7, 6) };
            let mut planned = to_c(&options);
            if precision == Precision::Auto {
                planned.precision = Precision::Half as i32;
            }
            let report = plan_cuda(&to_c(&options), 2, 3, 1 << 30).expect("a plan of a GPU");
            let of_a_cpu = plan(&planned, 2, 6).expect("a plan");
            assert_eq!(of_a_cpu.traffic_bytes, report.traffic_bytes, "{precision:?} {gather_dtype:?}");
            let bytes = gather_dtype.map_or(if precision == Precision::F32 { 4 } else { 2 }, DType::size) as u64;
            assert_eq!(report.embeddings_bytes, 6 * 7 * bytes, "{precision:?} {gather_dtype:?}");
            on_ranks(2, |place| {
                let mut head = Head::create(&gpu(), &place.comm, &to_c(&options)).expect("a head");
                let batch = Batch::draw(&options, place.rank, 0, 6);
                let before = place.comm.traffic();
                head.step(&mut batch.rows(7), &batch.labels, 0.1, &mut Rows::output(6, 7)).expect("a step");
                let counted = traffic_between(&before, &place.comm.traffic());
                let named = [report.labels_bytes + report.embeddings_bytes, report.sums_bytes, report.grad_embeddings_bytes, 0];
                assert_eq!(counted, named, "{precision:?} {gather_dtype:?}, rank {}", place.rank);
            });
        }
    }
}

/// A row that is no number is one for all ranks, whatever it was scaled by to travel.
#[test]
fn a_row_that_is_no_number_is_named_on_all_ranks() {
    let _turn = emulator::turn(4);
    let options = HeadOptions { precision: Precision::Half, ..capi::options(11, 3, 2) };
    on_ranks(2, |place| {
        let mut head = Head::new(&gpu(), &place.comm, &options);
        for (bad, beside) in [(f32::NAN, 1e-30), (f32::INFINITY, 1e30), (f32::NEG_INFINITY, 1.0)] {
            let mut rows = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0f32];
            if place.rank == 1 {
                rows[3..].copy_from_slice(&[beside, bad, -beside]);
            }
            let failure = head.forward(&mut Rows::f32(&rows, 3), Some(&[1, 2])).expect_err("no number");
            assert_eq!(failure.status, Status::NotFinite as i32, "{failure:?}");
            assert!(failure.message.contains("row 1") && failure.message.contains("rank 1"), "{failure:?}");
        }
        // The largest numbers there are, and rows without a direction: those have no gradient at all.
        let mut grad = Rows::output(2, 3);
        head.forward(&mut Rows::f32(&[f32::MAX, 0.0, -f32::MAX, 1e-13, -1e-13, 0.0], 3), Some(&[1, 2])).expect("numbers");
        head.backward(1.0, 1.0, &mut grad).expect("backward");
        assert!(grad.values().iter().all(|g| g.is_finite()), "{grad:?}");
        assert_eq!(grad.values()[3..], [0.0; 3]);
    });
}
