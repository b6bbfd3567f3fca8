use super::*;

#[test]
fn launches_are_what_the_kernels_say() {
    let header = include_str!("../../../../kernels/tune.h");
    let says = |line: String| assert!(header.contains(&line), "tune.h does not say {line}");
    let shared = |name: &str, bytes: u32| says(format!("static_assert({name} == {bytes}, "));
    shared("kNumeratorsShared", NUMERATORS_SHARED);
    shared("kWeightedShared", WEIGHTED_SHARED);
    shared("kCosinesShared", COSINES_SHARED);
    let stages = |width: &str, stages: u32| {
        says(format!("static_assert(gemm_tile(Gemm::kCenterGradient, {width}).stages == {stages}, "));
    };
    for CenterGradientEntry { max_dim, half, f32, pipeline, deep } in CENTER_GRADIENT {
        says(format!("// gate: {half} registers "));
        says(format!("// gate: {f32} registers "));
        assert!(half.ends_with(&format!("_half_{max_dim}")) && f32.ends_with(&format!("_f32_{max_dim}")));
        shared(&format!("kGradShared{max_dim}"), pipeline.shared);
        stages(&max_dim.to_string(), pipeline.stages);
        if let Some(deep) = deep {
            shared(&format!("kGradShared{max_dim}Deep"), deep.shared);
            stages(&format!("{max_dim}, true"), deep.stages);
        }
    }
}
