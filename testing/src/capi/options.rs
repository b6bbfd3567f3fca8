//! A head's options, as the library holds them and as C does.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;

use partialfc::capi::types::{self as c_types, pfc_head_options};
use partialfc::margin::{Margin, MarginGradient};
use partialfc::matrix::DType;
use partialfc::optimizer::{Optimizer, Sgd};
use partialfc::options::{HeadOptions, Placement, Precision, Residency, RowUpdate};

use super::outcome;

/// Defaults, and the three fields that have none.
pub fn head_options(classes: u64, dim: u32, max_batch: u64) -> pfc_head_options {
    // SAFETY: all zeros is a value of it; the size is its own.
    unsafe {
        let mut options: pfc_head_options = std::mem::zeroed();
        outcome(c_types::pfc_head_options_init_sized(&mut options, std::mem::size_of::<pfc_head_options>() as u64))
            .expect("defaults");
        (options.num_classes, options.embedding_dim, options.max_batch) = (classes, dim, max_batch);
        options
    }
}

/// The defaults as the library holds them: what several threads may share, and the reference head takes.
pub fn options(classes: u64, dim: u32, max_batch: u64) -> HeadOptions {
    let c = head_options(classes, dim, max_batch);
    HeadOptions {
        num_classes: classes,
        embedding_dim: dim,
        placement: Placement::Sharded,
        sample_rate: c.sample_rate,
        seed: c.seed,
        max_batch,
        margin: Margin {
            scale: c.scale,
            m1: c.m1,
            m2: c.m2,
            m3: c.m3,
            interclass_filter: c.interclass_filter,
            gradient: MarginGradient::Exact,
            guard: false,
        },
        row_update: RowUpdate::Lazy,
        optimizer: Optimizer::Sgd(Sgd { momentum: c.momentum, weight_decay: c.weight_decay }),
        gradient_scale: c.gradient_scale,
        init_std: c.init_std,
        ignore_label: None,
        precision: Precision::Auto,
        gather_dtype: None,
        row_terms: false,
        weight_dtype: DType::F32,
        state_dtype: DType::F32,
        sample_block: c.sample_block,
        residency: Residency::Device,
        workspace_limit: c.workspace_limit,
    }
}

/// The same options in the C struct, so that the reference head and the library get one and the same.
pub fn to_c(options: &HeadOptions) -> pfc_head_options {
    let mut c = head_options(options.num_classes, options.embedding_dim, options.max_batch);
    c.placement = options.placement as i32;
    c.sample_rate = options.sample_rate;
    c.seed = options.seed;
    c.scale = options.margin.scale;
    (c.m1, c.m2, c.m3) = (options.margin.m1, options.margin.m2, options.margin.m3);
    c.interclass_filter = options.margin.interclass_filter;
    c.margin_gradient = match options.margin.gradient {
        MarginGradient::Exact => c_types::PFC_MARGIN_GRADIENT_EXACT,
        MarginGradient::StraightThrough => c_types::PFC_MARGIN_GRADIENT_STRAIGHT_THROUGH,
    };
    c.margin_guard = if options.margin.guard { c_types::PFC_MARGIN_GUARD_ON } else { c_types::PFC_MARGIN_GUARD_OFF };
    c.row_update = match options.row_update {
        RowUpdate::Lazy => c_types::PFC_ROW_UPDATE_LAZY,
        RowUpdate::Dense => c_types::PFC_ROW_UPDATE_DENSE,
    };
    match options.optimizer {
        Optimizer::Sgd(sgd) => {
            c.optimizer = c_types::PFC_OPTIMIZER_SGD;
            (c.momentum, c.weight_decay) = (sgd.momentum, sgd.weight_decay);
        }
        Optimizer::Adamw(adamw) => {
            c.optimizer = c_types::PFC_OPTIMIZER_ADAMW;
            (c.beta1, c.beta2, c.epsilon) = (adamw.beta1, adamw.beta2, adamw.epsilon);
            c.weight_decay = adamw.weight_decay;
        }
    }
    c.gradient_scale = options.gradient_scale;
    c.init_std = options.init_std;
    c.ignore_label = options.ignore_label.unwrap_or(i64::MIN);
    c.precision = options.precision as i32;
    c.gather_dtype = options.gather_dtype.map_or(c_types::PFC_GATHER_AUTO, |dtype| dtype as i32);
    (c.weight_dtype, c.state_dtype) = (options.weight_dtype as i32, options.state_dtype as i32);
    c.row_terms = if options.row_terms { c_types::PFC_ROW_TERMS_ON } else { c_types::PFC_ROW_TERMS_OFF };
    c.residency = match &options.residency {
        Residency::Device => c_types::PFC_RESIDENCY_DEVICE,
        Residency::Host => c_types::PFC_RESIDENCY_HOST,
        Residency::File { directory, cache } => {
            // The struct is a copy that anyone may keep: the path lives as long as the tests.
            let directory = CString::new(directory.as_os_str().as_bytes()).expect("a path");
            c.storage_path = directory.into_raw();
            c.storage_cache = *cache;
            c_types::PFC_RESIDENCY_FILE
        }
    };
    c.sample_block = options.sample_block;
    c.workspace_limit = options.workspace_limit;
    c
}
