//! NCCL carries the collectives between GPUs, on the streams that they come with.
//!
//! The communicator is a non-blocking one: no function of NCCL's waits, [`Group::wait_for_state`] does, until a deadline. What NCCL has taken
//! runs on the stream; the watchdog looks after it and asks NCCL for errors, and aborts the communicator where there is one or a
//! deadline has passed, which makes the streams go on. NCCL does not tell which rank it waits for.
//!
//! Host memory (the few words that ranks agree on; a caller's own collectives) goes through memory of the device's, and its
//! operations wait.

mod library;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nccl_sys::{ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclResult_t, ncclUniqueId, unset_config};

use self::library::{call, library, Library};
use super::number::Number;
use super::watchdog::{aborted, Stop, Watchdog};
use super::{Call, Element, MemorySpace, Reduction, Transport};
use crate::matrix::{DType, ReduceOp};
use crate::memory::zeros;
use crate::stream::{Scratch, StreamDevice, StreamMemory};
use crate::{ensure, error, Error, Result, Status};

/// Bytes of the id that the ranks of a communicator share.
pub const ID_BYTES: usize = 128;

/// Thread blocks that NCCL runs at once, at most: as many multiprocessors as the third product leaves beside the reduce-scatter
/// (SPARED_BY_CENTERS in src/device/cuda/head.rs). With more, some would wait for a product to end, and the others for them. Beside the
/// second product, which leaves half as many, runs an all-reduce of some kilobytes, for which NCCL takes fewer by itself.
const MOST_BLOCKS: i32 = 8;

/// Time allowed for ncclCommFinalize before we abort.
const FINALIZE_TIMEOUT: Duration = Duration::from_secs(2);

/// Where in scratch memory the second of two buffers may begin.
const ALIGNMENT: usize = 256;
/// Bytes that the largest of floats gathers from each rank at a time.
const PIECE: usize = 1 << 20;

/// A new communicator's id, to be brought to all its ranks.
///
/// Errors: UNSUPPORTED without NCCL; COMM where it has no network.
pub fn unique_id() -> Result<[u8; ID_BYTES]> {
    let library = library()?;
    let mut id = ncclUniqueId { internal: [0; ID_BYTES] };
    // SAFETY: an output that outlives the call.
    let result = unsafe { call!(library, ncclGetUniqueId(&mut id)) }?;
    library.expect_success("ncclGetUniqueId", result, std::ptr::null_mut())?;
    Ok(id.internal.map(|byte| byte as u8))
}

pub struct Nccl {
    // In this order they go: the group only when nobody watches it any more and nothing is enqueued.
    watchdog: Watchdog,
    /// For host memory.
    scratch: Mutex<Box<dyn Scratch>>,
    group: Arc<Group>,
}

/// This rank's end of a communicator of NCCL's.
struct Group {
    nccl: &'static Library,
    device: Arc<dyn StreamDevice>,
    rank: u32,
    size: u32,
    /// `None` once it is aborted.
    handle: Mutex<Option<Handle>>,
}

#[derive(Clone, Copy)]
struct Handle(ncclComm_t);

// SAFETY: any thread may call with a communicator, one at a time.
unsafe impl Send for Handle {}

