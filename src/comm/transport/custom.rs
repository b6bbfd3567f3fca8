//! A rank of a group that the caller's functions carry: MPI, a framework's own collectives, a test's.
//!
//! A function runs on the thread that called the library (MPI_THREAD_FUNNELED is enough) and only itself knows how to stop
//! waiting. So the watchdog calls the callbacks's `abort` once a deadline has passed; the function must then return, and what functions
//! have left on streams must end. Without `abort` nothing can stop it: the watchdog says so in the log.
//!
//! A device's memory goes to functions that take it; otherwise, and where an optional function is missing, it goes through a host
//! buffer, which makes the host wait for the stream.

use std::ffi::{c_char, c_void, CStr};
use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex, MutexGuard};

use super::watchdog::{aborted, OperationOutcome, Stop, Watchdog};
use super::{Call, MemorySpace, Reduction, Transport};
use crate::memory::zeros;
use crate::stream::StreamMemory;
use crate::{ensure, error, Error, Result};

pub type AllGatherFn = unsafe extern "C" fn(*mut c_void, *const c_void, *mut c_void, u64, *mut c_void) -> i32;
pub type ReduceFn = unsafe extern "C" fn(*mut c_void, *const c_void, *mut c_void, u64, i32, i32, *mut c_void) -> i32;
pub type BroadcastFn = unsafe extern "C" fn(*mut c_void, *mut c_void, u64, u32, *mut c_void) -> i32;
pub type StatusFn = unsafe extern "C" fn(*mut c_void) -> i32;
pub type ErrorStringFn = unsafe extern "C" fn(*mut c_void, i32, *mut c_char, u64);
pub type NotifyFn = unsafe extern "C" fn(*mut c_void);

const HOST_MEMORY: u32 = 1;
const DEVICE_MEMORY: u32 = 2;
const STREAM_ORDERED: u32 = 4;

/// Bytes that the replacement of a missing broadcast gathers from each rank at a time.
const PIECE: usize = 4 << 20;

/// The caller's functions, as `pfc_comm_ops` documents them.
#[derive(Clone, Copy, Debug)]
pub struct CustomOps {
    pub ctx: *mut c_void,
    pub rank: u32,
    pub size: u32,
    pub flags: u32,
    pub all_gather: Option<AllGatherFn>,
    pub all_reduce: Option<ReduceFn>,
    pub reduce_scatter: Option<ReduceFn>,
    pub broadcast: Option<BroadcastFn>,
    pub barrier: Option<StatusFn>,
    pub abort: Option<NotifyFn>,
    pub async_error: Option<StatusFn>,
    pub error_string: Option<ErrorStringFn>,
    pub free: Option<NotifyFn>,
}

pub struct Custom {
    callbacks: Arc<Callbacks>,
    /// Goes before the callbacks's `free`.
    watchdog: ManuallyDrop<Watchdog>,
    all_gather: AllGatherFn,
    all_reduce: ReduceFn,
    /// What a device's memory goes through; kept, since most operations come again in the next step.
    stage: Mutex<Vec<u64>>,
}

/// How an operation's buffers reach the caller's functions.
enum Route<'a> {
    /// As they are, with this stream.
    Direct(*mut c_void),
    /// Through host memory.
    Staged(Staging<'a>),
}

/// A host buffer that stands for a device's.
struct Staging<'a> {
    memory: &'a dyn StreamMemory,
    stream: *mut c_void,
    buffer: MutexGuard<'a, Vec<u64>>,
}

impl Staging<'_> {
    /// The buffer, grown if need be.
    fn reserve(&mut self, bytes: usize) -> std::result::Result<*mut u8, Failure> {
        if self.buffer.len() < bytes.div_ceil(8) {
            // The old one first: two need not fit.
            *self.buffer = Vec::new();
            *self.buffer = temporary(bytes)?;
        }
        Ok(self.buffer.as_mut_ptr().cast())
    }

    unsafe fn fetch(&self, host: *mut u8, device: *const u8, bytes: usize) -> Outcome {
        match bytes {
            0 => Ok(()),
            _ => self.memory.to_host(host, device, bytes, self.stream).map_err(Failure::Ours),
        }
    }

    unsafe fn put(&self, device: *mut u8, host: *const u8, bytes: usize) -> Outcome {
        match bytes {
            0 => Ok(()),
            _ => self.memory.to_device(device, host, bytes, self.stream).map_err(Failure::Ours),
        }
    }
}

/// The caller's functions, as the watchdog knows them too.
struct Callbacks {
    ops: CustomOps,
}

// SAFETY: the caller promises that `abort` and `error_string` may be called from any thread, and the others from whichever thread
// is inside the library, one at a time; `ctx` is theirs alone.
unsafe impl Send for Callbacks {}
unsafe impl Sync for Callbacks {}

