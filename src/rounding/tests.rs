use super::*;
use crate::random::{rounding_key, Purpose};
use half::bf16;

fn values(count: usize) -> Vec<f32> {
    (0..count as u32).map(|i| f32::from_bits(i.wrapping_mul(0x9E37_79B9) & 0xbf7f_ffff)).collect()
}

#[test]
fn widened_and_rounded_to_nearest_they_are_those_of_half() {
    let from = values(1000);
    let mut stored = vec![0; 1000];
    assert!(to_nearest(&from, &mut stored));
    let expected: Vec<u16> = from.iter().map(|&value| bf16::from_f32(value).to_bits()).collect();
    assert_eq!(stored, expected);
    let mut wide = vec![0.0; 1000];
    widen(&stored, &mut wide);
    assert!(wide.iter().zip(&stored).all(|(wide, &stored)| wide.to_bits() == bf16::from_bits(stored).to_f32().to_bits()));
}

#[test]
fn every_copy_has_the_same_bits_for_every_width() {
    let from = values(131);
    let mut whole = vec![0; 131];
    at_random(7, &from, &mut whole);
    for simd in Simd::available() {
        for columns in [0, 1, 15, 16, 17, 31, 32, 33, 64, 131] {
            let mut row = vec![0; columns];
            at_random_on(simd, 7, &from[..columns], &mut row);
            assert_eq!(row, whole[..columns], "{simd:?} {columns}");
        }
    }
}

/// The formula, column by column.
#[test]
fn a_column_has_its_16_bits() {
    let (key, from) = (0x89ab_cdef, values(131));
    let mut stored = vec![0; 131];
    at_random(key, &from, &mut stored);
    for (column, (&value, &stored)) in (0..).zip(from.iter().zip(&stored)) {
        let mut word = u32::wrapping_add(key, u32::wrapping_mul(column / 32 * 16 + column % 16, 0x9E37_79B9));
        word = (word ^ (word >> 16)).wrapping_mul(0x7feb_352d);
        word = (word ^ (word >> 15)).wrapping_mul(0x846c_a68b);
        word ^= word >> 16;
        let random = if column % 32 < 16 { word & 0xffff } else { word >> 16 };
        assert_eq!(u32::from(stored), (value.to_bits() + random) >> 16, "column {column}");
    }
}

#[test]
fn what_bfloat16_holds_stays() {
    let held: Vec<f32> = (0..=u16::MAX).map(|bits| f32::from_bits(u32::from(bits) << 16)).filter(|x| x.is_finite()).collect();
    let (mut at, mut nearest) = (vec![0; held.len()], vec![0; held.len()]);
    assert!(at_random(3, &held, &mut at) && to_nearest(&held, &mut nearest));
    for (value, (at, nearest)) in held.iter().zip(at.iter().zip(&nearest)) {
        assert_eq!((u32::from(*at) << 16, u32::from(*nearest) << 16), (value.to_bits(), value.to_bits()));
    }
}

#[test]
fn what_is_not_finite_is_told_and_stays_so() {
    // The last is finite in float32 alone.
    for bad in [f32::NAN, f32::from_bits(0x7f80_0001), f32::from_bits(u32::MAX), f32::INFINITY, -f32::INFINITY, f32::MAX] {
        let row = [1.0, bad];
        let mut stored = [0; 2];
        assert!(!to_nearest(&row, &mut stored), "{bad}");
        assert!(!bf16::from_bits(stored[1]).is_finite(), "{bad}");
    }
    let mut stored = [0; 2];
    assert!(!at_random(1, &[f32::from_bits(0xffff_ffff), 1.0], &mut stored));
    assert!(!bf16::from_bits(stored[0]).is_finite());
}

/// How far many small steps move a number, of what they should, rounded after each.
fn moved(step: f32, steps: u64, round: impl Fn(u64, &[f32], &mut [u16])) -> f64 {
    const COLUMNS: usize = 2048;
    let (mut row, mut stored) = (vec![1.0f32; COLUMNS], vec![0; COLUMNS]);
    for update in 1..=steps {
        row.iter_mut().for_each(|value| *value += step);
        round(update, &row, &mut stored);
        widen(&stored, &mut row);
    }
    let mean = row.iter().map(|&value| f64::from(value) - 1.0).sum::<f64>() / COLUMNS as f64;
    mean / (f64::from(step) * steps as f64)
}

/// Why weights are not rounded to nearest.
#[test]
fn small_steps_move_a_number_that_is_rounded_at_random_alone() {
    let unit = 2f32.powi(-7);
    for (step, steps) in [(0.3 * unit, 66), (0.01 * unit, 2000), (-0.1 * unit, 200)] {
        let random = moved(step, steps, |update, from, to| {
            at_random(rounding_key(5, 77, update, Purpose::Weight), from, to);
        });
        // 2048 columns of `steps` draws each: the standard error is below 0.01.
        assert!((random - 1.0).abs() < 0.04, "{random} of {step}");
        let nearest = moved(step, steps, |_, from, to| {
            to_nearest(from, to);
        });
        assert_eq!(nearest, 0.0, "{step}");
    }
}

#[test]
fn classes_updates_and_purposes_have_bits_of_their_own() {
    let base = rounding_key(1, 2, 3, Purpose::Weight);
    let others = [
        rounding_key(2, 2, 3, Purpose::Weight),
        rounding_key(1, 3, 3, Purpose::Weight),
        rounding_key(1, 2, 4, Purpose::Weight),
        rounding_key(1, 2, 3, Purpose::SecondMoment),
        rounding_key(1, 2 + (1 << 32), 3, Purpose::Weight),
    ];
    assert!(others.iter().all(|&other| other != base));
    // A probability of 1/4 is met for every column.
    let counts = (0..4000u64).fold([0u32; 64], |mut counts, class| {
        let mut stored = [0; 64];
        at_random(rounding_key(9, class, 1, Purpose::Weight), &[1.0 + 2f32.powi(-9); 64], &mut stored);
        counts.iter_mut().zip(stored).for_each(|(count, bits)| *count += u32::from(bits != 0x3f80));
        counts
    });
    // 1000 +- 27 each; five standard deviations.
    assert!(counts.iter().all(|&count| count.abs_diff(1000) < 137), "{counts:?}");
}
