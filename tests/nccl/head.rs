//! Heads whose ranks NCCL joins: the bits and the traffic of every placement, steps that make nobody wait, and every operation of a
//! head's life going wrong on every rank.
//!
//! Ranks of one process have a stream each: on a common one a rank's work would come after another's wait for it.
//!
//! On the emulated GPU and the stand-in of `testing/nccl-standin`; with `PFC_TEST_DRIVER=real` on a GPU and NCCL itself, as far as these can.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use partialfc::capi::head as c_head;
use partialfc::options::{HeadOptions, Placement, Precision, RowUpdate};
use partialfc::Status;
use partialfc_testing::capi::{options, outcome, plan, to_c, traffic_between, Comm, Device, Failure, Head, Outcome, Rows};
use partialfc_testing::emulator;
use partialfc_testing::gpu::{gpu_apart, gpu_number, new_stream, Capture, Remote};
use partialfc_testing::nccl::{self, Fault};
use partialfc_testing::ranks::{on_comms, with_ample_time, Rank};
use partialfc_testing::training::{assert_same_bits, learning_rate, Batch, Trace, ADAMW};

const RANKS: usize = 2;
const ROWS: usize = 5;
/// Ranks that nobody tells of a silent one wait so long.
const TIMEOUT_MS: u64 = 300;
/// What no operation takes that is waited for, however busy the machine is.
const AGES_MS: u64 = 300_000;
/// As nccl.h has them.
const SYSTEM_ERROR: i32 = 2;
const REMOTE_ERROR: i32 = 6;

/// Data parallel, data parallel over a sample, model parallel, PartialFC.
fn placements() -> [HeadOptions; 4] {
    [(Placement::Replicated, 1.0), (Placement::Replicated, 0.5), (Placement::Sharded, 1.0), (Placement::Sharded, 0.5)]
        .map(|(placement, sample_rate)| HeadOptions { placement, sample_rate, ..options(37, 6, ROWS as u64) })
}

/// Three steps, one of them prepared in the middle of the one before, the last in one call.
fn train(place: &Rank, options: &HeadOptions) -> Trace {
    let mut head = Head::new(&gpu_apart(), &place.comm, options);
    let mut trace = Trace::default();
    // A head that makes room for its batches has room for 8 rows at first. The first step grows: later ones would free memory, which waits
    // for the collectives of other ranks on the same emulated GPU.
    let rows = if options.max_batch == 0 { 2 * ROWS } else { ROWS };
    let batch = |step| Batch::draw(options, place.rank, step, rows - place.rank % 2);
    for step in 0..3 {
        let Batch { labels, .. } = batch(step);
        let mut rows = batch(step).rows(head.dim);
        let mut grad = Rows::output(labels.len(), head.dim);
        let loss = match step {
            2 => head.step(&mut rows, &labels, learning_rate(step), &mut grad).expect("step"),
            _ => {
                let loss = head.forward(&mut rows, Some(&labels)).expect("forward");
                if step == 0 {
                    head.prepare(&batch(1).labels).expect("prepare");
                }
                head.backward(1.0, 1.0, &mut grad).expect("backward");
                head.update(learning_rate(step)).expect("update");
                loss
            }
        };
        trace.saw_step(loss, &grad, head.sample_ids().expect("a sample"));
    }
    trace.saw_rows(&mut head, options);
    trace
}

#[test]
fn every_placement_has_the_bits_that_threads_give() {
    let turn = emulator::turn(1);
    let _standin = nccl::emulated(&turn);
    // Three ranks on the emulator, for whose sums the order counts.
    let size = nccl::most_ranks(&turn).min(3);
    for base in placements() {
        for (precision, optimizer, row_update) in
            [(Precision::F32, base.optimizer, RowUpdate::Dense), (Precision::Half, ADAMW, RowUpdate::Lazy)]
        {
            // The lazy heads make room for their batches.
            let max_batch = if row_update == RowUpdate::Lazy { 0 } else { ROWS as u64 };
            let options = HeadOptions { precision, optimizer, row_update, max_batch, ..base.clone() };
            let carried = on_comms(nccl::group(size), |place| train(place, &options));
            let expected = on_comms(Comm::threads(size as u32), |place| train(place, &options));
            assert_same_bits(&format!("{options:?}"), &carried, &expected);
        }
    }
}

