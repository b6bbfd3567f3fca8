//! Communicators that NCCL carries: its stand-in of `testing/nccl-standin` on the emulated GPU, or, with `PFC_TEST_DRIVER=real`, NCCL itself.

use std::time::{Duration, Instant};

use partialfc::capi::comm as c_comm;
use partialfc::comm::{unique_id, Communicator};
use partialfc::matrix::DType;
use partialfc::Status;
use partialfc_testing::capi::{outcome, Comm, Failure, Outcome};
use partialfc_testing::emulator;
use partialfc_testing::gpu::gpu;
use partialfc_testing::nccl::{self, Fault};
use partialfc_testing::processes::run_alone;
use partialfc_testing::ranks::{on_comms, with_ample_time, Rank, LONG};

/// As nccl.h has them.
const SYSTEM_ERROR: i32 = 2;
const REMOTE_ERROR: i32 = 6;

/// Whole numbers in floats, another for each rank and element: sums are exact.
fn values(rank: usize, count: usize) -> Vec<f32> {
    (0..count).map(|i| ((rank * 13 + i * 7) % 31) as f32 - 9.0).collect()
}

fn reduce(comm: &Comm, values: &mut [f32], op: i32) -> Outcome<()> {
    let (data, count) = (values.as_mut_ptr().cast(), values.len() as u64);
    // SAFETY: a live handle and as many values.
    outcome(unsafe { c_comm::pfc_comm_all_reduce(comm.0, data, data, count, DType::F32 as i32, op) })
}

fn gather(comm: &Comm, own: &[f32], ranks: usize) -> Outcome<Vec<f32>> {
    let mut all = vec![0f32; own.len() * ranks];
    let bytes = size_of_val(own) as u64;
    // SAFETY: a live handle, and memory of a block and of one for each rank.
    outcome(unsafe { c_comm::pfc_comm_all_gather(comm.0, own.as_ptr().cast(), all.as_mut_ptr().cast(), bytes) })?;
    Ok(all)
}

fn scatter(comm: &Comm, all: &[f32], ranks: usize, op: i32) -> Outcome<Vec<f32>> {
    let mut own = vec![0f32; all.len() / ranks];
    let (count, dtype) = (own.len() as u64, DType::F32 as i32);
    // SAFETY: a live handle, and memory of all parts and of one.
    outcome(unsafe { c_comm::pfc_comm_reduce_scatter(comm.0, all.as_ptr().cast(), own.as_mut_ptr().cast(), count, dtype, op) })?;
    Ok(own)
}

fn broadcast(comm: &Comm, values: &mut [f32], root: u32) -> Outcome<()> {
    // SAFETY: a live handle and as many bytes.
    outcome(unsafe { c_comm::pfc_comm_broadcast(comm.0, values.as_mut_ptr().cast(), size_of_val(values) as u64, root) })
}

/// Every operation on host memory against a plain loop.
fn all_operations(place: &Rank, count: usize) {
    let Rank { rank, size, comm } = place;
    let all: Vec<Vec<f32>> = (0..*size).map(|rank| values(rank, count)).collect();
    let combined = |op: fn(f32, f32) -> f32| -> Vec<f32> {
        (0..count).map(|i| all.iter().map(|values| values[i]).reduce(op).expect("a rank")).collect()
    };
    assert_eq!(gather(comm, &all[*rank], *size).expect("gather"), all.concat());
    for (op, combine) in [(c_comm::PFC_SUM, (|a, b| a + b) as fn(f32, f32) -> f32), (c_comm::PFC_MAX, f32::max)] {
        let mut reduced = all[*rank].clone();
        reduce(comm, &mut reduced, op).expect("reduce");
        assert_eq!(reduced, combined(combine));
        let part = count / size;
        let own = scatter(comm, &all[*rank][..part * size], *size, op).expect("scatter");
        assert_eq!(own, combined(combine)[rank * part..(rank + 1) * part]);
    }
    for root in 0..*size {
        let mut buffer = all[*rank].clone();
        broadcast(comm, &mut buffer, root as u32).expect("broadcast");
        assert_eq!(buffer, all[root]);
    }
    comm.barrier().expect("barrier");
}

#[test]
fn every_operation_of_host_memory() {
    for seed in 0..4 {
        let turn = emulator::turn(seed);
        let _standin = nccl::emulated(&turn);
        for size in 1..=nccl::most_ranks(&turn) {
            on_comms(nccl::group(size), |place| {
                // The watchdog's thread and this one's calls need the context.
                let _device = gpu();
                [0, 1, 5, 1000].into_iter().for_each(|count| all_operations(place, count));
            });
        }
    }
}

