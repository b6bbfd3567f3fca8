//! Rows that move at every update but are stored as they were when last touched: what they missed, made up for in one go.

use super::{bias_corrected, Adamw, Optimizer, Sgd};
use crate::memory::reserve;
use crate::simd::{clones, Simd};
use crate::Result;

/// What errors call the coefficients of missed updates.
const MISSED: &str = "updates that rows have missed";

/// The learning rates of the updates that some row may still have to make up for.
///
/// 8 bytes an update since the oldest row's last one. Belongs to a checkpoint: [`History::oldest`] and [`History::rates`] are all
/// of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    oldest: u64,
    /// Of updates oldest + 1, oldest + 2, ...
    rates: Vec<f64>,
}

impl History {
    /// Before the first update.
    pub fn new() -> History {
        History::default()
    }

    /// Before the first update, with room for the learning rates of as many.
    pub fn with_room(updates: usize) -> Result<History> {
        let mut history = History::new();
        reserve(&mut history.rates, updates, "learning rates")?;
        Ok(history)
    }

    /// After update `updates`, which no row has missed.
    pub fn restart(&mut self, updates: u64) {
        self.rates.clear();
        self.oldest = updates;
    }

    /// As it was saved.
    #[cfg(test)]
    pub fn restore(oldest: u64, rates: Vec<f64>) -> History {
        History { oldest, rates }
    }

    /// Update number `updates() + 1` was made, with this learning rate.
    pub fn push(&mut self, learning_rate: f64) {
        self.rates.push(learning_rate);
    }

    /// Forgets what no row needs: every row's last is `oldest` or later. Never forgets more than there is; never brings back.
    pub fn trim(&mut self, oldest: u64) {
        let forgotten = oldest.min(self.updates()).saturating_sub(self.oldest);
        self.rates.drain(..forgotten as usize);
        self.oldest += forgotten;
    }

    /// Number of updates so far, which is the number of the latest.
    pub fn updates(&self) -> u64 {
        self.oldest + self.rates.len() as u64
    }

    /// Rows touched last at this update or a later one can be caught up.
    pub fn oldest(&self) -> u64 {
        self.oldest
    }

    /// Learning rates of the updates `oldest() + 1` to `updates()`.
    pub fn rates(&self) -> &[f64] {
        &self.rates
    }
}

/// Brings rows to one moment: as they are after update `now`, had they moved without a gradient at every update since their last.
///
/// What it does to a row is a function of the row, its last, `now` and the learning rates between them; how far the history reaches
/// back and what other rows do has no part. A reader may so catch up a copy and change nothing for what comes.
#[derive(Clone, Debug)]
pub struct Replay {
    simd: Simd,
    oldest: u64,
    now: u64,
    missed_updates: MissedUpdates,
}

#[derive(Clone, Debug)]
enum MissedUpdates {
    /// By last - oldest.
    Sgd(Vec<SgdGap>),
    Adamw {
        optimizer: Adamw,
        /// Missed updates whose own moves count; see [`replayed_updates`].
        replayed: u64,
        /// Of update oldest + 1 + index.
        updates: Vec<AdamwUpdate>,
        /// By last - oldest: prod(1 - lr * weight_decay) of the missed updates.
        decays: Vec<Decay>,
    },
}

/// w = keep * w + (w_w * w + w_m * m); m = m_w * w + m_m * m (with the old w).
#[derive(Clone, Copy, Debug)]
struct SgdGap {
    /// 1 or 0.
    keep: f32,
    w_w: f32,
    w_m: f32,
    m_w: f32,
    m_m: f32,
}

#[derive(Clone, Copy, Debug)]
struct AdamwUpdate {
    /// Learning rate / (1 - beta1^t).
    corrected_rate: f64,
    /// 1 / sqrt(1 - beta2^t).
    sqrt_v_scale: f64,
}

/// Missed updates of AdamW after which a row's own moves no longer count: the least k with (beta1 / sqrt(beta2))^k < 5e-8, 161 for
/// 0.9 and 0.999.
///
/// Without gradients m shrinks by beta1 and sqrt(v) by sqrt(beta2) an update, and so the move, lr * m / (sqrt(v) + epsilon), at
/// least by their ratio. What is left out is below 5e-8, a rounding in f32, of what the row moves in the gap, or, where the
/// learning rate rose meanwhile, of what an update with a gradient moves it. Where beta1 >= sqrt(beta2) the ratio does not shrink
/// (m outlives sqrt(v)); moves then end where beta1^k is no f32 any more: k with beta1^k < 1e-45.
pub(crate) fn replayed_updates(optimizer: &Adamw) -> u64 {
    let least = |ratio: f64, below: f64| {
        if ratio < 1.0 {
            // As casts do, this ends at u64::MAX; a ratio of 0 ends at 1.
            (below.ln() / ratio.ln()).floor() as u64 + 1
        } else {
            u64::MAX
        }
    };
    // beta2 = 0 makes the ratio infinite, or NaN beside beta1 = 0: neither is below 1.
    least(optimizer.beta1 / optimizer.beta2.sqrt(), 5e-8).min(least(optimizer.beta1, 1e-45))
}

