//! A training step, in the order of the paper's pseudo-code.
//!
//! ```text
//! gather    E    = all_gather(local embeddings), y = all_gather(labels)          phase 1
//! sample    W_s  = rows of my shard: my positives + random negatives             phases 2, 3
//! forward   z    = scale * margin(normalize(E) @ normalize(W_s).T, y)            phase 4
//! sums, loss     = cross entropy over all ranks' samples                         phase 4
//! backward  dE   = reduce_scatter(dz @ W_s)                                      phase 5
//! update    dW_s = dz.T @ E, and the optimizer on the sampled rows of W          phase 5
//! ```
//!
//! The device computes, the communicator carries; this file has their order. A sharded step is four messages: *labels* (an all-gather
//! of status, announcement and labels), *embeddings* (an all-gather, padded to the largest batch), *sums* (an all-reduce of two numbers a
//! row, three at scales above 75) and *gradient* (a reduce-scatter). A replicated step has *labels*, *replicated sums* (an all-reduce of
//! losses and statuses) and *center gradient* (an all-reduce).
//!
//! A rank that has failed still takes part in the messages that its peers have begun: see [`Contribution`] and `failure.rs`.

use std::time::Instant;

use super::{failure, BackwardCall, CallState, Head, LossTarget, Seconds, StepInput};
use crate::comm::gather_words;
use crate::device::{Labels, UpdateCall};
use crate::exchange::Exchange;
use crate::matrix::{Matrix, ReduceOp};
use crate::options::Placement;
use crate::protocol::{Announcement, LossPlace, StepCall};
use crate::row_terms::MarginGradientArrays;
use crate::{trace, Contribution, Result};

/// The calls that make up a step.
impl Head {
    /// Begins the next step early; see `pfc_head_prepare`.
    pub fn prepare(&mut self, labels: Contribution<Labels>) -> Result<()> {
        self.check_usable()?;
        let comm = self.comm.clone();
        let _turn = comm.take_turn()?;
        self.seconds = Seconds { gather: 0.0, sample: 0.0, ..self.seconds };
        self.gather_and_sample(labels, self.announcement(StepCall::Prepare))
    }

    /// Phases 1 to 4; see `pfc_head_forward`.
    pub fn forward(&mut self, input: Contribution<StepInput>, loss: LossTarget) -> Result<f64> {
        self.check_usable()?;
        let comm = self.comm.clone();
        let _turn = comm.take_turn()?;
        let input = self.begin_step(input, self.announcement(StepCall::Forward))?;
        let outcome = self.find_loss(input, loss);
        self.poison_unless_recoverable(outcome)
    }

    /// Phase 5 for the embeddings; see `pfc_head_backward`.
    pub fn backward(&mut self, loss_weight: f64, loss_scale: f64, gradient: Contribution<Matrix>) -> Result<()> {
        let call = BackwardCall { loss_weight, loss_scale, margin_gradients: MarginGradientArrays::NONE };
        self.backward_with(Ok(call), gradient)
    }

    /// The same, and the gradients of the rows' margins; see `pfc_head_backward_with`.
    pub fn backward_with(&mut self, call: Contribution<BackwardCall>, gradient: Contribution<Matrix>) -> Result<()> {
        self.check_usable()?;
        self.expect(CallState::Forwarded, "pfc_head_backward", "pfc_head_forward")?;
        let comm = self.comm.clone();
        let _turn = comm.take_turn()?;
        if let Ok(call) = &call {
            self.loss_weight = call.loss_weight;
        }
        let call = call.and_then(|call| self.check_backward(call));
        let gradient = gradient.and_then(|gradient| self.check_gradient(gradient, self.backend.batch()));
        let start = Instant::now();
        let partial = self.embedding_gradient();
        let summed = self.scatter_gradient(&partial);
        self.poison_unless_recoverable(summed)?;
        if let Some(error) = &self.own_failure {
            self.state = CallState::Backwarded;
            return Err(error.clone());
        }
        // The other ranks have their gradient either way. Without a weight there is nothing to update by: the step is abandoned.
        self.state = CallState::Idle;
        let BackwardCall { loss_weight, loss_scale, margin_gradients } = call?;
        let checked = self.check_margin_gradients(&margin_gradients);
        let factor = loss_weight * loss_scale;
        let finished = self.finish_gradient(factor, gradient.as_ref().ok());
        let finished = match checked.is_ok() {
            true => finished.and(self.finish_margins(factor, &margin_gradients)),
            false => finished,
        };
        self.state = CallState::Backwarded;
        self.poison_unless_recoverable(finished)?;
        self.seconds.backward = start.elapsed().as_secs_f64();
        gradient.map(|_| ()).and(checked)
    }

