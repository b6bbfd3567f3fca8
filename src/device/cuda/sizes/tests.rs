use super::*;
use crate::device::cuda::driver::Stream;
use crate::device::cuda::shared_structs::TILE_COLUMNS;
use crate::device::test_spec::spec;
use crate::matrix::DType;
use crate::optimizer::{Adamw, Optimizer};
use crate::options::{Placement, Precision, Residency, RowUpdate};
use crate::shard::Shard;
use crate::Status;

const H200: GpuCapacity = GpuCapacity { multiprocessors: 132, free_memory: 140 << 30 };

fn bytes(sizes: &Sizes, name: &str) -> u64 {
    sizes.list().iter().find(|array| array.name == name).map_or(0, |array| array.bytes)
}

#[test]
fn the_main_shapes_take_what_was_promised() {
    let sizes = Sizes::new(&spec(125_000, 4096, |_| ()), H200, 0).expect("sizes");
    assert!(sizes.keeps_probabilities());
    assert!(sizes.workspace() < 1_400_000_000, "{}", sizes.workspace());
    assert_eq!(sizes.memory().weight, 125_000 * 512 * 4);
    assert_eq!(sizes.memory().probability, 4096 * 125_056 * 2);
    assert_eq!((sizes.chunks.splits, sizes.capacities.column_tiles()), (2, 977));

    let tight = spec(125_000, 4096, |options| options.workspace_limit = 192_000_000);
    let sizes = Sizes::new(&tight, H200, 0).expect("sizes");
    assert_eq!(sizes.chunks.columns, LARGEST_CHUNK);
    assert!(sizes.workspace() < 192_000_000, "{}", sizes.workspace());
}

/// From the least that may exist to an RTX PRO 6000's 188 multiprocessors, with batches whose tiles fit them and batches whose do not.
#[test]
fn splits_fill_every_gpu() {
    for multiprocessors in [2, 17, 68, 72, 80, 82, 84, 108, 114, 128, 132, 142, 144, 148, 160, 170, 188] {
        for rows in [128, 256, 512, 1024, 2048, 3072, 4096, 5120, 6144, 8192] {
            let splits = weighted_splits(rows, 512, 125_056, multiprocessors);
            let (blocks, slots) = (rows / 128 * 4 * splits, 2 * u64::from(multiprocessors));
            let filled = blocks as f64 / (slots * blocks.div_ceil(slots)) as f64;
            assert!(filled >= 0.9, "{rows} rows on {multiprocessors} multiprocessors: {splits} splits fill {filled:.2}");
            // Splits have whole tiles of columns: of a short chunk none is left without.
            for chunk in [125_056, LARGEST_CHUNK] {
                let splits = weighted_splits(rows, 512, chunk, multiprocessors);
                let share = (chunk / TILE_COLUMNS).div_ceil(splits) * TILE_COLUMNS;
                assert!((splits - 1) * share < chunk, "{rows} rows on {multiprocessors}: {splits} splits of {chunk} columns");
            }
        }
    }
    // On an A100 one split would leave two fifths of it empty; on an H100 two are enough, and more would cost their sums.
    assert_eq!([108, 132].map(|multiprocessors| weighted_splits(4096, 512, 125_056, multiprocessors)), [5, 2]);
    // A short chunk has no more splits than tiles of columns.
    assert_eq!([128, 256].map(|chunk| weighted_splits(128, 512, chunk, 132)), [1, 2]);
}

#[test]
fn chunks_shrink_with_the_limit_until_it_is_refused() {
    let mut last = u64::MAX;
    let mut limit = 2_000_000_000u64;
    let refused = loop {
        match Sizes::new(&spec(125_000, 1024, |options| options.workspace_limit = limit), H200, 0) {
            Ok(sizes) => {
                assert!(sizes.workspace() <= limit && sizes.chunks.columns <= last);
                assert!(sizes.chunks.columns.is_multiple_of(TILE_COLUMNS));
                assert!(sizes.chunks.splits >= 1 && sizes.chunks.splits <= sizes.chunks.columns / TILE_COLUMNS);
                last = sizes.chunks.columns;
                limit = limit / 100 * 99;
            }
            Err(error) => break error,
        }
    };
    assert_eq!(refused.status, Status::InvalidArgument);
    let words: Vec<&str> = refused.message.split(' ').collect();
    let need: u64 = words[7].parse().expect("the need");
    // The need that it names is the least that is taken.
    let least = |limit| Sizes::new(&spec(125_000, 1024, |options| options.workspace_limit = limit), H200, 0);
    assert_eq!(least(need).expect("enough").chunks.columns, TILE_COLUMNS);
    assert!(least(need - 1).is_err());
}

