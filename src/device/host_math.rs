//! The norm of a row, as both backends compute it on the host.

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