    /// Phase 5 for the class centers; see `pfc_head_update`.
    pub fn update(&mut self, learning_rate: f64) -> Result<()> {
        self.update_with(UpdateCall::of(learning_rate))
    }

    /// The same with the gradient multiplied; see `pfc_head_update_with`. `device_factor` is the caller's, wherever it lies.
    pub fn update_with(&mut self, update: UpdateCall) -> Result<()> {
        self.check_usable()?;
        if !self.has_accumulated() {
            self.expect(CallState::Backwarded, "pfc_head_update", "pfc_head_backward")?;
        }
        let update = self.check_update(update)?;
        self.keep_before_update()?;
        let comm = self.comm.clone();
        // A shard is updated without a message.
        let _turn = match self.options.placement {
            Placement::Sharded => None,
            Placement::Replicated => Some(comm.take_turn()?),
        };
        let outcome = self.update_centers(update, &mut || Ok(()));
        self.poison_on_failure(outcome)?;
        self.own_failure.take().map_or(Ok(()), Err)
    }

    /// Forward, backward and update in one; see `pfc_head_step`. The gradient travels while the class centers are updated.
    pub fn step(&mut self, input: Contribution<(StepInput, Matrix)>, learning_rate: f64, loss: LossTarget) -> Result<f64> {
        self.check_usable()?;
        let comm = self.comm.clone();
        let _turn = comm.take_turn()?;
        let mut target = None;
        let rate = self.check_factor("learning_rate", learning_rate);
        let input = input.and_then(|(input, gradient)| {
            rate?;
            target = Some(self.check_gradient(gradient, input.embeddings.rows)?);
            Ok(input)
        });
        let announcement = Announcement { learning_rate, loss_weight: 1.0, ..self.announcement(StepCall::Step) };
        let input = self.begin_step(input, announcement)?;
        let outcome = self.find_loss(input, loss);
        let loss = self.poison_unless_recoverable(outcome);
        if self.state == CallState::Idle {
            return loss;
        }
        self.loss_weight = 1.0;
        // A rank whose forward failed has no gradient to give.
        let target = target.filter(|_| self.own_failure.is_none());
        let outcome = self.backward_and_update(learning_rate, target.as_ref());
        self.poison_on_failure(outcome)?;
        self.own_failure.take().map_or(loss, Err)
    }

    /// The verdict of everything enqueued; see `pfc_head_wait`.
    pub fn wait(&mut self) -> Result<()> {
        self.check_usable()?;
        let verdict = self.backend.wait();
        self.poison_if_fatal(verdict)
    }
}

/// What the calls are made of, in the order in which it happens.
impl Head {
    /// Makes the next step the current one. Returns what this rank takes into the gather of embeddings: its input, or its failure.
    ///
    /// # Errors
    /// What failed on all ranks alike, so that the step ends here.
    fn begin_step(&mut self, input: Contribution<StepInput>, announcement: Announcement) -> Result<Contribution<StepInput>> {
        self.tell_of_dropped_gradient();
        (self.state, self.own_failure, self.failed) = (CallState::Idle, None, true);
        let input = input.and_then(|input| self.check_input(input));
        if self.prepared.is_none() {
            self.seconds = Seconds::default();
            let labels = input.clone().and_then(|input| self.require_labels(&input));
            if let Err(error) = self.gather_and_sample(labels, announcement) {
                // A failure after the gather of labels is this rank's own: the others go on.
                if self.prepared.is_none() || self.poisoned.is_some() {
                    return Err(error);
                }
            }
        }
        let prepared = self.prepared.take().unwrap_or(Ok(()));
        self.step = self.draws - 1;
        let begun = self.backend.begin();
        Ok(prepared.and(begun).and(input))
    }

    /// What this rank says of itself before the next step.
    fn announcement(&self, call: StepCall) -> Announcement {
        Announcement {
            head: self.number,
            call,
            draws: self.draws,
            updates: self.updates,
            learning_rate: self.learning_rate,
            loss_weight: self.loss_weight,
            written_rows: self.written_rows,
            factor: self.factor,
            accumulated: self.accumulated,
        }
    }

    /// Phases 1 and 2 of the next step. `prepared` keeps a failure of the sample: ranks that do not know of it go on.
    fn gather_and_sample(&mut self, labels: Contribution<Labels>, announcement: Announcement) -> Result<()> {
        self.prepared = None;
        let gathered = self.gather_labels(labels, announcement);
        self.poison_if_mismatched(gathered)?;
        let sampled = self.draw_sample();
        self.prepared = Some(sampled.clone());
        self.poison_unless_recoverable(sampled)
    }

