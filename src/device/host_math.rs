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
    let (left_row, left_column) = (left.row_stride as isize, left.column_stride as isize);
    let (right_row, right_column) = (right.row_stride as isize, right.column_stride as isize);
    let (destination_row, destination_column) = (pitch as isize, 1);
    let function = gemm_f32::gemm::f32::get_gemm_fn();
    let (add, none) = (store == Store::Add, Parallelism::None);
    let (left, right) = (left.data.as_ptr(), right.data.as_ptr());
    // The function is at its best with columns side by side. Rows side by side are the columns of the transpose.
    match destination_column < destination_row {
        true => function(
            n,
            m,
            k,
            destination,
            destination_row,
            destination_column,
            add,
            right,
            right_row,
            right_column,
            left,
            left_row,
            left_column,
            1.0,
            1.0,
            false,
            false,
            false,
            none,
        ),
        false => function(
            m,
            n,
            k,
            destination,
            destination_column,
            destination_row,
            add,
            left,
            left_column,
            left_row,
            right,
            right_column,
            right_row,
            1.0,
            1.0,
            false,
            false,
            false,
            none,
        ),
    }
}
