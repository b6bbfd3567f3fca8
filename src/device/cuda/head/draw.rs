//! The next step's labels and its draw.

use std::mem::size_of;
use std::sync::Arc;

use super::super::driver::{Context, DeviceBuffer, Event, Grid, PinnedBuffer, Place, Stream};
use super::super::kernels::{ALONE, BLOCK, HISTOGRAM, PARTS};
use super::super::lanes::Lane;
use super::super::sizes::Sizes;
use super::{run, CudaHead};
use crate::device::{sample_capacity, Labels};
use crate::exchange::Exchange;
use crate::matrix::DType;
use crate::protocol::{Counters, HEADER};
use crate::{Contribution, Error, Result};

/// Dynamic shared memory of the sort's digits, by block and by warp.
const DIGITS: u32 = 1024;
const WARP_DIGITS: u32 = DIGITS * (BLOCK / 32);
/// Copies of labels under way before the host waits for the oldest.
const LABEL_SLOTS: usize = 4;

/// What the host knows of a step's labels and draw.
pub(super) struct Draft {
    /// This rank's labels on the device.
    labels_in: DeviceBuffer<i64>,
    /// It is drawn; nothing enqueued uses it any more.
    pub drawn: Event,
    pub released: Event,
    /// The number of its sample: the same on all ranks.
    pub step: u64,
    /// How many classes it has at most, and there is room for: the same on all ranks that were given none, or as many.
    pub most: u64,
    /// This rank's rows, its labels where the host has them, and what it came to A with.
    pub batch: usize,
    pub labels: Option<Vec<i64>>,
    pub own_failure: Option<Error>,
    /// Its first chunk of class centres is gathered, or will be before anything that is enqueued from here on.
    pub gathered: bool,
}

impl Draft {
    pub fn new(context: &Arc<Context>, stream: &Stream, max_batch: usize) -> Result<Draft> {
        Ok(Draft {
            labels_in: DeviceBuffer::zeroed(stream, max_batch, "labels")?,
            drawn: Event::new(context)?,
            released: Event::new(context)?,
            step: 0,
            most: 0,
            batch: 0,
            labels: None,
            own_failure: None,
            gathered: false,
        })
    }
}

/// Labels on their way from the host.
pub(super) struct LabelSlots {
    slots: Vec<(PinnedBuffer<i64>, Event)>,
    next: usize,
}

impl LabelSlots {
    pub fn new(context: &Arc<Context>, max_batch: usize) -> Result<LabelSlots> {
        let slot = || Ok((PinnedBuffer::zeroed(context, max_batch, "labels on their way")?, Event::new(context)?));
        Ok(LabelSlots { slots: (0..LABEL_SLOTS).map(|_| slot()).collect::<Result<_>>()?, next: 0 })
    }

    /// # Safety
    /// There is room for as many labels at `target` on the device until the stream has done it.
    unsafe fn upload(&mut self, stream: &Stream, target: *mut i64, labels: &[i64]) -> Result<()> {
        let (slot, free) = &mut self.slots[self.next];
        if !free.is_over()? {
            free.synchronize()?;
        }
        slot[..labels.len()].copy_from_slice(labels);
        // The slot is not written again before the event.
        stream.upload(target.cast(), slot.as_raw().cast(), size_of_val(labels))?;
        self.next = (self.next + 1) % LABEL_SLOTS;
        free.record(stream)
    }
}

impl CudaHead {
    /// Phase 1: this rank's block of A, of its labels or of its failure.
    pub(super) fn draft_labels(&mut self, counters: Counters, labels: Contribution<Labels>) -> Exchange {
        let next = self.next();
        if self.drafts[next].gathered {
            // A draft that no forward took: its gather may not be over.
            self.join(Lane::Draw, Lane::Centers);
        }
        let released = self.lanes.of(Lane::Draw).wait(&self.drafts[next].released);
        self.keep(released);
        self.drafted = true;
        let draft = &mut self.drafts[next];
        (draft.step, draft.batch, draft.labels, draft.own_failure, draft.gathered) = (counters.draws, 0, None, None, false);
        let uploaded = labels.and_then(|labels| Ok((self.upload_labels(next, &labels)?, labels.count)));
        let (source, batch, status) = match uploaded {
            Ok((source, count)) => {
                self.drafts[next].batch = count;
                (source, count as u64, 0i32)
            }
            Err(error) => {
                let status = error.status as i32;
                self.drafts[next].own_failure = Some(error);
                (std::ptr::null_mut(), 0u64, status)
            }
        };
        let view = self.arrays.views[next];
        let (samples, updates) = (counters.draws, counters.updates);
        run!(self, Draw, pack_labels, self.cuda.grid(1), BLOCK, (view, samples, updates, status, batch, source.cast()));
        let count = HEADER + self.spec.options.max_batch as usize;
        self.exchange("all_gather labels", Lane::Draw, (view.labels_send, view.labels_recv), count, DType::I64)
    }

