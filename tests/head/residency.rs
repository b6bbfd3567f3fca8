//! Rows in a file or in the host's memory: that no result depends on it, and what becomes of the file.
//!
//! `PFC_TEST_RESIDENCY=file` runs all other tests on heads whose rows are in files, on the CPU, and `PFC_TEST_RESIDENCY=host` those of a GPU
//! with rows in the host's memory.

use std::fs;
use std::path::{Path, PathBuf};

use partialfc::matrix::DType;
use partialfc::options::{HeadOptions, Placement, Residency, RowUpdate};
use partialfc::Status;
use partialfc_testing::capi::{on_cuda, options, plan, to_c, Comm, Device, Head, Rows, TestedResidency};
use partialfc_testing::programs::{fresh, scratch};
use partialfc_testing::ranks::{on_ranks, Rank};
use partialfc_testing::training::{
    assert_same_bits, bits, learning_rate, stored_both_ways, train_step, ways_to_update, Batch, Trace, ADAMW,
};

use super::checkpoint::{assert_failure, folder};

/// Some chunks of a sample on each of two ranks.
fn base() -> HeadOptions {
    HeadOptions { sample_rate: 0.3, seed: 5, ..options(3000, 9, 8) }
}

fn storage(name: &str) -> PathBuf {
    let storage = scratch("residency").join(name);
    fresh(&storage);
    storage
}

/// The same options with the rows in a folder of this name.
fn in_a_file(options: &HeadOptions, name: &str) -> HeadOptions {
    with_cache(options, name, 0)
}

/// The same, but for the first rows of each shard, which stay in memory.
fn with_cache(options: &HeadOptions, name: &str, rows: u64) -> HeadOptions {
    let state = options.optimizer.state_tensors() * options.state_dtype.size();
    let record = options.embedding_dim as usize * (options.weight_dtype.size() + state);
    HeadOptions { residency: Residency::File { directory: storage(name), cache: rows * record as u64 }, ..options.clone() }
}

fn names(folder: &Path) -> Vec<String> {
    let name = |entry: std::io::Result<fs::DirEntry>| entry.expect("an entry").file_name().into_string().expect("a name");
    let mut names: Vec<String> = fs::read_dir(folder).expect("the folder").map(name).collect();
    names.sort();
    names
}

/// All that a head is asked between steps, with what it answers.
fn eventful(place: &Rank, options: &HeadOptions, device: &Device) -> (Trace, Vec<u32>) {
    let (mut head, mut trace, mut seen) = (Head::new(device, &place.comm, options), Trace::default(), Vec::new());
    let (dim, rows) = (options.embedding_dim as usize, options.max_batch as usize);
    let (first, count) = head.shard();
    let batch = |step: usize| Batch::draw(options, place.rank, step, rows);
    let mut grad = Rows::output(rows, dim);
    for step in 0..3 {
        train_step(&mut head, place, options, step, &mut trace);
    }
    // The next step's sample is drawn before this one's rows are written.
    head.prepare(&batch(3).labels).expect("a prepared step");
    head.step(&mut batch(3).rows(dim), &batch(3).labels, 0.1, &mut grad).expect("a step");
    // Dense rows are brought to now, and written ones are replaced, while a step is under way.
    head.forward(&mut batch(4).rows(dim), Some(&batch(4).labels)).expect("a forward");
    assert_eq!(head.read_progress().expect("progress"), (5, 4));
    head.backward(1.0, 1.0, &mut grad).expect("a backward");
    head.update(0.05).expect("an update");
    let written: Vec<f32> = (0..3 * dim).map(|i| i as f32 - 4.5).collect();
    head.write_centers(first + count - 3, &written).expect("rows");
    // A sample of the caller's beyond every draw.
    let chosen: Vec<i64> = (first..first + count).filter(|id| id % 7 != 0).map(|id| id as i64).collect();
    head.set_sample(&chosen).expect("a sample");
    train_step(&mut head, place, options, 5, &mut trace);
    // Micro-batches, whose rows are more than those of a step.
    for step in 6..9 {
        head.forward(&mut batch(step).rows(dim), Some(&batch(step).labels)).expect("a forward");
        head.backward(0.3, 1.0, &mut grad).expect("a backward");
        head.accumulate().expect("a micro-batch");
    }
    head.update(learning_rate(9)).expect("an update");
    let norm = head.metrics().expect("metrics").grad_centers_norm.to_bits();
    seen.extend([norm as u32, (norm >> 32) as u32]);
    let (ids, cosines) = head.top_k(&mut batch(10).rows(dim), 5).expect("neighbors");
    seen.extend(ids.iter().map(|&id| id as u32));
    seen.extend(bits(&cosines));
    for step in 10..12 {
        train_step(&mut head, place, options, step, &mut trace);
    }
    trace.saw_rows(&mut head, options);
    (trace, seen)
}

