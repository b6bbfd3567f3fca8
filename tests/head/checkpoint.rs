//! Saving a head to a directory and loading it: on the same ranks to the bit, on others as the same model, and never half.

use std::path::{Path, PathBuf};

use partialfc::optimizer::{Optimizer, Sgd};
use partialfc::options::{HeadOptions, Placement, RowUpdate};
use partialfc::shard::Shard;
use partialfc::Status;
use partialfc_testing::capi::{options, Device, Failure, Head, Outcome, Rows};
use partialfc_testing::numbers::assert_close;
use partialfc_testing::programs::scratch;
use partialfc_testing::ranks::on_ranks;
use partialfc_testing::training::{assert_same_bits, stored_both_ways, train_step, ways_to_update, Trace, ADAMW};

/// Rows of a file cross the checksums' blocks of 1 MiB: 1,300 rows of 1 KiB, twice or three times.
const CLASSES: u64 = 1300;
const DIM: u32 = 256;

fn base() -> HeadOptions {
    HeadOptions { sample_rate: 0.1, seed: 3, ..options(CLASSES, DIM, 8) }
}

/// An empty folder for a test.
pub(super) fn folder(name: &str) -> PathBuf {
    let folder = scratch("checkpoints").join(name);
    if folder.exists() {
        std::fs::remove_dir_all(&folder).expect("an old folder");
    }
    folder
}

pub(super) fn files(folder: &Path) -> Vec<String> {
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.expect("an entry").file_name().into_string().expect("a name");
    let mut names: Vec<String> = std::fs::read_dir(folder).expect("the folder").map(name).collect();
    names.sort();
    names
}

/// Three steps on `ranks` ranks, saved; then what three more give on the same ranks, all in one trace.
fn saved_and_gone_on(options: &HeadOptions, ranks: usize, folder: &Path) -> Vec<Trace> {
    on_ranks(ranks, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, options);
        (0..3).for_each(|step| train_step(&mut head, place, options, step, &mut Trace::default()));
        head.save(folder).expect("a save");
        let mut trace = Trace::default();
        (3..6).for_each(|step| train_step(&mut head, place, options, step, &mut trace));
        trace.saw_rows(&mut head, options);
        trace
    })
}

#[test]
fn a_loaded_head_goes_on_to_the_bit() {
    for (number, options) in ways_to_update(&base()).into_iter().flat_map(stored_both_ways).enumerate() {
        let folder = folder(&format!("bits-{number}"));
        let expected = saved_and_gone_on(&options, 2, &folder);
        let found = on_ranks(2, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, &HeadOptions { seed: options.seed, ..options.clone() });
            // What the head was before does not matter.
            train_step(&mut head, place, &options, 77, &mut Trace::default());
            head.load(&folder).expect("a load");
            let mut trace = Trace::default();
            (3..6).for_each(|step| train_step(&mut head, place, &options, step, &mut trace));
            trace.saw_rows(&mut head, &options);
            trace
        });
        let what = format!("{:?} {:?} {:?}", options.placement, options.row_update, options.optimizer);
        assert_same_bits(&what, &found, &expected);
        assert_eq!(files(&folder), ["manifest.json", "rows-1-0-of-2.safetensors", "rows-1-1-of-2.safetensors"]);
    }
}

