//! NULL and matrices that cannot be: refused by name, on all ranks where the call is collective.

use std::time::Duration;

use std::ptr::{null, null_mut};

use partialfc::capi::comm as c_comm;
use partialfc::capi::device as c_device;
use partialfc::capi::forward as c_forward;
use partialfc::capi::head as c_head;
use partialfc::capi::metrics as c_metrics;
use partialfc::capi::plan as c_plan;
use partialfc::capi::types as c_types;
use partialfc::capi::types::pfc_matrix;
use partialfc::capi::update as c_update;
use partialfc::Status;

use super::assert_refused;
use partialfc_testing::capi::{head_options, on_cuda, options, outcome, Comm, Device, Head, Rows};
use partialfc_testing::ranks::on_ranks;

#[track_caller]
fn refused(what: &str, status: i32, words: &[&str]) {
    assert_refused(what, outcome(status), Status::InvalidArgument, words);
}

#[test]
fn null_is_refused_by_name_where_a_call_is_local() {
    let device = Device::under_test(1);
    let comm = Comm::solo();
    let mut head = Head::new(&device, &comm, &options(10, 4, 8));
    let mut rows = Rows::output(1, 4);
    let mut view = rows.view();
    let (mut count, mut loss) = (0u64, 0.0);
    // SAFETY: what is not NULL is a live handle or memory that outlives the call.
    unsafe {
        refused("device", c_device::pfc_device_cpu(1, null_mut()), &["out"]);
        refused("comm", c_comm::pfc_comm_self(null_mut()), &["out"]);
        refused("comms", c_comm::pfc_comm_threads(2, null_mut()), &["comms"]);
        refused("no ranks", c_comm::pfc_comm_threads(0, &mut null_mut()), &["0"]);
        refused("ops", c_comm::pfc_comm_custom(null(), &mut null_mut()), &["pfc_comm_ops"]);
        refused("traffic", c_comm::pfc_comm_traffic(comm.0, null_mut()), &["out"]);
        refused("traffic", c_comm::pfc_comm_traffic(null(), null_mut()), &["comm"]);
        refused("timeout", c_comm::pfc_comm_set_timeout(null_mut(), 1), &["comm"]);
        refused("timeout", c_comm::pfc_comm_set_timeout(comm.0, 0), &["timeout"]);
        refused("abort", c_comm::pfc_comm_abort(null()), &["comm"]);
        refused("barrier", c_comm::pfc_comm_barrier(null_mut()), &["comm"]);
        assert_eq!((c_comm::pfc_comm_rank(null()), c_comm::pfc_comm_size(null())), (u32::MAX, 0));
        assert!(c_device::pfc_device_info(null()).is_null());

        let defaults = head_options(10, 4, 8);
        refused("options", c_types::pfc_head_options_init_sized(null_mut(), 8), &["pfc_head_options"]);
        refused("margin", c_types::pfc_margin_init_sized(null_mut(), 8), &["pfc_margin"]);
        refused("plan", c_plan::pfc_plan(null(), 1, 0, null_mut()), &["pfc_head_options"]);
        refused("plan", c_plan::pfc_plan(&defaults, 1, 0, null_mut()), &["pfc_plan_report"]);
        refused("plan_cuda", c_plan::pfc_plan_cuda(null(), 1, 0, 0, null_mut()), &["pfc_head_options"]);
        refused("plan_cuda", c_plan::pfc_plan_cuda(&defaults, 1, 0, 0, null_mut()), &["pfc_plan_report"]);
        refused("create", c_head::pfc_head_create(device.0, null_mut(), &defaults, &mut null_mut()), &["comm"]);

        let none: *mut c_head::pfc_head = null_mut();
        refused("prepare", c_head::pfc_head_prepare(none, null(), 0), &["head"]);
        refused("set_sample", c_head::pfc_head_set_sample(none, null(), 0), &["head"]);
        refused("forward", c_head::pfc_head_forward(none, &view, null(), &mut loss), &["head"]);
        refused("backward", c_head::pfc_head_backward(none, 1.0, 1.0, &view), &["head"]);
        refused("update", c_head::pfc_head_update(none, 0.1), &["head"]);
        refused("forward_with", c_forward::pfc_head_forward_with(none, &view, null(), null(), &mut loss), &["head"]);
        refused("backward_with", c_forward::pfc_head_backward_with(none, null(), &view), &["head"]);
        refused("forward options", c_forward::pfc_forward_options_init_sized(null_mut(), 8), &["pfc_forward_options"]);
        refused("backward options", c_forward::pfc_backward_options_init_sized(null_mut(), 8), &["pfc_backward_options"]);
        refused("update_with", c_update::pfc_head_update_with(none, null()), &["head"]);
        refused("accumulate", c_update::pfc_head_accumulate(none), &["head"]);
        refused("update options", c_update::pfc_update_options_init_sized(null_mut(), 8), &["pfc_update_options"]);
        refused("step", c_head::pfc_head_step(none, &view, null(), 0.1, &view, &mut loss), &["head"]);
        refused("wait", c_head::pfc_head_wait(none), &["head"]);
        refused("metrics", c_metrics::pfc_head_metrics(none, null_mut()), &["head"]);
        refused("last metrics", c_metrics::pfc_head_last_metrics(none, null_mut()), &["head"]);
        assert_eq!(c_head::pfc_head_error(none, null_mut(), 0), 0, "no head has no error");
        refused("top_k", c_head::pfc_head_top_k(none, &view, 1, null_mut(), null_mut()), &["head"]);
        refused("sample_ids", c_head::pfc_head_sample_ids(none, null_mut(), 0, &mut count), &["head"]);
        refused("shard", c_head::pfc_head_shard(none, &mut 0, &mut 0), &["head"]);
        refused("read", c_head::pfc_head_read_centers(none, 0, 1, &view), &["head"]);
        refused("write", c_head::pfc_head_write_centers(none, 0, 1, &view), &["head"]);
        refused("read state", c_head::pfc_head_read_state(none, 1, 0, 1, &view), &["head"]);
        refused("write state", c_head::pfc_head_write_state(none, 1, 0, 1, &view), &["head"]);

        refused("set_sample", c_head::pfc_head_set_sample(head.raw, null(), 2), &["ids", "2", "rank 0"]);
        refused("sample_ids", c_head::pfc_head_sample_ids(head.raw, null_mut(), 0, null_mut()), &["count"]);
        refused("shard", c_head::pfc_head_shard(head.raw, null_mut(), &mut 0), &["first"]);
        refused("shard", c_head::pfc_head_shard(head.raw, &mut 0, null_mut()), &["count"]);
        refused("read", c_head::pfc_head_read_centers(head.raw, 0, 1, null()), &["centers"]);
        refused("write", c_head::pfc_head_write_centers(head.raw, 0, 1, null()), &["centers"]);
        refused("read state", c_head::pfc_head_read_state(head.raw, 1, 0, 1, null()), &["state"]);
        view.data = null_mut();
        refused("read", c_head::pfc_head_read_centers(head.raw, 0, 1, &view), &["centers", "data"]);

        // Freeing nothing is fine.
        c_head::pfc_head_free(none);
        c_comm::pfc_comm_free(null_mut());
        c_device::pfc_device_free(null_mut());
    }
    // sample_ids with too little room names the need.
    head.prepare(&[3]).expect("labels");
    let mut ids = [0i64; 3];
    // SAFETY: a live head, three ids.
    let status = unsafe { c_head::pfc_head_sample_ids(head.raw, ids.as_mut_ptr(), 3, &mut count) };
    refused("too little room", status, &["capacity", "3", "10"]);
    assert_eq!((ids, count), ([0; 3], 0), "outputs are written on success only");
}

