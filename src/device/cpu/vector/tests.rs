use super::*;

/// Every 1000th float from `low` to `high`, both ends included.
fn floats(low: f32, high: f32) -> Vec<f32> {
    let mut all = vec![low, high];
    let ordered = |x: f32| if x < 0.0 { -i64::from(x.to_bits() & 0x7fff_ffff) } else { i64::from(x.to_bits()) };
    let mut at = ordered(low);
    while at < ordered(high) {
        all.push(if at < 0 { -f32::from_bits((-at) as u32) } else { f32::from_bits(at as u32) });
        at += 1000;
    }
    all
}

#[test]
fn exp_is_within_3e_7_of_the_truth_over_its_range() {
    let arguments = floats(-87.0, 88.0);
    assert!(arguments.len() > 1_000_000);
    for simd in Simd::available() {
        let mut row = arguments.clone();
        exp_row_on(simd, &mut row, 1.0, 0.0, None);
        let (mut worst, mut at) = (0f64, 0f32);
        for (&x, &y) in arguments.iter().zip(&row) {
            let truth = f64::from(x).exp();
            let error = (f64::from(y) / truth - 1.0).abs();
            if error > worst {
                (worst, at) = (error, x);
            }
        }
        assert!(worst <= 3e-7, "{simd:?}: relative error {worst:e} at {at}");
    }
}

#[test]
fn exp_beyond_its_range_is_zero_infinite_or_nan() {
    for simd in Simd::available() {
        let mut row = [f32::NEG_INFINITY, -1e30, -87.31, 88.722, 88.73, 1e30, f32::INFINITY, -0.0, 0.0];
        exp_row_on(simd, &mut row, 1.0, 0.0, None);
        assert_eq!(row[..3], [0.0; 3], "{simd:?}");
        assert!((row[3] / 88.722f64.exp() as f32 - 1.0).abs() < 1e-4, "{simd:?}: {}", row[3]);
        assert_eq!(row[4..], [f32::INFINITY, f32::INFINITY, f32::INFINITY, 1.0, 1.0], "{simd:?}");
        for bits in [0x7fc0_0000u32, 0xffc0_0000, 0x7f80_0001, 0x7fff_ffff] {
            let mut row = [f32::from_bits(bits), 0.5];
            let sums = exp_row_on(simd, &mut row, 1.0, 0.0, Some(0.9));
            assert!(row[0].is_nan() && sums.sum.is_nan(), "{simd:?}: {bits:#x}");
            assert_eq!(sums.max_cosine, 0.5);
        }
    }
}

/// Cosine-like values, none on a filter of a tenth.
fn cosines(count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919 % 2003) as f32 / 1001.0 - 1.0) * 0.99).collect()
}

#[test]
fn rows_of_every_length_have_their_sum_and_maximum() {
    for simd in Simd::available() {
        for count in (0..100).chain([511, 512, 513, 1024, 5000]) {
            let mut row = cosines(count);
            if count > 3 {
                row[2] = f32::NEG_INFINITY;
            }
            let (scale, offset) = (64.0, 3.0);
            let truth: Vec<f64> = row.iter().map(|&x| (scale * f64::from(x) - offset).exp()).collect();
            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sums = exp_row_on(simd, &mut row, scale as f32, offset as f32, None);
            let sum: f64 = truth.iter().sum();
            assert!((sums.sum - sum).abs() <= 5e-6 * sum, "{simd:?} {count}: {} against {sum}", sums.sum);
            assert_eq!(sums.max_cosine, largest, "{simd:?} {count}");
            for (y, truth) in row.iter().zip(&truth) {
                // The exponent itself is rounded to f32: half a unit in the last place of 67.
                assert!((f64::from(*y) - truth).abs() <= 9e-6 * truth + 1e-37, "{simd:?} {count}");
            }
            if count > 3 {
                assert_eq!(row[2], 0.0);
            }
        }
    }
}

