//! Communicators over a caller's table of functions: results with and without the optional slots, and how failures are told.

use std::ffi::{c_char, c_void};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use partialfc::capi::comm::*;
use partialfc::capi::status::*;
use partialfc::capi::types::*;
use partialfc_testing::capi::{assert_failed, failure, last_error, Comm, Number, Outcome};
use partialfc_testing::collectives::exercise;
use partialfc_testing::processes::{in_a_forked_child, in_a_process_of_its_own};
use partialfc_testing::ranks::{together, LONG};

/// What a caller might have: a place where ranks exchange blocks.
struct Hub {
    state: Mutex<HubState>,
    changed: Condvar,
}

#[derive(Default)]
struct HubState {
    blocks: Vec<Option<Vec<u8>>>,
    /// What the ranks of the last full round brought, and how many have yet to take it.
    full: Option<(Arc<Vec<Vec<u8>>>, usize)>,
    aborted: bool,
}

const HUB_ABORTED: i32 = 99;

/// What a slow function adds.
const SLEEP: Duration = Duration::from_millis(60);

impl Hub {
    fn exchange(&self, rank: usize, block: &[u8]) -> Result<Arc<Vec<Vec<u8>>>, i32> {
        let mut state = self.state.lock().unwrap();
        while state.full.is_some() && !state.aborted {
            state = self.changed.wait(state).unwrap();
        }
        state.blocks[rank] = Some(block.to_vec());
        if state.blocks.iter().all(Option::is_some) {
            let blocks: Vec<Vec<u8>> = state.blocks.iter_mut().map(|block| block.take().unwrap()).collect();
            state.full = Some((Arc::new(blocks.clone()), blocks.len()));
            self.changed.notify_all();
        }
        while state.full.is_none() && !state.aborted {
            state = self.changed.wait(state).unwrap();
        }
        if state.aborted {
            return Err(HUB_ABORTED);
        }
        let (blocks, left) = state.full.take().unwrap();
        if left > 1 {
            state.full = Some((blocks.clone(), left - 1));
        }
        self.changed.notify_all();
        Ok(blocks)
    }
}

/// A rank's `ctx`.
struct Context {
    hub: Arc<Hub>,
    rank: usize,
    /// What the next functions return instead of working.
    code: AtomicU32,
    background_code: AtomicU32,
    /// Functions wait for an abort that comes or does not.
    hang: AtomicBool,
    sleep: AtomicBool,
    aborts: AtomicU32,
    frees: AtomicU32,
}

impl Context {
    fn enter(&self) -> Result<(), i32> {
        if self.sleep.load(Ordering::SeqCst) {
            std::thread::sleep(SLEEP);
        }
        if self.hang.load(Ordering::SeqCst) {
            let mut state = self.hub.state.lock().unwrap();
            while !state.aborted {
                state = self.hub.changed.wait(state).unwrap();
            }
            return Err(HUB_ABORTED);
        }
        match self.code.load(Ordering::SeqCst) as i32 {
            0 => Ok(()),
            code => Err(code),
        }
    }

    fn exchange(&self, send: *const c_void, bytes: usize) -> Result<Arc<Vec<Vec<u8>>>, i32> {
        self.enter()?;
        let block = if bytes == 0 { &[] } else { unsafe { std::slice::from_raw_parts(send.cast::<u8>(), bytes) } };
        self.hub.exchange(self.rank, block)
    }
}

fn code(result: Result<(), i32>) -> i32 {
    result.err().unwrap_or(0)
}

unsafe fn context<'a>(ctx: *mut c_void) -> &'a Context {
    &*ctx.cast::<Context>()
}

unsafe extern "C" fn all_gather(ctx: *mut c_void, send: *const c_void, recv: *mut c_void, bytes: u64, _: *mut c_void) -> i32 {
    code(context(ctx).exchange(send, bytes as usize).map(|blocks| {
        for (rank, block) in blocks.iter().enumerate() {
            recv.cast::<u8>().add(rank * block.len()).copy_from(block.as_ptr(), block.len());
        }
    }))
}

