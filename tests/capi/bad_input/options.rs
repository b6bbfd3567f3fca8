//! Options that no head can have, and those that this version does not.

use partialfc::capi::device::pfc_device_cuda;
use partialfc::capi::head::pfc_head_create;
use partialfc::capi::types::pfc_head_options;
use partialfc::Status;

use super::assert_refused;
use partialfc_testing::capi::{head_options, on_cuda, outcome, plan, Comm, Device, Head};
use partialfc_testing::ranks::on_ranks;

type Set = fn(&mut pfc_head_options);

/// Tries a head on one rank, and its plan.
fn try_head(set: Set) -> [Result<(), partialfc_testing::capi::Failure>; 2] {
    let mut options = head_options(10, 4, 8);
    set(&mut options);
    let head = Head::create(&Device::under_test(1), &Comm::solo(), &options).map(|_| ());
    [head, plan(&options, 1, 0).map(|_| ())]
}

#[test]
fn values_outside_their_range_are_refused_by_name() {
    let cases: [(&str, &str, Set); 60] = [
        ("struct_size", "0", |o| o.struct_size = 0),
        ("struct_size", "7", |o| o.struct_size = 7),
        ("struct_size", "18446744073709551615", |o| o.struct_size = u64::MAX),
        ("num_classes", "0", |o| o.num_classes = 0),
        ("embedding_dim", "0", |o| o.embedding_dim = 0),
        ("max_batch", "16777217", |o| o.max_batch = (1 << 24) + 1),
        ("placement", "0", |o| o.placement = 0),
        ("placement", "3", |o| o.placement = 3),
        ("sample_rate", "-0.1", |o| o.sample_rate = -0.1),
        ("sample_rate", "1.1", |o| o.sample_rate = 1.1),
        ("sample_rate", "NaN", |o| o.sample_rate = f64::NAN),
        ("scale", "0", |o| o.scale = 0.0),
        ("scale", "-64", |o| o.scale = -64.0),
        ("scale", "128.5", |o| o.scale = 128.5),
        ("scale", "inf", |o| o.scale = f64::INFINITY),
        ("scale", "NaN", |o| o.scale = f64::NAN),
        ("m1", "0", |o| o.m1 = 0.0),
        ("m1", "-1", |o| o.m1 = -1.0),
        ("m1", "NaN", |o| o.m1 = f64::NAN),
        ("m2", "-0.1", |o| o.m2 = -0.1),
        ("m2", "3.2", |o| o.m2 = 3.2),
        ("m2", "NaN", |o| o.m2 = f64::NAN),
        ("m3", "-0.1", |o| o.m3 = -0.1),
        ("m3", "2.1", |o| o.m3 = 2.1),
        ("m3", "inf", |o| o.m3 = f64::INFINITY),
        ("interclass_filter", "-0.5", |o| o.interclass_filter = -0.5),
        ("interclass_filter", "1.5", |o| o.interclass_filter = 1.5),
        ("interclass_filter", "NaN", |o| o.interclass_filter = f64::NAN),
        ("margin_gradient", "0", |o| o.margin_gradient = 0),
        ("margin_guard", "3", |o| o.margin_guard = 3),
        ("optimizer", "0", |o| o.optimizer = 0),
        ("row_update", "3", |o| o.row_update = 3),
        ("momentum", "1", |o| o.momentum = 1.0),
        ("momentum", "-0.1", |o| o.momentum = -0.1),
        ("momentum", "NaN", |o| o.momentum = f64::NAN),
        ("weight_decay", "-1", |o| o.weight_decay = -1.0),
        ("weight_decay", "inf", |o| o.weight_decay = f64::INFINITY),
        ("beta1", "1", |o| (o.optimizer, o.beta1) = (2, 1.0)),
        ("beta2", "-0.5", |o| (o.optimizer, o.beta2) = (2, -0.5)),
        ("beta2", "NaN", |o| (o.optimizer, o.beta2) = (2, f64::NAN)),
        ("epsilon", "0", |o| (o.optimizer, o.epsilon) = (2, 0.0)),
        ("gradient_scale", "0", |o| o.gradient_scale = 0.0),
        ("gradient_scale", "inf", |o| o.gradient_scale = f64::INFINITY),
        ("init_std", "-0.01", |o| o.init_std = -0.01),
        ("init_std", "NaN", |o| o.init_std = f64::NAN),
        ("ignore_label", "9", |o| o.ignore_label = 9),
        ("precision", "0", |o| o.precision = 0),
        ("gather_dtype", "4", |o| o.gather_dtype = 4),
        ("weight_dtype", "0", |o| o.weight_dtype = 0),
        ("state_dtype", "4", |o| o.state_dtype = 4),
        ("residency", "4", |o| o.residency = 4),
        ("storage_path", "NULL", |o| o.residency = 3),
        ("storage_path", "empty", |o| (o.residency, o.storage_path) = (3, c"".as_ptr())),
        ("storage_path", "NULL unless", |o| o.storage_path = c"/nowhere".as_ptr()),
        ("storage_path", "NULL unless", |o| (o.residency, o.storage_path) = (2, c"/nowhere".as_ptr())),
        ("storage_cache", "4096", |o| o.storage_cache = 4096),
        ("reserved", "1", |o| o.reserved = 1),
        ("sample_block", "0", |o| o.sample_block = 0),
        ("sample_block", "12", |o| o.sample_block = 12),
        ("sample_block", "2048", |o| o.sample_block = 2048),
    ];
    for (field, value, set) in cases {
        let [head, plan] = try_head(set);
        assert_refused(&format!("a head with {field} {value}"), head, Status::InvalidArgument, &[field, value]);
        assert_refused(&format!("a plan with {field} {value}"), plan, Status::InvalidArgument, &[field, value]);
    }
    let [head, plan] = try_head(|_| ());
    head.and(plan).expect("the options that the cases spoil are good");
}

