use std::process::Command;

use super::*;
use crate::matrix::DType;
use crate::optimizer::{Adamw, Sgd};
use crate::protocol::{BlockFault, FACTOR_WORD};
use crate::Status;

#[test]
fn layouts_are_those_of_the_header() {
    let mut source = String::from("#include \"kernels/shared_structs.h\"\n#include <stddef.h>\n#include <stdio.h>\nint main() {\n");
    let mut expected = String::new();
    for (name, size, fields) in LAYOUT {
        source += &format!("    printf(\"{name} %zu\\n\", sizeof({name}));\n");
        expected += &format!("{name} {size}\n");
        for (field, offset, size) in *fields {
            source +=
                &format!("    printf(\"  {field} %zu %zu\\n\", offsetof({name}, {field}), sizeof((({name}*)nullptr)->{field}));\n");
            expected += &format!("  {field} {offset} {size}\n");
        }
    }
    for (name, value) in constants() {
        source += &format!("    printf(\"{name} %lld\\n\", (long long){name});\n");
        expected += &format!("{name} {value}\n");
    }
    source += "}\n";
    let folder = std::env::temp_dir().join(format!("partialfc-structs-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for the program");
    let (text, program) = (folder.join("layout.cpp"), folder.join("layout"));
    std::fs::write(&text, source).expect("the program's text");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let built = Command::new(compiler)
        // Cargo starts tests in the package's folder.
        .args(["-std=c++17", "-Wno-invalid-offsetof", "-I", ".", "-I", cuda_emulator::HEADERS, "-o"])
        .arg(&program)
        .arg(&text)
        .output()
        .expect("a C++ compiler");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let printed = Command::new(&program).output().expect("the program's output");
    std::fs::remove_dir_all(&folder).expect("to clean up");
    similar(&String::from_utf8_lossy(&printed.stdout), &expected);
}

fn constants() -> Vec<(&'static str, i64)> {
    vec![
        ("kNone", NONE.into()),
        ("kTileRows", TILE_ROWS as i64),
        ("kTileColumns", TILE_COLUMNS as i64),
        ("kLabelHeader", HEADER as i64),
        ("kFactorWord", FACTOR_WORD as i64),
        ("kSkippedFactor", crate::protocol::SKIPPED_FACTOR),
        ("kAnnounced", ANNOUNCED as i64),
        ("kDrawsWord", crate::protocol::DRAWS_WORD as i64),
        ("kTotals", crate::protocol::TOTALS as i64),
        ("kTotals", crate::protocol::REPLICATED_TOTALS as i64),
        ("kSlot", crate::protocol::REPLICATED_SLOT as i64),
        ("kInvalidArgument", Status::InvalidArgument as i64),
        ("kComm", Status::Comm as i64),
        ("kRemote", Status::Remote as i64),
        ("kMismatch", Status::Mismatch as i64),
        ("kLabel", Status::Label as i64),
        ("kNotFinite", Status::NotFinite as i64),
        ("kNoFault", fault::NONE.into()),
        ("kFaultRemote", fault::REMOTE.into()),
        ("kFaultRanksDiffer", fault::RANKS_DIFFER.into()),
        ("kFaultLabel", fault::LABEL.into()),
        ("kFaultEmbedding", fault::EMBEDDING.into()),
        ("kFaultSum", fault::SUM.into()),
        ("kFaultForward", fault::FORWARD.into()),
        ("kFaultSamples", fault::SAMPLES.into()),
        ("kFaultSums", fault::SUMS.into()),
        ("kFaultBlock", fault::BLOCK.into()),
        ("kFaultTerm", fault::TERM.into()),
        ("kBlockChanged", BlockFault::Changed as i64),
        ("kBlockMisplaced", BlockFault::Misplaced as i64),
        ("kBlockBatch", BlockFault::Batch as i64),
        ("kF32", DType::F32 as i64),
        ("kF16", DType::F16 as i64),
        ("kBf16", DType::Bf16 as i64),
    ]
}

/// Names the first line that differs: the whole is long.
fn similar(printed: &str, expected: &str) {
    for (printed, expected) in printed.lines().zip(expected.lines()) {
        assert_eq!(printed, expected, "kernels/shared_structs.h on the left, shared_structs.rs on the right");
    }
    assert_eq!(printed.lines().count(), expected.lines().count());
}

#[test]
fn every_field_of_the_header_is_here() {
    let header = std::fs::read_to_string("kernels/shared_structs.h").expect("the header");
    let structs = header.lines().filter_map(|line| line.strip_prefix("struct ")?.strip_suffix(" {"));
    let known: Vec<&str> = LAYOUT.iter().map(|(name, ..)| *name).collect();
    let mut found: Vec<&str> = structs.collect();
    found.sort_unstable();
    let mut sorted = known.clone();
    sorted.sort_unstable();
    assert_eq!(found, sorted);
    // No field but these fits: their sizes fill the structures, up to the alignment of the last.
    for (name, size, fields) in LAYOUT {
        let mut end = 0;
        for (field, offset, bytes) in *fields {
            assert!(offset - end < 8, "{name}.{field}");
            end = offset + bytes;
        }
        assert!(size - end < 8, "{name}");
    }
}

#[test]
fn settings_are_those_of_the_options() {
    let margin = Margin {
        scale: 100.0,
        m1: 1.5,
        m2: 0.25,
        m3: 0.125,
        interclass_filter: 0.75,
        gradient: MarginGradient::StraightThrough,
        guard: true,
    };
    let view = MarginSettings::from(&margin);
    assert_eq!([view.scale, view.m1, view.m2, view.m3, view.filter, view.offset], [100.0, 1.5, 0.25, 0.125, 0.75, 36.0]);
    assert_eq!((view.straight_through, view.guard), (1, 1));
    let sgd = OptimizerSettings::new(&Optimizer::Sgd(Sgd { momentum: 0.9, weight_decay: 5e-4 }), RowUpdate::Dense);
    assert_eq!((sgd.momentum, sgd.weight_decay, sgd.adamw, sgd.dense, sgd.replayed_updates), (0.9, 5e-4, 0, 1, 0));
    let adamw = Adamw { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 };
    let view = OptimizerSettings::new(&Optimizer::Adamw(adamw), RowUpdate::Lazy);
    assert_eq!((view.beta1, view.beta2, view.epsilon, view.weight_decay), (0.9, 0.999, 1e-8, 0.01));
    assert_eq!((view.adamw, view.dense, view.replayed_updates), (1, 0, 161));
    let matrix = Matrix { data: std::ptr::null_mut(), dtype: DType::Bf16, rows: 3, cols: 5, row_stride: 7 };
    let view = MatrixView::from(&matrix);
    assert_eq!((view.rows, view.columns, view.stride, view.dtype), (3, 5, 7, 3));
}
