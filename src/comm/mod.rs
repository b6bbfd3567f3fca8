//! Communicators: the collectives that a head needs, over any transport.
//!
//! [`Transport`] is what carries them: nothing (one rank), threads, a caller's table of functions, NCCL. [`Communicator`] is what the
//! head and the C interface speak to: it checks sizes, counts traffic, numbers the operations, bounds every wait by the timeout and
//! remembers a failure, so that after an abort no operation is started again.

mod compare_calls;
mod exchange;
mod handshake;
mod sampled_rows;
mod transport;
mod turn;

use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

pub use handshake::{agree, gather_words};
pub use sampled_rows::{all_reduce_rows, SampledRows};
pub use transport::custom::CustomOps;
pub use transport::nccl::{unique_id, ID_BYTES};
use transport::{custom, nccl, single, threads, Reduction, Signature};
pub use transport::{Call, Element, MemorySpace, Operation, Transport};
use turn::Holder;
pub use turn::Turn;

use crate::matrix::{DType, ReduceOp};
use crate::memory::reserve;
use crate::stream::StreamDevice;
use crate::{ensure, error, Error, Result};

/// Bytes by operation since the communicator was made, as `pfc_comm_traffic` tells them.
///
/// Counted is what a rank hands to the operation: all_gather its own block, all_reduce and broadcast the buffer, reduce_scatter the
/// whole input; a barrier counts calls only. The figures do not depend on the transport's algorithm, so a plan can predict them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    pub calls: [u64; 5],
    pub bytes: [u64; 5],
}

/// The longest an operation waits unless told otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_millis(600_000);

/// One rank's end of a group of ranks. Cheap to share: heads hold it in an [`Arc`].
pub struct Communicator {
    /// Not dropped in a forked child: its threads and the locks they held are the parent's.
    transport: ManuallyDrop<Box<dyn Transport>>,
    /// Which thread's operations the transport runs.
    holder: Holder,
    /// Operations so far. Held while one runs: a function of the caller's must not begin another.
    sequence: Mutex<u64>,
    /// Beside the lock: they can be asked while an operation waits.
    calls: [AtomicU64; 5],
    bytes: [AtomicU64; 5],
    /// Heads made on this end, which the other ranks make in the same order.
    heads: AtomicU64,
    timeout_ms: AtomicU64,
    /// The failure that ended this communicator, if one did.
    failure: Mutex<Option<Error>>,
    /// The ranks compare each operation before they run it.
    compares_calls: bool,
    process: u32,
}

impl Communicator {
    fn new(transport: Box<dyn Transport>, compares_calls: bool) -> Arc<Communicator> {
        Arc::new(Communicator {
            compares_calls: transport.size() > 1 && compares_calls,
            transport: ManuallyDrop::new(transport),
            holder: Holder::default(),
            sequence: Mutex::default(),
            calls: Default::default(),
            bytes: Default::default(),
            heads: AtomicU64::default(),
            timeout_ms: AtomicU64::new(DEFAULT_TIMEOUT.as_millis() as u64),
            failure: Mutex::default(),
            process: std::process::id(),
        })
    }

    /// A group of one rank.
    ///
    /// Errors, of this and of the other kinds: INVALID_ARGUMENT for a setting in the environment that is neither on nor off.
    pub fn single() -> Result<Arc<Communicator>> {
        Ok(Communicator::new(Box::new(single::Single), compare_calls::is_on()?))
    }

    /// `size` ranks in this process; hand each to a thread of its own.
    pub fn threads(size: u32) -> Result<Vec<Arc<Communicator>>> {
        let compares_calls = compare_calls::is_on()?;
        let ends = threads::group(size)?;
        let mut ranks = Vec::new();
        reserve(&mut ranks, ends.len(), "the ranks of a communicator")?;
        ranks.extend(ends.into_iter().map(|end| Communicator::new(Box::new(end), compares_calls)));
        Ok(ranks)
    }

