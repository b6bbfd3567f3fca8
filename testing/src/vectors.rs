//! The conformance vectors beside testing/vectors/README.md.

use std::collections::HashMap;
use std::path::PathBuf;

use partialfc::margin::{Margin, MarginGradient};
use partialfc::matrix::DType;
use partialfc::optimizer::{Adamw, Optimizer, Sgd};
use partialfc::options::{HeadOptions, Placement, Precision, Residency, RowUpdate};
use safetensors::{Dtype, SafeTensors};

pub const NAMES: [&str; 8] = [
    "arcface_adamw_two_ranks",
    "arcface_filter_two_ranks_dense_rows",
    "arcface_one_rank_d512_tenth",
    "arcface_one_rank_full",
    "arcface_two_ranks_uneven_half",
    "combined_two_ranks_positives_only",
    "cosface_four_ranks_tenth",
    "sphereface_one_rank",
];

/// Beneath the working folder, which cargo makes the package's: no path is compiled in, so that test programs run where they were not
/// built.
pub const FOLDER: &str = "testing/vectors";

/// One file: a training run and what the reference implementation made of it.
pub struct Vectors {
    pub name: &'static str,
    bytes: Vec<u8>,
    settings: HashMap<String, String>,
}

/// A rank's part of a step, as the file has it.
pub struct RankStep {
    pub embeddings: Vec<f32>,
    pub labels: Vec<i64>,
    pub sample: Vec<i64>,
    pub loss: f64,
    pub embedding_grad: Vec<f32>,
    pub center_grad: Vec<f32>,
}

impl Vectors {
    pub fn load(name: &'static str) -> Vectors {
        let path = PathBuf::from(format!("{FOLDER}/{name}.safetensors"));
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let (_, metadata) = SafeTensors::read_metadata(&bytes).expect("a safetensors header");
        let settings = metadata.metadata().clone().expect("settings in the metadata");
        Vectors { name, bytes, settings }
    }

    pub fn text(&self, key: &str) -> &str {
        self.settings.get(key).unwrap_or_else(|| panic!("{}: no setting {key}", self.name))
    }

    pub fn number(&self, key: &str) -> f64 {
        self.text(key).parse().unwrap_or_else(|e| panic!("{}: {key} is {}: {e}", self.name, self.text(key)))
    }

    pub fn ranks(&self) -> usize {
        self.number("ranks") as usize
    }

    pub fn steps(&self) -> usize {
        self.number("steps") as usize
    }

    /// `rank{rank}.{name}`, f32.
    pub fn rows(&self, rank: usize, name: &str) -> Vec<f32> {
        self.tensor(&format!("rank{rank}.{name}"), Dtype::F32, f32::from_le_bytes)
    }

    /// The same over all ranks, in shard order.
    pub fn all_rows(&self, name: &str) -> Vec<f32> {
        (0..self.ranks()).flat_map(|rank| self.rows(rank, name)).collect()
    }

    pub fn step(&self, rank: usize, step: usize) -> RankStep {
        let key = |name: &str| format!("rank{rank}.step{step}.{name}");
        RankStep {
            embeddings: self.rows(rank, &format!("step{step}.embeddings")),
            labels: self.tensor(&key("labels"), Dtype::I64, i64::from_le_bytes),
            sample: self.tensor(&key("sample"), Dtype::I64, i64::from_le_bytes),
            loss: self.tensor(&key("loss"), Dtype::F64, f64::from_le_bytes)[0],
            embedding_grad: self.rows(rank, &format!("step{step}.embedding_grad")),
            center_grad: self.rows(rank, &format!("step{step}.center_grad")),
        }
    }

    pub fn options(&self) -> HeadOptions {
        let weight_decay = self.number("wd");
        HeadOptions {
            num_classes: self.number("classes") as u64,
            embedding_dim: self.number("dim") as u32,
            placement: Placement::Sharded,
            sample_rate: self.number("rate"),
            seed: 0,
            max_batch: self.number("batch") as u64,
            margin: Margin {
                scale: self.number("scale"),
                m1: self.number("m1"),
                m2: self.number("m2"),
                m3: self.number("m3"),
                interclass_filter: self.number("filt"),
                gradient: match self.text("gradient") {
                    "exact" => MarginGradient::Exact,
                    "straight_through" => MarginGradient::StraightThrough,
                    other => panic!("gradient {other}"),
                },
                guard: false,
            },
            row_update: match self.text("rows") {
                "lazy" => RowUpdate::Lazy,
                "dense" => RowUpdate::Dense,
                other => panic!("rows {other}"),
            },
            optimizer: match self.text("opt") {
                "sgd" => Optimizer::Sgd(Sgd { momentum: self.number("momentum"), weight_decay }),
                "adamw" => Optimizer::Adamw(Adamw {
                    beta1: self.number("beta1"),
                    beta2: self.number("beta2"),
                    epsilon: self.number("eps"),
                    weight_decay,
                }),
                other => panic!("opt {other}"),
            },
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

    fn tensor<T, const N: usize>(&self, key: &str, dtype: Dtype, read: impl Fn([u8; N]) -> T) -> Vec<T> {
        let file = SafeTensors::deserialize(&self.bytes).expect("checked when loaded");
        let view = file.tensor(key).unwrap_or_else(|e| panic!("{}: {key}: {e}", self.name));
        assert_eq!(view.dtype(), dtype, "{}: {key}", self.name);
        view.data().chunks_exact(N).map(|bytes| read(bytes.try_into().expect("chunks of N"))).collect()
    }
}
