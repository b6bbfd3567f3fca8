//! One head on a GPU: the phases of a step as launches.
//!
//! Everything is enqueued; the host learns what became of it where the caller asks for it (a host loss, a gradient in host memory,
//! figures, `wait`). What a step really is (rows, classes, its verdict) lives in its [`StepBlock`] on the device, and every kernel
//! reads it there. Labels and the draw run on a stream of their own, so that a step prepared early is drawn beside the step before;
//! all else runs on the caller's stream.

use std::cell::RefCell;
use std::mem::size_of;
use std::sync::Arc;

use super::driver::{DeviceBuffer, Event, Grid, PinnedBuffer, Place, Priority, Stream};
use super::nearest::Rows;
use super::products::LARGEST_WIDTH;
use super::sizes::{Arrays, Sizes};
use super::staging::{self, Staging};
use super::view::{fault, HeadView, Ledger, MatrixView, StepBlock};
use super::Cuda;
use crate::comm::remote;
use crate::device::{Exchange, HeadDevice, HeadSpec, Labels, Nearest, StateTensor, StepFigures};
use crate::matrix::{DType, Matrix};
use crate::optimizer::Optimizer;
use crate::options::{Placement, RowUpdate};
use crate::protocol::{self, HEADER, REPLICATED_SLOT, REPLICATED_TOTALS, TOTALS};
use crate::{ensure, error, Error, Result};

/// Threads of a CTA of the row-wise kernels.
const BLOCK: u32 = 256;
/// Threads of the kernels that one CTA runs alone.
const ALONE: u32 = 1024;
/// Dynamic shared memory: of a sum or a scan over a CTA's warps and a flag; of the sort's digits, by CTA and by warp; of the draw's bins.
const PARTS: u32 = 272;
const BINS: u32 = 1024;
const WARP_BINS: u32 = BINS * (BLOCK / 32);
const HISTOGRAM: u32 = 8192;
/// Copies of labels under way before the host waits for the oldest.
const LABEL_SLOTS: usize = 4;

/// Launches a kernel on the caller's stream (main) or the draw's (side); an error is kept until one can be returned.
macro_rules! run {
    ($head:expr, main, $kernel:ident $([$shared:expr])?, $grid:expr, $block:expr, $arguments:expr) => {
        run!($head, $head.cuda.stream, $kernel $([$shared])?, $grid, $block, $arguments)
    };
    ($head:expr, side, $kernel:ident $([$shared:expr])?, $grid:expr, $block:expr, $arguments:expr) => {
        run!($head, $head.side, $kernel $([$shared])?, $grid, $block, $arguments)
    };
    ($head:expr, $stream:expr, $kernel:ident $([$shared:expr])?, $grid:expr, $block:expr, $arguments:expr) => {{
        let grid = Grid { $(shared: $shared,)? ..Grid::of($grid, $block) };
        // SAFETY: the head's own arrays, as large as its view says, and what the callers of its phases answer for.
        let launched = unsafe { $head.cuda.kernels.$kernel.launch(&$stream, grid, $arguments) };
        $head.keep(launched);
    }};
}

pub(super) struct CudaHead {
    cuda: Arc<Cuda>,
    spec: HeadSpec,
    sizes: Sizes,
    /// The views are the current step's and the next one's, as `current` says.
    arrays: Arrays,
    /// By view: this rank's labels on the device.
    labels_in: [DeviceBuffer<i64>; 2],
    current: usize,
    /// The next step has its labels.
    drafted: bool,
    side: Stream,
    /// By view: its draw is done; nothing enqueued uses its draft any more.
    drawn: [Event; 2],
    released: [Event; 2],
    /// By view: this rank's rows, its labels where the host has them, and what it came to A with.
    batches: [usize; 2],
    labels: [Option<Vec<i64>>; 2],
    own_failure: [Option<Error>; 2],
    label_slots: Vec<(PinnedBuffer<i64>, Event)>,
    next_slot: usize,
    staging: RefCell<Staging>,
    verdict: PinnedBuffer<StepBlock>,
    /// What the last step that was waited for turned out to be.
    block: StepBlock,
    at_labels: bool,
    /// A launch or copy that failed where no error can be returned.
    failure: Option<Error>,
    updates: u64,
}

