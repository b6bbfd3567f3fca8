//! One head on a GPU: the phases of a step as launches.
//!
//! Everything is enqueued; the host learns what became of it where the caller asks for it (a host loss, a gradient in host memory,
//! figures, `wait`). What a step really is (rows, classes, its verdict) lives in its [`StepBlock`] on the device, and every kernel
//! reads it there. lanes.rs says which stream runs what.

mod draw;
mod rows;
mod verdict;

use std::cell::RefCell;
use std::mem::size_of;
use std::sync::Arc;

use self::draw::{Draft, LabelSlots};
use super::driver::{DeviceBuffer, Event, Grid, PinnedBuffer, Place, Stream};
use super::kernels::{ALONE, BLOCK, PARTS};
use super::lanes::{Lane, Lanes};
use super::nearest::Rows;
use super::products::{Products, LARGEST_DIM};
use super::shared_structs::{fault, HeadArrays, Ledger, MatrixView, StepBlock};
use super::sizes::{Arrays, Sizes};
use super::staging::{self, Staging};
use super::Cuda;
use crate::device::{HeadDevice, HeadSpec, Labels, Nearest, StepFigures};
use crate::exchange::Exchange;
use crate::matrix::{DType, Matrix};
use crate::optimizer::StateTensor;
use crate::options::{Placement, RowUpdate};
use crate::protocol::{Counters, LossPlace, REPLICATED_SLOT, REPLICATED_TOTALS, TOTALS};
use crate::{ensure, trace, Contribution, Error, Result};

/// Launches a kernel on a lane, as a span of the trace; an error is kept until one can be returned. After one nothing is launched any
/// more: kernels count on what those before them have left.
macro_rules! run {
    ($head:expr, $lane:ident, $kernel:ident $([$shared:expr])?, $grid:expr, $block:expr, $arguments:expr) => {{
        let grid = Grid { $(shared: $shared,)? ..Grid::of($grid, $block) };
        let arguments = $arguments;
        // SAFETY: the head's own arrays, as large as its view says, and what the callers of its phases answer for.
        $head.traced(Lane::$lane, stringify!($kernel), |cuda, stream| unsafe {
            cuda.kernels.$kernel.launch(stream, grid, arguments)
        });
    }};
}
use run;

/// Multiprocessors that GEMM2 and GEMM3 leave to the collectives beside them.
const SPARED_BY_WEIGHTED: u32 = 4;
const SPARED_BY_CENTERS: u32 = 8;

