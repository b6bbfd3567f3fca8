//! A head's row terms on the CPU: taken from the caller, used where the loss is found, and the gradients of the margins.

use super::buffers::resize;
use super::head::{CpuHead, ELSEWHERE, IGNORED};
use crate::margin::Margin;
use crate::memory::zeros;
use crate::row_terms::{travelled_angle, MarginGradientArrays, RowTerm, RowTermArrays};
use crate::Result;

/// What a step keeps of its rows' terms.
#[derive(Default)]
pub(super) struct TermFigures {
    /// m2, m3 and weight: of this rank's rows until the sums are reduced, then of all rows that it computes.
    pub terms: [Vec<f32>; RowTerm::ALL.len()],
    /// Of the rows whose target is here, 0 elsewhere.
    pub angles: Vec<f64>,
    /// The derivatives of the row's loss by m2 and by m3.
    gradients: [Vec<f32>; 2],
}

/// What a row's terms make of its target.
pub(super) struct TermTarget {
    pub logit: f64,
    pub derivative: f64,
    by_m2: f64,
    pub weight: f64,
}

impl TermFigures {
    pub fn resize(&mut self, rows: usize) -> Result<()> {
        for values in self.terms.iter_mut().chain(&mut self.gradients) {
            resize(values, rows)?;
        }
        if rows > self.angles.capacity() {
            self.angles = zeros(&[rows], "targets' angles")?;
        }
        self.angles.resize(rows, 0.0);
        self.angles.fill(0.0);
        Ok(())
    }

    /// The target of a row whose angle travelled as `sent`, its cosine being `cosine` here. All ranks find the same logit; the
    /// derivative, which only the rank with the class has, is that at the angle before it was rounded.
    pub fn target(&self, margin: &Margin, row: usize, sent: f32, cosine: f32) -> TermTarget {
        let [m2, m3, weight] = self.terms.each_ref().map(|values| f64::from(values[row]));
        let (margin, angle) = (Margin { m2, m3, ..*margin }, travelled_angle(sent));
        TermTarget {
            logit: margin.target(angle).logit,
            derivative: if cosine == ELSEWHERE { 0.0 } else { margin.target(self.angles[row]).derivative },
            by_m2: margin.derivative_by_m2(angle),
            weight,
        }
    }

    /// `steepness`: of the row's loss, with its weight, by the target's logit over the scale, times -1.
    pub fn keep_gradients(&mut self, row: usize, steepness: f64, target: Option<&TermTarget>) {
        self.gradients[0][row] = target.map_or(0.0, |target| (-steepness * target.by_m2) as f32);
        self.gradients[1][row] = steepness as f32;
    }
}

impl CpuHead {
    /// Takes the terms of this rank's rows; those of the others come with the sums.
    pub(super) fn take_terms(&mut self, arrays: &RowTermArrays) {
        if !self.spec.options.row_terms {
            return;
        }
        let own = self.own_rows();
        for ((term, array), values) in RowTerm::ALL.into_iter().zip(arrays.0).zip(&mut self.step.terms.terms) {
            values.fill(0.0);
            let own = &mut values[own.clone()];
            match array.is_null() {
                true => own.fill(term.default(&self.spec.options.margin)),
                // SAFETY: the caller gave a number for each row of its batch.
                false => own.copy_from_slice(unsafe { std::slice::from_raw_parts(array, own.len()) }),
            }
        }
    }

    /// The first row with a term out of its range.
    pub(super) fn bad_term(&self) -> Option<(RowTerm, usize, f32)> {
        let step = &self.step;
        let wrong = |row: usize| {
            let of_row = RowTerm::ALL.into_iter().zip(&step.terms.terms).map(|(term, values)| (term, row, values[row]));
            of_row.into_iter().find(|(term, _, value)| !term.admits(*value))
        };
        match self.spec.options.row_terms {
            true => (0..step.shape.rows).filter(|&row| step.target_cosines[row] != IGNORED).find_map(wrong),
            false => None,
        }
    }

    pub(super) fn write_margin_gradients(&self, factor: f64, gradients: &MarginGradientArrays) {
        let (own, weight) = (self.own_rows(), self.weight(factor));
        for (values, array) in self.step.terms.gradients.iter().zip(gradients.0).filter(|(_, array)| !array.is_null()) {
            for (i, &value) in values[own.clone()].iter().enumerate() {
                // SAFETY: the caller has room for a number for each row of its batch.
                unsafe { array.add(i).write((f64::from(value) * weight) as f32) };
            }
        }
    }
}
