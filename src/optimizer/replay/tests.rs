use super::*;
use crate::optimizer::tests::{optimizers, rate, values, Row, COLUMNS};
use crate::optimizer::UpdateRule;

#[test]
fn catching_up_is_what_a_dense_optimizer_does() {
    for optimizer in optimizers() {
        for start in [1, 5, 290] {
            for gap in [1, 2, 10, 127, 128, 129, 160, 161, 256, 1000] {
                let mut row = Row::new(&optimizer);
                let mut history = History::new();
                for _ in 0..start - 1 {
                    history.push(rate(history.updates() + 1));
                }
                // Two updates with gradients, then a gap.
                for g in [values(3, 0.3), values(4, 0.2)] {
                    history.push(rate(history.updates() + 1));
                    let update = history.updates();
                    UpdateRule::new(&optimizer, rate(update), update).apply(&mut row.w, &mut row.m, &mut row.v, &g);
                }
                row.trust();
                let (last, before) = (history.updates(), row.w.clone());
                for _ in 0..gap {
                    history.push(rate(history.updates() + 1));
                    let update = history.updates();
                    row.step_truth(&optimizer, rate(update), update, &[0.0; COLUMNS]);
                }
                let replay = Replay::new(&optimizer, &history, last + gap).unwrap();
                assert!(replay.is_current(last + gap) && !replay.is_current(last));
                replay.catch_up(last, &mut row.w, &mut row.m, &mut row.v);
                row.check(&before, &format!("{optimizer:?} gap {gap} after {last}"));
            }
        }
    }
}

#[test]
fn an_untouched_row_only_decays() {
    for optimizer in optimizers() {
        let mut row = Row::new(&optimizer);
        let mut history = History::new();
        for update in 1..=500 {
            history.push(rate(update));
            row.step_truth(&optimizer, rate(update), update, &[0.0; COLUMNS]);
        }
        let before = row.w.clone();
        Replay::new(&optimizer, &history, 500).unwrap().catch_up(0, &mut row.w, &mut row.m, &mut row.v);
        row.check(&before, &format!("{optimizer:?}"));
    }
}

/// A row of which next to nothing is left has as many digits as another.
#[test]
fn what_is_left_after_a_long_gap_keeps_its_digits() {
    for momentum in [0.0, 0.9, 0.99] {
        let sgd = Optimizer::Sgd(Sgd { momentum, weight_decay: 0.05 });
        let adamw = Optimizer::Adamw(Adamw { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.5 * (1.0 - momentum) });
        for (optimizer, lr) in [(sgd, 0.2 * (1.0 - momentum)), (adamw, 0.02 / (1.0 - momentum))] {
            let (mut row, mut history) = (Row::new(&optimizer), History::new());
            row.m.fill(0.01);
            row.v.fill(0.0);
            if matches!(optimizer, Optimizer::Adamw(_)) {
                row.m.fill(0.0);
            }
            row.trust();
            let (start, mut checked) = (row.clone(), 0);
            for update in 1..=20_000 {
                history.push(lr);
                row.step_truth(&optimizer, lr, update, &[0.0; COLUMNS]);
                let largest = row.truth.iter().map(|truth| truth[0].abs()).fold(0.0, f64::max);
                if largest < 1e-29 {
                    break;
                }
                if update % 400 == 0 {
                    let mut now = start.clone();
                    Replay::new(&optimizer, &history, update).unwrap().catch_up(0, &mut now.w, &mut now.m, &mut now.v);
                    for (found, truth) in now.w.iter().zip(&row.truth) {
                        let off = (f64::from(*found) - truth[0]).abs();
                        assert!(off <= 1e-5 * largest, "{optimizer:?} update {update}: {found:e} for {:e}", truth[0]);
                    }
                    checked += 1;
                }
            }
            assert!(checked > 2, "{optimizer:?}");
        }
    }
}

