//! The kernels by themselves on a GPU: what they do with the host's memory, and when they wait.
//!
//! On the emulator, or with `PFC_TEST_DRIVER=real` on a GPU.

use std::ffi::c_void;

use partialfc::capi::device::pfc_device_cuda;
use partialfc::capi::kernels::{
    pfc_fused_backward, pfc_fused_forward, pfc_fused_workspace, pfc_margin_forward, pfc_normalize_gemm,
    pfc_normalize_gemm_workspace, pfc_normalize_rows,
};
use partialfc::capi::types::{pfc_margin, pfc_margin_init_sized, pfc_matrix};
use partialfc::matrix::DType;
use partialfc::Status;
use partialfc_testing::capi::{outcome, Device, Outcome, Rows};
use partialfc_testing::emulator;
use partialfc_testing::gpu::{self, Remote};
use partialfc_testing::numbers::Random;

const BATCH: usize = 5;
const CLASSES: usize = 9;
const DIM: usize = 6;

fn gpu() -> Device {
    gpu::enter();
    let mut raw = std::ptr::null_mut();
    // SAFETY: an output that outlives the call; the default stream.
    outcome(unsafe { pfc_device_cuda(0, std::ptr::null_mut(), &mut raw) }).expect("GPU 0");
    Device(raw)
}

fn margin() -> pfc_margin {
    // SAFETY: all zeros is a value of it; the size is its own.
    unsafe {
        let mut margin: pfc_margin = std::mem::zeroed();
        outcome(pfc_margin_init_sized(&mut margin, std::mem::size_of::<pfc_margin>() as u64)).expect("defaults");
        margin
    }
}

fn matrix(data: *mut c_void, rows: usize, cols: usize) -> pfc_matrix {
    pfc_matrix { data, dtype: DType::F32 as i32, reserved: 0, rows: rows as u64, cols: cols as u64, row_stride: cols as u64 }
}

fn remote_matrix(of: &Remote, rows: usize, cols: usize) -> pfc_matrix {
    matrix(of.pointer(), rows, cols)
}

fn zeros(count: usize) -> Remote {
    Remote::of(&vec![0f32; count])
}

/// Bytes of the fused kernels' workspace.
fn fused_bytes(device: &Device) -> u64 {
    let mut bytes = 0;
    // SAFETY: a live device and an output.
    outcome(unsafe { pfc_fused_workspace(device.0, BATCH as u64, DIM as u64, CLASSES as u64, &mut bytes) }).expect("a size");
    bytes
}

fn gemm_bytes(device: &Device) -> u64 {
    let mut bytes = 0;
    // SAFETY: a live device and an output.
    outcome(unsafe { pfc_normalize_gemm_workspace(device.0, BATCH as u64, DIM as u64, CLASSES as u64, &mut bytes) })
        .expect("a size");
    bytes
}

#[test]
fn with_all_of_it_in_device_memory_no_call_waits() {
    let turn = emulator::turn(1);
    let device = gpu();
    let mut random = Random(1);
    let (e, w) = (Remote::of(&random.normals(BATCH * DIM, 1.0)), Remote::of(&random.normals(CLASSES * DIM, 1.0)));
    let (e, w) = (remote_matrix(&e, BATCH, DIM), remote_matrix(&w, CLASSES, DIM));
    let outputs = [BATCH * DIM, BATCH * CLASSES, BATCH, BATCH, BATCH * DIM, BATCH * DIM, CLASSES * DIM].map(zeros);
    let [unit, cosines, sums, logits, weighted, grad_e, grad_w] = &outputs;
    let workspace = Remote::of(&vec![0u8; fused_bytes(&device).max(gemm_bytes(&device)) as usize]);
    let (at, bytes) = (workspace.pointer(), workspace.bytes as u64);
    let margin = margin();
    // The host checks what is in the targets: it waits for none that it can read.
    let targets = [0i64, 8, -1, 3, 3];
    let waits = || ["cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize"].map(|function| turn.calls(function));
    // The lists of targets have their memory from a first call on.
    for round in 0..2 {
        let before = waits();
        // SAFETY: a live device, device memory of the sizes that the functions name.
        unsafe {
            outcome(pfc_normalize_rows(device.0, &e, &remote_matrix(unit, BATCH, DIM), sums.pointer())).expect("rows");
            let all = remote_matrix(cosines, BATCH, CLASSES);
            outcome(pfc_normalize_gemm(device.0, &e, &w, &all, at, bytes)).expect("cosines");
            let count = (BATCH * CLASSES) as u64;
            outcome(pfc_margin_forward(device.0, &margin, cosines.pointer(), count, cosines.pointer())).expect("logits");
            let product = remote_matrix(weighted, BATCH, DIM);
            let (n, z) = (sums.pointer::<f32>(), logits.pointer::<f32>());
            outcome(pfc_fused_forward(device.0, &margin, &e, &w, targets.as_ptr(), n, z, &product, at, bytes)).expect("forward");
        }
        if round > 0 {
            assert_eq!(waits(), before);
        }
    }
    let before = waits();
    let (host_sums, host_logits) = (sums.read::<f32>(), logits.read::<f32>());
    let (product, ge) = (remote_matrix(weighted, BATCH, DIM), remote_matrix(grad_e, BATCH, DIM));
    let gw = remote_matrix(grad_w, CLASSES, DIM);
    let backward = |n: *const f32, z: *const f32| {
        // SAFETY: as above.
        outcome(unsafe {
            pfc_fused_backward(device.0, &margin, &e, &w, targets.as_ptr(), n, z, &product, 1.0, &ge, &gw, at, bytes)
        })
    };
    // Sums in device memory are read back to be judged; those of the host's are not waited for, but for the room of their copies.
    backward(host_sums.as_ptr(), host_logits.as_ptr()).expect("backward");
    let gradients = (grad_e.read::<f32>(), grad_w.read::<f32>());
    let between = waits();
    backward(host_sums.as_ptr(), host_logits.as_ptr()).expect("backward");
    assert_eq!(waits(), between);
    backward(sums.pointer(), logits.pointer()).expect("backward");
    if turn.is_emulator() {
        assert!(waits() > before);
    }
    assert_eq!((grad_e.read::<f32>(), grad_w.read::<f32>()), gradients);
}

