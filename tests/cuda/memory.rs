//! A GPU or a host that has no memory left: the status says so with both figures, nothing is left behind, and the others hear of it.

use partialfc::capi::head as c_head;
use partialfc::matrix::DType;
use partialfc::options::{HeadOptions, Placement, Residency};
use partialfc::Status;
use partialfc_testing::capi::{outcome, Comm, Failure, Head, Outcome, Rows};
use partialfc_testing::emulator::{self, Turn};
use partialfc_testing::gpu::{free_memory, gpu, Remote};
use partialfc_testing::numbers::{assert_close, widen};
use partialfc_testing::ranks::on_ranks;

use super::device::{assert_told, embeddings, forward, small, step, CLASSES, DIM, LABELS, OUT_OF_MEMORY, ROWS};

/// What the driver holds for the process: free device memory, and how many of each thing there are that a call makes and another gives
/// back.
fn held(turn: &Turn) -> (usize, Vec<i64>) {
    let pairs = [
        ("cuMemHostAlloc", "cuMemFreeHost"),
        ("cuStreamCreateWithPriority", "cuStreamDestroy_v2"),
        ("cuEventCreate", "cuEventDestroy_v2"),
        ("cuModuleLoadData", "cuModuleUnload"),
    ];
    let calls = |name: &str| turn.calls(name).map_or(0, |count| count as i64);
    (free_memory(), pairs.iter().map(|(make, free)| calls(make) - calls(free)).collect())
}

/// The first number after `words`.
fn number_after(words: &str, text: &str) -> u64 {
    let rest = text.split(words).nth(1).unwrap_or_else(|| panic!("{words:?} is not in: {text}"));
    let digits: String = rest.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or_else(|e| panic!("{e} after {words:?} in: {text}"))
}

/// Tries `attempt` with the first, the second, the third .. call of a driver function failing for want of memory, until there are no
/// more such calls: at least `least`. What each failure said goes to `judge`.
fn starve(turn: &Turn, function: &str, least: u64, mut attempt: impl FnMut() -> Outcome<()>, judge: impl Fn(&str, Failure)) {
    let mut nth = 1;
    loop {
        turn.fail(function, nth, OUT_OF_MEMORY);
        match attempt() {
            Ok(()) => break,
            Err(failure) => judge(&format!("{function} {nth}"), failure),
        }
        nth += 1;
        assert!(nth < 500, "{function} is called for ever");
    }
    turn.fail("", 0, 0);
    assert!(nth > least, "{function} failed {} times", nth - 1);
}

#[test]
fn a_head_for_which_there_is_no_memory_leaves_nothing_behind() {
    let turn = emulator::turn(6);
    if !turn.is_emulator() {
        return;
    }
    let device = gpu();
    let cases = [
        ("cuMemAlloc_v2", Residency::Device, 50),
        ("cuMemHostAlloc", Residency::Device, 5),
        // Class centers and momentum as well.
        ("cuMemHostAlloc", Residency::Host, 7),
    ];
    for (function, residency, least) in cases {
        let of_the_gpu = function == "cuMemAlloc_v2";
        for placement in [Placement::Sharded, Placement::Replicated] {
            let options = HeadOptions { placement, residency: residency.clone(), ..small() };
            let before = held(&turn);
            let create = || Head::with(&device, &Comm::solo(), &options).map(drop);
            starve(&turn, function, least, create, |what, failure| {
                assert_told::<()>(what, Err(failure.clone()), Status::OutOfMemory, &["bytes", "rank 0"]);
                if of_the_gpu {
                    let free = number_after("GPU 0,", &failure.message);
                    assert!(free > 0 && free <= before.0 as u64, "{what}: {failure:?}");
                }
                assert_eq!(held(&turn), before, "{what}: something is left");
            });
            assert_eq!(held(&turn), before, "{function}: something is left");
        }
    }
    // More than any machine has of page-locked memory is refused before any is made.
    let huge =
        HeadOptions { num_classes: 4_000_000_000, embedding_dim: 1024, sample_rate: 0.0, residency: Residency::Host, ..small() };
    let refused = Head::with(&device, &Comm::solo(), &huge).map(drop);
    assert_told(
        "32 TB",
        refused,
        Status::OutOfMemory,
        &["class centers and optimizer state in page-locked memory", "the machine has"],
    );
    // And where there really is no more: what was wanted and what was there.
    let limit = 100_000;
    turn.memory(limit);
    let refused = Head::with(&device, &Comm::solo(), &small()).map(drop);
    turn.memory(1 << 30);
    let failure = assert_told("100 kB", refused, Status::OutOfMemory, &["bytes", "GPU 0", "are free"]);
    let (wanted, free) = (number_after("allocate ", &failure.message), number_after("GPU 0,", &failure.message));
    assert!(wanted > free && free < limit, "{failure:?}");
}