    fn upload_labels(&mut self, next: usize, labels: &Labels) -> Result<*mut i64> {
        let target = self.drafts[next].labels_in.as_mut_ptr();
        if labels.count == 0 {
            return Ok(target);
        }
        let (draft, draw) = (&mut self.drafts[next], self.lanes.of(Lane::Draw));
        if self.cuda.context.place("labels", labels.data.cast())? == Place::Device {
            // In the order of the caller's stream, who may overwrite them there as soon as this returns.
            self.cuda.stream.wait(&draft.drawn)?;
            // SAFETY: the caller gave as many labels; the head's own have room for the largest batch.
            unsafe { self.cuda.stream.copy(target.cast(), labels.data.cast(), labels.count * size_of::<i64>()) }?;
            draft.released.record(&self.cuda.stream)?;
            draw.wait(&draft.released)?;
            return Ok(target);
        }
        // SAFETY: the caller of the head's entry gave this many labels, and they are in host memory.
        let given = unsafe { labels.as_slice() };
        // SAFETY: as above.
        unsafe { self.label_slots.upload(draw, target, given) }?;
        draft.labels = Some(given.to_vec());
        Ok(target)
    }

    /// Classes that no drawn sample has more of, on any rank.
    pub(super) fn usual_sample(&self) -> u64 {
        sample_capacity(&self.spec.options, self.spec.ranks, self.spec.shard)
    }

    /// Makes room for a caller's sample beyond every draw. The step under way keeps what it has until it is over.
    fn grow(&mut self, classes: usize) -> Result<()> {
        let next = self.next();
        if classes as u64 <= self.sizes[next].sample_most {
            return Ok(());
        }
        self.lanes.synchronize()?;
        let (held, mut gpu) = (self.sizes[next].memory(), self.cuda.gpu()?);
        // Sizes are chosen as for a head that is not there yet.
        gpu.free_memory = gpu.free_memory.saturating_add(held.weight).saturating_add(held.state);
        let sizes = Sizes::new(&self.spec, gpu, classes as u64)?;
        let (views, outgrown) = sizes.grow(&mut self.arrays, &self.cuda.stream)?;
        self.sizes[next] = sizes;
        self.arrays.views[next] = views[next];
        let mut before = self.outgrown.take().map_or_else(Vec::new, |(_, before)| before);
        before.extend(outgrown);
        self.outgrown = Some((views[self.current], before));
        // The other lanes go on with what is cleared on this one.
        self.cuda.stream.synchronize()
    }

    /// The draw: labels sorted, positives found, negatives drawn, targets placed.
    pub(super) fn draw(&mut self, chosen: Option<&[i64]>) -> Result<()> {
        let draft = self.next();
        let (first, label_capacity) = (self.spec.shard.first as i64, self.sizes[draft].label_capacity as usize);
        self.drafts[draft].most = self.usual_sample();
        let list = match chosen {
            Some(ids) => {
                let most = (ids.len() + label_capacity).min(self.spec.shard.rows as usize);
                self.grow(most)?;
                self.drafts[draft].most = self.drafts[draft].most.max(most as u64);
                let classes: Vec<u32> = ids.iter().map(|&id| (id - first) as u32).collect();
                Some((self.staging.borrow_mut().classes(self.lanes.of(Lane::Draw), &classes)?.cast(), classes.len() as u32))
            }
            None => None,
        };
        let view = self.arrays.views[draft];
        let grid = self.cuda.grid(4);
        run!(self, Draw, spread_labels, grid, BLOCK, (view,));
        for (pass, shift) in [0u32, 8, 16, 24].into_iter().enumerate() {
            let from = pass as u32 % 2;
            run!(self, Draw, sort_labels_count[DIGITS], grid, BLOCK, (view, shift, from));
            run!(self, Draw, sort_labels_scan[PARTS], 1, ALONE, (view,));
            run!(self, Draw, sort_labels_scatter[WARP_DIGITS], grid, BLOCK, (view, shift, from));
        }
        run!(self, Draw, find_positives_count[PARTS], grid, BLOCK, (view,));
        run!(self, Draw, find_positives_scan[PARTS], 1, ALONE, (view,));
        run!(self, Draw, find_positives_scatter[PARTS], grid, BLOCK, (view,));
        if chosen.is_none() && view.whole_shard != 0 {
            run!(self, Draw, list_whole, grid, BLOCK, (view,));
        } else {
            run!(self, Draw, mark_positives, grid, BLOCK, (view,));
            if let Some((classes, count)) = list {
                run!(self, Draw, mark_chosen, grid, BLOCK, (view, classes, count));
            } else {
                for level in 0..3u32 {
                    run!(self, Draw, key_histogram[HISTOGRAM], grid, BLOCK, (view, level));
                    run!(self, Draw, pick_threshold[PARTS], 1, ALONE, (view, level));
                }
                run!(self, Draw, mark_below, grid, BLOCK, (view,));
                run!(self, Draw, mark_ties_scan[PARTS], 1, ALONE, (view,));
                run!(self, Draw, mark_ties, grid, BLOCK, (view,));
            }
            run!(self, Draw, list_sample_count[PARTS], grid, BLOCK, (view,));
            run!(self, Draw, list_sample_scan[PARTS], 1, ALONE, (view,));
            run!(self, Draw, list_sample_scatter[PARTS], grid, BLOCK, (view,));
        }
        run!(self, Draw, find_target_columns, grid, BLOCK, (view,));
        Ok(())
    }
}
