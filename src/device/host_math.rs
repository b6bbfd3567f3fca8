//! Arithmetic on the host that both backends use: a matrix product on one thread, and the norm of a row.

use gemm_common::gemm::L2_SLAB;
use gemm_common::Parallelism;

/// 1 / norm; 0 for a row too short to have a direction.
pub(super) fn inverse_norm(sum_of_squares: f64) -> f64 {
    let norm = sum_of_squares.sqrt();
    if norm < 1e-12 {
        0.0
    } else {
        1.0 / norm
    }
}

/// The same of a class center; NaN for one that is not finite, so that nothing passes for a number that comes of it.
pub(super) fn center_inverse_norm(sum_of_squares: f64) -> f64 {
    match sum_of_squares.is_finite() {
        true => inverse_norm(sum_of_squares),
        false => f64::NAN,
    }
}

/// An operand of [`gemm`]: element (i, j) is `data[i * row_stride + j * column_stride]`.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    data: &'a [f32],
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Operand<'a> {
    /// Rows of elements side by side, `pitch` apart.
    pub fn rows(data: &'a [f32], pitch: usize) -> Operand<'a> {
        Operand { data, row_stride: pitch, column_stride: 1 }
    }

    /// The transpose of such rows.
    pub fn transposed(data: &'a [f32], pitch: usize) -> Operand<'a> {
        Operand { data, row_stride: 1, column_stride: pitch }
    }

    /// The number of the last element of rows x columns.
    fn last(&self, rows: usize, columns: usize) -> usize {
        (rows.max(1) - 1) * self.row_stride + (columns.max(1) - 1) * self.column_stride
    }
}

/// What a product does to what its destination holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Store {
    Replace,
    Add,
}

/// The sizes of a product: [m, n] = [m, k] @ [k, n].
#[derive(Clone, Copy, Debug)]
pub(super) struct GemmShape {
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

/// destination [m, n] (+)= left [m, k] @ right [k, n] on the calling thread. Rows of the destination are `pitch` apart.
pub(super) fn gemm(shape: GemmShape, destination: &mut [f32], pitch: usize, left: Operand<'_>, right: Operand<'_>, store: Store) {
    let GemmShape { m, n, k } = shape;
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        // An empty sum; the product below would leave the destination as it is.
        if store == Store::Replace {
            (0..m).for_each(|row| destination[row * pitch..row * pitch + n].fill(0.0));
        }
        return;
    }
    assert!((m - 1) * pitch + n <= destination.len(), "destination of {m} x {n}");
    assert!(left.last(m, k) < left.data.len(), "left of {m} x {k}");
    assert!(right.last(k, n) < right.data.len(), "right of {k} x {n}");
    // SAFETY: the strides keep every access inside the slices, as checked above; the destination is borrowed alone.
    unsafe { gemm_into(shape, destination.as_mut_ptr(), pitch, left, right, store) }
}

/// [`gemm`] into memory that is not one slice of ours.
///
/// # Safety
/// The strides keep every access inside the operands and the destination, of which nobody else uses these elements.
pub(super) unsafe fn gemm_into(
    shape: GemmShape,
    destination: *mut f32,
    pitch: usize,
    left: Operand<'_>,
    right: Operand<'_>,
    store: Store,
) {
    // SAFETY: the caller answers for the memory.
    let multiply = || unsafe { multiply(shape, destination, pitch, left, right, store) };
    match L2_SLAB.try_with(|_| ()) {
        Ok(()) => multiply(),
        // Where a thread is ending, what the product keeps for it is gone: another thread has its own.
        Err(_) => {
            let multiply = OnAnotherThread(multiply);
            std::thread::scope(|scope| {
                scope.spawn(|| multiply.run());
            });
        }
    }
}

/// Makes what products keep for the calling thread: a few megabytes, for which a product cannot report that there is no memory.
pub(super) fn warm_up() {
    // Where the thread is ending, another one works.
    let _ = L2_SLAB.try_with(|_| ());
}

/// Work that the calling thread waits for.
struct OnAnotherThread<F>(F);

// SAFETY: the calling thread does nothing else meanwhile.
unsafe impl<F> Sync for OnAnotherThread<F> {}

impl<F: Fn()> OnAnotherThread<F> {
    fn run(&self) {
        (self.0)()
    }
}

/// # Safety
/// As [`gemm_into`].
unsafe fn multiply(shape: GemmShape, destination: *mut f32, pitch: usize, left: Operand<'_>, right: Operand<'_>, store: Store) {
    let GemmShape { m, n, k } = shape;
    // (data, stride of a row, stride of a column)
    let of = |operand: Operand<'_>| (operand.data.as_ptr(), operand.row_stride as isize, operand.column_stride as isize);
    let (left, right, pitch) = (of(left), of(right), pitch as isize);
    // The function is at its best with columns side by side. Rows side by side are the columns of the transpose, whose left operand is
    // the right one's transpose.
    let transposed = |(data, row, column)| (data, column, row);
    let (m, n, (row, column), left, right) = match pitch > 1 {
        true => (n, m, (1, pitch), transposed(right), transposed(left)),
        false => (m, n, (pitch, 1), left, right),
    };
    let function = gemm_f32::gemm::f32::get_gemm_fn();
    let (add, one, plain) = (store == Store::Add, 1.0, false);
    function(
        m,
        n,
        k,
        destination,
        column,
        row,
        add,
        left.0,
        left.2,
        left.1,
        right.0,
        right.2,
        right.1,
        one,
        one,
        plain,
        plain,
        plain,
        Parallelism::None,
    );
}
