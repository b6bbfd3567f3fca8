//! An exchange: one collective over buffers of a head, as its device hands it to the head and the head to the communicator.

use std::ffi::c_void;
use std::sync::Arc;

use crate::matrix::DType;
use crate::stream::StreamMemory;
use crate::Error;

/// Buffers that a collective reads and writes: `count` elements from each rank.
#[derive(Clone, Debug)]
pub struct Exchange {
    pub send: *const u8,
    pub recv: *mut u8,
    pub count: usize,
    pub dtype: DType,
    /// Whose memory `send` and `recv` are; `None`: the host's.
    pub memory: Option<Arc<dyn StreamMemory>>,
    /// Orders the accesses to `memory`; not used for the host's.
    pub stream: *mut c_void,
    /// Why `send` does not hold what it should. The other ranks must not get it.
    pub failure: Option<Error>,
}

impl Exchange {
    /// Over the host's memory.
    pub(crate) fn host<T>(send: *const T, recv: *mut T, count: usize, dtype: DType) -> Exchange {
        Exchange { send: send.cast(), recv: recv.cast(), count, dtype, memory: None, stream: std::ptr::null_mut(), failure: None }
    }
}