#[test]
fn what_nccl_does_not_take_at_once_is_waited_for() {
    let turn = emulator::turn(5);
    let Some(standin) = nccl::emulated(&turn) else { return };
    standin.in_progress(3);
    on_comms(nccl::group(3), |place| all_operations(place, 100));
}

#[test]
fn a_nan_is_the_largest() {
    let turn = emulator::turn(6);
    let _standin = nccl::emulated(&turn);
    let size = nccl::most_ranks(&turn);
    let found = on_comms(nccl::group(size), |place| {
        let mut values = [1.0, place.rank as f32, -2.0];
        if place.rank == 0 {
            values[1] = f32::NAN;
        }
        reduce(&place.comm, &mut values, c_comm::PFC_MAX).expect("reduce");
        values
    });
    for values in found {
        assert!(values[0] == 1.0 && values[1].is_nan() && values[2] == -2.0, "{values:?}");
    }
}

/// Asserts what a rank was told.
#[track_caller]
fn assert_told(failure: &Failure, status: Status, words: &[&str]) {
    assert_eq!(failure.status, status as i32, "{failure:?}");
    for word in words {
        assert!(failure.message.contains(word), "{word:?} is not in: {}", failure.message);
    }
}

/// Sums until one fails: its failure.
fn reduce_to_the_end(place: &Rank) -> Failure {
    let own = values(place.rank, 9);
    let failed = (0..9).find_map(|_| {
        let mut reduced = own.clone();
        let failure = reduce(&place.comm, &mut reduced, c_comm::PFC_SUM).err();
        assert!(failure.is_none() || reduced == own, "an output is written on success only: {reduced:?}");
        failure
    });
    failed.expect("a planted fault")
}

#[test]
fn a_code_is_told_with_nccl_s_text() {
    let turn = emulator::turn(7);
    let Some(standin) = nccl::emulated(&turn) else { return };
    let run = |deadline| {
        standin.plan(1, 2, Fault::Enqueue(SYSTEM_ERROR));
        on_comms(nccl::group(2), |place| {
            place.comm.set_timeout(deadline);
            (reduce_to_the_end(place), place.comm.barrier().expect_err("it has ended"))
        })
    };
    let (deadline, outcomes) = with_ample_time(run, |outcomes| outcomes[1].0.status == Status::Timeout as i32);
    // A rank that has failed leaves the others where they are, maybe in the operation before.
    let deadline = format!("{} ms", deadline.as_millis());
    assert_told(&outcomes[0].0, Status::Timeout, &["all_reduce #", &deadline, "rank 0"]);
    assert_told(&outcomes[1].0, Status::Comm, &["all_reduce #3", "ncclAllReduce returned 2", "on rank 1"]);
    outcomes.iter().for_each(|(_, later)| assert_told(later, Status::Aborted, &[]));
}

#[test]
fn what_never_ends_on_the_stream_is_a_timeout() {
    let turn = emulator::turn(8);
    let Some(standin) = nccl::emulated(&turn) else { return };
    for planted in 0..2 {
        let run = |deadline| {
            standin.plan(planted as i32, 1, Fault::Hang);
            on_comms(nccl::group(2), |place| {
                place.comm.set_timeout(deadline);
                reduce_to_the_end(place)
            })
        };
        let (deadline, failures) = with_ample_time(run, |failures| !failures[planted].message.contains("all_reduce #2"));
        let deadline = format!("{} ms", deadline.as_millis());
        for (rank, failure) in failures.iter().enumerate() {
            // The others may have had what they waited for.
            let operation = if rank == planted { "all_reduce #2" } else { "all_reduce #" };
            assert_told(failure, Status::Timeout, &[operation, &deadline, &format!("rank {rank}")]);
        }
    }
}

#[test]
fn an_error_behind_the_scenes_ends_the_wait() {
    let turn = emulator::turn(9);
    let Some(standin) = nccl::emulated(&turn) else { return };
    standin.plan(0, 1, Fault::Async(REMOTE_ERROR));
    standin.tell(true);
    let begin = Instant::now();
    let failures = on_comms(nccl::group(2), reduce_to_the_end);
    for (rank, failure) in failures.iter().enumerate() {
        assert_told(failure, Status::Comm, &["returned 6", &format!("rank {rank}")]);
    }
    // Long before the timeout.
    assert!(begin.elapsed() < LONG / 2);
}