#[test]
fn what_is_not_in_this_version_is_unsupported() {
    let cases: [(&str, Set); 2] = [("weight_dtype", |o| o.weight_dtype = 2), ("state_dtype", |o| o.state_dtype = 2)];
    for (field, set) in cases {
        let [head, plan] = try_head(set);
        assert_refused(field, head, Status::Unsupported, &[field]);
        assert_refused(field, plan, Status::Unsupported, &[field]);
    }
    let [head, plan] = try_head(|o| o.residency = 2);
    head.and(plan).expect("rows in the host's memory");
    if on_cuda() {
        let [head, _] = try_head(|o| (o.residency, o.storage_path) = (3, c"/never/made".as_ptr()));
        assert_refused("residency", head, Status::Unsupported, &["residency must be device or host", "CUDA", "got file"]);
    }

    // SAFETY: outputs that outlive their calls, live handles.
    unsafe {
        if !on_cuda() {
            let mut cuda = std::ptr::null_mut();
            let refused = outcome(pfc_device_cuda(0, std::ptr::null_mut(), &mut cuda));
            assert_refused("a CUDA device", refused, Status::Unsupported, &["CUDA"]);
            assert!(cuda.is_null());
        }
    }
}

/// The options of a program built with a later header.
#[repr(C)]
struct LaterOptions {
    known: pfc_head_options,
    unknown: [u64; 2],
}

#[test]
fn an_unknown_field_counts_only_if_it_is_set() {
    let device = Device::under_test(1);
    let create = |later: &LaterOptions| {
        let comm = Comm::solo();
        let mut raw = std::ptr::null_mut();
        // SAFETY: live handles, a struct of the size it says.
        let result = outcome(unsafe { pfc_head_create(device.0, comm.0, &later.known, &mut raw) });
        result.map(|()| drop(Head { raw, dim: 4 }))
    };
    let mut later = LaterOptions { known: head_options(10, 4, 8), unknown: [0, 0] };
    later.known.struct_size = std::mem::size_of::<LaterOptions>() as u64;
    create(&later).expect("zeros are what a library without the field does");
    later.unknown[1] = 1 << 40;
    let at = (std::mem::size_of::<pfc_head_options>() + 8 + 5).to_string();
    assert_refused("an unknown field", create(&later), Status::Unsupported, &["pfc_head_options", &at]);
}

#[test]
fn an_earlier_program_gets_defaults_for_what_it_does_not_know() {
    // A struct that ends after scale: m2 and everything after are the library's defaults, whatever lies there.
    let device = Device::under_test(1);
    let mut options = head_options(10, 4, 8);
    options.struct_size = std::mem::offset_of!(pfc_head_options, m1) as u64;
    (options.m2, options.optimizer) = (f64::NAN, 77);
    Head::create(&device, &Comm::solo(), &options).expect("an earlier program's struct");
}

#[test]
fn fewer_classes_than_ranks_cannot_be_sharded() {
    on_ranks(3, |place| {
        let device = Device::under_test(1);
        let refused = Head::create(&device, &place.comm, &head_options(2, 4, 8)).map(|_| ());
        assert_refused(&format!("rank {}", place.rank), refused, Status::InvalidArgument, &["num_classes", "2", "3"]);
        // The communicator lives: every rank knew.
        Head::create(&device, &place.comm, &head_options(3, 4, 8)).expect("a class for each rank");
        let mut replicated = head_options(2, 4, 8);
        replicated.placement = 2;
        Head::create(&device, &place.comm, &replicated).expect("replicated, it is no matter");
    });
}

#[test]
fn more_classes_than_a_rank_can_number_are_refused() {
    let refused = Head::create(&Device::under_test(1), &Comm::solo(), &head_options(1 << 32, 4, 8)).map(|_| ());
    assert_refused("2^32 rows", refused, Status::InvalidArgument, &["num_classes", "4294967296", "4294967295"]);
}

