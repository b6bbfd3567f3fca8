//! Communicators.

use std::ffi::{c_char, c_void};
use std::sync::Arc;
use std::time::Duration;

use super::device::pfc_device;
use super::status::pfc_status;
use super::types::{init_sized, matrix, pfc_matrix, read_sized, sized, Sized64};
use super::{array, boundary, caught, output, required};
use crate::comm::{
    all_reduce_rows, unique_id, Communicator, CustomOps, MemorySpace, Operation, SampledRows, DEFAULT_TIMEOUT, ID_BYTES,
};
use crate::matrix::{DType, ReduceOp};
use crate::{ensure, error, Error, Result, Status};

/// Sum over the ranks.
pub const PFC_SUM: i32 = 1;
/// Maximum over the ranks.
pub const PFC_MAX: i32 = 2;

/// For pfc_comm_ops.flags: the functions accept host memory. Always required.
pub const PFC_COMM_HOST_MEMORY: u32 = 1;
/// For pfc_comm_ops.flags: the functions also accept device memory, and can tell from a pointer which kind it is.
pub const PFC_COMM_DEVICE_MEMORY: u32 = 2;
/// For pfc_comm_ops.flags: with device memory the functions return as soon as the work is on the stream. Requires
/// PFC_COMM_DEVICE_MEMORY.
pub const PFC_COMM_STREAM_ORDERED: u32 = 4;

/// One rank of a group of ranks.
///
/// All ranks call the same collectives in the same order. If a collective fails on one rank, the communicator ends: running
/// collectives of the other ranks fail with ABORTED, TIMEOUT, MISMATCH or COMM and name the cause, and later collectives fail with
/// ABORTED. A wrong argument ends it too, because the other ranks are already waiting.
///
/// ONE THREAD AT A TIME. A call that exchanges messages, of this communicator or of a head on it, has the communicator to itself. A
/// second thread's call gets INVALID_ARGUMENT at once, sends nothing and changes nothing, and may be repeated later; the first one
/// goes on. pfc_comm_abort, pfc_comm_traffic, pfc_comm_rank, pfc_comm_size and pfc_comm_set_timeout may be called from any thread.
pub struct pfc_comm {
    pub(super) comm: Arc<Communicator>,
}

