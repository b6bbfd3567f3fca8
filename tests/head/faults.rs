//! Every operation of a head's life going wrong on every rank in every way: each rank gets a status, nothing hangs, and a new head
//! then trains as if nothing had been.
//!
//! The ranks are joined by functions of the caller's ([`partialfc_testing::transport`]), as MPI's or a trainer's own would be. `./test`
//! runs all of it on the CPU, once more with `PFC_CHECK=1`, where each operation has another before it, and on the emulated GPU, whose messages go
//! through host memory; tests/nccl/head.rs has the same for messages that stay on a GPU's streams.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::Mutex;
use std::time::Duration;

use partialfc::options::{HeadOptions, Placement};
use partialfc::Status;
use partialfc_testing::capi::{on_cuda, options, Device, Failure, Head, Rows};
use partialfc_testing::ranks::on_comms;
use partialfc_testing::training::{bits, Batch};
use partialfc_testing::transport::{group, Fault};

const ROWS: usize = 4;
/// Ranks that nobody tells of a silent one wait so long.
const TIMEOUT_MS: u64 = 300;
/// What no operation takes that is waited for, however busy the machine is.
const AGES_MS: u64 = 300_000;

/// Ranks, and steps of each way of calling: fewer where an emulator takes them.
fn size() -> (usize, usize) {
    if on_cuda() {
        (2, 1)
    } else {
        (3, 2)
    }
}

fn placements() -> [HeadOptions; 2] {
    let sharded = HeadOptions { sample_rate: 0.5, ..options(20, 5, ROWS as u64) };
    [HeadOptions { placement: Placement::Replicated, ..sharded.clone() }, sharded]
}

/// Creation, steps one way and the other, figures, other classes and a search: all that ranks do together. The bits of what came out.
fn live(options: &HeadOptions, rank: usize, comm: &partialfc_testing::capi::Comm) -> Result<Vec<u32>, Failure> {
    let mut head = Head::with(&Device::under_test(1), comm, options)?;
    let mut grad = Rows::output(ROWS, head.dim);
    let mut losses = Vec::new();
    for step in 0..size().1 {
        let batch = Batch::draw(options, rank, step, ROWS);
        head.prepare(&batch.labels)?;
        losses.push(head.forward(&mut batch.rows(head.dim), None)? as f32);
        head.backward(1.0, 1.0, &mut grad)?;
        head.update(0.1)?;
        losses.push(head.step(&mut batch.rows(head.dim), &batch.labels, 0.1, &mut grad)? as f32);
    }
    losses.push(head.metrics()?.grad_centers_norm as f32);
    if !on_cuda() {
        head.resize(options.num_classes + 3)?;
    }
    let (_, cosines) = head.top_k(&mut Batch::draw(options, rank, 0, ROWS).rows(head.dim), 3)?;
    Ok([bits(&losses), bits(&cosines), bits(&head.centers())].concat())
}

/// What each rank's life came to with a fault planted on one of them.
fn with_fault(options: &HeadOptions, planted: Option<(usize, i64, Fault)>, timeout_ms: u64) -> Vec<Result<Vec<u32>, Failure>> {
    let (comms, transports) = group(size().0 as u32);
    if let Some((rank, at, fault)) = planted {
        transports[rank].plant(at, fault);
        if fault == Fault::Hang {
            transports.iter().for_each(|transport| transport.silence());
        }
    }
    on_comms(comms, |place| {
        place.comm.set_timeout(Duration::from_millis(timeout_ms));
        live(options, place.rank, &place.comm)
    })
}

/// Operations of a life.
fn operations(options: &HeadOptions) -> i64 {
    let (comms, transports) = group(size().0 as u32);
    on_comms(comms, |place| live(options, place.rank, &place.comm).expect("a life without faults"));
    transports[0].operations()
}

fn status_of(found: &Result<Vec<u32>, Failure>) -> i32 {
    found.as_ref().map_or_else(|failure| failure.status, |_| 0)
}

