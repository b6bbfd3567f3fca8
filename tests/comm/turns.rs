//! One thread at a time in a communicator's end: a second one is refused before anything is sent, and both go on afterwards.

use std::ffi::c_void;
use std::sync::{Condvar, Mutex};

use partialfc::capi::comm::*;
use partialfc::capi::status::*;
use partialfc::options::Placement;
use partialfc_testing::capi::{assert_failed, options, outcome, Comm, Device, Head, Outcome, Rows};

/// The ctx of a group of one rank whose functions wait at a gate while it is shut.
#[derive(Default)]
struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    shut: bool,
    waiting: bool,
    calls: usize,
}

impl Gate {
    fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        state.calls += 1;
        state.waiting = true;
        self.changed.notify_all();
        while state.shut {
            state = self.changed.wait(state).unwrap();
        }
        state.waiting = false;
    }

    fn shut(&self, shut: bool) {
        self.state.lock().unwrap().shut = shut;
        self.changed.notify_all();
    }

    fn wait_for_a_caller(&self) {
        let mut state = self.state.lock().unwrap();
        while !state.waiting {
            state = self.changed.wait(state).unwrap();
        }
    }

    fn calls(&self) -> usize {
        self.state.lock().unwrap().calls
    }
}

unsafe extern "C" fn all_gather(ctx: *mut c_void, send: *const c_void, recv: *mut c_void, bytes: u64, _: *mut c_void) -> i32 {
    (*ctx.cast::<Gate>()).pass();
    std::ptr::copy(send.cast::<u8>(), recv.cast::<u8>(), bytes as usize);
    0
}

unsafe extern "C" fn all_reduce(
    ctx: *mut c_void,
    send: *const c_void,
    recv: *mut c_void,
    count: u64,
    dtype: i32,
    _: i32,
    _: *mut c_void,
) -> i32 {
    let size = if dtype == 1 || dtype == 5 { 4 } else { 8 };
    all_gather(ctx, send, recv, count * size, std::ptr::null_mut())
}

fn gated(gate: &Gate) -> Comm {
    // SAFETY: a struct of the library's, filled by it.
    let mut ops: pfc_comm_ops = unsafe { std::mem::zeroed() };
    outcome(unsafe { pfc_comm_ops_init_sized(&mut ops, size_of::<pfc_comm_ops>() as u64) }).expect("ops");
    ops.ctx = std::ptr::from_ref(gate).cast_mut().cast();
    (ops.rank, ops.size) = (0, 1);
    ops.all_gather = Some(all_gather);
    ops.all_reduce = Some(all_reduce);
    Comm::custom(&ops).expect("a communicator")
}

/// A head's raw handle and what a step needs, for a thread.
struct Trainer {
    head: Head,
    rows: Rows,
    grad: Rows,
}

// SAFETY: one thread at a time has it.
unsafe impl Send for Trainer {}

impl Trainer {
    fn new(comm: &Comm, placement: Placement) -> Trainer {
        let options = partialfc::options::HeadOptions { placement, ..options(10, 4, 2) };
        let head = Head::new(&Device::cpu(1), comm, &options);
        Trainer { head, rows: Rows::f32(&[1.0, 2.0, 3.0, 4.0, 4.0, 3.0, 2.0, 1.0], 4), grad: Rows::output(2, 4) }
    }

    fn step(&mut self) -> Outcome<f64> {
        self.head.step(&mut self.rows, &[1, 2], 0.1, &mut self.grad)
    }

    fn forward(&mut self) -> Outcome<f64> {
        self.head.forward(&mut self.rows, Some(&[1, 2]))
    }
}

#[track_caller]
fn assert_in_use<T>(outcome: Outcome<T>) {
    assert_failed(&outcome.map(|_| ()), PFC_ERROR_INVALID_ARGUMENT, &["comm is in use by another thread", "rank 0"]);
}