impl CudaHead {
    pub fn new(cuda: Arc<Cuda>, spec: HeadSpec) -> Result<CudaHead> {
        ensure!(
            spec.options.embedding_dim <= LARGEST_WIDTH,
            Unsupported,
            "embedding_dim is {}; the CUDA device takes 1 to {LARGEST_WIDTH}",
            spec.options.embedding_dim
        );
        let sizes = Sizes::new(&spec, cuda.gpu()?, 0)?;
        let arrays = sizes.allocate(&cuda.stream)?;
        let events = || -> Result<[Event; 2]> { Ok([Event::new(&cuda.context)?, Event::new(&cuda.context)?]) };
        let max_batch = spec.options.max_batch as usize;
        let mut label_slots = Vec::new();
        for _ in 0..LABEL_SLOTS {
            label_slots.push((PinnedBuffer::zeroed(&cuda.context, max_batch, "labels on their way")?, Event::new(&cuda.context)?));
        }
        let room = || DeviceBuffer::zeroed(&cuda.stream, max_batch, "labels");
        let mut head = CudaHead {
            labels_in: [room()?, room()?],
            side: Stream::new(&cuda.context, Priority::Least)?,
            drawn: events()?,
            released: events()?,
            verdict: PinnedBuffer::zeroed(&cuda.context, 1, "the verdict")?,
            staging: RefCell::new(Staging::new()),
            label_slots,
            next_slot: 0,
            current: 0,
            drafted: false,
            batches: [0; 2],
            labels: [None, None],
            own_failure: [None, None],
            block: StepBlock::zeroed(),
            at_labels: false,
            failure: None,
            updates: 0,
            arrays,
            sizes,
            spec,
            cuda,
        };
        let std = head.spec.options.init_std;
        run!(head, main, start_values, head.cuda.grid(8), BLOCK, (head.arrays.views[0], std));
        head.settled()?;
        // The side stream reads what was cleared on the main one.
        head.cuda.stream.synchronize()?;
        log::info!(
            "rank {} of {}: {} class centres of dimension {} from {} on {}, {} MiB, chunks of {} columns of {}",
            head.spec.rank,
            head.spec.ranks,
            head.spec.shard.rows,
            head.spec.options.embedding_dim,
            head.spec.shard.first,
            head.cuda.info.to_string_lossy(),
            head.sizes.memory().total() >> 20,
            head.sizes.chunk_capacity,
            head.sizes.sample_capacity,
        );
        Ok(head)
    }

    fn sharded(&self) -> bool {
        self.spec.options.placement == Placement::Sharded
    }

    fn dim(&self) -> usize {
        self.spec.options.embedding_dim as usize
    }

    fn dense(&self) -> bool {
        self.spec.options.row_update == RowUpdate::Dense
    }

    /// Whether GEMM3 updates the rows by itself; otherwise it writes their gradient, and another kernel updates them.
    fn fused(&self) -> bool {
        self.sharded() && !self.dense() && matches!(self.spec.options.optimizer, Optimizer::Sgd(_))
    }

    fn view(&self) -> HeadView {
        self.arrays.views[self.current]
    }

    fn next(&self) -> usize {
        1 - self.current
    }

    fn keep<T>(&mut self, outcome: Result<T>) -> Option<T> {
        match outcome {
            Ok(value) => Some(value),
            Err(error) => {
                self.failure.get_or_insert(error);
                None
            }
        }
    }

    /// The failure kept, if there is one.
    fn settled(&mut self) -> Result<()> {
        self.failure.clone().map_or(Ok(()), Err)
    }

    fn chunks(&self) -> impl Iterator<Item = u32> {
        (0..self.sizes.sample_capacity as u32).step_by(self.sizes.chunk_capacity as usize)
    }

    /// W^ and P of a chunk.
    fn numerators(&mut self, first: u32) {
        let view = self.view();
        run!(self, main, gather_centers, self.cuda.grid(8), BLOCK, (view, first));
        let launched = self.cuda.products.numerators(&self.cuda.stream, view, first);
        self.keep(launched);
    }

    /// dW of a chunk: into the rows, or into `center_gradient`.
    fn centers(&mut self, first: u32, loss_weight: f64, fuse: i32) {
        let launched = self.cuda.products.centers(&self.cuda.stream, self.view(), first, loss_weight, fuse);
        self.keep(launched);
    }