impl Replay {
    /// For rows whose last is between the history's oldest and `now`. O(now - oldest) time and memory, shared by all rows.
    ///
    /// # Errors
    /// OUT_OF_MEMORY.
    ///
    /// # Panics
    /// If the history does not reach to `now`.
    pub fn new(optimizer: &Optimizer, history: &History, now: u64) -> Result<Replay> {
        let oldest = history.oldest();
        assert!((oldest..=history.updates()).contains(&now), "now is {now}; the history is {oldest} to {}", history.updates());
        let rates = &history.rates()[..(now - oldest) as usize];
        let missed_updates = match *optimizer {
            Optimizer::Sgd(sgd) => MissedUpdates::Sgd(sgd_gaps(&sgd, rates)?),
            Optimizer::Adamw(adamw) => {
                let numbered = rates.iter().zip(oldest + 1..);
                let mut updates = Vec::new();
                reserve(&mut updates, rates.len(), MISSED)?;
                updates.extend(numbered.map(|(&rate, update)| {
                    let (corrected_rate, sqrt_v_scale) = bias_corrected(&adamw, rate, update);
                    AdamwUpdate { corrected_rate, sqrt_v_scale }
                }));
                let mut decays = Vec::new();
                reserve(&mut decays, rates.len() + 1, MISSED)?;
                decays.resize(rates.len() + 1, Decay::NONE);
                for (index, rate) in rates.iter().enumerate().rev() {
                    let before = decays[index + 1];
                    decays[index] = before.changed_by(-before.whole * rate * adamw.weight_decay);
                }
                MissedUpdates::Adamw { optimizer: adamw, replayed: replayed_updates(&adamw), updates, decays }
            }
        };
        Ok(Replay { simd: Simd::best(), oldest, now, missed_updates })
    }

    /// Whether a row last touched at `last` missed nothing.
    #[inline]
    pub fn is_current(&self, last: u64) -> bool {
        last == self.now
    }

    /// Brings a row from update `last` to update `now`. `v` is empty for SGD. The same bits on every instruction set.
    ///
    /// # Panics
    /// If the lengths differ, or `last` is before the history's oldest or after now.
    pub fn catch_up(&self, last: u64, w: &mut [f32], m: &mut [f32], v: &mut [f32]) {
        assert!(
            (self.oldest..=self.now).contains(&last),
            "last is {last}; rows between {} and {} can be caught up",
            self.oldest,
            self.now
        );
        assert_eq!(m.len(), w.len(), "a row and its state have one length");
        if self.is_current(last) {
            return;
        }
        let index = (last - self.oldest) as usize;
        match &self.missed_updates {
            MissedUpdates::Sgd(gaps) => sgd_gap_on(self.simd, &gaps[index], w, m),
            MissedUpdates::Adamw { optimizer, replayed, updates, decays } => {
                assert_eq!(v.len(), w.len(), "a row and its state have one length");
                let missed = &updates[index..];
                let count = missed.len().min((*replayed).min(usize::MAX as u64) as usize);
                self.adamw_gap(optimizer, &missed[..count], &decays[index..], w, m, v);
            }
        }
    }

    /// `decays` are those of the gap's start and of each missed update's end; `moving` the missed updates whose moves count.
    fn adamw_gap(&self, optimizer: &Adamw, moving: &[AdamwUpdate], decays: &[Decay], w: &mut [f32], m: &mut [f32], v: &mut [f32]) {
        /// Moves worked out at a time, so that they fit on the stack.
        const MOVES: usize = 128;
        let gap = (decays.len() - 1) as f64;
        let sqrt_beta2 = optimizer.beta2.sqrt();
        let (mut beta1_k, mut sqrt_beta2_k) = (1.0, 1.0);
        // w_now = decays[0] * w - m * sum_k move_k / (sqrt_v_scale_k * sqrt(v) + epsilon), with m and v of the gap's start: what decays
        // after move k goes into its factor. Later pieces of the sum go straight into w, whose decay comes first.
        let mut decay = decays[0].parts();
        let mut moves = [AdamwMove { rate: 0.0, sqrt_v_scale: 0.0 }; MOVES];
        for (updates, decays) in moving.chunks(MOVES).zip(decays[1..].chunks(MOVES)) {
            for (made, (update, decay)) in moves.iter_mut().zip(updates.iter().zip(decays)) {
                beta1_k *= optimizer.beta1;
                sqrt_beta2_k *= sqrt_beta2;
                made.rate = (update.corrected_rate * beta1_k * decay.whole) as f32;
                made.sqrt_v_scale = (update.sqrt_v_scale * sqrt_beta2_k) as f32;
            }
            adamw_moves_on(self.simd, decay, &moves[..updates.len()], optimizer.epsilon as f32, w, m, v);
            decay = [1.0, 0.0];
        }
        let (shrink_m, shrink_v) = (optimizer.beta1.powf(gap) as f32, optimizer.beta2.powf(gap) as f32);
        shrink_on(self.simd, shrink_m, m);
        shrink_on(self.simd, shrink_v, v);
    }
}

