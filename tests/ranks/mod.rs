//! Ranks as a C program holds them: a handle for each, used through the C interface from a thread of its own.

#![allow(dead_code)] // Each test program uses a part.

use std::ffi::CStr;
use std::mem::{size_of, size_of_val};
use std::time::Duration;

use partialfc::capi::comm::*;
use partialfc::capi::status::*;
use partialfc::capi::types::*;

/// A wait that no test reaches unless something hangs.
pub const LONG: Duration = Duration::from_secs(60);

/// A rank's handle; freed when dropped.
pub struct Rank(*mut pfc_comm);

// SAFETY: what the C interface promises: one thread at a time, apart from abort and the queries.
unsafe impl Send for Rank {}
unsafe impl Sync for Rank {}

impl Drop for Rank {
    fn drop(&mut self) {
        unsafe { pfc_comm_free(self.0) }
    }
}

/// The number types that reductions take.
pub trait Number: Copy + PartialEq + std::fmt::Debug + Send + Sync + Default {
    const DTYPE: i32;
    fn of(value: i64) -> Self;
}

macro_rules! numbers {
    ($($t:ty => $dtype:expr),*) => { $(impl Number for $t {
        const DTYPE: i32 = $dtype;
        fn of(value: i64) -> $t {
            value as $t
        }
    })* };
}
numbers!(f32 => PFC_F32, f64 => PFC_F64, i32 => PFC_I32, i64 => PFC_I64);

/// A group of threads with a timeout that no test reaches.
pub fn group(size: u32) -> Vec<Rank> {
    let mut comms = vec![std::ptr::null_mut(); size as usize];
    assert_eq!(unsafe { pfc_comm_threads(size, comms.as_mut_ptr()) }, PFC_OK, "{}", last_error());
    let ranks: Vec<Rank> = comms.into_iter().map(Rank).collect();
    ranks.iter().for_each(|rank| rank.set_timeout(LONG));
    ranks
}

/// A group of one rank.
pub fn alone() -> Rank {
    let mut comm = std::ptr::null_mut();
    assert_eq!(unsafe { pfc_comm_self(&mut comm) }, PFC_OK);
    Rank(comm)
}

/// A rank of a custom communicator.
pub fn custom(ops: &pfc_comm_ops) -> Result<Rank, (i32, String)> {
    let mut comm = std::ptr::null_mut();
    match unsafe { pfc_comm_custom(ops, &mut comm) } {
        PFC_OK => {
            let rank = Rank(comm);
            rank.set_timeout(LONG);
            Ok(rank)
        }
        status => Err((status, last_error())),
    }
}

/// Runs `body` on a thread for each rank; what they returned, in rank order.
pub fn together<T: Send>(ranks: &[Rank], body: impl Fn(&Rank) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let body = &body;
        let threads: Vec<_> = ranks.iter().map(|rank| scope.spawn(move || body(rank))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank's thread")).collect()
    })
}

/// The text of this thread's last error.
pub fn last_error() -> String {
    unsafe { CStr::from_ptr(pfc_last_error()) }.to_string_lossy().into_owned()
}

/// A status with its text.
pub type Outcome = Result<(), (i32, String)>;

fn outcome(status: i32) -> Outcome {
    if status == PFC_OK {
        Ok(())
    } else {
        Err((status, last_error()))
    }
}

/// Asserts a failure and that its text has all the parts.
pub fn assert_failed(outcome: &Outcome, status: i32, parts: &[&str]) {
    let (got, text) = outcome.as_ref().expect_err("it should have failed");
    assert_eq!(*got, status, "{text}");
    parts.iter().for_each(|part| assert!(text.contains(part), "{part:?} is not in {text:?}"));
}

impl Rank {
    pub fn handle(&self) -> *mut pfc_comm {
        self.0
    }

    pub fn rank(&self) -> usize {
        unsafe { pfc_comm_rank(self.0) as usize }
    }

    pub fn size(&self) -> usize {
        unsafe { pfc_comm_size(self.0) as usize }
    }

