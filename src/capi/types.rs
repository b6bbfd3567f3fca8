//! Structs that callers fill: matrices and options.

use std::ffi::c_char;

use super::checkpoint::path;
use super::status::pfc_status;
use super::{boundary, required};
use crate::margin::{Margin, MarginGradient};
use crate::matrix::{DType, Matrix};
use crate::optimizer::{Adamw, Optimizer, Sgd};
use crate::options::{HeadOptions, Placement, Precision, Residency, RowUpdate};
use crate::{ensure, error, Result};

/// 32-bit float.
pub const PFC_F32: i32 = 1;
/// 16-bit float (IEEE half).
pub const PFC_F16: i32 = 2;
/// bfloat16.
pub const PFC_BF16: i32 = 3;
/// 64-bit float; in collectives only.
pub const PFC_F64: i32 = 4;
/// 32-bit signed integer; in collectives only.
pub const PFC_I32: i32 = 5;
/// 64-bit signed integer; in collectives only.
pub const PFC_I64: i32 = 6;

/// Each class center lives on one rank.
pub const PFC_PLACEMENT_SHARDED: i32 = 1;
/// Every rank holds all class centers.
pub const PFC_PLACEMENT_REPLICATED: i32 = 2;

/// The derivative of the margin's formula.
pub const PFC_MARGIN_GRADIENT_EXACT: i32 = 1;
/// 1, as in insightface's arcface_torch: the gradient passes the margin unchanged.
pub const PFC_MARGIN_GRADIENT_STRAIGHT_THROUGH: i32 = 2;

/// The margin's formula everywhere.
pub const PFC_MARGIN_GUARD_OFF: i32 = 1;
/// Where m1 * theta + m2 exceeds pi, the target logit keeps falling instead of rising again.
pub const PFC_MARGIN_GUARD_ON: i32 = 2;

/// m = momentum * m + (g + weight_decay * w); w -= lr * m.
pub const PFC_OPTIMIZER_SGD: i32 = 1;
/// Adam with decoupled weight decay. Bias correction uses the head's count of updates.
pub const PFC_OPTIMIZER_ADAMW: i32 = 2;

/// Only the sampled rows change.
pub const PFC_ROW_UPDATE_LAZY: i32 = 1;
/// All rows also get weight decay and momentum in every update. Rows outside the sample get theirs when they are next sampled or
/// read.
pub const PFC_ROW_UPDATE_DENSE: i32 = 2;

/// The device's own: f32 on the CPU, half on CUDA.
pub const PFC_PRECISION_AUTO: i32 = 1;
/// Products as accurate as float32.
pub const PFC_PRECISION_F32: i32 = 2;
/// 16-bit operands, float32 sums. On the CPU those of the gradients alone, in bfloat16, and on AMX the cosines' in two of them each.
pub const PFC_PRECISION_HALF: i32 = 3;

/// For gather_dtype: f16 where the device computes in half precision, else f32.
pub const PFC_GATHER_AUTO: i32 = 0;

/// W and optimizer state in the device's memory.
pub const PFC_RESIDENCY_DEVICE: i32 = 1;
/// W and optimizer state in host memory: on CUDA page-locked, reached by the kernels. On the CPU the same as device.
pub const PFC_RESIDENCY_HOST: i32 = 2;
/// W and optimizer state in a file of each rank; memory holds the rows of a step. CPU only in this version.
pub const PFC_RESIDENCY_FILE: i32 = 3;

/// All rows have the options' m2 and m3, and weight 1.
pub const PFC_ROW_TERMS_OFF: i32 = 1;
/// A row may have its own m2, m3 and weight.
pub const PFC_ROW_TERMS_ON: i32 = 2;

/// A matrix in the caller's memory, row by row. Borrowed for the call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct pfc_matrix {
    /// First element; may be NULL when rows is 0.
    pub data: *mut std::ffi::c_void,
    /// PFC_F32, PFC_F16 or PFC_BF16.
    pub dtype: i32,
    /// Must be 0.
    pub reserved: u32,
    pub rows: u64,
    pub cols: u64,
    /// Elements from one row to the next, at least cols.
    pub row_stride: u64,
}

