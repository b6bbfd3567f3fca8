//! The next step's labels and its draw.

use std::sync::Arc;

use super::super::driver::{Context, DeviceBuffer, Event, MemorySpace, Stream};
use super::super::entries::SMALL_SORT_ROWS;
use super::super::shared_structs::LabelHeader;
use super::super::sizes::{LargerArrays, Replaced, Sizes};
use super::super::staging;
use super::super::streams::StreamRole;
use super::super::upload_slots::UploadSlots;
use super::{run, CudaHead, ExchangeBuffers, Outgrown, Retired};
use crate::device::{sample_capacity, HeadSpec, Labels};
use crate::exchange::Exchange;
use crate::matrix::DType;
use crate::protocol::{self, Announcement, HEADER, REPLICATED_SLOT, REPLICATED_TOTALS};
use crate::{Contribution, Error, Result};

/// Of two steps that overlap, and of steps that failed between them.
const LABEL_SLOTS: usize = 4;

/// A step's labels and draw, as far as the host knows them.
pub(super) struct Draft {
    /// Its sample is drawn.
    pub drawn: Event,
    /// No enqueued work uses it any more.
    pub released: Event,
    /// The number of its step: the same on all ranks.
    pub step: u64,
    /// Capacity of this step's sample; equal on all ranks unless callers chose samples of different sizes.
    pub sample_limit: u64,
    /// This rank's rows.
    pub batch: usize,
    /// This rank's labels where the host has them.
    pub labels: Option<Vec<i64>>,
    /// Why this rank sent no labels.
    pub own_failure: Option<Error>,
    /// Its first chunk of class centers is gathered, or will be before any work that is enqueued from here on.
    pub gathered: bool,
}

impl Draft {
    pub fn new(context: &Arc<Context>) -> Result<Draft> {
        Ok(Draft {
            drawn: Event::new(context)?,
            released: Event::new(context)?,
            step: 0,
            sample_limit: 0,
            batch: 0,
            labels: None,
            own_failure: None,
            gathered: false,
        })
    }
}

/// This rank's labels on the device, of the current step and of the next one, and what they come through.
pub(super) struct LabelMemory {
    of_drafts: [DeviceBuffer<i64>; 2],
    slots: UploadSlots<i64>,
}

impl LabelMemory {
    pub fn new(context: &Arc<Context>, stream: &Stream, max_batch: usize) -> Result<LabelMemory> {
        let labels = || DeviceBuffer::zeroed(stream, max_batch, "labels");
        Ok(LabelMemory {
            of_drafts: [labels()?, labels()?],
            slots: UploadSlots::new(context, LABEL_SLOTS, max_batch, "labels under way")?,
        })
    }
}

/// Memory for larger batches, put aside until all ranks have it.
pub(super) struct Reserved {
    max_batch: u64,
    arrays: LargerArrays,
    labels: LabelMemory,
}

impl CudaHead {
    /// Phase 1: this rank's block of A, of its labels or of its failure.
    pub(super) fn draft_labels(&mut self, announcement: &Announcement, labels: Contribution<Labels>) -> Exchange {
        let next = self.next();
        if self.drafts[next].gathered {
            // No forward used this draft: its gather may not be over.
            self.join(StreamRole::Draw, StreamRole::Centers);
        }
        let released = self.streams.of(StreamRole::Draw).wait(&self.drafts[next].released);
        self.remember_error(released);
        self.next_has_labels = false;
        let draft = &mut self.drafts[next];
        (draft.step, draft.batch, draft.labels, draft.own_failure, draft.gathered) = (announcement.draws, 0, None, None, false);
        let uploaded = labels.and_then(|labels| Ok((self.upload_labels(next, &labels)?, labels.count)));
        let (source, batch, failure) = match uploaded {
            Ok((source, count)) => (source, count, None),
            Err(error) => (std::ptr::null_mut(), 0, Some(error)),
        };
        let header = LabelHeader { words: protocol::label_header(self.spec.rank, announcement, batch, failure.as_ref()) };
        (self.drafts[next].batch, self.drafts[next].own_failure) = (batch, failure);
        let (arrays, factor) = (self.memory.arrays[next], self.factor_of_last_update());
        run!(self, Draw, pack_labels, (arrays, header, source.cast(), factor));
        let count = HEADER + self.spec.options.max_batch as usize;
        let buffers = ExchangeBuffers { send: arrays.labels_send, recv: arrays.labels_recv, count };
        self.exchange("all_gather labels", StreamRole::Draw, buffers, DType::I64)
    }