pub(super) struct CudaHead {
    cuda: Arc<Cuda>,
    spec: HeadSpec,
    /// By view: they differ from when a caller's sample outgrows them until the step before it is over.
    sizes: [Sizes; 2],
    lanes: Lanes,
    /// The views, and with them the drafts, are the current step's and the next one's, as `current` says.
    arrays: Arrays,
    /// What the step under way has and the next one has outgrown; and the view that its successors take.
    outgrown: Option<(HeadArrays, Vec<DeviceBuffer<u8>>)>,
    drafts: [Draft; 2],
    current: usize,
    /// The next step has its labels.
    drafted: bool,
    /// A step has begun and has not been updated: what it gathered is needed.
    under_way: bool,
    /// The chunk whose P @ W^ is left to run beside the all-reduce.
    put_off: Option<u32>,
    exchanging: Option<(Lane, Option<Event>, trace::Scope, &'static str)>,
    /// The first failure of this rank's own since `wait`, and its step: told where it came up, but the device has counted it.
    told: Option<(u64, Error)>,
    label_slots: LabelSlots,
    staging: RefCell<Staging>,
    verdict: PinnedBuffer<StepBlock>,
    /// What the last step that was waited for turned out to be.
    block: StepBlock,
    at_labels: bool,
    parted: bool,
    /// Why the embeddings could not be brought to the device.
    unpacked: Option<Error>,
    /// A launch or copy that failed where no error can be returned.
    failure: Option<Error>,
    updates: u64,
}

impl CudaHead {
    pub fn new(cuda: Arc<Cuda>, spec: HeadSpec) -> Result<CudaHead> {
        ensure!(
            spec.options.embedding_dim <= LARGEST_DIM,
            Unsupported,
            "embedding_dim must be 1 to {LARGEST_DIM} on the CUDA device, got {}",
            spec.options.embedding_dim
        );
        let sizes = Sizes::new(&spec, cuda.gpu()?, 0)?;
        let arrays = sizes.allocate(&cuda.stream)?;
        let max_batch = spec.options.max_batch as usize;
        let draft = || Draft::new(&cuda.context, &cuda.stream, max_batch);
        let mut head = CudaHead {
            drafts: [draft()?, draft()?],
            lanes: Lanes::new(&cuda.context, &cuda.stream, spec.ranks)?,
            verdict: PinnedBuffer::zeroed(&cuda.context, 1, "the verdict")?,
            staging: RefCell::new(Staging::new()),
            label_slots: LabelSlots::new(&cuda.context, max_batch)?,
            current: 0,
            drafted: false,
            under_way: false,
            put_off: None,
            exchanging: None,
            told: None,
            outgrown: None,
            unpacked: None,
            parted: false,
            block: StepBlock::zeroed(),
            at_labels: false,
            failure: None,
            updates: 0,
            arrays,
            sizes: [sizes.clone(), sizes],
            spec,
            cuda,
        };
        let std = head.spec.options.init_std;
        run!(head, Main, start_values, head.cuda.grid(8), BLOCK, (head.arrays.views[0], std));
        head.settled()?;
        // The other lanes read what was cleared on this one.
        head.cuda.stream.synchronize()?;
        log::info!(
            "rank {} of {}: {} class centers of dimension {} from {} on {}, {} MiB, chunks of {} columns of {}",
            head.spec.rank,
            head.spec.ranks,
            head.spec.shard.rows,
            head.spec.options.embedding_dim,
            head.spec.shard.first,
            head.cuda.info.to_string_lossy(),
            head.sizes[0].memory().total() >> 20,
            head.sizes[0].chunk_capacity,
            head.sizes[0].sample_capacity,
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
        self.sharded() && !self.dense()
    }

    fn view(&self) -> HeadArrays {
        self.arrays.views[self.current]
    }

    fn sizes(&self) -> &Sizes {
        &self.sizes[self.current]
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
        (0..self.sizes().sample_capacity as u32).step_by(self.sizes().chunk_capacity as usize)
    }

    /// As `run!` for anything that enqueues on a lane.
    fn traced(&mut self, lane: Lane, name: &'static str, launch: impl FnOnce(&Cuda, &Stream) -> Result<()>) {
        let draft = if lane == Lane::Draw { self.next() } else { self.current };
        self.traced_for(draft, lane, name, launch);
    }

    /// What it runs is a span of this draft's step.
    fn traced_for(&mut self, draft: usize, lane: Lane, name: &'static str, launch: impl FnOnce(&Cuda, &Stream) -> Result<()>) {
        if self.failure.is_none() {
            let begun = self.lanes.begin(lane);
            let launched = launch(&self.cuda, self.lanes.of(lane));
            self.lanes.end(lane, begun, self.scope(draft), name);
            self.keep(launched);
        }
    }

    fn product(&mut self, lane: Lane, name: &'static str, launch: impl FnOnce(&Products, &Stream) -> Result<()>) {
        self.traced(lane, name, |cuda, stream| launch(&cuda.products, stream));
    }

    /// Whose spans a draft's are.
    fn scope(&self, draft: usize) -> trace::Scope {
        trace::Scope { rank: self.spec.rank, ranks: self.spec.ranks, step: self.drafts[draft].step }
    }

    fn join(&mut self, later: Lane, earlier: Lane) {
        let joined = self.lanes.join(later, earlier);
        self.keep(joined);
    }

    /// W^ of a chunk of a step.
    fn gather(&mut self, lane: Lane, step: usize, first: u32) {
        let view = self.arrays.views[step];
        let grid = Grid::of(self.cuda.grid(8), BLOCK);
        // SAFETY: the head's own arrays, as large as its view says.
        self.traced_for(step, lane, "gather_centers", |cuda, stream| unsafe {
            cuda.kernels.gather_centers.launch(stream, grid, (view, first))
        });
    }

    /// Gathers the next step's first chunk early, if it is drawn and nothing needs the one before.
    fn gather_ahead(&mut self) {
        let next = self.next();
        if self.under_way || !self.drafted || self.drafts[next].gathered || self.failure.is_some() {
            return;
        }
        let waited = self.lanes.of(Lane::Centers).wait(&self.drafts[next].drawn);
        self.keep(waited);
        self.gather(Lane::Centers, next, 0);
        self.drafts[next].gathered = true;
    }

    /// W^ and P of a chunk of the current step.
    fn numerators(&mut self, lane: Lane, first: u32) {
        let view = self.view();
        if !(first == 0 && std::mem::take(&mut self.drafts[self.current].gathered)) {
            self.gather(lane, self.current, first);
        }
        self.product(lane, "gemm_numerators", |products, stream| products.numerators(stream, view, first));
    }

    /// P @ W^ of a chunk.
    fn weighted(&mut self, first: u32) {
        let (view, spared) = (self.view(), self.spared(SPARED_BY_WEIGHTED));
        self.product(Lane::Main, "gemm_weighted_centers", |products, stream| {
            products.weighted_centers(stream, view, first, spared)
        });
    }

    /// What dW needs of the embeddings.
    fn begin_centers(&mut self) -> HeadArrays {
        self.join(Lane::Centers, Lane::Main);
        let view = self.view();
        run!(self, Centers, scale_embeddings, self.cuda.grid(4), BLOCK, (view,));
        view
    }

    /// dW of a chunk into the rows, or dW^ into `center_gradient`.
    fn centers(&mut self, first: u32, loss_weight: f64, fuse: i32) {
        let (view, spared) = (self.view(), self.spared(SPARED_BY_CENTERS));
        self.product(Lane::Centers, "gemm_center_gradient", |products, stream| {
            products.center_gradient(stream, view, first, loss_weight, fuse, spared)
        });
    }

    /// Nothing runs beside the products of a rank that is alone.
    fn spared(&self, multiprocessors: u32) -> u32 {
        if self.spec.ranks == 1 {
            0
        } else {
            multiprocessors
        }
    }

    fn finish_update(&mut self) {
        let view = self.view();
        run!(self, Centers, sum_squares[PARTS], 1, ALONE, (view, 1i32));
        if self.dense() {
            run!(self, Centers, advance_history, self.cuda.grid(1), BLOCK, (view,));
        }
        run!(self, Centers, end_update, 1, 32, (view,));
        self.updates += 1;
        let half = self.sizes().history_capacity / 2;
        if self.dense() && self.updates.is_multiple_of(half) {
            // No row's gap outgrows the ring: what this leaves is at most half as old.
            let before = self.updates - half / 2;
            run!(self, Centers, catch_up_rows, self.cuda.grid(8), BLOCK, (view, before));
        }
        self.under_way = false;
        self.gather_ahead();
    }

    /// Hands out what `from` has made; `received` says who goes on with the result.
    fn exchange<T>(&mut self, name: &'static str, from: Lane, buffers: (*mut T, *mut T), count: usize, dtype: DType) -> Exchange {
        let lane = self.lanes.exchange(from);
        self.end_exchange();
        self.join(lane, from);
        let draft = if from == Lane::Draw { self.next() } else { self.current };
        self.exchanging = Some((lane, self.lanes.begin(lane), self.scope(draft), name));
        Exchange {
            send: buffers.0.cast_const().cast(),
            recv: buffers.1.cast(),
            count,
            dtype,
            stream: self.lanes.of(lane).raw(),
            memory: Some(self.cuda.clone()),
            failure: self.failure.clone(),
        }
    }

    /// What `by` runs from here on comes after the last exchange.
    fn received(&mut self, by: Lane) {
        if let Some(lane) = self.end_exchange() {
            self.join(by, lane);
        }
    }

    /// A failed step leaves one open that nobody goes on from.
    fn end_exchange(&mut self) -> Option<Lane> {
        let (lane, begun, scope, name) = self.exchanging.take()?;
        self.lanes.end(lane, begun, scope, name);
        Some(lane)
    }

    fn read_block(&mut self) -> Result<()> {
        let block = self.view().block;
        // SAFETY: a block on the device; the verdict lives as long as the head and is read after the wait.
        unsafe { self.cuda.stream.download(self.verdict.as_raw().cast(), block.cast(), size_of::<StepBlock>()) }?;
        self.cuda.stream.synchronize()?;
        self.lanes.settle();
        self.block = self.verdict[0];
        Ok(())
    }
}

impl HeadDevice for CudaHead {
    fn pack_labels(&mut self, counters: Counters, labels: Contribution<Labels>) -> Exchange {
        self.draft_labels(counters, labels)
    }

