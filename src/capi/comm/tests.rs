use super::*;
use crate::capi::status::PFC_OK;
use crate::capi::status::{PFC_ERROR_ABORTED, PFC_ERROR_INVALID_ARGUMENT, PFC_ERROR_PANIC};

#[test]
fn a_panic_frees_the_other_ranks() {
    let mut comms = [std::ptr::null_mut(); 2];
    assert_eq!(unsafe { pfc_comm_threads(2, comms.as_mut_ptr()) }, PFC_OK);
    let other = comms[1] as usize;
    let waiting = std::thread::spawn(move || unsafe { pfc_comm_barrier(other as *mut pfc_comm) });
    assert_eq!(unsafe { collective(comms[0], |_| panic!("planted")) }, PFC_ERROR_PANIC);
    assert_eq!(waiting.join().unwrap(), PFC_ERROR_ABORTED);
    assert_eq!(unsafe { pfc_comm_barrier(comms[0]) }, PFC_ERROR_ABORTED);
    comms.into_iter().for_each(|comm| unsafe { pfc_comm_free(comm) });
}

/// The checks of the entry itself travel like those below it: the other rank hears of them, and both can go on.
#[test]
fn rows_without_a_device_are_refused_on_all_ranks() {
    let mut comms = [std::ptr::null_mut(); 2];
    assert_eq!(unsafe { pfc_comm_threads(2, comms.as_mut_ptr()) }, PFC_OK);
    std::thread::scope(|scope| {
        for comm in comms.map(|comm| comm as usize) {
            scope.spawn(move || unsafe {
                let comm = comm as *mut pfc_comm;
                let none = std::ptr::null();
                let mut count = 7;
                let (ids, device, out) = (std::ptr::null_mut(), std::ptr::null(), &mut count);
                let status = pfc_all_reduce_rows(comm, device, none, 0, std::ptr::null(), ids, 0, std::ptr::null(), out);
                assert_eq!(status, PFC_ERROR_INVALID_ARGUMENT);
                assert_eq!(count, 7);
                assert_eq!(pfc_comm_barrier(comm), PFC_OK);
            });
        }
    });
    comms.into_iter().for_each(|comm| unsafe { pfc_comm_free(comm) });
}
