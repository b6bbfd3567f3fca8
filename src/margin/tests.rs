use super::*;

fn margin(m1: f64, m2: f64, m3: f64) -> Margin {
    Margin { scale: 64.0, m1, m2, m3, interclass_filter: 0.0, gradient: MarginGradient::Exact, guard: false }
}

#[test]
fn ranges_are_checked_at_both_ends() {
    let arcface = margin(1.0, 0.5, 0.0);
    type Set = fn(&mut Margin, f64);
    let cases: [(&str, Set, &[f64], &[f64]); 5] = [
        ("scale", |m, v| m.scale = v, &[1e-3, 64.0, 128.0], &[0.0, -1.0, 128.1, f64::INFINITY, f64::NAN]),
        ("m1", |m, v| m.m1 = v, &[0.1, 1.0, 16.0], &[0.0, -1.0, 16.1, f64::INFINITY, f64::NAN]),
        ("m2", |m, v| m.m2 = v, &[0.0, 0.5, PI, std::f32::consts::PI as f64], &[-0.1, 3.15, f64::INFINITY, f64::NAN]),
        ("m3", |m, v| m.m3 = v, &[0.0, 0.35, 2.0], &[-0.1, 2.1, f64::INFINITY, f64::NAN]),
        ("interclass_filter", |m, v| m.interclass_filter = v, &[0.0, 0.4, 1.0], &[-0.1, 1.1, f64::INFINITY, f64::NAN]),
    ];
    for (name, set, good, bad) in cases {
        for &value in good {
            let mut margin = arcface;
            set(&mut margin, value);
            assert_eq!(margin.check(), Ok(()), "{name} = {value}");
        }
        for &value in bad {
            let mut margin = arcface;
            set(&mut margin, value);
            let refused = margin.check().unwrap_err();
            assert_eq!(refused.status, crate::Status::InvalidArgument);
            assert!(
                refused.message.starts_with(&format!("{name} must be ")) && refused.message.ends_with(&format!(", got {value:?}")),
                "{}",
                refused.message
            );
        }
    }
    let mut zero = arcface;
    zero.scale = 0.0;
    assert_eq!(zero.check().unwrap_err().message, "scale must be above 0 and at most 128, got 0.0");
}

#[test]
fn the_offset_begins_at_64() {
    for (scale, offset) in [(1e-3, 0.0), (30.0, 0.0), (64.0, 0.0), (65.0, 1.0), (128.0, 64.0)] {
        assert_eq!(Margin { scale, ..margin(1.0, 0.5, 0.0) }.offset(), offset);
    }
}

#[test]
fn rows_far_from_all_negatives_have_an_offset_of_their_own() {
    let at = |scale: f64, filter: f64, best: f32| {
        let margin = Margin { scale, interclass_filter: filter, ..margin(1.0, 0.5, 0.0) };
        (margin.has_row_offsets(), margin.row_offset(best))
    };
    for best in [-2.0, -1.0, 0.0, 1.0] {
        assert_eq!([at(75.0, 0.0, best), at(64.0, 0.1, best)], [(false, 11.0), (false, 0.0)]);
        assert!((75f64 + 11.0) < -f64::from(f32::MIN_POSITIVE).ln());
    }
    assert_eq!(at(128.0, 0.0, 0.04), (true, 64.0));
    assert_eq!(at(128.0, 0.0, 0.03), (true, (128.0 * f64::from(0.03f32)) as f32));
    assert_eq!(at(128.0, 0.0, -1.0), (true, -128.0));
    // No negative at all; a negative above the filter, which counts as cosine 0.
    assert_eq!([at(128.0, 0.0, -2.0), at(128.0, 0.01, 0.02)], [(true, 64.0); 2]);
    assert_eq!(at(128.0, 0.01, -0.5), (true, -64.0));
    assert_eq!([at(90.0, 0.0, -0.3).1, at(90.0, 0.0, -0.5).1], [26.0, -45.0]);
}

#[test]
fn targets_follow_the_formula() {
    let target = margin(1.0, 0.5, 0.0).target(1.0);
    assert_eq!(target.logit, 64.0 * 1.5f64.cos());
    assert!((target.derivative - 1.5f64.sin() / 1f64.sin()).abs() < 1e-15);
    let target = margin(1.0, 0.0, 0.35).target(0.7);
    assert!((target.logit - 64.0 * (0.7f64.cos() - 0.35)).abs() < 1e-12);
    assert_eq!(target.derivative, 1.0);
    let target = Margin { gradient: MarginGradient::StraightThrough, ..margin(2.0, 0.3, 0.1) }.target(0.7);
    assert!((target.logit - 64.0 * (1.7f64.cos() - 0.1)).abs() < 1e-12);
    assert_eq!(target.derivative, 1.0);
}