/// Options of a head. Fill with pfc_head_options_init, then set at least num_classes and embedding_dim.
///
/// All ranks must give the same values, except for storage_path, storage_cache, workspace_limit and residency.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct pfc_head_options {
    /// sizeof(pfc_head_options), set by pfc_head_options_init.
    pub struct_size: u64,
    /// C: classes over all ranks. When sharded, at least the number of ranks. (default: 0, must be set)
    pub num_classes: u64,
    /// d: elements of an embedding, 1 to 65536; on a CUDA device at most 1024, else UNSUPPORTED. (default: 0, must be set)
    pub embedding_dim: u32,
    /// PFC_PLACEMENT_*. (default: sharded)
    pub placement: i32,
    /// Share of a shard's classes that take part in a step, 0 to 1. Positives always take part. 1: all classes; 0: positives only.
    /// (default: 1)
    pub sample_rate: f64,
    /// Seed of the start values and of the sampling. (default: 0)
    pub seed: u64,
    /// Rows of the largest batch on any rank, to 2^24. 0: the head makes room for larger batches as they come, in the gather of their
    /// labels; on a CUDA device each step then waits for that gather. (default: 0)
    pub max_batch: u64,
    /// Factor of the cosines, above 0 and at most 128. (default: 64)
    pub scale: f64,
    /// Target logit = scale * (cos(m1 * theta + m2) - m3). Above 0, at most 16. (default: 1)
    pub m1: f64,
    /// In radians, 0 to pi. (default: 0.5)
    pub m2: f64,
    /// 0 to 2. (default: 0)
    pub m3: f64,
    /// Inter-class filter: a negative whose cosine is above it counts as cosine 0 and gets no gradient. 0: off. (default: 0)
    pub interclass_filter: f64,
    /// PFC_MARGIN_GRADIENT_*. (default: exact)
    pub margin_gradient: i32,
    /// PFC_MARGIN_GUARD_*. (default: off)
    pub margin_guard: i32,
    /// PFC_OPTIMIZER_*. (default: sgd)
    pub optimizer: i32,
    /// PFC_ROW_UPDATE_*. (default: lazy)
    pub row_update: i32,
    /// SGD: 0 or more, below 1. (default: 0.9)
    pub momentum: f64,
    /// SGD: added to the gradient. AdamW: decoupled. Multiplied by the learning rate in each update. (default: 5e-4)
    pub weight_decay: f64,
    /// AdamW: 0 or more, below 1. (default: 0.9)
    pub beta1: f64,
    /// AdamW: 0 or more, below 1. (default: 0.999)
    pub beta2: f64,
    /// AdamW: 1e-30 to 1e30. (default: 1e-8)
    pub epsilon: f64,
    /// Factor of the embeddings' gradient. A trainer that averages the backbone's gradients over ranks sets the number of ranks.
    /// (default: 1)
    pub gradient_scale: f64,
    /// Standard deviation of the start values of the class centers. (default: 0.01)
    pub init_std: f64,
    /// Rows with this label are ignored and may hold NaN. It must not be a class id. (default: INT64_MIN, none)
    pub ignore_label: i64,
    /// PFC_PRECISION_*. (default: auto)
    pub precision: i32,
    /// The type in which embeddings are sent between ranks: PFC_GATHER_AUTO, PFC_F32, PFC_F16 or PFC_BF16. In f16 each row is
    /// scaled by a power of two so that it cannot overflow or underflow; gradients are not affected. (default: auto)
    pub gather_dtype: i32,
    /// The type W is stored in: PFC_F32 or PFC_BF16, which takes half the memory. Updates are rounded at random there, so that small
    /// ones count; the bits are those of seed, update and class, whatever the ranks and threads. (default: f32)
    pub weight_dtype: i32,
    /// The same of the optimizer state. In bf16 momentum is rounded to nearest, AdamW's second moment at random. (default: f32)
    pub state_dtype: i32,
    /// PFC_RESIDENCY_*: where W and the optimizer state are. No result depends on it, but for roundings of float32 rows on CUDA, which
    /// a matrix product updates in the device's memory. (default: device)
    pub residency: i32,
    /// Must be 0.
    pub reserved: u32,
    /// Bytes of working memory that the head may use beside W and the optimizer state. If the softmax numerators do not fit, they
    /// are computed twice instead of kept. 0: the library decides. (default: 0)
    pub workspace_limit: u64,
    /// For residency file: the directory of the ranks' files, which is made if it is not there; else NULL. A file has its whole size from
    /// the start, serves one head, and is removed with it. Borrowed for the call. (default: NULL)
    pub storage_path: *const c_char,
    /// PFC_ROW_TERMS_*: whether rows may have margins and weights of their own (pfc_head_forward_with). On, each step sends 12 bytes
    /// more for each row of the global batch when sharded, whatever the step uses. (default: off)
    pub row_terms: i32,
    /// Negatives are drawn in runs of as many consecutive classes, so that their rows are read in longer pieces and a CPU draws faster: a
    /// power of two, 1 to 1024. Where a sample has many runs a negative is in it as often as with 1, but always with its run, except for
    /// positives and for the last run, of which a part is drawn. Class ids should not be sorted by likeness. (default: 1)
    pub sample_block: u32,
    /// For residency file: bytes of memory for rows that stay there, the first of each shard. If these are half of them, a step moves half
    /// as many. 0 for other residencies. (default: 0)
    pub storage_cache: u64,
}