#[test]
fn a_filtered_negative_stores_nothing_and_counts_as_cosine_zero() {
    for simd in Simd::available() {
        let before = cosines(777);
        let mut row = before.clone();
        let sums = exp_row_on(simd, &mut row, 10.0, 2.0, Some(0.4));
        let mut sum = 0.0;
        for (&x, &y) in before.iter().zip(&row) {
            if x > 0.4 {
                assert_eq!(y, 0.0);
                sum += (-2f64).exp();
            } else {
                assert!(y > 0.0);
                sum += (10.0 * f64::from(x) - 2.0).exp();
            }
        }
        assert!((sums.sum - sum).abs() <= 2e-6 * sum, "{simd:?}: {} against {sum}", sums.sum);
        assert!(sums.max_cosine > 0.9);
    }
}

#[test]
fn dot_is_exact_to_f64_and_alike_everywhere() {
    for count in (0..70).chain([512, 1000]) {
        let (a, b) = (cosines(count), cosines(count + 5).split_off(5));
        let truth: f64 = a.iter().zip(&b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
        let bits = dot(&a, &b).to_bits();
        for simd in Simd::available() {
            assert_eq!(dot_on(simd, &a, &b).to_bits(), bits, "{simd:?} {count}");
        }
        assert!((f64::from_bits(bits) - truth).abs() <= 1e-12 * count as f64);
        let squares: f64 = a.iter().map(|&a| f64::from(a) * f64::from(a)).sum();
        assert!((sum_of_squares(&a) - squares).abs() <= 1e-12 * count as f64);
    }
    // In f32 the ones would be lost beside 2^52.
    let mut row = vec![1.0f32; 4096];
    row[0] = 67_108_864.0;
    assert_eq!(sum_of_squares(&row), 4_503_599_627_370_496.0 + 4095.0);
}

#[test]
fn a_row_is_scaled_to_travel_by_a_power_of_two() {
    for exponent in -39..=127 {
        for mantissa in [1.0, 1.5, 2.0 - f32::EPSILON] {
            let largest = mantissa * 2f32.powi(exponent);
            for row in [[largest, -largest / 3.0, 0.0, 1e-45], [-largest / 7.0, 0.0, -largest, 1e-30_f32.min(largest)]] {
                let scale = send_scale(&row);
                assert!(scale.is_normal() && scale.recip().is_normal() && scale.to_bits() << 9 == 0, "{row:?}: {scale:e}");
                let sent = largest * scale;
                assert!(exponent == 127 && (2.0..4.0).contains(&sent) || (1.0..2.0).contains(&sent), "{row:?}: {sent}");
                assert_eq!(sent * scale.recip(), largest);
            }
        }
    }
    assert_eq!(send_scale(&[f32::MAX, f32::MIN_POSITIVE]), 2f32.powi(-126));
    // No direction: all of it below 1e-12, not each of its elements.
    assert_eq!([send_scale(&[]), send_scale(&[0.0, -0.0]), send_scale(&[1e-45]), send_scale(&[9e-13])], [0.0; 4]);
    assert_eq!(send_scale(&[9e-13; 4]), 2f32.powi(41));
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert_eq!([send_scale(&[1e30, bad, 0.0]), send_scale(&[bad])], [1.0; 2]);
    }
}

#[test]
fn rows_are_scaled_and_added() {
    for count in [0, 1, 15, 64, 100] {
        let src = cosines(count);
        let mut dst = vec![f32::NAN; count];
        scale_into(&src, 2.5, &mut dst);
        assert!(dst.iter().zip(&src).all(|(d, s)| *d == 2.5 * s));
        let before = dst.clone();
        add_scaled(&mut dst, -0.75, &src);
        assert!(dst.iter().zip(&before).zip(&src).all(|((d, b), s)| *d == b + -0.75 * s));
    }
}

#[test]
#[should_panic(expected = "one length")]
fn rows_of_two_lengths_are_refused() {
    dot(&[1.0], &[1.0, 2.0]);
}
