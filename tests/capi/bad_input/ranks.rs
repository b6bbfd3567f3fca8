//! Ranks that do not come, that come to something else, or whose handle is used by two at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use partialfc::capi::head::{pfc_head_forward, pfc_head_wait, PFC_STATE_MOMENTUM};
use partialfc::options::HeadOptions;
use partialfc::Status;

use super::assert_refused;
use partialfc_testing::capi::{on_cuda, options, outcome, Comm, Device, Head, Rows};
use partialfc_testing::ranks::on_ranks;
use partialfc_testing::training::Batch;

/// Every call on a poisoned head says so, and why. Its rows, which no update has touched, can still be read.
fn assert_poisoned(what: &str, head: &mut Head, cause: &str) {
    let mut rows = Rows::f32(&[1.0; 4], 4);
    let mut grad = Rows::output(1, 4);
    let words = [cause];
    assert_refused(what, head.wait(), Status::Poisoned, &words);
    assert_refused(what, head.prepare(&[1]), Status::Poisoned, &words);
    assert_refused(what, head.set_sample(&[]), Status::Poisoned, &words);
    assert_refused(what, head.forward(&mut rows, Some(&[1])), Status::Poisoned, &words);
    assert_refused(what, head.backward(1.0, 1.0, &mut grad), Status::Poisoned, &words);
    assert_refused(what, head.update(0.1), Status::Poisoned, &words);
    assert_refused(what, head.step(&mut rows, &[1], 0.1, &mut grad), Status::Poisoned, &words);
    assert_refused(what, head.metrics().map(|_| ()), Status::Poisoned, &words);
    assert_refused(what, head.top_k(&mut rows, 1), Status::Poisoned, &words);
    assert_refused(what, head.sample_ids(), Status::Poisoned, &words);
    assert_refused(what, head.write_centers(0, &[0.0; 4]), Status::Poisoned, &words);
    assert_refused(what, head.write_progress((0, 0)), Status::Poisoned, &words);
    let (first, count) = head.shard();
    if on_cuda() {
        // An update may have been under way.
        assert_refused(what, head.read_centers(first, count), Status::Poisoned, &words);
        return;
    }
    head.read_centers(first, count).expect(what);
    head.read_state(PFC_STATE_MOMENTUM, first, count).expect(what);
    head.read_progress().expect(what);
}

#[test]
fn a_rank_that_does_not_come_is_named_and_the_heads_are_poisoned() {
    let given_up = std::sync::Barrier::new(3);
    on_ranks(3, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, &options(10, 4, 8));
        place.comm.set_timeout(Duration::from_secs(3));
        let mut rows = Rows::f32(&[1.0; 4], 4);
        let what = format!("rank {}", place.rank);
        if place.rank == 1 {
            given_up.wait();
            let failure = head.forward(&mut rows, Some(&[1])).expect_err("the group has ended");
            let told = [Status::Aborted as i32, Status::Timeout as i32];
            assert!(told.contains(&failure.status), "{what}: {failure:?}");
            assert_poisoned(&what, &mut head, "");
        } else {
            let refused = head.forward(&mut rows, Some(&[1]));
            given_up.wait();
            let failure = refused.expect_err("rank 1 is missing");
            if failure.status == Status::Timeout as i32 {
                assert!(failure.message.contains("rank 1") && failure.message.contains("all_gather"), "{what}: {failure:?}");
            } else {
                // The other waiting rank gave up first, and said so.
                assert_eq!(failure.status, Status::Aborted as i32, "{what}: {failure:?}");
            }
            assert_poisoned(&what, &mut head, "all_gather");
        }
    });
}

#[test]
fn ranks_at_different_calls_are_told_apart() {
    on_ranks(2, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, &options(10, 4, 8));
        place.comm.set_timeout(Duration::from_secs(120));
        let failure = match place.rank {
            0 => head.forward(&mut Rows::f32(&[1.0; 4], 4), Some(&[1])).expect_err("the other asks for metrics"),
            _ => head.metrics().map(|_| ()).expect_err("the other forwards"),
        };
        let told = [Status::Mismatch as i32, Status::Aborted as i32];
        assert!(told.contains(&failure.status), "rank {}: {failure:?}", place.rank);
        assert_poisoned(&format!("rank {}", place.rank), &mut head, "");
    });
}

#[test]
fn an_abort_wakes_a_waiting_rank() {
    on_ranks(2, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, &options(10, 4, 8));
        if place.rank == 1 {
            std::thread::sleep(Duration::from_millis(100));
            place.comm.abort();
        }
        let refused = head.forward(&mut Rows::f32(&[1.0; 4], 4), Some(&[1]));
        assert_refused(&format!("rank {}", place.rank), refused, Status::Aborted, &["rank 1"]);
        assert_poisoned(&format!("rank {}", place.rank), &mut head, "pfc_comm_abort");
    });
}

#[test]
fn heads_on_one_communicator_end_together() {
    on_ranks(2, |place| {
        let device = Device::under_test(1);
        let (mut a, mut b) =
            (Head::new(&device, &place.comm, &options(10, 4, 8)), Head::new(&device, &place.comm, &options(10, 4, 8)));
        place.comm.barrier().expect("both are there");
        place.comm.abort();
        let mut rows = Rows::f32(&[1.0; 4], 4);
        for (name, head) in [("a", &mut a), ("b", &mut b)] {
            assert_refused(name, head.forward(&mut rows, Some(&[1])), Status::Aborted, &["pfc_comm_abort"]);
            assert_poisoned(name, head, "pfc_comm_abort");
        }
    });
}

