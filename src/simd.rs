//! Instruction sets: the hot loops are written once and compiled several times; the machine at hand picks the copy.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64 as x86;
use std::sync::OnceLock;

use crate::environment;
use crate::{ensure, error, Result};

/// An instruction set that this machine has. Only its own functions make one, so that to hold it is to know
/// that code compiled for it may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Simd(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// AMX for bfloat16, and what [`Level::Avx512`] has.
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// AVX-512 BF16, and what [`Level::Avx512`] has.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    /// AVX-512 F, VL, BW, DQ and what is below.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// What the crate is compiled for.
    Portable,
}

/// The environment's variable that names an instruction set.
const VARIABLE: &str = "PFC_CPU";

impl Simd {
    /// The instruction set of all work: what PFC_CPU says if this machine has that, else what is fastest here.
    #[inline]
    pub fn best() -> Simd {
        static BEST: OnceLock<Simd> = OnceLock::new();
        *BEST.get_or_init(|| Simd::asked_for().ok().flatten().unwrap_or_else(Simd::fastest))
    }

    /// What PFC_CPU says, or that this machine does not have it.
    pub fn asked_for() -> Result<Option<Simd>> {
        environment::setting(VARIABLE).map(|name| Simd::named(&name.to_string_lossy())).transpose()
    }

    fn named(name: &str) -> Result<Simd> {
        let names = |levels: &mut dyn Iterator<Item = Level>| levels.map(Level::name).collect::<Vec<_>>().join(", ");
        let Some(level) = Level::ALL.iter().copied().find(|level| level.name() == name) else {
            let known = names(&mut Level::ALL.iter().copied());
            return Err(error!(InvalidArgument, "{VARIABLE} must be one of {known}, got {name:?}"));
        };
        ensure!(level.is_here(), Unsupported, "{VARIABLE} is {name}, and this processor has {}", names(&mut Level::here()));
        #[cfg(target_arch = "x86_64")]
        if level == Level::Amx {
            ensure!(may_use_tiles(), Unsupported, "{VARIABLE} is {name}, and the system does not let this process use its tiles");
        }
        Ok(Simd(level))
    }

    fn fastest() -> Simd {
        let of = |level: &Level| match level {
            // Elsewhere than on AMD's its products are half as fast as float32's.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => is_amd(),
            _ => true,
        };
        Simd(Level::here().find(of).unwrap_or(Level::Portable))
    }

    /// All that this machine has, the widest first.
    pub fn available() -> Vec<Simd> {
        Level::here().map(Simd).collect()
    }

    /// For people.
    pub fn name(self) -> &'static str {
        self.0.name()
    }

    #[inline]
    pub(crate) fn level(self) -> Level {
        self.0
    }
}

impl Level {
    /// The widest first.
    const ALL: &[Level] = &[
        #[cfg(target_arch = "x86_64")]
        Level::Amx,
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16,
        #[cfg(target_arch = "x86_64")]
        Level::Avx512,
        #[cfg(target_arch = "x86_64")]
        Level::Avx2,
        Level::Portable,
    ];

    /// Those of this machine, the widest first.
    fn here() -> impl Iterator<Item = Level> {
        Level::ALL.iter().copied().filter(|level| level.is_here())
    }

    fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Level::Amx => "amx",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => "avx512_bf16",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            Level::Portable => "portable",
        }
    }

    /// Whether this machine has it.
    fn is_here(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Level::Amx => has_avx512() && (is_emulated() || has_tiles()),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => has_avx512() && is_x86_feature_detected!("avx512bf16"),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => has_avx512(),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => has_avx2(),
            Level::Portable => true,
        }
    }
}

/// Whether the processor says that AMD made it.
#[cfg(target_arch = "x86_64")]
fn is_amd() -> bool {
    let maker = x86::__cpuid(0);
    [maker.ebx, maker.edx, maker.ecx] == [b"Auth", b"enti", b"cAMD"].map(|part| u32::from_le_bytes(*part))
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

/// Whether this process may use the tiles of AMX, which the system keeps across context switches for those that ask. It is asked once: by
/// the first head in precision half, or where PFC_CPU names them. A fork keeps what it said.
#[cfg(target_arch = "x86_64")]
pub(crate) fn may_use_tiles() -> bool {
    static MAY: OnceLock<bool> = OnceLock::new();
    *MAY.get_or_init(|| {
        let may = is_emulated() || is_permitted();
        if !may {
            log::warn!("the system does not let this process use the tiles of AMX: precision half multiplies in float32");
        }
        may
    })
}

/// AMX-TILE and AMX-BF16, and both parts of the tiles' state in what the system saves.
#[cfg(target_arch = "x86_64")]
fn has_tiles() -> bool {
    const FEATURES: u32 = 1 << 22 | 1 << 24;
    const STATE: u64 = 1 << 17 | 1 << 18;
    const OSXSAVE: u32 = 1 << 27;
    let features = x86::__cpuid(0).eax >= 7 && x86::__cpuid_count(7, 0).edx & FEATURES == FEATURES;
    // SAFETY: the system has said that XGETBV may be used.
    features && x86::__cpuid(1).ecx & OSXSAVE != 0 && unsafe { saved_state() } & STATE == STATE
}

/// # Safety
/// The processor has XGETBV and the system has turned it on.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "xsave")]
unsafe fn saved_state() -> u64 {
    unsafe { x86::_xgetbv(0) }
}

/// Asks Linux for the tiles. It refuses where a thread's stack for signals is too small for their state.
#[cfg(target_arch = "x86_64")]
fn is_permitted() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // SAFETY: a question without arguments in memory.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// Whether an emulator is loaded that does what the instructions would: one for tests.
#[cfg(target_arch = "x86_64")]
fn is_emulated() -> bool {
    // SAFETY: a name that ends.
    unsafe { !libc::dlsym(libc::RTLD_DEFAULT, c"pfc_amx_emulator".as_ptr()).is_null() }
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
                $crate::simd::Level::Amx | $crate::simd::Level::Avx512Bf16 | $crate::simd::Level::Avx512 => unsafe { avx512($($arg),*) },
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
mod tests;
