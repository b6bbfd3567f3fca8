//! The all-reduce of sampled rows through the C interface, against a map from class id to sum.

use std::collections::BTreeMap;

use half::f16;
use partialfc::capi::comm::*;
use partialfc::capi::status::*;
use partialfc::capi::types::*;
use partialfc_testing::capi::{assert_failed, failure, outcome, Comm, Device, Outcome};
use partialfc_testing::ranks::{group, together};
use proptest::prelude::*;

/// An element type of rows; whole numbers up to 2048 are exact in each.
trait Cell: Copy + Default + PartialEq + std::fmt::Debug {
    const DTYPE: i32;
    fn of(value: i64) -> Self;
}

impl Cell for f32 {
    const DTYPE: i32 = PFC_F32;
    fn of(value: i64) -> f32 {
        value as f32
    }
}

impl Cell for f16 {
    const DTYPE: i32 = PFC_F16;
    fn of(value: i64) -> f16 {
        f16::from_f32(value as f32)
    }
}

/// How a rank calls: `stride` elements between rows, the outputs in the inputs' place, ids asked for or asserted equal.
#[derive(Clone, Copy, Debug)]
struct Way {
    cols: usize,
    stride: usize,
    in_place: bool,
    union: bool,
    capacity: usize,
}

const UNTOUCHED: i64 = -77;

/// The value in row `class` of rank `rank`.
fn cell(rank: usize, class: i64, col: usize) -> i64 {
    (class % 1000 * 5 + rank as i64 * 17 + col as i64 * 3).rem_euclid(101) - 50
}

/// The union's ids and rows.
type Sums<T> = (Vec<i64>, Vec<Vec<T>>);

/// Calls with rows made by [`cell`] and gives ids and rows of the union, with what was not to be written checked.
fn call<T: Cell>(rank: &Comm, device: &Device, ids: &[i64], way: Way) -> Outcome<Sums<T>> {
    let Way { cols, stride, in_place, union, capacity } = way;
    let room = capacity.max(ids.len());
    let mut ids_in = vec![UNTOUCHED; room];
    ids_in[..ids.len()].copy_from_slice(ids);
    let mut cells = vec![T::of(UNTOUCHED); room * stride];
    for (row, &class) in ids.iter().enumerate() {
        (0..cols).for_each(|col| cells[row * stride + col] = T::of(cell(rank.rank(), class, col)));
    }
    let mut ids_out = vec![UNTOUCHED; room];
    let mut out = vec![T::of(UNTOUCHED); room * stride];
    let matrix = |data: &mut Vec<T>| pfc_matrix {
        data: data.as_mut_ptr().cast(),
        dtype: T::DTYPE,
        reserved: 0,
        rows: room as u64,
        cols: cols as u64,
        row_stride: stride as u64,
    };
    let rows = matrix(&mut cells);
    let rows_out = if in_place { rows } else { matrix(&mut out) };
    let to = match (union, in_place) {
        (false, _) => std::ptr::null_mut(),
        (true, true) => ids_in.as_mut_ptr(),
        (true, false) => ids_out.as_mut_ptr(),
    };
    let mut count = u64::MAX;
    let (from, number) = (ids_in.as_ptr(), ids.len() as u64);
    let done =
        outcome(unsafe { pfc_all_reduce_rows(rank.0, device.0, from, number, &rows, to, capacity as u64, &rows_out, &mut count) });
    if in_place {
        (ids_out, out) = (ids_in, cells);
    }
    if let Err(failure) = done {
        assert_eq!(count, u64::MAX, "outputs are written on success only");
        assert!(in_place || out.iter().all(|&x| x == T::of(UNTOUCHED)) && ids_out.iter().all(|&id| id == UNTOUCHED));
        return Err(failure);
    }
    let count = count as usize;
    for (at, &x) in out.iter().enumerate() {
        let (row, col) = (at / stride, at % stride);
        assert!(col < cols || x == T::of(UNTOUCHED), "row {row} was written beyond its columns");
        assert!(in_place || row < count || x == T::of(UNTOUCHED), "row {row} of {count} was written");
    }
    ids_out.truncate(if union { count } else { 0 });
    Ok((ids_out, (0..count).map(|row| out[row * stride..][..cols].to_vec()).collect()))
}

