//! A communicator of the caller's functions over a group of threads, with a fault to come in one of its operations.

use std::ffi::{c_char, c_void};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use partialfc::capi::comm::{
    pfc_comm_all_gather, pfc_comm_all_reduce, pfc_comm_ops, pfc_comm_ops_init_sized, pfc_comm_reduce_scatter,
};

use crate::capi::{outcome, Comm};

/// What becomes of an operation on the rank that it is planted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It returns [`CODE`] and does nothing.
    Code,
    /// It never returns by itself, and no other rank hears of it: as in a network without news.
    Hang,
    /// It comes late.
    Delay(Duration),
    /// It brings the first half of what it should.
    Short,
    /// It hands the other ranks something else than it was given.
    Wrong,
    /// It brings back the ranks' blocks in another order, the last one first.
    Reversed,
    /// It brings back `value` as the 64-bit number `word` of the block of rank `block`.
    Word { block: usize, word: usize, value: i64 },
}

pub const CODE: i32 = 4242;

/// A rank of the group.
pub struct TestTransport {
    inner: Comm,
    state: Mutex<State>,
    told: Condvar,
}

#[derive(Default)]
struct State {
    /// Operations until the fault.
    planted: Option<(i64, Fault)>,
    operations: i64,
    /// Some rank of the group is to hang.
    silent: bool,
    aborted: bool,
}

impl TestTransport {
    /// The operation after `operations` more of this rank's goes wrong.
    pub fn plant(&self, operations: i64, fault: Fault) {
        let mut state = self.state.lock().expect("no panic under the lock");
        state.planted = Some((state.operations + operations, fault));
    }

    /// On all ranks of a group in which one is to hang.
    pub fn silence(&self) {
        self.state.lock().expect("no panic under the lock").silent = true;
    }

    /// Operations so far.
    pub fn operations(&self) -> i64 {
        self.state.lock().expect("no panic under the lock").operations
    }

    fn wait_for_abort(&self) {
        let state = self.state.lock().expect("no panic under the lock");
        drop(self.told.wait_while(state, |state| !state.aborted).expect("no panic under the lock"));
    }

    /// Runs an operation that hands over `send` and fills `recv`, both with their bytes.
    unsafe fn run(
        &self,
        send: (*const c_void, usize),
        recv: (*mut c_void, usize),
        inner: impl FnOnce(*const c_void, *mut c_void) -> i32,
    ) -> i32 {
        let (fault, silent) = {
            let mut state = self.state.lock().expect("no panic under the lock");
            let at = state.operations;
            state.operations += 1;
            (state.planted.filter(|planted| planted.0 == at).map(|planted| planted.1), state.silent)
        };
        let status = match fault {
            None => inner(send.0, recv.0),
            Some(Fault::Code) => return CODE,
            Some(Fault::Hang) => {
                self.wait_for_abort();
                return CODE;
            }
            Some(Fault::Delay(time)) => {
                std::thread::sleep(time);
                inner(send.0, recv.0)
            }
            Some(Fault::Short) => {
                let mut whole = vec![0u64; recv.1.div_ceil(8)];
                let status = inner(send.0, whole.as_mut_ptr().cast());
                std::ptr::copy_nonoverlapping(whole.as_ptr().cast::<u8>(), recv.0.cast(), recv.1 / 2);
                status
            }
            Some(Fault::Wrong) => {
                let mut other = vec![0u64; send.1.div_ceil(8)];
                let bytes = std::slice::from_raw_parts_mut(other.as_mut_ptr().cast::<u8>(), send.1);
                std::ptr::copy_nonoverlapping(send.0.cast(), bytes.as_mut_ptr(), send.1);
                bytes.iter_mut().enumerate().for_each(|(at, byte)| *byte ^= (17 + 5 * at) as u8);
                inner(other.as_ptr().cast(), recv.0)
            }
            Some(Fault::Reversed) => {
                let status = inner(send.0, recv.0);
                let received = std::slice::from_raw_parts_mut(recv.0.cast::<u8>(), recv.1);
                let reversed: Vec<u8> = received.chunks(send.1).rev().flatten().copied().collect();
                received.copy_from_slice(&reversed);
                status
            }
            Some(Fault::Word { block, word, value }) => {
                let status = inner(send.0, recv.0);
                recv.0.cast::<i64>().wrapping_byte_add(block * send.1).add(word).write_unaligned(value);
                status
            }
        };
        if status != 0 && silent {
            self.wait_for_abort();
        }
        status
    }
}

