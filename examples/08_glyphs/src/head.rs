//! The classification head and the ranks' communicator, as a Rust program uses the library.

use std::sync::Arc;

use partialfc::comm::Communicator;
use partialfc::device;
use partialfc::head::{self, Labels, LossTarget, Metrics, StepInput};
use partialfc::margin::{Margin, MarginGradient};
use partialfc::matrix::{DType, Matrix, ReduceOp};
use partialfc::optimizer::{Optimizer, Sgd};
use partialfc::options::{HeadOptions, Placement, Precision, Residency, RowUpdate};
use partialfc::row_terms::RowTermArrays;
use partialfc::{Error, Result, Status};

/// A rank's end of a group of threads.
pub struct Comm(Arc<Communicator>);

impl Comm {
    /// The ends of a group, in rank order; each goes to a thread of its own.
    pub fn group(ranks: usize) -> Result<Vec<Comm>> {
        let ends = match ranks {
            1 => vec![Communicator::single()?],
            _ => Communicator::threads(ranks as u32)?,
        };
        Ok(ends.into_iter().map(Comm).collect())
    }

    /// Sums a buffer over the ranks, in place.
    pub fn all_reduce(&self, values: &mut [f32]) -> Result<()> {
        self.0.all_reduce(values, ReduceOp::Sum)
    }

    /// Bytes this rank has handed to collectives so far, its head's included.
    pub fn traffic(&self) -> u64 {
        self.0.traffic().bytes.iter().sum()
    }

    /// Makes the other ranks' collectives fail instead of waiting for this one.
    pub fn abort(&self) {
        self.0.abort(&Error::new(Status::Aborted, "this rank has failed"));
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.abort();
        }
    }
}

/// ArcFace of these classes, trained with SGD: what `pfc_head_options_init` gives a C program.
pub fn arcface(classes: usize, dim: usize, max_batch: usize) -> HeadOptions {
    HeadOptions {
        num_classes: classes as u64,
        embedding_dim: dim as u32,
        placement: Placement::Sharded,
        sample_rate: 1.0,
        seed: 0,
        max_batch: max_batch as u64,
        margin: Margin {
            scale: 64.0,
            m1: 1.0,
            m2: 0.5,
            m3: 0.0,
            interclass_filter: 0.0,
            gradient: MarginGradient::Exact,
            guard: false,
        },
        row_update: RowUpdate::Lazy,
        optimizer: Optimizer::Sgd(Sgd { momentum: 0.9, weight_decay: 5e-4 }),
        gradient_scale: 1.0,
        init_std: 0.01,
        ignore_label: None,
        precision: Precision::Auto,
        gather_dtype: None,
        row_terms: false,
        sample_block: 1,
        residency: Residency::Device,
        weight_dtype: DType::F32,
        state_dtype: DType::F32,
        workspace_limit: 0,
    }
}

/// A rank's part of the head, on the CPU.
pub struct Head(head::Head);

impl Head {
    /// Collective: all ranks make their part, or hear why one cannot.
    pub fn new(comm: &Comm, threads: usize, options: HeadOptions) -> Result<Head> {
        let request = device::cpu(threads as u32).map(|device| (device, options));
        head::Head::create(comm.0.clone(), request).map(Head)
    }

    /// Collective: a whole step. Updates the class centers, writes the embeddings' gradient, and gives the loss of all ranks' rows.
    pub fn step(&mut self, embeddings: &[f32], labels: &[i64], learning_rate: f64, gradient: &mut [f32]) -> Result<f64> {
        let (rows, cols) = (labels.len(), self.0.embedding_dim() as usize);
        assert_eq!((embeddings.len(), gradient.len()), (rows * cols, rows * cols));
        // The head only reads this one.
        let data = embeddings.as_ptr().cast_mut().cast();
        let input = StepInput {
            embeddings: Matrix { data, dtype: DType::F32, rows, cols, row_stride: cols },
            labels: Some(Labels { data: labels.as_ptr(), count: rows }),
            terms: RowTermArrays::NONE,
        };
        self.0.step(Ok((input, Matrix::of_f32(gradient, rows, cols))), learning_rate, LossTarget::Host)
    }

    /// Collective: what the last step was like.
    pub fn metrics(&mut self) -> Result<Metrics> {
        self.0.metrics()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(ranks: usize) -> HeadOptions {
        let mut options = arcface(50, 8, 4 / ranks);
        options.seed = 1;
        (options.margin.scale, options.margin.m2) = (16.0, 0.1);
        options.optimizer = Optimizer::Sgd(Sgd { momentum: 0.9, weight_decay: 0.0 });
        options.gradient_scale = ranks as f64;
        options
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
                        let mut head = Head::new(&comm, 1, options(ranks)).unwrap();
                        let mut gradient = vec![0.0; embeddings.len()];
                        (0..5).map(|_| head.step(embeddings, labels, 0.5, &mut gradient).unwrap()).collect::<Vec<_>>()
                    })
                })
                .collect();
            let mut all: Vec<Vec<f64>> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
            assert!(all.iter().all(|losses| *losses == all[0]), "ranks got different losses");
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
        let mut head = Head::new(&comm, 1, options(1)).unwrap();
        let error = head.step(&[1.0; 8], &[50], 0.1, &mut [0.0; 8]).unwrap_err().to_string();
        assert!(error.starts_with("LABEL: ") && error.contains("50"), "{error}");
    }
}