    pub fn set_timeout(&self, timeout: Duration) {
        assert_eq!(unsafe { pfc_comm_set_timeout(self.0, timeout.as_millis() as u64) }, PFC_OK);
    }

    pub fn abort(&self) {
        assert_eq!(unsafe { pfc_comm_abort(self.0) }, PFC_OK);
    }

    pub fn barrier(&self) -> Outcome {
        outcome(unsafe { pfc_comm_barrier(self.0) })
    }

    pub fn all_gather<T: Copy>(&self, send: &[T], recv: &mut [T]) -> Outcome {
        assert_eq!(recv.len(), send.len() * self.size());
        outcome(unsafe { pfc_comm_all_gather(self.0, send.as_ptr().cast(), recv.as_mut_ptr().cast(), size_of_val(send) as u64) })
    }

    /// This rank's block of `count` elements lies in its place in `recv`.
    pub fn all_gather_in_place<T: Copy>(&self, recv: &mut [T], count: usize) -> Outcome {
        assert_eq!(recv.len(), count * self.size());
        let recv = recv.as_mut_ptr();
        let send = recv.wrapping_add(self.rank() * count);
        outcome(unsafe { pfc_comm_all_gather(self.0, send.cast(), recv.cast(), (count * size_of::<T>()) as u64) })
    }

    pub fn all_reduce<T: Number>(&self, send: &[T], recv: &mut [T], op: i32) -> Outcome {
        assert_eq!(send.len(), recv.len());
        let (from, to) = (send.as_ptr().cast(), recv.as_mut_ptr().cast());
        outcome(unsafe { pfc_comm_all_reduce(self.0, from, to, send.len() as u64, T::DTYPE, op) })
    }

    pub fn all_reduce_in_place<T: Number>(&self, data: &mut [T], op: i32) -> Outcome {
        let pointer = data.as_mut_ptr().cast();
        outcome(unsafe { pfc_comm_all_reduce(self.0, pointer, pointer, data.len() as u64, T::DTYPE, op) })
    }

    pub fn reduce_scatter<T: Number>(&self, send: &[T], recv: &mut [T], op: i32) -> Outcome {
        assert_eq!(send.len(), recv.len() * self.size());
        let (from, to) = (send.as_ptr().cast(), recv.as_mut_ptr().cast());
        outcome(unsafe { pfc_comm_reduce_scatter(self.0, from, to, recv.len() as u64, T::DTYPE, op) })
    }

    /// The result replaces this rank's part of `data`.
    pub fn reduce_scatter_in_place<T: Number>(&self, data: &mut [T], op: i32) -> Outcome {
        let count = data.len() / self.size();
        let send = data.as_mut_ptr();
        let recv = send.wrapping_add(self.rank() * count);
        outcome(unsafe { pfc_comm_reduce_scatter(self.0, send.cast(), recv.cast(), count as u64, T::DTYPE, op) })
    }

    pub fn broadcast<T: Copy>(&self, data: &mut [T], root: usize) -> Outcome {
        let bytes = size_of_val(data) as u64;
        outcome(unsafe { pfc_comm_broadcast(self.0, data.as_mut_ptr().cast(), bytes, root as u32) })
    }

    pub fn traffic(&self) -> pfc_traffic {
        let mut traffic = std::mem::MaybeUninit::uninit();
        assert_eq!(unsafe { pfc_comm_traffic(self.0, traffic.as_mut_ptr()) }, PFC_OK);
        unsafe { traffic.assume_init() }
    }
}

/// A small whole number, exact in every type and in sums over a few ranks: element `i` of rank `rank`.
pub fn sample(rank: usize, i: usize) -> i64 {
    ((rank * 31 + i * 7) % 41) as i64 - 20
}

/// What a reduction over `size` ranks makes of element `i`.
pub fn reduced(size: usize, i: usize, op: i32) -> i64 {
    let values = (0..size).map(|rank| sample(rank, i));
    if op == PFC_SUM {
        values.sum()
    } else {
        values.max().unwrap()
    }
}

