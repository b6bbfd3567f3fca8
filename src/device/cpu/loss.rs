//! What the ranks add up between forward and backward, and the loss each of them finds in it.

use super::head::{CpuHead, ELSEWHERE, IGNORED};
use crate::exchange::Exchange;
use crate::matrix::DType;
use crate::protocol::{self, REPLICATED_SLOT, REPLICATED_TOTALS, TOTALS};
use crate::{Error, Result, Status};

impl CpuHead {
    /// Loss, coefficient and factor of a row from its reduced sums; `only_target`: its sample holds nothing else. `target` is the
    /// target's logit, or with row terms its angle.
    fn finish_row(&mut self, row: usize, sum: f64, target: f32, only_target: bool) -> std::result::Result<f64, ()> {
        let (margin, step, has_terms) = (&self.spec.options.margin, &self.step, self.spec.options.row_terms);
        if step.target_cosines[row] == IGNORED || only_target {
            (self.step.coefficients[row], self.step.factors[row]) = (0.0, 0.0);
            if has_terms {
                self.step.terms.keep_gradients(row, 0.0, None);
            }
            return Ok(0.0);
        }
        let own = has_terms.then(|| step.terms.target(margin, row, target, step.target_cosines[row]));
        let (logit, derivative, weight) = match &own {
            Some(own) => (own.logit, own.derivative, own.weight),
            None => (f64::from(target), f64::from(step.derivatives[row]), 1.0),
        };
        let offset = margin.offset();
        let denominator = sum + (logit - offset).exp();
        // Without a negative on this rank there is nothing to weigh, and where the other ranks' are far 1 / L would leave float32.
        let alone = margin.has_row_offsets() && step.best_negatives[row] == ELSEWHERE;
        let factor = if alone { 0.0 } else { (weight * margin.scale / denominator * self.own_offset_factor(row)) as f32 };
        if sum.is_nan() || sum <= 0.0 || denominator.is_infinite() || !factor.is_finite() {
            return Err(());
        }
        let steepness = weight * margin.scale * (sum / denominator);
        (self.step.coefficients[row], self.step.factors[row]) = ((-steepness * derivative) as f32, factor);
        if has_terms {
            self.step.terms.keep_gradients(row, steepness, own.as_ref());
        }
        let excess = sum.ln() + offset - logit;
        Ok(weight * (excess.max(0.0) + (-excess.abs()).exp().ln_1p()))
    }

    /// What takes numerators relative to the row's offset on this rank to those relative to c.
    fn own_offset_factor(&self, row: usize) -> f64 {
        let own = self.step.offsets[row];
        // The offset that most rows have is c rounded to float32, and stands for c.
        if own == self.softmax.offset {
            1.0
        } else {
            (f64::from(own) - self.spec.options.margin.offset()).exp()
        }
    }

    /// This rank's part of *sums*: its own N and zt, or zeros and an error.
    pub(super) fn pack_sharded_sums(&mut self, outcome: &Result<()>, rank: usize) -> Exchange {
        let rows = self.step.draft.labels.len();
        let (margin, has_terms) = (&self.spec.options.margin, self.spec.options.row_terms);
        let (count, terms_start) = (protocol::sum_elements(rows, &self.spec.options), protocol::terms_start(rows, margin));
        let sums = &mut self.messages.sums[..count];
        sums.fill(0.0);
        // NOT_FINITE was found in what all ranks gathered: all know it already.
        match outcome {
            Ok(()) => {
                let step = &self.step;
                sums[..rows].copy_from_slice(&step.row_sums[..rows]);
                sums[rows..2 * rows].copy_from_slice(&step.target_logits[..rows]);
                if has_terms {
                    sums[rows..2 * rows].iter_mut().zip(&step.terms.angles).for_each(|(sent, &angle)| *sent = angle as f32);
                    for (sent, values) in sums[terms_start..].chunks_exact_mut(rows.max(1)).zip(&step.terms.terms) {
                        sent.copy_from_slice(&values[..rows]);
                    }
                }
                let (near, rest) = sums[..terms_start].split_at_mut(2 * rows);
                let (totals, far) = rest.split_at_mut(TOTALS);
                for (row, far) in far.iter_mut().enumerate().filter(|&(row, _)| step.offsets[row] != self.softmax.offset) {
                    *far = protocol::far_sum(std::mem::take(&mut near[row]), step.offsets[row], margin);
                }
                totals[0] = step.target_cosines[..rows].iter().filter(|&&cosine| cosine.abs() < IGNORED).sum();
                // Whether a row's sample holds more than its target: two classes are as good as any number.
                totals[3] = step.shape.classes.min(2) as f32;
            }
            Err(_) => sums[2 * rows + 2] = protocol::pack_error(rank),
        }
        let data = self.messages.sums.as_mut_ptr();
        Exchange::host(data, data, count, DType::F32)
    }