#[test]
fn a_head_in_use_is_refused_to_a_second_thread() {
    let heads = on_ranks(2, |place| {
        let head = Head::new(&Device::under_test(1), &place.comm, &options(10, 4, 8));
        if place.rank == 1 {
            return head;
        }
        let waiting = AtomicBool::new(true);
        let raw = head.raw as usize;
        std::thread::scope(|scope| {
            let busy = scope.spawn(|| {
                let mut rows = Rows::f32(&[1.0; 4], 4);
                let (view, mut loss) = (rows.view(), 0.0);
                // Now and then the other thread is inside first; then it is this one that is refused, and comes again.
                let refused = loop {
                    // SAFETY: a live head; it is freed after this thread has ended.
                    let refused = outcome(unsafe { pfc_head_forward(raw as *mut _, &view, [1i64].as_ptr(), &mut loss) });
                    match &refused {
                        Err(failure) if failure.message.contains("another thread") => std::thread::yield_now(),
                        _ => break refused,
                    }
                };
                waiting.store(false, Ordering::Relaxed);
                refused
            });
            // The first thread waits for rank 1, which never comes: sooner or later it is inside.
            let refused = loop {
                assert!(waiting.load(Ordering::Relaxed), "the forward did not wait for rank 1");
                // SAFETY: as above; refusing a second thread is what is tested.
                match outcome(unsafe { pfc_head_wait(raw as *mut _) }) {
                    Ok(()) => std::thread::yield_now(),
                    Err(failure) => break failure,
                }
            };
            place.comm.abort();
            assert_refused("the first thread", busy.join().expect("no panic"), Status::Aborted, &["pfc_comm_abort"]);
            assert_refused::<()>("the second thread", Err(refused), Status::InvalidArgument, &["head", "another thread"]);
        });
        head
    });
    drop(heads);
}

/// The shard and the last sample of a head are known while a step waits for another rank.
#[test]
fn shard_and_sample_are_answered_while_a_step_waits() {
    if on_cuda() {
        return; // the ids are in the GPU's memory
    }
    let heads = on_ranks(2, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, &options(10, 4, 8));
        head.step(&mut Rows::f32(&[1.0; 4], 4), &[1], 0.1, &mut Rows::output(1, 4)).expect("a step of both");
        if place.rank == 1 {
            return head;
        }
        let (raw, inside) = (head.raw as usize, AtomicBool::new(false));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let (mut rows, mut loss) = (Rows::f32(&[1.0; 4], 4), 0.0);
                inside.store(true, Ordering::Release);
                // SAFETY: a live head; it is freed after this thread has ended.
                outcome(unsafe { pfc_head_forward(raw as *mut _, &rows.view(), [1i64].as_ptr(), &mut loss) })
            });
            while !inside.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            // Rank 1 does not come: only the abort below ends the forward, so these calls end beside it.
            for _ in 0..100 {
                assert_eq!(head.shard(), (0, 5));
                assert_eq!(head.sample_ids().expect("the last sample"), [0, 1, 2, 3, 4]);
                std::thread::yield_now();
            }
            assert!(!waiting.is_finished(), "the forward waits for rank 1");
            place.comm.abort();
            assert_refused("the forward", waiting.join().expect("no panic"), Status::Aborted, &["pfc_comm_abort"]);
        });
        head
    });
    drop(heads);
}

#[test]
fn a_child_process_is_refused() {
    let device = Device::under_test(2);
    let comm = Comm::solo();
    let mut head = Head::new(&device, &comm, &options(10, 4, 8));
    let mut rows = Rows::f32(&[1.0; 4], 4);
    let mut grad = Rows::output(1, 4);
    head.step(&mut rows, &[1], 0.1, &mut grad).expect("the parent's step");
    // SAFETY: the child makes two calls and ends without running anything of the test harness.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0, "fork failed");
        if child == 0 {
            let statuses = (head.step(&mut rows, &[1], 0.1, &mut grad), comm.barrier());
            let forked = |status: i32| status == Status::Forked as i32;
            let as_it_should = matches!(&statuses, (Err(a), Err(b)) if forked(a.status) && forked(b.status));
            libc::_exit(if as_it_should { 0 } else { 1 });
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
        assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "the child ended with {status:#x}");
    }
    head.step(&mut rows, &[1], 0.1, &mut grad).expect("the parent goes on");
}

/// What one wants to save when the others are lost.
#[test]
fn rows_can_be_read_when_the_communicator_has_ended() {
    let options = HeadOptions { sample_rate: 0.5, ..options(20, 4, 3) };
    on_ranks(2, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
        let batch = Batch::draw(&options, place.rank, 0, 3);
        head.step(&mut batch.rows(4), &batch.labels, 0.1, &mut Rows::output(3, 4)).expect("step");
        let before = head.centers();
        place.comm.barrier().expect("a barrier");
        place.comm.abort();
        head.wait().expect("nothing is under way");
        assert_eq!(head.centers(), before);
        assert!(!head.sample_ids().expect("the last sample").is_empty());
        head.step(&mut batch.rows(4), &batch.labels, 0.1, &mut Rows::output(3, 4)).expect_err("nobody is there");
    });
}