    /// A rank of a group that the caller's functions carry.
    pub fn custom(ops: CustomOps) -> Result<Arc<Communicator>> {
        let compares_calls = compare_calls::is_on()?;
        Ok(Communicator::new(Box::new(custom::Custom::new(ops)?), compares_calls))
    }

    /// A rank of a group that NCCL joins, on a GPU; `None`: the device has no streams. Collective; waits at most `timeout` for the other
    /// ranks.
    ///
    /// Errors: UNSUPPORTED without NCCL; INVALID_ARGUMENT for a device without streams; TIMEOUT; COMM.
    pub fn nccl(
        id: &[u8; ID_BYTES],
        rank: u32,
        size: u32,
        device: Option<Arc<dyn StreamDevice>>,
        timeout: Duration,
    ) -> Result<Arc<Communicator>> {
        let device = device.ok_or_else(|| error!(InvalidArgument, "device must be a CUDA device (rank {rank})"))?;
        let compares_calls = compare_calls::is_on()?;
        Ok(Communicator::new(Box::new(nccl::Nccl::join(id, rank, size, device, timeout)?), compares_calls))
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
        ensure!(!timeout.is_zero(), InvalidArgument, "timeout must be above 0 ms, got 0 (rank {})", self.rank());
        self.timeout_ms.store(timeout.as_millis().clamp(1, u64::MAX.into()) as u64, Ordering::Relaxed);
        Ok(())
    }

    /// The number of a new head, from 0.
    pub fn count_head(&self) -> u64 {
        self.heads.fetch_add(1, Ordering::Relaxed)
    }

    pub fn traffic(&self) -> Traffic {
        let read = |counters: &[AtomicU64; 5]| std::array::from_fn(|i| counters[i].load(Ordering::Relaxed));
        Traffic { calls: read(&self.calls), bytes: read(&self.bytes) }
    }

    /// Ends the communicator on every rank that can be told; waiting operations return. From any thread.
    pub fn abort(&self, cause: &Error) {
        if self.forked() {
            return;
        }
        let mut failure = self.failure.lock().unwrap_or_else(|e| e.into_inner());
        let first = failure.is_none();
        if first {
            *failure = Some(cause.clone());
        }
        // Not under the lock: telling the others and the log may take a while.
        drop(failure);
        self.transport.abort(cause);
        if first {
            log::warn!("rank {}: communicator aborted: {cause}", self.rank());
        }
    }

    /// Ends the communicator if this rank cannot take part in an operation that the other ranks are about to wait in.
    pub fn or_abort<T>(&self, outcome: Result<T>) -> Result<T> {
        outcome.inspect_err(|cause| self.abort(cause))
    }

    /// Whether an operation on a device's memory returns when it is on the stream, without waiting for other ranks.
    pub fn is_asynchronous(&self) -> bool {
        self.transport.is_asynchronous()
    }

    /// Refuses a device whose heads cannot exchange anything here; `None`: the device has no streams.
    pub fn check_device(&self, device: Option<Arc<dyn StreamDevice>>) -> Result<()> {
        self.transport.check_device(device.as_deref())
    }

    /// Makes room for an all_gather of `bytes` of the host's memory from each rank. Not collective; a failure leaves the communicator usable.
    pub fn reserve_all_gather(&self, bytes: usize) -> Result<()> {
        self.own_process()?;
        self.transport.reserve_for_host(bytes + self.product("bytes", bytes, 1)?)
    }

    /// Asked after a wait for a stream: the failure that ended the communicator, if operations had been left on streams. The results that
    /// were waited for are then undefined.
    pub fn poll_failure(&self) -> Result<()> {
        self.own_process()?;
        self.or_abort(self.transport.poll_failure())
    }

