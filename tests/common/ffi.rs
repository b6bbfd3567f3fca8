//! The C interface as tests call it: handles that free themselves, statuses with their texts.

use std::ffi::CStr;
use std::fmt;

use super::simt;
use half::{bf16, f16};
use partialfc::capi::comm as c_comm;
use partialfc::capi::device as c_device;
use partialfc::capi::head as c_head;
use partialfc::capi::plan as c_plan;
use partialfc::capi::status::{pfc_last_error, pfc_status_name, PFC_OK};
use partialfc::capi::types::{self as c_types, pfc_head_options, pfc_matrix};
use partialfc::margin::{Margin, MarginGradient};
use partialfc::matrix::DType;
use partialfc::optimizer::{Optimizer, Sgd};
use partialfc::options::{HeadOptions, Placement, Precision, RowUpdate};

pub use partialfc::capi::comm::pfc_traffic;
pub use partialfc::capi::head::{pfc_metrics, PFC_STATE_MOMENTUM, PFC_STATE_SECOND_MOMENT};
pub use partialfc::capi::plan::pfc_plan_report;

/// A status that is not PFC_OK, and the text that goes with it.
#[derive(Clone, PartialEq, Eq)]
pub struct Failure {
    pub status: i32,
    pub message: String,
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", status_name(self.status), self.message)
    }
}

pub type Outcome<T> = Result<T, Failure>;

pub fn status_name(status: i32) -> String {
    // SAFETY: the name lives for ever.
    unsafe { CStr::from_ptr(pfc_status_name(status)) }.to_string_lossy().into_owned()
}

/// A status as a result, with this thread's error text.
pub fn outcome(status: i32) -> Outcome<()> {
    if status == PFC_OK {
        return Ok(());
    }
    // SAFETY: valid until this thread's next failing call.
    let message = unsafe { CStr::from_ptr(pfc_last_error()) }.to_string_lossy().into_owned();
    assert!(!message.is_empty(), "{} without a message", status_name(status));
    Err(Failure { status, message })
}

pub struct Device(pub *mut c_device::pfc_device);

// SAFETY: a device may be used from several threads at once.
unsafe impl Send for Device {}
unsafe impl Sync for Device {}

impl Device {
    pub fn cpu(threads: u32) -> Device {
        let mut raw = std::ptr::null_mut();
        // SAFETY: an output that outlives the call.
        outcome(unsafe { c_device::pfc_device_cpu(threads, &mut raw) }).expect("a CPU device");
        Device(raw)
    }

    /// What a suite runs on: the CPU, with so many threads; with `PFC_TEST_DEVICE=cuda` GPU 0 of the driver that [`simt`] names.
    pub fn under_test(threads: u32) -> Device {
        if !on_cuda() {
            return Device::cpu(threads);
        }
        simt::ready();
        let mut raw = std::ptr::null_mut();
        // SAFETY: an output that outlives the call; the default stream.
        outcome(unsafe { c_device::pfc_device_cuda(0, std::ptr::null_mut(), &mut raw) }).expect("GPU 0");
        Device(raw)
    }
}

/// Whether suites that take any device run on a GPU.
pub fn on_cuda() -> bool {
    match std::env::var("PFC_TEST_DEVICE").as_deref() {
        Ok("cuda") => true,
        Ok("cpu") | Err(std::env::VarError::NotPresent) => false,
        other => panic!("PFC_TEST_DEVICE is {other:?}; it is cpu or cuda"),
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if on_cuda() && !std::thread::panicking() {
            let findings = simt::findings();
            assert!(findings.is_empty(), "the emulator's findings:\n{findings}");
        }
        // SAFETY: made by pfc_device_cpu, freed once.
        unsafe { c_device::pfc_device_free(self.0) };
    }
}

pub struct Comm(pub *mut c_comm::pfc_comm);