    fn finish_update(&mut self) {
        let view = self.view();
        run!(self, main, sum_squares[PARTS], 1, BLOCK, (view, 1i32));
        if self.dense() {
            run!(self, main, advance_history, self.cuda.grid(1), BLOCK, (view,));
        }
        run!(self, main, end_update, 1, 32, (view,));
        self.updates += 1;
        let half = self.sizes.history_capacity / 2;
        if self.dense() && self.updates.is_multiple_of(half) {
            // No row's gap outgrows the ring: what this leaves is at most half as old.
            let before = self.updates - half / 2;
            run!(self, main, catch_up_rows, self.cuda.grid(8), BLOCK, (view, before));
        }
    }

    fn exchange<T>(&self, send: *mut T, recv: *mut T, count: usize, dtype: DType, side: bool) -> Exchange {
        let stream = if side { &self.side } else { &self.cuda.stream };
        Exchange {
            send: send.cast_const().cast(),
            recv: recv.cast(),
            count,
            dtype,
            stream: stream.raw(),
            memory: Some(self.cuda.clone()),
        }
    }

    /// What a block says went wrong.
    fn fault(&self, block: &StepBlock) -> Result<()> {
        let (rank, row) = (block.rank.max(0) as usize, block.row as usize);
        Err(match block.fault {
            fault::NONE => return Ok(()),
            fault::REMOTE | fault::SUMS => remote(rank, block.value),
            fault::PARTED => protocol::parted(block.detail, rank),
            fault::LABEL => protocol::bad_label(block.value, row, rank, self.spec.options.num_classes),
            fault::EMBEDDING => protocol::bad_embedding(row, rank),
            fault::SUM => protocol::bad_sum(row, rank),
            fault::FORWARD => match protocol::judge_errors(block.value as f32, self.spec.rank as usize) {
                Err(error) => error,
                Ok(()) => error!(Device, "the device reports a failed forward, and no rank that failed"),
            },
            fault::SAMPLES => protocol::samples_differ(rank),
            other => error!(Device, "the device reports a fault of kind {other}"),
        })
    }

    fn read_block(&mut self) -> Result<()> {
        let block = self.view().block;
        // SAFETY: a block on the device; the verdict lives as long as the head and is read after the wait.
        unsafe { self.cuda.stream.download(self.verdict.as_raw().cast(), block.cast(), size_of::<StepBlock>()) }?;
        self.cuda.stream.synchronize()?;
        self.block = self.verdict[0];
        Ok(())
    }

    /// Makes room for a caller's sample beyond every draw.
    fn grow(&mut self, classes: usize) -> Result<()> {
        if classes as u64 <= self.sizes.sample_most {
            return Ok(());
        }
        self.side.synchronize()?;
        self.cuda.stream.synchronize()?;
        let sizes = Sizes::new(&self.spec, self.cuda.gpu()?, classes as u64)?;
        sizes.grow(&mut self.arrays, &self.cuda.stream)?;
        self.sizes = sizes;
        // The draw goes on on the other stream.
        self.cuda.stream.synchronize()
    }

    fn upload_labels(&mut self, draft: usize, labels: &Labels) -> Result<*mut i64> {
        let target = self.labels_in[draft].as_mut_ptr();
        if labels.count == 0 {
            return Ok(target);
        }
        let bytes = labels.count * size_of::<i64>();
        if self.cuda.context.place("labels", labels.data.cast())? == Place::Device {
            // In the order of the caller's stream, who may overwrite them there as soon as this returns.
            self.cuda.stream.wait(&self.drawn[draft])?;
            // SAFETY: the caller gave as many labels; the head's own have room for the largest batch.
            unsafe { self.cuda.stream.copy(target.cast(), labels.data.cast(), bytes) }?;
            self.released[draft].record(&self.cuda.stream)?;
            self.side.wait(&self.released[draft])?;
            return Ok(target);
        }
        // SAFETY: the caller of the head's entry gave this many labels, and they are in host memory.
        let given = unsafe { labels.as_slice() };
        let (slot, free) = &mut self.label_slots[self.next_slot];
        if !free.is_over()? {
            free.synchronize()?;
        }
        slot[..given.len()].copy_from_slice(given);
        // SAFETY: the slot is not written again before the event.
        unsafe { self.side.upload(target.cast(), slot.as_raw().cast(), bytes) }?;
        free.record(&self.side)?;
        self.next_slot = (self.next_slot + 1) % LABEL_SLOTS;
        self.labels[draft] = Some(given.to_vec());
        Ok(target)
    }

