//! A group of one rank: every collective is a copy.

use super::{Call, ReduceOp, Transport};
use crate::matrix::DType;
use crate::{Error, Result};

pub struct Single;

impl Transport for Single {
    fn kind(&self) -> &'static str {
        "self"
    }

    fn rank(&self) -> u32 {
        0
    }

    fn size(&self) -> u32 {
        1
    }

    unsafe fn all_gather(&self, send: *const u8, recv: *mut u8, bytes: usize, _: &Call) -> Result<()> {
        copy(send, recv, bytes);
        Ok(())
    }

    unsafe fn all_reduce(&self, send: *const u8, recv: *mut u8, count: usize, dtype: DType, _: ReduceOp, _: &Call) -> Result<()> {
        copy(send, recv, count * dtype.size());
        Ok(())
    }

    unsafe fn reduce_scatter(
        &self,
        send: *const u8,
        recv: *mut u8,
        count: usize,
        dtype: DType,
        _: ReduceOp,
        _: &Call,
    ) -> Result<()> {
        copy(send, recv, count * dtype.size());
        Ok(())
    }

    unsafe fn broadcast(&self, _: *mut u8, _: usize, _: u32, _: &Call) -> Result<()> {
        Ok(())
    }

    fn barrier(&self, _: &Call) -> Result<()> {
        Ok(())
    }

    /// Nobody waits here, and [`super::Communicator`] starts nothing after an abort.
    fn abort(&self, _: &Error) {}
}

/// Copies between buffers that are the same or apart; NULL with no bytes is fine.
unsafe fn copy(from: *const u8, to: *mut u8, bytes: usize) {
    if bytes > 0 && !std::ptr::eq(from, to) {
        std::ptr::copy_nonoverlapping(from, to, bytes);
    }
}
