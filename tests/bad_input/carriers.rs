//! Heads on a communicator of the caller's functions that fail: with a code, or by never returning.

use std::ffi::{c_char, c_void};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Condvar, Mutex};

use partialfc::capi::comm::{
    pfc_comm_all_gather, pfc_comm_all_reduce, pfc_comm_custom, pfc_comm_ops, pfc_comm_ops_init_sized, pfc_comm_reduce_scatter,
};
use partialfc::options::{HeadOptions, Placement};
use partialfc::Status;

use crate::assert_refused;
use crate::common::ffi::{options, outcome, Comm, Device, Head, Rows};
use crate::common::ranks::on_comms;
use crate::common::training::{assert_same_bits, train};

/// A rank of a group of threads behind a caller's table, with a fault to come.
struct Carrier {
    inner: Comm,
    /// Operations until the fault; negative: none to come.
    until_fault: AtomicI64,
    hangs: bool,
    aborted: Mutex<bool>,
    told: Condvar,
}

const CODE: i32 = 4242;

impl Carrier {
    /// Whether this operation is the one that fails: with a code at once, or when aborted.
    fn fault(&self) -> Option<i32> {
        if self.until_fault.fetch_sub(1, Ordering::SeqCst) != 0 {
            return None;
        }
        if self.hangs {
            self.wait_for_abort();
        }
        Some(CODE)
    }

    fn wait_for_abort(&self) {
        let mut aborted = self.aborted.lock().expect("no panic under the lock");
        while !*aborted {
            aborted = self.told.wait(aborted).expect("no panic under the lock");
        }
    }

    /// What the group of threads said; where one rank hangs, all wait for their own abort, as in a network without news.
    fn passed_on(&self, status: i32) -> i32 {
        if status != 0 && self.hangs {
            self.wait_for_abort();
        }
        status
    }
}

unsafe fn carrier<'a>(ctx: *mut c_void) -> &'a Carrier {
    &*ctx.cast::<Carrier>()
}

unsafe extern "C" fn all_gather(ctx: *mut c_void, send: *const c_void, recv: *mut c_void, bytes: u64, _: *mut c_void) -> i32 {
    let carrier = carrier(ctx);
    carrier.fault().unwrap_or_else(|| carrier.passed_on(pfc_comm_all_gather(carrier.inner.0, send, recv, bytes)))
}

unsafe extern "C" fn all_reduce(
    ctx: *mut c_void,
    send: *const c_void,
    recv: *mut c_void,
    count: u64,
    dtype: i32,
    op: i32,
    _: *mut c_void,
) -> i32 {
    let carrier = carrier(ctx);
    carrier.fault().unwrap_or_else(|| carrier.passed_on(pfc_comm_all_reduce(carrier.inner.0, send, recv, count, dtype, op)))
}

unsafe extern "C" fn reduce_scatter(
    ctx: *mut c_void,
    send: *const c_void,
    recv: *mut c_void,
    count: u64,
    dtype: i32,
    op: i32,
    _: *mut c_void,
) -> i32 {
    let carrier = carrier(ctx);
    carrier.fault().unwrap_or_else(|| carrier.passed_on(pfc_comm_reduce_scatter(carrier.inner.0, send, recv, count, dtype, op)))
}

unsafe extern "C" fn abort(ctx: *mut c_void) {
    let carrier = carrier(ctx);
    *carrier.aborted.lock().expect("no panic under the lock") = true;
    carrier.told.notify_all();
    carrier.inner.abort();
}

unsafe extern "C" fn error_string(_: *mut c_void, code: i32, buffer: *mut c_char, size: u64) {
    let text = format!("cable {code} is cut\0");
    let count = text.len().min(size as usize);
    std::ptr::copy_nonoverlapping(text.as_ptr().cast(), buffer, count);
}

unsafe extern "C" fn free(ctx: *mut c_void) {
    drop(Box::from_raw(ctx.cast::<Carrier>()));
}

/// A group of custom communicators; what the pointers show lives as long as they do.
fn group(ranks: u32, hangs: bool) -> (Vec<Comm>, Vec<*const Carrier>) {
    let inner = Comm::threads(ranks);
    inner
        .into_iter()
        .enumerate()
        .map(|(rank, inner)| {
            let carrier =
                Carrier { inner, until_fault: AtomicI64::new(-1), hangs, aborted: Mutex::new(false), told: Condvar::new() };
            let ctx = Box::into_raw(Box::new(carrier));
            // SAFETY: all zeros is a value of the table; the functions take what ctx is.
            let comm = unsafe {
                let mut ops: pfc_comm_ops = std::mem::zeroed();
                outcome(pfc_comm_ops_init_sized(&mut ops, std::mem::size_of::<pfc_comm_ops>() as u64)).expect("a table");
                (ops.ctx, ops.rank, ops.size) = (ctx.cast(), rank as u32, ranks);
                ops.all_gather = Some(all_gather);
                ops.all_reduce = Some(all_reduce);
                ops.reduce_scatter = Some(reduce_scatter);
                ops.abort = Some(abort);
                ops.error_string = Some(error_string);
                ops.free = Some(free);
                let mut raw = std::ptr::null_mut();
                outcome(pfc_comm_custom(&ops, &mut raw)).expect("a communicator");
                Comm(raw)
            };
            (comm, ctx.cast_const())
        })
        .unzip()
}