unsafe fn combine<T: Number + std::ops::Add<Output = T> + PartialOrd>(blocks: &[Vec<u8>], i: usize, op: i32) -> T {
    let at = |block: &Vec<u8>| block.as_ptr().cast::<T>().add(i).read_unaligned();
    let values = blocks.iter().map(at);
    values
        .reduce(|a, b| {
            if op == PFC_SUM {
                a + b
            } else if a > b {
                a
            } else {
                b
            }
        })
        .unwrap()
}

unsafe fn reduce(
    ctx: *mut c_void,
    send: *const c_void,
    recv: *mut c_void,
    total: usize,
    part: Range<usize>,
    dtype: i32,
    op: i32,
) -> i32 {
    let size = if dtype == PFC_F32 || dtype == PFC_I32 { 4 } else { 8 };
    code(context(ctx).exchange(send, total * size).map(|blocks| {
        for (to, from) in part.enumerate() {
            match dtype {
                PFC_F32 => recv.cast::<f32>().add(to).write(combine(&blocks, from, op)),
                PFC_F64 => recv.cast::<f64>().add(to).write(combine(&blocks, from, op)),
                PFC_I32 => recv.cast::<i32>().add(to).write(combine(&blocks, from, op)),
                _ => recv.cast::<i64>().add(to).write(combine(&blocks, from, op)),
            }
        }
    }))
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
    reduce(ctx, send, recv, count as usize, 0..count as usize, dtype, op)
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
    let (rank, size) = (context(ctx).rank, context(ctx).hub.state.lock().unwrap().blocks.len());
    let count = count as usize;
    reduce(ctx, send, recv, size * count, rank * count..(rank + 1) * count, dtype, op)
}

unsafe extern "C" fn broadcast(ctx: *mut c_void, buffer: *mut c_void, bytes: u64, root: u32, _: *mut c_void) -> i32 {
    code(context(ctx).exchange(buffer, bytes as usize).map(|blocks| {
        buffer.cast::<u8>().copy_from(blocks[root as usize].as_ptr(), bytes as usize);
    }))
}

unsafe extern "C" fn barrier(ctx: *mut c_void) -> i32 {
    code(context(ctx).exchange(std::ptr::null(), 0).map(|_| ()))
}

unsafe extern "C" fn abort(ctx: *mut c_void) {
    let context = context(ctx);
    context.hub.state.lock().unwrap().aborted = true;
    context.hub.changed.notify_all();
    if context.sleep.load(Ordering::SeqCst) {
        std::thread::sleep(SLEEP);
    }
    context.aborts.fetch_add(1, Ordering::SeqCst);
}

unsafe extern "C" fn async_error(ctx: *mut c_void) -> i32 {
    context(ctx).background_code.load(Ordering::SeqCst) as i32
}

unsafe extern "C" fn error_string(_: *mut c_void, code: i32, buffer: *mut c_char, size: u64) {
    let text = format!("code {code} means the cable is out\0");
    let bytes = text.len().min(size as usize);
    buffer.cast::<u8>().copy_from(text.as_ptr(), bytes);
}

/// Fills all it is given, without a terminating zero.
unsafe extern "C" fn endless_error_string(_: *mut c_void, _: i32, buffer: *mut c_char, size: u64) {
    buffer.write_bytes(b'x', size as usize);
}

unsafe extern "C" fn free(ctx: *mut c_void) {
    context(ctx).frees.fetch_add(1, Ordering::SeqCst);
}

/// The ranks' contexts, which outlive the communicators, as a caller's would.
fn contexts(size: usize) -> Vec<Context> {
    let state = HubState { blocks: vec![None; size], ..HubState::default() };
    let hub = Arc::new(Hub { state: Mutex::new(state), changed: Condvar::new() });
    let context = |rank| Context {
        hub: hub.clone(),
        rank,
        code: AtomicU32::new(0),
        background_code: AtomicU32::new(0),
        hang: AtomicBool::new(false),
        sleep: AtomicBool::new(false),
        aborts: AtomicU32::new(0),
        frees: AtomicU32::new(0),
    };
    (0..size).map(context).collect()
}

