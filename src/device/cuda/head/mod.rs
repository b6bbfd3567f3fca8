//! One head on a GPU: the phases of a step as launches.
//!
//! Everything is enqueued. The host learns the outcome where the caller asks for it (a host loss, a gradient in host memory,
//! figures, `wait`). The real sizes and the verdict of a step are in its [`StepBlock`] on the device, where every kernel reads
//! them. streams.rs says which stream runs which work.

mod accumulation;
mod launch;
mod passes;
mod row_terms;
mod rows;
mod sample;
mod update;
mod verdict;

use std::cell::RefCell;
use std::sync::Arc;

use self::accumulation::Accumulation;
use self::launch::{run, ExchangeBuffers, OpenExchange};
use self::sample::{Draft, LabelMemory, Reserved};
use self::update::LastFactor;
use self::verdict::ReportedFailure;
use super::context::Gpu;
use super::driver::{DeviceBuffer, MemorySpace, PinnedBuffer};
use super::nearest::CenterSource;
use super::shared_structs::{fault, HeadArrays, MatrixView, StepBlock};
use super::sizes::{check_options, fuses_update, HeadMemory, Sizes};
use super::staging::{self, Staging};
use super::streams::{HeadStreams, StreamRole};
use crate::device::{HeadDevice, HeadSpec, Labels, Nearest, StepFigures, TensorRows, UpdateCall};
use crate::exchange::Exchange;
use crate::matrix::{DType, Matrix};
use crate::optimizer::StateTensor;
use crate::options::RowUpdate;
use crate::protocol::{sum_elements, Announcement, LossPlace, REPLICATED_SLOT, REPLICATED_TOTALS, TOTALS};
use crate::row_terms::{MarginGradientArrays, RowTermArrays};
use crate::{Contribution, Error, Result};

/// Multiprocessors that the center gradient leaves to the collectives beside it: a reduce-scatter of the gradient that found none would
/// end after it, and the trainer's backward with it. They cost a sixteenth of the product on 132 multiprocessors, 80 us of 1.3 ms; the
/// message takes 40 us within a machine and 170 us between machines (8 MB at 450 and 50 GB/s).
const RESERVED_BESIDE_GRADIENT: u32 = 8;

/// Arrays that the next step has outgrown: the step in progress still uses them.
struct Outgrown {
    /// The pointers that the steps after the one in progress take.
    arrays: HeadArrays,
    buffers: Vec<DeviceBuffer<u8>>,
}

/// Memory that nothing uses any more. It is freed by the next growth, `wait` or the head's end: that waits for everything on the device's streams,
/// also for collectives of other heads on it, which may wait for this rank.
#[derive(Default)]
struct Retired {
    arrays: Vec<DeviceBuffer<u8>>,
    labels: Vec<LabelMemory>,
}

pub(super) struct CudaHead {
    gpu: Arc<Gpu>,
    spec: HeadSpec,
    /// The sizes of the two steps: they differ while a caller's sample has outgrown the step before it.
    sizes: [Sizes; 2],
    streams: HeadStreams,
    /// Its pointers, like the drafts, are those of the current step and of the next one, as `current` says.
    memory: HeadMemory,
    outgrown: Option<Outgrown>,
    reserved: Option<Reserved>,
    retired: Retired,
    drafts: [Draft; 2],
    current: usize,
    /// The next step has its labels.
    next_has_labels: bool,
    /// A step has begun and has not been updated: the centers that it gathered are needed.
    step_in_progress: bool,
    /// The step's gradients of the embeddings and of the class centers have squares for `figures` to add up.
    has_squares: [bool; 2],
    /// The chunk whose weighted centers run later, beside the all-reduce.
    deferred_chunk: Option<u32>,
    open_exchange: Option<OpenExchange>,
    /// First local failure since `wait`: already reported to the caller, still in the device's failure count.
    reported: Option<ReportedFailure>,
    labels: LabelMemory,
    staging: RefCell<Staging>,
    verdict: PinnedBuffer<StepBlock>,
    /// The block of the last step that the host waited for.
    block: StepBlock,
    failed_in_labels: bool,
    /// The last failure is one that ends the head.
    is_fatal: bool,
    /// Why the embeddings could not be copied to the device.
    upload_error: Option<Error>,
    /// The first launch or copy that failed where no error can be returned.
    first_error: Option<Error>,
    updates: u64,
    last_factor: LastFactor,
    /// Made by the first `accumulate`.
    accumulation: Option<Accumulation>,
}