/// The caller's functions, of which pfc_comm_custom makes a communicator. Fill with pfc_comm_ops_init, then set fields.
///
/// CALLS. A function gets ctx as its first argument and returns 0, or its own error code, which appears in the text of the error
/// (status COMM). Functions are called only from a thread that is inside a pfc_ call, and never from two threads at once; abort and
/// error_string may be called from any thread. No function may throw, longjmp out, end its thread, or call pfc_ functions on this
/// communicator. A pthread_cancel of the thread waits until the pfc_ call has returned.
///
/// ARGUMENTS. A function is called with count or bytes above 0 only, and no pointer to data is NULL. count is in elements of dtype (PFC_F32, PFC_F64, PFC_I32 or PFC_I64), bytes in bytes; op is PFC_SUM or PFC_MAX. send
/// may equal recv; in all_gather it may be recv + rank * bytes, and in reduce_scatter recv may be send + rank * count. A reduction
/// must give the same bits on every rank.
///
/// TIMEOUT. If a function runs longer than pfc_comm_set_timeout, the library calls abort from another thread. The function must
/// then return, and the pfc_ call returns TIMEOUT. abort is called at most once, also after a failure of this rank.
///
/// HOST MEMORY. stream is NULL, and a function returns when its work is done.
///
/// DEVICE MEMORY. A head on a CUDA device exchanges device memory. Without PFC_COMM_DEVICE_MEMORY the library copies it to host
/// memory, waits, calls the function and copies the result back. With it, the function gets device pointers and the device's
/// stream; everything enqueued on the stream before has run, and the function returns when its work is done. With
/// PFC_COMM_STREAM_ORDERED the function enqueues its work on the stream and returns without waiting. If that work is still on the
/// stream after pfc_comm_set_timeout, abort is called and must let the stream continue; the next pfc_ call that waits for it
/// returns TIMEOUT. If reduce_scatter or broadcast is NULL, its replacement goes through host memory.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct pfc_comm_ops {
    /// sizeof(pfc_comm_ops), set by pfc_comm_ops_init.
    pub struct_size: u64,
    /// Passed to every function.
    pub ctx: *mut c_void,
    /// This rank, 0 to size - 1.
    pub rank: u32,
    /// Number of ranks.
    pub size: u32,
    /// PFC_COMM_* flags. Without PFC_COMM_HOST_MEMORY, or with PFC_COMM_STREAM_ORDERED but not PFC_COMM_DEVICE_MEMORY: UNSUPPORTED.
    /// (default: PFC_COMM_HOST_MEMORY)
    pub flags: u32,
    /// Must be 0.
    pub reserved: u32,
    /// Required. Gathers `bytes` bytes from every rank into size * bytes at recv, in rank order.
    pub all_gather: Option<
        unsafe extern "C" fn(ctx: *mut c_void, send: *const c_void, recv: *mut c_void, bytes: u64, stream: *mut c_void) -> i32,
    >,
    /// Required. Combines count elements over the ranks into recv on every rank.
    pub all_reduce: Option<
        unsafe extern "C" fn(
            ctx: *mut c_void,
            send: *const c_void,
            recv: *mut c_void,
            count: u64,
            dtype: i32,
            op: i32,
            stream: *mut c_void,
        ) -> i32,
    >,
    /// Combines size * count elements over the ranks; rank r gets the r-th block of count. NULL: built from all_reduce.
    pub reduce_scatter: Option<
        unsafe extern "C" fn(
            ctx: *mut c_void,
            send: *const c_void,
            recv: *mut c_void,
            count: u64,
            dtype: i32,
            op: i32,
            stream: *mut c_void,
        ) -> i32,
    >,
    /// Copies the bytes of rank root to all ranks. NULL: built from all_gather.
    pub broadcast:
        Option<unsafe extern "C" fn(ctx: *mut c_void, buffer: *mut c_void, bytes: u64, root: u32, stream: *mut c_void) -> i32>,
    /// Returns when all ranks have called it. NULL: built from all_gather.
    pub barrier: Option<unsafe extern "C" fn(ctx: *mut c_void) -> i32>,
    /// Makes running and later operations return an error; called from any thread. NULL: a function that hangs cannot be stopped.
    pub abort: Option<unsafe extern "C" fn(ctx: *mut c_void)>,
    /// Returns the code of a failure that happened in the background, 0 if none. Asked before each operation. NULL: never asked.
    pub async_error: Option<unsafe extern "C" fn(ctx: *mut c_void) -> i32>,
    /// Writes the text of an error code, at most size bytes including its terminating zero. NULL: errors show the code only.
    pub error_string: Option<unsafe extern "C" fn(ctx: *mut c_void, code: i32, buffer: *mut c_char, size: u64)>,
    /// Frees ctx. Called once, when the communicator is no longer used. NULL: nothing to free.
    pub free: Option<unsafe extern "C" fn(ctx: *mut c_void)>,
}

sized!(
    pfc_comm_ops,
    pfc_comm_ops {
        struct_size: 0,
        ctx: std::ptr::null_mut(),
        rank: 0,
        size: 0,
        flags: PFC_COMM_HOST_MEMORY,
        reserved: 0,
        all_gather: None,
        all_reduce: None,
        reduce_scatter: None,
        broadcast: None,
        barrier: None,
        abort: None,
        async_error: None,
        error_string: None,
        free: None,
    }
);

/// Calls and bytes of each operation since the communicator was made.
///
/// Bytes are what this rank passes to an operation: its own block of an all_gather, the buffer of an all_reduce or broadcast, the
/// whole input of a reduce_scatter.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct pfc_traffic {
    pub all_gather_calls: u64,
    pub all_gather_bytes: u64,
    pub all_reduce_calls: u64,
    pub all_reduce_bytes: u64,
    pub reduce_scatter_calls: u64,
    pub reduce_scatter_bytes: u64,
    pub broadcast_calls: u64,
    pub broadcast_bytes: u64,
    pub barrier_calls: u64,
}

fn handle(comm: Arc<Communicator>) -> *mut pfc_comm {
    Box::into_raw(Box::new(pfc_comm { comm }))
}

/// Fills the struct with defaults; see pfc_head_options_init_sized.
#[no_mangle]
pub unsafe extern "C" fn pfc_comm_ops_init_sized(ops: *mut pfc_comm_ops, struct_size: u64) -> pfc_status {
    boundary(|| init_sized(ops, struct_size))
}