impl Nccl {
    /// Joins the group. Collective; returns when all ranks have come, or after `timeout`.
    pub fn join(id: &[u8; ID_BYTES], rank: u32, size: u32, device: Arc<dyn StreamDevice>, timeout: Duration) -> Result<Nccl> {
        ensure!((1..=i32::MAX as u32).contains(&size), InvalidArgument, "size must be 1 to {}, got {size} (rank {rank})", i32::MAX);
        ensure!(rank < size, InvalidArgument, "rank must be below size, {size}, got {rank}");
        let named = |error: Error| error.during(format_args!("rank {rank} of {size} joining by NCCL"));
        let library = library()?;
        let scratch = device.scratch().map_err(named)?;
        let mut config = unset_config();
        (config.blocking, config.maxCTAs) = (0, MOST_BLOCKS);
        let id = ncclUniqueId { internal: id.map(|byte| byte as _) };
        let mut comm: ncclComm_t = std::ptr::null_mut();
        let result = {
            let _current = device.make_current()?;
            // SAFETY: outputs and a configuration that outlive the call; NCCL copies what it keeps.
            unsafe { call!(library, ncclCommInitRankConfig(&mut comm, size as i32, id, rank as i32, &mut config)) }?
        };
        let handle = (!comm.is_null()).then_some(Handle(comm));
        let group = Arc::new(Group { nccl: library, device, rank, size, handle: Mutex::new(handle) });
        let joined = library.expect_success("ncclCommInitRankConfig", result, comm).and_then(|()| {
            let timeout_error = || error!(Timeout, "not all ranks joined within {} ms", timeout.as_millis());
            group.wait_for_state("ncclCommInitRankConfig", Instant::now() + timeout, timeout_error)
        });
        if let Err(error) = joined {
            group.stop();
            return Err(named(error));
        }
        Ok(Nccl { watchdog: Watchdog::new(group.clone()), scratch: Mutex::new(scratch), group })
    }

    /// Hands NCCL one operation on a stream of `memory`'s and has it watched.
    fn enqueue(
        &self,
        call: &Call<'_>,
        (memory, stream): (&dyn StreamMemory, *mut std::ffi::c_void),
        function: &'static str,
        launch: impl FnOnce(ncclComm_t) -> Result<ncclResult_t>,
    ) -> Result<()> {
        let Group { device, rank, .. } = &*self.group;
        ensure!(
            memory.kind() == device.kind(),
            Unsupported,
            "{}: NCCL needs {} memory, got {} memory (rank {rank})",
            call.label(),
            device.kind(),
            memory.kind()
        );
        let named = |error: Error| match self.watchdog.poll_failure() {
            // Another thread has aborted it meanwhile: the watchdog's, whose news this is, or a caller's.
            Err(cause) if error.status == Status::Aborted => match cause.status {
                Status::Aborted => aborted(call, &cause, *rank),
                _ => cause,
            },
            _ => on_rank(error.during(call.label()), *rank),
        };
        self.group.issue(function, call, launch).map_err(named)?;
        let over = memory.record(stream).map_err(named)?;
        self.watchdog.follow(call, over)
    }

    /// An operation on a buffer of the host's, through the device's memory: `launch` gets where the bytes of `send` are and where
    /// those of `recv` are to go.
    unsafe fn through_device(
        &self,
        call: &Call<'_>,
        send: (*const u8, usize),
        recv: (*mut u8, usize),
        function: &'static str,
        launch: impl FnOnce(ncclComm_t, *const u8, *mut u8, *mut std::ffi::c_void) -> Result<ncclResult_t>,
    ) -> Result<()> {
        let memory = &*self.group.device;
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let (stream, from) = (scratch.stream(), send.1.next_multiple_of(ALIGNMENT));
        let source = scratch.reserve((from + recv.1).max(1))?;
        let target = source.wrapping_add(from);
        if send.1 > 0 {
            memory.to_device(source, send.0, send.1, stream)?;
        }
        self.enqueue(call, (memory, stream), function, |comm| launch(comm, source, target, stream))?;
        memory.synchronize(stream)?;
        // What an abort has left there is nothing that the caller should see.
        self.watchdog.poll_failure()?;
        match recv.1 {
            0 => Ok(()),
            bytes => memory.to_host(recv.0, target, bytes, stream),
        }
    }

    /// The largest of floats, where NCCL loses a NaN that must win: every rank combines what all have.
    unsafe fn largest<T: Number + Element>(&self, send: *const u8, recv: *mut u8, count: usize, call: &Call<'_>) -> Result<()> {
        let size = self.group.size as usize;
        let piece = (PIECE / size_of::<T>()).min(count);
        let mut blocks: Vec<T> = zeros(&[size * piece], "a temporary").map_err(|error| error.during(call.label()))?;
        for first in (0..count).step_by(piece.max(1)) {
            let length = piece.min(count - first);
            self.all_gather(send.cast::<T>().add(first).cast(), blocks.as_mut_ptr().cast(), length * size_of::<T>(), call)?;
            for i in 0..length {
                let largest = (1..size).fold(blocks[i], |largest, rank| largest.largest(blocks[rank * length + i]));
                recv.cast::<T>().add(first + i).write_unaligned(largest);
            }
        }
        Ok(())
    }
}

