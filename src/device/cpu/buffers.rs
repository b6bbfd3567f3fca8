//! A head's buffers on the CPU: what its exchanges send and receive, and what its phases leave for each other.

use super::products::Shape;
use super::sizes::Sizes;
use crate::device::HeadSpec;
use crate::matrix::DType;
use crate::memory::{reserve, zeros, Buffer};
use crate::protocol::{self, REPLICATED_SLOT, REPLICATED_TOTALS};
use crate::Result;

/// What travels in the messages of a step, by their names. A placement's head has no buffer for the other's messages.
pub(super) struct Messages {
    pub labels_send: Vec<i64>,
    pub labels_recv: Vec<i64>,
    pub embeddings_send: Buffer<u8>,
    pub embeddings_recv: Buffer<u8>,
    /// A row on its way into `embeddings_send`.
    pub send_row: Vec<f32>,
    /// What each own row was multiplied by to travel in f16; empty where rows travel as they are.
    pub send_scales: Vec<f32>,
    pub sums: Vec<f32>,
    pub replicated_sums: Vec<f64>,
    pub gradient_send: Buffer<f32>,
    /// This rank's rows, [max_batch, d], whether they have travelled or not.
    pub gradient_recv: Buffer<f32>,
    /// [S, d].
    pub center_gradient: Buffer<f32>,
}

impl Messages {
    pub fn new(spec: &HeadSpec, sizes: &Sizes, gather_dtype: DType) -> Result<Messages> {
        let Shape { rows, dim, classes, .. } = sizes.capacity;
        let (ranks, max_batch, sharded) = (spec.ranks as usize, spec.options.max_batch as usize, spec.is_sharded());
        let label_block = protocol::label_block(spec.options.max_batch);
        let if_sharded = |elements: usize| if sharded { elements } else { 0 };
        let embeddings = max_batch * dim * gather_dtype.size();
        Ok(Messages {
            labels_send: zeros(&[label_block], "labels")?,
            labels_recv: zeros(&[ranks, label_block], "labels")?,
            embeddings_send: Buffer::zeroed(if_sharded(embeddings), "embeddings to gather")?,
            embeddings_recv: Buffer::zeroed(if_sharded(ranks * embeddings), "gathered embeddings")?,
            send_row: zeros(&[dim], "a row to gather")?,
            send_scales: zeros(&[if gather_dtype == DType::F16 { if_sharded(max_batch) } else { 0 }], "scales of rows to gather")?,
            sums: zeros(&[if_sharded(protocol::sum_elements(rows, &spec.options))], "row sums")?,
            replicated_sums: zeros(&[REPLICATED_TOTALS + REPLICATED_SLOT * ranks], "replicated sums")?,
            gradient_send: Buffer::zeroed(if_sharded(ranks * max_batch * dim), "embeddings' gradient to scatter")?,
            gradient_recv: Buffer::zeroed(max_batch * dim, "embeddings' gradient")?,
            center_gradient: Buffer::zeroed(if sharded { 0 } else { classes * dim }, "class centers' gradient")?,
        })
    }
}

/// What one phase leaves for the next.
pub(super) struct Activations {
    /// E^: [rows, row_pitch].
    pub units: Buffer<f32>,
    /// E^ transposed, as the operands of the products lay it out: [d, batch_pitch], d rounded up to an even number.
    pub units_transposed: Buffer<f32>,
    /// E': [rows, row_pitch].
    pub scaled: Buffer<f32>,
    /// Of the rows whose target is here, [rows, row_pitch]: W^ - cos E^ until the backward, then E^ - cos W^.
    pub tangents: Buffer<f32>,
    /// P @ W^ by split: [splits, rows, row_pitch].
    pub weighted_centers: Buffer<f32>,
    /// N by split: [splits, rows].
    pub split_sums: Buffer<f64>,
    /// The largest cosine of a negative by split: [splits, rows].
    pub split_best: Buffer<f32>,
    /// P transposed, of the chunks that are kept from forward to update.
    pub numerators: Buffer<f32>,
    /// Of all threads.
    pub scratch: Buffer<f32>,
}

impl Activations {
    pub fn new(sizes: &Sizes) -> Result<Activations> {
        let Shape { rows, dim, .. } = sizes.capacity;
        Ok(Activations {
            units: Buffer::zeroed(rows * sizes.capacity.row_pitch(), "normalized embeddings")?,
            units_transposed: Buffer::zeroed(dim.next_multiple_of(2) * sizes.capacity.batch_pitch(), "transposed embeddings")?,
            scaled: Buffer::zeroed(rows * sizes.capacity.row_pitch(), "scaled embeddings")?,
            tangents: Buffer::zeroed(rows * sizes.capacity.row_pitch(), "targets' tangents")?,
            weighted_centers: Buffer::zeroed(sizes.weighted_centers, "weighted centers")?,
            split_sums: Buffer::zeroed(sizes.split_rows, "row sums by split")?,
            split_best: Buffer::zeroed(sizes.split_rows, "row maxima by split")?,
            numerators: Buffer::zeroed(sizes.kept_elements(), "softmax numerators")?,
            scratch: Buffer::zeroed(sizes.scratch, "scratch")?,
        })
    }
}

pub(super) fn copied(values: &[f32]) -> Result<Vec<f32>> {
    let mut copy = Vec::new();
    reserve(&mut copy, values.len(), "a step's figures")?;
    copy.extend_from_slice(values);
    Ok(copy)
}

pub(super) fn resize<T: Clone + Default>(vector: &mut Vec<T>, length: usize) -> Result<()> {
    if length > vector.capacity() {
        *vector = zeros(&[length], "a step's figures")?;
    }
    vector.resize(length, T::default());
    Ok(())
}
