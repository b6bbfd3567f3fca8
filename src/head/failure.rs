//! What a failure does: to the step under way, to the head, and to the other ranks.
//!
//! | failure | the step | the head | the other ranks |
//! |---|---|---|---|
//! | wrong argument, no memory, before the labels are gathered | ends on all ranks | usable | REMOTE |
//! | wrong label, embedding that is no number | ends on all ranks | usable | the same status: all judge the same data |
//! | of one rank alone, after the labels are gathered | goes on, then ends on all ranks | usable | REMOTE, from the sums |
//! | ranks at different steps | ends | poisoned | MISMATCH, poisoned |
//! | of a load, among the rows | ends | poisoned | REMOTE, poisoned |
//! | of a change of classes | goes on as it was | usable, with the classes it had | REMOTE |
//! | of a collective, a device, or an update; a panic | is lost | poisoned, communicator aborted | COMM, ABORTED or TIMEOUT |
//!
//! A poisoned head answers every call with POISONED, but for those that read its rows where they are whole: on a CPU, where nothing
//! failed inside an update.

use super::{CallState, Head, Poison};
use crate::device::TensorRows;
use crate::matrix::Matrix;
use crate::memory::zeros;
use crate::optimizer::StateTensor;
use crate::protocol::{self, LossPlace};
use crate::{ensure, error, Error, Result, Status};

impl Head {
    /// Makes every later call fail, and tells the other ranks. Its rows may be torn.
    pub fn poison(&mut self, cause: &Error) {
        self.poison_with(cause, false);
    }

    /// The same. `whole_rows`: no row has changed since the last update or write that succeeded.
    fn poison_with(&mut self, cause: &Error, whole_rows: bool) {
        if self.poisoned.is_none() {
            self.hide_sample();
            self.poisoned = Some(Poison { cause: cause.clone(), whole_rows });
            self.comm.abort(cause);
            log::error!("rank {}: head poisoned: {cause}", self.rank());
        }
    }

    /// An error of this head, with its rank where the message has none.
    pub fn name_rank(&self, error: &Error) -> Error {
        let error = on_rank(error, self.rank());
        match (error.status, self.options.num_classes < self.most_classes) {
            (Status::Label, true) => {
                let (now, once) = (self.options.num_classes, self.most_classes);
                Error::formatted(
                    Status::Label,
                    format_args!("{}; the head once had {once} classes, and has {now} now", error.message),
                )
            }
            _ => error,
        }
    }

    /// Refuses a poisoned head, and one that a fork has copied.
    pub(super) fn check_usable(&self) -> Result<()> {
        self.check_poison(|_| false)
    }

    /// The same for a call that only reads rows: a head whose rows are whole still has them.
    pub(super) fn check_readable(&self) -> Result<()> {
        self.check_poison(|poison| poison.whole_rows)
    }

    /// What every call asks first. A call that is refused here has not been made: other ranks wait for the one that comes instead.
    fn check_poison(&self, survives: impl Fn(&Poison) -> bool) -> Result<()> {
        let made_in = self.device.process();
        ensure!(
            made_in == std::process::id(),
            Forked,
            "the head of rank {} was made in process {made_in} and cannot be used in process {}",
            self.rank(),
            std::process::id()
        );
        match &self.poisoned {
            Some(poison) if !survives(poison) => {
                let Poison { cause, whole_rows } = poison;
                let rescue =
                    if *whole_rows { "read its rows, which are whole, and free it" } else { "free it and load a checkpoint" };
                Err(error!(Poisoned, "the head of rank {} is unusable since an earlier failure ({cause}): {rescue}", self.rank()))
            }
            _ => self.device.check_not_capturing().map_err(|error| self.name_rank(&error)),
        }
    }

    /// Refuses a call that is not the next one of a step.
    pub(super) fn expect(&self, state: CallState, call: &str, before: &str) -> Result<()> {
        ensure!(
            self.state == state,
            InvalidArgument,
            "{call} must come right after {before}, but the head is {} (rank {})",
            match self.state {
                CallState::Idle => "idle",
                CallState::Forwarded => "forwarded",
                CallState::Backwarded => "backwarded",
            },
            self.rank()
        );
        Ok(())
    }

    /// The outcome of a call that may have waited for exchanges on the device's streams. A failed exchange explains every later
    /// error, so it is reported first.
    pub(super) fn prefer_comm_failure<T>(&self, outcome: Result<T>) -> Result<T> {
        let ended = self.comm.failure().is_some();
        match (outcome, self.comm.poll_failure()) {
            (outcome, Err(cause)) if !ended || outcome.is_ok() => Err(cause),
            (outcome, _) => outcome,
        }
    }