/// The watchdog looks at what is on the streams from a thread of its own, all the time that one of the operations takes.
#[test]
fn the_watchdog_leaves_a_capture_in_the_process_valid() {
    let turn = emulator::turn(9);
    let Some(standin) = nccl::emulated(&turn) else { return };
    let options = &placements()[3];
    let comms = nccl::group(RANKS);
    (0..RANKS).for_each(|rank| standin.plan(rank as i32, 3, Fault::Delay(200)));
    let capture = Capture::begin(new_stream());
    on_comms(comms, |place| {
        let mut head = Head::new(&gpu_apart(), &place.comm, options);
        let batch = Batch::draw(options, place.rank, 0, ROWS);
        head.step(&mut batch.rows(head.dim), &batch.labels, 0.1, &mut Rows::output(ROWS, head.dim)).expect("step");
    });
    assert_eq!(capture.end(), 0, "the capture is invalid");
}

/// It gets its part of the GPU so; behind P @ W^, which fills the GPU, it would come after it. Where the all-reduce is refused, neither that
/// product nor the verdict on the sums is launched.
#[test]
fn the_sums_are_handed_over_before_the_product_beside_them() {
    let turn = emulator::turn(10);
    let Some(standin) = nccl::emulated(&turn) else { return };
    // The head's options, labels and embeddings come before it.
    const SUMS: i32 = 3;
    let launches = |refused: bool| {
        standin.reset();
        if refused {
            standin.plan(0, SUMS, Fault::Enqueue(SYSTEM_ERROR));
        }
        let launched = || turn.calls("cuLaunchKernel").expect("the emulator's count");
        on_comms(nccl::group(1), |place| {
            let mut head = Head::new(&gpu_apart(), &place.comm, &placements()[3]);
            let (batch, before) = (Batch::draw(&placements()[3], 0, 0, ROWS), launched());
            let told = head.forward(&mut batch.rows(head.dim), Some(&batch.labels));
            assert_eq!(told.is_err(), refused, "{told:?}");
            launched() - before
        })
    };
    assert_eq!(launches(false)[0] - launches(true)[0], 2);
}

#[test]
fn a_step_hands_over_the_bytes_that_the_plan_names() {
    let turn = emulator::turn(3);
    let _standin = nccl::emulated(&turn);
    let size = nccl::most_ranks(&turn).min(RANKS);
    for base in placements() {
        for precision in [Precision::F32, Precision::Half] {
            let options = HeadOptions { precision, ..base.clone() };
            let report = plan(&to_c(&options), size as u32, ROWS as u64).expect("a plan");
            let planned = [
                report.labels_bytes + report.embeddings_bytes,
                report.sums_bytes + report.grad_centers_bytes,
                report.grad_embeddings_bytes,
                0,
            ];
            let counted = on_comms(nccl::group(size), |place| {
                let mut head = Head::new(&gpu_apart(), &place.comm, &options);
                let batch = Batch::draw(&options, place.rank, 0, ROWS);
                let before = place.comm.traffic();
                let mut grad = Rows::output(ROWS, head.dim);
                head.step(&mut batch.rows(head.dim), &batch.labels, 0.1, &mut grad).expect("step");
                traffic_between(&before, &place.comm.traffic())
            });
            assert_eq!(counted, vec![planned; size], "{options:?}");
        }
    }
}

#[test]
fn a_head_on_another_gpu_than_its_communicator_is_refused() {
    let turn = emulator::turn(8);
    let Some(_standin) = nccl::emulated(&turn) else { return };
    turn.devices(2);
    let (options, freed) = (&placements()[3], Barrier::new(RANKS));
    let told = on_comms(nccl::group(RANKS), |place| {
        let device = if place.rank == 1 { gpu_number(1) } else { gpu_apart() };
        let refused = Head::create(&device, &place.comm, &to_c(options)).err().expect("another GPU");
        // To free a head waits for all that is in its context, another rank's barrier included.
        freed.wait();
        // The communicator lives.
        place.comm.barrier().expect("a barrier");
        refused
    });
    turn.devices(1);
    assert_eq!(told[0].status, Status::Remote as i32, "{told:?}");
    assert_eq!(told[1].status, Status::InvalidArgument as i32, "{told:?}");
    assert!(told[1].message.contains("device must be GPU 0, as the NCCL communicator is, got GPU 1 (rank 1)"), "{told:?}");
    // A head on the CPU goes through the GPU.
    let on_cpu = |place: &Rank| {
        let mut head = Head::new(&Device::cpu(1), &place.comm, options);
        let batch = Batch::draw(options, place.rank, 0, ROWS);
        head.step(&mut batch.rows(head.dim), &batch.labels, 0.1, &mut Rows::output(ROWS, head.dim)).expect("step").to_bits()
    };
    assert_eq!(on_comms(nccl::group(RANKS), on_cpu), on_comms(Comm::threads(RANKS as u32), on_cpu));
}