    fn judge_labels(&mut self) -> Result<()> {
        self.received(Lane::Draw);
        let view = self.arrays.views[self.next()];
        run!(self, Draw, judge_labels[PARTS], 1, ALONE, (view,));
        self.settled()
    }

    fn sample(&mut self, _draw: u64, chosen: Option<&[i64]>) -> Result<()> {
        let drawn = self.draw(chosen);
        // Also where that failed: the step reads the verdict on the labels.
        let recorded = self.drafts[self.next()].drawn.record(self.lanes.of(Lane::Draw));
        self.keep(recorded);
        drawn?;
        self.gather_ahead();
        self.settled()?;
        self.drafts[self.next()].own_failure.clone().map_or(Ok(()), Err)
    }

    fn sample_ids(&self) -> Result<Vec<i64>> {
        self.listed_ids()
    }

    fn next_labels(&self) -> (usize, Option<&[i64]>) {
        let Draft { batch, labels, .. } = &self.drafts[self.next()];
        (*batch, if *batch == 0 { Some(&[]) } else { labels.as_deref() })
    }

    fn begin(&mut self) -> Result<()> {
        // The step before writes the rows that this one reads, and reads the arrays that it writes.
        self.join(Lane::Main, Lane::Centers);
        if self.drafted {
            let released = self.drafts[self.current].released.record(&self.cuda.stream);
            self.keep(released);
            self.current = self.next();
            self.drafted = false;
            if let Some((view, outgrown)) = self.outgrown.take() {
                let before = self.next();
                self.arrays.views[before] = view;
                self.sizes[before] = self.sizes().clone();
                // Waits for the step before, which is the last one to use them.
                drop(outgrown);
            }
        }
        self.under_way = true;
        self.lanes.settle();
        let drawn = self.cuda.stream.wait(&self.drafts[self.current].drawn);
        self.keep(drawn);
        self.settled()
    }

