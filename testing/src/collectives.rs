//! Every collective on a group of ranks, against a formula.

use std::time::Duration;

use partialfc::capi::comm::{PFC_MAX, PFC_SUM};

use crate::capi::{Comm, Number};
use crate::ranks::together;

/// A small whole number, exact in every type and in sums over a few ranks: element `i` of rank `rank`.
pub fn sample(rank: usize, i: usize) -> i64 {
    ((rank * 31 + i * 7) % 41) as i64 - 20
}

/// What a reduction over `size` ranks makes of element `i`.
pub fn reduced(size: usize, i: usize, op: i32) -> i64 {
    let values = (0..size).map(|rank| sample(rank, i));
    if op == PFC_SUM {
        values.sum()
    } else {
        values.max().unwrap()
    }
}

/// Every operation, type and shape on a group, against the formulas above.
pub fn exercise(ranks: &[Comm]) {
    for count in [0, 1, 7, 33, 2050] {
        together(ranks, |rank| {
            reductions::<f32>(rank, count);
            reductions::<f64>(rank, count);
            reductions::<i32>(rank, count);
            reductions::<i64>(rank, count);
            copies(rank, count);
            assert_eq!(rank.barrier(), Ok(()));
        });
    }
}

fn reductions<T: Number>(rank: &Comm, count: usize) {
    let (me, size) = (rank.rank(), rank.size());
    let send: Vec<T> = (0..count * size).map(|i| T::of(sample(me, i))).collect();
    for op in [PFC_SUM, PFC_MAX] {
        let expected: Vec<T> = (0..count * size).map(|i| T::of(reduced(size, i, op))).collect();
        let (own, part) = (me * count..(me + 1) * count, T::DTYPE);
        let case = format!("type {part}, op {op}, {count} elements, rank {me} of {size}");

        let mut out = vec![T::of(-99); count];
        assert_eq!(rank.all_reduce(&send[..count], &mut out, op), Ok(()), "{case}");
        assert_eq!(out, expected[..count], "all_reduce, {case}");
        let mut data = send[..count].to_vec();
        assert_eq!(rank.all_reduce_in_place(&mut data, op), Ok(()), "{case}");
        assert_eq!(data, expected[..count], "all_reduce in place, {case}");

        // Uneven arrival: a different rank is late each time.
        if me == (count + op as usize) % size {
            std::thread::sleep(Duration::from_micros(300));
        }
        out.fill(T::of(-99));
        assert_eq!(rank.reduce_scatter(&send, &mut out, op), Ok(()), "{case}");
        assert_eq!(out, expected[own.clone()], "reduce_scatter, {case}");
        let mut data = send.clone();
        assert_eq!(rank.reduce_scatter_in_place(&mut data, op), Ok(()), "{case}");
        assert_eq!(data[own.clone()], expected[own.clone()], "reduce_scatter in place, {case}");
        data[own.clone()].copy_from_slice(&send[own]);
        assert_eq!(data, send, "reduce_scatter in place wrote elsewhere, {case}");
    }
}

fn copies(rank: &Comm, count: usize) {
    let (me, size) = (rank.rank(), rank.size());
    let block = |rank: usize| (0..count).map(move |i| (rank * 101 + i * 3) as u8);
    let all: Vec<u8> = (0..size).flat_map(block).collect();

    let mut out = vec![0xEE; count * size];
    assert_eq!(rank.all_gather(&block(me).collect::<Vec<u8>>(), &mut out), Ok(()));
    assert_eq!(out, all, "all_gather of {count} bytes, rank {me} of {size}");
    out.fill(0xEE);
    out[me * count..(me + 1) * count].copy_from_slice(&all[me * count..(me + 1) * count]);
    assert_eq!(rank.all_gather_in_place(&mut out, count), Ok(()));
    assert_eq!(out, all, "all_gather in place of {count} bytes, rank {me} of {size}");
    for root in 0..size {
        let mut data: Vec<u8> = block(me).collect();
        assert_eq!(rank.broadcast(&mut data, root), Ok(()));
        assert_eq!(data, block(root).collect::<Vec<u8>>(), "broadcast from {root} to rank {me} of {size}");
    }
}
