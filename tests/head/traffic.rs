//! A plan's traffic is what a communicator counts.

use partialfc::matrix::DType;
use partialfc::options::{HeadOptions, Placement, Precision, RowUpdate};
use partialfc::Status;

use partialfc_testing::capi::{options, plan, plan_cuda, to_c, traffic_between, Device, Head, Rows};
use partialfc_testing::ranks::on_ranks;
use partialfc_testing::training::{Batch, ADAMW};

#[test]
fn a_step_hands_over_the_bytes_that_the_plan_names() {
    for placement in [Placement::Sharded, Placement::Replicated] {
        for (sample_rate, row_terms) in [(1.0, false), (0.5, true)] {
            for (classes, dim, max_batch, batch) in [(101, 7, 6, 6), (64, 16, 9, 4), (33, 3, 1, 0)] {
                for ranks in 1..=3 {
                    let gather_dtype = [None, Some(DType::F16), Some(DType::Bf16)][ranks as usize - 1];
                    let options =
                        HeadOptions { placement, sample_rate, gather_dtype, row_terms, ..options(classes, dim, max_batch) };
                    let report = plan(&to_c(&options), ranks, batch).expect("a plan");
                    let what =
                        format!("{placement:?} rate {sample_rate} {classes} x {dim}, {batch} of {max_batch} rows, {ranks} ranks");
                    let counted = on_ranks(ranks as usize, |place| {
                        let mut head = Head::new(&Device::cpu(1), &place.comm, &options);
                        let rows = Batch::draw(&options, place.rank, 0, batch as usize);
                        let mut grad = Rows::output(batch as usize, head.dim);
                        let before = place.comm.traffic();
                        head.forward(&mut rows.rows(head.dim), Some(&rows.labels)).expect("forward");
                        head.backward(1.0, 1.0, &mut grad).expect("backward");
                        head.update(0.1).expect("update");
                        let between = place.comm.traffic();
                        head.step(&mut rows.rows(head.dim), &rows.labels, 0.1, &mut grad).expect("step");
                        let after = place.comm.traffic();
                        [traffic_between(&before, &between), traffic_between(&between, &after)]
                    });
                    let by_operation = [
                        report.labels_bytes + report.embeddings_bytes,
                        report.sums_bytes + report.grad_centers_bytes,
                        report.grad_embeddings_bytes,
                        0,
                    ];
                    for (rank, steps) in counted.iter().enumerate() {
                        assert_eq!(steps[0], by_operation, "{what}, rank {rank}, three calls");
                        assert_eq!(steps[1], by_operation, "{what}, rank {rank}, pfc_head_step");
                    }
                    assert_eq!(report.traffic_bytes, by_operation.iter().sum::<u64>(), "{what}");
                }
            }
        }
    }
}

#[test]
fn embeddings_travel_padded_to_the_largest_batch_and_sums_do_not() {
    let options = options(50, 8, 10);
    let report = plan(&to_c(&options), 3, 7).expect("a plan");
    on_ranks(3, |place| {
        let mut head = Head::new(&Device::cpu(1), &place.comm, &options);
        let rows = [7, 0, 3][place.rank];
        let batch = Batch::draw(&options, place.rank, 0, rows);
        let before = place.comm.traffic();
        head.step(&mut batch.rows(8), &batch.labels, 0.1, &mut Rows::output(rows, 8)).expect("step");
        let bytes: u64 = traffic_between(&before, &place.comm.traffic()).iter().sum();
        // 10 rows of all ranks, where the plan has 21: two sums less for each.
        assert_eq!(bytes, report.traffic_bytes - 4 * 2 * (21 - 10), "rank {}", place.rank);
    });
}

/// At a scale whose sums may leave float32 a row has a third: of the ranks whose negatives are all far.
#[test]
fn at_a_large_scale_a_row_has_another_sum() {
    let mut options = options(50, 8, 10);
    let usual = plan(&to_c(&options), 3, 7).expect("a plan");
    for (scale, more) in [(75.0, 0), (75.1, 21), (128.0, 21)] {
        options.margin.scale = scale;
        let report = plan(&to_c(&options), 3, 7).expect("a plan");
        assert_eq!(report.sums_bytes, usual.sums_bytes + 4 * more, "scale {scale}");
        on_ranks(3, |place| {
            let mut head = Head::new(&Device::cpu(1), &place.comm, &options);
            let batch = Batch::draw(&options, place.rank, 0, 7);
            let before = place.comm.traffic();
            head.step(&mut batch.rows(8), &batch.labels, 0.1, &mut Rows::output(7, 8)).expect("step");
            let bytes: u64 = traffic_between(&before, &place.comm.traffic()).iter().sum();
            assert_eq!(bytes, report.traffic_bytes, "scale {scale}, rank {}", place.rank);
        });
    }
}