/// Every operation, type and shape on a group, against the formulas above.
pub fn exercise(ranks: &[Rank]) {
    for count in [0, 1, 7, 33, 2050] {
        together(ranks, |rank| {
            reductions::<f32>(rank, count);
            reductions::<f64>(rank, count);
            reductions::<i32>(rank, count);
            reductions::<i64>(rank, count);
            copies(rank, count);
            assert_eq!(rank.barrier(), Ok(()));
        });
    }
}

fn reductions<T: Number>(rank: &Rank, count: usize) {
    let (me, size) = (rank.rank(), rank.size());
    let send: Vec<T> = (0..count * size).map(|i| T::of(sample(me, i))).collect();
    for op in [PFC_SUM, PFC_MAX] {
        let expected: Vec<T> = (0..count * size).map(|i| T::of(reduced(size, i, op))).collect();
        let (own, part) = (me * count..(me + 1) * count, T::DTYPE);
        let case = format!("type {part}, op {op}, {count} elements, rank {me} of {size}");

        let mut out = vec![T::of(-99); count];
        assert_eq!(rank.all_reduce(&send[..count], &mut out, op), Ok(()), "{case}");
        assert_eq!(out, expected[..count], "all_reduce, {case}");
        let mut data = send[..count].to_vec();
        assert_eq!(rank.all_reduce_in_place(&mut data, op), Ok(()), "{case}");
        assert_eq!(data, expected[..count], "all_reduce in place, {case}");

        // Uneven arrival: a different rank is late each time.
        if me == (count + op as usize) % size {
            std::thread::sleep(Duration::from_micros(300));
        }
        out.fill(T::of(-99));
        assert_eq!(rank.reduce_scatter(&send, &mut out, op), Ok(()), "{case}");
        assert_eq!(out, expected[own.clone()], "reduce_scatter, {case}");
        let mut data = send.clone();
        assert_eq!(rank.reduce_scatter_in_place(&mut data, op), Ok(()), "{case}");
        assert_eq!(data[own.clone()], expected[own.clone()], "reduce_scatter in place, {case}");
        data[own.clone()].copy_from_slice(&send[own]);
        assert_eq!(data, send, "reduce_scatter in place wrote elsewhere, {case}");
    }
}

fn copies(rank: &Rank, count: usize) {
    let (me, size) = (rank.rank(), rank.size());
    let block = |rank: usize| (0..count).map(move |i| (rank * 101 + i * 3) as u8);
    let all: Vec<u8> = (0..size).flat_map(block).collect();

    let mut out = vec![0xEE; count * size];
    assert_eq!(rank.all_gather(&block(me).collect::<Vec<u8>>(), &mut out), Ok(()));
    assert_eq!(out, all, "all_gather of {count} bytes, rank {me} of {size}");
    out.fill(0xEE);
    out[me * count..(me + 1) * count].copy_from_slice(&all[me * count..(me + 1) * count]);
    assert_eq!(rank.all_gather_in_place(&mut out, count), Ok(()));
    assert_eq!(out, all, "all_gather in place of {count} bytes, rank {me} of {size}");
    for root in 0..size {
        let mut data: Vec<u8> = block(me).collect();
        assert_eq!(rank.broadcast(&mut data, root), Ok(()));
        assert_eq!(data, block(root).collect::<Vec<u8>>(), "broadcast from {root} to rank {me} of {size}");
    }
}

/// Runs a test's body in a process of its own: the child of a fork has only the thread that forked, so no other test may run
/// beside.
pub fn in_a_process_of_its_own(test: &str, body: impl FnOnce()) {
    const MARK: &str = "PARTIALFC_TEST_ALONE";
    if std::env::var_os(MARK).is_some() {
        return body();
    }
    let program = std::env::current_exe().unwrap();
    let output = std::process::Command::new(program).args(["--exact", test, "--test-threads=1"]).env(MARK, "1").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

/// Forks, and asserts that the child's body gave true. A child that hangs is killed.
pub fn in_a_forked_child(body: impl FnOnce() -> bool) {
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "fork");
    if child == 0 {
        unsafe {
            libc::alarm(20);
            let good = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(false);
            libc::_exit(if good { 0 } else { 1 })
        }
    }
    let mut status = 0;
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "the child's wait status");
}
