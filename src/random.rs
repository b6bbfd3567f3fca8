//! Random numbers as pure functions of what they are for: a counter-based generator, the keys that sample classes, the start values
//! of the class centers. Nothing here has a state, so that no rank count, thread count or device changes a number.

use crate::simd::{clones, Simd};

/// Streams of one seed that never meet: part of the counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Keys of classes in a step's draw.
    Sample = 0,
    /// Start values of the class centers.
    Init = 1,
    /// Rounding of class centers.
    Weight = 2,
    /// Rounding of AdamW's second moment.
    SecondMoment = 3,
}

impl Purpose {
    /// Where the purpose sits in the counter's last word: its top byte.
    const fn word(self) -> u32 {
        (self as u32) << 24
    }
}

const MULTIPLIERS: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): 128 random bits for a counter and a key.
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    philox_lanes::<1>(counter.map(|word| [u64::from(word)]), key).map(|word| word[0] as u32)
}

/// Philox of `N` counters side by side. Words travel in the low halves of u64 lanes, where the instruction that multiplies them
/// wants them; the high halves of arguments must be 0, those of results are arbitrary.
#[inline(always)]
fn philox_lanes<const N: usize>(counter: [[u64; N]; 4], key: [u32; 2]) -> [[u64; N]; 4] {
    const LOW: u64 = 0xffff_ffff;
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    for round in 0..ROUNDS as u32 {
        let k0 = u64::from(key[0].wrapping_add(round.wrapping_mul(WEYL[0])));
        let k1 = u64::from(key[1].wrapping_add(round.wrapping_mul(WEYL[1])));
        for lane in 0..N {
            let p0 = (c0[lane] & LOW) * MULTIPLIERS[0];
            let p1 = (c2[lane] & LOW) * MULTIPLIERS[1];
            c0[lane] = (p1 >> 32) ^ c1[lane] ^ k0;
            c1[lane] = p1;
            c2[lane] = (p0 >> 32) ^ c3[lane] ^ k1;
            c3[lane] = p0;
        }
    }
    [c0, c1, c2, c3]
}

fn halves(word: u64) -> [u32; 2] {
    [word as u32, (word >> 32) as u32]
}

/// The last two words of the counter that draws step `step`. Steps beyond 2^56 would reach into the purpose.
fn sample_words(step: u64) -> [u32; 2] {
    let [low, high] = halves(step);
    [low, high.wrapping_add(Purpose::Sample.word())]
}

/// The sample key of a block of classes at a step; a block of one class has the number of that class. Block b has word b mod 4 of Philox
/// with key = seed and counter = (lo, hi of b / 4, step lo, step hi + (purpose << 24)).
pub fn sample_key(seed: u64, step: u64, block: u64) -> u32 {
    let ([low, high], [step_low, step_high]) = (halves(block / 4), sample_words(step));
    philox([low, high, step_low, step_high], halves(seed))[(block % 4) as usize]
}

/// What the random bits that round a class's row at an update are made of: the first word of Philox with key = seed and counter =
/// (class lo, class hi, update lo, update hi + (purpose << 24)).
pub fn rounding_key(seed: u64, class: u64, update: u64, purpose: Purpose) -> u32 {
    let ([low, high], [update_low, update_high]) = (halves(class), halves(update));
    philox([low, high, update_low, update_high.wrapping_add(purpose.word())], halves(seed))[0]
}

/// Blocks of four words that one pass of the vectorized generators makes.
const LANES: usize = 16;

/// Keys that [`sample_keys_on`] makes at a time.
pub(crate) const KEYS: usize = 4 * LANES;

clones! {
    /// [`sample_key`] of the blocks `first .. first + keys.len()`, `first` and `keys.len()` multiples of [`KEYS`].
    pub(crate) fn sample_keys_on(seed: u64, step: u64, first: u64, keys: &mut [u32]) = sample_keys_body;
}

#[inline(always)]
fn sample_keys_body(seed: u64, step: u64, first: u64, keys: &mut [u32]) {
    debug_assert!(first.is_multiple_of(KEYS as u64) && keys.len().is_multiple_of(KEYS));
    let [step_low, step_high] = sample_words(step).map(|word| [u64::from(word); LANES]);
    for (index, keys) in keys.chunks_exact_mut(KEYS).enumerate() {
        // A multiple of 16: the lanes' low words do not carry into the high one.
        let [low, high] = halves(first / 4 + (index * LANES) as u64).map(u64::from);
        let counter = [std::array::from_fn(|lane| low + lane as u64), [high; LANES], step_low, step_high];
        let words = philox_lanes::<LANES>(counter, halves(seed));
        for lane in 0..LANES {
            for word in 0..4 {
                keys[4 * lane + word] = words[word][lane] as u32;
            }
        }
    }
}

