//! Arrays that cannot be, at odd addresses or larger than any memory, and matrices without columns: refused by name, unread.

use std::ptr::null_mut;

use partialfc::capi::comm as c_comm;
use partialfc::capi::head as c_head;
use partialfc::capi::kernels as c_kernels;
use partialfc::capi::types::{pfc_margin, pfc_margin_init_sized, pfc_matrix, pfc_optimizer, pfc_optimizer_init_sized, PFC_F32};
use partialfc::Status;

use super::assert_refused;
use partialfc_testing::capi::{options, outcome, Comm, Device, Head};
use partialfc_testing::ranks::on_ranks;

const ROWS: usize = 2;
const DIM: usize = 4;
/// More elements than any address space has bytes.
const TOO_MANY: u64 = 1 << 60;

/// Zeros that are aligned, and the address of one byte further.
struct Memory(Vec<u64>);

impl Memory {
    fn new() -> Memory {
        Memory(vec![0; 64])
    }

    fn good<T>(&mut self) -> *mut T {
        self.0.as_mut_ptr().cast()
    }

    fn odd<T>(&mut self) -> *mut T {
        self.0.as_mut_ptr().cast::<u8>().wrapping_add(1).cast()
    }
}

fn matrix(data: *mut f32, rows: u64, cols: u64) -> pfc_matrix {
    pfc_matrix { data: data.cast(), dtype: PFC_F32, reserved: 0, rows, cols, row_stride: cols }
}

#[track_caller]
fn refused(status: i32, words: &[&str]) {
    assert_refused(words[0], outcome(status), Status::InvalidArgument, words);
}

const ALIGNED: &str = "must be aligned to";
const FIT: &str = "must fit in the address space";

#[test]
fn arrays_of_kernels() {
    let device = Device::cpu(2);
    let mut memory = [(); 6].map(|()| Memory::new());
    let [a, b, c, d, e, f] = &mut memory;
    // SAFETY: plain structs of the library, filled by it.
    let (mut margin, mut sgd): (pfc_margin, pfc_optimizer) = unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
    // SAFETY: as large as they say.
    unsafe {
        pfc_margin_init_sized(&mut margin, size_of::<pfc_margin>() as u64);
        pfc_optimizer_init_sized(&mut sgd, size_of::<pfc_optimizer>() as u64);
    }
    let raw = device.0;
    let (rows, wide) = (ROWS as u64, DIM as u64);
    // SAFETY: live handles; what is not refused is memory of 512 bytes, and the largest array is of 32.
    unsafe {
        let (m, n) = (matrix(a.good(), rows, wide), matrix(b.good(), rows, wide));
        refused(c_kernels::pfc_normalize_rows(raw, &m, &n, c.odd()), &["inverse_norms", ALIGNED]);

        let forward = |cosines, count, logits| c_kernels::pfc_margin_forward(raw, &margin, cosines, count, logits);
        refused(forward(a.odd(), rows, b.good()), &["cosines", ALIGNED]);
        refused(forward(a.good(), rows, b.odd()), &["logits", ALIGNED]);
        refused(forward(a.good(), TOO_MANY, b.good()), &["cosines", FIT]);
        let backward = |cosines, grad, out| c_kernels::pfc_margin_backward(raw, &margin, cosines, grad, rows, out);
        refused(backward(a.odd(), b.good(), c.good()), &["cosines", ALIGNED]);
        refused(backward(a.good(), b.odd(), c.good()), &["grad_logits", ALIGNED]);
        refused(backward(a.good(), b.good(), c.odd()), &["grad_cosines", ALIGNED]);

        let softmax = |targets, sums| c_kernels::pfc_partial_softmax(raw, &margin, &m, targets, sums);
        refused(softmax(c.odd(), d.good()), &["targets", ALIGNED]);
        refused(softmax(c.good(), d.odd()), &["row_sums", ALIGNED]);

        let mut weighted = Memory::new();
        let out = matrix(weighted.good(), rows, wide);
        let fused =
            |targets, sums, logits| c_kernels::pfc_fused_forward(raw, &margin, &m, &n, targets, sums, logits, &out, null_mut(), 0);
        refused(fused(c.odd(), d.good(), e.good()), &["targets", ALIGNED]);
        refused(fused(c.good(), d.odd(), e.good()), &["row_sums", ALIGNED]);
        refused(fused(c.good(), d.good(), e.odd()), &["target_logits", ALIGNED]);
        let (mut grad_e, mut grad_w) = (Memory::new(), Memory::new());
        let (grad_e, grad_w) = (matrix(grad_e.good(), rows, wide), matrix(grad_w.good(), rows, wide));
        let fused = |targets, sums, logits| {
            let (none, margin) = (null_mut(), &margin);
            c_kernels::pfc_fused_backward(raw, margin, &m, &n, targets, sums, logits, &out, 1.0, &grad_e, &grad_w, none, 0)
        };
        refused(fused(c.odd(), d.good(), e.good()), &["targets", ALIGNED]);
        refused(fused(c.good(), d.odd(), e.good()), &["row_sums", ALIGNED]);
        refused(fused(c.good(), d.good(), e.odd()), &["target_logits", ALIGNED]);

        let sample = |positives, count, ids, out| c_kernels::pfc_sample_classes(raw, 1, 0, 0, 9, positives, count, 3, ids, out);
        refused(sample(a.odd(), rows, b.good(), c.good()), &["positives", ALIGNED]);
        refused(sample(a.good(), TOO_MANY, b.good(), c.good()), &["positives", FIT]);
        refused(sample(a.good(), rows, b.odd(), c.good()), &["ids", ALIGNED]);
        refused(sample(a.good(), rows, b.good(), c.odd()), &["count", ALIGNED]);

        let momentum = matrix(c.good(), rows, wide);
        let update = |ids, g| c_kernels::pfc_update_rows(raw, &sgd, &m, &momentum, std::ptr::null(), ids, g, 0.1, 1);
        let gradients = matrix(d.good(), rows, wide);
        refused(update(e.odd(), &gradients), &["ids", ALIGNED]);
        // More gradients than centers: some id repeats. The ids are not read.
        let many = matrix(f.good(), rows + 1, wide);
        refused(update(e.good(), &many), &["gradients.rows", "at most centers.rows, 2", "got 3"]);

        refused(c_kernels::pfc_fused_workspace(raw, 1, 1, 1, a.odd()), &["bytes", ALIGNED]);
        refused(c_kernels::pfc_normalize_rows(raw, f.odd(), &n, null_mut()), &["rows", ALIGNED]);
    }
}

