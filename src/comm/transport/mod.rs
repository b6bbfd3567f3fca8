//! Transports: what carries the collectives between ranks, and what they are told about an operation.

pub(super) mod custom;
pub(super) mod nccl;
mod number;
pub(super) mod single;
pub(super) mod threads;
mod watchdog;

use std::ffi::c_void;
use std::fmt;
use std::time::{Duration, Instant};

pub use self::number::Element;
use crate::matrix::{DType, ReduceOp};
use crate::stream::{StreamDevice, StreamMemory};
use crate::{Error, Result};

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

/// How a reduction combines elements of which type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reduction {
    pub dtype: DType,
    pub op: ReduceOp,
}

impl Reduction {
    /// Bytes of `count` elements.
    pub fn bytes(&self, count: usize) -> usize {
        count * self.dtype.size()
    }
}

/// What all ranks must agree on in an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signature {
    pub operation: Operation,
    /// Bytes of a gather's block and a broadcast's buffer, else elements.
    pub count: u64,
    pub reduction: Option<Reduction>,
    pub root: u32,
}

impl Signature {
    /// The first field in which two ranks differ, and both values.
    fn difference(&self, other: &Signature) -> Option<(&'static str, String, String)> {
        if self.operation != other.operation {
            return Some(("operation", self.operation.name().to_owned(), other.operation.name().to_owned()));
        }
        let dtype = |s: &Signature| s.reduction.map_or("none", |reduction| reduction.dtype.name()).to_owned();
        let op = |s: &Signature| s.reduction.map_or("none", |reduction| reduction.op.name()).to_owned();
        let count = if self.reduction.is_some() { "count" } else { "bytes" };
        let fields = [
            ("dtype", dtype(self), dtype(other)),
            ("op", op(self), op(other)),
            ("root", self.root.to_string(), other.root.to_string()),
            (count, self.count.to_string(), other.count.to_string()),
        ];
        fields.into_iter().find(|(_, own, others)| own != others)
    }
}

/// In whose memory an operation's buffers are.
#[derive(Clone, Copy, Debug)]
pub enum MemorySpace<'a> {
    Host,
    /// In memory that `stream` orders the accesses to: the operation follows all that is on the stream when it is called, and what
    /// comes onto the stream when it has returned follows the operation.
    Device {
        memory: &'a dyn StreamMemory,
        stream: *mut c_void,
    },
}

impl MemorySpace<'_> {
    /// Names it in messages.
    fn kind(&self) -> &'static str {
        match self {
            MemorySpace::Host => "host",
            MemorySpace::Device { memory, .. } => memory.kind(),
        }
    }

    /// Copies between buffers that are the same or apart; NULL with no bytes is fine.
    unsafe fn copy(&self, destination: *mut u8, source: *const u8, bytes: usize) -> Result<()> {
        if bytes == 0 || std::ptr::eq(source, destination) {
            return Ok(());
        }
        match self {
            MemorySpace::Host => std::ptr::copy_nonoverlapping(source, destination, bytes),
            MemorySpace::Device { memory, stream } => memory.copy(destination, source, bytes, *stream)?,
        }
        Ok(())
    }
}

/// One operation on its way: what it is, its number in the communicator's life, where its buffers are, and its deadline.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    pub signature: Signature,
    /// 1 for the communicator's first operation; the same on all ranks as long as they call in one order.
    pub sequence: u64,
    pub space: MemorySpace<'a>,
    pub deadline: Instant,
    pub timeout: Duration,
}

impl Call<'_> {
    /// How messages name the operation.
    pub fn label(&self) -> Label {
        Label { operation: self.signature.operation, sequence: self.sequence }
    }
}

/// "all_reduce #17".
#[derive(Clone, Copy, Debug)]
pub struct Label {
    operation: Operation,
    sequence: u64,
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} #{}", self.operation.name(), self.sequence)
    }
}

/// What carries the collectives between ranks.
///
/// Every method is called by one thread at a time (`abort` apart, which may come from any thread at any time and must make a
/// waiting operation return). The only overlap of `send` and `recv` is the one that each method names.
/// Results of reductions have the same bits on every rank.
///
/// # Safety
/// The pointers are valid for the sizes named, in the memory of the call's space: host memory until the method returns, a device's
/// until the stream has run what the method put on it.
#[allow(clippy::missing_safety_doc)] // The one above is every method's.
pub trait Transport: Send + Sync {
    fn kind(&self) -> &'static str;
    fn rank(&self) -> u32;
    fn size(&self) -> u32;
    /// Gathers `bytes` bytes from every rank, in rank order, into `size * bytes` bytes at `recv`. `send` may be
    /// `recv + rank * bytes`.
    unsafe fn all_gather(&self, send: *const u8, recv: *mut u8, bytes: usize, call: &Call<'_>) -> Result<()>;
    /// Combines `count` elements over the ranks; every rank gets the result. `send` may be `recv`.
    unsafe fn all_reduce(&self, send: *const u8, recv: *mut u8, count: usize, reduction: Reduction, call: &Call<'_>) -> Result<()>;
    /// Combines `size * count` elements over the ranks; rank r gets elements `r * count ..`, `count` of them. `recv` may be
    /// element `rank * count` of `send`.
    unsafe fn reduce_scatter(
        &self,
        send: *const u8,
        recv: *mut u8,
        count: usize,
        reduction: Reduction,
        call: &Call<'_>,
    ) -> Result<()>;
    /// Copies `bytes` bytes at `buffer` of rank `root` to all ranks.
    unsafe fn broadcast(&self, buffer: *mut u8, bytes: usize, root: u32, call: &Call<'_>) -> Result<()>;
    fn barrier(&self, call: &Call<'_>) -> Result<()>;
    /// Refuses a head's device that it cannot work on; `None`: the device has no streams.
    fn check_device(&self, _device: Option<&dyn StreamDevice>) -> Result<()> {
        Ok(())
    }
    /// Whether an operation on a device's memory returns when it is on the stream, without waiting for other ranks.
    fn is_asynchronous(&self) -> bool {
        false
    }
    /// Makes room for an operation on the host's memory, of as many bytes in and out: one that lacked it would end the communicator.
    fn reserve_for_host(&self, _bytes: usize) -> Result<()> {
        Ok(())
    }
    /// What has become known of operations that were left on a stream: they failed, did not end in time, or were aborted.
    fn poll_failure(&self) -> Result<()> {
        Ok(())
    }
    /// Makes running and later operations fail on every rank that can be told. What was left on streams ends, undone.
    fn abort(&self, cause: &Error);
}
