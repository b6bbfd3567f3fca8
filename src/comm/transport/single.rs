//! A group of one rank: every collective is a copy.

use crate::comm::{Call, Transport};
use crate::matrix::{DType, ReduceOp};
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

    unsafe fn all_gather(&self, send: *const u8, recv: *mut u8, bytes: usize, call: &Call<'_>) -> Result<()> {
        call.space.copy(recv, send, bytes)
    }

    unsafe fn all_reduce(
        &self,
        send: *const u8,
        recv: *mut u8,
        count: usize,
        dtype: DType,
        _: ReduceOp,
        call: &Call<'_>,
    ) -> Result<()> {
        call.space.copy(recv, send, count * dtype.size())
    }

    unsafe fn reduce_scatter(
        &self,
        send: *const u8,
        recv: *mut u8,
        count: usize,
        dtype: DType,
        _: ReduceOp,
        call: &Call<'_>,
    ) -> Result<()> {
        call.space.copy(recv, send, count * dtype.size())
    }

    unsafe fn broadcast(&self, _: *mut u8, _: usize, _: u32, _: &Call<'_>) -> Result<()> {
        Ok(())
    }

    fn barrier(&self, _: &Call<'_>) -> Result<()> {
        Ok(())
    }

    /// Nobody waits here, and [`crate::comm::Communicator`] starts nothing after an abort.
    fn abort(&self, _: &Error) {}
}