/// Why an operation did not come about.
enum Failure {
    /// A function of the caller's, and what it returned.
    Code(&'static str, i32),
    Ours(Error),
}

type Outcome = std::result::Result<(), Failure>;

/// Every rank's block of a handshake is held at once, and an error's sum names ranks below this.
const LARGEST_GROUP: u32 = 65_534;

impl Custom {
    /// Checks the callbacks. `free` is not called if it is refused.
    pub fn new(ops: CustomOps) -> Result<Custom> {
        let CustomOps { rank, size, flags, .. } = ops;
        ensure!(
            (1..=LARGEST_GROUP).contains(&size),
            InvalidArgument,
            "ops.size must be 1 to {LARGEST_GROUP}, got {size} (rank {rank})"
        );
        ensure!(rank < size, InvalidArgument, "ops.rank must be below ops.size, {size}, got {rank}");
        let unknown = flags & !(HOST_MEMORY | DEVICE_MEMORY | STREAM_ORDERED);
        ensure!(
            unknown == 0,
            Unsupported,
            "ops.flags must not contain {unknown:#x}, which is unknown, got {flags:#x} (rank {rank})"
        );
        ensure!(flags & HOST_MEMORY != 0, Unsupported, "ops.flags must contain PFC_COMM_HOST_MEMORY, got {flags:#x} (rank {rank})");
        ensure!(
            flags & STREAM_ORDERED == 0 || flags & DEVICE_MEMORY != 0,
            Unsupported,
            "ops.flags must contain PFC_COMM_DEVICE_MEMORY beside PFC_COMM_STREAM_ORDERED, got {flags:#x} (rank {rank})"
        );
        let missing = |slot: &str| error!(InvalidArgument, "ops.{slot} must not be NULL (rank {rank})");
        let all_gather = ops.all_gather.ok_or_else(|| missing("all_gather"))?;
        let all_reduce = ops.all_reduce.ok_or_else(|| missing("all_reduce"))?;
        let callbacks = Arc::new(Callbacks { ops });
        let watchdog = ManuallyDrop::new(Watchdog::new(callbacks.clone()));
        Ok(Custom { callbacks, watchdog, all_gather, all_reduce, stage: Mutex::default() })
    }

    /// An operation of no elements: nothing to call a function for, but the communicator may have failed meanwhile.
    fn nothing(&self, call: &Call<'_>) -> Result<()> {
        self.operate(call, || Ok(()))
    }

    /// Runs the caller's functions under the watchdog and makes a status of their codes.
    fn operate(&self, call: &Call<'_>, body: impl FnOnce() -> Outcome) -> Result<()> {
        let callbacks = &*self.callbacks;
        let rank = callbacks.ops.rank;
        self.watchdog.start(call)?;
        let outcome = match callbacks.ops.async_error {
            // SAFETY: the caller's function with the caller's pointer.
            Some(ask) => match unsafe { ask(callbacks.ops.ctx) } {
                0 => body(),
                code => Err(Failure::Code("async_error", code)),
            },
            None => body(),
        };
        let OperationOutcome { expired, ended } = self.watchdog.finish();
        if expired {
            let limit = call.timeout.as_millis();
            // Only the functions know whom they waited for.
            let text = match outcome {
                Err(Failure::Code(_, code)) => callbacks.error_text(code),
                _ => String::new(),
            };
            return Err(error!(Timeout, "{} did not finish within {limit} ms{text} (this is rank {rank})", call.label()));
        }
        match (outcome, ended) {
            (Ok(()), _) => self.follow(call),
            (Err(Failure::Ours(error)), _) => Err(error.during(call.label())),
            (Err(Failure::Code(..)), Some(cause)) => Err(aborted(call, &cause, rank)),
            (Err(Failure::Code(function, code)), None) => {
                let text = callbacks.error_text(code);
                Err(error!(Comm, "{}: the caller's {function} returned {code}{text} on rank {rank}", call.label()))
            }
        }
    }

    /// Has what a function left on a stream watched, since it returned without waiting.
    fn follow(&self, call: &Call<'_>) -> Result<()> {
        match call.space {
            MemorySpace::Device { memory, stream } if self.callbacks.ops.flags & STREAM_ORDERED != 0 => {
                let over = memory.record(stream).map_err(|error| error.during(call.label()))?;
                self.watchdog.follow(call, over)
            }
            _ => Ok(()),
        }
    }

