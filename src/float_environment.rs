//! The processor's floating-point settings. Callers may round otherwise, or flush subnormals to zero; threads of the library do not.
//! So that results do not depend on who computes what, the library computes with the settings that a program starts with.

/// The settings that a thread had, until this is dropped.
pub(crate) struct Caller {
    /// `None` where they are the usual ones.
    settings: Option<Settings>,
}

/// Rounds to nearest, keeps subnormals, traps nothing, until the value is dropped. Cheap where that is so already.
pub(crate) fn usual() -> Caller {
    let settings = read();
    let usual = usual_of(settings);
    if usual == settings {
        return Caller { settings: None };
    }
    write(usual);
    Caller { settings: Some(settings) }
}

impl Drop for Caller {
    fn drop(&mut self) {
        if let Some(settings) = self.settings {
            // What the library's arithmetic has raised is none of the caller's concern.
            write(settings);
        }
    }
}

#[cfg(target_arch = "x86_64")]
type Settings = u32;

/// MXCSR: bits 0 to 5 are flags, which any operation may raise; all exceptions masked is 0x1f80.
#[cfg(target_arch = "x86_64")]
fn usual_of(settings: Settings) -> Settings {
    0x1f80 | settings & 0x3f
}

#[cfg(target_arch = "x86_64")]
fn read() -> Settings {
    let mut settings: Settings = 0;
    // SAFETY: stores the register to a local.
    unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &mut settings, options(nostack, preserves_flags)) };
    settings
}

#[cfg(target_arch = "x86_64")]
fn write(settings: Settings) {
    // SAFETY: settings that `read` gave, or the usual ones. The compiler takes the usual ones for granted.
    unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &settings, options(nostack, preserves_flags)) };
}

#[cfg(target_arch = "aarch64")]
type Settings = u64;

/// FPCR: all zeros.
#[cfg(target_arch = "aarch64")]
fn usual_of(_: Settings) -> Settings {
    0
}

#[cfg(target_arch = "aarch64")]
fn read() -> Settings {
    let settings: Settings;
    // SAFETY: reads a register.
    unsafe { std::arch::asm!("mrs {}, fpcr", out(reg) settings, options(nomem, nostack, preserves_flags)) };
    settings
}

#[cfg(target_arch = "aarch64")]
fn write(settings: Settings) {
    // SAFETY: settings that `read` gave, or the usual ones. The compiler takes the usual ones for granted.
    unsafe { std::arch::asm!("msr fpcr, {}", in(reg) settings, options(nostack, preserves_flags)) };
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
type Settings = ();

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn usual_of(settings: Settings) -> Settings {
    settings
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn read() -> Settings {}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn write(_: Settings) {}
