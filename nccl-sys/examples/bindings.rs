//! Makes `src/bindings.rs` from NCCL's header, which the Python package nvidia-nccl-cu13 has.
//!
//!     pip download --no-deps nvidia-nccl-cu13==2.32.3 && unzip nvidia_nccl_cu13-*.whl nvidia/nccl/include/nccl.h
//!     cargo run -p nccl-sys --example bindings -- nvidia/nccl/include/nccl.h
//!
//! With `--check` behind the header's path it writes nothing and fails where the committed file differs. Needs libclang (Debian:
//! libclang-dev).

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (header, check) = match arguments.as_slice() {
        [header] => (header, false),
        [header, flag] if flag == "--check" => (header, true),
        _ => {
            eprintln!("usage: bindings path/to/nccl.h [--check]");
            return ExitCode::from(2);
        }
    };
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let made = match generate(header, package) {
        Ok(made) => made,
        Err(error) => {
            eprintln!("{header}: {error}");
            return ExitCode::FAILURE;
        }
    };
    let file = package.join("src/bindings.rs");
    let outcome = match check {
        false => std::fs::write(&file, made),
        true => match std::fs::read_to_string(&file) {
            Ok(committed) if committed == made => Ok(()),
            Ok(committed) => {
                let differs = committed.lines().zip(made.lines()).position(|(a, b)| a != b);
                let line = differs.unwrap_or_else(|| committed.lines().count().min(made.lines().count())) + 1;
                Err(std::io::Error::other(format!("line {line} is not what bindgen makes of {header}: run this without --check")))
            }
            Err(error) => Err(error),
        },
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error}", file.display());
            ExitCode::FAILURE
        }
    }
}

fn generate(header: &str, package: &Path) -> Result<String, bindgen::BindgenError> {
    let bindings = bindgen::Builder::default()
        .header(header)
        .clang_arg(format!("-I{}", package.join("stubs").display()))
        .dynamic_library_name("Nccl")
        .dynamic_link_require_all(false)
        .allowlist_function("nccl.*")
        .allowlist_type("nccl.*")
        .allowlist_var("NCCL_.*")
        // A newer library's codes are values too.
        .default_enum_style(bindgen::EnumVariation::NewType { is_bitfield: false, is_global: false })
        .formatter(bindgen::Formatter::Prettyplease)
        .generate_comments(false)
        .generate()?;
    Ok(bindings.to_string())
}