/// The table with its mandatory slots alone.
fn minimal(context: &Context, size: usize) -> pfc_comm_ops {
    let mut ops = std::mem::MaybeUninit::uninit();
    let bytes = std::mem::size_of::<pfc_comm_ops>() as u64;
    assert_eq!(unsafe { pfc_comm_ops_init_sized(ops.as_mut_ptr(), bytes) }, PFC_OK);
    let ops = unsafe { ops.assume_init() };
    let ctx = std::ptr::from_ref(context).cast_mut().cast();
    pfc_comm_ops {
        ctx,
        rank: context.rank as u32,
        size: size as u32,
        all_gather: Some(all_gather),
        all_reduce: Some(all_reduce),
        ..ops
    }
}

fn full(context: &Context, size: usize) -> pfc_comm_ops {
    pfc_comm_ops {
        reduce_scatter: Some(reduce_scatter),
        broadcast: Some(broadcast),
        barrier: Some(barrier),
        abort: Some(abort),
        async_error: Some(async_error),
        error_string: Some(error_string),
        free: Some(free),
        ..minimal(context, size)
    }
}

fn make(contexts: &[Context], table: fn(&Context, usize) -> pfc_comm_ops) -> Vec<Comm> {
    let ranks: Vec<Comm> = contexts.iter().map(|context| Comm::custom(&table(context, contexts.len())).unwrap()).collect();
    ranks.iter().for_each(|rank| rank.set_timeout(LONG));
    ranks
}

#[test]
fn every_operation_with_and_without_the_optional_slots() {
    for size in 1..=4 {
        for table in [minimal, full] {
            let contexts = contexts(size);
            let ranks = make(&contexts, table);
            ranks.iter().enumerate().for_each(|(i, rank)| assert_eq!((rank.rank(), rank.size()), (i, size)));
            exercise(&ranks);
        }
    }
}

#[test]
fn a_large_broadcast_without_its_slot_goes_in_pieces() {
    const BYTES: usize = (4 << 20) + 4099;
    let contexts = contexts(2);
    let pattern = |rank: usize| (0..BYTES).map(move |i| (i % 251 + rank) as u8);
    together(&make(&contexts, minimal), |rank| {
        let mut data: Vec<u8> = pattern(rank.rank()).collect();
        assert_eq!(rank.broadcast(&mut data, 1), Ok(()));
        assert!(data.into_iter().eq(pattern(1)));
        assert_eq!((rank.traffic().broadcast_bytes, rank.traffic().all_gather_calls), (BYTES as u64, 0));
    });
}

#[test]
fn tables_that_cannot_work_are_refused_and_not_freed() {
    let contexts = contexts(2);
    let good = full(&contexts[0], 2);
    let cases = [
        (pfc_comm_ops { all_gather: None, ..good }, PFC_ERROR_INVALID_ARGUMENT, "ops.all_gather must not be NULL (rank 0)"),
        (pfc_comm_ops { all_reduce: None, ..good }, PFC_ERROR_INVALID_ARGUMENT, "ops.all_reduce must not be NULL (rank 0)"),
        (pfc_comm_ops { rank: 2, ..good }, PFC_ERROR_INVALID_ARGUMENT, "ops.rank must be below ops.size, 2, got 2"),
        (pfc_comm_ops { size: 0, ..good }, PFC_ERROR_INVALID_ARGUMENT, "got 0 (rank 0)"),
        (pfc_comm_ops { reserved: 1, ..good }, PFC_ERROR_INVALID_ARGUMENT, "ops.reserved must be 0, got 1"),
        (pfc_comm_ops { struct_size: 0, ..good }, PFC_ERROR_INVALID_ARGUMENT, "struct_size must be 8 to 65536, got 0"),
        (pfc_comm_ops { flags: PFC_COMM_HOST_MEMORY | 64, ..good }, PFC_ERROR_UNSUPPORTED, "0x40, which is unknown"),
        (pfc_comm_ops { flags: PFC_COMM_DEVICE_MEMORY, ..good }, PFC_ERROR_UNSUPPORTED, "must contain PFC_COMM_HOST_MEMORY"),
        (
            pfc_comm_ops { flags: PFC_COMM_HOST_MEMORY | PFC_COMM_STREAM_ORDERED, ..good },
            PFC_ERROR_UNSUPPORTED,
            "must contain PFC_COMM_DEVICE_MEMORY beside PFC_COMM_STREAM_ORDERED",
        ),
    ];
    for (ops, status, text) in cases {
        assert_failed(&Comm::custom(&ops).map(|_| ()), status, &[text]);
    }
    assert_eq!(contexts[0].frees.load(Ordering::SeqCst), 0);
    drop(Comm::custom(&good).unwrap());
    assert_eq!(contexts[0].frees.load(Ordering::SeqCst), 1);
}

