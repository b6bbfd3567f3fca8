//! Callers' arrays in the GPU's memory where most have them in the host's: taken there, or refused by name, and no crash.
//!
//! On the emulator, or with `PFC_TEST_DRIVER=real` on a GPU.

use std::ffi::c_void;
use std::ptr::null_mut;

use partialfc::capi::comm as c_comm;
use partialfc::capi::head as c_head;
use partialfc::capi::metrics as c_metrics;
use partialfc::capi::types::pfc_matrix;
use partialfc::options::{HeadOptions, Placement};
use partialfc::Status;
use partialfc_testing::capi::{options, outcome, pfc_metrics, status_name, Comm, Failure, Head, Outcome, Rows};
use partialfc_testing::driver;
use partialfc_testing::emulator;
use partialfc_testing::gpu::{gpu, Remote};
use partialfc_testing::numbers::Random;
use partialfc_testing::ranks::on_ranks;

const ROWS: usize = 3;
const DIM: usize = 6;
const CLASSES: u64 = 50;
const LABELS: [i64; ROWS] = [5, 17, 40];

fn small() -> HeadOptions {
    HeadOptions { sample_rate: 0.1, ..options(CLASSES, DIM as u32, ROWS as u64) }
}

fn embeddings(rank: usize) -> Vec<f32> {
    Random(rank as u64 + 1).normals(ROWS * DIM, 1.0)
}

#[track_caller]
fn assert_told<T: std::fmt::Debug>(what: &str, result: Outcome<T>, status: Status, words: &[&str]) {
    let failure: Failure = result.map(|_| ()).expect_err(what);
    assert_eq!(status_name(failure.status), format!("PFC_ERROR_{status}"), "{what}: {failure:?}");
    for word in words {
        assert!(failure.message.contains(word), "{what}: the text does not say {word:?}: {failure:?}");
    }
}

#[test]
fn a_sample_is_given_and_told_in_the_gpus_memory() {
    let _turn = emulator::turn(1);
    let mut head = Head::new(&gpu(), &Comm::solo(), &small());
    let given = Remote::of(&[2i64, 5, 9, 30]);
    // SAFETY: a live head; ids on the GPU, as many as it says.
    unsafe {
        outcome(c_head::pfc_head_set_sample(head.raw, given.pointer(), 4)).expect("ids on the GPU");
        head.forward(&mut Rows::f32(&embeddings(0), DIM), Some(&LABELS)).expect("forward");
        let expected = vec![2i64, 5, 9, 17, 30, 40];
        assert_eq!(head.sample_ids().expect("ids"), expected);
        let (told, mut count) = (Remote::of(&[-5i64; 7]), 0);
        let short = outcome(c_head::pfc_head_sample_ids(head.raw, told.pointer(), 5, &mut count));
        assert_told("room for 5", short, Status::InvalidArgument, &["capacity must be at least 6", "got 5"]);
        assert_eq!((told.read::<i64>(), count), (vec![-5; 7], 0), "written");
        outcome(c_head::pfc_head_sample_ids(head.raw, told.pointer(), 7, &mut count)).expect("room on the GPU");
        assert_eq!((&told.read::<i64>()[..6], told.read::<i64>()[6], count), (expected.as_slice(), -5, 6));
        let wrong = Remote::of(&[9i64, 2]);
        let refused = outcome(c_head::pfc_head_set_sample(head.raw, wrong.pointer(), 2));
        assert_told("out of order", refused, Status::InvalidArgument, &["ids[1] is 2 after 9"]);
    }
}

#[test]
fn top_k_takes_and_gives_arrays_wherever_they_are() {
    let _turn = emulator::turn(2);
    for placement in [Placement::Sharded, Placement::Replicated] {
        on_ranks(2, |place| {
            let mut head = Head::new(&gpu(), &place.comm, &HeadOptions { placement, ..small() });
            let mut values = embeddings(place.rank);
            let expected = head.top_k(&mut Rows::f32(&values, DIM), 4).expect("on the host");
            // Rows with something between them, which is nobody's.
            let wide: Vec<f32> = values.chunks(DIM).flat_map(|row| [row, &[f32::NAN; 2]].concat()).collect();
            let there = Remote::of(&wide[..wide.len() - 2]);
            let view = pfc_matrix { rows: ROWS as u64, row_stride: DIM as u64 + 2, ..there.matrix(DIM) };
            let (ids, cosines) = (Remote::of(&[-5i64; 4 * ROWS]), Remote::of(&[-5f32; 4 * ROWS]));
            // SAFETY: a live head; arrays on the GPU of the sizes that it takes.
            outcome(unsafe { c_head::pfc_head_top_k(head.raw, &view, 4, ids.pointer(), cosines.pointer()) }).expect("on the GPU");
            assert_eq!((ids.read::<i64>(), cosines.read::<f32>()), expected, "{placement:?}");
            // One on the GPU and one on the host, of embeddings that a rank has wrong.
            if place.rank == 1 {
                values[7] = f32::NAN;
            }
            let (there, mut ids) = (Remote::of(&values), [-5i64; 4 * ROWS]);
            // SAFETY: as above.
            let told =
                outcome(unsafe { c_head::pfc_head_top_k(head.raw, &there.matrix(DIM), 4, ids.as_mut_ptr(), cosines.pointer()) });
            match place.rank {
                1 => assert_told("its own", told, Status::NotFinite, &["embeddings row 1", "rank 1"]),
                _ => assert_told("the other's", told, Status::Remote, &["rank 1"]),
            }
            assert_eq!((ids, cosines.read::<f32>()), ([-5; 4 * ROWS], expected.1), "written");
        });
    }
}

