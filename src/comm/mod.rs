//! Communicators: the collectives a head needs, over whatever carries them.
//!
//! [`Transport`] is what a carrier fills in (self, threads, a caller's table of functions; later NCCL). [`Communicator`] is
//! what the head and the C interface speak to: it checks sizes, counts traffic, numbers the operations, bounds every wait by
//! the timeout and remembers a failure, so that after an abort no operation is started again.

mod custom;
mod handshake;
mod single;
mod threads;

use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

pub use custom::{CustomOps, Memory};
pub use handshake::agree;

use crate::matrix::DType;
use crate::{ensure, error, Error, Result, Status};

/// How an all-reduce or a reduce-scatter combines the ranks' values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum ReduceOp {
    Sum = 1,
    Max = 2,
}

impl ReduceOp {
    pub fn from_code(code: i32) -> Option<ReduceOp> {
        [ReduceOp::Sum, ReduceOp::Max].into_iter().find(|&op| op as i32 == code)
    }
}

/// Which collective: names it in messages and indexes the traffic counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    AllGather,
    AllReduce,
    ReduceScatter,
    Broadcast,
    Barrier,
}

impl Operation {
    pub const ALL: [Operation; 5] =
        [Operation::AllGather, Operation::AllReduce, Operation::ReduceScatter, Operation::Broadcast, Operation::Barrier];

    pub fn name(self) -> &'static str {
        match self {
            Operation::AllGather => "all_gather",
            Operation::AllReduce => "all_reduce",
            Operation::ReduceScatter => "reduce_scatter",
            Operation::Broadcast => "broadcast",
            Operation::Barrier => "barrier",
        }
    }
}

/// One operation on its way: which one of the communicator's life, on which stream, until when.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    pub operation: Operation,
    /// 1 for the communicator's first operation; the same on all ranks as long as they call in one order.
    pub sequence: u64,
    /// A CUDA stream, or NULL for host memory.
    pub stream: *mut c_void,
    pub deadline: Instant,
    pub timeout: Duration,
}

impl Call {
    /// "all_reduce #17": how messages name the operation.
    pub fn label(&self) -> String {
        format!("{} #{}", self.operation.name(), self.sequence)
    }
}

/// What carries the collectives between ranks.
///
/// Every method is called by one thread at a time (`abort` apart, which may come from any thread at any time and must make a
/// waiting operation return). `send` may equal `recv` where the sizes allow it (for all_gather: `send == recv + rank * bytes`).
/// Results of reductions have the same bits on every rank.
///
/// # Safety
/// The pointers are valid for the sizes named, in memory that the transport can reach, until the method returns
/// (stream-ordered transports: until the stream has run it).
pub trait Transport: Send + Sync {
    fn kind(&self) -> &'static str;
    fn rank(&self) -> u32;
    fn size(&self) -> u32;
    /// Gathers `bytes` bytes from every rank, in rank order, into `size * bytes` bytes at `recv`.
    unsafe fn all_gather(&self, send: *const u8, recv: *mut u8, bytes: usize, call: &Call) -> Result<()>;
    /// Combines `count` elements over the ranks; every rank gets the result.
    unsafe fn all_reduce(&self, send: *const u8, recv: *mut u8, count: usize, dtype: DType, op: ReduceOp, call: &Call) -> Result<()>;
    /// Combines `size * count` elements over the ranks; rank r gets elements `r * count ..`, `count` of them.
    unsafe fn reduce_scatter(&self, send: *const u8, recv: *mut u8, count: usize, dtype: DType, op: ReduceOp, call: &Call)
        -> Result<()>;
    /// Copies `bytes` bytes at `buffer` of rank `root` to all ranks.
    unsafe fn broadcast(&self, buffer: *mut u8, bytes: usize, root: u32, call: &Call) -> Result<()>;
    fn barrier(&self, call: &Call) -> Result<()>;
    /// Makes running and later operations fail on every rank that can be told.
    fn abort(&self, cause: &Error);
}

/// Bytes by operation since the communicator was made, as `pfc_comm_traffic` tells them.
///
/// Counted is what a rank hands to the operation: all_gather its own block, all_reduce and broadcast the buffer, reduce_scatter the
/// whole input; a barrier counts calls only. The figures do not depend on the carrier's algorithm, so a plan can predict them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    pub calls: [u64; 5],
    pub bytes: [u64; 5],
}

