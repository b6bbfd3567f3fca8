//! The classification head and the ranks' communicator, through the library's C functions as any trainer would call them: handles
//! that free themselves, and errors with the library's own text.

use std::ffi::CStr;
use std::ptr::null_mut;

use anyhow::{bail, Context, Result};
use partialfc::capi::comm::{
    pfc_comm, pfc_comm_abort, pfc_comm_all_reduce, pfc_comm_free, pfc_comm_self, pfc_comm_threads, pfc_comm_traffic, pfc_traffic,
    PFC_SUM,
};
use partialfc::capi::device::{pfc_device, pfc_device_cpu, pfc_device_free};
use partialfc::capi::head::{
    pfc_head, pfc_head_create, pfc_head_free, pfc_head_metrics, pfc_head_step, pfc_metrics, pfc_metrics_init_sized,
};
use partialfc::capi::status::{pfc_last_error, pfc_status, pfc_status_name, PFC_OK};
use partialfc::capi::types::{
    pfc_head_options, pfc_head_options_init_sized, pfc_matrix, PFC_F32, PFC_PLACEMENT_REPLICATED, PFC_PLACEMENT_SHARDED,
};

/// A status as a result: the status's name and the text of this thread's last error.
fn check(status: pfc_status) -> Result<()> {
    if status == PFC_OK {
        return Ok(());
    }
    // SAFETY: both are strings that end with a zero and live at least until this thread's next failing call.
    let text = |pointer| unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned();
    bail!("{}: {}", text(pfc_status_name(status)), text(pfc_last_error()))
}

/// A rank's end of a group of threads.
pub struct Comm(*mut pfc_comm);

// SAFETY: the header gives each end to one thread of the caller's choice; pfc_comm_abort alone may come from any thread.
unsafe impl Send for Comm {}

impl Comm {
    /// The ends of a group, in rank order; each goes to a thread of its own.
    pub fn group(ranks: usize) -> Result<Vec<Comm>> {
        let mut handles = vec![null_mut(); ranks];
        // SAFETY: the functions write as many pointers as there are ranks.
        unsafe {
            match ranks {
                1 => check(pfc_comm_self(&mut handles[0]))?,
                _ => check(pfc_comm_threads(ranks as u32, handles.as_mut_ptr()))?,
            }
        }
        Ok(handles.into_iter().map(Comm).collect())
    }

    /// Sums a buffer over the ranks, in place.
    pub fn all_reduce(&self, values: &mut [f32]) -> Result<()> {
        let data = values.as_mut_ptr().cast();
        // SAFETY: the buffer has the given number of elements; send may be recv.
        check(unsafe { pfc_comm_all_reduce(self.0, data, data, values.len() as u64, PFC_F32, PFC_SUM) })
    }

    /// Bytes this rank has handed to collectives so far, its head's included.
    pub fn traffic(&self) -> Result<u64> {
        // SAFETY: pfc_traffic is made of integers, so zeros are a value; the function writes all of it.
        let mut traffic: pfc_traffic = unsafe { std::mem::zeroed() };
        check(unsafe { pfc_comm_traffic(self.0, &mut traffic) })?;
        Ok(traffic.all_gather_bytes + traffic.all_reduce_bytes + traffic.reduce_scatter_bytes + traffic.broadcast_bytes)
    }

    /// Makes the other ranks' collectives fail instead of waiting for this one.
    pub fn abort(&self) {
        // SAFETY: the handle lives as long as self. A rank that cannot be told will time out.
        unsafe { pfc_comm_abort(self.0) };
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.abort();
        }
        // SAFETY: the handle is ours, and nobody uses it after this.
        unsafe { pfc_comm_free(self.0) }
    }
}

#[derive(Clone, Debug)]
pub struct HeadOptions {
    pub classes: usize,
    pub dim: usize,
    pub replicated: bool,
    pub sample_rate: f64,
    pub seed: u64,
    /// Images on a rank.
    pub max_batch: usize,
    pub scale: f64,
    /// ArcFace's margin in radians.
    pub margin: f64,
    pub momentum: f64,
    pub weight_decay: f64,
    pub gradient_scale: f64,
}

/// A rank's part of the head, on the CPU.
pub struct Head {
    handle: *mut pfc_head,
    dim: usize,
}