// SAFETY: a communicator may move between threads; pfc_comm_abort and the getters may be called from any.
unsafe impl Send for Comm {}
unsafe impl Sync for Comm {}

impl Comm {
    pub fn solo() -> Comm {
        let mut raw = std::ptr::null_mut();
        // SAFETY: an output that outlives the call.
        outcome(unsafe { c_comm::pfc_comm_self(&mut raw) }).expect("a communicator of one");
        Comm(raw)
    }

    pub fn threads(n: u32) -> Vec<Comm> {
        let mut raw = vec![std::ptr::null_mut(); n as usize];
        // SAFETY: n pointers.
        outcome(unsafe { c_comm::pfc_comm_threads(n, raw.as_mut_ptr()) }).expect("a group of threads");
        raw.into_iter().map(Comm).collect()
    }

    pub fn set_timeout(&self, milliseconds: u64) {
        // SAFETY: a live handle.
        outcome(unsafe { c_comm::pfc_comm_set_timeout(self.0, milliseconds) }).expect("a timeout");
    }

    pub fn abort(&self) {
        // SAFETY: a live handle; from any thread.
        outcome(unsafe { c_comm::pfc_comm_abort(self.0) }).expect("an abort");
    }

    pub fn barrier(&self) -> Outcome<()> {
        // SAFETY: a live handle.
        outcome(unsafe { c_comm::pfc_comm_barrier(self.0) })
    }

    pub fn traffic(&self) -> pfc_traffic {
        // SAFETY: all zeros is a value; a live handle.
        unsafe {
            let mut traffic = std::mem::zeroed();
            outcome(c_comm::pfc_comm_traffic(self.0, &mut traffic)).expect("traffic");
            traffic
        }
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        // SAFETY: made by a pfc_comm_ maker, freed once.
        unsafe { c_comm::pfc_comm_free(self.0) };
    }
}

/// Bytes by operation between two readings: all_gather, all_reduce, reduce_scatter, broadcast.
pub fn traffic_between(before: &pfc_traffic, after: &pfc_traffic) -> [u64; 4] {
    [
        after.all_gather_bytes - before.all_gather_bytes,
        after.all_reduce_bytes - before.all_reduce_bytes,
        after.reduce_scatter_bytes - before.reduce_scatter_bytes,
        after.broadcast_bytes - before.broadcast_bytes,
    ]
}

/// Elements of a matrix argument in their own type.
#[derive(Clone, Debug)]
enum Elements {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

/// A matrix argument that owns its memory. Between `cols` and `row_stride` lies a mark that no call may overwrite.
#[derive(Clone, Debug)]
pub struct Rows {
    elements: Elements,
    pub rows: usize,
    pub cols: usize,
    pub stride: usize,
}

const MARK: f32 = 7.25;

impl Rows {
    /// Rounds to f32, then to the type's nearest even: `from_f64` of the half crate looks at a part of the f64 only.
    pub fn new(values: &[f64], cols: usize, dtype: DType, padding: usize) -> Rows {
        let (rows, stride) = (values.len() / cols, cols + padding);
        assert_eq!(values.len(), rows * cols, "whole rows");
        let mut padded = vec![f64::from(MARK); rows * stride];
        for (to, from) in padded.chunks_exact_mut(stride).zip(values.chunks_exact(cols)) {
            to[..cols].copy_from_slice(from);
        }
        let elements = match dtype {
            DType::F32 => Elements::F32(padded.iter().map(|&x| x as f32).collect()),
            DType::F16 => Elements::F16(padded.iter().map(|&x| f16::from_f32(x as f32)).collect()),
            DType::Bf16 => Elements::Bf16(padded.iter().map(|&x| bf16::from_f32(x as f32)).collect()),
            other => panic!("no matrix holds {other:?}"),
        };
        Rows { elements, rows, cols, stride }
    }

    pub fn f32(values: &[f32], cols: usize) -> Rows {
        let values: Vec<f64> = values.iter().map(|&x| f64::from(x)).collect();
        Rows::new(&values, cols, DType::F32, 0)
    }