/// Start values of one class center: normal with mean 0 and standard deviation `std`, a pure function of (seed, class, column).
///
/// Columns 4k to 4k + 3 come from Philox with key = seed and counter = (class lo, class hi, k, purpose << 24): its words, in pairs,
/// through Box and Muller. No value is beyond 6.67 standard deviations. Only additions, multiplications, square roots and integer
/// operations are used, each rounded once, so that any machine gives the same bits.
pub fn start_values(seed: u64, class: u64, std: f64, row: &mut [f32]) {
    start_values_on(Simd::best(), seed, class, std, row)
}

clones! {
    /// [`start_values`] on a given instruction set.
    pub fn start_values_on(seed: u64, class: u64, std: f64, row: &mut [f32]) = start_values_body;
}

#[inline(always)]
fn start_values_body(seed: u64, class: u64, std: f64, row: &mut [f32]) {
    let std = std as f32;
    let [low, high] = halves(class).map(|word| [u64::from(word); LANES]);
    for (index, chunk) in row.chunks_mut(4 * LANES).enumerate() {
        let first = (index * LANES) as u64;
        let counter = [low, high, std::array::from_fn(|lane| first + lane as u64), [u64::from(Purpose::Init.word()); LANES]];
        let words = philox_lanes::<LANES>(counter, halves(seed)).map(|word| word.map(|word| word as u32));
        let mut normals = [[0f32; LANES]; 4];
        for pair in [0, 2] {
            for lane in 0..LANES {
                (normals[pair][lane], normals[pair + 1][lane]) = normal_pair(words[pair][lane], words[pair + 1][lane], std);
            }
        }
        let mut values = [0f32; 4 * LANES];
        for lane in 0..LANES {
            for word in 0..4 {
                values[4 * lane + word] = normals[word][lane];
            }
        }
        chunk.copy_from_slice(&values[..chunk.len()]);
    }
}

/// Box and Muller: std * sqrt(-2 ln u) * (cos, sin)(2 pi v), u = (floor(radius / 2) + 1/2) / 2^31 rounded to f32, in (0, 1],
/// v = angle / 2^32.
#[inline(always)]
fn normal_pair(radius: u32, angle: u32, std: f32) -> (f32, f32) {
    // u = m * 2^e with m in [sqrt(1/2), sqrt(2)): ln u = ln m + e ln 2, and near u = 1 nothing cancels, as e is 0 there.
    let u = ((radius >> 1) as i32 as f32 + 0.5) * (1.0 / 2_147_483_648.0);
    let shifted = u.to_bits().wrapping_sub(0x3f35_04f3);
    let e = (shifted as i32 >> 23) as f32;
    let x = f32::from_bits((shifted & 0x007f_ffff).wrapping_add(0x3f35_04f3)) - 1.0;
    // ln(1 + x) = x - x^2/2 + x^3 P(x), P as in Cephes' logf.
    let mut p = 7.037_683_6e-2;
    p = p * x - 0.115_146_1;
    p = p * x + 0.116_769_99;
    p = p * x - 0.124_201_41;
    p = p * x + 0.142_493_23;
    p = p * x - 0.166_680_57;
    p = p * x + 0.200_007_14;
    p = p * x - 0.249_999_94;
    p = p * x + 0.333_333_3;
    let square = x * x;
    let ln = e * std::f32::consts::LN_2 + (x - square * (0.5 - x * p));
    let r = std * (-2.0 * ln).sqrt();

    // The nearest quarter turn, and what is left of the angle: within pi/4.
    let quarter = angle.wrapping_add(1 << 29) >> 30;
    let rest = angle.wrapping_sub(quarter << 30) as i32 as f32;
    let t = rest * (std::f32::consts::PI / 2_147_483_648.0);
    let square = t * t;
    // Cephes' sinf and cosf on [-pi/4, pi/4].
    let sine = t + t * square * (-1.666_665_5e-1 + square * (8.332_161e-3 - square * 1.951_529_6e-4));
    let cosine = 1.0 - square * (0.5 - square * (4.166_664_6e-2 + square * (-1.388_731_6e-3 + square * 2.443_315_7e-5)));
    // Turning by a quarter swaps the two and flips signs: (c, s), (-s, c), (-c, -s), (s, -c).
    let (a, b) = if quarter & 1 == 0 { (cosine, sine) } else { (sine, cosine) };
    let a = f32::from_bits(a.to_bits() ^ ((quarter.wrapping_add(1) & 2) << 30));
    let b = f32::from_bits(b.to_bits() ^ ((quarter & 2) << 30));
    (r * a, r * b)
}

#[cfg(test)]
mod tests;