/// The longest an operation waits unless told otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_millis(600_000);

/// One rank's end of a group of ranks. Cheap to share: heads hold it in an [`Arc`].
pub struct Communicator {
    transport: Box<dyn Transport>,
    /// Held while an operation runs, so that two threads cannot enter the transport at once.
    running: Mutex<Ledger>,
    timeout_ms: AtomicU64,
    /// The failure that ended this communicator, if one did.
    failure: Mutex<Option<Error>>,
    process: u32,
}

#[derive(Default)]
struct Ledger {
    sequence: u64,
    traffic: Traffic,
}

impl Communicator {
    pub fn new(transport: Box<dyn Transport>) -> Arc<Communicator> {
        Arc::new(Communicator {
            transport,
            running: Mutex::default(),
            timeout_ms: AtomicU64::new(DEFAULT_TIMEOUT.as_millis() as u64),
            failure: Mutex::default(),
            process: std::process::id(),
        })
    }

    /// A group of one rank.
    pub fn single() -> Arc<Communicator> {
        Communicator::new(Box::new(single::Single))
    }

    /// `size` ranks in this process; hand each to a thread of its own.
    pub fn threads(size: u32) -> Result<Vec<Arc<Communicator>>> {
        Ok(threads::group(size)?.into_iter().map(|end| Communicator::new(Box::new(end))).collect())
    }

    /// A rank of a group that the caller's functions carry.
    pub fn custom(ops: CustomOps) -> Result<Arc<Communicator>> {
        Ok(Communicator::new(Box::new(custom::Custom::new(ops)?)))
    }