/// Runs `first` on a thread of its own, and `second` while the first is in a function of the communicator's.
fn beside<T: Send>(gate: &Gate, first: impl FnOnce() -> T + Send, second: impl FnOnce()) -> T {
    gate.shut(true);
    std::thread::scope(|scope| {
        let first = scope.spawn(first);
        gate.wait_for_a_caller();
        let calls = gate.calls();
        second();
        assert_eq!(gate.calls(), calls, "the second thread reached the caller's functions");
        gate.shut(false);
        first.join().expect("no panic")
    })
}

#[test]
fn a_second_thread_in_a_communicator_is_refused() {
    let gate = Gate::default();
    let comm = gated(&gate);
    let raw = comm.0 as usize;
    let before = comm.traffic();
    // SAFETY: a live communicator; that two threads are in it is what is tested.
    let barrier = || outcome(unsafe { pfc_comm_barrier(raw as *mut pfc_comm) });
    let first = beside(&gate, barrier, || {
        assert_in_use(barrier());
        // Wrong arguments do not end a communicator that another thread uses.
        assert_in_use(outcome(unsafe { pfc_comm_broadcast(raw as *mut pfc_comm, std::ptr::null_mut(), 8, 9) }));
        let (none, no_rows) = (std::ptr::null(), std::ptr::null());
        let rows = unsafe {
            pfc_all_reduce_rows(raw as *mut pfc_comm, none, none.cast(), 0, no_rows, std::ptr::null_mut(), 0, no_rows, &mut 0)
        };
        assert_in_use(outcome(rows));
        // What asks and tells is for any thread.
        assert_eq!((comm.rank(), comm.size()), (0, 1));
        assert_eq!(comm.traffic().barrier_calls, before.barrier_calls + 1);
    });
    first.expect("the first thread's barrier");
    barrier().expect("the next one");
    assert_eq!(comm.traffic().barrier_calls, before.barrier_calls + 2);
}

#[test]
fn an_abort_from_another_thread_is_none_of_it() {
    let gate = Gate::default();
    let comm = gated(&gate);
    let raw = comm.0 as usize;
    // SAFETY: a live communicator.
    let first = beside(&gate, || outcome(unsafe { pfc_comm_barrier(raw as *mut pfc_comm) }), || comm.abort());
    // The function came back all the same.
    first.expect("a barrier that was over");
    assert_failed(&comm.barrier(), PFC_ERROR_ABORTED, &["pfc_comm_abort"]);
}

#[test]
fn two_heads_on_one_communicator_take_turns() {
    for placement in [Placement::Sharded, Placement::Replicated] {
        let gate = Gate::default();
        let comm = gated(&gate);
        let [mut a, mut b, mut alone] = [(); 3].map(|()| Trainer::new(&comm, placement));
        let expected: Vec<f64> = (0..3).map(|_| alone.step().expect("a step")).collect();

        // From its first message to its last a call has the communicator.
        let first = beside(
            &gate,
            || a.step(),
            || {
                assert_in_use(b.step());
                assert_in_use(b.head.prepare(&[1, 2]));
                assert_in_use(b.head.metrics());
                assert_in_use(b.head.top_k(&mut Rows::f32(&[1.0; 4], 4), 1));
                assert_in_use(Head::with(&Device::cpu(1), &comm, &options(10, 4, 2)).map(|_| ()));
            },
        );
        let mut losses = vec![first.expect("the first head's step")];
        losses.push(a.step().expect("a step"));
        losses.push(a.step().expect("a step"));
        assert_eq!(losses, expected, "{placement:?}");
        // The head that was refused is where it was.
        assert_eq!(b.step(), Ok(expected[0]), "{placement:?}");

        // In the middle of a step, too: the call may be made again.
        assert_eq!(b.forward(), Ok(expected[1]));
        let (backward, update) = (placement == Placement::Sharded, placement == Placement::Replicated);
        if backward {
            beside(&gate, || a.forward(), || assert_in_use(b.head.backward(1.0, 1.0, &mut b.grad))).expect("a forward");
        }
        b.head.backward(1.0, 1.0, &mut b.grad).expect("backward");
        if update {
            beside(&gate, || a.forward(), || assert_in_use(b.head.update(0.1))).expect("a forward");
        }
        b.head.update(0.1).expect("update");
        assert_eq!(b.step(), Ok(expected[2]), "{placement:?}");
    }
}
