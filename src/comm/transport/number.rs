//! The numbers that collectives carry, and how reductions combine them on the host.

use crate::matrix::DType;

pub(super) trait Number: Copy + Default {
    fn sum(self, other: Self) -> Self;
    fn largest(self, other: Self) -> Self;
}

macro_rules! floats {
    ($($t:ty),*) => { $(impl Number for $t {
        fn sum(self, other: $t) -> $t {
            self + other
        }

        /// A NaN wins: what is broken on one rank must not pass for a number.
        fn largest(self, other: $t) -> $t {
            if self > other || self.is_nan() { self } else { other }
        }
    })* };
}
floats!(f32, f64);

macro_rules! integers {
    ($($t:ty),*) => { $(impl Number for $t {
        fn sum(self, other: $t) -> $t {
            self.wrapping_add(other)
        }

        fn largest(self, other: $t) -> $t {
            self.max(other)
        }
    })* };
}
integers!(i32, i64);

/// Numbers that a collective may carry.
pub trait Element: Copy + Send + Sync + 'static {
    const DTYPE: DType;
}

macro_rules! elements {
    ($($t:ty => $dtype:ident),*) => { $(impl Element for $t { const DTYPE: DType = DType::$dtype; })* };
}
elements!(f32 => F32, f64 => F64, i32 => I32, i64 => I64);