/// Makes a communicator of one rank.
///
/// @param out the communicator; free with pfc_comm_free
#[no_mangle]
pub unsafe extern "C" fn pfc_comm_self(out: *mut *mut pfc_comm) -> pfc_status {
    boundary(|| {
        let out = output("out", out)?;
        *out = handle(Communicator::single()?);
        Ok(())
    })
}

/// Makes a group of n ranks in this process. Give each communicator to a thread of its own.
///
/// @param n ranks, 1 to 4096
/// @param comms n pointers, written in rank order; free each with pfc_comm_free
#[no_mangle]
pub unsafe extern "C" fn pfc_comm_threads(n: u32, comms: *mut *mut pfc_comm) -> pfc_status {
    boundary(|| {
        ensure!(!comms.is_null(), InvalidArgument, "comms must not be NULL");
        array("comms", comms, n.into())?;
        for (rank, comm) in Communicator::threads(n)?.into_iter().enumerate() {
            *comms.add(rank) = handle(comm);
        }
        Ok(())
    })
}

/// Makes a communicator of the caller's functions. The struct is copied; ctx and the functions must outlive the communicator.
///
/// @param ops the functions
/// @param out the communicator; free with pfc_comm_free. On failure ops->free is not called.
#[no_mangle]
pub unsafe extern "C" fn pfc_comm_custom(ops: *const pfc_comm_ops, out: *mut *mut pfc_comm) -> pfc_status {
    boundary(|| {
        let out = output("out", out)?;
        let ops = read_sized(ops)?;
        ensure!(ops.reserved == 0, InvalidArgument, "ops.reserved must be 0, got {}", ops.reserved);
        *out = handle(Communicator::custom(ops.to_ops())?);
        Ok(())
    })
}

impl pfc_comm_ops {
    fn to_ops(self) -> CustomOps {
        CustomOps {
            ctx: self.ctx,
            rank: self.rank,
            size: self.size,
            flags: self.flags,
            all_gather: self.all_gather,
            all_reduce: self.all_reduce,
            reduce_scatter: self.reduce_scatter,
            broadcast: self.broadcast,
            barrier: self.barrier,
            abort: self.abort,
            async_error: self.async_error,
            error_string: self.error_string,
            free: self.free,
        }
    }
}

/// Makes this rank's communicator over NCCL, with one GPU for each rank. Collective. Returns when all ranks have joined, or with
/// TIMEOUT after 10 minutes.
///
/// LOADING. NCCL 2.18 or later is loaded at run time: the library that PFC_NCCL_LIB in the environment names, else a libnccl.so.2
/// that the process has loaded already, else the libnccl.so.2 or libnccl.so that the loader finds.
///
/// FAILURES. The messages of heads stay on the GPU and its streams, and no call waits for them. A watchdog thread ends the
/// communicator when NCCL reports an error, or when an operation has been on its stream longer than pfc_comm_set_timeout. The
/// streams then continue, and the next pfc_ call returns the error. NCCL does not say which rank is missing. The other ranks notice
/// a lost rank when NCCL does, or after their own timeout.
///
/// HOST MEMORY. The collectives of this header (pfc_comm_all_gather and the like) take host memory here too, and wait.
///
/// SHARING A GPU. Two ranks cannot share a GPU unless NCCL is 2.30 or later and NCCL_MULTI_RANK_GPU_ENABLE is 1. Make such ranks
/// processes if possible. If they are threads of one process, give each a device on its own stream: on a common stream one rank's
/// work would be enqueued behind another rank's wait for it. Calls that free GPU memory (pfc_head_free, pfc_head_top_k, other classes
/// for a head, growing buffers) wait for everything in the GPU's context, so such threads can block each other until the timeout.
///
/// @param id 128 bytes from pfc_nccl_unique_id of one rank, sent to all ranks by the trainer
/// @param rank this rank, 0 to size - 1
/// @param size number of ranks
/// @param device the CUDA device of this rank, on a stream of the GPU's primary context (the one that the CUDA runtime and NCCL
///   use); the communicator keeps it alive
/// @param out the communicator; free with pfc_comm_free
/// @return UNSUPPORTED without NCCL, naming what was looked for; TIMEOUT; COMM, with NCCL's own text; INVALID_ARGUMENT for wrong
///   arguments of this rank, while the other ranks keep waiting for it
#[no_mangle]
pub unsafe extern "C" fn pfc_comm_nccl(
    id: *const u8,
    rank: u32,
    size: u32,
    device: *const pfc_device,
    out: *mut *mut pfc_comm,
) -> pfc_status {
    boundary(|| {
        let id = required("id", id.cast::<[u8; ID_BYTES]>())?;
        let device = required("device", device)?;
        let out = output("out", out)?;
        *out = handle(Communicator::nccl(id, rank, size, device.device.streams(), DEFAULT_TIMEOUT)?);
        Ok(())
    })
}