    /// The draw: labels sorted, positives found, negatives drawn, targets placed.
    fn draw(&mut self, chosen: Option<&[i64]>) -> Result<()> {
        let draft = self.next();
        let (first, label_capacity) = (self.spec.shard.first as i64, self.sizes.label_capacity as usize);
        let list = match chosen {
            Some(ids) => {
                self.grow((ids.len() + label_capacity).min(self.spec.shard.rows as usize))?;
                let classes: Vec<u32> = ids.iter().map(|&id| (id - first) as u32).collect();
                Some((self.staging.borrow_mut().classes(&self.side, &classes)?.cast(), classes.len() as u32))
            }
            None => None,
        };
        let view = self.arrays.views[draft];
        let grid = self.cuda.grid(4);
        run!(self, side, spread_labels, grid, BLOCK, (view,));
        for (pass, shift) in [0u32, 8, 16, 24].into_iter().enumerate() {
            let from = pass as u32 % 2;
            run!(self, side, sort_labels_count[BINS], grid, BLOCK, (view, shift, from));
            run!(self, side, sort_labels_scan[PARTS], 1, ALONE, (view,));
            run!(self, side, sort_labels_scatter[WARP_BINS], grid, BLOCK, (view, shift, from));
        }
        run!(self, side, find_positives_count[PARTS], grid, BLOCK, (view,));
        run!(self, side, find_positives_scan[PARTS], 1, ALONE, (view,));
        run!(self, side, find_positives_scatter[PARTS], grid, BLOCK, (view,));
        if chosen.is_none() && view.whole != 0 {
            run!(self, side, list_whole, grid, BLOCK, (view,));
        } else {
            run!(self, side, mark_positives, grid, BLOCK, (view,));
            if let Some((classes, count)) = list {
                run!(self, side, mark_chosen, grid, BLOCK, (view, classes, count));
            } else {
                for level in 0..3u32 {
                    run!(self, side, key_histogram[HISTOGRAM], grid, BLOCK, (view, level));
                    run!(self, side, pick_threshold[PARTS], 1, ALONE, (view, level));
                }
                run!(self, side, mark_below, grid, BLOCK, (view,));
                run!(self, side, mark_ties_scan[PARTS], 1, ALONE, (view,));
                run!(self, side, mark_ties, grid, BLOCK, (view,));
            }
            run!(self, side, list_sample_count[PARTS], grid, BLOCK, (view,));
            run!(self, side, list_sample_scan[PARTS], 1, ALONE, (view,));
            run!(self, side, list_sample_scatter[PARTS], grid, BLOCK, (view,));
        }
        run!(self, side, place_targets, grid, BLOCK, (view,));
        self.drawn[draft].record(&self.side)
    }
}

impl HeadDevice for CudaHead {
    fn pack_labels(&mut self, step: protocol::Step, labels: Result<Labels>) -> Exchange {
        let draft = self.next();
        (self.drafted, self.batches[draft], self.own_failure[draft], self.labels[draft]) = (true, 0, None, None);
        let released = self.side.wait(&self.released[draft]);
        self.keep(released);
        let uploaded = labels.and_then(|labels| Ok((self.upload_labels(draft, &labels)?, labels.count)));
        let (source, batch, status) = match uploaded {
            Ok((source, count)) => {
                self.batches[draft] = count;
                (source, count as u64, 0i32)
            }
            Err(error) => {
                let status = error.status as i32;
                self.own_failure[draft] = Some(error);
                (std::ptr::null_mut(), 0u64, status)
            }
        };
        let view = self.arrays.views[draft];
        let (samples, updates) = (step.samples, step.updates);
        run!(self, side, pack_labels, self.cuda.grid(1), BLOCK, (view, samples, updates, status, batch, source.cast()));
        let count = HEADER + self.spec.options.max_batch as usize;
        self.exchange(view.labels_send, view.labels_recv, count, DType::I64, true)
    }

    fn judge_labels(&mut self) -> Result<()> {
        let view = self.arrays.views[self.next()];
        run!(self, side, judge_labels[PARTS], 1, ALONE, (view,));
        self.settled()
    }