#[test]
fn any_number_of_ranks_loads_it() {
    for placement in [Placement::Sharded, Placement::Replicated] {
        let options = HeadOptions { placement, optimizer: ADAMW, ..base() };
        for ranks in [1, 3] {
            let folder = folder(&format!("ranks-{placement:?}-{ranks}"));
            let rows = on_ranks(ranks, |place| {
                let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
                train_step(&mut head, place, &options, 0, &mut Trace::default());
                head.save(&folder).expect("a save");
                (head.centers(), head.read_progress().expect("progress"))
            });
            let whole: Vec<f32> = match placement {
                Placement::Sharded => rows.iter().flat_map(|(centers, _)| centers.clone()).collect(),
                Placement::Replicated => rows[0].0.clone(),
            };
            for (others, to) in [(2, Placement::Sharded), (4, Placement::Sharded), (2, Placement::Replicated)] {
                let options = HeadOptions { placement: to, ..options.clone() };
                let losses = on_ranks(others, |place| {
                    let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
                    head.load(&folder).expect("a load");
                    let (first, count) = head.shard();
                    let range = first as usize * DIM as usize..(first + count) as usize * DIM as usize;
                    assert!(head.centers() == whole[range], "{placement:?} of {ranks} as {to:?} of {others}: rank {}", place.rank);
                    assert_eq!(head.read_progress().expect("progress"), rows[0].1);
                    let mut trace = Trace::default();
                    train_step(&mut head, place, &options, 1, &mut trace);
                    trace.losses()[0]
                });
                assert_close("the ranks' losses", &losses, &vec![losses[0]; others], 1e-6);
            }
        }
    }
}

#[test]
fn a_save_takes_the_place_of_the_one_before() {
    let folder = folder("generations");
    on_ranks(2, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, &base());
        for step in 0..3 {
            train_step(&mut head, place, &base(), step, &mut Trace::default());
            if place.rank == 0 && step == 2 {
                // What killed saves leave.
                std::fs::write(folder.join("rows-9-1-of-2.safetensors.tmp"), "half").expect("a file");
                std::fs::write(folder.join("manifest.json.tmp"), "half").expect("a file");
                std::fs::write(folder.join("notes.txt"), "somebody's").expect("a file");
                std::fs::write(folder.join("rows-2-0-of-2-best.safetensors"), "somebody's").expect("a file");
            }
            place.comm.barrier().expect("a barrier");
            head.save(&folder).expect("a save");
        }
        assert_eq!(head.read_progress().expect("progress"), (3, 3));
    });
    let whole = ["rows-10-0-of-2.safetensors", "rows-10-1-of-2.safetensors"];
    assert_eq!(files(&folder), ["manifest.json", "notes.txt", whole[0], whole[1], "rows-2-0-of-2-best.safetensors"]);
}

/// A folder with a checkpoint of two ranks, and the rows that it holds.
fn sound(name: &str) -> (PathBuf, Vec<f32>) {
    let folder = folder(name);
    let rows = on_ranks(2, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, &base());
        train_step(&mut head, place, &base(), 0, &mut Trace::default());
        head.save(&folder).expect("a save");
        head.centers()
    });
    (folder, rows.concat())
}

/// Loads on one rank with these options.
fn load(folder: &Path, options: &HeadOptions) -> (Head, Outcome) {
    let mut head = Head::new(&Device::under_test(1), &partialfc_testing::capi::Comm::solo(), options);
    let outcome = head.load(folder);
    (head, outcome)
}

#[track_caller]
pub(super) fn assert_failure(what: &str, outcome: Outcome, status: Status, words: &[&str]) {
    let Failure { status: found, message } = outcome.expect_err(what);
    assert_eq!(found, status as i32, "{what}: {message}");
    assert!(words.iter().all(|word| message.contains(word)), "{what}: {message}");
}