/// Driver functions that make the host wait.
const WAITS: [&str; 5] = ["cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize", "cuMemcpyDtoH_v2", "cuMemcpyHtoD_v2"];

/// A step's arrays on the GPU: embeddings, labels, gradient, loss.
fn arrays(options: &HeadOptions, rank: usize, step: usize) -> [Remote; 4] {
    let batch = Batch::draw(options, rank, step, ROWS);
    let gradient = vec![-123f32; batch.embeddings.len()];
    [Remote::of(&batch.embeddings), Remote::of(&batch.labels), Remote::of(&gradient), Remote::of(&[-321f64])]
}

fn enqueue(head: &Head, [embeddings, labels, gradient, loss]: &[Remote; 4]) -> Outcome<()> {
    let (embeddings, gradient) = (embeddings.matrix(head.dim), gradient.matrix(head.dim));
    // SAFETY: a live handle; arrays on the GPU of the sizes that the head takes.
    unsafe {
        outcome(c_head::pfc_head_forward(head.raw, &embeddings, labels.pointer::<i64>().cast_const(), loss.pointer()))?;
        outcome(c_head::pfc_head_backward(head.raw, 1.0, 1.0, &gradient))?;
        outcome(c_head::pfc_head_update(head.raw, 0.1))
    }
}

#[test]
fn with_a_loss_on_the_gpu_no_rank_waits_in_a_step() {
    let turn = emulator::turn(4);
    let _standin = nccl::emulated(&turn);
    let size = nccl::most_ranks(&turn).min(RANKS);
    // A real driver does not count: there the steps are seen to come out alone.
    let (ready, done) = (Barrier::new(size), Barrier::new(size));
    for options in placements() {
        let waits = on_comms(nccl::group(size), |place| {
            let mut head = Head::new(&gpu_apart(), &place.comm, &options);
            let steps = [0, 1, 2].map(|step| arrays(&options, place.rank, step));
            ready.wait();
            let before = WAITS.map(|function| turn.calls(function));
            // Both have counted.
            ready.wait();
            let enqueued = steps.iter().try_for_each(|step| enqueue(&head, step));
            done.wait();
            let after = WAITS.map(|function| turn.calls(function));
            done.wait();
            enqueued.expect("enqueued steps");
            head.wait().expect("three good steps");
            assert!(steps.iter().all(|[.., loss]| loss.read::<f64>()[0] > 0.0));
            (before, after)
        });
        for (before, after) in waits {
            assert_eq!(before, after, "{WAITS:?}, {options:?}");
        }
    }
}

/// What is lost on the stream of a step that nobody waits for comes to light at the next call that does.
#[test]
fn a_loss_on_the_gpu_that_never_comes_is_a_timeout() {
    let turn = emulator::turn(5);
    let Some(standin) = nccl::emulated(&turn) else { return };
    let options = placements()[3].clone();
    // The creation's agreement is operation 0, of the next step labels are 1, embeddings 2, sums 3, gradient 4.
    for operation in 1..=4 {
        let run = |deadline: Duration| {
            standin.plan(1, operation, Fault::Hang);
            on_comms(nccl::group(RANKS), |place| {
                // The head goes before the arrays: it waits for the work under way, which uses them.
                let (device, step) = (gpu_apart(), arrays(&options, place.rank, 0));
                let mut head = Head::new(&device, &place.comm, &options);
                place.comm.set_timeout(deadline);
                let failure = enqueue(&head, &step).and_then(|()| head.wait()).and_then(|()| place.comm.barrier()).err();
                (failure, head.wait().err(), head.read_centers(0, 0).err())
            })
        };
        let named = format!("#{} did not finish", operation + 1);
        let (_, failures) = with_ample_time(run, |failures| {
            let told = failures[1].0.as_ref();
            told.is_some_and(|told| told.status == Status::Timeout as i32 && !told.message.contains(&named))
        });
        let (told, again, read) = &failures[1];
        let told = told.as_ref().expect("the planted rank's");
        assert_eq!(told.status, Status::Timeout as i32, "operation {operation}: {told:?}");
        assert!(told.message.contains(&named), "operation {operation}: {told:?}");
        for later in [again, read] {
            assert_eq!(later.as_ref().expect("poisoned").status, Status::Poisoned as i32, "operation {operation}");
        }
        let told = failures[0].0.as_ref().expect("rank 0 cannot go on either");
        assert_eq!(told.status, Status::Timeout as i32, "operation {operation}: {told:?}");
    }
}