#[test]
fn derivatives_are_finite_differences_by_the_cosine() {
    for guard in [false, true] {
        for (m1, m2, m3) in [(1.0, 0.0, 0.0), (1.0, 0.5, 0.0), (1.0, 0.3, 0.2), (0.9, 0.4, 0.15), (1.35, 0.0, 0.0), (4.0, 0.1, 0.0)]
        {
            let margin = Margin { guard, scale: 1.0, ..margin(m1, m2, m3) };
            for step in 1..200 {
                let theta = PI * f64::from(step) / 200.0;
                let h = 1e-6;
                if (m1 * theta + m2 - PI).abs() < 1e-3 {
                    continue;
                }
                let (high, low) = (margin.target(theta + h).logit, margin.target(theta - h).logit);
                let difference = (high - low) / ((theta + h).cos() - (theta - h).cos());
                let derivative = margin.target(theta).derivative;
                assert!((difference - derivative).abs() < 1e-6 * m1 * m1 * 10.0, "{margin:?} {theta}: {difference} {derivative}");
            }
        }
    }
}

#[test]
fn derivatives_by_m2_are_finite_differences() {
    for (guard, m1) in [(false, 1.0), (true, 1.0), (false, 1.35), (true, 1.35), (true, 0.5), (true, 4.0)] {
        // 2.33 is where k with m1 = 1 goes from one formula to the other.
        for m2 in [-0.4, 0.1, 0.5, 1.5, 2.2, 2.5, 3.0] {
            let at = |m2: f64| Margin { guard, scale: 1.0, ..margin(m1, m2, 0.2) };
            for theta in (1..200).map(|step| PI * f64::from(step) / 200.0) {
                let h = 1e-6;
                if (m1 * theta + m2 - PI).abs() < 1e-3 {
                    continue;
                }
                let difference = (at(m2 + h).target(theta).logit - at(m2 - h).target(theta).logit) / (2.0 * h);
                let derivative = at(m2).derivative_by_m2(theta);
                assert!((difference - derivative).abs() < 1e-8, "{guard} {m1} {m2} {theta}: {difference} {derivative}");
            }
        }
    }
}

#[test]
fn a_margin_below_0_ends_where_the_logit_is_largest() {
    for m1 in [0.8, 1.0, 1.4] {
        let negative = Margin { scale: 1.0, ..margin(m1, -0.4, 0.1) };
        let edge = 0.4 / m1;
        assert_eq!(negative.target(edge - 1e-3), Target { logit: 0.9, derivative: 0.0 });
        assert_eq!(negative.derivative_by_m2(edge - 1e-3), 0.0);
        let beyond = negative.target(edge + 0.1);
        assert!((beyond.logit - ((0.1 * m1).cos() - 0.1)).abs() < 1e-15 && beyond.derivative > 0.0);
    }
}

#[test]
fn derivatives_stay_finite_at_the_ends() {
    for theta in [0.0, 1e-9, PI - 1e-9, PI] {
        let target = margin(1.0, 0.5, 0.0).target(theta);
        assert!(target.logit.is_finite() && target.derivative.abs() <= 1.0 / LEAST_SINE, "{theta}: {target:?}");
    }
    let at_zero = margin(1.0, 0.5, 0.0).target(0.0).derivative;
    assert_eq!(at_zero, 0.5f64.sin() / 1e-4);
}

#[test]
fn with_the_guard_the_logit_falls_with_the_angle() {
    let rises = |margin: Margin| {
        let logits: Vec<f64> = (0..=10_000).map(|step| margin.target(PI * f64::from(step) / 10_000.0).logit).collect();
        logits.windows(2).any(|pair| pair[1] > pair[0] + 1e-12)
    };
    for m1 in [0.5, 0.9, 1.0, 1.1, 1.35, 2.0, 4.0, 16.0] {
        for m2 in [0.0, 0.1, 0.5, 1.0, 2.0, 2.3, 2.4, 3.0, PI] {
            let unguarded = margin(m1, m2, 0.1);
            assert!(!rises(Margin { guard: true, ..unguarded }), "{m1} {m2}");
            let turns_back = m1 * PI + m2 > PI + 1e-3;
            assert_eq!(rises(unguarded), turns_back, "{m1} {m2}");
        }
    }
}

