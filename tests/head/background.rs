//! Saving a head beside its training: the checkpoint is that of the start, on all ranks or on none.

use std::path::{Path, PathBuf};
use std::time::Duration;

use partialfc::options::{HeadOptions, Placement};
use partialfc::Status;
use partialfc_testing::capi::{options, Comm, Device, Head, Outcome};
use partialfc_testing::ranks::{on_comms, on_ranks};
use partialfc_testing::training::{assert_same_bits, stored_both_ways, train_step, ways_to_update, Trace};
use partialfc_testing::transport::{group, Fault};

use super::checkpoint::{assert_failure, files, folder};

/// 1 MiB of class centers on each of two ranks.
fn base() -> HeadOptions {
    HeadOptions { sample_rate: 0.1, seed: 3, ..options(1300, 256, 8) }
}

/// Polls until the save is over.
fn finish(head: &mut Head) -> Outcome {
    while !head.save_poll()? {
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn same_files(one: &Path, other: &Path) {
    assert_eq!(files(one), files(other));
    for name in files(one) {
        let read = |folder: &Path| std::fs::read(folder.join(&name)).expect("a file");
        assert!(read(one) == read(other), "{name} differs");
    }
}

#[test]
fn what_is_saved_is_the_head_of_the_start() {
    for (number, options) in ways_to_update(&base()).into_iter().flat_map(stored_both_ways).enumerate() {
        let (at_once, beside) = (folder(&format!("at-once-{number}")), folder(&format!("beside-{number}")));
        let run = |beside: Option<&PathBuf>| {
            on_ranks(2, |place| {
                let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
                let mut trace = Trace::default();
                (0..2).for_each(|step| train_step(&mut head, place, &options, step, &mut trace));
                head.save(&at_once).expect("a save");
                if let Some(beside) = beside {
                    head.save_start(beside).expect("a save that goes on");
                }
                (2..5).for_each(|step| train_step(&mut head, place, &options, step, &mut trace));
                if beside.is_some() {
                    finish(&mut head).expect("a checkpoint");
                }
                (5..6).for_each(|step| train_step(&mut head, place, &options, step, &mut trace));
                trace.saw_rows(&mut head, &options);
                trace
            })
        };
        let expected = run(None);
        std::fs::remove_dir_all(&at_once).expect("the folder");
        assert_same_bits(&format!("{options:?}, saved beside training"), &run(Some(&beside)), &expected);
        same_files(&at_once, &beside);
    }
}

#[test]
fn one_save_is_under_way_at_a_time() {
    let folder = folder("one-at-a-time");
    on_ranks(2, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, &base());
        let none = ["no save is under way: pfc_head_save_start begins one"];
        assert_failure("a poll", head.save_poll().map(drop), Status::InvalidArgument, &none);
        head.save_start(&folder).expect("a save that goes on");
        let refused = ["a save is under way: pfc_head_save_poll tells when it is over"];
        assert_failure("a save", head.save(&folder), Status::InvalidArgument, &refused);
        assert_failure("another", head.save_start(&folder), Status::InvalidArgument, &refused);
        finish(&mut head).expect("a checkpoint");
        assert_failure("a poll", head.save_poll().map(drop), Status::InvalidArgument, &none);
        head.save(&folder).expect("a save");
        head.save_start(&folder).expect("a save that goes on");
        finish(&mut head).expect("a checkpoint");
    });
    assert_eq!(files(&folder), ["manifest.json", "rows-3-0-of-2.safetensors", "rows-3-1-of-2.safetensors"]);
}