impl Group {
    fn lock(&self) -> MutexGuard<'_, Option<Handle>> {
        self.handle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn gone(&self) -> Error {
        error!(Aborted, "the communicator of rank {} was aborted", self.rank)
    }

    /// Calls NCCL for an operation, and returns when NCCL has taken it.
    fn issue(&self, function: &str, call: &Call<'_>, launch: impl FnOnce(ncclComm_t) -> Result<ncclResult_t>) -> Result<()> {
        let _current = self.device.make_current()?;
        let result = {
            let handle = self.lock();
            let Handle(comm) = handle.ok_or_else(|| self.gone())?;
            let result = launch(comm)?;
            self.nccl.expect_success(function, result, comm)?;
            result
        };
        match result {
            ncclResult_t::ncclInProgress => {
                let timeout_error = || {
                    error!(Timeout, "NCCL did not accept it within {} ms (this is rank {})", call.timeout.as_millis(), self.rank)
                };
                self.wait_for_state(function, call.deadline, timeout_error)
            }
            _ => Ok(()),
        }
    }

    /// Waits until NCCL has done what it was asked for last.
    fn wait_for_state(&self, function: &str, deadline: Instant, timeout_error: impl FnOnce() -> Error) -> Result<()> {
        let mut polls = 0;
        loop {
            match self.state()? {
                ncclResult_t::ncclInProgress if Instant::now() >= deadline => return Err(timeout_error()),
                // Most of what there is to wait for takes microseconds; a rank that has yet to come, seconds.
                ncclResult_t::ncclInProgress if polls < 100 => std::thread::yield_now(),
                ncclResult_t::ncclInProgress => std::thread::sleep(Duration::from_micros(200)),
                ncclResult_t::ncclSuccess => return Ok(()),
                result => {
                    return Err(self.nccl.failure(function, result, self.lock().map_or(std::ptr::null_mut(), |handle| handle.0)))
                }
            }
            polls += 1;
        }
    }

    /// What ncclCommGetAsyncError tells.
    fn state(&self) -> Result<ncclResult_t> {
        let handle = self.lock();
        let Handle(comm) = handle.ok_or_else(|| self.gone())?;
        let mut state = ncclResult_t::ncclSuccess;
        // SAFETY: a living communicator, and an output that outlives the call.
        let result = unsafe { call!(self.nccl, ncclCommGetAsyncError(comm, &mut state)) }?;
        self.nccl.expect_success("ncclCommGetAsyncError", result, comm)?;
        Ok(state)
    }

    /// Lets go of a communicator that nothing is wrong with.
    fn leave(&self) -> Result<()> {
        let Some(Handle(comm)) = *self.lock() else { return Ok(()) };
        let _current = self.device.make_current()?;
        // SAFETY: a living communicator, which is in `handle` until it is destroyed.
        self.nccl.expect_success("ncclCommFinalize", unsafe { call!(self.nccl, ncclCommFinalize(comm)) }?, comm)?;
        let timeout_error = || error!(Timeout, "the communicator did not end within {} ms", FINALIZE_TIMEOUT.as_millis());
        self.wait_for_state("ncclCommFinalize", Instant::now() + FINALIZE_TIMEOUT, timeout_error)?;
        *self.lock() = None;
        // SAFETY: nobody else has it any more.
        self.nccl.expect_success("ncclCommDestroy", unsafe { call!(self.nccl, ncclCommDestroy(comm)) }?, comm)
    }
}

impl Stop for Group {
    fn rank(&self) -> u32 {
        self.rank
    }