#[test]
fn what_moves_between_ranks_is_what_the_design_says() {
    // Sharded: labels, embeddings, two sums a row and their company, gradients; nothing that grows with the classes.
    let sharded = plan(&to_c(&options(1_000_000, 512, 128)), 8, 128).expect("a plan");
    assert_eq!(sharded.grad_embeddings_bytes, 8 * 128 * 512 * 4);
    assert_eq!(sharded.embeddings_bytes, 128 * 512 * 4);
    // In the type they travel in: as asked for, else by precision, of which auto is f32 on the device that is planned for.
    for (precision, gather_dtype, travels) in [
        (Precision::Auto, None, DType::F32),
        (Precision::F32, None, DType::F32),
        (Precision::Half, None, DType::F16),
        (Precision::Half, Some(DType::F32), DType::F32),
        (Precision::Auto, Some(DType::F16), DType::F16),
        (Precision::F32, Some(DType::Bf16), DType::Bf16),
    ] {
        let options = HeadOptions { precision, gather_dtype, ..options(1_000_000, 512, 128) };
        let report = plan(&to_c(&options), 8, 128).expect("a plan");
        let bytes = travels.size() as u64;
        assert_eq!(report.embeddings_bytes, 128 * 512 * bytes, "{precision:?} {gather_dtype:?}");
        // As sent and as gathered; rows in f16 have a scale each.
        let scales = if travels == DType::F16 { 4 * 128 } else { 0 };
        let saved = sharded.activation_bytes - report.activation_bytes;
        assert_eq!(saved, (8 + 1) * 128 * 512 * (4 - bytes) - scales, "{precision:?} {gather_dtype:?}");
    }
    assert_eq!(sharded.grad_centers_bytes, 0);
    assert!(sharded.labels_bytes >= 128 * 8 && sharded.labels_bytes < 128 * 8 + 256, "{}", sharded.labels_bytes);
    assert!(sharded.sums_bytes < 16 * 8 * 128, "{}", sharded.sums_bytes);
    // Replicated: the gradient of the sampled class centers, and no embeddings.
    let base = HeadOptions { placement: Placement::Replicated, ..options(10_000, 512, 128) };
    let replicated = plan(&to_c(&base), 8, 128).expect("a plan");
    assert_eq!(replicated.grad_centers_bytes, 10_000 * 512 * 4);
    assert_eq!((replicated.embeddings_bytes, replicated.grad_embeddings_bytes), (0, 0));
    let sampled = plan(&to_c(&HeadOptions { sample_rate: 0.3, ..base }), 8, 128).expect("a plan");
    assert_eq!(sampled.grad_centers_bytes, 3000 * 512 * 4);
}

#[test]
fn a_plan_of_a_gpu_needs_none() {
    let of = |options: &HeadOptions, memory: u64| plan_cuda(&to_c(options), 8, 128, memory);
    let base = HeadOptions { sample_rate: 0.1, ..options(10_000_000, 512, 128) };
    let wide = of(&base, 80_000_000_000).expect("a plan");
    assert_eq!((wide.shard_rows, wide.sample_capacity, wide.storage_bytes), (1_250_000, 125_000, 0));
    assert_eq!((wide.weight_bytes, wide.state_bytes), (1_250_000 * 512 * 4, 1_250_000 * 512 * 4));
    // Numerators of 1,024 rows and 125,056 columns in 16 bits, or by chunks where the GPU has no room for them.
    assert_eq!(wide.probability_bytes, 1024 * 125_056 * 2);
    let chunked = of(&base, wide.weight_bytes + wide.state_bytes + 400_000_000).expect("a plan");
    assert!(chunked.probability_bytes < wide.probability_bytes / 10, "{}", chunked.probability_bytes);
    let narrow = of(&HeadOptions { weight_dtype: DType::Bf16, ..base.clone() }, 80_000_000_000).expect("a plan");
    assert_eq!((narrow.weight_bytes, narrow.state_bytes), (wide.weight_bytes / 2, wide.state_bytes));
    // Rows travel in f16, in full batches.
    assert_eq!(wide.embeddings_bytes, 128 * 512 * 2);
    let refused = of(&HeadOptions { embedding_dim: 1025, ..base }, 0).map(drop).expect_err("too wide");
    assert_eq!(refused.status, Status::Unsupported as i32);
    assert!(refused.message.contains("embedding_dim") && refused.message.contains("1025"), "{refused:?}");
}

#[test]
fn memory_is_planned_by_shard_and_state() {
    let base = HeadOptions { sample_rate: 0.1, ..options(1003, 64, 16) };
    let sgd = plan(&to_c(&base), 4, 16).expect("a plan");
    assert_eq!((sgd.shard_rows, sgd.sample_capacity), (251, 64), "positives of 4 * 16 rows outnumber a tenth of 251");
    assert_eq!((sgd.weight_bytes, sgd.state_bytes), (251 * 64 * 4, 251 * 64 * 4));
    let adamw = plan(&to_c(&HeadOptions { optimizer: ADAMW, ..base.clone() }), 4, 16).expect("a plan");
    assert_eq!(adamw.state_bytes, 2 * 251 * 64 * 4);
    let dense = plan(&to_c(&HeadOptions { row_update: RowUpdate::Dense, ..base.clone() }), 4, 16).expect("a plan");
    assert!(dense.state_bytes > sgd.state_bytes, "dense rows remember their last step: {}", dense.state_bytes);
    for report in [&sgd, &adamw, &dense] {
        let parts = report.weight_bytes + report.state_bytes + report.activation_bytes + report.probability_bytes;
        assert_eq!(report.total_bytes, parts);
    }
    let replicated = plan(&to_c(&HeadOptions { placement: Placement::Replicated, ..base }), 4, 16).expect("a plan");
    assert_eq!((replicated.shard_rows, replicated.weight_bytes), (1003, 1003 * 64 * 4));
}

#[test]
fn the_plan_of_a_head_without_max_batch_is_that_of_one_with_room_for_the_batch() {
    let of = |max_batch: u64, batch: u64| plan(&to_c(&options(1000, 16, max_batch)), 2, batch);
    let (grown, fixed) = (of(0, 13).expect("a plan"), of(16, 13).expect("a plan"));
    assert_eq!((grown.total_bytes, grown.traffic_bytes), (fixed.total_bytes, fixed.traffic_bytes));
    for batch in [(1 << 24) + 1, u64::MAX] {
        let refused = of(0, batch).err().expect("no batch is as large");
        assert!(refused.message.contains(&batch.to_string()), "{refused:?}");
    }
}