    /// How the buffers of a call reach the functions; `slot`: whether the callbacks has the one for it. What replaces a missing one
    /// needs temporaries, which are the host's.
    fn route<'a>(&'a self, call: &Call<'a>, slot: bool) -> std::result::Result<Route<'a>, Failure> {
        let MemorySpace::Device { memory, stream } = call.space else { return Ok(Route::Direct(std::ptr::null_mut())) };
        let flags = self.callbacks.ops.flags;
        if flags & DEVICE_MEMORY == 0 || !slot {
            let buffer = self.stage.lock().unwrap_or_else(|e| e.into_inner());
            return Ok(Route::Staged(Staging { memory, stream, buffer }));
        }
        if flags & STREAM_ORDERED == 0 {
            memory.synchronize(stream).map_err(Failure::Ours)?;
        }
        Ok(Route::Direct(stream))
    }

    unsafe fn gather(&self, send: *const u8, recv: *mut u8, bytes: usize, stream: *mut c_void) -> Outcome {
        code("all_gather", (self.all_gather)(self.callbacks.ops.ctx, send.cast(), recv.cast(), bytes as u64, stream))
    }

    unsafe fn reduce(&self, send: *const u8, recv: *mut u8, count: usize, reduction: Reduction, stream: *mut c_void) -> Outcome {
        let (ctx, dtype, op) = (self.callbacks.ops.ctx, reduction.dtype as i32, reduction.op as i32);
        let returned = (self.all_reduce)(ctx, send.cast(), recv.cast(), count as u64, dtype, op, stream);
        code("all_reduce", returned)
    }

    unsafe fn scatter(&self, send: *const u8, recv: *mut u8, count: usize, reduction: Reduction, stream: *mut c_void) -> Outcome {
        let CustomOps { ctx, rank, size, reduce_scatter, .. } = self.callbacks.ops;
        match reduce_scatter {
            Some(f) => {
                let (dtype, op) = (reduction.dtype as i32, reduction.op as i32);
                let returned = f(ctx, send.cast(), recv.cast(), count as u64, dtype, op, stream);
                code("reduce_scatter", returned)
            }
            None => {
                let bytes = reduction.bytes(count);
                let mut whole = temporary(size as usize * bytes)?;
                let whole = whole.as_mut_ptr().cast::<u8>();
                self.reduce(send, whole, size as usize * count, reduction, stream)?;
                std::ptr::copy_nonoverlapping(whole.add(rank as usize * bytes), recv, bytes);
                Ok(())
            }
        }
    }

    unsafe fn cast(&self, buffer: *mut u8, bytes: usize, root: u32, stream: *mut c_void) -> Outcome {
        let CustomOps { ctx, rank, size, broadcast, .. } = self.callbacks.ops;
        match broadcast {
            Some(f) => code("broadcast", f(ctx, buffer.cast(), bytes as u64, root, stream)),
            None => {
                let mut blocks = temporary(size as usize * bytes.min(PIECE))?;
                let blocks = blocks.as_mut_ptr().cast::<u8>();
                for start in (0..bytes).step_by(PIECE) {
                    let (piece, bytes) = (buffer.add(start), PIECE.min(bytes - start));
                    self.gather(piece, blocks, bytes, stream)?;
                    if rank != root {
                        std::ptr::copy_nonoverlapping(blocks.add(root as usize * bytes), piece, bytes);
                    }
                }
                Ok(())
            }
        }
    }
}

impl Stop for Callbacks {
    fn rank(&self) -> u32 {
        self.ops.rank
    }

    fn stop(&self) {
        if let Some(abort) = self.ops.abort {
            // SAFETY: the caller's function, which may be called from any thread, with the caller's pointer.
            unsafe { abort(self.ops.ctx) }
        }
    }

    fn cannot_stop_reason(&self) -> Option<&'static str> {
        match self.ops.abort {
            Some(_) => None,
            None => Some("nothing can stop it, since ops.abort is NULL"),
        }
    }
}

impl Callbacks {
    /// " (text)" of a code, or nothing.
    fn error_text(&self, code: i32) -> String {
        let Some(error_string) = self.ops.error_string else { return String::new() };
        let mut buffer = [0u8; 256];
        // SAFETY: the caller's function writes at most the size it is told.
        unsafe { error_string(self.ops.ctx, code, buffer.as_mut_ptr().cast(), buffer.len() as u64) }
        buffer[buffer.len() - 1] = 0;
        match CStr::from_bytes_until_nul(&buffer) {
            Ok(text) if !text.is_empty() => format!(" ({})", text.to_string_lossy()),
            _ => String::new(),
        }
    }
}