#[test]
fn codes_are_told_with_their_text() {
    type ErrorString = unsafe extern "C" fn(*mut c_void, i32, *mut c_char, u64);
    let strings: [(Option<ErrorString>, String); 3] = [
        (Some(error_string), "the caller's all_reduce returned 13 (code 13 means the cable is out) on rank 1".to_owned()),
        (Some(endless_error_string), format!("the caller's all_reduce returned 13 ({}) on rank 1", "x".repeat(255))),
        (None, "the caller's all_reduce returned 13 on rank 1".to_owned()),
    ];
    for (string, text) in strings {
        let contexts = contexts(2);
        let table = |context: &Context| pfc_comm_ops { error_string: string, ..full(context, 2) };
        let ranks: Vec<Comm> = contexts.iter().map(|context| Comm::custom(&table(context)).unwrap()).collect();
        together(&ranks, |rank| assert_eq!(rank.barrier(), Ok(())));
        contexts[1].code.store(13, Ordering::SeqCst);
        let outcomes = together(&ranks, |rank| rank.all_reduce_in_place(&mut [1f32; 3], PFC_SUM));
        assert_eq!(outcomes[1], failure(PFC_ERROR_COMM, format!("all_reduce #2: {text}")));
        // Rank 1's failure called its abort, which is how the caller's own transport tells rank 0.
        assert_failed(&outcomes[0], PFC_ERROR_COMM, &["all_reduce #2: the caller's all_reduce returned 99", "rank 0"]);
        assert_failed(&ranks[1].barrier(), PFC_ERROR_ABORTED, &["returned 13"]);
    }
}

#[test]
fn a_missing_slot_s_replacement_is_named_by_the_function_that_failed() {
    let contexts = contexts(1);
    contexts[0].code.store(5, Ordering::SeqCst);
    type Body = fn(&Comm) -> Outcome;
    let cases: [(Body, &str); 3] = [
        (|rank| rank.barrier(), "barrier #1: the caller's all_gather returned 5 on rank 0"),
        (|rank| rank.broadcast(&mut [0u8; 2], 0), "broadcast #1: the caller's all_gather returned 5 on rank 0"),
        (|rank| rank.reduce_scatter(&[0f32; 2], &mut [0f32; 2], PFC_SUM), "reduce_scatter #1: the caller's all_reduce returned 5"),
    ];
    for (body, text) in cases {
        assert_failed(&body(&make(&contexts, minimal)[0]), PFC_ERROR_COMM, &[text]);
    }
}

#[test]
fn an_error_behind_the_scenes_is_asked_for_first() {
    let contexts = contexts(1);
    let ranks = make(&contexts, full);
    assert_eq!(ranks[0].barrier(), Ok(()));
    contexts[0].background_code.store(7, Ordering::SeqCst);
    contexts[0].hang.store(true, Ordering::SeqCst); // Were barrier called, it would not return.
    let text = "barrier #2: the caller's async_error returned 7 (code 7 means the cable is out) on rank 0";
    assert_failed(&ranks[0].barrier(), PFC_ERROR_COMM, &[text]);
}