#[test]
fn how_far_the_history_reaches_back_changes_no_bit() {
    for optimizer in optimizers() {
        let mut row = Row::new(&optimizer);
        UpdateRule::new(&optimizer, 0.1, 1).apply(&mut row.w, &mut row.m, &mut row.v, &values(3, 0.3));
        let mut history = History::new();
        (1..=900).for_each(|update| history.push(rate(update)));
        let caught_up = |history: &History, now| {
            let mut copy = row.clone();
            Replay::new(&optimizer, history, now).unwrap().catch_up(400, &mut copy.w, &mut copy.m, &mut copy.v);
            copy.bits()
        };
        let whole = caught_up(&history, 850);
        let mut short = history.clone();
        short.trim(400);
        assert_eq!(caught_up(&short, 850), whole, "{optimizer:?}");
        assert_eq!(caught_up(&History::restore(short.oldest(), short.rates()[..450].to_vec()), 850), whole, "{optimizer:?}");
    }
}

#[test]
fn a_current_row_keeps_its_bits() {
    for optimizer in optimizers() {
        let mut row = Row::new(&optimizer);
        row.m.fill(f32::NAN);
        let mut history = History::new();
        (1..=9).for_each(|update| history.push(rate(update)));
        let before = row.w.clone();
        Replay::new(&optimizer, &history, 7).unwrap().catch_up(7, &mut row.w, &mut row.m, &mut row.v);
        assert_eq!(row.w, before);
    }
}

#[test]
fn moves_are_replayed_until_they_round_away() {
    let replayed = |beta1, beta2| replayed_updates(&Adamw { beta1, beta2, epsilon: 1e-8, weight_decay: 0.0 });
    assert_eq!(replayed(0.9, 0.999), 161);
    for (beta1, beta2) in [(0.9f64, 0.999f64), (0.5, 0.9), (0.8, 0.99)] {
        let (ratio, k) = (beta1 / beta2.sqrt(), replayed(beta1, beta2) as i32);
        assert!(ratio.powi(k) < 5e-8 && ratio.powi(k - 1) >= 5e-8);
    }
    // Where m outlives sqrt(v): until beta1^k is no f32.
    let k = replayed(0.99, 0.9) as i32;
    assert!(0.99f64.powi(k) < 1e-45 && 0.99f64.powi(k - 1) >= 1e-45);
    assert_eq!(replayed(0.0, 0.999), 1);
    assert_eq!(replayed(0.0, 0.0), 1);
    assert!(replayed(0.9, 0.0) > 900);
}

#[test]
fn histories_are_trimmed_from_the_front() {
    let mut history = History::new();
    assert_eq!((history.oldest(), history.updates(), history.rates()), (0, 0, &[][..]));
    (1..=5).for_each(|update| history.push(f64::from(update)));
    history.trim(2);
    assert_eq!((history.oldest(), history.updates(), history.rates()), (2, 5, &[3.0, 4.0, 5.0][..]));
    history.trim(1);
    assert_eq!(history, History::restore(2, vec![3.0, 4.0, 5.0]));
    history.trim(9);
    assert_eq!((history.oldest(), history.updates(), history.rates()), (5, 5, &[][..]));
    history.push(6.0);
    assert_eq!((history.oldest(), history.updates(), history.rates()), (5, 6, &[6.0][..]));
}

#[test]
#[should_panic(expected = "last is 2; rows between 3 and 5")]
fn a_row_older_than_the_history_is_refused() {
    let optimizer = Optimizer::Sgd(Sgd { momentum: 0.9, weight_decay: 0.0 });
    Replay::new(&optimizer, &History::restore(3, vec![0.1; 2]), 5).unwrap().catch_up(2, &mut [1.0], &mut [0.0], &mut []);
}

#[test]
fn every_copy_has_the_same_bits() {
    for optimizer in optimizers() {
        let mut history = History::new();
        (1..=400).for_each(|update| history.push(rate(update)));
        let results = Simd::available().into_iter().map(|simd| {
            let mut row = Row::new(&optimizer);
            UpdateRule::new(&optimizer, 0.1, 3).apply(&mut row.w, &mut row.m, &mut row.v, &values(3, 0.3));
            let replay = Replay { simd, ..Replay::new(&optimizer, &history, 400).unwrap() };
            replay.catch_up(3, &mut row.w, &mut row.m, &mut row.v);
            row.bits()
        });
        let results: Vec<_> = results.collect();
        assert!(results.iter().all(|result| *result == results[0]), "{optimizer:?}");
    }
}