impl CudaHead {
    pub fn new(gpu: Arc<Gpu>, spec: HeadSpec) -> Result<CudaHead> {
        check_options(&spec.options)?;
        let sizes = Sizes::new(&spec, gpu.capacity()?, 0)?;
        let memory = HeadMemory::allocate(&sizes, &gpu.stream)?;
        let max_batch = spec.options.max_batch as usize;
        let mut head = CudaHead {
            drafts: [Draft::new(&gpu.context)?, Draft::new(&gpu.context)?],
            streams: HeadStreams::new(&gpu.context, &gpu.stream, spec.ranks)?,
            verdict: PinnedBuffer::zeroed(&gpu.context, 1, "the verdict")?,
            staging: RefCell::new(Staging::with_slots(&gpu.context)?),
            labels: LabelMemory::new(&gpu.context, &gpu.stream, max_batch)?,
            current: 0,
            next_has_labels: false,
            step_in_progress: false,
            has_squares: [false; 2],
            deferred_chunk: None,
            open_exchange: None,
            reported: None,
            outgrown: None,
            reserved: None,
            retired: Retired::default(),
            upload_error: None,
            is_fatal: false,
            block: StepBlock::zeroed(),
            failed_in_labels: false,
            first_error: None,
            updates: 0,
            last_factor: LastFactor::new(&gpu.context)?,
            accumulation: None,
            memory,
            sizes: [sizes.clone(), sizes],
            spec,
            gpu,
        };
        let std = head.spec.options.init_std;
        run!(head, Main, start_values, (head.memory.arrays[0], std));
        head.pending_error()?;
        // The other streams read memory that was cleared on this one.
        head.gpu.stream.synchronize()?;
        log::info!(
            "rank {} of {}: {} class centers of dimension {} from class {}, on {}, {} MiB, {} of them on the host, chunks of {} of {} columns",
            head.spec.rank,
            head.spec.ranks,
            head.spec.shard.rows,
            head.spec.options.embedding_dim,
            head.spec.shard.first,
            head.gpu.info.to_string_lossy(),
            head.sizes[0].memory().total() >> 20,
            head.sizes[0].host_bytes() >> 20,
            head.sizes[0].chunks.columns,
            head.sizes[0].capacities.sample,
        );
        Ok(head)
    }

    fn sharded(&self) -> bool {
        self.spec.is_sharded()
    }

    fn dim(&self) -> usize {
        self.spec.options.embedding_dim as usize
    }

    fn dense(&self) -> bool {
        self.spec.options.row_update == RowUpdate::Dense
    }

    fn fused(&self) -> bool {
        fuses_update(&self.spec)
    }

    /// The pointers of the current step.
    fn arrays(&self) -> HeadArrays {
        self.memory.arrays[self.current]
    }

    fn sizes(&self) -> &Sizes {
        &self.sizes[self.current]
    }

    fn next(&self) -> usize {
        1 - self.current
    }

    /// The first column of each chunk.
    fn chunks(&self) -> impl Iterator<Item = u32> {
        let Sizes { capacities, chunks, .. } = self.sizes();
        (0..capacities.sample as u32).step_by(chunks.columns as usize)
    }