    /// The failure that ended this communicator, if one did.
    pub fn failure(&self) -> Option<Error> {
        self.failure.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// # Safety
    /// As [`Transport::all_gather`].
    pub unsafe fn all_gather_raw(&self, send: *const u8, recv: *mut u8, bytes: usize, space: MemorySpace<'_>) -> Result<()> {
        let checked = self.product("bytes", bytes, 1).and_then(|total| {
            let own = (recv as usize).wrapping_add(self.rank() as usize * bytes);
            self.check_overlap(
                (send as usize, bytes),
                (recv as usize, total),
                send as usize == own,
                "send is recv + rank * bytes",
            )?;
            Ok(bytes)
        });
        let signature = Signature { operation: Operation::AllGather, count: bytes as u64, reduction: None, root: 0 };
        self.run(signature, checked, space, |call| self.transport.all_gather(send, recv, bytes, call))
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
        space: MemorySpace<'_>,
    ) -> Result<()> {
        let checked = self.reducible(send, recv, count, dtype).and_then(|_| {
            let bytes = count * dtype.size();
            self.check_overlap((send as usize, bytes), (recv as usize, bytes), std::ptr::eq(send, recv), "send is recv")?;
            Ok(bytes)
        });
        let reduction = Reduction { dtype, op };
        let signature = Signature { operation: Operation::AllReduce, count: count as u64, reduction: Some(reduction), root: 0 };
        self.run(signature, checked, space, |call| self.transport.all_reduce(send, recv, count, reduction, call))
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
        space: MemorySpace<'_>,
    ) -> Result<()> {
        let checked = self.reducible(send, recv, count, dtype).and_then(|total| {
            let bytes = count * dtype.size();
            let own = (send as usize).wrapping_add(self.rank() as usize * bytes);
            self.check_overlap(
                (send as usize, total),
                (recv as usize, bytes),
                recv as usize == own,
                "recv is send + rank * count",
            )?;
            Ok(total)
        });
        let reduction = Reduction { dtype, op };
        let signature = Signature { operation: Operation::ReduceScatter, count: count as u64, reduction: Some(reduction), root: 0 };
        self.run(signature, checked, space, |call| self.transport.reduce_scatter(send, recv, count, reduction, call))
    }

    /// # Safety
    /// As [`Transport::broadcast`].
    pub unsafe fn broadcast_raw(&self, buffer: *mut u8, bytes: usize, root: u32, space: MemorySpace<'_>) -> Result<()> {
        let checked = match root < self.size() {
            true => self.product("bytes", bytes, 1).map(|_| bytes),
            false => Err(error!(
                InvalidArgument,
                "root must be below {}, the number of ranks, got {root} (rank {})",
                self.size(),
                self.rank()
            )),
        };
        let signature = Signature { operation: Operation::Broadcast, count: bytes as u64, reduction: None, root };
        self.run(signature, checked, space, |call| self.transport.broadcast(buffer, bytes, root, call))
    }

    pub fn barrier(&self) -> Result<()> {
        let signature = Signature { operation: Operation::Barrier, count: 0, reduction: None, root: 0 };
        self.run(signature, Ok(0), MemorySpace::Host, |call| self.transport.barrier(call))
    }

    /// Gathers equal blocks of host memory, in rank order.
    pub fn all_gather<T: Element>(&self, send: &[T], recv: &mut [T]) -> Result<()> {
        assert_eq!(recv.len(), send.len() * self.size() as usize, "all_gather of {} elements", send.len());
        // SAFETY: both are host slices of plain numbers, of the sizes the operation reads and writes.
        unsafe {
            self.all_gather_raw(send.as_ptr().cast(), recv.as_mut_ptr().cast(), std::mem::size_of_val(send), MemorySpace::Host)
        }
    }

    /// Combines host memory over the ranks, in place.
    pub fn all_reduce<T: Element>(&self, values: &mut [T], op: ReduceOp) -> Result<()> {
        let data = values.as_mut_ptr().cast::<u8>();
        // SAFETY: one host slice of plain numbers, reduced in place.
        unsafe { self.all_reduce_raw(data, data, values.len(), T::DTYPE, op, MemorySpace::Host) }
    }

    /// FORKED in a child of the process that made the communicator.
    pub fn own_process(&self) -> Result<()> {
        ensure!(
            !self.forked(),
            Forked,
            "the communicator of rank {} was made in process {} and cannot be used in process {}",
            self.rank(),
            self.process,
            std::process::id()
        );
        Ok(())
    }

    fn forked(&self) -> bool {
        self.process != std::process::id()
    }

    /// The bytes of all ranks' blocks, if they fit into the address space.
    fn product(&self, name: &str, count: usize, element: usize) -> Result<usize> {
        let total = count.checked_mul(element).and_then(|n| n.checked_mul(self.size() as usize));
        total.filter(|&n| n <= isize::MAX as usize).ok_or_else(|| {
            error!(
                InvalidArgument,
                "{name} must fit in the address space on {} ranks, got {count} (rank {})",
                self.size(),
                self.rank()
            )
        })
    }

    /// Checks a reduction's arguments and gives the bytes of `size * count` elements.
    fn reducible(&self, send: *const u8, recv: *const u8, count: usize, dtype: DType) -> Result<usize> {
        let (name, rank) = (dtype.name(), self.rank());
        let combinable = matches!(dtype, DType::F32 | DType::F64 | DType::I32 | DType::I64);
        ensure!(combinable, InvalidArgument, "dtype must be f32, f64, i32 or i64 in a reduction, got {name} (rank {rank})");
        for (argument, pointer) in [("send", send), ("recv", recv)] {
            let aligned = count == 0 || (pointer as usize).is_multiple_of(dtype.size());
            ensure!(aligned, InvalidArgument, "{argument} must be aligned to its {name} elements, got {pointer:?} (rank {rank})");
        }
        self.product("count", count, dtype.size())
    }

    /// Refuses buffers (address, bytes) that overlap in another way than the one allowed.
    fn check_overlap(&self, send: (usize, usize), recv: (usize, usize), allowed: bool, otherwise: &str) -> Result<()> {
        let overlap = send.1 > 0 && recv.1 > 0 && send.0 < recv.0.saturating_add(recv.1) && recv.0 < send.0.saturating_add(send.1);
        ensure!(allowed || !overlap, InvalidArgument, "send and recv must not overlap unless {otherwise} (rank {})", self.rank());
        Ok(())
    }

    /// Runs one operation. Arguments that failed their check end the communicator: the other ranks are in the operation already.
    fn run(
        &self,
        signature: Signature,
        checked: Result<usize>,
        space: MemorySpace<'_>,
        body: impl FnOnce(&Call<'_>) -> Result<()>,
    ) -> Result<()> {
        let _turn = self.take_turn()?;
        let operation = signature.operation;
        let mut sequence = match self.sequence.try_lock() {
            Ok(sequence) => sequence,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                return Err(error!(
                    InvalidArgument,
                    "{} must not be called by a function of the communicator itself (rank {})",
                    operation.name(),
                    self.rank()
                ))
            }
        };
        if let Some(cause) = self.failure() {
            return Err(error!(Aborted, "rank {}: the communicator had ended before {}: {cause}", self.rank(), operation.name()));
        }
        self.or_abort(self.transport.poll_failure())?;
        *sequence += 1;
        let timeout = Duration::from_millis(self.timeout_ms.load(Ordering::Relaxed));
        let call = Call { signature, sequence: *sequence, space, deadline: deadline_after(timeout), timeout };
        let bytes = self.or_abort(checked.map_err(|error| error.during(call.label())))?;
        if self.compares_calls {
            self.or_abort(compare_calls::agree(&**self.transport, &call))?;
        }
        self.calls[operation as usize].fetch_add(1, Ordering::Relaxed);
        self.bytes[operation as usize].fetch_add(bytes as u64, Ordering::Relaxed);
        // After a failure nothing can be trusted to line up with the other ranks.
        self.or_abort(body(&call))
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        if !self.forked() {
            // SAFETY: dropped here alone, and not used again.
            unsafe { ManuallyDrop::drop(&mut self.transport) }
        }
    }
}

/// Now plus a timeout, at most some centuries ahead (`Instant` overflows beyond).
fn deadline_after(timeout: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(timeout).unwrap_or_else(|| now + Duration::from_secs(1 << 33))
}