/// What every rank should get.
fn model<T: Cell>(ids: &[Vec<i64>], cols: usize) -> Sums<T> {
    let mut sums: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
    for (rank, ids) in ids.iter().enumerate() {
        for &class in ids {
            let sum = sums.entry(class).or_insert_with(|| vec![0; cols]);
            (0..cols).for_each(|col| sum[col] += cell(rank, class, col));
        }
    }
    let rows = sums.values().map(|row| row.iter().map(|&sum| T::of(sum)).collect()).collect();
    (sums.into_keys().collect(), rows)
}

fn compare<T: Cell + Send>(ids: &[Vec<i64>], way: Way) {
    let device = Device::cpu(1);
    let expected = model::<T>(ids, way.cols);
    for got in together(&group(ids.len() as u32), |rank| call::<T>(rank, &device, &ids[rank.rank()], way)) {
        let (got_ids, got_rows) = got.unwrap();
        assert!(!way.union || got_ids == expected.0, "{got_ids:?}");
        assert!(got_rows == expected.1);
    }
}

fn way(cols: usize, capacity: usize) -> Way {
    Way { cols, stride: cols, in_place: false, union: true, capacity }
}

/// Runs on as many ranks as there are id lists, each its own way.
fn run(ids: &[&[i64]], way: impl Fn(usize) -> Way + Sync) -> Vec<Outcome> {
    let device = Device::cpu(1);
    let ranks = group(ids.len() as u32);
    let outcomes = together(&ranks, |rank| call::<f32>(rank, &device, ids[rank.rank()], way(rank.rank())).map(|_| ()));
    // Whatever the verdict: nobody was left waiting and the communicator works.
    together(&ranks, |rank| assert_eq!(rank.barrier(), Ok(())));
    outcomes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn rows_are_summed_by_class(
        ids in proptest::collection::vec(proptest::collection::btree_set(0i64..40, 0..20), 1..5),
        cols in 0usize..9,
        gap in 0usize..3,
        in_place: bool,
        half: bool,
    ) {
        let ids: Vec<Vec<i64>> = ids.into_iter().map(|ids| ids.into_iter().collect()).collect();
        let capacity = model::<f32>(&ids, cols).0.len();
        let way = Way { cols, stride: (cols + gap).max(1), in_place, union: true, capacity };
        if half { compare::<f16>(&ids, way) } else { compare::<f32>(&ids, way) }
    }
}

#[test]
fn equal_ids_need_no_room_for_the_union() {
    let ids = vec![vec![3, 8, i64::MAX]; 3];
    for in_place in [false, true] {
        compare::<f32>(&ids, Way { union: false, in_place, ..way(5, 3) });
    }
}

/// Rows so wide that few fit into one piece, and that places in the union run ahead of the ranks' own.
#[test]
fn many_pieces_sum_like_one() {
    let ids = vec![vec![5, 6, 7, 8, 9, 11], vec![0, 1, 2, 5, 10, 11], vec![]];
    for in_place in [false, true] {
        compare::<f32>(&ids, Way { in_place, ..way(1 << 20, 10) });
    }
}