/// Scale, margin and filter for functions that need no head. The fields mean what they mean in pfc_head_options.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct pfc_margin {
    /// sizeof(pfc_margin), set by pfc_margin_init.
    pub struct_size: u64,
    /// (default: 64)
    pub scale: f64,
    /// (default: 1)
    pub m1: f64,
    /// (default: 0.5)
    pub m2: f64,
    /// (default: 0)
    pub m3: f64,
    /// (default: 0, off)
    pub interclass_filter: f64,
    /// PFC_MARGIN_GRADIENT_*. (default: exact)
    pub margin_gradient: i32,
    /// PFC_MARGIN_GUARD_*. (default: off)
    pub margin_guard: i32,
}

/// An optimizer for pfc_update_rows. The fields mean what they mean in pfc_head_options.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct pfc_optimizer {
    /// sizeof(pfc_optimizer), set by pfc_optimizer_init.
    pub struct_size: u64,
    /// PFC_OPTIMIZER_*. (default: sgd)
    pub kind: i32,
    /// Must be 0.
    pub reserved: u32,
    /// (default: 0.9)
    pub momentum: f64,
    /// (default: 5e-4)
    pub weight_decay: f64,
    /// (default: 0.9)
    pub beta1: f64,
    /// (default: 0.999)
    pub beta2: f64,
    /// (default: 1e-8)
    pub epsilon: f64,
}

/// A C struct that starts with its size.
///
/// # Safety
/// `repr(C)`, made of plain numbers and pointers (all-zero bytes are a value), the first field a u64 of its size.
pub(super) unsafe trait Sized64: Copy {
    const NAME: &'static str;
    fn defaults() -> Self;
}

macro_rules! sized {
    ($type:ident, $defaults:expr) => {
        // SAFETY: repr(C), numbers and pointers only, struct_size first.
        unsafe impl Sized64 for $type {
            const NAME: &'static str = stringify!($type);
            fn defaults() -> Self {
                $defaults
            }
        }
    };
}
pub(super) use sized;

/// Smallest struct a caller may hand over: its size field.
const SIZE_FIELD: u64 = 8;
/// No options struct will ever be larger; a size beyond it is garbage.
const LARGEST: u64 = 1 << 16;

/// Writes defaults into the first `struct_size` bytes at `out`, and zeros where the caller's struct is longer than ours.
pub(super) unsafe fn init_sized<T: Sized64>(out: *mut T, struct_size: u64) -> Result<()> {
    ensure!(!out.is_null(), InvalidArgument, "{} must not be NULL", T::NAME);
    check_size::<T>(struct_size)?;
    let ours = std::mem::size_of::<T>();
    let mut defaults = T::defaults();
    (&mut defaults as *mut T).cast::<u64>().write(struct_size);
    std::ptr::write_bytes(out.cast::<u8>(), 0, struct_size as usize);
    std::ptr::copy_nonoverlapping((&defaults as *const T).cast::<u8>(), out.cast::<u8>(), ours.min(struct_size as usize));
    Ok(())
}

