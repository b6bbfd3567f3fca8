use super::*;

#[test]
fn philox_gives_the_known_answers_of_random123() {
    // kat_vectors of Random123 1.14, philox4x32 10.
    let known = [
        ([0; 4], [0; 2], [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]),
        ([u32::MAX; 4], [u32::MAX; 2], [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]),
        (
            [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
            [0xa4093822, 0x299f31d0],
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
        ),
    ];
    for (counter, key, answer) in known {
        assert_eq!(philox(counter, key), answer);
    }
}

#[test]
fn the_key_of_a_class_is_its_word_of_its_block() {
    let (seed, step, class) = (0x0123_4567_89ab_cdef, 0x0001_0000_0002, (1u64 << 35) + 7);
    let block = philox([(class / 4) as u32, ((class / 4) >> 32) as u32, 2, 1], [0x89ab_cdef, 0x0123_4567]);
    assert_eq!(sample_key(seed, step, class), block[3]);
}

#[test]
fn every_copy_makes_the_keys_of_single_classes() {
    for simd in Simd::available() {
        for first in [0, 64, 640, (1 << 34) - 64, 1 << 40] {
            let mut keys = [0; 3 * KEYS];
            sample_keys_on(simd, 77, 5 << 33, first, &mut keys);
            for (offset, &key) in keys.iter().enumerate() {
                assert_eq!(key, sample_key(77, 5 << 33, first + offset as u64), "{simd:?} {first} {offset}");
            }
        }
    }
}

#[test]
fn start_values_have_the_same_bits_on_every_copy_and_for_every_width() {
    let mut whole = vec![0.0; 1024];
    start_values(3, 12345, 0.01, &mut whole);
    for simd in Simd::available() {
        for columns in [0, 1, 2, 3, 4, 5, 63, 64, 65, 200, 512, 1024] {
            let mut row = vec![f32::NAN; columns];
            start_values_on(simd, 3, 12345, 0.01, &mut row);
            let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&row), bits(&whole[..columns]), "{simd:?} {columns}");
        }
    }
}

fn box_and_muller(radius: u32, angle: u32) -> (f64, f64) {
    let u = f64::from((radius >> 1) as f32 + 0.5) / 2f64.powi(31);
    let (sine, cosine) = (f64::from(angle) / 2f64.powi(32) * std::f64::consts::TAU).sin_cos();
    let r = (-2.0 * u.ln()).sqrt();
    (r * cosine, r * sine)
}

#[test]
fn start_values_are_box_and_muller_of_the_words() {
    let mut row = [0f32; 4096];
    for class in [0, 9, (7u64 << 32) + 1] {
        start_values(42, class, 2.0, &mut row);
        for (index, pair) in row.chunks(2).enumerate() {
            let words = philox([class as u32, (class >> 32) as u32, index as u32 / 2, 1 << 24], [42, 0]);
            let (cosine, sine) = box_and_muller(words[index % 2 * 2], words[index % 2 * 2 + 1]);
            for (value, truth) in [(pair[0], 2.0 * cosine), (pair[1], 2.0 * sine)] {
                assert!((f64::from(value) - truth).abs() <= 2e-6, "{class} {index}: {value} against {truth}");
            }
        }
    }
}

#[test]
fn the_ends_of_the_words_give_finite_values_on_the_right_axes() {
    for radius in [0, 1, 2, 3, 1 << 31, u32::MAX - 2, u32::MAX] {
        for quarter in 0..8u32 {
            for offset in [u32::MAX, 0, 1] {
                let angle = (quarter << 29).wrapping_add(offset);
                let (a, b) = normal_pair(radius, angle, 1.0);
                let (cosine, sine) = box_and_muller(radius, angle);
                assert!((f64::from(a) - cosine).abs() < 2e-6, "{radius} {angle}: {a}");
                assert!((f64::from(b) - sine).abs() < 2e-6, "{radius} {angle}: {b}");
            }
        }
    }
    assert!(normal_pair(0, 0, 1.0).0 < 6.67);
}

/// 4,096,000 start values.
fn population() -> Vec<Vec<f32>> {
    (0..8000)
        .map(|class| {
            let mut row = vec![0.0; 512];
            start_values(1, class, 0.5, &mut row);
            row
        })
        .collect()
}

#[test]
fn start_values_are_normal() {
    let rows = population();
    let count = (rows.len() * 512) as f64;
    let moment = |power: i32| rows.iter().flatten().map(|&x| (f64::from(x) / 0.5).powi(power)).sum::<f64>() / count;
    // Five standard errors of each moment: sqrt((E z^2k - (E z^k)^2) / count).
    let five = |variance: f64| 5.0 * (variance / count).sqrt();
    for (power, expected, variance) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0), (6, 15.0, 10_170.0)] {
        assert!((moment(power) - expected).abs() < five(variance), "moment {power} is {}", moment(power));
    }
    // P(|z| > k), and as much on either side.
    for (limit, probability) in
        [(0.674_489_75, 0.5), (1.0, 0.317_310_5), (2.0, 0.045_500_26), (3.0, 2.699_796e-3), (4.0, 6.334_25e-5)]
    {
        for side in [1.0, -1.0] {
            let beyond = rows.iter().flatten().filter(|&&x| side * f64::from(x) / 0.5 > limit).count() as f64;
            let expected = count * probability / 2.0;
            assert!((beyond - expected).abs() < 5.0 * expected.sqrt(), "{beyond} beyond {}, expected {expected}", side * limit);
        }
    }
}

#[test]
fn neighbors_are_not_correlated() {
    let rows = population();
    let five = 5.0 / ((rows.len() * 500) as f64).sqrt();
    let z = |x: f32| f64::from(x) / 0.5;
    for lag in 1..=8 {
        let products = rows.iter().flat_map(|row| row.iter().zip(&row[lag..]).map(|(&a, &b)| z(a) * z(b)));
        let correlation = products.sum::<f64>() / (rows.len() * (512 - lag)) as f64;
        assert!(correlation.abs() < five, "columns {lag} apart: {correlation}");
        let squares =
            rows.iter().flat_map(|row| row.iter().zip(&row[lag..]).map(|(&a, &b)| (z(a).powi(2) - 1.0) * (z(b).powi(2) - 1.0)));
        let correlation = squares.sum::<f64>() / (rows.len() * (512 - lag)) as f64;
        assert!(correlation.abs() < 2.0 * five, "squares {lag} apart: {correlation}");
        let products = rows.iter().zip(&rows[lag..]).flat_map(|(a, b)| a.iter().zip(b).map(|(&a, &b)| z(a) * z(b)));
        let correlation = products.sum::<f64>() / ((rows.len() - lag) * 512) as f64;
        assert!(correlation.abs() < five, "classes {lag} apart: {correlation}");
    }
}

#[test]
fn seed_class_and_purpose_all_matter() {
    let make = |seed, class| {
        let mut row = vec![0.0; 64];
        start_values(seed, class, 1.0, &mut row);
        row
    };
    let same = |a: &[f32], b: &[f32]| a.iter().zip(b).filter(|(a, b)| a == b).count();
    assert_eq!(same(&make(1, 2), &make(1, 2)), 64);
    for other in [make(2, 2), make(1, 3), make(1 << 32, 2), make(1, 2 + (1 << 32))] {
        assert!(same(&make(1, 2), &other) <= 1);
    }
    assert_ne!(Purpose::Sample.word(), Purpose::Init.word());
}
