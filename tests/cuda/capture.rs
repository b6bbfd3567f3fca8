//! CUDA graphs: a trainer captures one while heads work on other streams, or calls a head whose own stream it captures.
//!
//! On the emulator, which knows the rules of captures but keeps no graphs, or with `PFC_TEST_DRIVER=real` on a GPU.

use std::path::Path;

use partialfc::capi::head as c_head;
use partialfc::options::{HeadOptions, Placement};
use partialfc::Status;
use partialfc_testing::capi::{outcome, Comm, Head, Outcome, Rows};
use partialfc_testing::emulator;
use partialfc_testing::gpu::{gpu, gpu_apart, gpu_on, new_blocking_stream, new_stream, Capture, Remote};
use partialfc_testing::ranks::{on_ranks, Rank};
use partialfc_testing::training::{train_step, Trace};

use super::device::{assert_told, embeddings, small, DIM, LABELS, ROWS};

/// All that a head does in its life: it grows, steps, says how it went, is read and freed.
fn live(place: &Rank, options: &HeadOptions) -> Trace {
    let mut head = Head::new(&gpu_apart(), &place.comm, options);
    let mut trace = Trace::default();
    for step in 0..3 {
        train_step(&mut head, place, options, step, &mut trace);
    }
    head.prepare(&LABELS).expect("prepare");
    head.forward(&mut embeddings(), None).expect("forward");
    head.last_metrics().expect("metrics");
    head.wait().expect("wait");
    trace.saw_rows(&mut head, options);
    trace
}

#[test]
fn a_capture_of_another_stream_stays_valid() {
    let _turn = emulator::turn(31);
    for placement in [Placement::Sharded, Placement::Replicated] {
        let options = HeadOptions { placement, ..small() };
        let expected = on_ranks(2, |place| live(place, &options));
        // The ranks are threads of their own here, and this one captures.
        let capture = Capture::begin(new_stream());
        let found = on_ranks(2, |place| live(place, &options));
        assert_eq!(capture.end(), 0, "{placement:?}: the capture is invalid");
        assert!(found == expected, "{placement:?}");
    }
    // The thread that captures calls the head itself.
    let alone = |capturing: bool| {
        let capture = capturing.then(|| Capture::begin(new_stream()));
        let place = Rank { rank: 0, size: 1, comm: Comm::solo() };
        let trace = live(&place, &small());
        assert_eq!(capture.map_or(0, Capture::end), 0, "the capture is invalid");
        trace
    };
    assert!(alone(true) == alone(false));
}

/// Every call that enqueues, on a stream that is captured. Each is refused as if it had not been made.
fn refused_calls(head: &mut Head) -> Vec<(&'static str, Outcome)> {
    let mut grad = Rows::output(ROWS, DIM);
    vec![
        ("prepare", head.prepare(&LABELS)),
        ("forward", head.forward(&mut embeddings(), Some(&LABELS)).map(|_| ())),
        ("step", head.step(&mut embeddings(), &LABELS, 0.1, &mut grad).map(|_| ())),
        ("backward", head.backward(1.0, 1.0, &mut grad)),
        ("accumulate", head.accumulate()),
        ("update", head.update(0.1)),
        ("wait", head.wait()),
        ("metrics", head.metrics().map(|_| ())),
        ("top_k", head.top_k(&mut embeddings(), 1).map(|_| ())),
        ("sample_ids", head.sample_ids().map(|_| ())),
        ("read_centers", head.read_centers(0, 1).map(|_| ())),
        ("write_centers", head.write_centers(0, &[0.0; DIM])),
        ("read_progress", head.read_progress().map(|_| ())),
        ("save", head.save(Path::new("/nowhere"))),
        ("load", head.load(Path::new("/nowhere"))),
    ]
}