/// Makes the id that all ranks of one NCCL communicator share. Call it on one rank and send the bytes to the others (over MPI:
/// pfc_mpi_share_nccl_id). Each communicator needs a new id.
///
/// @param id 128 bytes, written
/// @return UNSUPPORTED without NCCL; COMM if NCCL finds no network interface
#[no_mangle]
pub unsafe extern "C" fn pfc_nccl_unique_id(id: *mut u8) -> pfc_status {
    boundary(|| {
        let id = output("id", id.cast::<[u8; ID_BYTES]>())?;
        *id = unique_id()?;
        Ok(())
    })
}

/// This rank, 0 to size - 1; UINT32_MAX if comm is NULL.
#[no_mangle]
pub unsafe extern "C" fn pfc_comm_rank(comm: *const pfc_comm) -> u32 {
    comm.as_ref().map_or(u32::MAX, |handle| handle.comm.rank())
}

/// Number of ranks; 0 if comm is NULL.
#[no_mangle]
pub unsafe extern "C" fn pfc_comm_size(comm: *const pfc_comm) -> u32 {
    comm.as_ref().map_or(0, |handle| handle.comm.size())
}

/// Gathers equal blocks from all ranks, in rank order. Collective; blocks.
///
/// @param send `bytes` bytes of this rank; may be recv + rank * bytes
/// @param recv size * bytes bytes
/// @param bytes bytes of one block, equal on all ranks
#[no_mangle]
pub unsafe extern "C" fn pfc_comm_all_gather(
    comm: *mut pfc_comm,
    send: *const c_void,
    recv: *mut c_void,
    bytes: u64,
) -> pfc_status {
    collective(comm, |comm| {
        comm.or_abort(buffers(comm, send, recv, bytes))?;
        comm.all_gather_raw(send.cast(), recv.cast(), bytes as usize, MemorySpace::Host)
    })
}

/// Combines a buffer over all ranks; every rank gets the same bits. Collective; blocks.
///
/// @param send count elements of this rank; may be recv
/// @param recv count elements
/// @param count elements, equal on all ranks
/// @param dtype PFC_F32, PFC_F64, PFC_I32 or PFC_I64
/// @param op PFC_SUM or PFC_MAX
#[no_mangle]
pub unsafe extern "C" fn pfc_comm_all_reduce(
    comm: *mut pfc_comm,
    send: *const c_void,
    recv: *mut c_void,
    count: u64,
    dtype: i32,
    op: i32,
) -> pfc_status {
    collective(comm, |comm| {
        let (dtype, op) = comm.or_abort(reduction(comm, send, recv, count, dtype, op))?;
        comm.all_reduce_raw(send.cast(), recv.cast(), count as usize, dtype, op, MemorySpace::Host)
    })
}

/// Combines a buffer over all ranks; rank r gets the r-th part of it. Collective; blocks.
///
/// @param send size * count elements of this rank
/// @param recv count elements; may be send + rank * count
/// @param count elements of one part, equal on all ranks
/// @param dtype PFC_F32, PFC_F64, PFC_I32 or PFC_I64
/// @param op PFC_SUM or PFC_MAX
#[no_mangle]
pub unsafe extern "C" fn pfc_comm_reduce_scatter(
    comm: *mut pfc_comm,
    send: *const c_void,
    recv: *mut c_void,
    count: u64,
    dtype: i32,
    op: i32,
) -> pfc_status {
    collective(comm, |comm| {
        let (dtype, op) = comm.or_abort(reduction(comm, send, recv, count, dtype, op))?;
        comm.reduce_scatter_raw(send.cast(), recv.cast(), count as usize, dtype, op, MemorySpace::Host)
    })
}