    /// Phase 1: every rank gets all ranks' labels, and reaches the same verdict on them.
    fn gather_labels(&mut self, labels: Contribution<Labels>, announcement: Announcement) -> Result<()> {
        let (start, scope) = (Instant::now(), self.scope_of(self.draws));
        let labels = self.check_batch(labels);
        let block = self.backend.pack_labels(&announcement, labels.clone());
        scope.host("all_gather labels", || block.all_gather(&self.comm))?;
        if self.options.grows() {
            let asked = self.backend.largest_batch(self.options.largest_batch(self.comm.size()))?;
            if asked > self.batch_room {
                self.grow(asked)?;
                let block = self.backend.pack_labels(&announcement, labels);
                scope.host("all_gather labels", || block.all_gather(&self.comm))?;
            }
        }
        self.backend.judge_labels()?;
        self.seconds.gather = start.elapsed().as_secs_f64();
        Ok(())
    }

    /// Makes room for batches of as many rows, on all ranks or on none.
    fn grow(&mut self, rows: u64) -> Result<()> {
        let room = self.options.batch_room(rows, self.comm.size());
        let reserved = self.scope_of(self.draws).host("grow", || self.backend.reserve_batch(room));
        let reserved = reserved.map(|()| []).map_err(|error| failure::on_rank(&error, self.rank()));
        // A rank without memory says so: messages have one size on all ranks.
        if let Err(error) = gather_words(&self.comm, reserved) {
            self.backend.take_reserved(false);
            return Err(error);
        }
        self.backend.take_reserved(true);
        self.batch_room = room;
        Ok(())
    }

    /// Phase 2: the positives of this shard and random negatives, or the caller's ids.
    fn draw_sample(&mut self) -> Result<()> {
        let (start, scope) = (Instant::now(), self.scope_of(self.draws));
        let chosen = self.chosen.take();
        let sampled = scope.host("sample", || self.backend.sample(self.draws, chosen.as_deref()));
        self.draws += 1;
        if sampled.is_ok() {
            self.has_sample = true;
            self.share_sample();
        }
        self.seconds.sample = start.elapsed().as_secs_f64();
        sampled
    }

    /// Phases 1, 3 and 4: from the embeddings to the loss.
    fn find_loss(&mut self, input: Contribution<StepInput>, target: LossTarget) -> Result<f64> {
        self.gather_embeddings(&input)?;
        let computed = self.compute_numerators(input);
        // A rank that failed by itself has not judged the embeddings and comes here in any case, so all ranks do.
        self.reduce_sums(&computed, target)?;
        let loss = self.judge_loss(target);
        self.end_forward(computed, loss)
    }

    /// Phase 1, sharded: every rank gets all ranks' embeddings.
    fn gather_embeddings(&mut self, input: &Contribution<StepInput>) -> Result<()> {
        if self.options.placement == Placement::Replicated {
            return Ok(());
        }
        let (start, scope) = (Instant::now(), self.scope());
        let block = self.backend.pack_embeddings(input.as_ref().ok().map(|input| &input.embeddings));
        scope.host("all_gather embeddings", || block.all_gather(&self.comm))?;
        self.seconds.gather += start.elapsed().as_secs_f64();
        Ok(())
    }

    /// Phases 3 and 4: cosines, margins, softmax numerators and their sums over this rank's sample.
    fn compute_numerators(&mut self, input: Contribution<StepInput>) -> Result<()> {
        let (start, scope) = (Instant::now(), self.scope());
        let computed = scope.host("forward", || input.and_then(|input| self.backend.forward(&input.embeddings, &input.terms)));
        self.seconds.forward = start.elapsed().as_secs_f64();
        computed
    }

    /// Phase 4: adds the rows' sums up over all ranks' samples. A rank's failure travels in them.
    fn reduce_sums(&mut self, computed: &Result<()>, target: LossTarget) -> Result<()> {
        let (start, scope) = (Instant::now(), self.scope());
        let sums = self.backend.pack_sums(computed, target.place());
        // An all-reduce that is on a stream first gets its part of the device; one that the host waits in would hold up what runs beside.
        let first = self.comm.is_asynchronous();
        if !first {
            self.backend.run_beside_sums();
        }
        scope.host("all_reduce sums", || sums.all_reduce(&self.comm, ReduceOp::Sum))?;
        if first {
            self.backend.run_beside_sums();
        }
        self.loss_place = match target.place() {
            // As the other ranks have it; if no rank has a usable pointer, as in the step before.
            LossPlace::Unknown => self.backend.others_loss_place()?.known().unwrap_or(self.loss_place),
            own => own,
        };
        self.seconds.reduce = start.elapsed().as_secs_f64();
        Ok(())
    }