    /// Somewhere to write: holds a number that nothing computes.
    pub fn output(rows: usize, cols: usize) -> Rows {
        Rows::new(&vec![-123.0; rows * cols], cols, DType::F32, 0)
    }

    pub fn dtype(&self) -> DType {
        match self.elements {
            Elements::F32(_) => DType::F32,
            Elements::F16(_) => DType::F16,
            Elements::Bf16(_) => DType::Bf16,
        }
    }

    fn padded(&self) -> Vec<f64> {
        match &self.elements {
            Elements::F32(values) => values.iter().map(|&x| f64::from(x)).collect(),
            Elements::F16(values) => values.iter().map(|x| x.to_f64()).collect(),
            Elements::Bf16(values) => values.iter().map(|x| x.to_f64()).collect(),
        }
    }

    /// The values, without what lies between the rows; asserts that nothing was written there.
    pub fn values(&self) -> Vec<f64> {
        let padded = self.padded();
        let mut values = Vec::with_capacity(self.rows * self.cols);
        for row in padded.chunks_exact(self.stride) {
            values.extend_from_slice(&row[..self.cols]);
            assert!(row[self.cols..].iter().all(|&x| x == f64::from(MARK)), "written between the rows: {:?}", &row[self.cols..]);
        }
        values
    }

    pub fn values_f32(&self) -> Vec<f32> {
        self.values().iter().map(|&x| x as f32).collect()
    }