#[test]
fn a_function_that_never_returns_is_stopped() {
    let contexts = contexts(3);
    contexts.iter().for_each(|context| context.hang.store(true, Ordering::SeqCst));
    contexts[0].sleep.store(true, Ordering::SeqCst); // Its abort is at work when the operation returns; free waits for it.
    let ranks = make(&contexts, full);
    ranks[0].set_timeout(Duration::from_millis(50));
    let outcome = ranks[0].all_gather(&[1u8], &mut [0u8; 3]);
    assert_failed(
        &outcome,
        PFC_ERROR_TIMEOUT,
        &["all_gather #1 did not finish within 50 ms (code 99 means the cable is out)", "(this is rank 0)"],
    );
    assert_failed(&ranks[0].barrier(), PFC_ERROR_ABORTED, &["TIMEOUT"]);
    drop(ranks);
    for (rank, context) in contexts.iter().enumerate() {
        let calls = (context.aborts.load(Ordering::SeqCst), context.frees.load(Ordering::SeqCst));
        assert_eq!(calls, (u32::from(rank == 0), 1), "aborts and frees of rank {rank}");
    }
}

/// Each rank's transport hangs by itself, so that each rank's own watchdog has to stop it.
#[test]
fn every_rank_has_a_watchdog() {
    let alone: Vec<Vec<Context>> = (0..3).map(|_| contexts(1)).collect();
    let ranks: Vec<Comm> = alone.iter().map(|contexts| make(contexts, full).remove(0)).collect();
    // Slow, so that the watchdogs sleep towards a deadline that is far off when the next one is set.
    alone.iter().for_each(|contexts| contexts[0].sleep.store(true, Ordering::SeqCst));
    together(&ranks, |rank| assert_eq!(rank.barrier(), Ok(())));
    alone.iter().for_each(|contexts| contexts[0].hang.store(true, Ordering::SeqCst));
    let start = Instant::now();
    let outcomes = together(&ranks, |rank| {
        rank.set_timeout(Duration::from_millis(30));
        rank.all_reduce_in_place(&mut [1f64; 2], PFC_MAX)
    });
    outcomes.iter().for_each(|outcome| assert_failed(outcome, PFC_ERROR_TIMEOUT, &["all_reduce #2 did not finish within 30 ms"]));
    assert!(start.elapsed() < LONG / 2);
}

#[test]
fn without_abort_a_late_function_still_counts() {
    let contexts = contexts(1);
    contexts[0].sleep.store(true, Ordering::SeqCst);
    let ranks = make(&contexts, minimal);
    ranks[0].set_timeout(Duration::from_millis(1));
    let mut data = [4f32];
    assert_eq!(ranks[0].all_reduce_in_place(&mut data, PFC_SUM), Ok(()));
    assert_eq!(ranks[0].all_reduce_in_place(&mut data, PFC_SUM), Ok(()));
}

#[test]
fn abort_from_another_thread_stops_a_function() {
    let contexts = contexts(2);
    let ranks = make(&contexts, full);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| ranks[0].barrier());
        while ranks[0].traffic().barrier_calls == 0 {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(2));
        ranks[0].abort();
        ranks[0].abort();
        let cause = "barrier #1: the communicator was aborted: pfc_comm_abort was called on rank 0";
        assert_failed(&waiting.join().unwrap(), PFC_ERROR_ABORTED, &[cause]);
    });
    assert_eq!(contexts[0].aborts.load(Ordering::SeqCst), 1, "once, however often the library is asked");
    drop(ranks);
    assert!(contexts.iter().all(|context| context.frees.load(Ordering::SeqCst) == 1));
}

#[test]
fn a_forked_child_calls_none_of_the_functions() {
    in_a_process_of_its_own(module_path!(), "a_forked_child_calls_none_of_the_functions", || {
        let contexts = contexts(1);
        let ranks = make(&contexts, full);
        assert_eq!(ranks[0].barrier(), Ok(()));
        contexts[0].code.store(1, Ordering::SeqCst);
        in_a_forked_child(|| unsafe {
            let refused = pfc_comm_barrier(ranks[0].0) == PFC_ERROR_FORKED;
            pfc_comm_abort(ranks[0].0);
            pfc_comm_free(ranks[0].0);
            // Freeing has no status; a failure in it would have replaced the text.
            let untouched = last_error().contains("was made in process");
            refused && untouched && contexts[0].aborts.load(Ordering::SeqCst) + contexts[0].frees.load(Ordering::SeqCst) == 0
        });
        contexts[0].code.store(0, Ordering::SeqCst);
        assert_eq!(ranks[0].barrier(), Ok(()));
    });
}
