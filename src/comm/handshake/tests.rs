use super::*;
use crate::Status;

/// Runs `body` on `size` threads and gives what they returned, in rank order.
fn on_ranks<T: Send>(size: u32, body: impl Fn(&Communicator) -> T + Sync) -> Vec<T> {
    let comms = Communicator::threads(size).unwrap();
    std::thread::scope(|scope| {
        let body = &body;
        let threads: Vec<_> = comms.iter().map(|comm| scope.spawn(move || body(comm))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn equal_fields_pass() {
    let outcomes = on_ranks(3, |comm| {
        agree(comm, Ok([Field::int("num_classes", 7), Field::signed("ignore_label", i64::MIN), Field::float("nan", f64::NAN)]))
    });
    assert_eq!(outcomes, vec![Ok(()); 3]);
}

#[test]
fn a_difference_reads_the_same_everywhere() {
    let float = on_ranks(3, |comm| {
        let rate = if comm.rank() == 1 { 0.2 } else { 0.1 };
        agree(comm, Ok([Field::int("seed", u64::MAX), Field::float("sample_rate", rate)]))
    });
    assert_eq!(float, vec![Err(error!(Mismatch, "sample_rate is 0.1 on rank 0 and 0.2 on rank 1")); 3]);
    let signed = on_ranks(2, |comm| agree(comm, Ok([Field::signed("ignore_label", -i64::from(comm.rank()))])));
    assert_eq!(signed, vec![Err(error!(Mismatch, "ignore_label is 0 on rank 0 and -1 on rank 1")); 2]);
    let int = on_ranks(2, |comm| agree(comm, Ok([Field::int("seed", u64::MAX - u64::from(comm.rank()))])));
    let text = "seed is 18446744073709551615 on rank 0 and 18446744073709551614 on rank 1";
    assert_eq!(int, vec![Err(error!(Mismatch, "{text}")); 2]);
}

#[test]
fn a_failure_reaches_the_others_and_the_communicator_lives() {
    let outcomes = on_ranks(3, |comm| {
        let mine = if comm.rank() == 1 { Err(error!(OutOfMemory, "no room")) } else { Ok([Field::int("seed", 1)]) };
        let first = agree(comm, mine);
        (first, agree(comm, Ok([Field::int("seed", 1)])))
    });
    let remote = Err(error!(Remote, "rank 1 failed with OUT_OF_MEMORY"));
    assert_eq!(outcomes[0], (remote.clone(), Ok(())));
    assert_eq!(outcomes[1], (Err(error!(OutOfMemory, "no room")), Ok(())));
    assert_eq!(outcomes[2], (remote, Ok(())));
}

#[test]
fn a_failed_rank_tells_its_own_error_even_if_nobody_listens() {
    let comm = Communicator::single().unwrap();
    comm.abort(&error!(Aborted, "over"));
    assert_eq!(agree::<1>(&comm, Err(error!(Label, "bad label"))), Err(error!(Label, "bad label")));
    assert_eq!(agree(&comm, Ok([Field::int("seed", 1)])).unwrap_err().status, Status::Aborted);
}