    /// The argument itself. What it points to may be written by the call it is made for.
    pub fn view(&mut self) -> pfc_matrix {
        let data = match &mut self.elements {
            Elements::F32(values) => values.as_mut_ptr().cast(),
            Elements::F16(values) => values.as_mut_ptr().cast(),
            Elements::Bf16(values) => values.as_mut_ptr().cast(),
        };
        let (rows, cols, row_stride) = (self.rows as u64, self.cols as u64, self.stride as u64);
        pfc_matrix { data, dtype: self.dtype() as i32, reserved: 0, rows, cols, row_stride }
    }
}

/// As workspace_limit of `Head::with`: no room for the softmax's numerators, which are then computed twice.
pub const LEAST: u64 = 1;

/// Defaults, and the three fields that have none.
pub fn head_options(classes: u64, dim: u32, max_batch: u64) -> pfc_head_options {
    // SAFETY: all zeros is a value of it; the size is its own.
    unsafe {
        let mut options: pfc_head_options = std::mem::zeroed();
        outcome(c_types::pfc_head_options_init_sized(&mut options, std::mem::size_of::<pfc_head_options>() as u64))
            .expect("defaults");
        (options.num_classes, options.embedding_dim, options.max_batch) = (classes, dim, max_batch);
        options
    }
}

/// The defaults as the library holds them: what several threads may share, and the reference head takes.
pub fn options(classes: u64, dim: u32, max_batch: u64) -> HeadOptions {
    let c = head_options(classes, dim, max_batch);
    HeadOptions {
        num_classes: classes,
        embedding_dim: dim,
        placement: Placement::Sharded,
        sample_rate: c.sample_rate,
        seed: c.seed,
        max_batch,
        margin: Margin {
            scale: c.scale,
            m1: c.m1,
            m2: c.m2,
            m3: c.m3,
            interclass_filter: c.interclass_filter,
            gradient: MarginGradient::Exact,
            guard: false,
        },
        row_update: RowUpdate::Lazy,
        optimizer: Optimizer::Sgd(Sgd { momentum: c.momentum, weight_decay: c.weight_decay }),
        gradient_scale: c.gradient_scale,
        init_std: c.init_std,
        ignore_label: None,
        precision: Precision::Auto,
        gather_dtype: None,
        workspace_limit: c.workspace_limit,
    }
}

/// The same options in the C struct, so that the reference head and the library get one and the same.
pub fn to_c(options: &HeadOptions) -> pfc_head_options {
    let mut c = head_options(options.num_classes, options.embedding_dim, options.max_batch);
    c.placement = options.placement as i32;
    c.sample_rate = options.sample_rate;
    c.seed = options.seed;
    c.scale = options.margin.scale;
    (c.m1, c.m2, c.m3) = (options.margin.m1, options.margin.m2, options.margin.m3);
    c.interclass_filter = options.margin.interclass_filter;
    c.margin_gradient = match options.margin.gradient {
        MarginGradient::Exact => c_types::PFC_MARGIN_GRADIENT_EXACT,
        MarginGradient::StraightThrough => c_types::PFC_MARGIN_GRADIENT_STRAIGHT_THROUGH,
    };
    c.margin_guard = if options.margin.guard { c_types::PFC_MARGIN_GUARD_ON } else { c_types::PFC_MARGIN_GUARD_OFF };
    c.row_update = match options.row_update {
        RowUpdate::Lazy => c_types::PFC_ROW_UPDATE_LAZY,
        RowUpdate::Dense => c_types::PFC_ROW_UPDATE_DENSE,
    };
    match options.optimizer {
        Optimizer::Sgd(sgd) => {
            c.optimizer = c_types::PFC_OPTIMIZER_SGD;
            (c.momentum, c.weight_decay) = (sgd.momentum, sgd.weight_decay);
        }
        Optimizer::Adamw(adamw) => {
            c.optimizer = c_types::PFC_OPTIMIZER_ADAMW;
            (c.beta1, c.beta2, c.epsilon) = (adamw.beta1, adamw.beta2, adamw.epsilon);
            c.weight_decay = adamw.weight_decay;
        }
    }
    c.gradient_scale = options.gradient_scale;
    c.init_std = options.init_std;
    c.ignore_label = options.ignore_label.unwrap_or(i64::MIN);
    c.precision = options.precision as i32;
    c.gather_dtype = options.gather_dtype.map_or(c_types::PFC_GATHER_AUTO, |dtype| dtype as i32);
    c.workspace_limit = options.workspace_limit;
    c
}

pub fn plan(options: &pfc_head_options, ranks: u32, batch: u64) -> Outcome<pfc_plan_report> {
    // SAFETY: all zeros is a value of it; the size is its own.
    unsafe {
        let mut report: pfc_plan_report = std::mem::zeroed();
        outcome(c_plan::pfc_plan_report_init_sized(&mut report, std::mem::size_of::<pfc_plan_report>() as u64))?;
        outcome(c_plan::pfc_plan(options, ranks, batch, &mut report))?;
        Ok(report)
    }
}

pub struct Head {
    pub raw: *mut c_head::pfc_head,
    pub dim: usize,
}

// SAFETY: a head may move between threads; it is used by one at a time.
unsafe impl Send for Head {}

impl Head {
    pub fn create(device: &Device, comm: &Comm, options: &pfc_head_options) -> Outcome<Head> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: live handles; an output that outlives the call.
        let result = outcome(unsafe { c_head::pfc_head_create(device.0, comm.0, options, &mut raw) });
        assert_eq!(result.is_ok(), !raw.is_null(), "an output is written on success only: {result:?}");
        result.map(|()| Head { raw, dim: options.embedding_dim as usize })
    }

    /// A head from the library's own options, or a failed test.
    pub fn new(device: &Device, comm: &Comm, options: &HeadOptions) -> Head {
        Head::with(device, comm, options).expect("a head")
    }