/// A call that is collective: rank 1 passes what it must not, the others what they should. Rank 1 hears of its own, the others of rank 1.
fn on_one_rank(name: &str, words: &[&str], call: impl Fn(&mut Head, &mut Rows, &mut Rows, bool) -> i32 + Sync) {
    on_ranks(3, |place| {
        place.comm.set_timeout(Duration::from_secs(120));
        let mut head = Head::new(&Device::under_test(1), &place.comm, &options(10, 4, 8));
        let (mut embeddings, mut grad) = (Rows::f32(&[1.0; 8], 4), Rows::output(2, 4));
        let outcome = outcome(call(&mut head, &mut embeddings, &mut grad, place.rank == 1));
        let what = format!("{name} on rank {}", place.rank);
        match place.rank {
            1 => assert_refused(&what, outcome, Status::InvalidArgument, words),
            _ => assert_refused(&what, outcome, Status::Remote, &["rank 1"]),
        };
        head.step(&mut embeddings, &[1, 2], 0.1, &mut grad).unwrap_or_else(|e| panic!("{what}: the head works on: {e:?}"));
    });
}

#[test]
fn null_on_one_rank_of_a_collective_call_is_heard_on_all() {
    let labels = [1i64, 2];
    let mut ids = [0i64; 2];
    let mut cosines = [0f32; 2];
    let (ids, cosines) = (ids.as_mut_ptr() as usize, cosines.as_mut_ptr() as usize);
    // SAFETY: what is not NULL is a live handle or memory that outlives the call; ids and cosines are not written on a failure.
    on_one_rank("prepare without labels", &["labels", "2"], |head, rows, _, bad| unsafe {
        let prepared = c_head::pfc_head_prepare(head.raw, if bad { null() } else { labels.as_ptr() }, 2);
        // On a GPU the others hear of it with the forward that follows.
        let view = rows.view();
        if on_cuda() {
            c_head::pfc_head_forward(head.raw, &view, null(), &mut 0.0)
        } else {
            prepared
        }
    });
    on_one_rank("forward without embeddings", &["embeddings"], |head, rows, _, bad| unsafe {
        let view = rows.view();
        c_head::pfc_head_forward(head.raw, if bad { null() } else { &view }, labels.as_ptr(), &mut 0.0)
    });
    on_one_rank("forward without data", &["embeddings", "data"], |head, rows, _, bad| unsafe {
        let mut view = rows.view();
        if bad {
            view.data = null_mut();
        }
        c_head::pfc_head_forward(head.raw, &view, labels.as_ptr(), &mut 0.0)
    });
    on_one_rank("forward without loss", &["loss"], |head, rows, _, bad| unsafe {
        let view = rows.view();
        let mut loss = 0.0;
        c_head::pfc_head_forward(head.raw, &view, labels.as_ptr(), if bad { null_mut() } else { &mut loss })
    });
    on_one_rank("step without a gradient", &["grad_embeddings"], |head, rows, grad, bad| unsafe {
        let (view, to) = (rows.view(), grad.view());
        c_head::pfc_head_step(head.raw, &view, labels.as_ptr(), 0.1, if bad { null() } else { &to }, &mut 0.0)
    });
    on_one_rank("step without loss", &["loss"], |head, rows, grad, bad| unsafe {
        let (view, to) = (rows.view(), grad.view());
        let mut loss = 0.0;
        c_head::pfc_head_step(head.raw, &view, labels.as_ptr(), 0.1, &to, if bad { null_mut() } else { &mut loss })
    });
    on_one_rank("top_k without ids", &["ids"], |head, rows, _, bad| unsafe {
        let mut view = rows.view();
        view.rows = 1;
        c_head::pfc_head_top_k(head.raw, &view, 2, if bad { null_mut() } else { ids as *mut i64 }, cosines as *mut f32)
    });
    on_one_rank("top_k without cosines", &["cosines"], |head, rows, _, bad| unsafe {
        let mut view = rows.view();
        view.rows = 1;
        c_head::pfc_head_top_k(head.raw, &view, 2, ids as *mut i64, if bad { null_mut() } else { cosines as *mut f32 })
    });
}

