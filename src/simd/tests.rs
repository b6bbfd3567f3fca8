use super::*;
use crate::Status;

#[test]
fn the_portable_copy_is_always_there_and_every_one_can_be_asked_for_by_name() {
    let all = Simd::available();
    assert!(all.contains(&Simd::best()) && all.contains(&Simd::fastest()));
    assert_eq!(all[all.len() - 1].level(), Level::Portable);
    for simd in all {
        assert_eq!(Simd::named(simd.name()), Ok(simd));
    }
    for name in ["avx", "AVX2", " avx2", "0"] {
        let refused = Simd::named(name).expect_err("no such set");
        assert_eq!(refused.status, Status::InvalidArgument);
        assert!(
            refused.message.starts_with("PFC_CPU must be one of ") && refused.message.ends_with(&format!("portable, got {name:?}"))
        );
    }
}

#[test]
fn what_this_processor_lacks_is_refused_by_name() {
    for level in Level::ALL.iter().filter(|level| !level.is_here()) {
        let refused = Simd::named(level.name()).expect_err("not here");
        assert_eq!(refused.status, Status::Unsupported);
        assert!(refused.message.contains(level.name()) && refused.message.ends_with("portable"), "{refused:?}");
    }
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
