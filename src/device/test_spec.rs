//! What the devices' own tests ask for.

use super::HeadSpec;
use crate::capi::types::{pfc_head_options, Sized64};
use crate::options::HeadOptions;

/// A head of dimension 512 on one rank, with the defaults of the C interface but for what `change` does.
pub(in crate::device) fn spec(classes: u64, batch: u64, change: impl FnOnce(&mut HeadOptions)) -> HeadSpec {
    let defaults = pfc_head_options { num_classes: classes, embedding_dim: 512, max_batch: batch, ..pfc_head_options::defaults() };
    // SAFETY: the default storage_path is NULL.
    let mut options = unsafe { defaults.to_options() }.expect("the defaults");
    change(&mut options);
    let shard = options.shard(1, 0);
    HeadSpec { options, ranks: 1, rank: 0, shard }
}
