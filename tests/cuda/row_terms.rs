//! Margins and weights of the rows' own in the GPU's memory: the bits of those in host memory, no wait, and errors that come late.

use partialfc::matrix::DType;
use partialfc::options::{HeadOptions, Placement, Residency};
use partialfc::Status;
use partialfc_testing::capi::{options, Comm, Head, Rows};
use partialfc_testing::emulator;
use partialfc_testing::gpu::{gpu, Remote};
use partialfc_testing::numbers::{assert_close, Random};
use partialfc_testing::ranks::on_ranks;
use partialfc_testing::training::{assert_same_bits, learning_rate, Batch, Trace};

use super::loss::WAITS;

const DIM: usize = 6;
const ROWS: usize = 4;

fn heads() -> [HeadOptions; 2] {
    [Placement::Sharded, Placement::Replicated].map(|placement| HeadOptions {
        placement,
        sample_rate: 0.5,
        row_terms: true,
        sample_block: 1,
        residency: Residency::Device,
        weight_dtype: DType::F32,
        state_dtype: DType::F32,
        ..options(40, DIM as u32, ROWS as u64)
    })
}

fn terms_of(rank: usize, step: usize) -> [Vec<f32>; 3] {
    let mut random = Random(5 + 10 * rank as u64 + step as u64);
    [(0.0, 0.8), (0.0, 0.4), (0.0, 2.0)].map(|(from, to)| (0..ROWS).map(|_| random.between(from, to) as f32).collect())
}

fn train(options: &HeadOptions, on_device: bool) -> (Vec<Trace>, Vec<Vec<f32>>) {
    let runs = on_ranks(2, |place| {
        let mut head = Head::new(&gpu(), &place.comm, options);
        let (mut trace, mut margins) = (Trace::default(), Vec::new());
        for step in 0..2 {
            let (batch, terms) = (Batch::draw(options, place.rank, step, ROWS), terms_of(place.rank, step));
            let there = terms.each_ref().map(|values| Remote::of(values));
            let of = |term: usize| if on_device { there[term].pointer::<f32>().cast_const() } else { terms[term].as_ptr() };
            let mut grad = Rows::output(ROWS, DIM);
            let loss = head
                .forward_by(&mut batch.rows(DIM), Some(&batch.labels), |o| (o.m2, o.m3, o.weight) = (of(0), of(1), of(2)))
                .expect("forward");
            let (mut here, found) = ([-5f32; ROWS], Remote::of(&[-5f32; ROWS]));
            head.backward_by(&mut grad, |o| match on_device {
                true => (o.grad_m2, o.grad_m3) = (found.pointer(), here.as_mut_ptr()),
                false => (o.grad_m2, o.grad_m3) = (here.as_mut_ptr(), found.pointer()),
            })
            .expect("backward");
            let sample = head.sample_ids().expect("the sample");
            head.update(learning_rate(step)).expect("update");
            head.wait().expect("all is well");
            let found = found.read::<f32>();
            let (m2, m3) = if on_device { (found, here.to_vec()) } else { (here.to_vec(), found) };
            margins.extend([m2, m3]);
            trace.saw_step(loss, &grad, sample);
        }
        trace.saw_rows(&mut head, options);
        (trace, margins.concat())
    });
    runs.into_iter().unzip()
}

#[test]
fn terms_in_device_memory_give_the_bits_of_those_in_host_memory() {
    let _turn = emulator::turn(31);
    for options in heads() {
        let ((there, there_margins), (here, here_margins)) = (train(&options, true), train(&options, false));
        assert_same_bits(&format!("{:?}", options.placement), &there, &here);
        assert_eq!(there_margins, here_margins);
        assert!(here_margins.iter().flatten().all(|g| *g != -5.0) && here_margins.iter().flatten().any(|g| *g != 0.0));
    }
}

/// Four steps with their losses on the GPU, of which the second has a margin that is none on rank 1.
#[test]
fn nothing_waits_and_a_bad_value_comes_late_on_every_rank() {
    let _turn = emulator::turn(32);
    for options in heads() {
        let texts = on_ranks(2, |place| {
            let mut head = Head::new(&gpu(), &place.comm, &options);
            let mut kept = Vec::new();
            for step in 0..3 {
                let (batch, mut terms) = (Batch::draw(&options, place.rank, step, ROWS), terms_of(place.rank, step));
                if (step, place.rank) == (1, 1) {
                    terms[1][3] = 2.5;
                }
                run_step(&head, &batch, &terms, &mut kept);
            }
            let failure = head.wait().expect_err("a margin that is none");
            let (losses, margins): (Vec<f64>, Vec<Vec<f32>>) =
                kept.iter().map(|step: &Arrays| (step.loss.read::<f64>()[0], step.margins.read::<f32>())).unzip();
            assert!(losses[0].is_finite() && losses[1].is_nan() && losses[2].is_finite(), "{losses:?}");
            assert_eq!(margins[1], [0.0; ROWS]);
            assert_eq!(head.last_metrics().expect("metrics").updates, 2);
            (failure.status, failure.message)
        });
        for (status, text) in texts {
            assert_eq!(status, Status::InvalidArgument as i32, "{text}");
            assert!(text.contains("step 1: m3[3] must be 0 to 2, got 2.5 (rank 1)"), "{text}");
        }
    }
}