/// Reads a caller's struct: fields it does not have keep their defaults; a tail we do not know must be zero.
pub(super) unsafe fn read_sized<T: Sized64>(from: *const T) -> Result<T> {
    ensure!(!from.is_null(), InvalidArgument, "{} must not be NULL", T::NAME);
    let struct_size = from.cast::<u64>().read_unaligned();
    check_size::<T>(struct_size)?;
    let (ours, theirs) = (std::mem::size_of::<T>(), struct_size as usize);
    let bytes = from.cast::<u8>();
    if theirs > ours {
        let tail = std::slice::from_raw_parts(bytes.add(ours), theirs - ours);
        if let Some(at) = tail.iter().position(|&b| b != 0) {
            return Err(error!(
                Unsupported,
                "{} has a field at byte {} that this library ({}) does not know: it knows {ours} bytes, and the caller has {theirs}",
                T::NAME,
                ours + at,
                env!("CARGO_PKG_VERSION")
            ));
        }
    }
    let mut value = T::defaults();
    std::ptr::copy_nonoverlapping(bytes, (&mut value as *mut T).cast::<u8>(), ours.min(theirs));
    Ok(value)
}

/// Copies a result into a caller's struct of `struct_size` bytes, which it holds already.
pub(super) unsafe fn write_sized<T: Sized64>(out: *mut T, mut value: T) -> Result<()> {
    ensure!(!out.is_null(), InvalidArgument, "{} must not be NULL", T::NAME);
    let struct_size = out.cast::<u64>().read_unaligned();
    check_size::<T>(struct_size)?;
    (&mut value as *mut T).cast::<u64>().write(struct_size);
    let bytes = std::mem::size_of::<T>().min(struct_size as usize);
    std::ptr::copy_nonoverlapping((&value as *const T).cast::<u8>(), out.cast::<u8>(), bytes);
    Ok(())
}

fn check_size<T: Sized64>(struct_size: u64) -> Result<()> {
    ensure!(
        (SIZE_FIELD..=LARGEST).contains(&struct_size),
        InvalidArgument,
        "{}.struct_size must be {SIZE_FIELD} to {LARGEST}, got {struct_size}: fill the struct with {}_init first",
        T::NAME,
        T::NAME
    );
    Ok(())
}

sized!(
    pfc_head_options,
    pfc_head_options {
        struct_size: 0,
        num_classes: 0,
        embedding_dim: 0,
        placement: PFC_PLACEMENT_SHARDED,
        sample_rate: 1.0,
        seed: 0,
        max_batch: 0,
        scale: 64.0,
        m1: 1.0,
        m2: 0.5,
        m3: 0.0,
        interclass_filter: 0.0,
        margin_gradient: PFC_MARGIN_GRADIENT_EXACT,
        margin_guard: PFC_MARGIN_GUARD_OFF,
        optimizer: PFC_OPTIMIZER_SGD,
        row_update: PFC_ROW_UPDATE_LAZY,
        momentum: 0.9,
        weight_decay: 5e-4,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        gradient_scale: 1.0,
        init_std: 0.01,
        ignore_label: i64::MIN,
        precision: PFC_PRECISION_AUTO,
        gather_dtype: PFC_GATHER_AUTO,
        weight_dtype: PFC_F32,
        state_dtype: PFC_F32,
        residency: PFC_RESIDENCY_DEVICE,
        reserved: 0,
        workspace_limit: 0,
        storage_path: std::ptr::null(),
        row_terms: PFC_ROW_TERMS_OFF,
        sample_block: 1,
        storage_cache: 0,
    }
);

sized!(pfc_margin, {
    let head = pfc_head_options::defaults();
    pfc_margin {
        struct_size: 0,
        scale: head.scale,
        m1: head.m1,
        m2: head.m2,
        m3: head.m3,
        interclass_filter: head.interclass_filter,
        margin_gradient: head.margin_gradient,
        margin_guard: head.margin_guard,
    }
});

