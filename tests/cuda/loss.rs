//! A loss in the GPU's memory: nothing in a step makes the host wait, and a failure comes late, once, and changes nothing.
//!
//! On the emulator, or with `PFC_TEST_DRIVER=real` on a GPU.

use partialfc::capi::head as c_head;
use partialfc::Status;
use partialfc_testing::capi::{options, outcome, to_c, Comm, Device, Head, Outcome};
use partialfc_testing::emulator;
use partialfc_testing::gpu::{gpu, Remote};
use partialfc_testing::numbers::Random;
use partialfc_testing::ranks::on_ranks;

pub(super) const ROWS: usize = 6;
pub(super) const DIM: usize = 8;
pub(super) const CLASSES: u64 = 40;

/// Driver functions that make the host wait.
pub(super) const WAITS: [&str; 7] = [
    "cuStreamSynchronize",
    "cuEventSynchronize",
    "cuCtxSynchronize",
    "cuMemcpyDtoH_v2",
    "cuMemcpyHtoD_v2",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
];

/// A step's arrays on the GPU.
pub(super) struct Step {
    embeddings: Remote,
    labels: Remote,
    gradient: Remote,
    loss: Remote,
}

impl Step {
    pub fn draw(rank: usize, number: u64, wrong: bool) -> Step {
        Step::draw_of(CLASSES, rank, number, wrong)
    }

    fn draw_of(classes: u64, rank: usize, number: u64, wrong: bool) -> Step {
        let mut random = Random(100 * number + rank as u64 + 1);
        let mut labels = random.labels(ROWS, classes as usize);
        if wrong {
            labels[3] = CLASSES as i64;
        }
        Step {
            embeddings: Remote::of(&random.normals(ROWS * DIM, 1.0)),
            labels: Remote::of(&labels),
            gradient: Remote::of(&[-123f32; ROWS * DIM]),
            loss: Remote::of(&[-321f64]),
        }
    }

    fn run(&self, head: &Head) -> Outcome<()> {
        self.begin(head)?;
        // SAFETY: a live handle.
        outcome(unsafe { c_head::pfc_head_update(head.raw, 0.1) })
    }

    /// Up to the backward.
    pub fn begin(&self, head: &Head) -> Outcome<()> {
        let (embeddings, gradient) = (self.embeddings.matrix(DIM), self.gradient.matrix(DIM));
        // SAFETY: a live handle; arrays on the GPU of the sizes that the head takes.
        unsafe {
            let (labels, loss) = (self.labels.pointer::<i64>().cast_const(), self.loss.pointer::<f64>());
            outcome(c_head::pfc_head_forward(head.raw, &embeddings, labels, loss))?;
            outcome(c_head::pfc_head_backward(head.raw, 1.0, 1.0, &gradient))
        }
    }
}

fn head(device: &Device, comm: &Comm) -> Head {
    head_of(CLASSES, 64.0, device, comm)
}

fn head_of(classes: u64, scale: f64, device: &Device, comm: &Comm) -> Head {
    let mut options = options(classes, DIM as u32, ROWS as u64);
    (options.sample_rate, options.margin.scale) = (0.5, scale);
    Head::create(device, comm, &to_c(&options)).expect("a head")
}

#[test]
fn nothing_in_a_step_waits_and_the_numbers_are_those_of_a_host_loss() {
    waits_for_nothing(CLASSES, 64.0);
}

/// Nor where rows may be far from all negatives, which only the GPU learns.
#[test]
fn nothing_in_a_step_of_few_classes_at_a_large_scale_waits() {
    waits_for_nothing(2, 128.0);
}

fn waits_for_nothing(classes: u64, scale: f64) {
    let turn = emulator::turn(1);
    let (device, comm) = (gpu(), Comm::solo());
    let steps: Vec<Step> = (0..3).map(|number| Step::draw_of(classes, 0, number, false)).collect();
    let mut late = head_of(classes, scale, &device, &comm);
    let waits = || WAITS.map(|function| turn.calls(function));
    let before = waits();
    for step in &steps {
        step.run(&late).expect("an enqueued step");
    }
    assert_eq!(waits(), before, "{WAITS:?}");
    late.wait().expect("three good steps");

    let mut now = head_of(classes, scale, &device, &comm);
    for (number, step) in steps.iter().enumerate() {
        let (late_loss, late_gradient) = (step.loss.read::<f64>()[0], step.gradient.read::<f32>());
        let mut loss = 0.0;
        let (embeddings, gradient) = (step.embeddings.matrix(DIM), step.gradient.matrix(DIM));
        // SAFETY: as in `run`; the loss is the host's.
        unsafe {
            let labels = step.labels.pointer::<i64>().cast_const();
            outcome(c_head::pfc_head_forward(now.raw, &embeddings, labels, &mut loss)).expect("forward");
            outcome(c_head::pfc_head_backward(now.raw, 1.0, 1.0, &gradient)).expect("backward");
            outcome(c_head::pfc_head_update(now.raw, 0.1)).expect("update");
        }
        assert!(loss > 0.0);
        assert_eq!(late_loss.to_bits(), loss.to_bits(), "step {number}");
        now.wait().expect("a good step");
        assert_eq!(late_gradient, step.gradient.read::<f32>(), "step {number}");
    }
    assert_eq!(late.centers(), now.centers());
}

