//! Gradients of class centers, summed up over micro-batches until an update applies them.

use super::head::CpuHead;
use super::sample::Sample;
use super::vector;
use crate::device::UpdateCall;
use crate::exchange::Exchange;
use crate::matrix::DType;
use crate::memory::{reserve, zeros, Buffer, Parts};
use crate::protocol::is_factor;
use crate::Result;

/// Rows that one task adds up or updates.
const ROWS_A_TASK: usize = 64;

pub(super) struct Accumulation {
    /// By row of the shard: 1 + its place below; 0: it has no gradient.
    places: Vec<u32>,
    /// The rows that have one, in the order in which they came.
    rows: Vec<u32>,
    /// [rows, d]
    gradients: Vec<f32>,
    /// The rows' places, in the order of an update's. Reserved beforehand like `squares`.
    order: Vec<u32>,
    /// Of an update's tasks: reserved beforehand, since an update that fails ends the head.
    squares: Vec<f64>,
}

impl Accumulation {
    fn new(shard_rows: usize) -> Result<Accumulation> {
        let places = zeros(&[shard_rows], "places of accumulated gradients")?;
        Ok(Accumulation { places, rows: Vec::new(), gradients: Vec::new(), order: Vec::new(), squares: Vec::new() })
    }

    /// Makes room for the gradients of a sample.
    fn reserve(&mut self, sample: &Sample, dim: usize) -> Result<()> {
        let new = (0..sample.len()).filter(|&column| self.places[sample.row(column)] == 0).count();
        reserve(&mut self.rows, new, "classes of accumulated gradients")?;
        reserve(&mut self.order, self.rows.len() + new, "classes of accumulated gradients")?;
        reserve(&mut self.squares, (self.rows.len() + new).div_ceil(ROWS_A_TASK), "sums of squares")?;
        reserve(&mut self.gradients, new * dim, "accumulated gradients")
    }

    /// Gives each row of the sample a place, for which there is room.
    fn place(&mut self, sample: &Sample, dim: usize) {
        for row in (0..sample.len()).map(|column| sample.row(column)) {
            if self.places[row] == 0 {
                self.rows.push(row as u32);
                self.places[row] = self.rows.len() as u32;
            }
        }
        self.gradients.resize(self.rows.len() * dim, 0.0);
    }

    /// Puts the rows in ascending order: that of a file.
    fn sort(&mut self) {
        let Accumulation { rows, order, .. } = self;
        order.clear();
        order.extend(0..rows.len() as u32);
        order.sort_unstable_by_key(|&place| rows[place as usize]);
    }

    fn clear(&mut self) {
        for row in self.rows.drain(..) {
            self.places[row as usize] = 0;
        }
        self.gradients.clear();
        self.squares.clear();
    }
}

impl CpuHead {
    pub(super) fn accumulate_step(&mut self, loss_weight: f64) -> Result<()> {
        let (weight, dim, classes) = (self.weight(loss_weight), self.step.shape.dim, self.step.shape.classes);
        if self.messages.center_gradient.len() < classes * dim {
            // A sharded head's update needs none.
            self.messages.center_gradient = Buffer::zeroed(classes * dim, "class centers' gradient")?;
        }
        let mut accumulation = match self.accumulation.take() {
            Some(accumulation) => accumulation,
            None => Accumulation::new(self.spec.shard.rows as usize)?,
        };
        let room = accumulation.reserve(&self.step.draft.sample, dim);
        if room.is_ok() {
            self.gradient_pass(weight);
            let sample = &self.step.draft.sample;
            accumulation.place(sample, dim);
            let (sums, places, gradients) =
                (Parts::of(&mut accumulation.gradients), &accumulation.places, &self.messages.center_gradient);
            self.pool.run(classes.div_ceil(ROWS_A_TASK), &|task, _| {
                for column in task * ROWS_A_TASK..((task + 1) * ROWS_A_TASK).min(classes) {
                    let place = places[sample.row(column)] as usize - 1;
                    // SAFETY: a column is in one task, and no two columns are of one row.
                    let sum = unsafe { sums.range(place * dim..(place + 1) * dim) };
                    vector::add_scaled(sum, 1.0, &gradients[column * dim..(column + 1) * dim]);
                }
            });
        }
        self.accumulation = Some(accumulation);
        room
    }

    pub(super) fn exchange_accumulated(&mut self) -> Exchange {
        let gradients = self.accumulation.as_mut().map_or(&mut [][..], |accumulation| &mut accumulation.gradients);
        let data = gradients.as_mut_ptr();
        Exchange::host(data, data, gradients.len(), DType::F32)
    }

    pub(super) fn update_by_accumulated(&mut self, update: UpdateCall) -> Result<()> {
        let UpdateCall { learning_rate, factor, .. } = update;
        let CpuHead { pool, rows: centers, step, replay, accumulation, skipped_updates, .. } = self;
        let Some(accumulation) = accumulation else { return Ok(()) };
        step.grad_centers = 0.0;
        if !is_factor(factor) {
            *skipped_updates += 1;
            accumulation.clear();
            return Ok(());
        }
        accumulation.sort();
        let Accumulation { rows, order, gradients, squares, .. } = &mut *accumulation;
        let (dim, gradients) = (step.shape.dim, Parts::of(gradients));
        squares.clear();
        squares.resize(rows.len().div_ceil(ROWS_A_TASK), 0.0);
        // Whole tasks, so that the sum of squares does not depend on how many rows can be brought at once.
        let at_once = centers.slot_count() / ROWS_A_TASK * ROWS_A_TASK;
        let at_once = if at_once == 0 { rows.len() } else { at_once };
        for (places, squares) in order.chunks(at_once.max(1)).zip(squares.chunks_mut(at_once.div_ceil(ROWS_A_TASK).max(1))) {
            let row = |position: usize| rows[places[position] as usize] as usize;
            centers.bring(places.len(), &row)?;
            let tasks = places.len().div_ceil(ROWS_A_TASK);
            let (updating, sums) = (centers.updating(replay, learning_rate), Parts::of(squares));
            pool.run(tasks, &|task, worker| {
                let mut squares = 0.0;
                let positions = task * ROWS_A_TASK..((task + 1) * ROWS_A_TASK).min(places.len());
                for (position, &place) in positions.clone().zip(&places[positions]) {
                    let gradient = place as usize * dim..(place as usize + 1) * dim;
                    // SAFETY: a position is in one task, and has a place and a row of its own.
                    let gradient = unsafe { gradients.range(gradient) };
                    vector::scale(gradient, factor as f32);
                    squares += vector::sum_of_squares(gradient);
                    // SAFETY: as above.
                    unsafe { updating.apply(updating.slots.place(row(position), position), worker, gradient) };
                }
                // SAFETY: each task has its own.
                unsafe { sums.range(task..task + 1)[0] = squares };
            });
            updating.verdict()?;
            centers.put_back(places.len(), &row)?;
        }
        step.grad_centers = squares.iter().sum();
        accumulation.clear();
        centers.count_update(learning_rate, pool)
    }
}
