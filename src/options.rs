//! What a head is asked to be: options, their defaults and their limits.

use std::path::PathBuf;

use crate::agreement::Field;
use crate::margin::Margin;
use crate::matrix::DType;
use crate::optimizer::{Optimizer, StateTensor};
use crate::shard::Shard;
use crate::{ensure, Result};

/// Where a class center lives: on one rank (sharded) or on all (replicated).
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

/// Where the rows are: W and the optimizer's state.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Residency {
    /// In the device's memory.
    Device,
    /// In host memory.
    Host,
    /// In a file of each rank in this directory. Memory has those of a step, and the first ones of the shard that fit `cache` bytes.
    File { directory: PathBuf, cache: u64 },
}

impl Residency {
    pub(crate) fn is_file(&self) -> bool {
        matches!(self, Residency::File { .. })
    }
}

/// The options of a head, in the field's units; `pfc_head_options` documents each.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadOptions {
    pub num_classes: u64,
    pub embedding_dim: u32,
    pub placement: Placement,
    pub sample_rate: f64,
    pub seed: u64,
    /// 0: as large as the batches that come.
    pub max_batch: u64,
    pub margin: Margin,
    pub row_update: RowUpdate,
    pub optimizer: Optimizer,
    pub gradient_scale: f64,
    pub init_std: f64,
    pub ignore_label: Option<i64>,
    pub precision: Precision,
    /// None: f16 where the device computes in half precision, else f32.
    pub gather_dtype: Option<DType>,
    /// The type W is stored in: f32 or bf16.
    pub weight_dtype: DType,
    /// The same of the optimizer's state.
    pub state_dtype: DType,
    /// May differ between ranks.
    pub residency: Residency,
    /// Negatives are drawn in runs of as many classes: [`crate::sample`].
    pub sample_block: u32,
    /// Rows may have margins and weights of their own: [`crate::row_terms`].
    pub row_terms: bool,
    /// Bytes, 0: the library decides. May differ between ranks.
    pub workspace_limit: u64,
}

/// No rank's batch is larger: rows of a global batch are numbered in 32 bits.
const LARGEST_BATCH: u64 = 1 << 24;
/// A head without `max_batch` makes room for a multiple of it.
const BATCH_STEP: u64 = 8;
const LARGEST_SAMPLE_BLOCK: u32 = 1024;
pub(crate) const LARGEST_DIM: u32 = 1 << 16;

impl HeadOptions {
    /// Refuses what no head can be, naming the option and its value.
    pub fn check(&self, ranks: u32) -> Result<()> {
        ensure!(self.num_classes > 0, InvalidArgument, "num_classes must be at least 1, got 0");
        ensure!(
            self.num_classes <= i64::MAX as u64,
            InvalidArgument,
            "num_classes must be at most INT64_MAX, got {}",
            self.num_classes
        );
        ensure!(
            self.placement == Placement::Replicated || self.num_classes >= ranks.into(),
            InvalidArgument,
            "num_classes must be at least {ranks}, the ranks that share it, got {}",
            self.num_classes
        );
        ensure!(
            (1..=LARGEST_DIM).contains(&self.embedding_dim),
            InvalidArgument,
            "embedding_dim must be 1 to {LARGEST_DIM}, got {}",
            self.embedding_dim
        );
        within("sample_rate", self.sample_rate, 0.0, 1.0)?;
        ensure!(
            self.sample_block.is_power_of_two() && self.sample_block <= LARGEST_SAMPLE_BLOCK,
            InvalidArgument,
            "sample_block must be a power of two, 1 to {LARGEST_SAMPLE_BLOCK}, got {}",
            self.sample_block
        );
        ensure!(self.max_batch <= LARGEST_BATCH, InvalidArgument, "max_batch must be 0 to {LARGEST_BATCH}, got {}", self.max_batch);
        ensure!(
            u64::from(ranks) * self.max_batch <= u32::MAX.into(),
            InvalidArgument,
            "max_batch times ranks must be at most {}, got {} times {ranks}",
            u32::MAX,
            self.max_batch
        );
        let rows = self.shard(ranks, 0).rows;
        ensure!(
            rows <= u32::MAX.into(),
            InvalidArgument,
            "num_classes must be at most {} on each of {ranks} ranks, got {}, which is {rows} on each",
            u32::MAX,
            self.num_classes
        );
        for (name, dtype) in [("weight_dtype", self.weight_dtype), ("state_dtype", self.state_dtype)] {
            ensure!(
                matches!(dtype, DType::F32 | DType::Bf16),
                Unsupported,
                "{name} must be f32 or bf16 in this version, got {}",
                dtype.name()
            );
        }
        self.margin.check()?;
        self.optimizer.check()?;
        ensure!(
            self.gradient_scale.is_finite() && self.gradient_scale > 0.0,
            InvalidArgument,
            "gradient_scale must be finite and above 0, got {:?}",
            self.gradient_scale
        );
        let std = self.init_std;
        // Normal numbers of 53 bits reach 8.6 standard deviations.
        ensure!((0.0..=1e37).contains(&std), InvalidArgument, "init_std must be 0 to 1e37, got {std:?}");
        if let Some(label) = self.ignore_label {
            ensure!(
                label < 0 || label as u64 >= self.num_classes,
                InvalidArgument,
                "ignore_label must not be one of the {} classes, got {label}",
                self.num_classes
            );
        }
        Ok(())
    }