    /// Phase 4: the loss from the reduced sums, or the failure that they report.
    fn judge_loss(&mut self, target: LossTarget) -> Result<f64> {
        let (start, scope) = (Instant::now(), self.scope());
        let pointer = match target {
            LossTarget::Device(loss) => loss,
            LossTarget::Host | LossTarget::Nowhere => std::ptr::null_mut(),
        };
        let on_device = self.loss_place == LossPlace::Device;
        let loss = scope.host("loss", || self.backend.judge_sums(on_device.then_some(pointer)));
        self.seconds.reduce += start.elapsed().as_secs_f64();
        loss.map_err(|error| self.name_class_not_finite(error))
    }

    /// Phase 5: this rank's part of the gradient of all rows (sharded), or all of its own rows' (replicated).
    fn embedding_gradient(&mut self) -> Exchange {
        self.scope().host("backward", || self.backend.backward())
    }

    /// Phase 5, sharded: adds the parts up; every rank gets its own rows.
    fn scatter_gradient(&self, partial: &Exchange) -> Result<()> {
        match self.options.placement {
            Placement::Sharded => self.scope().host("reduce_scatter gradient", || partial.reduce_scatter(&self.comm)),
            Placement::Replicated => Ok(()),
        }
    }

    /// Phase 5: from the normalized to the raw embeddings, into the caller's matrix.
    fn finish_gradient(&mut self, factor: f64, gradient: Option<&Matrix>) -> Result<()> {
        let factor = factor * self.options.gradient_scale;
        self.scope().host("finish gradient", || self.backend.finish_gradient(factor, gradient))
    }

    /// The gradients of the rows' margins, into the caller's arrays.
    fn finish_margins(&mut self, factor: f64, gradients: &MarginGradientArrays) -> Result<()> {
        if gradients.given().next().is_none() {
            return Ok(());
        }
        let factor = factor * self.options.gradient_scale;
        self.scope().host("margin gradients", || self.backend.margin_gradients(factor, gradients))
    }

    /// Phase 5: the class centers' gradient, summed over the ranks if each has all centers, and the optimizer. `beside` runs meanwhile.
    fn update_centers(&mut self, update: UpdateCall, beside: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let (start, scope) = (Instant::now(), self.scope());
        (self.learning_rate, self.factor) = (update.learning_rate, update.factor);
        match self.options.placement {
            _ if self.accumulated > 0 => self.update_by_accumulated(update, beside)?,
            Placement::Sharded => scope.host("update", || self.backend.update(update, self.loss_weight, beside))?,
            Placement::Replicated => {
                let gradient = scope.host("center gradient", || self.backend.center_gradient(self.loss_weight));
                scope.host("all_reduce center gradient", || gradient.all_reduce(&self.comm, ReduceOp::Sum))?;
                scope.host("update", || self.backend.apply_gradient(update))?;
            }
        }
        self.updates += 1;
        self.seconds.update = start.elapsed().as_secs_f64();
        self.state = CallState::Idle;
        Ok(())
    }

    /// All of phase 5, the embeddings' gradient on its way while the class centers are updated.
    fn backward_and_update(&mut self, learning_rate: f64, gradient: Option<&Matrix>) -> Result<()> {
        let (start, scope, sharded) = (Instant::now(), self.scope(), self.options.placement == Placement::Sharded);
        let partial = self.embedding_gradient();
        self.seconds.backward = start.elapsed().as_secs_f64();
        if self.comm.size() == 1 && gradient.is_none_or(|gradient| self.is_on_device(gradient)) {
            // Nothing travels, and nobody waits for it: the trainer's backward may begin beside the update.
            self.scatter_gradient(&partial)?;
            let finished = self.finish_gradient(1.0, gradient);
            self.update_centers(UpdateCall::of(learning_rate), &mut || Ok(()))?;
            return finished;
        }
        let comm = self.comm.clone();
        self.update_centers(UpdateCall::of(learning_rate), &mut || match sharded {
            true => scope.host("reduce_scatter gradient", || partial.reduce_scatter(&comm)),
            false => Ok(()),
        })?;
        self.finish_gradient(1.0, gradient)
    }

    /// Whose spans the current step's are.
    pub(super) fn scope(&self) -> trace::Scope {
        self.scope_of(self.step)
    }

    fn scope_of(&self, step: u64) -> trace::Scope {
        trace::Scope { rank: self.comm.rank(), ranks: self.comm.size(), step }
    }
}
