//! Heads.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use partialfc::capi::checkpoint as c_checkpoint;
use partialfc::capi::forward as c_forward;
use partialfc::capi::forward::{pfc_backward_options, pfc_forward_options};
use partialfc::capi::head as c_head;
use partialfc::capi::head::{PFC_STATE_MOMENTUM, PFC_STATE_SECOND_MOMENT};
use partialfc::capi::metrics as c_metrics;
use partialfc::capi::metrics::pfc_metrics;
use partialfc::capi::plan as c_plan;
use partialfc::capi::plan::pfc_plan_report;
use partialfc::capi::types::pfc_head_options;
use partialfc::capi::update as c_update;
use partialfc::capi::update::pfc_update_options;
use partialfc::options::{HeadOptions, Precision, Residency};

use super::{outcome, tested_precision, to_c, Comm, Device, Outcome, Rows, TestedResidency};
use crate::programs::scratch;

/// As workspace_limit of `Head::with`: no room for the softmax's numerators, which are then computed twice.
pub const LEAST: u64 = 1;

pub fn plan(options: &pfc_head_options, ranks: u32, batch: u64) -> Outcome<pfc_plan_report> {
    // SAFETY: live options, a report that outlives the call.
    planned(|report| unsafe { c_plan::pfc_plan(options, ranks, batch, report) })
}

pub fn plan_cuda(options: &pfc_head_options, ranks: u32, batch: u64, gpu_memory: u64) -> Outcome<pfc_plan_report> {
    // SAFETY: as above.
    planned(|report| unsafe { c_plan::pfc_plan_cuda(options, ranks, batch, gpu_memory, report) })
}