/// They have no bytes, so memory does not limit their rows.
#[test]
fn matrices_without_columns() {
    let device = Device::cpu(1);
    let comm = Comm::solo();
    let mut memory = [(); 2].map(|()| Memory::new());
    let [data, ids] = &mut memory;
    // SAFETY: as above.
    let mut sgd: pfc_optimizer = unsafe { std::mem::zeroed() };
    // SAFETY: as large as it says.
    unsafe { pfc_optimizer_init_sized(&mut sgd, size_of::<pfc_optimizer>() as u64) };
    let limit = u64::from(u32::MAX);
    let (huge, large, one) = (matrix(data.good(), 1 << 62, 0), matrix(data.good(), limit, 0), matrix(data.good(), 1, 0));
    let raw = device.0;
    let none = std::ptr::null();
    // SAFETY: live handles, and matrices without an element.
    unsafe {
        refused(c_kernels::pfc_normalize_rows(raw, &huge, &huge, null_mut()), &["rows.rows", "4294967295"]);
        outcome(c_kernels::pfc_normalize_rows(raw, &large, &large, null_mut())).expect("nothing to do");
        let mut update = |w, g| c_kernels::pfc_update_rows(raw, &sgd, w, w, none, ids.good(), g, 0.1, 1);
        refused(update(&huge, &one), &["centers.rows", "4294967295"]);
        refused(update(&one, &huge), &["gradients.rows", "4294967295"]);
        refused(update(&one, &large), &["gradients.rows", "at most centers.rows, 1"]);
        outcome(update(&matrix(data.good(), 1 << 20, 0), &one)).expect("one row of nothing");
        let mut count = 0;
        let mut reduce =
            |count, rows, out| c_comm::pfc_all_reduce_rows(comm.0, raw, ids.good(), count, rows, null_mut(), count, rows, out);
        refused(reduce(1 << 62, &huge, &mut count), &["rows.rows", "4294967295"]);
        refused(reduce(1 << 62, &large, &mut count), &["ids", FIT, "rank 0"]);
        outcome(reduce(1, &one, &mut count)).expect("one id");
        assert_eq!(count, 1);
    }
}