    pub fn kind(&self) -> &'static str {
        self.transport.kind()
    }

    pub fn rank(&self) -> u32 {
        self.transport.rank()
    }

    pub fn size(&self) -> u32 {
        self.transport.size()
    }

    /// Bounds every later wait. 0 is refused: an operation needs some time.
    pub fn set_timeout(&self, timeout: Duration) -> Result<()> {
        ensure!(!timeout.is_zero(), InvalidArgument, "timeout is 0 ms on rank {}", self.rank());
        self.timeout_ms.store(timeout.as_millis().min(u64::MAX.into()) as u64, Ordering::Relaxed);
        Ok(())
    }

    pub fn traffic(&self) -> Traffic {
        self.lock().traffic
    }

    /// Ends the communicator on every rank that can be told; waiting operations return. From any thread.
    pub fn abort(&self, cause: &Error) {
        let mut failure = self.failure.lock().unwrap_or_else(|e| e.into_inner());
        if failure.is_none() {
            log::warn!("rank {}: communicator aborted: {cause}", self.rank());
            *failure = Some(cause.clone());
        }
        drop(failure);
        self.transport.abort(cause);
    }

    /// The failure that ended this communicator, if one did.
    pub fn failure(&self) -> Option<Error> {
        self.failure.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// # Safety
    /// As [`Transport::all_gather`].
    pub unsafe fn all_gather_raw(&self, send: *const u8, recv: *mut u8, bytes: usize, stream: *mut c_void) -> Result<()> {
        self.run(Operation::AllGather, bytes, stream, |call| self.transport.all_gather(send, recv, bytes, call))
    }

    /// # Safety
    /// As [`Transport::all_reduce`].
    pub unsafe fn all_reduce_raw(
        &self,
        send: *const u8,
        recv: *mut u8,
        count: usize,
        dtype: DType,
        op: ReduceOp,
        stream: *mut c_void,
    ) -> Result<()> {
        let bytes = self.reduced_bytes(count, dtype, 1)?;
        self.run(Operation::AllReduce, bytes, stream, |call| self.transport.all_reduce(send, recv, count, dtype, op, call))
    }

    /// # Safety
    /// As [`Transport::reduce_scatter`].
    pub unsafe fn reduce_scatter_raw(
        &self,
        send: *const u8,
        recv: *mut u8,
        count: usize,
        dtype: DType,
        op: ReduceOp,
        stream: *mut c_void,
    ) -> Result<()> {
        let bytes = self.reduced_bytes(count, dtype, self.size() as usize)?;
        self.run(Operation::ReduceScatter, bytes, stream, |call| self.transport.reduce_scatter(send, recv, count, dtype, op, call))
    }

    /// # Safety
    /// As [`Transport::broadcast`].
    pub unsafe fn broadcast_raw(&self, buffer: *mut u8, bytes: usize, root: u32, stream: *mut c_void) -> Result<()> {
        ensure!(root < self.size(), InvalidArgument, "root is {root} of {} ranks, on rank {}", self.size(), self.rank());
        self.run(Operation::Broadcast, bytes, stream, |call| self.transport.broadcast(buffer, bytes, root, call))
    }

    pub fn barrier(&self) -> Result<()> {
        self.run(Operation::Barrier, 0, std::ptr::null_mut(), |call| self.transport.barrier(call))
    }

    /// Gathers equal blocks of host memory, in rank order.
    pub fn all_gather<T: Element>(&self, send: &[T], recv: &mut [T]) -> Result<()> {
        assert_eq!(recv.len(), send.len() * self.size() as usize, "all_gather of {} elements", send.len());
        // SAFETY: both are host slices of plain numbers, of the sizes the operation reads and writes.
        unsafe { self.all_gather_raw(send.as_ptr().cast(), recv.as_mut_ptr().cast(), std::mem::size_of_val(send), std::ptr::null_mut()) }
    }

    /// Combines host memory over the ranks, in place.
    pub fn all_reduce<T: Element>(&self, values: &mut [T], op: ReduceOp) -> Result<()> {
        let data = values.as_mut_ptr().cast::<u8>();
        // SAFETY: one host slice of plain numbers, reduced in place.
        unsafe { self.all_reduce_raw(data, data, values.len(), T::DTYPE, op, std::ptr::null_mut()) }
    }

    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.running.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn reduced_bytes(&self, count: usize, dtype: DType, blocks: usize) -> Result<usize> {
        ensure!(
            matches!(dtype, DType::F32 | DType::F64 | DType::I32 | DType::I64),
            InvalidArgument,
            "a reduction takes f32, f64, i32 or i64, not {}, on rank {}",
            dtype.name(),
            self.rank()
        );
        count.checked_mul(blocks).and_then(|n| n.checked_mul(dtype.size())).ok_or_else(|| {
            error!(InvalidArgument, "count is {count} on rank {}: more than the address space", self.rank())
        })
    }

    fn run(&self, operation: Operation, bytes: usize, stream: *mut c_void, body: impl FnOnce(&Call) -> Result<()>) -> Result<()> {
        ensure!(
            self.process == std::process::id(),
            Forked,
            "the communicator of rank {} was made in process {}, this is process {}",
            self.rank(),
            self.process,
            std::process::id()
        );
        let mut ledger = self.lock();
        if let Some(cause) = self.failure() {
            return Err(error!(Aborted, "rank {}: the communicator had ended before {}: {cause}", self.rank(), operation.name()));
        }
        ledger.sequence += 1;
        ledger.traffic.calls[operation as usize] += 1;
        ledger.traffic.bytes[operation as usize] += bytes as u64;
        let timeout = Duration::from_millis(self.timeout_ms.load(Ordering::Relaxed));
        let call = Call { operation, sequence: ledger.sequence, stream, deadline: far(timeout), timeout };
        let outcome = body(&call);
        if let Err(cause) = &outcome {
            // The other ranks may be inside the same operation: nothing after it can be trusted to line up.
            self.abort(cause);
        }
        outcome
    }
}

/// Now plus a timeout, at most some centuries ahead (`Instant` overflows beyond).
fn far(timeout: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(timeout).unwrap_or_else(|| now + Duration::from_secs(1 << 33))
}

/// Numbers that a collective may carry.
pub trait Element: Copy + Send + Sync + 'static {
    const DTYPE: DType;
}

macro_rules! elements {
    ($($t:ty => $dtype:ident),*) => { $(impl Element for $t { const DTYPE: DType = DType::$dtype; })* };
}
elements!(f32 => F32, f64 => F64, i32 => I32, i64 => I64);