#[test]
fn no_result_depends_on_where_the_rows_are() {
    for (number, base) in ways_to_update(&base()).into_iter().flat_map(stored_both_ways).enumerate() {
        // Records of less than a sector, of one, and of some.
        let (dim, sample_block) = ([9, 1, 67, 300][number % 4], [1, 16][number % 2]);
        let base = HeadOptions { embedding_dim: dim, sample_block, ..base };
        let run = |options: &HeadOptions| on_ranks(2, |place| eventful(place, options, &Device::cpu(2)));
        let (expected, seen): (Vec<_>, Vec<_>) = run(&base).into_iter().unzip();
        // None of the 1,500 rows of a rank in memory, some, all.
        let cached = [0, 501, 9999][number % 3];
        let (found, also) = run(&with_cache(&base, "same", cached)).into_iter().unzip::<_, _, Vec<_>, Vec<_>>();
        assert_same_bits(&format!("{base:?} in a file but for {cached} rows"), &found, &expected);
        assert_eq!(seen, also, "{base:?}: top k");
    }
}

#[test]
fn no_result_depends_on_whose_memory_the_rows_are_in() {
    // On a GPU a product updates rows that are sharded, lazy and in float32, and has roundings of its own; not so in the host's memory.
    let alike = |options: &HeadOptions| {
        let fused = (Placement::Sharded, RowUpdate::Lazy, DType::F32, DType::F32);
        !on_cuda() || (options.placement, options.row_update, options.weight_dtype, options.state_dtype) != fused
    };
    assert_eq!(TestedResidency::get(), TestedResidency::Device, "a head that is asked for no residency has its rows on the device");
    let small = HeadOptions { num_classes: 300, ..base() };
    // On a CPU both are the same memory.
    let enough = if on_cuda() { usize::MAX } else { 1 };
    for base in ways_to_update(&small).into_iter().flat_map(stored_both_ways).filter(alike).take(enough) {
        let run = |residency: Residency| {
            let options = HeadOptions { residency, ..base.clone() };
            on_ranks(2, |place| eventful(place, &options, &Device::under_test(2))).into_iter().unzip::<_, _, Vec<_>, Vec<_>>()
        };
        let ((expected, seen), (found, also)) = (run(Residency::Device), run(Residency::Host));
        assert_same_bits(&format!("{base:?} in the host's memory"), &found, &expected);
        assert_eq!(seen, also, "{base:?}: top k");
    }
}

#[test]
fn ranks_may_keep_their_rows_in_different_places() {
    let base = HeadOptions { weight_dtype: DType::Bf16, ..base() };
    let run = |on_file: bool| {
        on_ranks(2, |place| {
            let one = in_a_file(&base, &format!("mixed-{}", place.rank));
            eventful(place, if on_file && place.rank == 1 { &one } else { &base }, &Device::cpu(1)).0
        })
    };
    assert_same_bits("one of two ranks", &run(true), &run(false));
}

#[test]
fn a_checkpoint_moves_rows_between_memory_and_files() {
    for row_update in [RowUpdate::Lazy, RowUpdate::Dense] {
        let base = HeadOptions { row_update, optimizer: ADAMW, ..base() };
        let file = in_a_file(&base, "moved");
        let (directory, comm) = (folder("residency"), Comm::solo());
        let step = |head: &mut Head, number: usize| {
            let (batch, mut grad) = (Batch::draw(&base, 0, number, 8), Rows::output(8, 9));
            head.step(&mut batch.rows(9), &batch.labels, 0.1, &mut grad).expect("a step").to_bits()
        };
        let mut stored = Head::new(&Device::cpu(2), &comm, &file);
        for number in 0..4 {
            step(&mut stored, number);
        }
        stored.save(&directory).expect("a checkpoint");
        let mut resident = Head::new(&Device::cpu(2), &comm, &base);
        resident.load(&directory).expect("its rows");
        assert_eq!(step(&mut resident, 4), step(&mut stored, 4));
        assert_eq!(bits(&resident.centers()), bits(&stored.centers()));
        resident.save(&directory).expect("a checkpoint");
        drop(stored);
        let mut again = Head::new(&Device::cpu(2), &comm, &file);
        again.load(&directory).expect("its rows");
        assert_eq!(step(&mut resident, 5), step(&mut again, 5));
        assert_eq!(bits(&resident.second_moment()), bits(&again.second_moment()));
    }
}