    fn sample(&mut self, _step: u64, chosen: Option<&[i64]>) -> Result<()> {
        self.draw(chosen)?;
        self.settled()?;
        self.own_failure[self.next()].clone().map_or(Ok(()), Err)
    }

    fn sample_ids(&self) -> Result<Vec<i64>> {
        // In the order of whoever wrote the block last.
        let (view, stream) = match self.drafted {
            true => (self.arrays.views[self.next()], &self.side),
            false => (self.view(), &self.cuda.stream),
        };
        let block: StepBlock = staging::fetch(stream, view.block, 1)?[0];
        let classes: Vec<u32> = staging::fetch(stream, view.sample, block.classes as usize)?;
        Ok(classes.into_iter().map(|class| self.spec.shard.first as i64 + i64::from(class)).collect())
    }

    fn next_labels(&self) -> (usize, Option<&[i64]>) {
        let draft = self.next();
        let count = self.batches[draft];
        let known = self.labels[draft].as_deref().map(|labels| &labels[..count]);
        (count, if count == 0 { Some(&[]) } else { known })
    }

    fn begin(&mut self) -> Result<()> {
        if self.drafted {
            self.released[self.current].record(&self.cuda.stream)?;
            self.current = self.next();
            self.drafted = false;
        }
        self.cuda.stream.wait(&self.drawn[self.current])?;
        self.settled()
    }

    fn batch(&self) -> usize {
        self.batches[self.current]
    }

    fn pack_embeddings(&mut self, embeddings: Option<&Matrix>) -> Exchange {
        let source = match embeddings {
            Some(matrix) => {
                let staged = self.staging.borrow_mut().upload(&self.cuda.stream, "embeddings", matrix);
                self.keep(staged)
            }
            None => None,
        };
        let source = source.unwrap_or_else(MatrixView::zeroed);
        let (view, batch) = (self.view(), source.rows);
        run!(self, main, pack_embeddings, self.cuda.grid(4), BLOCK, (view, source, batch));
        let dtype = self.sizes.gather_dtype;
        let count = self.spec.options.max_batch as usize * self.dim();
        self.exchange(view.embeddings_send, view.embeddings_recv, count, dtype, false)
    }

    fn forward(&mut self, embeddings: &Matrix) -> Result<()> {
        let source = match self.sharded() {
            true => MatrixView::zeroed(),
            false => self.staging.borrow_mut().upload(&self.cuda.stream, "embeddings", embeddings)?,
        };
        let view = self.view();
        run!(self, main, normalize_embeddings, self.cuda.grid(4), BLOCK, (view, source));
        run!(self, main, judge_embeddings, 1, 32, (view,));
        run!(self, main, find_targets, self.cuda.grid(4), BLOCK, (view, source));
        for first in self.chunks() {
            self.numerators(first);
            let launched = self.cuda.products.weighted(&self.cuda.stream, view, first);
            self.keep(launched);
        }
        run!(self, main, reduce_rows, self.cuda.grid(4), BLOCK, (view,));
        self.settled()
    }

    fn pack_sums(&mut self, outcome: &Result<()>) -> Exchange {
        let status = outcome.as_ref().err().map_or(0i32, |error| error.status as i32);
        let view = self.view();
        run!(self, main, pack_sums[PARTS], 1, BLOCK, (view, status));
        match self.sharded() {
            true => {
                let count = 2 * self.sizes.label_capacity as usize + TOTALS;
                self.exchange(view.sums, view.sums, count, DType::F32, false)
            }
            false => {
                let count = REPLICATED_TOTALS + REPLICATED_SLOT * self.spec.ranks as usize;
                self.exchange(view.replicated_sums, view.replicated_sums, count, DType::F64, false)
            }
        }
    }

    fn judge_sums(&mut self, loss: Option<*mut f64>) -> Result<f64> {
        let (view, target) = (self.view(), loss.unwrap_or(std::ptr::null_mut()));
        run!(self, main, judge_sums[PARTS], 1, BLOCK, (view, target.cast()));
        self.settled()?;
        self.at_labels = false;
        if loss.is_some() {
            return Ok(f64::NAN);
        }
        self.read_block()?;
        if self.block.status != 0 {
            self.at_labels = matches!(self.block.fault, fault::REMOTE | fault::PARTED | fault::LABEL);
            // Told here and now, not once more by `wait`.
            self.forgive()?;
            self.fault(&self.block)?;
        }
        Ok(self.block.loss)
    }