#[test]
fn without_a_limit_it_is_what_the_gpu_has() {
    let weights = 2 * 125_000 * 512 * 4u64;
    let at = |free_memory| Sizes::new(&spec(125_000, 4096, |_| ()), GpuCapacity { multiprocessors: 132, free_memory }, 0);
    assert!(at(weights + 2_000_000_000).expect("sizes").keeps_probabilities());
    assert_eq!(at(weights + 1_000_000_000).expect("sizes").chunks.columns, LARGEST_CHUNK);
    // Nothing free: the allocation will say so.
    assert_eq!(at(0).expect("sizes").chunks.columns, TILE_COLUMNS);
}

#[test]
fn arrays_follow_the_options() {
    let sharded = Sizes::new(&spec(1000, 10, |_| ()), H200, 0).expect("sizes");
    assert_eq!((sharded.capacities.gather_dtype, sharded.capacities.rows, sharded.capacities.sample), (DType::F16, 128, 1024));
    assert_eq!(bytes(&sharded, "embeddings_send"), 10 * 512 * 2);
    assert_eq!(bytes(&sharded, "send_scales"), 10 * 4);
    assert_eq!(bytes(&sharded, "sums"), 4 * (20 + 4));
    for name in ["replicated_sums", "center_gradient", "second_moment", "last_update", "missed_updates"] {
        assert_eq!(bytes(&sharded, name), 0, "{name}");
    }
    let adamw = Optimizer::Adamw(Adamw { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 });
    let replicated = spec(1000, 10, |options| {
        options.placement = Placement::Replicated;
        options.optimizer = adamw;
        options.row_update = RowUpdate::Dense;
        options.precision = Precision::F32;
        options.embedding_dim = 65;
        options.sample_rate = 0.1;
    });
    let replicated = Sizes::new(&replicated, H200, 0).expect("sizes");
    assert_eq!(
        (replicated.capacities.depth_pitch, replicated.capacities.master_pitch, replicated.capacities.sample_size),
        (128, 68, 100)
    );
    assert_eq!(replicated.capacities.sample, 128);
    assert_eq!(bytes(&replicated, "center_operand"), 3 * 128 * 128 * 2);
    assert_eq!(bytes(&replicated, "center_wide"), 0);
    assert_eq!(bytes(&replicated, "center_gradient"), 128 * 65 * 4);
    assert_eq!(bytes(&replicated, "second_moment"), 1000 * 68 * 4);
    assert_eq!(bytes(&replicated, "last_update"), 4000);
    for name in ["sums", "gradient_send", "embeddings_recv", "send_scales"] {
        assert_eq!(bytes(&replicated, name), 0, "{name}");
    }
    assert_eq!(bytes(&replicated, "replicated_sums"), 8 * 8);
    let narrow = spec(1000, 10, |options| (options.weight_dtype, options.optimizer) = (DType::Bf16, adamw));
    let narrow = Sizes::new(&narrow, H200, 0).expect("sizes");
    assert_eq!((bytes(&narrow, "centers"), bytes(&narrow, "centers_bf16")), (0, 1000 * 512 * 2));
    assert_eq!((bytes(&narrow, "second_moment"), bytes(&narrow, "second_moment_bf16")), (1000 * 512 * 4, 0));
    // Its rows are updated by a kernel of their own.
    assert_eq!(bytes(&narrow, "center_gradient"), 1024 * 512 * 4);
    let narrow = spec(1000, 10, |options| (options.state_dtype, options.optimizer) = (DType::Bf16, adamw));
    let narrow = Sizes::new(&narrow, H200, 0).expect("sizes");
    for name in ["momentum_bf16", "second_moment_bf16"] {
        assert_eq!(bytes(&narrow, name), 1000 * 512 * 2, "{name}");
    }
    assert_eq!((bytes(&narrow, "momentum"), bytes(&narrow, "centers_bf16")), (0, 0));
    // What travels: as asked for, else as the products take it. Rows are scaled for f16 alone.
    for (precision, gather, dtype) in [
        (Precision::Auto, None, DType::F16),
        (Precision::Half, None, DType::F16),
        (Precision::F32, None, DType::F32),
        (Precision::F32, Some(DType::F16), DType::F16),
        (Precision::Half, Some(DType::F32), DType::F32),
        (Precision::Auto, Some(DType::Bf16), DType::Bf16),
    ] {
        let spec = spec(1000, 10, |options| (options.precision, options.gather_dtype) = (precision, gather));
        let sizes = Sizes::new(&spec, H200, 0).expect("sizes");
        assert_eq!(sizes.capacities.gather_dtype, dtype, "{precision:?} {gather:?}");
        assert_eq!(bytes(&sizes, "send_scales"), if dtype == DType::F16 { 40 } else { 0 }, "{precision:?} {gather:?}");
    }
    for sizes in [&sharded, &replicated, &narrow] {
        let HeadSpec { options, ranks, .. } = &sizes.spec;
        let planned = memory_needed(options, *ranks, H200.free_memory).expect("a plan");
        assert_eq!(planned, (sizes.memory(), 0), "{options:?}");
    }
    let more = Sizes::new(&replicated.spec, H200, 300).expect("sizes");
    assert_eq!(more.capacities.sample, 384);
}