#[test]
fn arrays_of_collectives() {
    let device = Device::cpu(1);
    let comm = Comm::solo();
    let mut memory = [(); 5].map(|()| Memory::new());
    let [a, b, c, d, e] = &mut memory;
    let raw = comm.0;
    let (rows, out) = (matrix(a.good(), 2, 1), matrix(b.good(), 2, 1));
    let count = e.good::<u64>();
    // SAFETY: live handles; what is not refused is memory of 512 bytes.
    unsafe {
        c.good::<i64>().add(1).write(5);
        let reduce = |ids, ids_out, count| c_comm::pfc_all_reduce_rows(raw, device.0, ids, 2, &rows, ids_out, 2, &out, count);
        refused(reduce(c.odd(), d.good(), count), &["ids", ALIGNED, "rank 0"]);
        refused(reduce(c.good(), d.odd(), count), &["ids_out", ALIGNED, "rank 0"]);
        refused(reduce(c.good(), d.good(), count.cast::<u8>().add(1).cast()), &["count_out", ALIGNED]);
        outcome(reduce(c.good(), d.good(), count)).expect("all is in its place");
        refused(c_comm::pfc_comm_traffic(raw, e.odd()), &["out", ALIGNED]);
        refused(c_comm::pfc_comm_threads(2, e.odd()), &["comms", ALIGNED]);
        refused(c_comm::pfc_comm_self(e.odd()), &["out", ALIGNED]);
    }
}

#[test]
fn arrays_of_a_head() {
    on_ranks(2, |place| {
        let mut head = Head::new(&Device::cpu(1), &place.comm, &options(10, DIM as u32, 8));
        let mut memory = [(); 6].map(|()| Memory::new());
        let [e, g, labels, loss, ids, cosines] = &mut memory;
        (0..ROWS * DIM).for_each(|i| unsafe { e.good::<f32>().add(i).write(1.0 + i as f32) });
        let (e, g) = (matrix(e.good(), ROWS as u64, DIM as u64), matrix(g.good(), ROWS as u64, DIM as u64));
        let (raw, bad) = (head.raw, place.rank == 1);
        // A rank's own arguments: it gets its own error, the other one hears of it.
        let check = |status: i32, words: &[&str]| match bad {
            true => refused(status, words),
            false => drop(assert_refused(words[0], outcome(status), Status::Remote, &["rank 1"])),
        };
        // SAFETY: live handles; what is not refused is memory of 512 bytes.
        unsafe {
            let odd_labels = if bad { labels.odd() } else { labels.good::<i64>() };
            check(c_head::pfc_head_prepare(raw, odd_labels, ROWS as u64), &["labels", ALIGNED, "rank 1"]);
            check(c_head::pfc_head_forward(raw, &e, odd_labels, loss.good()), &["labels", ALIGNED, "rank 1"]);
            let batch = if bad { TOO_MANY } else { 1 };
            check(c_head::pfc_head_prepare(raw, labels.good(), batch), &["labels", FIT, "rank 1"]);
            let odd_loss = if bad { loss.odd() } else { loss.good::<f64>() };
            check(c_head::pfc_head_forward(raw, &e, labels.good(), odd_loss), &["loss", ALIGNED, "rank 1"]);
            check(c_head::pfc_head_step(raw, &e, labels.good(), 0.1, &g, odd_loss), &["loss", ALIGNED, "rank 1"]);
            let odd_ids = if bad { ids.odd() } else { ids.good::<i64>() };
            check(c_head::pfc_head_top_k(raw, &e, 1, odd_ids, cosines.good()), &["ids", ALIGNED, "rank 1"]);
            let odd_cosines = if bad { cosines.odd() } else { cosines.good::<f32>() };
            check(c_head::pfc_head_top_k(raw, &e, 1, ids.good(), odd_cosines), &["cosines", ALIGNED, "rank 1"]);

            refused(c_head::pfc_head_set_sample(raw, ids.odd(), 2), &["ids", ALIGNED]);
            refused(c_head::pfc_head_set_sample(raw, ids.good(), TOO_MANY), &["ids", FIT]);
            outcome(c_head::pfc_head_step(raw, &e, labels.good(), 0.1, &g, loss.good())).expect("the head works on");
            refused(c_head::pfc_head_sample_ids(raw, ids.odd(), 64, labels.good()), &["ids", ALIGNED]);
            refused(c_head::pfc_head_sample_ids(raw, ids.good(), 64, labels.odd()), &["count", ALIGNED]);
            refused(c_head::pfc_head_shard(raw, labels.odd(), ids.good()), &["first", ALIGNED]);
        }
        head.wait().expect("the head works on");
    });
}