/// A trainer's backward may begin beside the update: the gradient does not wait for a product that, here, never comes.
#[test]
fn a_lone_rank_has_its_gradient_before_the_update() {
    let turn = emulator::turn(4);
    if !turn.is_emulator() {
        return;
    }
    let (device, comm) = (gpu(), Comm::solo());
    let step = Step::draw(0, 0, false);
    let whole = |head: &Head| {
        let (embeddings, gradient) = (step.embeddings.matrix(DIM), step.gradient.matrix(DIM));
        let (labels, loss) = (step.labels.pointer::<i64>().cast_const(), step.loss.pointer::<f64>());
        // SAFETY: as in `begin`.
        outcome(unsafe { c_head::pfc_head_step(head.raw, &embeddings, labels, 0.1, &gradient, loss) })
    };
    let sound = head(&device, &comm);
    whole(&sound).expect("a step");
    let expected = step.gradient.read::<f32>();
    assert!(expected.iter().all(|&value| value != -123.0));
    let failing = head(&device, &comm);
    let untouched = Step { gradient: Remote::of(&[-123f32; ROWS * DIM]), ..Step::draw(0, 0, false) };
    const OUT_OF_RESOURCES: i32 = 701;
    turn.fail("gemm_center_gradient_half_128", 1, OUT_OF_RESOURCES);
    let (embeddings, gradient) = (untouched.embeddings.matrix(DIM), untouched.gradient.matrix(DIM));
    // SAFETY: as in `begin`.
    let told = outcome(unsafe {
        let (labels, loss) = (untouched.labels.pointer::<i64>().cast_const(), untouched.loss.pointer::<f64>());
        c_head::pfc_head_step(failing.raw, &embeddings, labels, 0.1, &gradient, loss)
    });
    assert_eq!(told.expect_err("an update").status, Status::Device as i32);
    assert_eq!(untouched.gradient.read::<f32>(), expected);
}

#[test]
fn a_step_that_fails_with_its_loss_on_the_host_hides_none_before_it() {
    let _turn = emulator::turn(3);
    let (device, comm) = (gpu(), Comm::solo());
    let mut head = head(&device, &comm);
    let bad = Step::draw(0, 0, true);
    bad.run(&head).expect("nothing is known yet");
    let mut loss = 0.0;
    let embeddings = bad.embeddings.matrix(DIM);
    // SAFETY: as in `run`; the loss is the host's.
    let told =
        unsafe { outcome(c_head::pfc_head_forward(head.raw, &embeddings, bad.labels.pointer::<i64>().cast_const(), &mut loss)) };
    assert_eq!(told.expect_err("the same labels").status, Status::Label as i32);
    let late = head.wait().expect_err("the step before");
    assert_eq!(late.status, Status::Label as i32);
    assert!(late.message.contains("step 0: ") && !late.message.contains("steps after it"), "{late:?}");
    head.wait().expect("told once");
}

#[test]
fn a_bad_label_comes_late_on_every_rank_and_changes_nothing() {
    let _turn = emulator::turn(2);
    let told = on_ranks(2, |place| {
        let device = gpu();
        let mut head = head(&device, &place.comm);
        let good = Step::draw(place.rank, 0, false);
        good.run(&head).expect("an enqueued step");
        head.wait().expect("a good step");
        let (centers, momentum) = (head.centers(), head.momentum());
        // Rank 1's fourth label is no class; the step after it is sound.
        let (bad, next) = (Step::draw(place.rank, 1, place.rank == 1), Step::draw(place.rank, 2, false));
        bad.run(&head).expect("nothing is known yet");
        let failure = head.wait().expect_err("a label that is no class");
        assert!(bad.loss.read::<f64>()[0].is_nan());
        assert!(bad.gradient.read::<f32>().iter().all(|&g| g == 0.0));
        assert_eq!((head.centers(), head.momentum()), (centers.clone(), momentum));
        head.wait().expect("told once");
        next.run(&head).expect("the head goes on");
        head.wait().expect("a good step");
        assert!(head.centers() != centers);
        failure
    });
    for failure in &told {
        assert_eq!(failure.status, Status::Label as i32);
        for words in ["step 1", "labels[3] must be 0 to 39 or ignore_label, got 40 (rank 1)"] {
            assert!(failure.message.contains(words), "{words:?} is not in: {}", failure.message);
        }
    }
}
