//! The numbers that reductions combine on the host.

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