    /// W^ of a chunk of a draft's step.
    fn gather(&mut self, role: StreamRole, draft: usize, first: u32) {
        let arrays = self.memory.arrays[draft];
        // SAFETY: the head's own arrays, as large as its sizes say.
        self.traced_for(draft, role, "gather_centers", |gpu, stream| unsafe {
            gpu.entries.gather_centers.launch(stream, (arrays, first))
        });
    }

    /// Gathers the next step's first chunk early, if it is drawn and nothing needs the one before.
    fn gather_ahead(&mut self) {
        let next = self.next();
        if self.step_in_progress || !self.next_has_labels || self.drafts[next].gathered || self.first_error.is_some() {
            return;
        }
        let waited = self.streams.of(StreamRole::Centers).wait(&self.drafts[next].drawn);
        self.remember_error(waited);
        self.gather(StreamRole::Centers, next, 0);
        self.drafts[next].gathered = true;
    }

    /// E', the operand of the center gradient.
    fn scale_embeddings(&mut self) -> HeadArrays {
        self.join(StreamRole::Centers, StreamRole::Main);
        let arrays = self.arrays();
        run!(self, Centers, scale_embeddings, (arrays,));
        arrays
    }

    /// dW of a chunk into the rows, or dW^ into `center_gradient`.
    fn chunk_center_gradient(&mut self, first: u32, loss_weight: f64, fuse: i32) {
        let (arrays, reserved) = (self.arrays(), self.reserved(RESERVED_BESIDE_GRADIENT));
        self.product(StreamRole::Centers, "gemm_center_gradient", |products, stream| {
            products.center_gradient(stream, arrays, first, loss_weight, fuse, reserved)
        });
    }
}

impl HeadDevice for CudaHead {
    fn pack_labels(&mut self, announcement: &Announcement, labels: Contribution<Labels>) -> Exchange {
        self.draft_labels(announcement, labels)
    }

    fn largest_batch(&mut self, limit: u64) -> Result<u64> {
        self.gathered_batch(limit)
    }

    fn reserve_batch(&mut self, rows: u64) -> Result<()> {
        self.reserve_rows(rows)
    }

    fn take_reserved(&mut self, used: bool) {
        match used {
            true => self.use_reserved(),
            false => self.reserved = None,
        }
    }

    fn judge_labels(&mut self) -> Result<()> {
        self.next_has_labels = true;
        self.received(StreamRole::Draw);
        let arrays = self.memory.arrays[self.next()];
        run!(self, Draw, judge_labels, (arrays,));
        self.pending_error()
    }

    fn sample(&mut self, _draw: u64, chosen: Option<&[i64]>) -> Result<()> {
        let drawn = self.draw(chosen);
        // Recorded even if the draw failed: the step reads the verdict on the labels.
        let recorded = self.drafts[self.next()].drawn.record(self.streams.of(StreamRole::Draw));
        self.remember_error(recorded);
        drawn?;
        self.gather_ahead();
        self.pending_error()?;
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
        self.join(StreamRole::Main, StreamRole::Centers);
        if self.next_has_labels {
            let released = self.drafts[self.current].released.record(&self.gpu.stream);
            self.remember_error(released);
            self.current = self.next();
            self.next_has_labels = false;
            if let Some(Outgrown { arrays, buffers }) = self.outgrown.take() {
                let before = self.next();
                self.memory.arrays[before] = arrays;
                self.sizes[before] = self.sizes().clone();
                // The step before is the last one to use them.
                self.retired.arrays.extend(buffers);
            }
        }
        (self.step_in_progress, self.has_squares, self.deferred_chunk) = (true, [false; 2], None);
        self.streams.add_finished_spans();
        let drawn = self.gpu.stream.wait(&self.drafts[self.current].drawn);
        self.remember_error(drawn);
        self.pending_error()
    }

    fn batch(&self) -> usize {
        self.drafts[self.current].batch
    }