    fn upload_labels(&mut self, next: usize, labels: &Labels) -> Result<*mut i64> {
        let destination = self.labels.of_drafts[next].as_mut_ptr();
        if labels.count == 0 || labels.count as u64 > self.spec.options.max_batch {
            // In the second case the block has no room for them and asks for it.
            return Ok(destination);
        }
        let (draft, draw) = (&mut self.drafts[next], self.streams.of(StreamRole::Draw));
        if self.gpu.context.memory_space("labels", labels.data.cast())? == MemorySpace::Device {
            // In the order of the caller's stream: the caller may enqueue work there that overwrites them as soon as this returns.
            self.gpu.stream.wait(&draft.drawn)?;
            // SAFETY: the caller gave as many labels; the head's own have room for the largest batch.
            unsafe { self.gpu.stream.copy(destination.cast(), labels.data.cast(), labels.count * size_of::<i64>()) }?;
            draft.released.record(&self.gpu.stream)?;
            draw.wait(&draft.released)?;
            return Ok(destination);
        }
        // SAFETY: the caller of the head's entry gave this many labels, and they are in host memory.
        let given = unsafe { labels.as_slice() };
        // SAFETY: as above.
        unsafe { self.labels.slots.upload(draw, destination, given) }?;
        draft.labels = Some(given.to_vec());
        Ok(destination)
    }

    /// The most classes of a drawn sample, on any rank.
    fn drawn_sample_limit(&self) -> u64 {
        sample_capacity(&self.spec.options, self.spec.ranks, self.spec.shard)
    }

    /// Makes room for a caller's sample that is larger than every draw. The step in progress keeps its arrays until it is over.
    fn grow(&mut self, classes: usize) -> Result<()> {
        let next = self.next();
        if classes as u64 <= self.sizes[next].capacities.sample_limit {
            return Ok(());
        }
        let larger = self.larger_arrays(&self.spec.clone(), classes as u64)?;
        self.replace_arrays(larger);
        Ok(())
    }

    /// Arrays for the next step and those after it. They are zero when it returns.
    fn larger_arrays(&mut self, spec: &HeadSpec, least_sample: u64) -> Result<LargerArrays> {
        self.streams.synchronize()?;
        self.retired = Retired::default();
        let (kept, mut gpu) = (self.sizes[self.next()].kept_on_device(), self.gpu.capacity()?);
        // Sizes are chosen as for a new head.
        gpu.free_memory = gpu.free_memory.saturating_add(kept);
        let larger = self.memory.larger(Sizes::new(spec, gpu, least_sample)?, &self.gpu.stream)?;
        // The other streams use memory that is cleared on this one.
        self.gpu.stream.synchronize()?;
        Ok(larger)
    }

    /// Takes them for the next step. The step in progress keeps its arrays until it is over.
    fn replace_arrays(&mut self, larger: LargerArrays) {
        let (next, Replaced { sizes, arrays, buffers: replaced }) = (self.next(), self.memory.replace(larger));
        self.sizes[next] = sizes;
        self.memory.arrays[next] = arrays[next];
        let mut buffers = self.outgrown.take().map_or_else(Vec::new, |outgrown| outgrown.buffers);
        buffers.extend(replaced);
        self.outgrown = Some(Outgrown { arrays: arrays[self.current], buffers });
    }

    /// What the ranks' headers ask for. Waits for the gather.
    pub(super) fn gathered_batch(&mut self, limit: u64) -> Result<u64> {
        self.received(StreamRole::Draw);
        self.pending_error()?;
        let (arrays, stream) = (self.memory.arrays[self.next()], self.streams.of(StreamRole::Draw));
        let stride = HEADER + arrays.max_batch as usize;
        let sent = staging::fetch(stream, arrays.labels_send, HEADER)?;
        let blocks = staging::fetch(stream, arrays.labels_recv, self.spec.ranks as usize * stride)?;
        protocol::largest_batch(&sent, &blocks, stride, self.spec.rank as usize, limit)
    }