fn planned(plan: impl FnOnce(*mut pfc_plan_report) -> i32) -> Outcome<pfc_plan_report> {
    // SAFETY: all zeros is a value of it; the size is its own.
    let mut report: pfc_plan_report = unsafe { std::mem::zeroed() };
    // SAFETY: a report that outlives the call.
    outcome(unsafe { c_plan::pfc_plan_report_init_sized(&mut report, std::mem::size_of::<pfc_plan_report>() as u64) })?;
    outcome(plan(&mut report))?;
    Ok(report)
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
        let residency = match (&options.residency, TestedResidency::get()) {
            (Residency::Device, TestedResidency::Host) => Residency::Host,
            (Residency::Device, TestedResidency::File) if options.precision != Precision::Half => {
                // A quarter of the rows stay in memory, where they are in float32 with SGD's state.
                let cache = 2 * options.num_classes * u64::from(options.embedding_dim) / comm.size() as u64;
                Residency::File { directory: fresh_folder(), cache }
            }
            (given, _) => given.clone(),
        };
        let mut c = to_c(&HeadOptions { residency, ..options.clone() });
        if options.precision == Precision::Auto {
            c.precision = tested_precision() as i32;
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

    pub fn save(&mut self, directory: &Path) -> Outcome {
        let directory = CString::new(directory.as_os_str().as_bytes()).expect("a path");
        // SAFETY: a live handle, a path that outlives the call, the defaults.
        outcome(unsafe { c_checkpoint::pfc_head_save(self.raw, directory.as_ptr(), std::ptr::null()) })
    }

    pub fn save_start(&mut self, directory: &Path) -> Outcome {
        let directory = CString::new(directory.as_os_str().as_bytes()).expect("a path");
        // SAFETY: as above.
        outcome(unsafe { c_checkpoint::pfc_head_save_start(self.raw, directory.as_ptr(), std::ptr::null()) })
    }

    /// Whether the save that was begun is over.
    pub fn save_poll(&mut self) -> Outcome<bool> {
        let mut done = -1;
        // SAFETY: a live handle, an output that outlives the call, the defaults.
        outcome(unsafe { c_checkpoint::pfc_head_save_poll(self.raw, &mut done, std::ptr::null()) })?;
        assert!(done == 0 || done == 1, "{done}");
        Ok(done == 1)
    }

    pub fn load(&mut self, directory: &Path) -> Outcome {
        let directory = CString::new(directory.as_os_str().as_bytes()).expect("a path");
        // SAFETY: as above.
        outcome(unsafe { c_checkpoint::pfc_head_load(self.raw, directory.as_ptr(), std::ptr::null()) })
    }

    /// With the class of the head that each class of the checkpoint becomes.
    pub fn load_mapped(&mut self, directory: &Path, class_map: &[i64]) -> Outcome {
        let directory = CString::new(directory.as_os_str().as_bytes()).expect("a path");
        // SAFETY: a live handle, a path and a table that outlive the call; all zeros is a value of the options, the size is their own.
        unsafe {
            let mut options: c_checkpoint::pfc_load_options = std::mem::zeroed();
            let size = std::mem::size_of_val(&options) as u64;
            outcome(c_checkpoint::pfc_load_options_init_sized(&mut options, size))?;
            (options.class_map, options.class_map_count) = (class_map.as_ptr(), class_map.len() as u64);
            outcome(c_checkpoint::pfc_head_load(self.raw, directory.as_ptr(), &options))
        }
    }

    pub fn prepare(&mut self, labels: &[i64]) -> Outcome {
        // SAFETY: a live handle; labels are copied.
        outcome(unsafe { c_head::pfc_head_prepare(self.raw, labels.as_ptr(), labels.len() as u64) })
    }

    pub fn set_sample(&mut self, ids: &[i64]) -> Outcome {
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

    pub fn backward(&mut self, loss_weight: f64, loss_scale: f64, grad: &mut Rows) -> Outcome {
        let view = grad.view();
        // SAFETY: a live handle; a matrix that owns its memory.
        outcome(unsafe { c_head::pfc_head_backward(self.raw, loss_weight, loss_scale, &view) })
    }

    /// `terms`: m2, m3 and weight, each with a number for each row.
    pub fn forward_with(&mut self, embeddings: &mut Rows, labels: Option<&[i64]>, terms: &[Option<Vec<f32>>; 3]) -> Outcome<f64> {
        if let Some(terms) = terms.iter().flatten().find(|terms| terms.len() != embeddings.rows) {
            panic!("{} numbers for {} rows", terms.len(), embeddings.rows);
        }
        let [m2, m3, weight] = terms.each_ref().map(|terms| terms.as_ref().map_or(std::ptr::null(), |terms| terms.as_ptr()));
        self.forward_by(embeddings, labels, |options| (options.m2, options.m3, options.weight) = (m2, m3, weight))
    }

    /// The same with the options as `set` makes them.
    pub fn forward_by(
        &mut self,
        embeddings: &mut Rows,
        labels: Option<&[i64]>,
        set: impl FnOnce(&mut pfc_forward_options),
    ) -> Outcome<f64> {
        let (view, pointer, mut loss) = (embeddings.view(), labels.map_or(std::ptr::null(), <[i64]>::as_ptr), -321.0);
        // SAFETY: a live handle; all zeros is a value of the options, the size is their own.
        let result = unsafe {
            let mut options: pfc_forward_options = std::mem::zeroed();
            outcome(c_forward::pfc_forward_options_init_sized(&mut options, std::mem::size_of::<pfc_forward_options>() as u64))?;
            set(&mut options);
            outcome(c_forward::pfc_head_forward_with(self.raw, &view, pointer, &options, &mut loss))
        };
        written(result, loss, -321.0)
    }

    /// The gradients of m2 and m3 of the batch's rows.
    pub fn backward_with(&mut self, loss_weight: f64, loss_scale: f64, grad: &mut Rows) -> Outcome<[Vec<f32>; 2]> {
        let mut margins = [vec![-77.0; grad.rows], vec![-77.0; grad.rows]];
        let [m2, m3] = margins.each_mut().map(|values| values.as_mut_ptr());
        self.backward_by(grad, |options| {
            (options.loss_weight, options.loss_scale, options.grad_m2, options.grad_m3) = (loss_weight, loss_scale, m2, m3);
        })?;
        Ok(margins)
    }

    /// The same with the options as `set` makes them.
    pub fn backward_by(&mut self, grad: &mut Rows, set: impl FnOnce(&mut pfc_backward_options)) -> Outcome {
        let view = grad.view();
        // SAFETY: as above.
        unsafe {
            let mut options: pfc_backward_options = std::mem::zeroed();
            outcome(c_forward::pfc_backward_options_init_sized(&mut options, std::mem::size_of::<pfc_backward_options>() as u64))?;
            set(&mut options);
            outcome(c_forward::pfc_head_backward_with(self.raw, &options, &view))
        }
    }

    pub fn update(&mut self, learning_rate: f64) -> Outcome {
        // SAFETY: a live handle.
        outcome(unsafe { c_head::pfc_head_update(self.raw, learning_rate) })
    }

    pub fn accumulate(&mut self) -> Outcome {
        // SAFETY: a live handle.
        outcome(unsafe { c_update::pfc_head_accumulate(self.raw) })
    }

    /// `device_factor`: NULL, or of one number that outlives the call.
    pub fn update_with(&mut self, learning_rate: f64, factor: f64, device_factor: *const f32) -> Outcome {
        // SAFETY: a live handle; all zeros is a value of the options, the size is their own.
        unsafe {
            let mut options: pfc_update_options = std::mem::zeroed();
            outcome(c_update::pfc_update_options_init_sized(&mut options, std::mem::size_of::<pfc_update_options>() as u64))?;
            (options.learning_rate, options.factor, options.device_factor) = (learning_rate, factor, device_factor);
            outcome(c_update::pfc_head_update_with(self.raw, &options))
        }
    }

    pub fn step(&mut self, embeddings: &mut Rows, labels: &[i64], learning_rate: f64, grad: &mut Rows) -> Outcome<f64> {
        assert_eq!(labels.len(), embeddings.rows, "a label for each row");
        let (from, to) = (embeddings.view(), grad.view());
        let mut loss = -321.0;
        // SAFETY: a live handle; matrices that own their memory.
        let result = outcome(unsafe { c_head::pfc_head_step(self.raw, &from, labels.as_ptr(), learning_rate, &to, &mut loss) });
        written(result, loss, -321.0)
    }

    pub fn wait(&mut self) -> Outcome {
        // SAFETY: a live handle.
        outcome(unsafe { c_head::pfc_head_wait(self.raw) })
    }

    pub fn metrics(&mut self) -> Outcome<pfc_metrics> {
        self.measured(c_metrics::pfc_head_metrics)
    }

    pub fn last_metrics(&mut self) -> Outcome<pfc_metrics> {
        self.measured(c_metrics::pfc_head_last_metrics)
    }

    fn measured(&mut self, call: unsafe extern "C" fn(*mut c_head::pfc_head, *mut pfc_metrics) -> i32) -> Outcome<pfc_metrics> {
        // SAFETY: all zeros is a value of it; the size is its own.
        unsafe {
            let mut metrics: pfc_metrics = std::mem::zeroed();
            outcome(c_metrics::pfc_metrics_init_sized(&mut metrics, std::mem::size_of::<pfc_metrics>() as u64))?;
            outcome(call(self.raw, &mut metrics))?;
            Ok(metrics)
        }
    }

    /// The text of the last error of a call on this head.
    pub fn error(&self) -> String {
        // SAFETY: a live handle; as many bytes as asked for.
        unsafe {
            let size = c_head::pfc_head_error(self.raw, std::ptr::null_mut(), 0);
            let mut text = vec![0u8; size as usize];
            assert_eq!(
                c_head::pfc_head_error(self.raw, text.as_mut_ptr().cast(), size),
                size,
                "the text changed between questions"
            );
            assert_eq!(text.pop(), Some(0), "a terminating zero");
            String::from_utf8(text).expect("UTF-8")
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

    pub fn write_centers(&mut self, first: u64, values: &[f32]) -> Outcome {
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

    pub fn write_state(&mut self, tensor: i32, first: u64, values: &[f32]) -> Outcome {
        let mut rows = Rows::f32(values, self.dim);
        let view = rows.view();
        // SAFETY: a live handle; a matrix that owns its memory.
        outcome(unsafe { c_head::pfc_head_write_state(self.raw, tensor, first, rows.rows as u64, &view) })
    }

    /// Samples drawn and updates done.
    pub fn read_progress(&mut self) -> Outcome<(u64, u64)> {
        let (mut draws, mut updates) = (0, 0);
        // SAFETY: a live handle.
        outcome(unsafe { c_head::pfc_head_read_progress(self.raw, &mut draws, &mut updates) })?;
        Ok((draws, updates))
    }

    pub fn write_progress(&mut self, (draws, updates): (u64, u64)) -> Outcome {
        // SAFETY: a live handle.
        outcome(unsafe { c_head::pfc_head_write_progress(self.raw, draws, updates) })
    }

    /// All of this rank's class centers.
    pub fn centers(&mut self) -> Vec<f32> {
        let (first, count) = self.shard();
        self.read_centers(first, count).expect("class centers")
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
fn written(result: Outcome, value: f64, untouched: f64) -> Outcome<f64> {
    assert!(result.is_ok() || value == untouched, "the loss is {value} after {result:?}: outputs are written on success only");
    result.map(|()| value)
}

/// A folder for the rows of one head.
fn fresh_folder() -> PathBuf {
    static HEADS: AtomicU64 = AtomicU64::new(0);
    scratch("rows").join(format!("{}-{}", std::process::id(), HEADS.fetch_add(1, Ordering::Relaxed)))
}

impl Drop for Head {
    fn drop(&mut self) {
        // SAFETY: made by pfc_head_create, freed once.
        unsafe { c_head::pfc_head_free(self.raw) };
    }
}