    fn failed_at_labels(&self) -> bool {
        self.at_labels
    }

    fn wait(&mut self) -> Result<()> {
        self.settled()?;
        self.side.synchronize()?;
        let ledger_at = self.view().ledger;
        let ledger: Ledger = staging::fetch(&self.cuda.stream, ledger_at, 1)?[0];
        if ledger.failed == 0 {
            return Ok(());
        }
        self.forgive()?;
        let first = ledger.first_failure;
        let others = match ledger.failed {
            1 => String::new(),
            more => format!(", and {} steps after it", more - 1),
        };
        self.fault(&first).map_err(|error| Error::new(error.status, format!("step {}{others}: {}", first.samples, error.message)))
    }

    fn holds(&self, pointer: *const u8) -> bool {
        matches!(self.cuda.context.place("loss", pointer.cast()), Ok(Place::Device))
    }

    fn backward(&mut self) -> Exchange {
        let view = self.view();
        run!(self, main, scale_embeddings, self.cuda.grid(4), BLOCK, (view,));
        run!(self, main, embedding_gradient, self.cuda.grid(4), BLOCK, (view,));
        let count = self.spec.options.max_batch as usize * self.dim();
        self.exchange(view.gradient_send, view.gradient_recv, count, DType::F32, false)
    }

    fn finish_gradient(&mut self, factor: f64, gradient: Option<&Matrix>) -> Result<()> {
        let view = self.view();
        let target = match gradient {
            Some(matrix) => self.staging.borrow_mut().target(&self.cuda.stream, "grad_embeddings", matrix)?,
            None => MatrixView::zeroed(),
        };
        run!(self, main, finish_gradient, self.cuda.grid(4), BLOCK, (view, factor, target));
        run!(self, main, sum_squares[PARTS], 1, BLOCK, (view, 0i32));
        self.settled()?;
        match gradient {
            Some(matrix) => self.staging.borrow().download(&self.cuda.stream, &target, matrix),
            None => Ok(()),
        }
    }

    fn update(&mut self, learning_rate: f64, loss_weight: f64, beside: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        beside()?;
        let (view, fused) = (self.view(), self.fused());
        run!(self, main, begin_update, 1, 32, (view, learning_rate));
        for first in self.chunks() {
            if !self.sizes.keeps_probabilities() {
                self.numerators(first);
            }
            self.centers(first, loss_weight, i32::from(fused));
            if !fused {
                let count = self.sizes.chunk_capacity as u32;
                run!(self, main, update_rows, self.cuda.grid(4), BLOCK, (view, first, count));
            }
        }
        self.finish_update();
        self.settled()
    }

    fn center_gradient(&mut self, loss_weight: f64) -> Exchange {
        let (view, dim) = (self.view(), self.dim());
        // Ranks add up as many rows as a sample can have; those beyond this one are zeros.
        let bytes = size_of::<f32>() * self.sizes.sample_capacity as usize * dim;
        // SAFETY: the head's own array, of this size.
        let cleared = unsafe { self.cuda.stream.fill(view.center_gradient.cast(), 0, bytes) };
        self.keep(cleared);
        for first in self.chunks() {
            if !self.sizes.keeps_probabilities() {
                self.numerators(first);
            }
            self.centers(first, loss_weight, 0);
        }
        let count = self.sizes.sample_most as usize * dim;
        self.exchange(view.center_gradient, view.center_gradient, count, DType::F32, false)
    }

    fn apply_gradient(&mut self, learning_rate: f64) -> Result<()> {
        let (view, first, count) = (self.view(), 0u32, self.sizes.sample_capacity as u32);
        run!(self, main, begin_update, 1, 32, (view, learning_rate));
        run!(self, main, update_rows, self.cuda.grid(4), BLOCK, (view, first, count));
        self.finish_update();
        self.settled()
    }