    fn batch(&self) -> usize {
        self.drafts[self.current].batch
    }

    fn pack_embeddings(&mut self, embeddings: Option<&Matrix>) -> Exchange {
        let source = match embeddings {
            Some(matrix) => {
                // No room for them is this rank's own failure, not the device's: `forward` tells it.
                let staged = self.staging.borrow_mut().upload(&self.cuda.stream, "embeddings", matrix);
                staged.map_err(|error| self.unpacked = Some(error)).ok()
            }
            None => None,
        };
        let source = source.unwrap_or_else(MatrixView::zeroed);
        let (view, batch) = (self.view(), source.rows);
        run!(self, Main, pack_embeddings, self.cuda.grid(4), BLOCK, (view, source, batch));
        let dtype = self.sizes().gather_dtype;
        let count = self.spec.options.max_batch as usize * self.dim();
        self.exchange("all_gather embeddings", Lane::Main, (view.embeddings_send, view.embeddings_recv), count, dtype)
    }

    fn forward(&mut self, embeddings: &Matrix) -> Result<()> {
        if let Some(error) = self.unpacked.take() {
            return Err(error);
        }
        let source = match self.sharded() {
            true => MatrixView::zeroed(),
            false => self.staging.borrow_mut().upload(&self.cuda.stream, "embeddings", embeddings)?,
        };
        self.received(Lane::Main);
        let view = self.view();
        run!(self, Main, normalize_embeddings, self.cuda.grid(4), BLOCK, (view, source));
        run!(self, Main, judge_embeddings, 1, 32, (view,));
        run!(self, Main, find_targets, self.cuda.grid(4), BLOCK, (view, source));
        for first in self.chunks() {
            if let Some(before) = self.put_off.replace(first) {
                self.weighted(before);
            }
            self.numerators(Lane::Main, first);
        }
        run!(self, Main, reduce_rows, self.cuda.grid(4), BLOCK, (view,));
        self.settled()
    }

    fn pack_sums(&mut self, outcome: &Result<()>, loss_place: LossPlace) -> Exchange {
        let status = outcome.as_ref().err().map_or(0i32, |error| error.status as i32);
        if let Err(error) = outcome {
            self.told.get_or_insert((self.drafts[self.current].step, error.clone()));
        }
        let view = self.view();
        let room = self.drafts[self.current].most;
        run!(self, Main, pack_sums[PARTS], 1, BLOCK, (view, status, loss_place as i32, room));
        let exchange = match self.sharded() {
            true => {
                let count = 2 * self.sizes().label_capacity as usize + TOTALS;
                self.exchange("all_reduce sums", Lane::Main, (view.sums, view.sums), count, DType::F32)
            }
            false => {
                let count = REPLICATED_TOTALS + REPLICATED_SLOT * self.spec.ranks as usize;
                self.exchange("all_reduce sums", Lane::Main, (view.replicated_sums, view.replicated_sums), count, DType::F64)
            }
        };
        // Enqueued before the all-reduce, which a communicator may make the host wait for; they run side by side.
        if let Some(last) = self.put_off.take() {
            self.weighted(last);
        }
        exchange
    }