#[test]
fn calls_on_a_captured_stream_are_refused_and_leave_all_as_it_was() {
    let _turn = emulator::turn(32);
    for placement in [Placement::Sharded, Placement::Replicated] {
        let options = HeadOptions { placement, ..small() };
        let train = |place: &Rank, captures: bool| {
            let stream = new_stream();
            let device = gpu_on(stream);
            let mut head = Head::new(&device, &place.comm, &options);
            let mut bits = Vec::new();
            for step in 0..3 {
                // In one step between the calls, in the others before them.
                let refuse = |head: &mut Head, when: usize| {
                    if !captures || when != step % 2 {
                        return;
                    }
                    let capture = Capture::begin(stream);
                    for (call, result) in refused_calls(head) {
                        let told = [&format!("rank {}", place.rank)[..], "captured into a CUDA graph", "stream"];
                        assert_told(call, result, Status::InvalidArgument, &told);
                    }
                    assert_eq!(capture.end(), 0, "the capture is invalid");
                };
                refuse(&mut head, 0);
                let loss = head.forward(&mut embeddings(), Some(&LABELS)).expect("forward");
                let mut grad = Rows::output(ROWS, DIM);
                refuse(&mut head, 1);
                head.backward(1.0, 1.0, &mut grad).expect("backward");
                refuse(&mut head, 1);
                head.update(0.1).expect("update");
                bits.push((loss.to_bits(), grad.values_f32().iter().map(|value| value.to_bits()).collect::<Vec<_>>()));
            }
            let (first, count) = head.shard();
            (bits, head.read_centers(first, count).expect("W"))
        };
        // The ranks that do not capture wait in their calls for the one that does.
        for who in [None, Some(1), Some(0)] {
            let found = on_ranks(2, |place| train(place, who.is_none_or(|rank| rank == place.rank)));
            assert!(found == on_ranks(2, |place| train(place, false)), "{placement:?}: {who:?}");
        }
    }
}

#[test]
fn a_head_is_not_made_but_freed_while_its_stream_is_captured() {
    let _turn = emulator::turn(33);
    let stream = new_stream();
    let device = gpu_on(stream);
    let head = Head::new(&device, &Comm::solo(), &small());
    let (there, labels, loss) = (Remote::of(&embeddings().values_f32()), Remote::of(&LABELS), Remote::of(&[0f64]));
    // Its work is still on the stream when the capture begins.
    // SAFETY: a live head; arrays on the GPU of the sizes that it takes.
    let left =
        outcome(unsafe { c_head::pfc_head_forward(head.raw, &there.matrix(DIM), labels.pointer::<i64>(), loss.pointer::<f64>()) });
    left.expect("forward");
    let capture = Capture::begin(stream);
    let made = Head::with(&device, &Comm::solo(), &small()).map(drop);
    assert_told("create", made, Status::InvalidArgument, &["captured into a CUDA graph", "rank 0"]);
    // The other rank hears of it.
    let told = on_ranks(2, |place| {
        let device = if place.rank == 1 { gpu_on(stream) } else { gpu_apart() };
        Head::with(&device, &place.comm, &small()).map(drop)
    });
    assert_told("rank 0", told[0].clone(), Status::Remote, &["rank 1"]);
    assert_told("rank 1", told[1].clone(), Status::InvalidArgument, &["captured into a CUDA graph", "rank 1"]);
    drop(head);
    assert_eq!(capture.end(), 0, "the capture is invalid");
}

/// The legacy default stream waits for every stream that did not say otherwise, and cannot be used while one of them is captured.
#[test]
fn the_null_stream_is_refused_while_a_stream_that_it_waits_for_is_captured() {
    let _turn = emulator::turn(34);
    let [mut head, mut undisturbed] = [(); 2].map(|()| Head::new(&gpu(), &Comm::solo(), &small()));
    let first = head.forward(&mut embeddings(), Some(&LABELS)).expect("forward");
    let capture = Capture::begin(new_blocking_stream());
    let refused = head.forward(&mut embeddings(), Some(&LABELS)).map(|_| ());
    assert_told("forward", refused, Status::InvalidArgument, &["stream", "captured into a CUDA graph", "rank 0"]);
    assert_eq!(capture.end(), 0, "the capture is invalid");
    let second = head.forward(&mut embeddings(), Some(&LABELS)).expect("forward");
    let expected = [(); 2].map(|()| undisturbed.forward(&mut embeddings(), Some(&LABELS)).expect("forward"));
    assert_eq!([first, second], expected);
}
