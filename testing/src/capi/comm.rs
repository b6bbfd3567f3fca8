//! Communicators and their collectives.

use std::mem::{size_of, size_of_val};
use std::time::Duration;

use partialfc::capi::comm::*;
use partialfc::capi::types::{PFC_F32, PFC_F64, PFC_I32, PFC_I64};

use super::{outcome, Outcome};

/// The number types that reductions take.
pub trait Number: Copy + PartialEq + std::fmt::Debug + Send + Sync + Default {
    const DTYPE: i32;
    fn of(value: i64) -> Self;
}

macro_rules! numbers {
    ($($t:ty => $dtype:expr),*) => { $(impl Number for $t {
        const DTYPE: i32 = $dtype;
        fn of(value: i64) -> $t {
            value as $t
        }
    })* };
}
numbers!(f32 => PFC_F32, f64 => PFC_F64, i32 => PFC_I32, i64 => PFC_I64);

pub struct Comm(pub *mut pfc_comm);

// SAFETY: a communicator may move between threads; pfc_comm_abort and the getters may be called from any.
unsafe impl Send for Comm {}
unsafe impl Sync for Comm {}

impl Comm {
    pub fn solo() -> Comm {
        let mut raw = std::ptr::null_mut();
        // SAFETY: an output that outlives the call.
        outcome(unsafe { pfc_comm_self(&mut raw) }).expect("a communicator of one");
        Comm(raw)
    }

    pub fn threads(n: u32) -> Vec<Comm> {
        let mut raw = vec![std::ptr::null_mut(); n as usize];
        // SAFETY: n pointers.
        outcome(unsafe { pfc_comm_threads(n, raw.as_mut_ptr()) }).expect("a group of threads");
        raw.into_iter().map(Comm).collect()
    }

    /// A communicator of the caller's functions.
    pub fn custom(ops: &pfc_comm_ops) -> Outcome<Comm> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: an output that outlives the call.
        outcome(unsafe { pfc_comm_custom(ops, &mut raw) }).map(|()| Comm(raw))
    }

    pub fn rank(&self) -> usize {
        // SAFETY: a live handle.
        unsafe { pfc_comm_rank(self.0) as usize }
    }

    pub fn size(&self) -> usize {
        // SAFETY: a live handle.
        unsafe { pfc_comm_size(self.0) as usize }
    }

    pub fn set_timeout(&self, timeout: Duration) {
        // SAFETY: a live handle.
        outcome(unsafe { pfc_comm_set_timeout(self.0, timeout.as_millis() as u64) }).expect("a timeout");
    }

    pub fn abort(&self) {
        // SAFETY: a live handle; from any thread.
        outcome(unsafe { pfc_comm_abort(self.0) }).expect("an abort");
    }

    pub fn barrier(&self) -> Outcome {
        // SAFETY: a live handle.
        outcome(unsafe { pfc_comm_barrier(self.0) })
    }

    pub fn all_gather<T: Copy>(&self, send: &[T], recv: &mut [T]) -> Outcome {
        assert_eq!(recv.len(), send.len() * self.size());
        // SAFETY: a live handle, and buffers of these sizes.
        outcome(unsafe { pfc_comm_all_gather(self.0, send.as_ptr().cast(), recv.as_mut_ptr().cast(), size_of_val(send) as u64) })
    }

    /// This rank's block of `count` elements lies in its place in `recv`.
    pub fn all_gather_in_place<T: Copy>(&self, recv: &mut [T], count: usize) -> Outcome {
        assert_eq!(recv.len(), count * self.size());
        let recv = recv.as_mut_ptr();
        let send = recv.wrapping_add(self.rank() * count);
        // SAFETY: a live handle, and buffers of these sizes.
        outcome(unsafe { pfc_comm_all_gather(self.0, send.cast(), recv.cast(), (count * size_of::<T>()) as u64) })
    }

    pub fn all_reduce<T: Number>(&self, send: &[T], recv: &mut [T], op: i32) -> Outcome {
        assert_eq!(send.len(), recv.len());
        let (from, to) = (send.as_ptr().cast(), recv.as_mut_ptr().cast());
        // SAFETY: a live handle, and buffers of these sizes.
        outcome(unsafe { pfc_comm_all_reduce(self.0, from, to, send.len() as u64, T::DTYPE, op) })
    }

    pub fn all_reduce_in_place<T: Number>(&self, data: &mut [T], op: i32) -> Outcome {
        let pointer = data.as_mut_ptr().cast();
        // SAFETY: a live handle, and buffers of these sizes.
        outcome(unsafe { pfc_comm_all_reduce(self.0, pointer, pointer, data.len() as u64, T::DTYPE, op) })
    }

    pub fn reduce_scatter<T: Number>(&self, send: &[T], recv: &mut [T], op: i32) -> Outcome {
        assert_eq!(send.len(), recv.len() * self.size());
        let (from, to) = (send.as_ptr().cast(), recv.as_mut_ptr().cast());
        // SAFETY: a live handle, and buffers of these sizes.
        outcome(unsafe { pfc_comm_reduce_scatter(self.0, from, to, recv.len() as u64, T::DTYPE, op) })
    }

    /// The result replaces this rank's part of `data`.
    pub fn reduce_scatter_in_place<T: Number>(&self, data: &mut [T], op: i32) -> Outcome {
        let count = data.len() / self.size();
        let send = data.as_mut_ptr();
        let recv = send.wrapping_add(self.rank() * count);
        // SAFETY: a live handle, and buffers of these sizes.
        outcome(unsafe { pfc_comm_reduce_scatter(self.0, send.cast(), recv.cast(), count as u64, T::DTYPE, op) })
    }

    pub fn broadcast<T: Copy>(&self, data: &mut [T], root: usize) -> Outcome {
        let bytes = size_of_val(data) as u64;
        // SAFETY: a live handle, and buffers of these sizes.
        outcome(unsafe { pfc_comm_broadcast(self.0, data.as_mut_ptr().cast(), bytes, root as u32) })
    }

    pub fn traffic(&self) -> pfc_traffic {
        // SAFETY: all zeros is a value; a live handle.
        unsafe {
            let mut traffic = std::mem::zeroed();
            outcome(pfc_comm_traffic(self.0, &mut traffic)).expect("traffic");
            traffic
        }
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        // SAFETY: made by a pfc_comm_ maker, freed once.
        unsafe { pfc_comm_free(self.0) };
    }
}

/// Bytes by operation between two readings: all_gather, all_reduce, reduce_scatter, broadcast.
pub fn traffic_between(before: &pfc_traffic, after: &pfc_traffic) -> [u64; 4] {
    [
        after.all_gather_bytes - before.all_gather_bytes,
        after.all_reduce_bytes - before.all_reduce_bytes,
        after.reduce_scatter_bytes - before.reduce_scatter_bytes,
        after.broadcast_bytes - before.broadcast_bytes,
    ]
}