/// A wrong output of one rank is no failure of the others: the exchange comes first.
#[test]
fn metrics_without_a_struct_on_one_rank_do_not_leave_the_others_waiting() {
    on_ranks(3, |place| {
        place.comm.set_timeout(Duration::from_secs(120));
        let mut head = Head::new(&Device::under_test(1), &place.comm, &options(10, 4, 8));
        if place.rank == 1 {
            // SAFETY: a live head; NULL is what is tested.
            let status = unsafe { c_metrics::pfc_head_metrics(head.raw, null_mut()) };
            assert_refused("metrics on rank 1", outcome(status), Status::InvalidArgument, &["metrics", "rank 1"]);
            // SAFETY: as above.
            let status = unsafe { c_metrics::pfc_head_last_metrics(head.raw, null_mut()) };
            assert_refused("last metrics", outcome(status), Status::InvalidArgument, &["metrics", "rank 1"]);
        } else {
            head.metrics().expect("the others get theirs");
        }
        let (mut embeddings, mut grad) = (Rows::f32(&[1.0; 8], 4), Rows::output(2, 4));
        head.step(&mut embeddings, &[1, 2], 0.1, &mut grad).expect("the head works on");
    });
}

#[test]
fn creation_without_a_device_or_options_on_one_rank_is_heard_on_all() {
    for missing in ["device", "pfc_head_options", "out"] {
        on_ranks(2, |place| {
            let device = Device::under_test(1);
            let options = head_options(10, 4, 8);
            let mut raw = null_mut();
            let bad = |name: &str| place.rank == 1 && missing == name;
            // SAFETY: what is not NULL is a live handle or memory that outlives the call.
            let status = unsafe {
                c_head::pfc_head_create(
                    if bad("device") { null() } else { device.0 },
                    place.comm.0,
                    if bad("pfc_head_options") { null() } else { &options },
                    if bad("out") { null_mut() } else { &mut raw },
                )
            };
            let what = format!("{missing} on rank {}", place.rank);
            match place.rank {
                1 => assert_refused(&what, outcome(status), Status::InvalidArgument, &[missing]),
                _ => assert_refused(&what, outcome(status), Status::Remote, &["rank 1"]),
            };
            assert!(raw.is_null(), "{what}: an output is written on success only");
            Head::create(&device, &place.comm, &options).expect("the communicator works on");
        });
    }
}