sized!(pfc_optimizer, {
    let head = pfc_head_options::defaults();
    pfc_optimizer {
        struct_size: 0,
        kind: head.optimizer,
        reserved: 0,
        momentum: head.momentum,
        weight_decay: head.weight_decay,
        beta1: head.beta1,
        beta2: head.beta2,
        epsilon: head.epsilon,
    }
});

/// Fills options with defaults. For FFI users, who cannot call the header's inline function pfc_head_options_init.
///
/// @param options written: `struct_size` bytes
/// @param struct_size the caller's sizeof(pfc_head_options)
#[no_mangle]
pub unsafe extern "C" fn pfc_head_options_init_sized(options: *mut pfc_head_options, struct_size: u64) -> pfc_status {
    boundary(|| init_sized(options, struct_size))
}

/// Fills a margin with defaults; see pfc_head_options_init_sized.
#[no_mangle]
pub unsafe extern "C" fn pfc_margin_init_sized(margin: *mut pfc_margin, struct_size: u64) -> pfc_status {
    boundary(|| init_sized(margin, struct_size))
}

/// Fills an optimizer with defaults; see pfc_head_options_init_sized.
#[no_mangle]
pub unsafe extern "C" fn pfc_optimizer_init_sized(optimizer: *mut pfc_optimizer, struct_size: u64) -> pfc_status {
    boundary(|| init_sized(optimizer, struct_size))
}

/// One of an option's constants, or an error that lists them.
fn choose<T: Copy>(field: &str, code: i32, choices: &[(i32, T)]) -> Result<T> {
    choices.iter().find(|choice| choice.0 == code).map(|choice| choice.1).ok_or_else(|| {
        let known: Vec<String> = choices.iter().map(|choice| choice.0.to_string()).collect();
        error!(InvalidArgument, "{field} must be one of {}, got {code}", known.join(", "))
    })
}

impl pfc_margin {
    pub(super) fn to_margin(self) -> Result<Margin> {
        Ok(Margin {
            scale: self.scale,
            m1: self.m1,
            m2: self.m2,
            m3: self.m3,
            interclass_filter: self.interclass_filter,
            gradient: choose(
                "margin_gradient",
                self.margin_gradient,
                &[
                    (PFC_MARGIN_GRADIENT_EXACT, MarginGradient::Exact),
                    (PFC_MARGIN_GRADIENT_STRAIGHT_THROUGH, MarginGradient::StraightThrough),
                ],
            )?,
            guard: choose("margin_guard", self.margin_guard, &[(PFC_MARGIN_GUARD_OFF, false), (PFC_MARGIN_GUARD_ON, true)])?,
        })
    }
}

impl pfc_optimizer {
    pub(super) fn to_optimizer(self) -> Result<Optimizer> {
        choose(
            "optimizer",
            self.kind,
            &[
                (PFC_OPTIMIZER_SGD, Optimizer::Sgd(Sgd { momentum: self.momentum, weight_decay: self.weight_decay })),
                (
                    PFC_OPTIMIZER_ADAMW,
                    Optimizer::Adamw(Adamw {
                        beta1: self.beta1,
                        beta2: self.beta2,
                        epsilon: self.epsilon,
                        weight_decay: self.weight_decay,
                    }),
                ),
            ],
        )
    }
}

