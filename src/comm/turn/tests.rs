use super::*;
use crate::Status;

#[test]
fn a_second_thread_is_refused_until_the_first_has_done() {
    let comm = Communicator::single().unwrap();
    let elsewhere = || std::thread::scope(|scope| scope.spawn(|| comm.take_turn().map(drop)).join().unwrap());
    let turn = comm.take_turn().unwrap();
    let within = comm.take_turn().unwrap();
    comm.barrier().unwrap();
    drop(within);
    let refused = elsewhere().unwrap_err();
    assert_eq!(refused, error!(InvalidArgument, "comm is in use by another thread (rank 0)"));
    std::thread::scope(|scope| {
        let refused = scope.spawn(|| comm.barrier().unwrap_err().status);
        assert_eq!(refused.join().unwrap(), Status::InvalidArgument);
    });
    assert_eq!(comm.failure(), None, "the first goes on");
    drop(turn);
    elsewhere().unwrap();
}