/// What is of the host's by its nature.
#[test]
fn numbers_and_structs_of_the_hosts_are_refused_by_name_elsewhere() {
    let _turn = emulator::turn(3);
    on_ranks(2, |place| {
        let mut head = Head::new(&gpu(), &place.comm, &small());
        head.forward(&mut Rows::f32(&embeddings(place.rank), DIM), Some(&LABELS)).expect("forward");
        let (there, mut here) = (Remote::of(&[0u64; 64]), 7u64);
        // SAFETY: a live head; outputs that outlive the calls.
        unsafe {
            let invalid = Status::InvalidArgument;
            // Only rank 1's are there: the figures are collective, and rank 0 has its own.
            let mut metrics: pfc_metrics = std::mem::zeroed();
            outcome(c_metrics::pfc_metrics_init_sized(&mut metrics, size_of::<pfc_metrics>() as u64)).expect("defaults");
            match place.rank {
                0 => outcome(c_metrics::pfc_head_metrics(head.raw, &mut metrics)).expect("figures"),
                _ => {
                    let refused = outcome(c_metrics::pfc_head_metrics(head.raw, there.pointer()));
                    assert_told("metrics", refused, invalid, &["metrics", "device memory", "rank 1"]);
                }
            }
            let refused = outcome(c_metrics::pfc_head_last_metrics(head.raw, there.pointer()));
            assert_told("last metrics", refused, invalid, &["metrics", "device memory"]);
            let refused = outcome(c_head::pfc_head_sample_ids(head.raw, null_mut(), 0, there.pointer()));
            assert_told("count of a sample", refused, invalid, &["count", "device memory"]);
            let refused = outcome(c_head::pfc_head_shard(head.raw, there.pointer(), &mut here));
            assert_told("first", refused, invalid, &["first", "device memory"]);
            let refused = outcome(c_head::pfc_head_shard(head.raw, &mut here, there.pointer()));
            assert_told("count", refused, invalid, &["count", "device memory"]);
        }
        assert_eq!((here, there.read::<u64>()), (7, vec![0; 64]), "written");
        assert_eq!(head.metrics().expect("figures").draws, 1);
    });
}

#[test]
fn rows_to_add_up_on_the_gpu_are_refused_by_name_on_all_ranks() {
    let _turn = emulator::turn(4);
    on_ranks(2, |place| {
        let device = gpu();
        let (mut ids, mut rows, mut count) = ([3i64, 8], Rows::f32(&[1.0; 2 * DIM], DIM), 7u64);
        let (some, many) = (Remote::of(&[3i64, 8, 0, 0]), Remote::of(&[0f32; 4 * DIM]));
        let (mut ids_out, mut rows_out) = ([-5i64; 4], Rows::output(4, DIM));
        let names = ["ids", "rows", "ids_out", "rows_out", "count_out", ""];
        for name in names {
            // Rank 1 has this one on the GPU.
            let on_gpu = |argument: &str| place.rank == 1 && argument == name;
            // SAFETY: a live communicator and device; arrays of the sizes that are named.
            let told = outcome(unsafe {
                c_comm::pfc_all_reduce_rows(
                    place.comm.0,
                    device.0,
                    if on_gpu("ids") { some.pointer() } else { ids.as_mut_ptr() },
                    2,
                    &if on_gpu("rows") { many.matrix(DIM) } else { rows.view() },
                    if on_gpu("ids_out") { some.pointer() } else { ids_out.as_mut_ptr() },
                    4,
                    &if on_gpu("rows_out") { many.matrix(DIM) } else { rows_out.view() },
                    if on_gpu("count_out") { some.pointer() } else { &mut count },
                )
            });
            match (name, place.rank) {
                ("", _) => told.expect("all on the host"),
                (_, 1) => assert_told(name, told, Status::InvalidArgument, &[name, "device memory", "rank 1"]),
                _ => assert_told(name, told, Status::Remote, &["rank 1"]),
            }
            if !name.is_empty() {
                assert_eq!((ids_out, count), ([-5; 4], 7), "{name}: written");
            }
        }
        assert_eq!((&ids_out[..2], count), (&ids[..], 2));
        assert_eq!(rows_out.values_f32()[..2 * DIM], [2.0; 2 * DIM]);
    });
}

/// The labels of a step that is prepared ahead are the library's own from then on: a trainer's stream may overwrite them, and the trainer
/// frees them.
#[test]
fn labels_are_overwritten_and_freed_once_prepare_has_returned() {
    let _turn = emulator::turn(7);
    let loss_of = |prepare: &dyn Fn(&mut Head)| {
        let mut head = Head::new(&gpu(), &Comm::solo(), &small());
        prepare(&mut head);
        let loss = head.forward(&mut Rows::f32(&embeddings(0), DIM), None).expect("forward");
        (loss, head.sample_ids().expect("ids"))
    };
    let expected = loss_of(&|head| head.prepare(&LABELS).expect("labels on the host"));
    let found = loss_of(&|head| {
        let there = Remote::of(&LABELS);
        // SAFETY: a live head; as many labels on the GPU as it says. The device's stream is the default one, as that of the memset.
        unsafe {
            outcome(c_head::pfc_head_prepare(head.raw, there.pointer(), ROWS as u64)).expect("labels on the GPU");
            let fill = driver!(c"cuMemsetD8Async", unsafe extern "C" fn(u64, u8, usize, *mut c_void) -> i32);
            let wait = driver!(c"cuStreamSynchronize", unsafe extern "C" fn(*mut c_void) -> i32);
            assert_eq!((fill(there.address, 0xff, there.bytes, null_mut()), wait(null_mut())), (0, 0));
        }
    });
    assert_eq!(found, expected);
}