/// A head that is given other classes has its rows twice for a while. Without memory for that it has those it had.
#[test]
fn classes_for_which_there_is_no_memory_leave_the_head_as_it_was() {
    let turn = emulator::turn(8);
    if !turn.is_emulator() {
        return;
    }
    let device = gpu();
    for (function, least) in [("cuMemAlloc_v2", 50), ("cuMemHostAlloc", 5)] {
        let mut head = Head::new(&device, &Comm::solo(), &small());
        let (rows, shard, before) = (head.centers(), head.shard(), held(&turn));
        starve(
            &turn,
            function,
            least,
            || head.resize(shard.1 + 1),
            |what, failure| {
                assert_told::<()>(what, Err(failure), Status::OutOfMemory, &["bytes", "rank 0"]);
                assert_eq!(held(&turn), before, "{what}: something is left");
            },
        );
        assert_eq!(head.shard(), (0, shard.1 + 1));
        assert_eq!(head.centers()[..rows.len()], rows);
        head.resize(shard.1).expect("the classes it had");
        assert_eq!((head.centers(), held(&turn)), (rows, before), "{function}");
    }
}

/// Of several ranks on one GPU one is refused its memory: it says so, and the others that it did.
#[test]
fn a_rank_without_memory_is_heard_of_on_all() {
    let turn = emulator::turn(7);
    if !turn.is_emulator() {
        return;
    }
    drop(gpu());
    let before = held(&turn);
    turn.fail("cuMemAlloc_v2", 25, OUT_OF_MEMORY);
    let told = on_ranks(3, |place| {
        let device = gpu();
        let refused = Head::with(&device, &place.comm, &small()).map(drop).expect_err("memory for two");
        Head::new(&device, &place.comm, &small());
        refused
    });
    assert_one_of_all(&told, Status::OutOfMemory, &["bytes", "are free"]);
    assert_eq!(held(&turn), before, "something is left");
}

/// One rank has the status and the words, the others REMOTE with its number.
#[track_caller]
fn assert_one_of_all(told: &[Failure], status: Status, words: &[&str]) {
    let own = told.iter().position(|failure| failure.status == status as i32).unwrap_or_else(|| panic!("{told:?}"));
    let name = format!("rank {own}");
    let named = [name.as_str()];
    for (rank, failure) in told.iter().enumerate() {
        let (status, words) = if rank == own { (status, words) } else { (Status::Remote, named.as_slice()) };
        assert_told::<()>(&format!("rank {rank} of {told:?}"), Err(failure.clone()), status, words);
    }
}

/// Memory that a step asks for: the host's matrices and a caller's sample pass through it.
#[test]
fn a_step_for_which_there_is_no_memory_is_told_and_the_head_works_on() {
    let turn = emulator::turn(8);
    if !turn.is_emulator() {
        return;
    }
    let device = gpu();
    let mut expected = None;
    for placement in [Placement::Sharded, Placement::Replicated] {
        // A sharded head's rows travel as a replicated one has them.
        let options = HeadOptions { placement, gather_dtype: Some(DType::F32), ..small() };
        let mut head = Head::new(&device, &Comm::solo(), &options);
        let (before, mut gradient) = (head.centers(), Rows::output(ROWS, DIM));
        // Reading has made room for rows, which is too little for a batch in float32 once there is none.
        let forward = |head: &mut Head| {
            let ids: Vec<i64> = (0..CLASSES as i64).step_by(2).collect();
            head.set_sample(&ids)?;
            head.forward(&mut embeddings(), Some(&LABELS)).map(drop)
        };
        let tell = |what: &str, failure: Failure| {
            assert_told::<()>(what, Err(failure), Status::OutOfMemory, &["bytes", "are free", "rank 0"]);
        };
        starve(&turn, "cuMemAlloc_v2", 10, || forward(&mut head), tell);
        assert_eq!(head.centers(), before, "{placement:?}: rows have moved");
        head.backward(1.0, 1.0, &mut gradient).expect("backward");
        head.update(0.1).expect("update");
        let (after, drawn) = (head.centers(), head.sample_ids().expect("ids"));
        assert_eq!(drawn.len(), CLASSES as usize / 2 + 2, "the sample with two positives that it lacks");
        // As in a head that was never refused anything, and on both placements, of one rank, but for roundings.
        let mut easy = Head::new(&device, &Comm::solo(), &options);
        forward(&mut easy).expect("forward");
        easy.backward(1.0, 1.0, &mut gradient).expect("backward");
        easy.update(0.1).expect("update");
        assert_eq!(easy.centers(), after, "{placement:?}");
        assert_close("both placements", &widen(&after), &widen(expected.get_or_insert(after.clone())), 1e-6);
    }
}

/// A gradient for which there is no room is that rank's alone, and the class centers move all the same.
#[test]
fn a_gradient_for_which_there_is_no_memory_does_not_end_the_step() {
    let turn = emulator::turn(9);
    if !turn.is_emulator() {
        return;
    }
    let mut head = Head::new(&gpu(), &Comm::solo(), &small());
    let before = head.read_centers(LABELS[0] as u64, 1).expect("a row");
    let (values, mut gradient) = (embeddings().values(), Rows::output(ROWS, DIM));
    // Half the size, so that the gradient does not fit where they were.
    let mut narrow = Rows::new(&values, DIM, DType::F16, 0);
    head.forward(&mut narrow, Some(&LABELS)).expect("forward");
    turn.fail("cuMemAlloc_v2", 1, OUT_OF_MEMORY);
    let words = ["matrix", "bytes", "are free", "rank 0"];
    assert_told("a gradient", head.backward(1.0, 1.0, &mut gradient), Status::OutOfMemory, &words);
    assert_eq!(gradient.values(), [-123.0; ROWS * DIM], "written");
    head.update(0.1).expect("update");
    assert_eq!(head.metrics().expect("metrics").updates, 1);
    assert!(head.metrics().expect("metrics").grad_embeddings_norm > 0.0);
    assert_ne!(head.read_centers(LABELS[0] as u64, 1).expect("a row"), before);
    step(&mut head).expect("the head works on");
}

