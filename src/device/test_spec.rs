//! What the devices' own tests ask for.

use super::HeadSpec;
use crate::margin::{Margin, MarginGradient};
use crate::matrix::DType;
use crate::optimizer::{Optimizer, Sgd};
use crate::options::{HeadOptions, Placement, Precision, Residency, RowUpdate};

/// A head of dimension 512 on one rank, with the defaults but for what `change` does.
pub(in crate::device) fn spec(classes: u64, batch: u64, change: impl FnOnce(&mut HeadOptions)) -> HeadSpec {
    let margin =
        Margin { scale: 64.0, m1: 1.0, m2: 0.5, m3: 0.0, interclass_filter: 0.0, gradient: MarginGradient::Exact, guard: false };
    let mut options = HeadOptions {
        num_classes: classes,
        embedding_dim: 512,
        placement: Placement::Sharded,
        sample_rate: 1.0,
        seed: 1,
        max_batch: batch,
        margin,
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
    };
    change(&mut options);
    let shard = options.shard(1, 0);
    HeadSpec { options, ranks: 1, rank: 0, shard, collectives_beside: false, successor: false }
}