#[test]
fn what_is_not_what_was_written_is_corrupt() {
    let (folder, rows) = sound("corrupt");
    let file = folder.join("rows-1-1-of-2.safetensors");
    let bytes = std::fs::read(&file).expect("the file");
    let half = CLASSES as usize / 2 * DIM as usize * 4;
    assert_eq!(bytes.len(), 4096 + 2 * half + 8, "two tensors, two blocks");
    // The header's length, the header, its padding, both tensors in both blocks, the checksums.
    for at in [0, 9, 4000, 4096, 4096 + half - 1, 4096 + half, 1 << 20, 4096 + 2 * half - 1, 4096 + 2 * half, bytes.len() - 1] {
        let mut other = bytes.clone();
        other[at] ^= 0x10;
        std::fs::write(&file, &other).expect("a file");
        let (mut head, outcome) = load(&folder, &base());
        let block = match at {
            _ if at < 1 << 20 => "bytes 0 to 1048576",
            _ if at < 4096 + 2 * half => "bytes 1048576 to",
            _ => "the checksums",
        };
        assert_failure(&format!("byte {at}"), outcome, Status::Corrupt, &["rows-1-1-of-2.safetensors", block]);
        if at >= 4096 + 2 * half {
            assert_eq!(head.read_progress().expect("a head that is as it was"), (0, 0));
            continue;
        }
        let again = head.step(&mut Rows::f32(&[0.0; DIM as usize], DIM as usize), &[0], 0.1, &mut Rows::output(1, DIM as usize));
        assert_failure("afterwards", again.map(|_| ()), Status::Poisoned, &["rows-1-1-of-2"]);
    }
    for length in [0, 7, 4096, 4096 + half, bytes.len() - 1] {
        std::fs::write(&file, &bytes[..length]).expect("a file");
        let (mut head, outcome) = load(&folder, &base());
        assert_failure("cut short", outcome, Status::Corrupt, &[&format!("{length} bytes"), "rows-1-1-of-2"]);
        assert_eq!(head.read_progress().expect("a head that is as it was"), (0, 0));
    }
    std::fs::remove_file(&file).expect("the file");
    assert_failure("missing", load(&folder, &base()).1, Status::Corrupt, &["rows-1-1-of-2", "not there"]);
    // The other rank's file has as many bytes.
    std::fs::copy(folder.join("rows-1-0-of-2.safetensors"), &file).expect("a copy");
    assert_failure("swapped", load(&folder, &base()).1, Status::Corrupt, &["rows-1-1-of-2", "the checksums"]);
    std::fs::write(&file, &bytes).expect("a file");
    let (mut head, outcome) = load(&folder, &base());
    outcome.expect("what was written");
    assert!(head.centers() == rows);
}

#[test]
fn another_kind_of_head_is_refused_and_stays_as_it_is() {
    let (folder, _) = sound("other-heads");
    let others = [
        (HeadOptions { num_classes: 1301, ..base() }, ["num_classes", "1300", "1301"]),
        (HeadOptions { embedding_dim: 255, ..base() }, ["embedding_dim", "256", "255"]),
        (HeadOptions { optimizer: ADAMW, ..base() }, ["optimizer", "weight, momentum,", "second_moment"]),
    ];
    for (options, words) in others {
        let (mut head, outcome) = load(&folder, &options);
        assert_failure(words[0], outcome, Status::Mismatch, &words);
        assert_eq!(head.read_progress().expect("a usable head"), (0, 0));
    }
    let manifest = std::fs::read_to_string(folder.join("manifest.json")).expect("the manifest");
    std::fs::write(folder.join("manifest.json"), manifest.replace("\"format\": 1", "\"format\": 3")).expect("a file");
    let (mut head, outcome) = load(&folder, &base());
    assert_failure("a later format", outcome, Status::Unsupported, &["manifest.json", "format 3", "reads formats 1 to 2"]);
    assert_eq!(head.read_progress().expect("a usable head"), (0, 0));
    let (_, outcome) = load(&folder.join("elsewhere"), &base());
    assert_failure("no directory", outcome, Status::Io, &["elsewhere", "manifest.json", "rank 0"]);
}