    /// NCCL's kernels end, the streams go on, and the communicator is gone.
    fn stop(&self) {
        let Some(Handle(comm)) = self.lock().take() else { return };
        // Also where the device cannot be entered: nobody else can end what waits.
        let _current = self.device.make_current();
        // SAFETY: a living communicator that nobody else has any more.
        let aborted = unsafe { call!(self.nccl, ncclCommAbort(comm)) };
        if let Err(error) = aborted.and_then(|result| self.nccl.expect_success("ncclCommAbort", result, std::ptr::null_mut())) {
            log::warn!("rank {}: {error}", self.rank);
        }
    }

    fn async_error(&self) -> Result<()> {
        match self.state() {
            Ok(ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress) => Ok(()),
            Ok(result) => Err(on_rank(self.nccl.failure("ncclCommGetAsyncError", result, std::ptr::null_mut()), self.rank)),
            // It was aborted meanwhile, which whoever did it tells.
            Err(error) if error.status == Status::Aborted => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Err(error) = self.leave() {
            log::debug!("rank {}: the NCCL communicator is aborted: {error}", self.rank);
            self.stop();
        }
    }
}

fn on_rank(error: Error, rank: u32) -> Error {
    Error { message: format!("{} on rank {rank}", error.message), ..error }
}

fn data_type(dtype: DType) -> ncclDataType_t {
    match dtype {
        DType::F32 => ncclDataType_t::ncclFloat32,
        DType::F64 => ncclDataType_t::ncclFloat64,
        DType::F16 => ncclDataType_t::ncclFloat16,
        DType::Bf16 => ncclDataType_t::ncclBfloat16,
        DType::I32 => ncclDataType_t::ncclInt32,
        DType::I64 => ncclDataType_t::ncclInt64,
    }
}

fn operation(op: ReduceOp) -> ncclRedOp_t {
    match op {
        ReduceOp::Sum => ncclRedOp_t::ncclSum,
        ReduceOp::Max => ncclRedOp_t::ncclMax,
    }
}

/// Whether NCCL's own maximum is not what the trait promises.
fn loses_nan(dtype: DType, op: ReduceOp) -> bool {
    op == ReduceOp::Max && matches!(dtype, DType::F32 | DType::F64)
}

fn no_maximum(call: &Call<'_>) -> Error {
    error!(Unsupported, "{}: NCCL loses a NaN in a maximum of floats in device memory: use host memory", call.label())
}

// SAFETY of all methods: the trait's callers answer for the pointers and the stream.
impl Transport for Nccl {
    fn kind(&self) -> &'static str {
        "nccl"
    }

    fn is_asynchronous(&self) -> bool {
        true
    }

    fn rank(&self) -> u32 {
        self.group.rank
    }

    fn size(&self) -> u32 {
        self.group.size
    }

    unsafe fn all_gather(&self, send: *const u8, recv: *mut u8, bytes: usize, call: &Call<'_>) -> Result<()> {
        const NAME: &str = "ncclAllGather";
        let library = self.group.nccl;
        let launch = |comm, send: *const u8, recv: *mut u8, stream: *mut std::ffi::c_void| {
            call!(library, ncclAllGather(send.cast(), recv.cast(), bytes, ncclDataType_t::ncclUint8, comm, stream.cast()))
        };
        match call.space {
            MemorySpace::Device { memory, stream } => {
                self.enqueue(call, (memory, stream), NAME, |comm| launch(comm, send, recv, stream))
            }
            MemorySpace::Host => self.through_device(call, (send, bytes), (recv, bytes * self.group.size as usize), NAME, launch),
        }
    }

    unsafe fn all_reduce(&self, send: *const u8, recv: *mut u8, count: usize, reduction: Reduction, call: &Call<'_>) -> Result<()> {
        const NAME: &str = "ncclAllReduce";
        let (library, bytes) = (self.group.nccl, reduction.bytes(count));
        let Reduction { dtype, op } = reduction;
        let launch = |comm, send: *const u8, recv: *mut u8, stream: *mut std::ffi::c_void| {
            call!(library, ncclAllReduce(send.cast(), recv.cast(), count, data_type(dtype), operation(op), comm, stream.cast()))
        };
        match call.space {
            MemorySpace::Device { .. } if loses_nan(dtype, op) => Err(no_maximum(call)),
            MemorySpace::Device { memory, stream } => {
                self.enqueue(call, (memory, stream), NAME, |comm| launch(comm, send, recv, stream))
            }
            MemorySpace::Host if loses_nan(dtype, op) => match dtype {
                DType::F64 => self.largest::<f64>(send, recv, count, call),
                _ => self.largest::<f32>(send, recv, count, call),
            },
            MemorySpace::Host => self.through_device(call, (send, bytes), (recv, bytes), NAME, launch),
        }
    }

