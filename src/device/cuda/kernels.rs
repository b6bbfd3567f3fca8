//! The kernels that are no products, with the arguments that each takes after the head's view.

use std::ffi::c_void;
use std::sync::Arc;

use super::driver::{Context, Kernel, Module};
use super::images::Images;
use super::memory::RankPointers;
use super::shared_structs::{HeadArrays, MatrixView, Rule};
use crate::Result;

type Address = *mut c_void;

/// Threads of a block of the row-wise kernels, and of those that one block runs alone.
pub(super) const BLOCK: u32 = 256;
pub(super) const ALONE: u32 = 1024;
/// Dynamic shared memory: of a sum or a scan over a block's warps, and a flag; of the draw's bins.
pub(super) const PARTS: u32 = 272;
pub(super) const HISTOGRAM: u32 = 8192;

macro_rules! kernels {
    ($($source:literal { $($kernel:ident ( $($argument:ty),* );)* })*) => {
        pub(super) struct Kernels {
            $($(pub $kernel: Kernel<(HeadArrays, $($argument,)*)>,)*)*
            pub reduce_ranks: Kernel<(RankPointers, RankPointers, u64, u64, i32, i32, u32)>,
        }

        impl Kernels {
            /// Loads every image and looks its kernels up.
            pub fn load(context: &Arc<Context>, images: &Images) -> Result<Kernels> {
                $(
                    let module = Module::load(context, $source, images.of($source)?)?;
                    $(let $kernel = module.kernel(stringify!($kernel))?;)*
                )*
                let module = Module::load(context, "collective", images.of("collective")?)?;
                Ok(Kernels { $($($kernel,)*)* reduce_ranks: module.kernel("reduce_ranks")? })
            }
        }
    };
}

kernels! {
    "labels" {
        pack_labels(u64, u64, i32, u64, Address);
        judge_labels();
        spread_labels();
        sort_labels_count(u32, u32);
        sort_labels_scan();
        sort_labels_scatter(u32, u32);
        find_positives_count();
        find_positives_scan();
        find_positives_scatter();
    }
    "sample" {
        mark_positives();
        mark_chosen(Address, u32);
        key_histogram(u32);
        pick_threshold(u32);
        mark_below();
        mark_ties_scan();
        mark_ties();
        list_sample_count();
        list_sample_scan();
        list_sample_scatter();
        list_whole();
        find_target_columns();
    }
    "embeddings" {
        pack_embeddings(MatrixView, u64);
        normalize_embeddings(MatrixView);
        judge_embeddings();
        find_targets(MatrixView);
    }
    "start" {
        start_values(f64);
    }
    "centers" {
        gather_centers(u32);
        read_rows(i32, u32, MatrixView);
        write_rows(i32, u32, MatrixView);
        catch_up_rows(u64);
    }
    "loss" {
        reduce_rows();
        pack_sums(i32, i32, u64);
        judge_sums(Address);
        scale_embeddings();
    }
    "gradient" {
        embedding_gradient();
        finish_gradient(f64, MatrixView);
        sum_squares(i32);
    }
    "update" {
        begin_update(f64);
        update_rows(u32, u32);
        advance_history();
        end_update();
    }
    "stateless" {
        normalize_matrix(MatrixView, MatrixView, Address);
        write_unit_operands(MatrixView, u64, u32, i32);
        margin_forward(Address, u64, Address);
        margin_backward(Address, Address, u64, Address);
        partial_softmax(MatrixView, Address, Address);
        update_given_rows(MatrixView, MatrixView, MatrixView, Address, MatrixView, Rule);
        write_ids(Address);
    }
    "fused" {
        find_given_targets(MatrixView, MatrixView);
        add_row_sums(u32, i32, Address);
        write_weighted_centers(MatrixView);
        weigh_rows(Address, Address);
        finish_given_rows(MatrixView, MatrixView, f64, MatrixView);
        write_center_rows(u64, u32, MatrixView, MatrixView);
    }
    "nearest" {
        keep_nearest(MatrixView, u32, u32, u32, Address);
        merge_nearest(u64, u32, u32, Address, Address, Address);
    }
}