    fn pack_embeddings(&mut self, embeddings: Option<&Matrix>) -> Exchange {
        let source = match embeddings {
            Some(matrix) => {
                // A failure to stage them is this rank's own, not the device's: `forward` returns it.
                let staged = self.staging.borrow_mut().upload(&self.gpu.stream, "embeddings", matrix);
                staged.map_err(|error| self.upload_error = Some(error)).ok()
            }
            None => None,
        };
        let source = source.unwrap_or_else(MatrixView::zeroed);
        let (arrays, batch) = (self.arrays(), source.rows);
        run!(self, Main, pack_embeddings, (arrays, source, batch));
        let dtype = self.sizes().capacities.gather_dtype;
        let count = arrays.max_batch as usize * self.dim();
        let buffers = ExchangeBuffers { send: arrays.embeddings_send, recv: arrays.embeddings_recv, count };
        self.exchange("all_gather embeddings", StreamRole::Main, buffers, dtype)
    }

    fn forward(&mut self, embeddings: &Matrix, terms: &RowTermArrays) -> Result<()> {
        if let Some(error) = self.upload_error.take() {
            return Err(error);
        }
        let source = match self.sharded() {
            true => MatrixView::zeroed(),
            false => self.staging.borrow_mut().upload(&self.gpu.stream, "embeddings", embeddings)?,
        };
        self.received(StreamRole::Main);
        let arrays = self.arrays();
        self.take_terms(terms)?;
        run!(self, Main, normalize_embeddings, (arrays, source));
        self.multiply();
        run!(self, Main, reduce_rows, (arrays,));
        self.pending_error()
    }

    fn pack_sums(&mut self, outcome: &Result<()>, loss_place: LossPlace) -> Exchange {
        let status = outcome.as_ref().err().map_or(0i32, |error| error.status as i32);
        if let Err(error) = outcome {
            let failure = ReportedFailure { step: self.drafts[self.current].step, error: error.clone() };
            self.reported.get_or_insert(failure);
        }
        let arrays = self.arrays();
        let sample_limit = self.drafts[self.current].sample_limit;
        if !self.sharded() {
            run!(self, Main, finish_rows, (arrays, status));
        }
        run!(self, Main, pack_sums, (arrays, status, loss_place as i32, sample_limit));
        match self.sharded() {
            true => {
                let count = sum_elements(self.sizes().capacities.labels as usize, &self.spec.options);
                let buffers = ExchangeBuffers { send: arrays.sums, recv: arrays.sums, count };
                self.exchange("all_reduce sums", StreamRole::Main, buffers, DType::F32)
            }
            false => {
                let count = REPLICATED_TOTALS + REPLICATED_SLOT * self.spec.ranks as usize;
                let buffers = ExchangeBuffers { send: arrays.replicated_sums, recv: arrays.replicated_sums, count };
                self.exchange("all_reduce sums", StreamRole::Main, buffers, DType::F64)
            }
        }
    }

    fn run_beside_sums(&mut self) {
        if let Some(last) = self.deferred_chunk.take() {
            self.weighted_centers(last);
        }
    }

    fn others_loss_place(&mut self) -> Result<LossPlace> {
        self.received(StreamRole::Main);
        self.pending_error()?;
        let (arrays, stream) = (self.arrays(), &self.gpu.stream);
        let sum = match self.sharded() {
            true => {
                let totals = arrays.sums.wrapping_add(2 * self.sizes().capacities.labels as usize);
                f64::from(staging::fetch::<f32>(stream, totals, TOTALS)?[1])
            }
            false => staging::fetch::<f64>(stream, arrays.replicated_sums, REPLICATED_TOTALS)?[3],
        };
        Ok(LossPlace::from_sum(sum))
    }

    fn judge_sums(&mut self, loss: Option<*mut f64>) -> Result<f64> {
        self.received(StreamRole::Main);
        let (arrays, destination) = (self.arrays(), loss.unwrap_or(std::ptr::null_mut()));
        if self.sharded() {
            run!(self, Main, finish_rows, (arrays, 0i32));
        }
        run!(self, Main, judge_sums, (arrays, destination.cast()));
        self.leave_main();
        self.pending_error()?;
        (self.failed_in_labels, self.is_fatal) = (false, false);
        if loss.is_some() {
            return Ok(f64::NAN);
        }
        self.read_loss()
    }