#[test]
fn matrices_that_cannot_be_are_refused_by_field() {
    type Spoil = fn(&mut pfc_matrix);
    let cases: [(&str, Spoil); 8] = [
        ("dtype", |m| m.dtype = 0),
        ("dtype", |m| m.dtype = 4),
        ("dtype", |m| m.dtype = 99),
        ("reserved", |m| m.reserved = 1),
        ("cols", |m| m.cols = 5),
        ("row_stride", |m| m.row_stride = 3),
        ("data", |m| m.data = (m.data as usize + 1) as *mut std::ffi::c_void),
        ("rows", |m| m.rows = 1 << 62),
    ];
    let device = Device::under_test(1);
    let comm = Comm::solo();
    let mut head = Head::new(&device, &comm, &options(10, 4, 8));
    let before = head.centers();
    for (field, spoil) in cases {
        let (mut rows, mut grad) = (Rows::f32(&[1.0; 8], 4), Rows::output(2, 4));
        let (good, mut bad) = (rows.view(), rows.view());
        spoil(&mut bad);
        let mut bad_grad = grad.view();
        spoil(&mut bad_grad);
        let labels = [1i64, 2];
        let mut loss = 5.0;
        // SAFETY: a live head; what is wrong with the matrices is seen before their memory is touched.
        unsafe {
            refused(field, c_head::pfc_head_forward(head.raw, &bad, labels.as_ptr(), &mut loss), &["embeddings", field]);
            refused(
                field,
                c_head::pfc_head_step(head.raw, &good, labels.as_ptr(), 0.1, &bad_grad, &mut loss),
                &["grad_embeddings", field],
            );
            assert_eq!(loss, 5.0);
            refused(field, c_head::pfc_head_read_centers(head.raw, 0, 2, &bad), &["centers", field]);
            refused(field, c_head::pfc_head_write_centers(head.raw, 0, 2, &bad), &["centers", field]);
        }
    }
    assert_eq!(head.centers(), before);
}