/// Rank 1 has a directory in which the system lets nobody make a file. That is found beside training; a directory that cannot be is found
/// at the start.
#[test]
fn a_rank_that_cannot_write_ends_the_save_on_all() {
    let folder = folder("one-cannot");
    on_ranks(2, |place| {
        let mut head = Head::new(&Device::under_test(1), &place.comm, &base());
        head.save(&folder).expect("a save");
        let own = place.rank == 1;
        let directory = if own { Path::new("/proc/self/task") } else { &folder };
        head.save_start(directory).expect("a save that goes on");
        train_step(&mut head, place, &base(), 0, &mut Trace::default());
        let over = finish(&mut head);
        match own {
            true => assert_failure("rank 1", over, Status::Io, &["cannot create /proc/self/task/rows-2-1-of-2", "(rank 1)"]),
            false => assert_failure("rank 0", over, Status::Remote, &["rank 1"]),
        }
        let started = head.save_start(if own { Path::new("") } else { &folder });
        match own {
            true => assert_failure("rank 1", started, Status::InvalidArgument, &["directory must not be empty"]),
            false => assert_failure("rank 0", started, Status::Remote, &["rank 1"]),
        }
        assert_failure("a poll", head.save_poll().map(drop), Status::InvalidArgument, &["no save is under way"]);
        // Nothing of it is left, and the head works on.
        place.comm.barrier().expect("a barrier");
        assert_eq!(files(&folder), ["manifest.json", "rows-1-0-of-2.safetensors", "rows-1-1-of-2.safetensors"]);
        place.comm.barrier().expect("a barrier");
        train_step(&mut head, place, &base(), 1, &mut Trace::default());
        head.save_start(&folder).expect("a save that goes on");
        finish(&mut head).expect("a checkpoint");
    });
    assert_eq!(files(&folder), ["manifest.json", "rows-2-0-of-2.safetensors", "rows-2-1-of-2.safetensors"]);
}

#[test]
fn a_head_that_goes_gives_its_save_up() {
    let folder = folder("given-up");
    let mut head = Head::new(&Device::under_test(1), &Comm::solo(), &base());
    head.save(&folder).expect("a save");
    let before = head.centers();
    head.write_centers(0, &vec![0.5; before.len()]).expect("other rows");
    head.save_start(&folder).expect("a save that goes on");
    drop(head);
    assert_eq!(files(&folder), ["manifest.json", "rows-1-0-of-1.safetensors"]);
    let mut head = Head::new(&Device::under_test(1), &Comm::solo(), &base());
    head.load(&folder).expect("the checkpoint before");
    assert_eq!(head.centers(), before);
}

#[test]
fn a_save_outlives_the_classes_that_it_has() {
    for placement in [Placement::Sharded, Placement::Replicated] {
        let options = HeadOptions { placement, ..base() };
        let folder = folder(&format!("outlived-{placement:?}"));
        on_ranks(2, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
            let before = head.centers();
            head.save_start(&folder).expect("a save that goes on");
            head.resize(700).expect("fewer classes");
            finish(&mut head).expect("a checkpoint");
            let mut loaded = Head::new(&Device::under_test(1), &place.comm, &options);
            loaded.load(&folder).expect("a head of as many classes as there were");
            assert_eq!(loaded.centers(), before);
        });
    }
}

/// Rank 1 does not learn what the others have told, or not all of it. Whatever rank 0 has done by then, the directory holds the checkpoint
/// before or the new one, also when the heads are gone.
#[test]
fn a_rank_that_hears_nothing_leaves_a_whole_checkpoint() {
    const NEVER: i64 = i64::MAX / 2;
    let cases = [Fault::Code, Fault::Short].into_iter().flat_map(|fault| [0, 1, 2, 3, NEVER].map(|operation| (fault, operation)));
    for (number, (fault, operation)) in cases.enumerate() {
        let folder = folder(&format!("unheard-{number}"));
        let written = |rank: usize| folder.join(format!("rows-2-{rank}-of-2.safetensors")).exists();
        let (comms, transports) = group(2);
        let failed = on_comms(comms, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, &base());
            head.save(&folder).expect("a save");
            let (first, count) = head.shard();
            head.write_centers(first, &vec![0.5; count as usize * head.dim]).expect("other rows");
            head.save_start(&folder).expect("a save that goes on");
            // From here on a poll finds it over, or one soon after.
            while !(written(0) && written(1)) {
                std::thread::sleep(Duration::from_millis(1));
            }
            place.comm.barrier().expect("a barrier");
            if place.rank == 1 {
                transports[1].plant(operation, fault);
            }
            finish(&mut head).is_err()
        });
        let what = format!("{fault:?} in operation {operation}");
        let mut head = Head::new(&Device::under_test(1), &Comm::solo(), &base());
        let before = head.centers();
        head.load(&folder).unwrap_or_else(|failure| panic!("{what}: {failure:?}"));
        let is_new = head.centers().iter().all(|&value| value == 0.5);
        assert!(is_new || head.centers() == before, "{what}: a mixture");
        // The first poll fails, or none does.
        assert!(failed[1] || operation > 0, "{what}");
        assert!(operation != NEVER || (is_new && !failed[0] && !failed[1]), "{what}");
    }
}