#[test]
fn a_file_serves_one_head_and_goes_with_it() {
    let options = in_a_file(&base(), "owned");
    let Residency::File { directory: storage, .. } = options.residency.clone() else { unreachable!() };
    let name = "rows-0-of-1.partialfc";
    // A process that was killed has left this.
    fs::write(storage.join(name), vec![0x55; 1 << 20]).expect("a file");
    let (device, comm) = (Device::cpu(1), Comm::solo());
    let mut head = Head::new(&device, &comm, &options);
    assert_eq!(bits(&head.centers()), bits(&Head::new(&device, &comm, &base()).centers()), "start values");
    assert_eq!(names(&storage), [name]);
    let needed = plan(&to_c(&options), 1, 8).expect("a plan").storage_bytes;
    let length = fs::metadata(storage.join(name)).expect("the file").len();
    assert!(length >= 3000 * 9 * 8 && length <= needed, "{length} of {needed} bytes");

    let second = Head::with(&device, &comm, &options).map(drop);
    assert_failure("a second head", second, Status::Io, &["cannot use", name, "another head has its rows in it"]);
    // Nothing of it has touched the first one's rows.
    let mut trace = Trace::default();
    let place = Rank { rank: 0, size: 1, comm: Comm::solo() };
    train_step(&mut head, &place, &options, 0, &mut trace);
    // With other classes it has another file, which has the name.
    head.resize(2000).expect("other classes");
    assert_eq!(names(&storage), [name]);
    let shorter = fs::metadata(storage.join(name)).expect("the file").len();
    assert!(shorter < length && shorter >= 2000 * 9 * 8, "{shorter} bytes after {length}");
    let second = Head::with(&device, &comm, &options).map(drop);
    assert_failure("a second head", second, Status::Io, &["cannot use", name, "another head has its rows in it"]);
    drop(head);
    assert_eq!(names(&storage), [""; 0]);
    // Where memory has all rows the file is empty.
    let head = Head::new(&device, &comm, &with_cache(&base(), "owned", 3000));
    assert_eq!(fs::metadata(storage.join(name)).expect("the file").len(), 0);
    drop(head);
    // And a head that is made where there is no folder makes it.
    fs::remove_dir(&storage).expect("an empty folder");
    drop(Head::new(&device, &comm, &options));
    assert!(storage.is_dir());
}

#[test]
fn a_place_that_cannot_be_is_named() {
    let storage = storage("refused");
    fs::write(storage.join("file"), "").expect("a file");
    let options = HeadOptions { residency: Residency::File { directory: storage.join("file"), cache: 0 }, ..base() };
    let refused = |options: &HeadOptions| Head::with(&Device::cpu(1), &Comm::solo(), options).map(drop);
    assert_failure("no folder", refused(&options), Status::Io, &["cannot create", "refused/file", "(rank 0)"]);
    // More than any disk has: nothing is left of the attempt.
    let options = HeadOptions {
        num_classes: u64::from(u32::MAX),
        embedding_dim: 65536,
        sample_rate: 0.0,
        residency: Residency::File { directory: storage.clone(), cache: 0 },
        ..base()
    };
    let words = ["cannot reserve", "bytes for 4294967295 rows in", "rows-0-of-1.partialfc"];
    assert_failure("no such disk", refused(&options), Status::Io, &words);
    assert_eq!(names(&storage), ["file"]);
}

