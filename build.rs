//! Link arguments of the shared library, the CUDA kernels' images, and what `pfc_build_info` tells.

use std::path::Path;

#[path = "build/commit.rs"]
mod commit;
#[path = "build/kernels.rs"]
mod kernels;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=build");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        // Cargo names no SONAME by itself, and CMake consumers then record a path instead of a name.
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libpartialfc.so.0");
        // Thread-local destructors of Rust's runtime outlive dlclose.
        println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
        // Most of the library is what names the lines of a backtrace, which reads it compressed, too.
        println!("cargo:rustc-cdylib-link-arg=-Wl,--compress-debug-sections=zlib");
    }
    let target = std::env::var("TARGET").unwrap_or_default();
    println!("cargo:rustc-env=PFC_TARGET={target}");
    let commit = commit::commit(Path::new("."));
    println!("cargo:rustc-env=PFC_COMMIT={}", commit.name);
    commit.watched.iter().for_each(|file| println!("cargo:rerun-if-changed={}", file.display()));
    kernels::build();
}