impl Head {
    /// Collective: all ranks make their part.
    pub fn new(comm: &Comm, threads: usize, options: &HeadOptions) -> Result<Self> {
        let (mut device, mut handle): (*mut pfc_device, *mut pfc_head) = (null_mut(), null_mut());
        // SAFETY: the options are filled by the library before fields are set; the head keeps the device and the communicator
        // alive, so that the device's handle may go at once.
        unsafe {
            let mut raw: pfc_head_options = std::mem::zeroed();
            check(pfc_head_options_init_sized(&mut raw, size_of::<pfc_head_options>() as u64))?;
            raw.num_classes = options.classes as u64;
            raw.embedding_dim = options.dim as u32;
            raw.placement = if options.replicated { PFC_PLACEMENT_REPLICATED } else { PFC_PLACEMENT_SHARDED };
            raw.sample_rate = options.sample_rate;
            raw.seed = options.seed;
            raw.max_batch = options.max_batch as u64;
            raw.scale = options.scale;
            raw.m2 = options.margin;
            raw.momentum = options.momentum;
            raw.weight_decay = options.weight_decay;
            raw.gradient_scale = options.gradient_scale;
            check(pfc_device_cpu(threads as u32, &mut device))?;
            let created = check(pfc_head_create(device, comm.0, &raw, &mut handle));
            pfc_device_free(device);
            created.context("the head could not be made")?;
        }
        Ok(Head { handle, dim: options.dim })
    }

    /// Collective: a whole step. Updates the class centres, writes the embeddings' gradient, and gives the loss of all ranks' rows.
    pub fn step(&mut self, embeddings: &[f32], labels: &[i64], learning_rate: f64, gradient: &mut [f32]) -> Result<f64> {
        assert_eq!((embeddings.len(), gradient.len()), (labels.len() * self.dim, labels.len() * self.dim));
        let matrix = |data: *mut f32| pfc_matrix {
            data: data.cast(),
            dtype: PFC_F32,
            reserved: 0,
            rows: labels.len() as u64,
            cols: self.dim as u64,
            row_stride: self.dim as u64,
        };
        let (read, written) = (matrix(embeddings.as_ptr().cast_mut()), matrix(gradient.as_mut_ptr()));
        let mut loss = f64::NAN;
        // SAFETY: the matrices and labels have the sizes told, as asserted; embeddings are only read.
        check(unsafe { pfc_head_step(self.handle, &read, labels.as_ptr(), learning_rate, &written, &mut loss) })?;
        Ok(loss)
    }

    /// Collective: what the last step was like.
    pub fn metrics(&mut self) -> Result<pfc_metrics> {
        // SAFETY: the struct is made of numbers, and the library fills it before and after.
        unsafe {
            let mut metrics: pfc_metrics = std::mem::zeroed();
            check(pfc_metrics_init_sized(&mut metrics, size_of::<pfc_metrics>() as u64))?;
            check(pfc_head_metrics(self.handle, &mut metrics))?;
            Ok(metrics)
        }
    }
}

impl Drop for Head {
    fn drop(&mut self) {
        // SAFETY: the handle is ours, and nobody uses it after this.
        unsafe { pfc_head_free(self.handle) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(ranks: usize) -> HeadOptions {
        HeadOptions {
            classes: 50,
            dim: 8,
            replicated: false,
            sample_rate: 1.0,
            seed: 1,
            max_batch: 4 / ranks,
            scale: 16.0,
            margin: 0.1,
            momentum: 0.9,
            weight_decay: 0.0,
            gradient_scale: ranks as f64,
        }
    }

    fn losses(ranks: usize) -> Vec<f64> {
        let embeddings: Vec<f32> = (0..32).map(|at| ((at * 7 % 11) as f32) - 5.0).collect();
        let labels = [3i64, 17, 17, 49];
        std::thread::scope(|scope| {
            let threads: Vec<_> = Comm::group(ranks)
                .unwrap()
                .into_iter()
                .enumerate()
                .map(|(rank, comm)| {
                    let (embeddings, labels) =
                        (&embeddings[rank * 32 / ranks..][..32 / ranks], &labels[rank * 4 / ranks..][..4 / ranks]);
                    scope.spawn(move || {
                        let mut head = Head::new(&comm, 1, &options(ranks)).unwrap();
                        let mut gradient = vec![0.0; embeddings.len()];
                        (0..5).map(|_| head.step(embeddings, labels, 0.5, &mut gradient).unwrap()).collect::<Vec<_>>()
                    })
                })
                .collect();
            let mut all: Vec<Vec<f64>> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
            assert!(all.iter().all(|losses| *losses == all[0]), "ranks heard of different losses");
            all.swap_remove(0)
        })
    }

    #[test]
    fn the_loss_falls_and_does_not_depend_on_the_ranks() {
        let (one, two) = (losses(1), losses(2));
        assert!(one[4] < 0.8 * one[0]);
        one.iter().zip(&two).for_each(|(a, b)| assert!((a - b).abs() < 1e-4 * a, "{one:?} and {two:?}"));
    }

    #[test]
    fn errors_have_the_librarys_text() {
        let comm = Comm::group(1).unwrap().pop().unwrap();
        let mut head = Head::new(&comm, 1, &options(1)).unwrap();
        let error = head.step(&[1.0; 8], &[50], 0.1, &mut [0.0; 8]).unwrap_err().to_string();
        assert!(error.starts_with("PFC_ERROR_LABEL: ") && error.contains("50"), "{error}");
    }
}