/// Cases at once: most of them only wait for a timeout. The emulator computes one at a time.
fn workers() -> usize {
    if on_cuda() {
        2
    } else {
        16
    }
}

/// Runs a case for every rank and operation, and a life without faults after them.
fn for_all(
    fault: Fault,
    timeout_ms: u64,
    check: impl Fn(&str, usize, &[Result<Vec<u32>, Failure>], &[Result<Vec<u32>, Failure>]) + Sync,
) {
    for options in placements() {
        let sound = with_fault(&options, None, AGES_MS);
        let operations = operations(&options);
        let next = AtomicI64::new(0);
        let work = || loop {
            let case = next.fetch_add(1, Ordering::Relaxed);
            let (rank, at) = ((case / operations) as usize, case % operations);
            if rank >= size().0 {
                break;
            }
            let what = format!("{:?}: {fault:?} in operation {at} of rank {rank}", options.placement);
            check(&what, rank, &with_fault(&options, Some((rank, at, fault)), timeout_ms), &sound);
        };
        std::thread::scope(|scope| (0..workers()).for_each(|_| drop(scope.spawn(work))));
        let after: Vec<_> = with_fault(&options, None, AGES_MS).into_iter().map(|life| life.expect("a new head")).collect();
        assert_eq!(after, sound.into_iter().map(|life| life.expect("no fault")).collect::<Vec<_>>());
    }
}

#[test]
fn a_code_is_heard_of_by_all() {
    for_all(Fault::Code, AGES_MS, |what, rank, found, _| {
        for (other, life) in found.iter().enumerate() {
            let failure = life.as_ref().expect_err(what);
            if other == rank {
                assert_eq!(failure.status, Status::Comm as i32, "{what}: {failure:?}");
                assert!(failure.message.contains(&format!("rank {rank}")), "{what}: {failure:?}");
                assert!(failure.message.contains("4242"), "{what}: {failure:?}");
            } else {
                let told = [Status::Comm, Status::Aborted, Status::Poisoned].map(|status| status as i32);
                assert!(told.contains(&failure.status), "{what}, on rank {other}: {failure:?}");
            }
        }
    });
}

#[test]
fn silence_is_a_timeout_on_all() {
    for_all(Fault::Hang, TIMEOUT_MS, |what, _, found, _| {
        for (other, life) in found.iter().enumerate() {
            let failure = life.as_ref().expect_err(what);
            assert_eq!(failure.status, Status::Timeout as i32, "{what}, on rank {other}: {failure:?}");
            assert!(failure.message.contains(&format!("{TIMEOUT_MS} ms")), "{what}: {failure:?}");
            assert!(failure.message.contains('#'), "{what}, an operation is named: {failure:?}");
        }
    });
}

#[test]
fn a_delay_within_the_timeout_changes_nothing() {
    for_all(Fault::Delay(Duration::from_millis(5)), AGES_MS, |what, _, found, sound| {
        for (life, sound) in found.iter().zip(sound) {
            assert_eq!(life.as_ref().expect(what), sound.as_ref().expect("no fault"), "{what}");
        }
    });
}

/// Wrong bytes may pass for a loss that is merely wrong. They must not end a process or leave ranks waiting for each other.
#[test]
fn short_and_wrong_data_end_in_a_status() {
    for fault in [Fault::Short, Fault::Wrong] {
        let seen = Mutex::new(Vec::new());
        for_all(fault, 2_000, |_, _, found, _| seen.lock().expect("no panic").extend(found.iter().map(status_of)));
        let mut seen = seen.into_inner().expect("no panic");
        seen.sort_unstable();
        seen.dedup();
        // Some of it is noticed, and never as a panic.
        assert!(seen.len() > 1 && !seen.contains(&(Status::Panic as i32)), "{fault:?}: {seen:?}");
    }
}