#[test]
fn options_that_differ_between_ranks_are_named_on_all() {
    // What auto is on the device.
    let gathered = if on_cuda() { "2" } else { "1" };
    let cases: [(&str, Set, [&str; 2]); 27] = [
        ("num_classes", |o| o.num_classes = 11, ["10", "11"]),
        ("embedding_dim", |o| o.embedding_dim = 5, ["4", "5"]),
        ("placement", |o| o.placement = 2, ["1", "2"]),
        ("sample_rate", |o| o.sample_rate = 0.25, ["1.0", "0.25"]),
        ("seed", |o| o.seed = 12345, ["0", "12345"]),
        ("max_batch", |o| o.max_batch = 9, ["8", "9"]),
        ("scale", |o| o.scale = 32.0, ["64", "32"]),
        ("m1", |o| o.m1 = 1.25, ["1.0", "1.25"]),
        ("m2", |o| o.m2 = 0.25, ["0.5", "0.25"]),
        ("m3", |o| o.m3 = 0.125, ["0.0", "0.125"]),
        ("interclass_filter", |o| o.interclass_filter = 0.375, ["0.0", "0.375"]),
        ("margin_gradient", |o| o.margin_gradient = 2, ["1", "2"]),
        ("margin_guard", |o| o.margin_guard = 2, ["1", "2"]),
        ("optimizer", |o| o.optimizer = 2, ["1", "2"]),
        ("row_update", |o| o.row_update = 2, ["1", "2"]),
        ("momentum", |o| o.momentum = 0.75, ["0.9", "0.75"]),
        ("weight_decay", |o| o.weight_decay = 0.0625, ["0.0005", "0.0625"]),
        ("gradient_scale", |o| o.gradient_scale = 3.0, ["1.0", "3.0"]),
        ("init_std", |o| o.init_std = 0.03125, ["0.01", "0.03125"]),
        ("ignore_label", |o| o.ignore_label = -1, ["-9223372036854775808", "-1"]),
        ("precision", |o| o.precision = 2, ["1", "2"]),
        ("gather_dtype", |o| o.gather_dtype = 3, [gathered, "3"]),
        ("beta1", |o| o.beta1 = 0.625, ["0.9", "0.625"]),
        ("epsilon", |o| o.epsilon = 0.5, ["1e-8", "0.5"]),
        ("sample_block", |o| o.sample_block = 32, ["1", "32"]),
        ("weight_dtype", |o| o.weight_dtype = 3, ["1", "3"]),
        ("state_dtype", |o| o.state_dtype = 3, ["1", "3"]),
    ];
    for (field, set, [common, odd]) in cases {
        let messages = on_ranks(3, |place| {
            let device = Device::under_test(1);
            let mut options = head_options(10, 4, 8);
            if field == "beta1" || field == "epsilon" {
                options.optimizer = 2;
            }
            if place.rank == 1 {
                set(&mut options);
            }
            let refused = Head::create(&device, &place.comm, &options).map(|_| ());
            let what = format!("{field} on rank {}", place.rank);
            let failure = assert_refused(&what, refused, Status::Mismatch, &[field, "rank 1", common, odd]);
            Head::create(&device, &place.comm, &head_options(10, 4, 8)).expect("alike, they can go on");
            failure.message
        });
        assert!(messages.iter().all(|message| *message == messages[0]), "the ranks tell different stories: {messages:?}");
    }
}

#[test]
fn a_workspace_limit_is_each_ranks_own() {
    on_ranks(2, |place| {
        let device = Device::under_test(1);
        let mut options = head_options(10, 4, 8);
        options.workspace_limit = 1 << (30 + place.rank);
        Head::create(&device, &place.comm, &options).expect("a head");
        if place.rank == 1 {
            options.workspace_limit = 1;
        }
        let refused = Head::create(&device, &place.comm, &options).map(|_| ());
        match place.rank {
            0 => assert_refused("rank 0", refused, Status::Remote, &["rank 1", "INVALID_ARGUMENT"]),
            _ => assert_refused("rank 1", refused, Status::InvalidArgument, &["workspace_limit", "got 1"]),
        };
    });
}

#[test]
fn a_head_too_large_for_memory_is_an_error_on_every_rank() {
    on_ranks(2, |place| {
        let device = Device::under_test(1);
        // 2^50 bytes of class centers on each rank: beyond any address space, however freely a machine hands out memory. A GPU, which
        // has what it has, takes no such rows.
        let dim = if on_cuda() { 1 << 10 } else { 1 << 16 };
        let mut options = head_options(2 * u64::from(u32::MAX), dim, 8);
        options.sample_rate = 0.0;
        let refused = Head::create(&device, &place.comm, &options).map(|_| ());
        assert_refused(&format!("rank {}", place.rank), refused, Status::OutOfMemory, &["bytes"]);
        Head::create(&device, &place.comm, &head_options(10, 4, 8)).expect("a smaller one");
    });
}