    /// This rank's loss, valid rows and target cosines, and in its slot its outcome.
    pub(super) fn pack_replicated_sums(&mut self, outcome: &Result<()>, rank: usize) -> Exchange {
        self.messages.replicated_sums.fill(0.0);
        let slot = REPLICATED_TOTALS + REPLICATED_SLOT * rank;
        let verdict = match outcome {
            Ok(()) => self.own_loss(),
            Err(error) => Err((error.status, self.step.bad_row.unwrap_or(0) as f64, 0.0)),
        };
        match verdict {
            Ok(loss) => {
                let cosines = self.step.target_cosines.iter().filter(|cosine| cosine.abs() < IGNORED);
                self.messages.replicated_sums[2] = cosines.map(|&cosine| f64::from(cosine)).sum();
                self.messages.replicated_sums[0] = loss;
                self.messages.replicated_sums[1] = self.step.draft.valid_rows as f64;
                self.messages.replicated_sums[slot + 2] = self.step.draft.sample.digest();
            }
            Err((status, row, value)) => {
                self.messages.replicated_sums[slot] = f64::from(status as i32);
                (self.messages.replicated_sums[slot + 1], self.messages.replicated_sums[slot + 2]) = (row, value);
            }
        }
        let data = self.messages.replicated_sums.as_mut_ptr();
        Exchange::host(data, data, self.messages.replicated_sums.len(), DType::F64)
    }

    /// The sum of this rank's losses; or the status and, below 0, the row of a sum that leaves float32, or the row and its term that is
    /// out of its range, and the value of that.
    fn own_loss(&mut self) -> std::result::Result<f64, (Status, f64, f64)> {
        if let Some((term, row, value)) = self.bad_term() {
            return Err((Status::InvalidArgument, protocol::term_word(term, row), value.into()));
        }
        let only_target = self.step.shape.classes <= 1;
        let mut loss = 0.0;
        for row in 0..self.step.shape.rows {
            let sum = f64::from(self.step.row_sums[row]) * self.own_offset_factor(row);
            let target = match self.spec.options.row_terms {
                true => self.step.terms.angles[row] as f32,
                false => self.step.target_logits[row],
            };
            loss += self.finish_row(row, sum, target, only_target).map_err(|()| (Status::NotFinite, -1.0 - row as f64, 0.0))?;
        }
        Ok(loss)
    }

    /// N and zt are this rank's in `row_sums` and `target_logits`; a sharded head's become all ranks' in `judge_sums`.
    pub(super) fn judge_sharded_sums(&mut self) -> Result<f64> {
        let rows = self.step.shape.rows;
        let has_far = self.spec.options.margin.has_row_offsets();
        let totals = &self.messages.sums[2 * rows..2 * rows + TOTALS];
        let (cosines, errors, classes) = (totals[0], totals[2], totals[3]);
        protocol::judge_errors(errors, self.spec.rank as usize)?;
        if self.spec.options.row_terms {
            let terms_start = protocol::terms_start(rows, &self.spec.options.margin);
            let count = protocol::sum_elements(rows, &self.spec.options);
            let sent = self.messages.sums[terms_start..count].chunks_exact(rows.max(1));
            sent.zip(&mut self.step.terms.terms).for_each(|(sent, values)| values.copy_from_slice(sent));
            if let Some((term, row, value)) = self.bad_term() {
                let (origin, number) = self.step.draft.origin(row);
                return Err(protocol::bad_term(term, value, number, origin));
            }
        }
        self.step.valid_rows = self.step.draft.valid_rows as u64;
        self.step.target_cosine_sum = f64::from(cosines);
        let mut loss = 0.0;
        for row in 0..rows {
            let far = if has_far { self.messages.sums[2 * rows + TOTALS + row] } else { 0.0 };
            let (sum, target) = (protocol::whole_sum(self.messages.sums[row], far), self.messages.sums[rows + row]);
            loss += self.finish_row(row, sum, target, classes <= 1.0).map_err(|()| {
                let (origin, number) = self.step.draft.origin(row);
                protocol::bad_sum(number, origin)
            })?;
        }
        Ok(loss)
    }

    pub(super) fn judge_replicated_sums(&mut self) -> Result<f64> {
        let slot = |other: usize| REPLICATED_TOTALS + REPLICATED_SLOT * other;
        for other in 0..self.spec.ranks as usize {
            let (status, row) = (self.messages.replicated_sums[slot(other)], self.messages.replicated_sums[slot(other) + 1]);
            match Status::from_code(status as i64) {
                None => {}
                Some(Status::NotFinite) if row < 0.0 => return Err(protocol::bad_sum((-row - 1.0) as usize, other)),
                Some(Status::NotFinite) => return Err(protocol::bad_embedding(row as usize, other)),
                Some(Status::InvalidArgument) if row < 0.0 => {
                    return Err(protocol::bad_term_of(row, self.messages.replicated_sums[slot(other) + 2], other));
                }
                Some(status) => return Err(Error::remote(other, status as i64)),
            }
        }
        for other in 1..self.spec.ranks as usize {
            if self.messages.replicated_sums[slot(other) + 2] != self.messages.replicated_sums[slot(0) + 2] {
                return Err(protocol::samples_differ(other));
            }
        }
        self.step.valid_rows = self.messages.replicated_sums[1] as u64;
        self.step.target_cosine_sum = self.messages.replicated_sums[2];
        Ok(self.messages.replicated_sums[0])
    }
}