/// What is left of a row after a gap, as a share of it. Near 1 the digits are in its distance from 1; far from 1, where that distance
/// no longer has them, in the share itself.
#[derive(Clone, Copy, Debug)]
struct Decay {
    whole: f64,
    /// whole - 1.
    shift: f64,
}

impl Decay {
    const NONE: Decay = Decay { whole: 1.0, shift: 0.0 };

    fn changed_by(self, change: f64) -> Decay {
        let shift = self.shift + change;
        let whole = if shift > -0.5 { 1.0 + shift } else { self.whole + change };
        Decay { whole, shift }
    }

    /// keep, 1 or 0, and part, of which whole is the sum.
    fn parts(self) -> [f32; 2] {
        if self.shift > -0.5 {
            [1.0, self.shift as f32]
        } else {
            [0.0, self.whole as f32]
        }
    }
}

/// A missed update is (w, m) -> (w - lr * m', m') with m' = momentum * m + weight_decay * w: one matrix for all elements of all
/// rows. MissedUpdates end at the same update, so that their matrices are the products of the last ones: each gap's from the next shorter
/// one's.
fn sgd_gaps(sgd: &Sgd, rates: &[f64]) -> Result<Vec<SgdGap>> {
    let (mu, wd) = (sgd.momentum, sgd.weight_decay);
    let none = SgdGap { keep: 1.0, w_w: 0.0, w_m: 0.0, m_w: 0.0, m_m: 1.0 };
    let mut gaps = Vec::new();
    reserve(&mut gaps, rates.len() + 1, MISSED)?;
    gaps.resize(rates.len() + 1, none);
    let mut a = Decay::NONE;
    let (mut b, mut c, mut d) = (0.0, 0.0, 1.0);
    for (index, lr) in rates.iter().enumerate().rev() {
        // [a, b; c, d] * [1 - lr wd, -lr mu; wd, mu]
        let first = a.whole;
        a = a.changed_by(b * wd - first * lr * wd);
        b = b * mu - first * lr * mu;
        (c, d) = (c * (1.0 - lr * wd) + d * wd, d * mu - c * lr * mu);
        let [keep, w_w] = a.parts();
        gaps[index] = SgdGap { keep, w_w, w_m: b as f32, m_w: c as f32, m_m: d as f32 };
    }
    Ok(gaps)
}

clones! {
    fn sgd_gap_on(gap: &SgdGap, w: &mut [f32], m: &mut [f32]) = sgd_gap;
}

#[inline(always)]
fn sgd_gap(gap: &SgdGap, w: &mut [f32], m: &mut [f32]) {
    let SgdGap { keep, w_w, w_m, m_w, m_m } = *gap;
    for (w, m) in w.iter_mut().zip(m) {
        let (old_w, old_m) = (*w, *m);
        *w = keep * old_w + (w_w * old_w + w_m * old_m);
        *m = m_w * old_w + m_m * old_m;
    }
}

/// w -= rate * m / (sqrt_v_scale * sqrt(v) + epsilon)
#[derive(Clone, Copy, Debug)]
struct AdamwMove {
    rate: f32,
    sqrt_v_scale: f32,
}

clones! {
    fn adamw_moves_on(decay: [f32; 2], moves: &[AdamwMove], epsilon: f32, w: &mut [f32], m: &[f32], v: &[f32]) = adamw_moves;
}

#[inline(always)]
fn adamw_moves([keep, part]: [f32; 2], moves: &[AdamwMove], epsilon: f32, w: &mut [f32], m: &[f32], v: &[f32]) {
    const LANES: usize = 64;
    // The tail goes through the same lanes, filled up with zeros.
    for start in (0..w.len()).step_by(LANES) {
        let (mut sum, mut root_v) = ([0f32; LANES], [0f32; LANES]);
        let count = LANES.min(w.len() - start);
        root_v[..count].copy_from_slice(&v[start..start + count]);
        root_v.iter_mut().for_each(|v| *v = v.sqrt());
        for made in moves {
            for lane in 0..LANES {
                sum[lane] += made.rate / (made.sqrt_v_scale * root_v[lane] + epsilon);
            }
        }
        for ((w, m), sum) in w[start..].iter_mut().zip(&m[start..]).zip(sum) {
            *w = keep * *w + (part * *w - *m * sum);
        }
    }
}

clones! {
    fn shrink_on(factor: f32, row: &mut [f32]) = shrink;
}

#[inline(always)]
fn shrink(factor: f32, row: &mut [f32]) {
    row.iter_mut().for_each(|x| *x *= factor);
}

#[cfg(test)]
mod tests {
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
}