#[test]
fn an_abort_from_another_thread_ends_the_wait() {
    let turn = emulator::turn(10);
    let Some(standin) = nccl::emulated(&turn) else { return };
    let comms = nccl::group(2);
    let failure = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| reduce(&comms[0], &mut values(0, 9), c_comm::PFC_SUM));
        while standin.operations(0) == 0 {
            std::thread::yield_now();
        }
        comms[0].abort();
        waiting.join().expect("no panic").expect_err("aborted")
    });
    assert_told(&failure, Status::Aborted, &["rank 0"]);
}

#[test]
fn ranks_that_do_not_come_are_a_timeout() {
    let turn = emulator::turn(11);
    let Some(standin) = nccl::emulated(&turn) else { return };
    let id = unique_id().expect("an id");
    let join = |timeout| {
        let (device, _context) = (partialfc_device(), gpu());
        Communicator::nccl(&id, 0, 2, device.streams(), timeout).err().expect("nobody else comes")
    };
    let error = join(Duration::from_millis(100));
    assert_eq!(error.status, Status::Timeout);
    assert!(error.message.contains("rank 0 of 2") && error.message.contains("100 ms"), "{error}");
    // One of them is told why it cannot.
    standin.plan(1, -1, Fault::Enqueue(SYSTEM_ERROR));
    let id = unique_id().expect("an id");
    let device = partialfc_device();
    let error = Communicator::nccl(&id, 1, 2, device.streams(), LONG).err().expect("a planted code");
    assert_eq!(error.status, Status::Comm);
    assert!(error.message.contains("ncclCommInitRankConfig returned 2"), "{error}");
}

fn partialfc_device() -> std::sync::Arc<dyn partialfc::device::Device> {
    partialfc_testing::gpu::enter();
    // SAFETY: the default stream.
    unsafe { partialfc::device::cuda(0, std::ptr::null_mut()) }.expect("GPU 0")
}

#[test]
fn an_old_library_is_unsupported() {
    // In a process of its own: the version is asked once.
    const OLD: &str = "PFC_TEST_OLD_NCCL";
    let turn = emulator::turn(13);
    let Some(standin) = nccl::emulated(&turn) else { return };
    if std::env::var_os(OLD).is_some() {
        standin.version(21701);
        let error = unique_id().expect_err("an old library");
        assert_eq!(error.status, Status::Unsupported);
        assert!(error.message.contains("NCCL must be 2.18.0 or later, got 2.17.1"), "{error}");
        return;
    }
    run_alone(module_path!(), "an_old_library_is_unsupported", OLD, "1");
}

/// NCCL mixes up or waits for ever where ranks differ; the comparison does not.
#[test]
fn ranks_that_differ_are_told_by_the_check() {
    // In a process of its own, whose environment asks for the check.
    let turn = emulator::turn(14);
    let Some(_standin) = nccl::emulated(&turn) else { return };
    if std::env::var_os("PFC_CHECK").is_none() {
        return run_alone(module_path!(), "ranks_that_differ_are_told_by_the_check", "PFC_CHECK", "1");
    }
    let failures = on_comms(nccl::group(2), |place| {
        all_operations(place, 20);
        reduce(&place.comm, &mut values(place.rank, 9 + place.rank), c_comm::PFC_SUM).expect_err("other counts")
    });
    for failure in &failures {
        assert_told(failure, Status::Mismatch, &["of 9 f32 (sum)", "rank 1 all_reduce", "of 10 f32 (sum)"]);
    }
}

/// `PFC_TEST_NCCL=path` names one of NCCL's own libraries: it loads, and makes ids, without a GPU.
#[test]
fn the_library_itself_makes_ids() {
    let Some(library) = std::env::var_os("PFC_TEST_NCCL") else { return };
    if std::env::var_os("PFC_NCCL_LIB").is_none() {
        // In a process of its own, where no stand-in is loaded.
        return run_alone(module_path!(), "the_library_itself_makes_ids", "PFC_NCCL_LIB", library);
    }
    let (one, other) = (unique_id().expect("an id"), unique_id().expect("another"));
    assert!(one != other && one != [0; 128]);
}

#[test]
fn wrong_arguments_are_named() {
    let turn = emulator::turn(12);
    let _standin = nccl::emulated(&turn);
    let device = partialfc_device();
    let refused = |rank, size, device: &dyn partialfc::device::Device| {
        Communicator::nccl(&[7; 128], rank, size, device.streams(), LONG).err().expect("a wrong argument").to_string()
    };
    assert!(refused(2, 2, &*device).contains("rank must be below size, 2, got 2"));
    assert!(refused(0, 0, &*device).contains("got 0 (rank 0)"));
    let cpu = partialfc::device::cpu(1).expect("a CPU");
    assert!(refused(0, 1, &*cpu).contains("device must be a CUDA device"));
}