    /// The type that a tensor of rows is stored in.
    pub(crate) fn stored_dtype(&self, tensor: StateTensor) -> DType {
        match tensor {
            StateTensor::Centers => self.weight_dtype,
            StateTensor::Momentum | StateTensor::SecondMoment => self.state_dtype,
        }
    }

    /// Whether the head makes room for larger batches as they come.
    pub(crate) fn grows(&self) -> bool {
        self.max_batch == 0
    }

    /// Rows of the largest batch that a rank may bring.
    pub(crate) fn largest_batch(&self, ranks: u32) -> u64 {
        match self.max_batch {
            0 => LARGEST_BATCH.min(u64::from(u32::MAX / ranks.max(1))),
            rows => rows,
        }
    }

    /// Rows that a head makes room for where batches of as many come: the same on all ranks.
    pub(crate) fn batch_room(&self, rows: u64, ranks: u32) -> u64 {
        match self.max_batch {
            0 => rows.clamp(1, self.largest_batch(ranks)).next_multiple_of(BATCH_STEP).min(self.largest_batch(ranks)),
            rows => rows,
        }
    }

    /// The type embeddings travel in, on a device whose `auto` precision is this one.
    ///
    /// Unless it is chosen it is what the products make of them anyhow: f16 where they take 16-bit operands.
    pub(crate) fn gathered_dtype(&self, auto: Precision) -> DType {
        let precision = if self.precision == Precision::Auto { auto } else { self.precision };
        self.gather_dtype.unwrap_or(if precision == Precision::Half { DType::F16 } else { DType::F32 })
    }

    /// The range of classes of a rank.
    pub fn shard(&self, ranks: u32, rank: u32) -> Shard {
        match self.placement {
            Placement::Sharded => Shard::of(self.num_classes, ranks.into(), rank.into()),
            Placement::Replicated => Shard::whole(self.num_classes),
        }
    }

    /// What all ranks must have alike, in the order of `pfc_head_options`; `auto`: the precision that the rank's device takes for it.
    pub(crate) fn fields(&self, auto: Precision) -> [Field; FIELDS] {
        let margin = self.margin;
        let (kind, values) = match self.optimizer {
            Optimizer::Sgd(sgd) => (1, [sgd.momentum, sgd.weight_decay, 0.0, 0.0, 0.0]),
            Optimizer::Adamw(adamw) => (2, [0.0, adamw.weight_decay, adamw.beta1, adamw.beta2, adamw.epsilon]),
        };
        [
            Field::int("num_classes", self.num_classes),
            Field::int("embedding_dim", self.embedding_dim.into()),
            Field::int("placement", self.placement as u64),
            Field::float("sample_rate", self.sample_rate),
            Field::int("seed", self.seed),
            Field::int("max_batch", self.max_batch),
            Field::float("scale", margin.scale),
            Field::float("m1", margin.m1),
            Field::float("m2", margin.m2),
            Field::float("m3", margin.m3),
            Field::float("interclass_filter", margin.interclass_filter),
            Field::int("margin_gradient", margin.gradient as u64),
            Field::int("margin_guard", 1 + u64::from(margin.guard)),
            Field::int("optimizer", kind),
            Field::int("row_update", self.row_update as u64),
            Field::float("momentum", values[0]),
            Field::float("weight_decay", values[1]),
            Field::float("beta1", values[2]),
            Field::float("beta2", values[3]),
            Field::float("epsilon", values[4]),
            Field::float("gradient_scale", self.gradient_scale),
            Field::float("init_std", self.init_std),
            Field::signed("ignore_label", self.ignore_label.unwrap_or(i64::MIN)),
            Field::int("precision", self.precision as u64),
            Field::int("gather_dtype", self.gathered_dtype(auto) as u64),
            Field::int("weight_dtype", self.weight_dtype as u64),
            Field::int("state_dtype", self.state_dtype as u64),
            Field::int("row_terms", 1 + u64::from(self.row_terms)),
            Field::int("sample_block", self.sample_block.into()),
        ]
    }
}

/// How many fields `HeadOptions::fields` gives: the handshake's block must not depend on whether a rank has options at all.
pub(crate) const FIELDS: usize = 29;

fn within(name: &str, value: f64, low: f64, high: f64) -> Result<()> {
    // A NaN is in no range.
    ensure!(value >= low && value <= high, InvalidArgument, "{name} must be {low} to {high}, got {value:?}");
    Ok(())
}
