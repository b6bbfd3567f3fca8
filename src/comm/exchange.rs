//! How an [`Exchange`] goes over a communicator.

use super::{Communicator, MemorySpace, ReduceOp};
use crate::exchange::Exchange;
use crate::Result;

impl Exchange {
    fn space(&self) -> Result<MemorySpace<'_>> {
        match (&self.failure, &self.memory) {
            (Some(failure), _) => Err(failure.clone()),
            (None, Some(memory)) => Ok(MemorySpace::Device { memory: &**memory, stream: self.stream }),
            (None, None) => Ok(MemorySpace::Host),
        }
    }

    pub(crate) fn all_gather(&self, comm: &Communicator) -> Result<()> {
        // SAFETY: a head's device hands out exchanges over buffers of its own, large enough for the ranks it was made for.
        unsafe { comm.all_gather_raw(self.send, self.recv, self.count * self.dtype.size(), self.space()?) }
    }

    pub(crate) fn all_reduce(&self, comm: &Communicator, op: ReduceOp) -> Result<()> {
        // SAFETY: as above.
        unsafe { comm.all_reduce_raw(self.send, self.recv, self.count, self.dtype, op, self.space()?) }
    }

    pub(crate) fn reduce_scatter(&self, comm: &Communicator) -> Result<()> {
        // SAFETY: as above.
        unsafe { comm.reduce_scatter_raw(self.send, self.recv, self.count, self.dtype, ReduceOp::Sum, self.space()?) }
    }
}