#[test]
fn a_step_with_terms_waits_for_nothing() {
    let turn = emulator::turn(33);
    let (comm, [options, _]) = (Comm::solo(), heads());
    let mut head = Head::new(&gpu(), &comm, &options);
    let mut kept = Vec::new();
    let batches: Vec<Batch> = (0..3).map(|step| Batch::draw(&options, 0, step, ROWS)).collect();
    let arrays: Vec<Arrays> = (0..3).map(|step| Arrays::new(&batches[step], &terms_of(0, step))).collect();
    let waits = || WAITS.map(|function| turn.calls(function));
    let before = waits();
    for arrays in arrays {
        arrays.run(&head);
        kept.push(arrays);
    }
    assert_eq!(waits(), before, "{WAITS:?}");
    head.wait().expect("good steps");
    let found: Vec<f64> = kept.iter().map(|arrays| arrays.loss.read::<f64>()[0]).collect();
    // The same from the host.
    let mut now = Head::new(&gpu(), &comm, &options);
    let mut losses = Vec::new();
    for (step, batch) in batches.iter().enumerate() {
        let terms = terms_of(0, step).map(Some);
        losses.push(now.forward_with(&mut batch.rows(DIM), Some(&batch.labels), &terms).expect("forward"));
        now.backward(1.0, 1.0, &mut Rows::output(ROWS, DIM)).expect("backward");
        now.update(0.1).expect("update");
    }
    assert_close("losses", &found, &losses, 1e-12);
}

/// A step's arrays on the GPU.
struct Arrays {
    embeddings: Remote,
    labels: Remote,
    gradient: Remote,
    margins: Remote,
    terms: [Remote; 3],
    loss: Remote,
}

impl Arrays {
    fn new(batch: &Batch, terms: &[Vec<f32>; 3]) -> Arrays {
        Arrays {
            embeddings: Remote::of(&batch.embeddings),
            labels: Remote::of(&batch.labels),
            gradient: Remote::of(&[-5f32; ROWS * DIM]),
            margins: Remote::of(&[-5f32; ROWS]),
            terms: terms.each_ref().map(|values| Remote::of(values)),
            loss: Remote::of(&[-5f64]),
        }
    }

    fn run(&self, head: &Head) {
        use partialfc::capi::forward as c;
        use partialfc::capi::head::pfc_head_update;
        use partialfc_testing::capi::outcome;

        let (embeddings, gradient) = (self.embeddings.matrix(DIM), self.gradient.matrix(DIM));
        // SAFETY: a live handle; arrays on the GPU of the sizes that the head takes; all zeros is a value of the options.
        unsafe {
            let mut forward: c::pfc_forward_options = std::mem::zeroed();
            let mut backward: c::pfc_backward_options = std::mem::zeroed();
            let size = |size: usize| size as u64;
            outcome(c::pfc_forward_options_init_sized(&mut forward, size(size_of_val(&forward)))).expect("defaults");
            outcome(c::pfc_backward_options_init_sized(&mut backward, size(size_of_val(&backward)))).expect("defaults");
            [forward.m2, forward.m3, forward.weight] = self.terms.each_ref().map(|values| values.pointer::<f32>().cast_const());
            backward.grad_m2 = self.margins.pointer();
            let (labels, loss) = (self.labels.pointer::<i64>().cast_const(), self.loss.pointer::<f64>());
            outcome(c::pfc_head_forward_with(head.raw, &embeddings, labels, &forward, loss)).expect("an enqueued forward");
            outcome(c::pfc_head_backward_with(head.raw, &backward, &gradient)).expect("an enqueued backward");
            outcome(pfc_head_update(head.raw, 0.1)).expect("an enqueued update");
        }
    }
}

fn run_step(head: &Head, batch: &Batch, terms: &[Vec<f32>; 3], kept: &mut Vec<Arrays>) {
    let arrays = Arrays::new(batch, terms);
    arrays.run(head);
    kept.push(arrays);
}