    fn failed_in_labels(&self) -> bool {
        self.failed_in_labels
    }

    fn is_fatal(&self) -> bool {
        self.is_fatal
    }

    fn wait(&mut self) -> Result<()> {
        self.pending_error()?;
        self.is_fatal = false;
        self.streams.synchronize()?;
        self.retired = Retired::default();
        let ledger = self.ledger()?;
        self.check_rows(&ledger)?;
        if ledger.failed == 0 {
            return Ok(());
        }
        self.reset_failure_count()?;
        let (first, reported) = (ledger.first_failure, self.reported.take());
        self.is_fatal = first.fault == fault::RANKS_DIFFER;
        let verdict = match reported {
            // This rank has more of its own failure than the status that it sent.
            Some(ReportedFailure { step, error }) if step == first.draws => Err(error),
            _ => self.fault(&first),
        };
        let others = match ledger.failed {
            1 => String::new(),
            more => format!(", and {} steps after it", more - 1),
        };
        verdict.map_err(|error| Error::new(error.status, format!("step {}{others}: {}", first.draws, error.message)))
    }

    fn is_device_memory(&self, name: &str, pointer: *const u8) -> Result<bool> {
        Ok(self.gpu.context.memory_space(name, pointer.cast())? == MemorySpace::Device)
    }

    unsafe fn read_values(&self, name: &str, from: *const u8, to: &mut [u8]) -> Result<()> {
        staging::read_values(&self.gpu.stream, name, to, from)
    }

    unsafe fn write_values(&self, name: &str, to: *mut u8, from: &[u8]) -> Result<()> {
        staging::write_values(&self.gpu.stream, name, to, from)
    }

    fn backward(&mut self) -> Exchange {
        let arrays = self.arrays();
        run!(self, Main, embedding_gradient, (arrays,));
        let count = arrays.max_batch as usize * self.dim();
        let buffers = ExchangeBuffers { send: arrays.gradient_send, recv: arrays.gradient_recv, count };
        let exchange = self.exchange("reduce_scatter gradient", StreamRole::Main, buffers, DType::F32);
        if !self.sharded() {
            // A replicated head does not run it.
            self.open_exchange = None;
        }
        self.leave_main();
        exchange
    }

    fn finish_gradient(&mut self, factor: f64, gradient: Option<&Matrix>) -> Result<()> {
        self.received(StreamRole::Main);
        let arrays = self.arrays();
        let output = match gradient {
            Some(matrix) => self.staging.borrow_mut().output(&self.gpu.stream, "grad_embeddings", matrix),
            None => Ok(MatrixView::zeroed()),
        };
        // Without staging memory the gradient cannot be copied to the host; its norm is computed all the same.
        let written = output.as_ref().map_or(MatrixView::zeroed(), |&view| view);
        run!(self, Main, finish_gradient, (arrays, factor, written));
        self.has_squares[0] = true;
        self.leave_main();
        self.pending_error()?;
        match (gradient, output?) {
            (Some(matrix), output) => self.staging.borrow().download(&self.gpu.stream, matrix, &output),
            (None, _) => Ok(()),
        }
    }

    fn margin_gradients(&mut self, factor: f64, gradients: &MarginGradientArrays) -> Result<()> {
        self.write_margin_gradients(factor, gradients)
    }

    fn update(&mut self, update: UpdateCall, loss_weight: f64, beside: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let (arrays, fused) = (self.scale_embeddings(), self.fused());
        self.begin_update(update, std::ptr::null_mut());
        for first in self.chunks() {
            if !self.sizes().keeps_probabilities() {
                self.numerators(StreamRole::Centers, first, self.offsets());
            }
            self.chunk_center_gradient(first, loss_weight, i32::from(fused));
            if !fused {
                let count = self.sizes().chunks.columns as u32;
                run!(self, Centers, update_rows, (arrays, first, count));
            }
        }
        self.finish_update();
        // Enqueued before the exchange, which a communicator may make the host wait for; they run side by side.
        beside()?;
        self.pending_error()
    }