/// The carriers' addresses, for the ranks' threads.
fn addresses(carriers: &[*const Carrier]) -> Vec<usize> {
    carriers.iter().map(|&carrier| carrier as usize).collect()
}

fn placements() -> [HeadOptions; 2] {
    let sharded = options(10, 4, 8);
    [HeadOptions { placement: Placement::Replicated, ..sharded.clone() }, sharded]
}

#[test]
fn a_head_on_a_custom_communicator_gives_the_bits_of_one_on_threads() {
    for options in placements() {
        let expected = on_comms(Comm::threads(3), |place| train(place, &options, 1, 3));
        let (comms, _) = group(3, false);
        let found = on_comms(comms, |place| train(place, &options, 1, 3));
        assert_same_bits(&format!("{:?}", options.placement), &found, &expected);
    }
}

/// Lets rank 1's `at`-th operation of a step fail; gives what each rank's first failing call said.
fn fail_in_step(options: &HeadOptions, at: i64, hangs: bool, timeout_ms: u64) -> Vec<crate::common::ffi::Failure> {
    let (comms, carriers) = group(3, hangs);
    let carriers = addresses(&carriers);
    on_comms(comms, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, options);
        place.comm.barrier().expect("all are there");
        place.comm.set_timeout(timeout_ms);
        // SAFETY: the communicator, which the head holds, keeps the carrier alive.
        let carrier = unsafe { &*(carriers[place.rank] as *const Carrier) };
        if place.rank == 1 {
            carrier.until_fault.store(at, Ordering::SeqCst);
        }
        let mut rows = Rows::f32(&[1.0; 8], 4);
        let mut step = || -> Result<(), crate::common::ffi::Failure> {
            head.forward(&mut rows, Some(&[1, 2]))?;
            head.backward(1.0, 1.0, &mut Rows::output(2, 4))?;
            head.update(0.1)
        };
        let what = format!("{:?} operation {at} rank {}", options.placement, place.rank);
        // A rank whose last operation succeeded hears of the failure in the next step.
        let failure = step().and_then(|()| step()).expect_err(&what);
        let refused = head.forward(&mut rows, Some(&[1, 2]));
        assert_refused(&what, refused, Status::Poisoned, &["free it"]);
        assert_refused(&what, head.read_centers(head.shard().0, 1), Status::Poisoned, &[]);
        failure
    })
}

/// Operations of a sharded step: A, B, C, D; of a replicated one at rate 1: A, the sums, dW.
fn operations(options: &HeadOptions) -> i64 {
    if options.placement == Placement::Sharded {
        4
    } else {
        3
    }
}

#[test]
fn a_function_that_returns_a_code_is_comm_with_its_text_and_poisons() {
    for options in placements() {
        for at in 0..operations(&options) {
            let failures = fail_in_step(&options, at, false, 20_000);
            let what = format!("{:?} operation {at}", options.placement);
            let code = CODE.to_string();
            let words = ["rank 1", code.as_str(), "cable 4242 is cut"];
            assert_refused::<()>(&what, Err(failures[1].clone()), Status::Comm, &words);
            for rank in [0, 2] {
                // They hear of it through their own functions, which the group of threads ended, or through the library.
                let told = [Status::Comm as i32, Status::Aborted as i32];
                assert!(told.contains(&failures[rank].status), "{what} rank {rank}: {:?}", failures[rank]);
            }
        }
    }
}

#[test]
fn a_function_that_never_returns_is_timeout_on_all_ranks_and_poisons() {
    for options in placements() {
        for at in 0..operations(&options) {
            for (rank, failure) in fail_in_step(&options, at, true, 500).into_iter().enumerate() {
                let what = format!("{:?} operation {at} rank {rank}", options.placement);
                assert_refused::<()>(&what, Err(failure), Status::Timeout, &["500 ms"]);
            }
        }
    }
}

#[test]
fn a_failing_function_during_creation_gives_no_head() {
    let (comms, carriers) = group(2, false);
    let carriers = addresses(&carriers);
    on_comms(comms, |place| {
        if place.rank == 1 {
            // SAFETY: the communicator keeps the carrier alive.
            unsafe { &*(carriers[1] as *const Carrier) }.until_fault.store(0, Ordering::SeqCst);
        }
        let refused = Head::with(&Device::under_test(1), &place.comm, &options(10, 4, 8)).map(|_| ());
        match place.rank {
            1 => assert_refused("rank 1", refused, Status::Comm, &["4242"]),
            _ => {
                let failure = refused.expect_err("rank 1 failed");
                assert!([Status::Comm as i32, Status::Aborted as i32].contains(&failure.status), "{failure:?}");
                failure
            }
        };
    });
}