    /// Poisons the head unless the failure has left all ranks at the same step with whole rows.
    pub(super) fn poison_unless_recoverable<T>(&mut self, outcome: Result<T>) -> Result<T> {
        let outcome = self.prefer_comm_failure(outcome);
        if let Err(error) = &outcome {
            let recoverable = matches!(
                error.status,
                Status::Label
                    | Status::NotFinite
                    | Status::InvalidArgument
                    | Status::Unsupported
                    | Status::OutOfMemory
                    | Status::Io
                    | Status::Remote
                    | Status::Mismatch
            );
            if !recoverable || self.comm.failure().is_some() {
                self.poison_before_update(error);
            }
        }
        outcome
    }

    /// The verdict on the labels: ranks that have not made the same calls never meet again.
    pub(super) fn poison_if_mismatched<T>(&mut self, verdict: Result<T>) -> Result<T> {
        if let Err(error) = &verdict {
            if error.status == Status::Mismatch {
                self.poison_before_update(error);
            }
        }
        self.poison_unless_recoverable(verdict)
    }

    /// The same for a verdict that the device reached: MISMATCH may also be samples that differ, which the head survives.
    pub(super) fn poison_if_fatal<T>(&mut self, verdict: Result<T>) -> Result<T> {
        let verdict = self.prefer_comm_failure(verdict);
        if let (Err(error), true) = (&verdict, self.backend.is_fatal()) {
            self.poison_before_update(error);
        }
        self.poison_unless_recoverable(verdict)
    }

    /// Poisons a head that was not updating its rows. On a device with streams an update may be under way all the same, with what a
    /// failed exchange has left.
    pub(super) fn poison_before_update(&mut self, cause: &Error) {
        let whole_rows = self.device.streams().is_none() && !matches!(cause.status, Status::Device | Status::Panic);
        self.poison_with(cause, whole_rows);
    }

    /// The outcome of an update: after a failure some ranks' rows may have moved and others' not.
    pub(super) fn poison_on_failure<T>(&mut self, outcome: Result<T>) -> Result<T> {
        let outcome = self.prefer_comm_failure(outcome);
        if let Err(error) = &outcome {
            self.poison(error);
        }
        outcome
    }

    /// A softmax sum that is no number, and the class center that made it one, if this rank has it: dense rows move without an update of
    /// their own, which would look at them.
    pub(super) fn name_class_not_finite(&self, error: Error) -> Error {
        if !protocol::is_bad_sum(&error) {
            return error;
        }
        let dim = self.options.embedding_dim as usize;
        let find = || -> Result<Option<i64>> {
            let mut center = zeros(&[dim], "a class center")?;
            for id in self.backend.sample_ids()? {
                let row = TensorRows { tensor: StateTensor::Centers, rows: Matrix::of_f32(&mut center, 1, dim) };
                self.backend.read_rows(id as u64 - self.shard.first, &[row])?;
                if !center.iter().all(|value| value.is_finite()) {
                    return Ok(Some(id));
                }
            }
            Ok(None)
        };
        match find() {
            Ok(Some(class)) => error!(
                NotFinite,
                "class center {class} is not finite: the learning rate or the weight decay of an update before was too large (rank {})",
                self.rank()
            ),
            // Of a failure to look the error that there is says more.
            Ok(None) | Err(_) => error,
        }
    }

    /// Ends a forward with this rank's own outcome and with the loss, which all ranks judged alike.
    ///
    /// Where the loss is in the device's memory the other ranks do not wait for it, so they have yet to learn that this rank failed:
    /// the step goes on, and its later calls return the failure.
    pub(super) fn end_forward(&mut self, computed: Result<()>, loss: Result<f64>) -> Result<f64> {
        if self.backend.failed_in_labels() {
            self.draws -= 1;
        }
        if let (LossPlace::Device, Err(error)) = (self.loss_place, &computed) {
            self.state = CallState::Forwarded;
            self.own_failure = Some(error.clone());
        }
        computed?;
        let loss = self.poison_if_fatal(loss)?;
        (self.state, self.failed) = (CallState::Forwarded, false);
        Ok(loss)
    }
}

/// An error that says which rank it is of.
pub(super) fn on_rank(error: &Error, rank: u32) -> Error {
    match error.message.contains("rank ") {
        true => error.clone(),
        false => Error::formatted(error.status, format_args!("{} (rank {rank})", error.message)),
    }
}