/// Copies a buffer from one rank to all. Collective; blocks.
///
/// @param buffer `bytes` bytes, read on root and written elsewhere
/// @param bytes equal on all ranks
/// @param root the rank that has the data
#[no_mangle]
pub unsafe extern "C" fn pfc_comm_broadcast(comm: *mut pfc_comm, buffer: *mut c_void, bytes: u64, root: u32) -> pfc_status {
    collective(comm, |comm| {
        let given = bytes == 0 || !buffer.is_null();
        comm.or_abort(if given { Ok(()) } else { Err(error!(InvalidArgument, "buffer must not be NULL (rank {})", comm.rank())) })?;
        comm.broadcast_raw(buffer.cast(), bytes as usize, root, MemorySpace::Host)
    })
}

/// Returns once all ranks have called it. Collective; blocks.
#[no_mangle]
pub unsafe extern "C" fn pfc_comm_barrier(comm: *mut pfc_comm) -> pfc_status {
    collective(comm, |comm| comm.barrier())
}

/// Sums sampled gradient rows over the ranks by class id. Collective; blocks.
///
/// Every rank gets the ascending union of all ranks' ids and, for each id, the sum of the rows that the ranks have for it. Sums are
/// float32 in a fixed order, rounded once to the type of rows_out. Outputs must be the inputs (the same data, dtype and row_stride)
/// or not overlap them. This version takes host memory only. After an error in the arguments the outputs are unchanged and the
/// communicator remains usable.
///
/// @param comm the ranks
/// @param device where the rows live
/// @param ids count ids, ascending, each once; NULL when count is 0
/// @param count number of ids of this rank
/// @param rows at least count rows, f32, f16 or bf16; cols equal on all ranks
/// @param ids_out capacity ids, written; NULL on all ranks asserts that the ids are equal on all ranks
/// @param capacity number of ids and rows that the outputs hold
/// @param rows_out at least capacity rows; its first *count_out are written
/// @param count_out written: number of ids in the union
/// @return MISMATCH on all ranks if cols differ, or if ids_out is NULL and the ids differ; INVALID_ARGUMENT on all ranks if the
///   union is larger than a rank's capacity, naming the size needed; INVALID_ARGUMENT for a rank's own arguments, with REMOTE on
///   the others
#[no_mangle]
pub unsafe extern "C" fn pfc_all_reduce_rows(
    comm: *mut pfc_comm,
    device: *const pfc_device,
    ids: *const i64,
    count: u64,
    rows: *const pfc_matrix,
    ids_out: *mut i64,
    capacity: u64,
    rows_out: *const pfc_matrix,
    count_out: *mut u64,
) -> pfc_status {
    collective(comm, |comm| {
        let mine = (|| {
            let device = &required("device", device)?.device;
            let cols = required("rows", rows)?.cols;
            let (rows, rows_out) = (matrix("rows", rows, cols)?, matrix("rows_out", rows_out, cols)?);
            output("count_out", count_out)?;
            let count = array("ids", ids, count).map_err(|error| on_rank(error, comm))?;
            // NULL asks for no union.
            let room = if ids_out.is_null() { 0 } else { capacity };
            array("ids_out", ids_out, room).map_err(|error| on_rank(error, comm))?;
            let arrays: [(&str, *const u8); 5] = [
                ("ids", ids.cast()),
                ("rows", rows.data),
                ("ids_out", ids_out.cast()),
                ("rows_out", rows_out.data),
                ("count_out", count_out.cast()),
            ];
            for (name, array) in arrays {
                let on_device =
                    device.is_device_memory(name, array).map_err(|error| error.during(format_args!("rank {}", comm.rank())))?;
                ensure!(!on_device, InvalidArgument, "{name} must be in host memory, got device memory (rank {})", comm.rank());
            }
            Ok(SampledRows { ids, count, rows, ids_out, capacity: capacity as usize, rows_out })
        })();
        *count_out = all_reduce_rows(comm, mine)? as u64;
        Ok(())
    })
}

/// Runs a collective. A panic ends the communicator, so that the other ranks do not wait for this one.
unsafe fn collective(comm: *mut pfc_comm, body: impl FnOnce(&Communicator) -> Result<()>) -> pfc_status {
    boundary(|| {
        let comm = &*required("comm", comm)?.comm;
        let _turn = comm.take_turn()?;
        abort_on_panic(comm, || body(comm))
    })
}