    fn center_gradient(&mut self, loss_weight: f64) -> Exchange {
        let (arrays, dim) = (self.scale_embeddings(), self.dim());
        // Ranks add up as many rows as a sample can have; those beyond this one are zeros.
        let bytes = size_of::<f32>() * self.sizes().capacities.sample as usize * dim;
        // SAFETY: the head's own array, of this size.
        let cleared = unsafe { self.streams.of(StreamRole::Centers).fill(arrays.center_gradient.cast(), 0, bytes) };
        self.remember_error(cleared);
        for first in self.chunks() {
            if !self.sizes().keeps_probabilities() {
                self.numerators(StreamRole::Centers, first, self.offsets());
            }
            self.chunk_center_gradient(first, loss_weight, 0);
        }
        let common = self.common_sample_limit();
        let count = self.remember_error(common).unwrap_or(0) as usize * dim;
        let buffers = ExchangeBuffers { send: arrays.center_gradient, recv: arrays.center_gradient, count };
        self.exchange("all_reduce center gradient", StreamRole::Centers, buffers, DType::F32)
    }

    fn apply_gradient(&mut self, update: UpdateCall) -> Result<()> {
        self.received(StreamRole::Centers);
        let (arrays, first, count) = (self.arrays(), 0u32, self.sizes().capacities.sample as u32);
        self.begin_update(update, std::ptr::null_mut());
        run!(self, Centers, update_rows, (arrays, first, count));
        self.finish_update();
        self.pending_error()
    }

    fn accumulate(&mut self, loss_weight: f64) -> Result<()> {
        self.accumulate_step(loss_weight)
    }

    fn drop_accumulated(&mut self) {
        self.accumulation = None;
    }

    fn accumulated_gradient(&mut self) -> Exchange {
        self.exchange_accumulated()
    }

    fn apply_accumulated(&mut self, update: UpdateCall) -> Result<()> {
        self.update_by_accumulated(update)
    }

    fn figures(&mut self) -> Result<StepFigures> {
        self.step_figures()
    }

    fn read_rows(&self, first: u64, tensors: &[TensorRows]) -> Result<()> {
        tensors.iter().try_for_each(|wanted| self.fetch_rows(first, wanted))
    }

    fn write_rows(&mut self, first: u64, tensors: &[TensorRows]) -> Result<()> {
        self.put_rows(first, tensors)
    }

    fn updates(&mut self) -> Result<u64> {
        self.applied_updates()
    }

    fn catch_up(&mut self) -> Result<()> {
        self.catch_up_all()
    }

    fn set_updates(&mut self, updates: u64) -> Result<()> {
        self.restore_updates(updates)
    }

    fn succeed(&mut self) {
        self.spec.successor = false;
    }

    fn nearest(&self, queries: &[f32], k: usize) -> Result<Nearest> {
        let read =
            |first: usize, rows: &Matrix| self.fetch_rows(first as u64, &TensorRows { tensor: StateTensor::Centers, rows: *rows });
        CenterSource { gpu: &self.gpu, arrays: self.arrays(), read: &read }.nearest(queries, k)
    }
}

impl Drop for CudaHead {
    /// Enqueued work uses the buffers until it is done.
    fn drop(&mut self) {
        if self.gpu.process != std::process::id() {
            return;
        }
        let waited = self.streams.wait_for_main().and(self.gpu.context.synchronize());
        self.streams.add_finished_spans();
        if let Err(error) = waited {
            log::warn!("rank {}: a head was freed whose last work on the GPU had failed: {error}", self.spec.rank);
        }
    }
}
