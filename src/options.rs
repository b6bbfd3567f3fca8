//! What a head is asked to be: options, their defaults and their limits.

use crate::margin::{Margin, MarginGradient};
use crate::matrix::DType;
use crate::optimizer::{Adamw, Optimizer, Sgd};
use crate::{ensure, Result};

/// Where a class centre lives: on one rank (sharded) or on all (replicated).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum Placement {
    Sharded = 1,
    Replicated = 2,
}

/// Which rows of W an update moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum RowUpdate {
    /// Only the sampled rows.
    Lazy = 1,
    /// All rows: the others by weight decay and momentum, replayed when next touched.
    Dense = 2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum Precision {
    Auto = 1,
    F32 = 2,
    Half = 3,
}

/// The options of a head, in the field's units; `pfc_head_options` documents each.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadOptions {
    pub num_classes: u64,
    pub embedding_dim: u32,
    pub placement: Placement,
    pub sample_rate: f64,
    pub seed: u64,
    pub max_batch: u64,
    pub margin: Margin,
    pub row_update: RowUpdate,
    pub optimizer: Optimizer,
    pub gradient_scale: f64,
    pub init_std: f64,
    pub ignore_label: Option<i64>,
    pub precision: Precision,
    /// None: the operand type of the device's GEMM.
    pub gather_dtype: Option<DType>,
    /// Bytes, 0: the library decides. May differ between ranks.
    pub workspace_limit: u64,
}
