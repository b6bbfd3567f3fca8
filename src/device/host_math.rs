//! Arithmetic on the host that both backends use: a matrix product on one thread, and the norm of a row.

/// 1 / norm; 0 for a row too short to have a direction.
pub(super) fn inverse_norm(sum_of_squares: f64) -> f64 {
    let norm = sum_of_squares.sqrt();
    if norm < 1e-12 {
        0.0
    } else {
        1.0 / norm
    }
}

/// destination [m, n] (+)= left [m, k] @ right [k, n] on the calling thread; operands as (data, row stride, column stride).
pub(super) fn gemm(
    m: usize,
    n: usize,
    k: usize,
    destination: (&mut [f32], usize),
    left: (&[f32], usize, usize),
    right: (&[f32], usize, usize),
    accumulate: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        // An empty sum; the product below would leave the destination as it is.
        if !accumulate {
            (0..m).for_each(|row| destination.0[row * destination.1..row * destination.1 + n].fill(0.0));
        }
        return;
    }
    let last = |rows: usize, columns: usize, row_stride: usize, column_stride: usize| {
        (rows.max(1) - 1) * row_stride + (columns.max(1) - 1) * column_stride
    };
    assert!(last(m, n, destination.1, 1) < destination.0.len(), "destination of {m} x {n}");
    assert!(last(m, k, left.1, left.2) < left.0.len(), "left of {m} x {k}");
    assert!(last(k, n, right.1, right.2) < right.0.len(), "right of {k} x {n}");
    // SAFETY: the strides keep every access inside the slices, as checked above; the destination is borrowed alone.
    unsafe { gemm_into(m, n, k, (destination.0.as_mut_ptr(), destination.1), left, right, accumulate) }
}

/// [`gemm`] into memory that is not one slice of ours.
///
/// # Safety
/// The strides keep every access inside the operands and the destination, of which nobody else uses these elements.
pub(super) unsafe fn gemm_into(
    m: usize,
    n: usize,
    k: usize,
    destination: (*mut f32, usize),
    left: (&[f32], usize, usize),
    right: (&[f32], usize, usize),
    accumulate: bool,
) {
    gemm::gemm(
        m,
        n,
        k,
        destination.0,
        1,
        destination.1 as isize,
        accumulate,
        left.0.as_ptr(),
        left.2 as isize,
        left.1 as isize,
        right.0.as_ptr(),
        right.2 as isize,
        right.1 as isize,
        1.0f32,
        1.0f32,
        false,
        false,
        false,
        gemm::Parallelism::None,
    );
}