#[test]
fn a_workspace_of_the_hosts_is_refused() {
    let _turn = emulator::turn(2);
    let device = gpu();
    let (mut e, mut w, mut out) = (Rows::output(BATCH, DIM), Rows::output(CLASSES, DIM), Rows::output(BATCH, CLASSES));
    let (e, w, out) = (e.view(), w.view(), out.view());
    let mut weighted = Rows::output(BATCH, DIM);
    let (product, targets) = (weighted.view(), [0i64; BATCH]);
    let (mut sums, mut logits) = ([0f32; BATCH], [0f32; BATCH]);
    let mut host = vec![0u64; fused_bytes(&device).max(gemm_bytes(&device)) as usize / 8 + 1];
    let (at, bytes) = (host.as_mut_ptr().cast::<c_void>(), 8 * host.len() as u64);
    let refused = |result: Outcome<()>, words: &[&str]| {
        let failure = result.expect_err("a workspace");
        assert_eq!(failure.status, Status::InvalidArgument as i32, "{failure:?}");
        words.iter().for_each(|word| assert!(failure.message.contains(word), "{word:?} is not in {failure:?}"));
    };
    // SAFETY: a live device, memory of the sizes that the functions name; the workspace is refused.
    unsafe {
        refused(outcome(pfc_normalize_gemm(device.0, &e, &w, &out, at, bytes)), &["workspace", "host"]);
        let (n, z) = (sums.as_mut_ptr(), logits.as_mut_ptr());
        let forward =
            |at, bytes| outcome(pfc_fused_forward(device.0, &margin(), &e, &w, targets.as_ptr(), n, z, &product, at, bytes));
        refused(forward(at, bytes), &["workspace", "host"]);
        let remote = Remote::of(&host);
        refused(forward(remote.pointer::<u8>().wrapping_add(8).cast(), bytes - 8), &["workspace", "16 bytes"]);
    }
}

#[test]
fn an_array_between_two_elements_is_refused() {
    let _turn = emulator::turn(5);
    let (device, margin) = (gpu(), margin());
    let (cosines, logits) = (Remote::of(&[0.5f32; 4]), Remote::of(&[-9f32; 4]));
    let beside = cosines.pointer::<u8>().wrapping_add(2).cast();
    // SAFETY: a live device; the address is refused.
    let refused = outcome(unsafe { pfc_margin_forward(device.0, &margin, beside, 3, logits.pointer()) }).expect_err("misaligned");
    assert_eq!(refused.status, Status::InvalidArgument as i32);
    assert!(refused.message.contains("cosines") && refused.message.contains("aligned to 4 bytes"), "{refused:?}");
    assert_eq!(logits.read::<f32>(), [-9.0; 4]);
}

#[test]
fn a_dimension_that_no_row_of_accumulators_holds_is_refused() {
    let _turn = emulator::turn(3);
    let device = gpu();
    let mut bytes = 77;
    // SAFETY: a live device and an output.
    let refused = outcome(unsafe { pfc_fused_workspace(device.0, 1, 1025, 1, &mut bytes) }).expect_err("too wide");
    assert_eq!((refused.status, bytes), (Status::Unsupported as i32, 77));
    assert!(refused.message.contains("1025") && refused.message.contains("1024"), "{refused:?}");
    // Cosines alone take any.
    // SAFETY: as above.
    outcome(unsafe { pfc_normalize_gemm_workspace(device.0, 1, 1025, 1, &mut bytes) }).expect("a size");
}

#[test]
fn workspaces_do_not_grow_with_the_product_of_batch_and_classes() {
    let _turn = emulator::turn(4);
    let device = gpu();
    let ask = |batch, classes| {
        let mut bytes = 0;
        // SAFETY: a live device and an output.
        outcome(unsafe { pfc_fused_workspace(device.0, batch, 512, classes, &mut bytes) }).expect("a size");
        bytes
    };
    // 2^52 numerators would be more than any memory; rows and classes by themselves are not.
    let (both, rows, classes) = (ask(1 << 22, 1 << 30), ask(1 << 22, 1), ask(1, 1 << 30));
    assert!(both < 2 * (rows + classes), "{both} with {rows} and {classes}");
}