    unsafe fn reduce_scatter(
        &self,
        send: *const u8,
        recv: *mut u8,
        count: usize,
        reduction: Reduction,
        call: &Call<'_>,
    ) -> Result<()> {
        const NAME: &str = "ncclReduceScatter";
        let Group { nccl: library, rank, size, .. } = *self.group;
        let Reduction { dtype, op } = reduction;
        let bytes = reduction.bytes(count);
        let launch = |comm, send: *const u8, recv: *mut u8, stream: *mut std::ffi::c_void| {
            call!(library, ncclReduceScatter(send.cast(), recv.cast(), count, data_type(dtype), operation(op), comm, stream.cast()))
        };
        match call.space {
            MemorySpace::Device { .. } if loses_nan(dtype, op) => Err(no_maximum(call)),
            MemorySpace::Device { memory, stream } => {
                self.enqueue(call, (memory, stream), NAME, |comm| launch(comm, send, recv, stream))
            }
            MemorySpace::Host if loses_nan(dtype, op) => {
                let mut whole: Vec<u64> =
                    zeros(&[(bytes * size as usize).div_ceil(8)], "a temporary").map_err(|error| error.during(call.label()))?;
                let whole = whole.as_mut_ptr().cast::<u8>();
                self.all_reduce(send, whole, count * size as usize, reduction, call)?;
                std::ptr::copy(whole.add(rank as usize * bytes), recv, bytes);
                Ok(())
            }
            MemorySpace::Host => self.through_device(call, (send, bytes * size as usize), (recv, bytes), NAME, launch),
        }
    }

    unsafe fn broadcast(&self, buffer: *mut u8, bytes: usize, root: u32, call: &Call<'_>) -> Result<()> {
        const NAME: &str = "ncclBroadcast";
        let library = self.group.nccl;
        let launch = |comm, send: *const u8, recv: *mut u8, stream: *mut std::ffi::c_void| {
            let byte = ncclDataType_t::ncclUint8;
            call!(library, ncclBroadcast(send.cast(), recv.cast(), bytes, byte, root as i32, comm, stream.cast()))
        };
        match call.space {
            MemorySpace::Device { memory, stream } => {
                self.enqueue(call, (memory, stream), NAME, |comm| launch(comm, buffer, buffer, stream))
            }
            MemorySpace::Host => self.through_device(call, (buffer, bytes), (buffer, bytes), NAME, launch),
        }
    }

    fn barrier(&self, call: &Call<'_>) -> Result<()> {
        let mut token = [0i32; 1];
        let token = token.as_mut_ptr().cast::<u8>();
        // SAFETY: one integer of the host's, reduced in place.
        unsafe { self.all_reduce(token, token, 1, Reduction { dtype: DType::I32, op: ReduceOp::Sum }, call) }
    }

    fn check_device(&self, device: Option<&dyn StreamDevice>) -> Result<()> {
        let Group { device: own, rank, .. } = &*self.group;
        let (own, other) = (own.ordinal(), device.map(|other| other.ordinal()));
        // What a CPU's head exchanges goes through the GPU.
        ensure!(
            other.is_none_or(|other| other == own),
            InvalidArgument,
            "device must be GPU {own}, as the NCCL communicator is, got GPU {} (rank {rank})",
            other.unwrap_or(own)
        );
        Ok(())
    }

    fn reserve_for_host(&self, bytes: usize) -> Result<()> {
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        scratch.reserve(bytes + ALIGNMENT).map(|_| ())
    }

    fn poll_failure(&self) -> Result<()> {
        self.watchdog.poll_failure()
    }

    fn abort(&self, cause: &Error) {
        self.watchdog.end(cause);
    }
}
