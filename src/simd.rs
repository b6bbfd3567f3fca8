//! Instruction sets: the hot loops are written once and compiled several times; the machine at hand picks the copy.

/// An instruction set that this machine has. Only [`Simd::best`] and [`Simd::available`] make one, so that to hold it is to know
/// that code compiled for it may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Simd(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// AVX-512 F, VL, BW, DQ and what is below.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// What the crate is compiled for.
    Portable,
}

impl Simd {
    /// The widest instruction set of this machine.
    #[inline]
    pub fn best() -> Simd {
        // The standard library asks the processor once and remembers.
        #[cfg(target_arch = "x86_64")]
        {
            if has_avx512() {
                return Simd(Level::Avx512);
            }
            if has_avx2() {
                return Simd(Level::Avx2);
            }
        }
        Simd(Level::Portable)
    }

    /// All that this machine has, the widest first. For tests and benches.
    pub fn available() -> Vec<Simd> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if has_avx512() {
                all.push(Simd(Level::Avx512));
            }
            if has_avx2() {
                all.push(Simd(Level::Avx2));
            }
        }
        all.push(Simd(Level::Portable));
        all
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Avx512 => "avx512",
            Level::Avx2 => "avx2",
            Level::Portable => "portable",
        }
    }

    #[inline]
    pub(crate) fn level(self) -> Level {
        self.0
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn has_avx512() -> bool {
    has_avx2()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
}

/// Whether `f32::mul_add` is one instruction in the portable copy; where it is not it is a slow call.
pub(crate) const PORTABLE_FMA: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));

/// Compiles an `#[inline(always)]` body once per instruction set.
///
/// `clones! { fn name(a: A) -> R = body; }` makes `fn name(simd: Simd, a: A) -> R`, whose copies have the same bits as long as the
/// body leaves `mul_add` alone: the compiler reorders and fuses nothing by itself. `= body::<FMA>` hands the body a const that says
/// whether `mul_add` is cheap.
macro_rules! clones {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)? = $body:ident;) => {
        clones! { @make [$(#[$meta])*] [$vis] $name [$($arg: $type),*] [$(-> $ret)?] [$body] [$body] }
    };
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)? = $body:ident::<FMA>;) => {
        clones! {
            @make [$(#[$meta])*] [$vis] $name [$($arg: $type),*] [$(-> $ret)?]
            [$body::<true>] [$body::<{ $crate::simd::PORTABLE_FMA }>]
        }
    };
    (@make [$($meta:tt)*] [$vis:vis] $name:ident [$($arg:ident: $type:ty),*] [$($ret:tt)*] [$($wide:tt)*] [$($portable:tt)*]) => {
        $($meta)*
        $vis fn $name(simd: $crate::simd::Simd, $($arg: $type),*) $($ret)* {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
            fn avx512($($arg: $type),*) $($ret)* {
                $($wide)*($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $type),*) $($ret)* {
                $($wide)*($($arg),*)
            }
            match simd.level() {
                // SAFETY: a Simd of that level exists only where the processor has its features.
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Level::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Level::Avx2 => unsafe { avx2($($arg),*) },
                $crate::simd::Level::Portable => $($portable)*($($arg),*),
            }
        }
    };
}
pub(crate) use clones;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_is_the_first_available_and_the_portable_copy_is_always_there() {
        let all = Simd::available();
        assert_eq!(all[0], Simd::best());
        assert_eq!(all[all.len() - 1].level(), Level::Portable);
    }

    #[inline(always)]
    fn sum_body(values: &[u32], fold: u32) -> u32 {
        values.iter().fold(fold, |sum, &v| sum.wrapping_mul(31).wrapping_add(v))
    }

    clones! {
        fn sum_on(values: &[u32], fold: u32) -> u32 = sum_body;
    }

    #[test]
    fn every_copy_runs_and_agrees() {
        let values: Vec<u32> = (0..1000).map(|i| i * i).collect();
        for simd in Simd::available() {
            assert_eq!(sum_on(simd, &values, 7), sum_body(&values, 7), "{simd:?}");
        }
    }
}
