//! Gradients of micro-batches, kept until an update applies them all at once.
//!
//! A step that fails or is abandoned adds nothing, and what was kept before it stays. Writing rows or progress drops all of it.

use std::time::Instant;

use super::{CallState, Head};
use crate::device::UpdateCall;
use crate::matrix::ReduceOp;
use crate::options::Placement;
use crate::Result;

impl Head {
    /// Keeps the step's gradient of the class centers; see `pfc_head_accumulate`.
    pub fn accumulate(&mut self) -> Result<()> {
        self.check_usable()?;
        self.expect(CallState::Backwarded, "pfc_head_accumulate", "pfc_head_backward")?;
        let start = Instant::now();
        let kept = self.keep_gradient();
        self.poison_unless_recoverable(kept)?;
        self.seconds.update = start.elapsed().as_secs_f64();
        self.own_failure.take().map_or(Ok(()), Err)
    }

    /// Where no other rank waits for this one in an update by what is kept, its own failure to keep the step's gradient changes nothing.
    pub(super) fn keep_before_update(&mut self) -> Result<()> {
        let alone = self.options.placement == Placement::Sharded;
        if alone && self.accumulated > 0 && self.state == CallState::Backwarded {
            let kept = self.keep_gradient();
            self.poison_unless_recoverable(kept)?;
        }
        Ok(())
    }

    fn keep_gradient(&mut self) -> Result<()> {
        let scope = self.scope();
        scope.host("accumulate", || self.backend.accumulate(self.loss_weight))?;
        self.accumulated += 1;
        self.state = CallState::Idle;
        Ok(())
    }

    /// Whether an update has something to apply though no step is under way.
    pub(super) fn has_accumulated(&self) -> bool {
        self.state == CallState::Idle && self.accumulated > 0
    }

    /// Phase 5 where gradients are kept: that of the step under way is added to them. `beside` runs before the next exchange.
    pub(super) fn update_by_accumulated(&mut self, update: UpdateCall, beside: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        if self.state != CallState::Idle {
            self.keep_gradient()?;
        }
        beside()?;
        let scope = self.scope();
        if self.options.placement == Placement::Replicated {
            let gradient = self.backend.accumulated_gradient();
            scope.host("all_reduce center gradient", || gradient.all_reduce(&self.comm, ReduceOp::Sum))?;
        }
        scope.host("update", || self.backend.apply_accumulated(update))?;
        self.accumulated = 0;
        Ok(())
    }

    /// The rows are not those any more that the gradients are of.
    pub(super) fn drop_accumulated(&mut self) {
        if std::mem::take(&mut self.accumulated) > 0 {
            self.backend.drop_accumulated();
        }
    }

    /// Says once that a step's gradient of the class centers is of no use to anyone.
    pub(super) fn tell_of_dropped_gradient(&mut self) {
        if self.state == CallState::Backwarded && self.own_failure.is_none() && !self.told_of_dropped_gradient {
            self.told_of_dropped_gradient = true;
            log::warn!(
                "rank {}: a step begins after pfc_head_backward without pfc_head_update or pfc_head_accumulate: \
                 the class centers' gradient of the step before is dropped (this is said once)",
                self.rank()
            );
        }
    }
}