#[test]
fn rows_in_the_hosts_memory_leave_the_gpus_to_the_workspace() {
    let dense = |options: &mut HeadOptions| options.row_update = RowUpdate::Dense;
    let on = |residency: Residency, free_memory: u64| {
        let spec = spec(1_000_000, 1024, |options| {
            dense(options);
            options.residency = residency;
        });
        Sizes::new(&spec, GpuCapacity { free_memory, ..H200 }, 0).expect("sizes")
    };
    // Class centers and momentum are 4 GB.
    let (here, there) = (on(Residency::Device, 140 << 30), on(Residency::Host, 140 << 30));
    assert_eq!(here.memory(), there.memory());
    assert_eq!((here.host_bytes(), there.host_bytes()), (0, 2 * 4 * 512 * 1_000_000));
    // What dense rows have missed is read at every step, and stays.
    assert_eq!(there.kept_on_device(), 4 * 1_000_000 + 4096 * 40);
    assert_eq!(here.kept_on_device(), there.kept_on_device() + there.host_bytes());
    // The numerators are kept where three quarters of the rest are enough for them.
    let enough = there.kept_on_device() + there.workspace() / 3 * 4 + 4;
    assert!(on(Residency::Host, enough).keeps_probabilities() && !on(Residency::Device, enough).keeps_probabilities());
    // Rows whose every tile would move 32 bytes at a time are updated whole.
    let lazy = spec(1000, 10, |options| options.residency = Residency::Host);
    assert!(!fuses_update(&lazy) && fuses_update(&spec(1000, 10, |_| ())));
    let refused =
        memory_needed(&HeadOptions { residency: Residency::File { directory: "x".into(), cache: 0 }, ..lazy.options }, 1, 0);
    assert_eq!(refused.expect_err("a file").status, Status::Unsupported);
}

#[test]
fn every_pointer_has_an_array() {
    for (ranks, shared) in [(2, 1), (1, 4)] {
        let spec = HeadSpec { ranks, ..spec(1000, 10, |options| options.precision = Precision::F32) };
        let sizes = Sizes::new(&spec, H200, 0).expect("sizes");
        let mut arrays = sizes.head_arrays();
        let list = sizes.list();
        for (number, array) in list.iter().enumerate() {
            (array.assign)(&mut arrays, (number + 1) as *mut u8);
        }
        let pointers = std::mem::offset_of!(HeadArrays, first_class) / 8;
        // SAFETY: the structure begins with as many pointers.
        let pointers = unsafe { std::slice::from_raw_parts(std::ptr::from_ref(&arrays).cast::<u64>(), pointers) };
        assert!(pointers.iter().all(|&pointer| pointer != 0), "{pointers:?}");
        // The three planes of W^ serve both products, and a lone rank's messages are where they arrive; all else is an array of its own.
        assert_eq!(arrays.center_wide, arrays.center_operand);
        assert_eq!(arrays.labels_send == arrays.labels_recv, ranks == 1);
        assert_eq!(pointers.len(), list.len() + shared);
    }
}