#[test]
fn ids_that_differ_where_they_must_not_are_named() {
    let asserted = |_| Way { union: false, ..way(2, 9) };
    for outcome in run(&[&[1, 2, 3], &[1, 2, 3], &[1, 4, 5]], asserted) {
        assert_eq!(outcome, failure(PFC_ERROR_MISMATCH, "ids[1] is 2 on rank 0 and 4 on rank 2"));
    }
    for outcome in run(&[&[1, 2, 3], &[1, 2]], asserted) {
        assert_eq!(outcome, failure(PFC_ERROR_MISMATCH, "count is 3 on rank 0 and 2 on rank 1"));
    }
    for outcome in run(&[&[1], &[1]], |rank| Way { union: rank == 0, ..way(2, 9) }) {
        assert_eq!(outcome, failure(PFC_ERROR_MISMATCH, "ids_out is given on rank 0 and NULL on rank 1"));
    }
    for outcome in run(&[&[1], &[1]], |rank| way(2 + rank, 9)) {
        assert_eq!(outcome, failure(PFC_ERROR_MISMATCH, "rows.cols is 2 on rank 0 and 3 on rank 1"));
    }
}

#[test]
fn too_small_a_capacity_is_told_to_all_with_the_need() {
    for outcome in run(&[&[1, 3], &[2, 3], &[4]], |rank| way(2, if rank == 1 { 3 } else { 9 })) {
        let text = "capacity must be at least 4, the ids of the union, got 3 (rank 1)";
        assert_eq!(outcome, failure(PFC_ERROR_INVALID_ARGUMENT, text));
    }
}

#[test]
fn ids_out_of_order_fail_their_rank_and_reach_the_others() {
    for (wrong, text) in [([4, 2], "ids[1] is 2 after 4 (rank 1)"), ([4, 4], "ids[1] is 4 after 4 (rank 1)")] {
        let outcomes = run(&[&[1], &wrong, &[1]], |_| way(2, 9));
        assert_failed(&outcomes[1], PFC_ERROR_INVALID_ARGUMENT, &[text]);
        for rank in [0, 2] {
            assert_failed(&outcomes[rank], PFC_ERROR_REMOTE, &["rank 1 failed with INVALID_ARGUMENT"]);
        }
    }
}

#[test]
fn matrices_that_do_not_fit_are_refused() {
    let (rank, device) = (Comm::solo(), Device::cpu(1));
    let mut cells = [0f32; 12];
    let good = pfc_matrix { data: cells.as_mut_ptr().cast(), dtype: PFC_F32, reserved: 0, rows: 3, cols: 2, row_stride: 4 };
    let ids = [1i64, 2, 3];
    let mut count = 0;
    let mut call = |rows: &pfc_matrix, out: &pfc_matrix, capacity| unsafe {
        let none = std::ptr::null_mut();
        outcome(pfc_all_reduce_rows(rank.0, device.0, ids.as_ptr(), 3, rows, none, capacity, out, &mut count))
    };
    assert_eq!(call(&good, &good, 3), Ok(()));
    let cases = [
        (pfc_matrix { rows: 2, ..good }, good, 3, "rows.rows must be at least count, 3, got 2 (rank 0)"),
        (good, good, 4, "rows_out.rows must be at least capacity, 4, got 3 (rank 0)"),
        (good, pfc_matrix { cols: 3, ..good }, 3, "rows_out.cols must be 2, got 3"),
        (pfc_matrix { dtype: PFC_F64, ..good }, good, 3, "rows.dtype"),
        (pfc_matrix { row_stride: 1, ..good }, good, 3, "rows.row_stride must be at least cols, 2, got 1"),
        (pfc_matrix { data: std::ptr::null_mut(), ..good }, good, 3, "rows.data must not be NULL"),
        (
            good,
            pfc_matrix { dtype: PFC_BF16, ..good },
            3,
            "rows_out must not overlap rows unless data, dtype and row_stride are the same (rank 0)",
        ),
        (good, pfc_matrix { row_stride: 3, rows: 2, ..good }, 2, "rows_out must not overlap rows"),
    ];
    for (rows, out, capacity, text) in cases {
        assert_failed(&call(&rows, &out, capacity), PFC_ERROR_INVALID_ARGUMENT, &[text]);
    }
}