    /// A head from the library's own options. A workspace limit counts from the least that the head takes: `LEAST` is it, `LEAST` + n is
    /// n bytes more. Collective.
    pub fn with(device: &Device, comm: &Comm, options: &HeadOptions) -> Outcome<Head> {
        let mut c = to_c(options);
        if on_cuda() && options.precision == Precision::Auto {
            // The suites hold every device to float32.
            c.precision = Precision::F32 as i32;
        }
        if options.workspace_limit > 0 {
            c.workspace_limit = 1;
            let refusal = Head::create(device, comm, &c).err().expect("a byte is too little");
            let needed = refusal.message.rsplit("at least ").next().and_then(|rest| rest.split(' ').next()?.parse::<u64>().ok());
            let Some(needed) = needed else {
                return Err(refusal); // of something else
            };
            c.workspace_limit = needed + options.workspace_limit - LEAST;
        }
        Head::create(device, comm, &c)
    }

    pub fn prepare(&mut self, labels: &[i64]) -> Outcome<()> {
        // SAFETY: a live handle; labels are copied.
        outcome(unsafe { c_head::pfc_head_prepare(self.raw, labels.as_ptr(), labels.len() as u64) })
    }

    pub fn set_sample(&mut self, ids: &[i64]) -> Outcome<()> {
        // SAFETY: a live handle; ids are copied.
        outcome(unsafe { c_head::pfc_head_set_sample(self.raw, ids.as_ptr(), ids.len() as u64) })
    }

    pub fn forward(&mut self, embeddings: &mut Rows, labels: Option<&[i64]>) -> Outcome<f64> {
        let view = embeddings.view();
        let mut loss = -321.0;
        if let Some(labels) = labels {
            assert_eq!(labels.len(), embeddings.rows, "a label for each row");
        }
        let pointer = labels.map_or(std::ptr::null(), <[i64]>::as_ptr);
        // SAFETY: a live handle; as many labels as rows.
        let result = outcome(unsafe { c_head::pfc_head_forward(self.raw, &view, pointer, &mut loss) });
        written(result, loss, -321.0)
    }

    pub fn backward(&mut self, loss_weight: f64, loss_scale: f64, grad: &mut Rows) -> Outcome<()> {
        let view = grad.view();
        // SAFETY: a live handle; a matrix that owns its memory.
        outcome(unsafe { c_head::pfc_head_backward(self.raw, loss_weight, loss_scale, &view) })
    }

    pub fn update(&mut self, learning_rate: f64) -> Outcome<()> {
        // SAFETY: a live handle.
        outcome(unsafe { c_head::pfc_head_update(self.raw, learning_rate) })
    }

    pub fn step(&mut self, embeddings: &mut Rows, labels: &[i64], learning_rate: f64, grad: &mut Rows) -> Outcome<f64> {
        assert_eq!(labels.len(), embeddings.rows, "a label for each row");
        let (from, to) = (embeddings.view(), grad.view());
        let mut loss = -321.0;
        // SAFETY: a live handle; matrices that own their memory.
        let result = outcome(unsafe { c_head::pfc_head_step(self.raw, &from, labels.as_ptr(), learning_rate, &to, &mut loss) });
        written(result, loss, -321.0)
    }

    pub fn wait(&mut self) -> Outcome<()> {
        // SAFETY: a live handle.
        outcome(unsafe { c_head::pfc_head_wait(self.raw) })
    }

    pub fn metrics(&mut self) -> Outcome<pfc_metrics> {
        // SAFETY: all zeros is a value of it; the size is its own.
        unsafe {
            let mut metrics: pfc_metrics = std::mem::zeroed();
            outcome(c_head::pfc_metrics_init_sized(&mut metrics, std::mem::size_of::<pfc_metrics>() as u64))?;
            outcome(c_head::pfc_head_metrics(self.raw, &mut metrics))?;
            Ok(metrics)
        }
    }

    pub fn top_k(&mut self, embeddings: &mut Rows, k: u64) -> Outcome<(Vec<i64>, Vec<f32>)> {
        let view = embeddings.view();
        let count = embeddings.rows * k as usize;
        let (mut ids, mut cosines) = (vec![-5i64; count], vec![-5f32; count]);
        // SAFETY: a live handle; rows x k of both outputs.
        outcome(unsafe { c_head::pfc_head_top_k(self.raw, &view, k, ids.as_mut_ptr(), cosines.as_mut_ptr()) })?;
        Ok((ids, cosines))
    }