#[test]
fn arrays_are_made_and_given_back() {
    use crate::device::cuda::driver::{Context, Priority};

    let turn = cuda_emulator::turn(1);
    // SAFETY: the default stream.
    let context = unsafe { Context::of(0, std::ptr::null_mut()) }.expect("GPU 0");
    let stream = Stream::new(&context, Priority::Least).expect("a stream");
    let before = context.free_memory().expect("a number");
    let gpu = GpuCapacity { multiprocessors: context.multiprocessors().expect("a number"), free_memory: before };
    let spec = spec(1000, 10, |options| options.row_update = RowUpdate::Dense);
    let sizes = Sizes::new(&spec, gpu, 0).expect("sizes");
    let memory = HeadMemory::allocate(&sizes, &stream).expect("memory");
    let [one, two] = memory.arrays;
    // Each step has its own labels and sample; the rest is shared.
    assert!(one.block != two.block && one.sample != two.sample && one.sort_keys[1] != two.sort_keys[1]);
    assert!(one.ledger == two.ledger && one.counts == two.counts && one.centers == two.centers);
    assert!(one.second_moment.is_null() && two.second_moment.is_null() && !one.last_update.is_null());
    let total: u64 = memory.buffers.iter().map(|buffer| buffer.bytes() as u64).sum();
    assert_eq!(total, sizes.memory().total());
    let free = context.free_memory().expect("a number");
    drop(memory);
    // Rows in the host's memory are none of the GPU's.
    let mut on_host = sizes.clone();
    on_host.spec.options.residency = Residency::Host;
    let memory = HeadMemory::allocate(&on_host, &stream).expect("memory");
    if turn.is_emulator() {
        assert_eq!(context.free_memory().expect("a number") - free, on_host.host_bytes());
    }
    drop(memory);

    // Where one array is refused, those before it are given back.
    let huge = Sizes::new(&self::spec(400_000_000, 10, |_| ()), gpu, 0).expect("sizes");
    let refused = HeadMemory::allocate(&huge, &stream).map(|_| ()).expect_err("more than there is");
    assert_eq!(refused.status, Status::OutOfMemory);
    if turn.is_emulator() {
        assert_eq!(context.free_memory().expect("a number"), before);
    }
}

#[test]
fn head_arrays_have_the_sizes() {
    let mut spec = spec(1001, 10, |options| (options.sample_rate, options.sample_block) = (0.5, 16));
    (spec.ranks, spec.rank, spec.shard) = (3, 1, Shard::of(1001, 3, 1));
    let arrays = Sizes::new(&spec, H200, 0).expect("sizes").head_arrays();
    assert_eq!((arrays.ranks, arrays.rank, arrays.max_batch, arrays.label_capacity, arrays.row_capacity), (3, 1, 10, 30, 128));
    assert_eq!((arrays.first_class, arrays.num_classes, arrays.shard_rows), (334, 1001, 334));
    assert_eq!((arrays.sample_size, arrays.sample_capacity, arrays.column_tiles, arrays.whole_shard), (167, 256, 2, 0));
    assert_eq!(arrays.block_shift, 4);
    assert_eq!((arrays.plane_rows, arrays.plane_centers, arrays.plane_numerators), (128 * 512, 256 * 512, 128 * 256));
    assert_eq!((arrays.ignore_label, arrays.sharded, arrays.split_operands, arrays.gather_dtype), (i64::MIN, 1, 0, 2));
}

#[test]
fn sizes_beyond_any_memory_do_not_wrap() {
    let huge = spec(u32::MAX.into(), 1 << 24, |options| options.embedding_dim = 1 << 16);
    assert_eq!(Sizes::new(&huge, H200, 0).expect_err("too many classes").status, Status::InvalidArgument);
    let large = spec(4_000_000_000, 1 << 24, |options| options.embedding_dim = 1 << 16);
    let sizes = Sizes::new(&large, H200, 0).expect("sizes");
    assert!(sizes.workspace() > 1 << 40 && sizes.chunks.columns == TILE_COLUMNS);
}