    fn others_loss_place(&mut self) -> Result<LossPlace> {
        self.received(Lane::Main);
        self.settled()?;
        let (view, stream) = (self.view(), &self.cuda.stream);
        let sum = match self.sharded() {
            true => {
                let totals = view.sums.wrapping_add(2 * self.sizes().label_capacity as usize);
                f64::from(staging::fetch::<f32>(stream, totals, TOTALS)?[1])
            }
            false => staging::fetch::<f64>(stream, view.replicated_sums, REPLICATED_TOTALS)?[3],
        };
        Ok(LossPlace::from_sum(sum))
    }

    fn judge_sums(&mut self, loss: Option<*mut f64>) -> Result<f64> {
        self.received(Lane::Main);
        let (view, target) = (self.view(), loss.unwrap_or(std::ptr::null_mut()));
        run!(self, Main, judge_sums[PARTS], 1, BLOCK, (view, target.cast()));
        self.settled()?;
        (self.at_labels, self.parted) = (false, false);
        if loss.is_some() {
            return Ok(f64::NAN);
        }
        self.read_block()?;
        if self.block.status != 0 {
            self.at_labels = matches!(self.block.fault, fault::REMOTE | fault::OUT_OF_STEP | fault::LABEL);
            self.parted = self.block.fault == fault::OUT_OF_STEP;
            // Told here and now, not once more by `wait`.
            self.forgive_last()?;
            self.fault(&self.block)?;
        }
        Ok(self.block.loss)
    }

    fn failed_in_labels(&self) -> bool {
        self.at_labels
    }

    fn ranks_out_of_step(&self) -> bool {
        self.parted
    }

    fn wait(&mut self) -> Result<()> {
        self.settled()?;
        self.parted = false;
        self.lanes.synchronize()?;
        let ledger: Ledger = staging::fetch(&self.cuda.stream, self.view().ledger, 1)?[0];
        if ledger.failed == 0 {
            return Ok(());
        }
        self.forgive()?;
        let (first, told) = (ledger.first_failure, self.told.take());
        self.parted = first.fault == fault::OUT_OF_STEP;
        let verdict = match told {
            // This rank knows more of its own failure than it told the others.
            Some((number, error)) if number == first.draws => Err(error),
            _ => self.fault(&first),
        };
        let others = match ledger.failed {
            1 => String::new(),
            more => format!(", and {} steps after it", more - 1),
        };
        verdict.map_err(|error| Error::new(error.status, format!("step {}{others}: {}", first.draws, error.message)))
    }

    fn is_device_memory(&self, name: &str, pointer: *const u8) -> Result<bool> {
        Ok(self.cuda.context.place(name, pointer.cast())? == Place::Device)
    }

    unsafe fn read_values(&self, name: &str, from: *const u8, to: &mut [u8]) -> Result<()> {
        staging::read(&self.cuda.stream, name, from, to)
    }

    unsafe fn write_values(&self, name: &str, to: *mut u8, from: &[u8]) -> Result<()> {
        staging::write(&self.cuda.stream, name, to, from)
    }

    fn backward(&mut self) -> Exchange {
        let view = self.view();
        run!(self, Main, embedding_gradient, self.cuda.grid(4), BLOCK, (view,));
        let count = self.spec.options.max_batch as usize * self.dim();
        let buffers = (view.gradient_send, view.gradient_recv);
        let exchange = self.exchange("reduce_scatter gradient", Lane::Main, buffers, count, DType::F32);
        if !self.sharded() {
            // Nobody runs it.
            self.exchanging = None;
        }
        exchange
    }

    fn finish_gradient(&mut self, factor: f64, gradient: Option<&Matrix>) -> Result<()> {
        self.received(Lane::Main);
        let view = self.view();
        let target = match gradient {
            Some(matrix) => self.staging.borrow_mut().target(&self.cuda.stream, "grad_embeddings", matrix),
            None => Ok(MatrixView::zeroed()),
        };
        // Where there is no room to bring it home from, its norm is known all the same.
        let written = target.as_ref().map_or(MatrixView::zeroed(), |&view| view);
        run!(self, Main, finish_gradient, self.cuda.grid(4), BLOCK, (view, factor, written));
        run!(self, Main, sum_squares[PARTS], 1, ALONE, (view, 0i32));
        self.settled()?;
        match (gradient, target?) {
            (Some(matrix), target) => self.staging.borrow().download(&self.cuda.stream, &target, matrix),
            (None, _) => Ok(()),
        }
    }

