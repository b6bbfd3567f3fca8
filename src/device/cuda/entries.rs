//! The kernels that are no products: each with the arguments that it takes after the head's arrays, and with the launch shape that
//! its source declares.

use std::ffi::c_void;
use std::sync::Arc;

use super::driver::{Arguments, Context, Grid, Kernel, Module, Stream};
use super::images::Images;
use super::shared_structs::{Accumulated, HeadArrays, LabelHeader, MatrixView, RankPointers, Rule};
use crate::Result;

type Address = *mut c_void;

/// The number of blocks of a launch.
#[derive(Clone, Copy)]
enum Blocks {
    Fixed(u32),
    PerMultiprocessor(u32),
}

/// A `// launch:` line of a kernel source.
#[derive(Clone, Copy)]
struct LaunchShape {
    blocks: Blocks,
    threads: u32,
    shared: u32,
}

/// The launch shape of each kernel, by its name; build/kernels.rs reads them from the sources.
#[allow(non_upper_case_globals)]
mod launches {
    use super::{Blocks, LaunchShape};

    include!(concat!(env!("OUT_DIR"), "/launches.rs"));
}

/// kernels/labels.cu: labels that one CTA sorts, eight a thread.
pub(super) const SMALL_SORT_ROWS: u64 = 8 * launches::sort_labels.threads as u64;

/// A kernel with its launch shape on this GPU.
pub(super) struct Entry<A> {
    kernel: Kernel<A>,
    grid: Grid,
}

impl<A: Arguments> Entry<A> {
    fn load(module: &Arc<Module>, name: &str, shape: LaunchShape, multiprocessors: u32) -> Result<Entry<A>> {
        let blocks = match shape.blocks {
            Blocks::Fixed(blocks) => blocks,
            Blocks::PerMultiprocessor(blocks) => blocks * multiprocessors,
        };
        let LaunchShape { threads, shared, .. } = shape;
        Ok(Entry { kernel: module.kernel(name)?, grid: Grid { blocks, threads, shared } })
    }

    /// Warps of a launch.
    pub fn warps(&self) -> u32 {
        self.grid.blocks * (self.grid.threads / 32)
    }

    /// # Safety
    /// As [`Kernel::launch`].
    pub unsafe fn launch(&self, stream: &Stream, arguments: A) -> Result<()> {
        self.kernel.launch(stream, self.grid, arguments)
    }
}

macro_rules! entries {
    ($($source:literal { $($entry:ident ( $($argument:ty),* );)* })*) => {
        pub(super) struct Entries {
            $($(pub $entry: Entry<(HeadArrays, $($argument,)*)>,)*)*
            pub reduce_ranks: Entry<(RankPointers, RankPointers, u64, u64, i32, i32, u32)>,
        }

        impl Entries {
            /// Loads every image and looks its kernels up.
            pub fn load(context: &Arc<Context>, images: &Images, multiprocessors: u32) -> Result<Entries> {
                $(
                    let module = Module::load(context, $source, images.of($source)?)?;
                    $(let $entry = Entry::load(&module, stringify!($entry), launches::$entry, multiprocessors)?;)*
                )*
                let module = Module::load(context, "collective", images.of("collective")?)?;
                let reduce_ranks = Entry::load(&module, "reduce_ranks", launches::reduce_ranks, multiprocessors)?;
                Ok(Entries { $($($entry,)*)* reduce_ranks })
            }
        }
    };
}

entries! {
    "labels" {
        pack_labels(LabelHeader, Address, i32);
        judge_labels();
        sort_labels(u32);
        spread_labels();
        sort_labels_count(u32, u32);
        sort_labels_scan();
        sort_labels_scatter(u32, u32);
        find_positives_count();
        find_positives_scan();
        find_positives_scatter(u32);
    }
    "sample" {
        mark_chosen(Address, u32);
        mark_below();
        pick_threshold();
        count_sample();
        list_sample();
        list_whole();
    }
    "embeddings" {
        pack_embeddings(MatrixView, u64);
        normalize_embeddings(MatrixView);
        judge_embeddings();
        take_terms(Address, Address, Address);
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
        set_updates(u64);
    }
    "loss" {
        reduce_rows();
        find_far_rows();
        finish_rows(i32);
        pack_sums(i32, i32, u64);
        judge_sums(Address);
        scale_embeddings();
    }
    "gradient" {
        embedding_gradient();
        finish_gradient(f64, MatrixView);
        margin_gradients(f64, Address, Address);
        sum_squares(i32);
    }
    "update" {
        begin_update(f64, f64, i32, u32, Address);
        place_rows(Accumulated);
        accumulate_rows(Accumulated, u32, u32);
        apply_accumulated(Accumulated);
        finish_accumulated(Accumulated);
        update_rows(u32, u32);
        advance_history();
        end_update();
    }
    "stateless" {
        normalize_matrix(MatrixView, MatrixView, Address);
        write_unit_operands(MatrixView, u64, u32, i32);
        margin_forward(Address, u64, Address);
        margin_backward(Address, Address, u64, Address);
        partial_softmax(MatrixView, Address, Address, Address, i32);
        update_given_rows(MatrixView, MatrixView, MatrixView, Address, MatrixView, Rule);
        write_ids(Address);
    }
    "fused" {
        find_given_targets(MatrixView, MatrixView);
        add_row_sums(u32, i32, Address);
        write_weighted_centers(MatrixView);
        write_row_offsets(Address);
        set_shifts(Address);
        weigh_rows(Address, Address, Address);
        finish_given_rows(MatrixView, f64, MatrixView);
        write_center_rows(u64, u32, MatrixView, MatrixView);
    }
    "nearest" {
        keep_nearest(MatrixView, u32, u32, u32, Address);
        merge_nearest(u64, u32, u32, Address, Address, Address);
    }
}
