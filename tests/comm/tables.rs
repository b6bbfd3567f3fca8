//! Tables of a caller's functions over a device's memory: each function looks at what it is given, and hands it to a group of threads.

use std::ffi::c_void;
use std::sync::Arc;

use partialfc::comm::{Communicator, CustomOps, MemorySpace};
use partialfc::matrix::{DType, ReduceOp};
use partialfc::{Error, Result, Status};
use partialfc_testing::ranks::LONG;

use crate::fake_device::*;

pub const HOST_MEMORY: u32 = 1;
pub const DEVICE_MEMORY: u32 = 2;
pub const STREAM_ORDERED: u32 = 4;

/// A rank's `ctx`: the caller's own collectives, which are those of a group of threads.
struct Context {
    comm: Arc<Communicator>,
    memory: Arc<FakeMemory>,
    flags: u32,
    stream: usize,
}

/// A function got a pointer or a stream that its flags do not go with.
const WRONG_MEMORY: i32 = 77;
const FAILED: i32 = 78;

impl Context {
    fn carry(&self, data: *const c_void, stream: *mut c_void, body: impl FnOnce(MemorySpace<'_>) -> Result<()>) -> i32 {
        let owned = self.memory.world.owns(data.cast());
        let right_stream = stream as usize == if owned { self.stream } else { 0 };
        if !right_stream || (owned && self.flags & DEVICE_MEMORY == 0) {
            return WRONG_MEMORY;
        }
        let place = match owned && self.flags & STREAM_ORDERED != 0 {
            true => MemorySpace::Device { memory: &*self.memory, stream },
            // Without streams the fake's memory is read and written at once, like the host's.
            false => MemorySpace::Host,
        };
        body(place).map_or(FAILED, |()| 0)
    }
}

unsafe fn context<'a>(ctx: *mut c_void) -> &'a Context {
    &*ctx.cast::<Context>()
}

unsafe extern "C" fn all_gather(ctx: *mut c_void, send: *const c_void, recv: *mut c_void, bytes: u64, stream: *mut c_void) -> i32 {
    let context = context(ctx);
    context.carry(recv, stream, |place| context.comm.all_gather_raw(send.cast(), recv.cast(), bytes as usize, place))
}

fn kinds(dtype: i32, op: i32) -> (DType, ReduceOp) {
    (DType::from_code(dtype).unwrap(), ReduceOp::from_code(op).unwrap())
}

unsafe extern "C" fn all_reduce(
    ctx: *mut c_void,
    send: *const c_void,
    recv: *mut c_void,
    count: u64,
    dtype: i32,
    op: i32,
    stream: *mut c_void,
) -> i32 {
    let (context, (dtype, op)) = (context(ctx), kinds(dtype, op));
    context.carry(recv, stream, |place| context.comm.all_reduce_raw(send.cast(), recv.cast(), count as usize, dtype, op, place))
}

unsafe extern "C" fn reduce_scatter(
    ctx: *mut c_void,
    send: *const c_void,
    recv: *mut c_void,
    count: u64,
    dtype: i32,
    op: i32,
    stream: *mut c_void,
) -> i32 {
    let (context, (dtype, op)) = (context(ctx), kinds(dtype, op));
    context.carry(recv, stream, |place| context.comm.reduce_scatter_raw(send.cast(), recv.cast(), count as usize, dtype, op, place))
}

unsafe extern "C" fn broadcast(ctx: *mut c_void, buffer: *mut c_void, bytes: u64, root: u32, stream: *mut c_void) -> i32 {
    let context = context(ctx);
    context.carry(buffer, stream, |place| context.comm.broadcast_raw(buffer.cast(), bytes as usize, root, place))
}

unsafe extern "C" fn abort(ctx: *mut c_void) {
    context(ctx).comm.abort(&Error::new(Status::Aborted, "the table's abort was called"));
}

unsafe extern "C" fn free(ctx: *mut c_void) {
    drop(Box::from_raw(ctx.cast::<Context>()));
}

pub fn table(comm: Arc<Communicator>, memory: Arc<FakeMemory>, flags: u32, full: bool) -> Arc<Communicator> {
    comm.set_timeout(LONG).unwrap();
    let (rank, size) = (comm.rank(), comm.size());
    let context = Context { comm, memory, flags, stream: World::stream(rank as usize) as usize };
    Communicator::custom(CustomOps {
        ctx: Box::into_raw(Box::new(context)).cast(),
        rank,
        size,
        flags,
        all_gather: Some(all_gather),
        all_reduce: Some(all_reduce),
        reduce_scatter: full.then_some(reduce_scatter as _),
        broadcast: full.then_some(broadcast as _),
        barrier: None,
        abort: Some(abort),
        async_error: None,
        error_string: None,
        free: Some(free),
    })
    .unwrap()
}