/// Runs what a panic leaves other ranks waiting for.
pub(super) fn abort_on_panic<T>(comm: &Communicator, body: impl FnOnce() -> Result<T>) -> Result<T> {
    caught(body).inspect_err(|error| {
        if error.status == Status::Panic {
            comm.abort(error);
        }
    })
}

fn on_rank(error: Error, comm: &Communicator) -> Error {
    Error { message: format!("{} (rank {})", error.message, comm.rank()), ..error }
}

fn buffers(comm: &Communicator, send: *const c_void, recv: *mut c_void, count: u64) -> Result<()> {
    ensure!(count == 0 || !send.is_null(), InvalidArgument, "send must not be NULL (rank {})", comm.rank());
    ensure!(count == 0 || !recv.is_null(), InvalidArgument, "recv must not be NULL (rank {})", comm.rank());
    Ok(())
}

fn reduction(
    comm: &Communicator,
    send: *const c_void,
    recv: *mut c_void,
    count: u64,
    dtype: i32,
    op: i32,
) -> Result<(DType, ReduceOp)> {
    buffers(comm, send, recv, count)?;
    let rank = comm.rank();
    let types = "PFC_F32 (1), PFC_F64 (4), PFC_I32 (5) or PFC_I64 (6)";
    let element =
        DType::from_code(dtype).ok_or_else(|| error!(InvalidArgument, "dtype must be {types}, got {dtype} (rank {rank})"))?;
    let op = ReduceOp::from_code(op)
        .ok_or_else(|| error!(InvalidArgument, "op must be PFC_SUM (1) or PFC_MAX (2), got {op} (rank {rank})"))?;
    Ok((element, op))
}

/// Calls and bytes of this rank so far.
///
/// @param out written
#[no_mangle]
pub unsafe extern "C" fn pfc_comm_traffic(comm: *const pfc_comm, out: *mut pfc_traffic) -> pfc_status {
    boundary(|| {
        let comm = &required("comm", comm)?.comm;
        comm.own_process()?;
        let traffic = comm.traffic();
        let calls = |op: Operation| traffic.calls[op as usize];
        let bytes = |op: Operation| traffic.bytes[op as usize];
        *output("out", out)? = pfc_traffic {
            all_gather_calls: calls(Operation::AllGather),
            all_gather_bytes: bytes(Operation::AllGather),
            all_reduce_calls: calls(Operation::AllReduce),
            all_reduce_bytes: bytes(Operation::AllReduce),
            reduce_scatter_calls: calls(Operation::ReduceScatter),
            reduce_scatter_bytes: bytes(Operation::ReduceScatter),
            broadcast_calls: calls(Operation::Broadcast),
            broadcast_bytes: bytes(Operation::Broadcast),
            barrier_calls: calls(Operation::Barrier),
        };
        Ok(())
    })
}

/// Sets the longest time that a later wait of this rank may take.
///
/// @param timeout_ms milliseconds, at least 1 (default: 600000)
#[no_mangle]
pub unsafe extern "C" fn pfc_comm_set_timeout(comm: *mut pfc_comm, timeout_ms: u64) -> pfc_status {
    boundary(|| {
        let comm = &required("comm", comm)?.comm;
        comm.own_process()?;
        comm.set_timeout(Duration::from_millis(timeout_ms))
    })
}

/// Ends the communicator: running and later operations fail with ABORTED, on every rank that can be reached. From any thread.
#[no_mangle]
pub unsafe extern "C" fn pfc_comm_abort(comm: *const pfc_comm) -> pfc_status {
    boundary(|| {
        let comm = &required("comm", comm)?.comm;
        comm.own_process()?;
        comm.abort(&error!(Aborted, "pfc_comm_abort was called on rank {}", comm.rank()));
        Ok(())
    })
}

/// Frees this rank's communicator. Heads on it keep it alive until they are freed. NULL is fine.
#[no_mangle]
pub unsafe extern "C" fn pfc_comm_free(comm: *mut pfc_comm) {
    if !comm.is_null() {
        boundary(|| {
            drop(Box::from_raw(comm));
            Ok(())
        });
    }
}

#[cfg(test)]
mod tests;
