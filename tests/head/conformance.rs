//! The conformance vectors through the C interface: the head does what the PyTorch implementation of PartialFC did.

use partialfc::options::{HeadOptions, Precision};
use partialfc_testing::capi::{Device, Head, Rows, LEAST};
use partialfc_testing::emulator;
use partialfc_testing::gpu::gpu;
use partialfc_testing::numbers::{assert_close, widen};
use partialfc_testing::ranks::on_ranks;
use partialfc_testing::vectors::{Vectors, FOLDER, NAMES};

/// Design section 8: relative L2 of loss, gradients and state in float32.
const TOLERANCE: f64 = 1e-4;

/// The same for 16-bit operands, at d = 512.
const HALF_TOLERANCE: f64 = 4e-3;

/// Replays the file on as many ranks as it was made on, with its own options but for `workspace_limit` and planted faults.
fn replay(vectors: &Vectors, threads: u32, options: HeadOptions) {
    replay_on(vectors, threads, options, || Device::under_test(threads));
}

fn replay_on(vectors: &Vectors, threads: u32, options: HeadOptions, device: impl Fn() -> Device + Sync) {
    let workspace_limit = options.workspace_limit;
    let tolerance = if options.precision == Precision::Half { HALF_TOLERANCE } else { TOLERANCE };
    let adamw = vectors.text("opt") == "adamw";
    let dim = options.embedding_dim as usize;
    on_ranks(vectors.ranks(), |place| {
        let what = |step: usize, tensor: &str| {
            format!("{} threads {threads} workspace {workspace_limit} rank {} step {step} {tensor}", vectors.name, place.rank)
        };
        let device = device();
        let mut head = Head::new(&device, &place.comm, &options);
        let (first, _) = head.shard();
        let start = vectors.rows(place.rank, "weight_initial");
        head.write_centers(first, &start).expect("start values");
        for k in 0..vectors.steps() {
            let step = vectors.step(place.rank, k);
            head.set_sample(&step.sample).expect("the file's sample");
            let mut embeddings = Rows::f32(&step.embeddings, dim);
            let loss = head.forward(&mut embeddings, Some(&step.labels)).expect("forward");
            assert_eq!(head.sample_ids().expect("ids"), step.sample, "{}", what(k, "sample"));
            let mut grad = Rows::output(step.labels.len(), dim);
            head.backward(1.0, 1.0, &mut grad).expect("backward");
            head.update(vectors.number("lr")).expect("update");
            assert_close(&what(k, "loss"), &[loss], &[step.loss], tolerance);
            assert_close(&what(k, "embedding_grad"), &grad.values(), &widen(&step.embedding_grad), tolerance);
            if k == 0 {
                let found = first_center_grad(vectors, &mut head, &step.sample, &start);
                assert_close(&what(k, "center_grad"), &found, &widen(&step.center_grad), tolerance);
            }
        }
        let last = vectors.steps() - 1;
        assert_close(
            &what(last, "weight_final"),
            &widen(&head.centers()),
            &widen(&vectors.rows(place.rank, "weight_final")),
            tolerance,
        );
        let momentum = widen(&vectors.rows(place.rank, "momentum_final"));
        assert_close(&what(last, "momentum_final"), &widen(&head.momentum()), &momentum, tolerance);
        if adamw {
            let second = widen(&vectors.rows(place.rank, "second_moment_final"));
            assert_close(&what(last, "second_moment_final"), &widen(&head.second_moment()), &second, tolerance);
        }
    });
}

/// The gradient of the first step's class centers, got back from the first moment, which started at zero: SGD leaves g + wd * w there.
fn first_center_grad(vectors: &Vectors, head: &mut Head, sample: &[i64], start: &[f32]) -> Vec<f64> {
    let (first, _) = head.shard();
    let momentum = head.momentum();
    let dim = head.dim;
    let rows = sample.iter().map(|&id| (id as usize - first as usize) * dim);
    rows.flat_map(|at| at..at + dim)
        .map(|at| match vectors.text("opt") {
            "sgd" => f64::from(momentum[at]) - vectors.number("wd") * f64::from(start[at]),
            _ => f64::from(momentum[at]) / (1.0 - vectors.number("beta1")),
        })
        .collect()
}

fn check(name: &'static str) {
    let vectors = Vectors::load(name);
    for threads in [1, 2] {
        for workspace_limit in [0, LEAST] {
            replay(&vectors, threads, HeadOptions { workspace_limit, ..vectors.options() });
        }
    }
}

macro_rules! vectors {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            check(stringify!($name));
        })*

        #[test]
        fn every_file_has_its_test() {
            assert_eq!([$(stringify!($name)),*], NAMES);
            let files = std::fs::read_dir(FOLDER).expect(FOLDER).filter_map(|entry| entry.ok());
            let mut names: Vec<String> = files
                .filter_map(|file| file.file_name().to_string_lossy().strip_suffix(".safetensors").map(str::to_owned))
                .collect();
            names.sort();
            assert_eq!(names, NAMES);
        }
    };
}

vectors! {
    arcface_adamw_two_ranks
    arcface_filter_two_ranks_dense_rows
    arcface_one_rank_d512_tenth
    arcface_one_rank_full
    arcface_two_ranks_uneven_half
    combined_two_ranks_positives_only
    cosface_four_ranks_tenth
    sphereface_one_rank
}

/// On the CPU, and on a GPU, emulated or not, whatever the others run on.
#[test]
fn half_precision_stays_near() {
    let _turn = emulator::turn(1);
    let vectors = Vectors::load("arcface_one_rank_d512_tenth");
    for workspace_limit in [0, LEAST] {
        let options = HeadOptions { workspace_limit, precision: Precision::Half, ..vectors.options() };
        replay_on(&vectors, 2, options.clone(), || Device::cpu(2));
        replay_on(&vectors, 1, options, gpu);
    }
}

#[test]
fn a_planted_fault_is_seen() {
    let vectors = Vectors::load("arcface_two_ranks_uneven_half");
    let mut faulty = vectors.options();
    faulty.margin.m2 += 1e-3;
    let caught = std::panic::catch_unwind(|| replay(&vectors, 1, faulty)).expect_err("a margin that is 1e-3 off goes unseen");
    let text = caught.downcast_ref::<String>().expect("an assertion's text");
    assert!(text.contains("relative L2"), "another failure: {text}");
}