/// What was written is gone: the rank that has lost it says so, and the other one that a rank did.
#[test]
fn a_file_that_is_cut_short_is_an_error_on_all_ranks() {
    let base = HeadOptions { placement: Placement::Sharded, ..base() };
    on_ranks(2, |place| {
        let options = in_a_file(&base, &format!("short-{}", place.rank));
        let Residency::File { directory: storage, .. } = &options.residency else { unreachable!() };
        let (mut head, mut grad) = (Head::new(&Device::cpu(2), &place.comm, &options), Rows::output(8, 9));
        let step = |head: &mut Head, number: usize, grad: &mut Rows| {
            let batch = Batch::draw(&options, place.rank, number, 8);
            head.step(&mut batch.rows(9), &batch.labels, 0.1, grad)
        };
        step(&mut head, 0, &mut grad).expect("a step");
        if place.rank == 1 {
            let file = fs::File::options().write(true).open(storage.join("rows-1-of-2.partialfc")).expect("the file");
            file.set_len(0).expect("a shorter file");
        }
        for number in 1..3 {
            let stepped = step(&mut head, number, &mut grad).map(|_| ());
            match place.rank {
                1 => assert_failure(
                    "rows that are gone",
                    stepped,
                    Status::Io,
                    &["cannot read", "rows-1-of-2.partialfc", "cut short"],
                ),
                _ => assert_failure("another rank's rows", stepped, Status::Remote, &["rank 1"]),
            }
        }
        // The head is as good as its file: rows that are there can be read.
        let (first, count) = head.shard();
        let read = head.read_centers(first, count).map(|rows| assert_eq!(rows.len(), 1500 * 9));
        match place.rank {
            1 => assert_failure("rows that are gone", read, Status::Io, &["cannot read"]),
            _ => read.expect("rows"),
        }
    });
}

/// The sample of a step that came to nothing, larger than what memory has room for, is no sample that memory has.
#[test]
fn rows_that_no_forward_has_read_are_not_brought_to_now() {
    for row_update in [RowUpdate::Lazy, RowUpdate::Dense] {
        let run = |options: &HeadOptions| {
            let place = Rank { rank: 0, size: 1, comm: Comm::solo() };
            let (mut head, mut trace) = (Head::new(&Device::cpu(1), &place.comm, options), Trace::default());
            train_step(&mut head, &place, options, 0, &mut trace);
            let (all, batch) = ((0..3000).filter(|id| id % 9 != 4).collect::<Vec<i64>>(), Batch::draw(options, 0, 1, 8));
            head.set_sample(&all).expect("a sample");
            head.prepare(&batch.labels).expect("a prepared step");
            let few = Batch::draw(options, 0, 1, 5);
            let refused = head.forward(&mut few.rows(9), None).map(drop);
            assert_failure("fewer rows than labels", refused, Status::InvalidArgument, &["rows"]);
            head.read_progress().expect("progress");
            train_step(&mut head, &place, options, 2, &mut trace);
            trace.saw_rows(&mut head, options);
            trace
        };
        let base = HeadOptions { row_update, ..base() };
        assert_same_bits("in a file", &[run(&in_a_file(&base, "unread"))], &[run(&base)]);
    }
}

#[test]
fn memory_has_the_rows_of_a_step() {
    let million = HeadOptions {
        sample_rate: 0.01,
        weight_dtype: DType::Bf16,
        state_dtype: DType::Bf16,
        residency: Residency::File { directory: PathBuf::from("/never/made"), cache: 0 },
        ..options(10_000_000, 512, 128)
    };
    let of = |options: &HeadOptions| plan(&to_c(options), 1, 128).expect("a plan");
    let report = of(&million);
    assert_eq!((report.weight_bytes, report.state_bytes), (100_000 * 1024, 100_000 * 1024));
    assert_eq!(report.storage_bytes, 10_000_000 * 2048);
    assert!(report.total_bytes < 600_000_000, "{} bytes", report.total_bytes);
    // A fourth of them stay in memory, and the file has the others.
    let cache = 10_000_000 * 2048 / 4;
    let cached =
        of(&HeadOptions { residency: Residency::File { directory: PathBuf::from("/never/made"), cache }, ..million.clone() });
    assert_eq!((cached.weight_bytes, cached.state_bytes), (2_600_000 * 1024, 2_600_000 * 1024));
    assert_eq!((cached.storage_bytes, cached.activation_bytes), (7_500_000 * 2048, report.activation_bytes));
    let resident = of(&HeadOptions { residency: Residency::Device, ..million.clone() });
    assert_eq!((resident.weight_bytes, resident.storage_bytes), (10_000_000 * 1024, 0));
    let adamw = of(&HeadOptions { optimizer: ADAMW, state_dtype: DType::F32, ..million });
    // 5 KiB, of which a file has two sectors.
    assert_eq!(adamw.storage_bytes, 10_000_000 * 8192);
}
