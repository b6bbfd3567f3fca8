//! Norms, rounding and random numbers for tests.

pub fn norm(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

pub fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len(), "lengths differ");
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt()
}

/// |found - truth| / |truth|; the distance itself where the truth is zero. NaN if anything is.
pub fn relative_l2(found: &[f64], truth: &[f64]) -> f64 {
    let size = norm(truth);
    distance(found, truth) / if size == 0.0 { 1.0 } else { size }
}

/// Asserts the relative L2 distance, and shows where the largest difference is.
#[track_caller]
pub fn assert_close(what: &str, found: &[f64], truth: &[f64], tolerance: f64) {
    let error = relative_l2(found, truth);
    if error <= tolerance {
        return;
    }
    // total_cmp puts NaN last: it is the worst of all.
    let off = |at: usize| (found[at] - truth[at]).abs();
    let worst = (0..found.len()).max_by(|&a, &b| off(a).total_cmp(&off(b)));
    let at = worst.unwrap_or(0);
    panic!(
        "{what}: relative L2 {error:.3e}, allowed {tolerance:.1e}; worst at element {at}: {:e}, expected {:e}",
        found[at], truth[at]
    );
}

pub fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

/// A small generator (SplitMix64), so that a test's numbers follow from its seed alone.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// 0 to below 1.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }

    /// 0 to n - 1.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// Normally distributed, standard deviation 1.
    pub fn normal(&mut self) -> f64 {
        (-2.0 * (1.0 - self.unit()).ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos()
    }

    pub fn normals(&mut self, count: usize, std: f64) -> Vec<f32> {
        (0..count).map(|_| (std * self.normal()) as f32).collect()
    }

    pub fn labels(&mut self, count: usize, classes: usize) -> Vec<i64> {
        (0..count).map(|_| self.below(classes) as i64).collect()
    }
}
