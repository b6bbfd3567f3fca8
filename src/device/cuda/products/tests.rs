use super::*;

#[test]
fn launches_are_what_the_kernels_say() {
    let header = include_str!("../../../../kernels/tune.h");
    let says = |line: String| assert!(header.contains(&line), "tune.h does not say {line}");
    let of_square = |name: &str, Pipeline { shared, stages }: Pipeline| {
        says(format!("static_assert(kDeepStages || {name} == {shared}, "));
        says(format!("kDeepStages ? 2 : {stages},"));
    };
    of_square("kNumeratorsShared", NUMERATORS);
    of_square("kWeightedShared", WEIGHTED);
    of_square("kCosinesShared", WEIGHTED);
    for CenterGradientEntry { max_dim, half, f32, pipelines } in CENTER_GRADIENT {
        says(format!("// gate: {half} registers "));
        says(format!("// gate: {f32} registers "));
        assert!(half.ends_with(&format!("_half_{max_dim}")) && f32.ends_with(&format!("_f32_{max_dim}")));
        for (Pipeline { shared, stages }, [name, argument]) in pipelines.iter().zip([["", ""], ["Deep", ", true"]]) {
            says(format!("static_assert(kGradShared{max_dim}{name} == {shared}, "));
            says(format!("static_assert(gemm_tile(Gemm::kCenterGradient, {max_dim}{argument}).stages == {stages}, "));
        }
    }
}