impl Transport for Custom {
    fn kind(&self) -> &'static str {
        "custom"
    }

    fn is_asynchronous(&self) -> bool {
        self.callbacks.ops.flags & STREAM_ORDERED != 0
    }

    fn rank(&self) -> u32 {
        self.callbacks.ops.rank
    }

    fn size(&self) -> u32 {
        self.callbacks.ops.size
    }

    unsafe fn all_gather(&self, send: *const u8, recv: *mut u8, bytes: usize, call: &Call<'_>) -> Result<()> {
        let (rank, size) = (self.rank() as usize, self.size() as usize);
        if bytes == 0 {
            return self.nothing(call);
        }
        self.operate(call, || match self.route(call, true)? {
            Route::Direct(stream) => self.gather(send, recv, bytes, stream),
            Route::Staged(mut staging) => {
                let host = staging.reserve(size * bytes)?;
                let own = host.add(rank * bytes);
                staging.fetch(own, send, bytes)?;
                self.gather(own, host, bytes, std::ptr::null_mut())?;
                staging.put(recv, host, size * bytes)
            }
        })
    }

    unsafe fn all_reduce(&self, send: *const u8, recv: *mut u8, count: usize, reduction: Reduction, call: &Call<'_>) -> Result<()> {
        let bytes = reduction.bytes(count);
        if bytes == 0 {
            return self.nothing(call);
        }
        self.operate(call, || match self.route(call, true)? {
            Route::Direct(stream) => self.reduce(send, recv, count, reduction, stream),
            Route::Staged(mut staging) => {
                let host = staging.reserve(bytes)?;
                staging.fetch(host, send, bytes)?;
                self.reduce(host, host, count, reduction, std::ptr::null_mut())?;
                staging.put(recv, host, bytes)
            }
        })
    }

    unsafe fn reduce_scatter(
        &self,
        send: *const u8,
        recv: *mut u8,
        count: usize,
        reduction: Reduction,
        call: &Call<'_>,
    ) -> Result<()> {
        let CustomOps { rank, size, reduce_scatter, .. } = self.callbacks.ops;
        let bytes = reduction.bytes(count);
        if bytes == 0 {
            return self.nothing(call);
        }
        self.operate(call, || match self.route(call, reduce_scatter.is_some())? {
            Route::Direct(stream) => self.scatter(send, recv, count, reduction, stream),
            Route::Staged(mut staging) => {
                let host = staging.reserve(size as usize * bytes)?;
                let own = host.add(rank as usize * bytes);
                staging.fetch(host, send, size as usize * bytes)?;
                self.scatter(host, own, count, reduction, std::ptr::null_mut())?;
                staging.put(recv, own, bytes)
            }
        })
    }

    unsafe fn broadcast(&self, buffer: *mut u8, bytes: usize, root: u32, call: &Call<'_>) -> Result<()> {
        let CustomOps { rank, broadcast, .. } = self.callbacks.ops;
        if bytes == 0 {
            return self.nothing(call);
        }
        self.operate(call, || match self.route(call, broadcast.is_some())? {
            Route::Direct(stream) => self.cast(buffer, bytes, root, stream),
            Route::Staged(mut staging) => {
                let host = staging.reserve(bytes)?;
                if rank == root {
                    staging.fetch(host, buffer, bytes)?;
                }
                self.cast(host, bytes, root, std::ptr::null_mut())?;
                if rank == root {
                    return Ok(());
                }
                staging.put(buffer, host, bytes)
            }
        })
    }

    fn barrier(&self, call: &Call<'_>) -> Result<()> {
        let CustomOps { ctx, size, barrier, .. } = self.callbacks.ops;
        self.operate(call, || match barrier {
            // SAFETY: the caller's function with the caller's pointer.
            Some(f) => code("barrier", unsafe { f(ctx) }),
            None => {
                let (token, mut tokens) = ([0u64; 1], temporary(size as usize * 8)?);
                // SAFETY: host buffers of one and of `size` blocks of eight bytes.
                unsafe { self.gather(token.as_ptr().cast(), tokens.as_mut_ptr().cast(), 8, std::ptr::null_mut()) }
            }
        })
    }

    fn poll_failure(&self) -> Result<()> {
        self.watchdog.poll_failure()
    }

    fn abort(&self, cause: &Error) {
        self.watchdog.end(cause);
    }
}

impl Drop for Custom {
    fn drop(&mut self) {
        // SAFETY: dropped here alone, and not used again.
        unsafe { ManuallyDrop::drop(&mut self.watchdog) };
        if let Some(free) = self.callbacks.ops.free {
            // SAFETY: the caller's function with the caller's pointer, the last call with it.
            unsafe { free(self.callbacks.ops.ctx) }
        }
    }
}

fn code(function: &'static str, returned: i32) -> Outcome {
    match returned {
        0 => Ok(()),
        code => Err(Failure::Code(function, code)),
    }
}

/// Zeroed memory, aligned for every element type.
fn temporary(bytes: usize) -> std::result::Result<Vec<u64>, Failure> {
    zeros(&[bytes.div_ceil(8)], "a temporary").map_err(Failure::Ours)
}
