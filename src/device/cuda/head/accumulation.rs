//! Gradients of class centers, summed up over micro-batches in the GPU's memory until an update applies them.

use super::super::driver::{DeviceBuffer, Stream};
use super::super::shared_structs::Accumulated;
use super::super::streams::StreamRole;
use super::launch::ExchangeBuffers;
use super::{run, CudaHead};
use crate::device::UpdateCall;
use crate::exchange::Exchange;
use crate::matrix::DType;
use crate::Result;

/// The arrays of an [`Accumulated`]. The host does not know how many rows have gradients: `limit` is what there may be.
pub(super) struct Accumulation {
    gradients: DeviceBuffer<f32>,
    classes: DeviceBuffer<u32>,
    places: DeviceBuffer<u32>,
    squares: DeviceBuffer<f32>,
    counts: DeviceBuffer<u32>,
    /// dW^ of a chunk, for a head whose update needs no array for it.
    chunk: DeviceBuffer<f32>,
    capacity: usize,
    limit: usize,
}

impl Accumulation {
    fn new(stream: &Stream, shard_rows: usize) -> Result<Accumulation> {
        Ok(Accumulation {
            gradients: DeviceBuffer::zeroed(stream, 0, "accumulated gradients")?,
            classes: DeviceBuffer::zeroed(stream, 0, "classes of accumulated gradients")?,
            places: DeviceBuffer::zeroed(stream, shard_rows, "places of accumulated gradients")?,
            squares: DeviceBuffer::zeroed(stream, 0, "squares of accumulated gradients")?,
            counts: DeviceBuffer::zeroed(stream, 2, "counts of accumulated gradients")?,
            chunk: DeviceBuffer::zeroed(stream, 0, "class centers' gradient")?,
            capacity: 0,
            limit: 0,
        })
    }

    /// Makes room for as many rows. The work under way is waited for where there is none; out of memory, nothing is changed.
    fn reserve(&mut self, stream: &Stream, rows: usize, dim: usize) -> Result<()> {
        if rows > self.capacity {
            let gradients = DeviceBuffer::<f32>::zeroed(stream, rows.saturating_mul(dim), "accumulated gradients")?;
            let classes = DeviceBuffer::<u32>::zeroed(stream, rows, "classes of accumulated gradients")?;
            let squares = DeviceBuffer::zeroed(stream, rows, "squares of accumulated gradients")?;
            let bytes = self.capacity * size_of::<f32>();
            if bytes > 0 {
                // SAFETY: both have as many; the old ones live until the stream is done with them, which their drop waits for.
                unsafe {
                    stream.copy(gradients.as_mut_ptr().cast(), self.gradients.as_mut_ptr().cast(), bytes * dim)?;
                    stream.copy(classes.as_mut_ptr().cast(), self.classes.as_mut_ptr().cast(), bytes)?;
                }
            }
            (self.gradients, self.classes, self.squares, self.capacity) = (gradients, classes, squares, rows);
        }
        Ok(())
    }

    fn view(&self) -> Accumulated {
        Accumulated {
            gradients: self.gradients.as_mut_ptr(),
            classes: self.classes.as_mut_ptr(),
            places: self.places.as_mut_ptr(),
            squares: self.squares.as_mut_ptr(),
            counts: self.counts.as_mut_ptr(),
        }
    }
}

impl CudaHead {
    pub(super) fn accumulate_step(&mut self, loss_weight: f64) -> Result<()> {
        self.pending_error()?;
        let view = self.reserve_accumulation()?;
        let arrays = self.scale_embeddings();
        run!(self, Centers, place_rows, (arrays, view));
        for first in self.chunks() {
            if !self.sizes().keeps_probabilities() {
                self.numerators(StreamRole::Centers, first, self.offsets());
            }
            self.chunk_center_gradient(first, loss_weight, 0);
            if self.sharded() {
                let count = self.sizes().chunks.columns as u32;
                run!(self, Centers, accumulate_rows, (arrays, view, first, count));
            }
        }
        if !self.sharded() {
            let (first, count) = (0u32, self.sizes().capacities.sample as u32);
            run!(self, Centers, accumulate_rows, (arrays, view, first, count));
        }
        // The step stays in progress: an update may come without another forward, and what is gathered before it would be of old rows.
        self.pending_error()
    }

    /// Memory for the gradients of the current step's sample; dW^ of a chunk goes to `center_gradient` in any case.
    fn reserve_accumulation(&mut self) -> Result<Accumulated> {
        let (dim, shard_rows, chunk) = (self.dim(), self.spec.shard.rows as usize, self.sizes().chunks.columns as usize);
        let more = match self.sharded() {
            true => self.drafts[self.current].sample_limit,
            // The same on all ranks, which add up as many rows.
            false => self.common_sample_limit()?,
        };
        let stream = self.streams.of(StreamRole::Centers);
        let mut accumulation = match self.accumulation.take() {
            Some(accumulation) => accumulation,
            None => Accumulation::new(stream, shard_rows)?,
        };
        let limit = shard_rows.min(accumulation.limit + more as usize);
        let room = accumulation.reserve(stream, limit, dim).and_then(|()| {
            if self.fused() && accumulation.chunk.len() < chunk * dim {
                accumulation.chunk = DeviceBuffer::zeroed(stream, chunk * dim, "class centers' gradient")?;
            }
            Ok(())
        });
        if room.is_ok() {
            accumulation.limit = limit;
        }
        let (view, chunk) = (accumulation.view(), accumulation.chunk.as_mut_ptr());
        self.accumulation = Some(accumulation);
        room?;
        if self.fused() {
            self.memory.arrays[self.current].center_gradient = chunk;
        }
        Ok(view)
    }

    pub(super) fn exchange_accumulated(&mut self) -> Exchange {
        let (data, rows) = self
            .accumulation
            .as_ref()
            .map_or((std::ptr::null_mut(), 0), |accumulation| (accumulation.gradients.as_mut_ptr(), accumulation.limit));
        let buffers = ExchangeBuffers { send: data, recv: data, count: rows * self.dim() };
        self.exchange("all_reduce center gradient", StreamRole::Centers, buffers, DType::F32)
    }

    pub(super) fn update_by_accumulated(&mut self, update: UpdateCall) -> Result<()> {
        let Some(accumulation) = &mut self.accumulation else { return Ok(()) };
        accumulation.limit = 0;
        let view = accumulation.view();
        if !self.sharded() {
            self.received(StreamRole::Centers);
        }
        // Rows may be under way to a caller.
        self.join(StreamRole::Centers, StreamRole::Main);
        self.begin_update(update, view.counts);
        let arrays = self.arrays();
        run!(self, Centers, apply_accumulated, (arrays, view));
        run!(self, Centers, finish_accumulated, (arrays, view));
        self.count_update();
        self.pending_error()
    }
}