#[test]
fn the_guard_is_arcface_s_for_usual_margins_and_continuous_for_other_multipliers() {
    let guarded = Margin { guard: true, scale: 1.0, ..margin(1.0, 0.5, 0.0) };
    let target = guarded.target(3.0);
    assert!((target.logit - (3f64.cos() - 0.5 * 0.5f64.sin())).abs() < 1e-15);
    assert_eq!(target.derivative, 1.0);
    assert_eq!(guarded.target(2.0), Margin { guard: false, ..guarded }.target(2.0));
    let guarded = Margin { guard: true, scale: 1.0, ..margin(1.3, 0.2, 0.1) };
    let edge = (PI - 0.2) / 1.3;
    assert!((guarded.target(edge - 1e-9).logit - guarded.target(edge + 1e-9).logit).abs() < 1e-8);
}

fn row(seed: u32, count: usize) -> (Vec<f32>, f64) {
    let row: Vec<f32> = (0..count).map(|i| ((i as u32 * 7919 + seed * 104_729) % 1009) as f32 / 504.0 - 1.0).collect();
    let norm = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    (row, 1.0 / norm)
}

#[test]
fn angles_have_the_cosine_of_the_rows() {
    for count in [1, 2, 15, 16, 17, 100, 512] {
        let ((e, e_inverse), (w, w_inverse)) = (row(1, count), row(2, count));
        let theta = angle(&e, e_inverse, &w, w_inverse);
        let dot: f64 = e.iter().zip(&w).map(|(&e, &w)| f64::from(e) * f64::from(w)).sum();
        assert!((cosine(theta) - dot * e_inverse * w_inverse).abs() < 1e-14, "{count}");
        let bits = difference_and_sum(&e, e_inverse, &w, w_inverse).map(f64::to_bits);
        for simd in Simd::available() {
            assert_eq!(difference_and_sum_on(simd, &e, e_inverse, &w, w_inverse).map(f64::to_bits), bits, "{simd:?} {count}");
        }
    }
}

#[test]
fn tangents_are_across_the_row_and_as_long_as_the_sine() {
    for count in [2, 15, 16, 17, 512] {
        let (e, e_inverse) = row(1, count);
        for nearness in [0.0, 1.0, 1e3, 1e6, -1e3] {
            let (mut w, _) = row(2, count);
            w.iter_mut().zip(&e).for_each(|(w, &e)| *w += nearness * e);
            let w_inverse = 1.0 / w.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
            let theta = angle(&e, e_inverse, &w, w_inverse);
            let mut found = vec![f32::NAN; count];
            tangent(&e, e_inverse, &w, w_inverse, theta, &mut found);
            let sine = found.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
            assert!((sine - theta.sin()).abs() <= 1e-7 * sine, "{count} {nearness}: {sine} for {}", theta.sin());
            let along: f64 = found.iter().zip(&e).map(|(&t, &e)| f64::from(t) * f64::from(e)).sum();
            assert!((along * e_inverse).abs() <= 1e-7 * sine, "{count} {nearness}: {along}");
        }
        let mut none = vec![f32::NAN; count];
        tangent(&e, 0.0, &e, e_inverse, FRAC_PI_2, &mut none);
        assert_eq!(none, vec![0.0; count]);
        // Theta 0 and pi: nothing but roundings of f64.
        let opposite: Vec<f32> = e.iter().map(|x| -x).collect();
        for (w, theta) in [(&e, 0.0), (&opposite, PI)] {
            tangent(&e, e_inverse, w, e_inverse, theta, &mut none);
            assert!(none.iter().all(|t| t.abs() < 1e-15));
        }
    }
}

#[test]
fn small_angles_keep_their_digits() {
    let (mut e, mut w) = (vec![0f32; 40], vec![0f32; 40]);
    (e[0], w[0], w[1]) = (3.0, 2.0, 2e-10);
    let theta = angle(&e, 1.0 / 3.0, &w, 0.5);
    assert!((theta - 1e-10).abs() < 1e-16, "{theta}");
    assert_eq!(angle(&e, 1.0 / 3.0, &e, 1.0 / 3.0), 0.0);
    let opposite: Vec<f32> = e.iter().map(|x| -x).collect();
    assert!((angle(&e, 1.0 / 3.0, &opposite, 1.0 / 3.0) - PI).abs() < 1e-15);
}

#[test]
fn a_row_without_direction_has_cosine_zero() {
    let (e, inverse) = row(1, 64);
    let zero = vec![0f32; 64];
    for theta in [angle(&e, inverse, &zero, 0.0), angle(&zero, 0.0, &e, inverse), angle(&zero, 0.0, &zero, 0.0)] {
        assert_eq!(cosine(theta), 0.0);
    }
    // NaN in a row that does not count is not looked at.
    assert_eq!(angle(&[f32::NAN], 0.0, &[1.0], 1.0), FRAC_PI_2);
    assert!(angle(&[f32::NAN], 1.0, &[1.0], 1.0).is_nan());
    assert_eq!(margin(1.0, 0.0, 0.0).target(FRAC_PI_2).logit, 0.0);
}
