//! The stand-in for NCCL as tests in Rust load it. What it does is tested in `testing/nccl-standin/tests`.

use std::ffi::{c_int, c_void};

use partialfc_testing::{emulator, nccl};

type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_int;
type GroupEnd = unsafe extern "C" fn() -> c_int;

/// A function of whatever a look for NCCL finds.
fn function(name: &std::ffi::CStr) -> *mut c_void {
    // SAFETY: the library was loaded before, and stays.
    let found = unsafe {
        let handle = libc::dlopen(c"libnccl.so.2".as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD);
        assert!(!handle.is_null(), "the stand-in is not what libnccl.so.2 names");
        libc::dlsym(handle, name.as_ptr())
    };
    assert!(!found.is_null());
    found
}

#[test]
fn a_look_for_nccl_finds_the_stand_in_and_misuse_is_found() {
    let turn = emulator::turn(1);
    let standin = nccl::standin(&turn);
    standin.quiet(true);
    // SAFETY: the types are NCCL's.
    let (get_version, group_end) = unsafe {
        (
            std::mem::transmute::<*mut c_void, GetVersion>(function(c"ncclGetVersion")),
            std::mem::transmute::<*mut c_void, GroupEnd>(function(c"ncclGroupEnd")),
        )
    };
    let version = || {
        let mut version = 0;
        // SAFETY: as NCCL declares it.
        assert_eq!(unsafe { get_version(&mut version) }, 0);
        version
    };
    assert_eq!(version(), 23203);
    standin.version(21800);
    assert_eq!(version(), 21800);
    // SAFETY: as NCCL declares it.
    assert_eq!(unsafe { group_end() }, 5);
    assert!(standin.findings().contains("ncclGroupEnd without"));
    assert!(standin.take_findings().contains("ncclGroupEnd without"));
    assert_eq!(standin.findings(), "");
    assert_eq!((standin.live(), standin.operations(0)), (0, 0));
    assert_eq!(nccl::Fault::Delay(20).planned(1, -1), "1:-1:delay:20");
}