    fn figures(&mut self) -> Result<StepFigures> {
        self.settled()?;
        self.read_block()?;
        let (view, block) = (self.view(), self.block);
        let rows = block.rows as usize;
        let stream = &self.cuda.stream;
        let ledger: Ledger = staging::fetch(stream, view.ledger, 1)?[0];
        Ok(StepFigures {
            updates: ledger.updates,
            rows: block.global_rows.into(),
            valid_rows: block.valid_rows,
            sample_size: block.classes.into(),
            loss: block.loss,
            target_cosines: block.target_cosines,
            best_negatives: staging::fetch(stream, view.best_negatives, rows)?,
            own_target_cosines: staging::fetch(stream, view.target_cosines, rows)?,
            grad_embeddings: block.grad_embeddings,
            grad_centers: block.grad_centers,
        })
    }

    fn read_rows(&self, tensor: StateTensor, first: u64, rows: &Matrix) -> Result<()> {
        self.check_state(tensor)?;
        // A piece at a time: a whole shard has no room beside itself.
        let piece = self.rows_a_piece();
        for start in (0..rows.rows).step_by(piece) {
            let part = part_of(rows, start, piece);
            let target = self.staging.borrow_mut().target(&self.cuda.stream, "rows", &part)?;
            let (view, tensor, first) = (self.view(), tensor as i32, (first as usize + start) as u32);
            let grid = Grid::of(self.cuda.grid(4), BLOCK);
            // SAFETY: the head's own arrays, and a target of as many rows.
            unsafe { self.cuda.kernels.read_rows.launch(&self.cuda.stream, grid, (view, tensor, first, target)) }?;
            self.staging.borrow().download(&self.cuda.stream, &target, &part)?;
        }
        Ok(())
    }

    fn write_rows(&mut self, tensor: StateTensor, first: u64, rows: &Matrix) -> Result<()> {
        self.check_state(tensor)?;
        if let Some(row) = staging::not_finite(&self.cuda.stream, "rows", rows)? {
            let class = self.spec.shard.first + first + row as u64;
            return Err(error!(InvalidArgument, "row {row} (class {class}) holds a NaN or an infinity"));
        }
        let piece = self.rows_a_piece();
        for start in (0..rows.rows).step_by(piece) {
            let part = part_of(rows, start, piece);
            let source = self.staging.borrow_mut().upload(&self.cuda.stream, "rows", &part)?;
            let (view, tensor, first) = (self.view(), tensor as i32, (first as usize + start) as u32);
            run!(self, main, write_rows, self.cuda.grid(4), BLOCK, (view, tensor, first, source));
        }
        self.settled()?;
        self.cuda.stream.synchronize()
    }

    fn nearest(&self, queries: &[f32], k: usize) -> Result<Nearest> {
        let read = |first: usize, rows: &Matrix| self.read_rows(StateTensor::Centers, first as u64, rows);
        Rows { cuda: &self.cuda, view: self.view(), read: &read }.nearest(queries, k)
    }
}

impl CudaHead {
    /// Counts the failed steps from 0 again.
    fn forgive(&self) -> Result<()> {
        let failed = self.view().ledger.cast::<u8>().wrapping_add(std::mem::offset_of!(Ledger, failed));
        // SAFETY: the head's own ledger.
        unsafe { self.cuda.stream.fill(failed.cast(), 0, size_of::<u64>()) }
    }

    fn check_state(&self, tensor: StateTensor) -> Result<()> {
        ensure!(
            tensor != StateTensor::SecondMoment || self.spec.options.optimizer.state_tensors() > 1,
            InvalidArgument,
            "tensor is the second moment, which this head's optimizer has not"
        );
        Ok(())
    }

    /// Rows that 16 MiB hold.
    fn rows_a_piece(&self) -> usize {
        ((16 << 20) / (4 * self.dim())).max(1)
    }
}

impl Drop for CudaHead {
    /// What is enqueued uses the buffers until it is done.
    fn drop(&mut self) {
        if self.cuda.process != std::process::id() {
            return;
        }
        let done = self.side.synchronize().and(self.cuda.stream.synchronize());
        if let Err(error) = done {
            log::warn!("rank {}: a head was freed with work that failed: {error}", self.spec.rank);
        }
    }
}

fn part_of(rows: &Matrix, start: usize, piece: usize) -> Matrix {
    let offset = start * rows.row_stride * rows.dtype.size();
    Matrix { data: rows.data.wrapping_add(offset), rows: piece.min(rows.rows - start), ..*rows }
}