unsafe fn transport_of<'a>(ctx: *mut c_void) -> &'a TestTransport {
    &*ctx.cast::<TestTransport>()
}

/// pfc_comm_custom takes elements of these dtypes: PFC_F32, PFC_F64, PFC_I32, PFC_I64.
fn size_of_element(dtype: i32) -> usize {
    partialfc::matrix::DType::from_code(dtype).expect("a dtype").size()
}

unsafe extern "C" fn all_gather(ctx: *mut c_void, send: *const c_void, recv: *mut c_void, bytes: u64, _: *mut c_void) -> i32 {
    let transport = transport_of(ctx);
    let size = partialfc::capi::comm::pfc_comm_size(transport.inner.0) as usize;
    transport.run((send, bytes as usize), (recv, size * bytes as usize), |send, recv| {
        pfc_comm_all_gather(transport.inner.0, send, recv, bytes)
    })
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
    let (transport, bytes) = (transport_of(ctx), count as usize * size_of_element(dtype));
    transport.run((send, bytes), (recv, bytes), |send, recv| pfc_comm_all_reduce(transport.inner.0, send, recv, count, dtype, op))
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
    let (transport, bytes) = (transport_of(ctx), count as usize * size_of_element(dtype));
    let size = partialfc::capi::comm::pfc_comm_size(transport.inner.0) as usize;
    transport.run((send, size * bytes), (recv, bytes), |send, recv| {
        pfc_comm_reduce_scatter(transport.inner.0, send, recv, count, dtype, op)
    })
}

unsafe extern "C" fn abort(ctx: *mut c_void) {
    let transport = transport_of(ctx);
    transport.state.lock().expect("no panic under the lock").aborted = true;
    transport.told.notify_all();
    transport.inner.abort();
}

unsafe extern "C" fn error_string(_: *mut c_void, code: i32, buffer: *mut c_char, size: u64) {
    let text = format!("cable {code} is cut\0");
    let count = text.len().min(size as usize);
    std::ptr::copy_nonoverlapping(text.as_ptr().cast(), buffer, count);
}

unsafe extern "C" fn free(ctx: *mut c_void) {
    drop(Arc::from_raw(ctx.cast::<TestTransport>()));
}

/// A group of custom communicators, and their transports.
pub fn group(ranks: u32) -> (Vec<Comm>, Vec<Arc<TestTransport>>) {
    let ends = Comm::threads(ranks).into_iter().enumerate().map(|(rank, inner)| {
        let transport = Arc::new(TestTransport { inner, state: Mutex::default(), told: Condvar::new() });
        let ctx = Arc::into_raw(transport.clone()).cast_mut().cast::<c_void>();
        // SAFETY: all zeros is a value of the table; the functions take what ctx is.
        let comm = unsafe {
            let mut ops: pfc_comm_ops = std::mem::zeroed();
            outcome(pfc_comm_ops_init_sized(&mut ops, std::mem::size_of::<pfc_comm_ops>() as u64)).expect("a table");
            (ops.ctx, ops.rank, ops.size) = (ctx, rank as u32, ranks);
            ops.all_gather = Some(all_gather);
            ops.all_reduce = Some(all_reduce);
            ops.reduce_scatter = Some(reduce_scatter);
            ops.abort = Some(abort);
            ops.error_string = Some(error_string);
            ops.free = Some(free);
            Comm::custom(&ops).expect("a communicator")
        };
        (comm, transport)
    });
    ends.unzip()
}