/// The embeddings' way to the GPU on several ranks, with the loss on the host and on the GPU.
#[test]
fn a_rank_whose_step_finds_no_memory_fails_the_step_on_all() {
    let turn = emulator::turn(10);
    if !turn.is_emulator() {
        return;
    }
    for placement in [Placement::Sharded, Placement::Replicated] {
        for late in [false, true] {
            // The first rank that asks is refused: which one that is the threads decide.
            let told = on_ranks(3, |place| {
                let head = Head::new(&gpu(), &place.comm, &HeadOptions { placement, ..small() });
                let (mut rows, mut gradient) = (embeddings(), Rows::output(ROWS, DIM));
                let (rows, gradient) = (rows.view(), gradient.view());
                let (loss, mut host) = (Remote::of(&[0f64]), 0.0);
                let loss = if late { loss.address as *mut f64 } else { &mut host };
                let refuse_one = || {
                    place.comm.barrier().expect("all are there");
                    if place.rank == 0 {
                        turn.fail("cuMemAlloc_v2", 1, OUT_OF_MEMORY);
                    }
                    place.comm.barrier().expect("all are there");
                };
                refuse_one();
                let mut failure = None;
                for round in 0..2 {
                    // SAFETY: a live head; arrays of the sizes that it takes, until after the wait.
                    unsafe {
                        let told = outcome(c_head::pfc_head_forward(head.raw, &rows, LABELS.as_ptr(), loss));
                        if told.is_ok() || late {
                            let backward = outcome(c_head::pfc_head_backward(head.raw, 1.0, 1.0, &gradient));
                            assert_eq!(backward, told, "round {round}");
                            assert_eq!(outcome(c_head::pfc_head_update(head.raw, 0.1)), told, "round {round}");
                        }
                        let waited = outcome(c_head::pfc_head_wait(head.raw));
                        let verdict = if late { waited } else { told.and(waited) };
                        assert_eq!(verdict.is_err(), round == 0, "round {round}: {verdict:?}");
                        failure = failure.or(verdict.err());
                    }
                }
                failure.expect("the first round's")
            });
            assert_one_of_all(&told, Status::OutOfMemory, &["a matrix", "bytes", "are free"]);
        }
    }
}

/// A sample beyond every draw for which one rank has no room: its own failure, which its peers hear of.
#[test]
fn a_rank_that_has_no_room_for_a_large_sample_fails_the_step_on_all() {
    let turn = emulator::turn(13);
    if !turn.is_emulator() {
        return;
    }
    for placement in [Placement::Sharded, Placement::Replicated] {
        for late in [false, true] {
            let told = on_ranks(3, |place| {
                let mut head = Head::new(&gpu(), &place.comm, &HeadOptions { placement, sample_rate: 0.0, ..small() });
                let (rows, gradient) = (Remote::of(&embeddings().values_f32()), Remote::of(&[0f32; ROWS * DIM]));
                let (loss, mut host) = (Remote::of(&[0f64]), 0.0);
                let loss = if late { loss.address as *mut f64 } else { &mut host };
                let (first, count) = head.shard();
                let ids: Vec<i64> = (first as i64..(first + count) as i64).step_by(2).collect();
                place.comm.barrier().expect("all are there");
                if place.rank == 0 {
                    // Who asks first, and is refused, the threads decide.
                    turn.fail("cuMemAlloc_v2", 1, OUT_OF_MEMORY);
                }
                place.comm.barrier().expect("all are there");
                let mut failure = None;
                for round in 0..2 {
                    head.set_sample(&ids).expect("a sample by itself");
                    let forward = forward(&head, &rows, &LABELS, loss);
                    if forward.is_ok() || late {
                        // SAFETY: a live head; an array of the size that it takes, until after the wait.
                        unsafe {
                            let backward = outcome(c_head::pfc_head_backward(head.raw, 1.0, 1.0, &gradient.matrix(DIM)));
                            assert_eq!(backward, forward, "round {round}");
                        }
                        assert_eq!(head.update(0.1), forward, "round {round}");
                    }
                    let waited = head.wait();
                    let verdict = if late { waited } else { forward.and(waited) };
                    assert_eq!(verdict.is_err(), round == 0, "{placement:?}, round {round}: {verdict:?}");
                    failure = failure.or(verdict.err());
                }
                failure.expect("the first round's")
            });
            assert_one_of_all(&told, Status::OutOfMemory, &["bytes", "are free"]);
        }
    }
}