impl pfc_head_options {
    /// The options as the library holds them. What no option can mean is refused here, what no head can be by `HeadOptions::check`.
    ///
    /// # Safety
    /// storage_path is NULL or a string.
    pub(super) unsafe fn to_options(self) -> Result<HeadOptions> {
        let margin = pfc_margin {
            struct_size: 0,
            scale: self.scale,
            m1: self.m1,
            m2: self.m2,
            m3: self.m3,
            interclass_filter: self.interclass_filter,
            margin_gradient: self.margin_gradient,
            margin_guard: self.margin_guard,
        };
        let optimizer = pfc_optimizer {
            struct_size: 0,
            kind: self.optimizer,
            reserved: 0,
            momentum: self.momentum,
            weight_decay: self.weight_decay,
            beta1: self.beta1,
            beta2: self.beta2,
            epsilon: self.epsilon,
        };
        let storage =
            |field: &str, code: i32| choose(field, code, &[(PFC_F32, DType::F32), (PFC_F16, DType::F16), (PFC_BF16, DType::Bf16)]);
        ensure!(self.reserved == 0, InvalidArgument, "reserved must be 0, got {}", self.reserved);
        Ok(HeadOptions {
            num_classes: self.num_classes,
            embedding_dim: self.embedding_dim,
            placement: choose(
                "placement",
                self.placement,
                &[(PFC_PLACEMENT_SHARDED, Placement::Sharded), (PFC_PLACEMENT_REPLICATED, Placement::Replicated)],
            )?,
            sample_rate: self.sample_rate,
            seed: self.seed,
            max_batch: self.max_batch,
            margin: margin.to_margin()?,
            row_update: choose(
                "row_update",
                self.row_update,
                &[(PFC_ROW_UPDATE_LAZY, RowUpdate::Lazy), (PFC_ROW_UPDATE_DENSE, RowUpdate::Dense)],
            )?,
            optimizer: optimizer.to_optimizer()?,
            gradient_scale: self.gradient_scale,
            init_std: self.init_std,
            ignore_label: (self.ignore_label != i64::MIN).then_some(self.ignore_label),
            precision: choose(
                "precision",
                self.precision,
                &[
                    (PFC_PRECISION_AUTO, Precision::Auto),
                    (PFC_PRECISION_F32, Precision::F32),
                    (PFC_PRECISION_HALF, Precision::Half),
                ],
            )?,
            gather_dtype: choose(
                "gather_dtype",
                self.gather_dtype,
                &[(PFC_GATHER_AUTO, None), (PFC_F32, Some(DType::F32)), (PFC_F16, Some(DType::F16)), (PFC_BF16, Some(DType::Bf16))],
            )?,
            weight_dtype: storage("weight_dtype", self.weight_dtype)?,
            state_dtype: storage("state_dtype", self.state_dtype)?,
            row_terms: choose("row_terms", self.row_terms, &[(PFC_ROW_TERMS_OFF, false), (PFC_ROW_TERMS_ON, true)])?,
            residency: self.residency()?,
            sample_block: self.sample_block,
            workspace_limit: self.workspace_limit,
        })
    }

    /// # Safety
    /// As `to_options`.
    unsafe fn residency(&self) -> Result<Residency> {
        let codes = [PFC_RESIDENCY_DEVICE, PFC_RESIDENCY_HOST, PFC_RESIDENCY_FILE].map(|code| (code, code));
        let residency = match choose("residency", self.residency, &codes)? {
            PFC_RESIDENCY_FILE => {
                let directory = path("storage_path", self.storage_path)?.to_owned();
                return Ok(Residency::File { directory, cache: self.storage_cache });
            }
            PFC_RESIDENCY_HOST => Residency::Host,
            _ => Residency::Device,
        };
        let unused = self.storage_path.is_null();
        ensure!(unused, InvalidArgument, "storage_path must be NULL unless residency is PFC_RESIDENCY_FILE (3)");
        let cache = self.storage_cache;
        ensure!(cache == 0, InvalidArgument, "storage_cache must be 0 unless residency is PFC_RESIDENCY_FILE (3), got {cache}");
        Ok(residency)
    }
}

/// A matrix argument: its pointer, element type and shape checked against `cols`.
pub(super) unsafe fn matrix(name: &str, matrix: *const pfc_matrix, cols: u64) -> Result<Matrix> {
    let m = *required(name, matrix)?;
    let dtype = DType::from_code(m.dtype)
        .ok_or_else(|| error!(InvalidArgument, "{name}.dtype must be PFC_F32 (1), PFC_F16 (2) or PFC_BF16 (3), got {}", m.dtype))?;
    ensure!(m.reserved == 0, InvalidArgument, "{name}.reserved must be 0, got {}", m.reserved);
    let view =
        Matrix { data: m.data.cast(), dtype, rows: m.rows as usize, cols: m.cols as usize, row_stride: m.row_stride as usize };
    view.check(name, cols as usize)?;
    Ok(view)
}
