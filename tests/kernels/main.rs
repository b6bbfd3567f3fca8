//! The kernels without a head, each against straightforward float64 loops.

#[path = "../common/mod.rs"]
mod common;
mod fused;
mod margin;
mod normalize;
mod sample;
mod update;

use common::ffi::{outcome, Outcome};
use partialfc::capi::types::{pfc_margin, pfc_margin_init_sized};

/// A margin with defaults, before a test sets fields.
fn margin() -> pfc_margin {
    // SAFETY: all zeros is a value of it; the size is its own.
    unsafe {
        let mut margin: pfc_margin = std::mem::zeroed();
        outcome(pfc_margin_init_sized(&mut margin, std::mem::size_of::<pfc_margin>() as u64)).expect("defaults");
        margin
    }
}

/// A caller's workspace of exactly as many bytes as asked for, with marks behind it that no kernel may touch.
struct Workspace {
    words: Vec<u64>,
    bytes: u64,
}

const MARK: u64 = 0x5bad_c0de_5bad_c0de;

impl Workspace {
    /// What the query function says, through `ask`.
    fn asked(ask: impl FnOnce(*mut u64) -> i32) -> Workspace {
        let mut bytes = u64::MAX;
        outcome(ask(&mut bytes)).expect("a size");
        Workspace { words: vec![MARK; bytes.div_ceil(8) as usize + 8], bytes }
    }

    fn pointer(&mut self) -> *mut std::ffi::c_void {
        self.words.as_mut_ptr().cast()
    }

    fn check(&self) {
        let used = self.bytes.div_ceil(8) as usize;
        assert!(self.words[used..].iter().all(|&word| word == MARK), "written behind the workspace of {} bytes", self.bytes);
    }
}

#[track_caller]
fn assert_refused(what: &str, result: Outcome<()>, words: &[&str]) {
    let failure = result.expect_err(what);
    assert_eq!(failure.status, partialfc::Status::InvalidArgument as i32, "{what}: {failure:?}");
    for word in words {
        assert!(failure.message.contains(word), "{what}: the text does not say {word:?}: {failure:?}");
    }
}
