//! The arguments of a head's calls, as the library takes them.

use super::locked::with_head;
use super::{pfc_head, PFC_STATE_MOMENTUM, PFC_STATE_SECOND_MOMENT};
use crate::capi::array;
use crate::capi::status::pfc_status;
use crate::capi::types::{matrix, pfc_matrix};
use crate::head::{Head, Labels, StateTensor, StepInput};
use crate::row_terms::RowTermArrays;
use crate::{ensure, error, Result};

pub(super) unsafe fn rows(
    head: *mut pfc_head,
    first: u64,
    count: u64,
    name: &str,
    argument: *const pfc_matrix,
    body: impl FnOnce(&mut Head, crate::matrix::Matrix) -> Result<()>,
) -> pfc_status {
    with_head(head, |head| {
        let rows = matrix(name, argument, head.embedding_dim())?;
        ensure!(
            rows.rows as u64 == count,
            InvalidArgument,
            "{name}.rows must be {count}, the count from class {first}, got {} (rank {})",
            rows.rows,
            head.rank()
        );
        body(head, rows)
    })
}

pub(super) fn state_tensor(code: i32) -> Result<StateTensor> {
    match code {
        PFC_STATE_MOMENTUM => Ok(StateTensor::Momentum),
        PFC_STATE_SECOND_MOMENT => Ok(StateTensor::SecondMoment),
        _ => Err(error!(InvalidArgument, "tensor must be PFC_STATE_MOMENTUM (1) or PFC_STATE_SECOND_MOMENT (2), got {code}")),
    }
}

pub(in crate::capi) unsafe fn step_input(head: &Head, embeddings: *const pfc_matrix, labels: *const i64) -> Result<StepInput> {
    let embeddings = matrix("embeddings", embeddings, head.embedding_dim())?;
    // An empty batch needs no labels: the pointer of an empty array may be NULL.
    let given = !labels.is_null() || embeddings.rows == 0;
    let labels = if given { Some(label_argument(labels, embeddings.rows as u64)?) } else { None };
    Ok(StepInput { embeddings, labels, terms: RowTermArrays::NONE })
}

pub(super) fn label_argument(labels: *const i64, batch: u64) -> Result<Labels> {
    Ok(Labels { data: labels, count: array("labels", labels, batch)? })
}