    pub(super) fn reserve_rows(&mut self, rows: u64) -> Result<()> {
        let mut spec = self.spec.clone();
        spec.options.max_batch = rows;
        let (limit, drawn) = (self.sizes[self.next()].capacities.sample_limit, self.drawn_sample_limit());
        // A caller's sample was larger than the draws, and may be again.
        let arrays = self.larger_arrays(&spec, if limit > drawn { limit } else { 0 })?;
        let labels = LabelMemory::new(&self.gpu.context, &self.gpu.stream, rows as usize)?;
        self.gpu.stream.synchronize()?;
        self.reserved = Some(Reserved { max_batch: rows, arrays, labels });
        Ok(())
    }

    pub(super) fn use_reserved(&mut self) {
        let Some(Reserved { max_batch, arrays, labels }) = self.reserved.take() else { return };
        self.spec.options.max_batch = max_batch;
        self.replace_arrays(arrays);
        // The labels of the step in progress have been packed.
        self.retired.labels.push(std::mem::replace(&mut self.labels, labels));
    }

    /// The sorted labels and the positives, whose bits are set if `mark` is 1.
    fn sort_labels(&mut self, draft: usize, mark: u32) {
        let arrays = self.memory.arrays[draft];
        if self.sizes[draft].capacities.labels <= SMALL_SORT_ROWS {
            run!(self, Draw, sort_labels, (arrays, mark));
            return;
        }
        run!(self, Draw, spread_labels, (arrays,));
        for (pass, shift) in [0u32, 8, 16, 24].into_iter().enumerate() {
            let from = pass as u32 % 2;
            run!(self, Draw, sort_labels_count, (arrays, shift, from));
            run!(self, Draw, sort_labels_scan, (arrays,));
            run!(self, Draw, sort_labels_scatter, (arrays, shift, from));
        }
        run!(self, Draw, find_positives_count, (arrays,));
        run!(self, Draw, find_positives_scan, (arrays,));
        run!(self, Draw, find_positives_scatter, (arrays, mark));
    }

    /// The draw: sorts labels, finds positives, draws negatives, finds the targets' columns.
    pub(super) fn draw(&mut self, chosen: Option<&[i64]>) -> Result<()> {
        let draft = self.next();
        let (first, label_capacity) = (self.spec.shard.first as i64, self.sizes[draft].capacities.labels as usize);
        self.drafts[draft].sample_limit = self.drawn_sample_limit();
        let list = match chosen {
            Some(ids) => {
                let limit = (ids.len() + label_capacity).min(self.spec.shard.rows as usize);
                self.grow(limit)?;
                self.drafts[draft].sample_limit = self.drafts[draft].sample_limit.max(limit as u64);
                let classes: Vec<u32> = ids.iter().map(|&id| (id - first) as u32).collect();
                let list = self.staging.borrow_mut().upload_classes(self.streams.of(StreamRole::Draw), &classes)?;
                Some((list.cast(), classes.len() as u32))
            }
            None => None,
        };
        let arrays = self.memory.arrays[draft];
        let whole = chosen.is_none() && arrays.whole_shard != 0;
        self.sort_labels(draft, (!whole).into());
        if whole {
            run!(self, Draw, list_whole, (arrays,));
            return Ok(());
        }
        if let Some((classes, count)) = list {
            run!(self, Draw, mark_chosen, (arrays, classes, count));
        } else {
            run!(self, Draw, mark_below, (arrays,));
            run!(self, Draw, pick_threshold, (arrays,));
        }
        run!(self, Draw, count_sample, (arrays,));
        run!(self, Draw, list_sample, (arrays,));
        Ok(())
    }

    /// The number of rows of dW that the ranks add up, the same on all, whatever samples they were given. Only a rank whose caller
    /// chose more classes than any draw has reads the other ranks' limits from the sums, and waits for them.
    ///
    /// It is the least of the limits. Where all ranks have the same sample it fits; else the step has failed, and the rows do not
    /// matter. A rank that does not read the limits has that of a draw, and no rank has less.
    pub(super) fn common_sample_limit(&self) -> Result<u64> {
        let (own, drawn) = (self.drafts[self.current].sample_limit, self.drawn_sample_limit());
        if self.spec.ranks == 1 || own <= drawn {
            return Ok(own);
        }
        let count = REPLICATED_TOTALS + REPLICATED_SLOT * self.spec.ranks as usize;
        let sums: Vec<f64> = staging::fetch(&self.gpu.stream, self.arrays().replicated_sums, count)?;
        let limits = sums[REPLICATED_TOTALS..].chunks_exact(REPLICATED_SLOT).map(|slot| slot[3] as u64);
        Ok(limits.fold(own, u64::min).max(drawn))
    }
}
