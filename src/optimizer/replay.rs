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
mod tests;