    /// The ids of the last sample, asked for as a C program does: first how many, then which.
    pub fn sample_ids(&self) -> Outcome<Vec<i64>> {
        let mut count = 0;
        // SAFETY: a live handle; NULL asks for the count.
        outcome(unsafe { c_head::pfc_head_sample_ids(self.raw, std::ptr::null_mut(), 0, &mut count) })?;
        let mut ids = vec![-5i64; count as usize];
        let mut written = 0;
        // SAFETY: as many ids as asked for.
        outcome(unsafe { c_head::pfc_head_sample_ids(self.raw, ids.as_mut_ptr(), count, &mut written) })?;
        assert_eq!(written, count, "the sample changed between two questions");
        Ok(ids)
    }

    /// First class and number of classes.
    pub fn shard(&self) -> (u64, u64) {
        let (mut first, mut count) = (0, 0);
        // SAFETY: a live handle.
        outcome(unsafe { c_head::pfc_head_shard(self.raw, &mut first, &mut count) }).expect("a shard");
        (first, count)
    }

    pub fn read_centers(&mut self, first: u64, count: u64) -> Outcome<Vec<f32>> {
        let mut rows = Rows::output(count as usize, self.dim);
        let view = rows.view();
        // SAFETY: a live handle; a matrix that owns its memory.
        outcome(unsafe { c_head::pfc_head_read_centers(self.raw, first, count, &view) })?;
        Ok(rows.values_f32())
    }

    pub fn write_centers(&mut self, first: u64, values: &[f32]) -> Outcome<()> {
        let mut rows = Rows::f32(values, self.dim);
        let view = rows.view();
        // SAFETY: a live handle; a matrix that owns its memory.
        outcome(unsafe { c_head::pfc_head_write_centers(self.raw, first, rows.rows as u64, &view) })
    }

    pub fn read_state(&mut self, tensor: i32, first: u64, count: u64) -> Outcome<Vec<f32>> {
        let mut rows = Rows::output(count as usize, self.dim);
        let view = rows.view();
        // SAFETY: a live handle; a matrix that owns its memory.
        outcome(unsafe { c_head::pfc_head_read_state(self.raw, tensor, first, count, &view) })?;
        Ok(rows.values_f32())
    }

    pub fn write_state(&mut self, tensor: i32, first: u64, values: &[f32]) -> Outcome<()> {
        let mut rows = Rows::f32(values, self.dim);
        let view = rows.view();
        // SAFETY: a live handle; a matrix that owns its memory.
        outcome(unsafe { c_head::pfc_head_write_state(self.raw, tensor, first, rows.rows as u64, &view) })
    }

    /// All of this rank's class centres.
    pub fn centers(&mut self) -> Vec<f32> {
        let (first, count) = self.shard();
        self.read_centers(first, count).expect("class centres")
    }

    pub fn momentum(&mut self) -> Vec<f32> {
        let (first, count) = self.shard();
        self.read_state(PFC_STATE_MOMENTUM, first, count).expect("momentum")
    }

    pub fn second_moment(&mut self) -> Vec<f32> {
        let (first, count) = self.shard();
        self.read_state(PFC_STATE_SECOND_MOMENT, first, count).expect("second moment")
    }
}

/// A written value, or an error with the output untouched.
fn written(result: Outcome<()>, value: f64, untouched: f64) -> Outcome<f64> {
    assert!(result.is_ok() || value == untouched, "the loss is {value} after {result:?}: outputs are written on success only");
    result.map(|()| value)
}

impl Drop for Head {
    fn drop(&mut self) {
        // SAFETY: made by pfc_head_create, freed once.
        unsafe { c_head::pfc_head_free(self.raw) };
    }
}