    fn update(&mut self, learning_rate: f64, loss_weight: f64, beside: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let (view, fused) = (self.begin_centers(), self.fused());
        run!(self, Centers, begin_update, 1, 32, (view, learning_rate));
        for first in self.chunks() {
            if !self.sizes().keeps_probabilities() {
                self.numerators(Lane::Centers, first);
            }
            self.centers(first, loss_weight, i32::from(fused));
            if !fused {
                let count = self.sizes().chunk_capacity as u32;
                run!(self, Centers, update_rows, self.cuda.grid(4), BLOCK, (view, first, count));
            }
        }
        self.finish_update();
        // Enqueued before the exchange, which a communicator may make the host wait for; they run side by side.
        beside()?;
        self.settled()
    }

    fn center_gradient(&mut self, loss_weight: f64) -> Exchange {
        let (view, dim) = (self.begin_centers(), self.dim());
        // Ranks add up as many rows as a sample can have; those beyond this one are zeros.
        let bytes = size_of::<f32>() * self.sizes().sample_capacity as usize * dim;
        // SAFETY: the head's own array, of this size.
        let cleared = unsafe { self.lanes.of(Lane::Centers).fill(view.center_gradient.cast(), 0, bytes) };
        self.keep(cleared);
        for first in self.chunks() {
            if !self.sizes().keeps_probabilities() {
                self.numerators(Lane::Centers, first);
            }
            self.centers(first, loss_weight, 0);
        }
        let common = self.common_room();
        let count = self.keep(common).unwrap_or(0) as usize * dim;
        let buffers = (view.center_gradient, view.center_gradient);
        self.exchange("all_reduce center gradient", Lane::Centers, buffers, count, DType::F32)
    }

    fn apply_gradient(&mut self, learning_rate: f64) -> Result<()> {
        self.received(Lane::Centers);
        let (view, first, count) = (self.view(), 0u32, self.sizes().sample_capacity as u32);
        run!(self, Centers, begin_update, 1, 32, (view, learning_rate));
        run!(self, Centers, update_rows, self.cuda.grid(4), BLOCK, (view, first, count));
        self.finish_update();
        self.settled()
    }

    fn figures(&mut self) -> Result<StepFigures> {
        self.step_figures()
    }

    fn read_rows(&self, tensor: StateTensor, first: u64, rows: &Matrix) -> Result<()> {
        self.fetch_rows(tensor, first, rows)
    }

    fn write_rows(&mut self, tensor: StateTensor, first: u64, rows: &Matrix) -> Result<()> {
        self.put_rows(tensor, first, rows)
    }

    fn nearest(&self, queries: &[f32], k: usize) -> Result<Nearest> {
        let read = |first: usize, rows: &Matrix| self.read_rows(StateTensor::Centers, first as u64, rows);
        Rows { cuda: &self.cuda, view: self.view(), read: &read }.nearest(queries, k)
    }
}

impl CudaHead {
    /// Classes whose rows of dW the ranks add up: the same on all, whatever samples they were given. Only a rank that was given
    /// more than any draw has looks at the others' part of the sums, and waits for it.
    ///
    /// The least room: where the ranks' samples are one and the same it fits; else the step has come to nothing, and it does not
    /// matter which rows those are. A rank that does not look has the usual room, and none has less.
    fn common_room(&self) -> Result<u64> {
        let (own, usual) = (self.drafts[self.current].most, self.usual_sample());
        if self.spec.ranks == 1 || own <= usual {
            return Ok(own);
        }
        let count = REPLICATED_TOTALS + REPLICATED_SLOT * self.spec.ranks as usize;
        let sums: Vec<f64> = staging::fetch(&self.cuda.stream, self.view().replicated_sums, count)?;
        let rooms = sums[REPLICATED_TOTALS..].chunks_exact(REPLICATED_SLOT).map(|slot| slot[3] as u64);
        Ok(rooms.fold(own, u64::min).max(usual))
    }
}

impl Drop for CudaHead {
    /// What is enqueued uses the buffers until it is done.
    fn drop(&mut self) {
        if self.cuda.process != std::process::id() {
            return;
        }
        if let Err(error) = self.lanes.synchronize() {
            log::warn!("rank {}: a head was freed after its work had failed: {error}", self.spec.rank);
        }
    }
}