/// Creation, a step in three calls, one in one, and figures: all that ranks do together. The bits of what came out.
fn live(options: &HeadOptions, place: &Rank) -> Result<Vec<u64>, Failure> {
    let mut head = Head::with(&gpu_apart(), &place.comm, options)?;
    let mut grad = Rows::output(ROWS, head.dim);
    let batch = Batch::draw(options, place.rank, 0, ROWS);
    head.prepare(&batch.labels)?;
    let mut seen = vec![head.forward(&mut batch.rows(head.dim), None)?];
    head.backward(1.0, 1.0, &mut grad)?;
    head.update(0.1)?;
    seen.push(head.step(&mut batch.rows(head.dim), &batch.labels, 0.1, &mut grad)?);
    seen.push(head.metrics()?.grad_centers_norm);
    let (first, count) = head.shard();
    seen.extend(head.read_centers(first, count)?.into_iter().map(f64::from));
    Ok(seen.into_iter().map(f64::to_bits).collect())
}

fn lives(options: &HeadOptions, timeout_ms: u64) -> Vec<Result<Vec<u64>, Failure>> {
    on_comms(nccl::group(RANKS), |place| {
        place.comm.set_timeout(Duration::from_millis(timeout_ms));
        live(options, place)
    })
}

#[test]
fn every_operation_may_go_wrong_on_every_rank() {
    let turn = emulator::turn(6);
    let Some(standin) = nccl::emulated(&turn) else { return };
    for options in [&placements()[1], &placements()[3]] {
        standin.reset();
        let sound = lives(options, AGES_MS);
        assert!(sound.iter().all(Result::is_ok), "{sound:?}");
        let operations = standin.operations(0);
        let faults =
            [Fault::Enqueue(SYSTEM_ERROR), Fault::Async(REMOTE_ERROR), Fault::Hang, Fault::Delay(5), Fault::Short, Fault::Wrong(0)];
        for fault in faults {
            for (rank, operation) in (0..RANKS).flat_map(|rank| (0..operations).map(move |operation| (rank, operation))) {
                let what = format!("{:?}: {fault:?} in operation {operation} of rank {rank}", options.placement);
                standin.reset();
                // Where it is told, ranks need not wait for it.
                standin.tell(!matches!(fault, Fault::Hang));
                standin.plan(rank as i32, operation as i32, fault);
                let begin = Instant::now();
                // Of wrong bytes a rank may make that it is done, and leave the others.
                let waits = matches!(fault, Fault::Hang | Fault::Short | Fault::Wrong(_));
                let found = lives(options, if waits { TIMEOUT_MS } else { AGES_MS });
                // Nobody waits for a timeout who is told.
                assert!(begin.elapsed() < Duration::from_millis(AGES_MS / 2), "{what}: {:?}", begin.elapsed());
                judge(&what, fault, rank, &found, &sound);
            }
        }
        standin.reset();
        assert_eq!(lives(options, AGES_MS), sound, "a new head after all that");
    }
}

fn judge(what: &str, fault: Fault, rank: usize, found: &[Result<Vec<u64>, Failure>], sound: &[Result<Vec<u64>, Failure>]) {
    let status = |life: &Result<Vec<u64>, Failure>| life.as_ref().map_or_else(|failure| failure.status, |_| 0);
    match fault {
        Fault::Delay(_) => assert_eq!(found, sound, "{what}"),
        // Wrong bytes may pass for a loss that is merely wrong. They must not end a process or leave ranks waiting for each other.
        Fault::Short | Fault::Wrong(_) => {
            assert!(found.iter().all(|life| status(life) != Status::Panic as i32), "{what}: {found:?}");
        }
        Fault::Enqueue(_) | Fault::Async(_) | Fault::Hang => {
            for (other, life) in found.iter().enumerate() {
                // Others may have had all they wanted when the rank fails in its last operations.
                let Err(failure) = life else {
                    assert_ne!(other, rank, "{what}");
                    continue;
                };
                let expected = match fault {
                    Fault::Hang => [Status::Timeout, Status::Timeout],
                    _ => [Status::Comm, Status::Comm],
                };
                assert!(expected.map(|status| status as i32).contains(&failure.status), "{what}, on rank {other}: {failure:?}");
                assert!(failure.message.contains(&format!("rank {other}")), "{what}: {failure:?}");
            }
        }
    }
}