#[test]
fn a_rank_that_cannot_write_fails_the_save_on_all() {
    let (folder, rows) = sound("not-written");
    let file = folder.join("notes");
    std::fs::write(&file, "no folder").expect("a file");
    on_ranks(2, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, &base());
        head.load(&folder).expect("a load");
        train_step(&mut head, place, &base(), 1, &mut Trace::default());
        let outcome = head.save(if place.rank == 1 { &file } else { &folder });
        match place.rank {
            1 => assert_failure("a file for a folder", outcome, Status::Io, &["notes", "rank 1"]),
            _ => assert_failure("the other rank", outcome, Status::Remote, &["rank 1", "IO"]),
        }
        // Not in the same directory.
        let outcome = head.save(&if place.rank == 1 { folder.join("apart") } else { folder.clone() });
        match place.rank {
            0 => assert_failure("two directories", outcome, Status::Io, &["rank 1 has written", "one directory"]),
            _ => assert_failure("the other rank", outcome, Status::Remote, &["rank 0", "IO"]),
        }
        train_step(&mut head, place, &base(), 2, &mut Trace::default());
        let Shard { first, rows: count } = Shard::of(CLASSES, 2, place.rank as u64);
        let mut before = Head::new(&Device::under_test(1), &place.comm, &base());
        before.load(&folder).expect("the checkpoint before");
        let range = first as usize * DIM as usize..(first + count) as usize * DIM as usize;
        assert!(before.centers() == rows[range]);
    });
    assert_eq!(
        files(&folder),
        ["apart", "manifest.json", "notes", "rows-1-0-of-2.safetensors", "rows-1-1-of-2.safetensors"],
        "nothing is left of saves that failed"
    );
}

/// A rank whose directory is wrong brings its dense rows to now all the same: replicas go on alike.
#[test]
fn a_save_that_fails_on_one_rank_leaves_replicas_alike() {
    let file = folder("alike");
    std::fs::create_dir_all(file.parent().expect("a folder")).expect("a folder");
    std::fs::write(&file, "no folder").expect("a file");
    let options = HeadOptions { placement: Placement::Replicated, row_update: RowUpdate::Dense, ..base() };
    on_ranks(2, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
        for step in 0..3 {
            train_step(&mut head, place, &options, step, &mut Trace::default());
            let outcome = head.save(&if place.rank == 1 { file.clone() } else { folder(&format!("alike-{step}")) });
            match place.rank {
                1 => assert_failure("a file for a folder", outcome, Status::Io, &["alike", "rank 1"]),
                _ => assert_failure("the other rank", outcome, Status::Remote, &["rank 1", "IO"]),
            }
        }
    });
    std::fs::remove_file(&file).expect("the file");
}

/// Dense rows that no sample has may leave float32 unseen.
#[test]
fn rows_that_no_load_would_take_are_not_saved() {
    let folder = folder("not-finite");
    let sgd = Optimizer::Sgd(Sgd { momentum: 0.0, weight_decay: 1e13 });
    let options = HeadOptions { sample_rate: 0.0, row_update: RowUpdate::Dense, optimizer: sgd, ..options(4, 2, 0) };
    let mut head = Head::new(&Device::under_test(1), &partialfc_testing::capi::Comm::solo(), &options);
    // The class that the steps look at is the last to leave it.
    head.write_centers(0, &[1e-30, 1e-30]).expect("a row");
    head.save(&folder).expect("a save");
    for _ in 0..4 {
        let (mut rows, mut grad) = (Rows::f32(&[1.0, 2.0], 2), Rows::output(1, 2));
        head.step(&mut rows, &[0], 0.1, &mut grad).expect("a step");
    }
    assert_failure("a save", head.save(&folder), Status::NotFinite, &["weight of class 1 is not finite", "rank 0"]);
    let (mut before, outcome) = load(&folder, &options);
    outcome.expect("the checkpoint before");
    assert_eq!(before.centers()[..2], [1e-30, 1e-30]);
}

#[test]
fn accumulated_gradients_are_not_saved() {
    let folder = folder("accumulated");
    let mut head = Head::new(&Device::under_test(1), &partialfc_testing::capi::Comm::solo(), &base());
    let (mut rows, mut grad) = (Rows::f32(&[1.0; DIM as usize], DIM as usize), Rows::output(1, DIM as usize));
    head.forward(&mut rows, Some(&[5])).expect("forward");
    head.backward(1.0, 1.0, &mut grad).expect("backward");
    head.accumulate().expect("accumulate");
    assert_failure("a save", head.save(&folder), Status::InvalidArgument, &["1 micro-batches", "update first"]);
    head.update(0.1).expect("an update");
    head.save(&folder).expect("a save");
}
