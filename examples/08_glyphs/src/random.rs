//! Seeded random numbers: a stream for every (seed, purpose, step, row), so that a run's images do not depend on the number of
//! ranks or on who draws first.

/// SplitMix64.
#[derive(Clone, Debug)]
pub struct Random(u64);

/// What a stream is for.
#[derive(Clone, Copy, Debug)]
pub enum Purpose {
    Order = 1,
    Augment = 2,
    Weights = 3,
}

impl Random {
    pub fn new(seed: u64, purpose: Purpose, a: u64, b: u64) -> Self {
        let mut random = Random(seed);
        for word in [purpose as u64, a, b] {
            random.0 = random.next_u64() ^ word;
        }
        random
    }

    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// 0 to below 1.
    pub fn unit(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// -reach to reach.
    pub fn around(&mut self, reach: f32) -> f32 {
        (self.unit() * 2.0 - 1.0) * reach
    }

    /// 0 to below n.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(n)) >> 64) as u64
    }

    /// Standard normal.
    pub fn normal(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f32::consts::TAU * self.unit()).cos()
    }
}

/// The order images are seen in: every epoch all of them once, shuffled.
pub struct Order {
    seed: u64,
    epoch: u64,
    order: Vec<u32>,
}

impl Order {
    pub fn new(seed: u64, images: usize) -> Self {
        let mut order = Order { seed, epoch: u64::MAX, order: (0..images as u32).collect() };
        order.shuffle(0);
        order
    }

    fn shuffle(&mut self, epoch: u64) {
        if self.epoch != epoch {
            self.epoch = epoch;
            let mut random = Random::new(self.seed, Purpose::Order, epoch, 0);
            // From the identity each time: an epoch's order does not depend on the epochs before.
            (0..).zip(&mut self.order).for_each(|(at, image)| *image = at);
            for at in (1..self.order.len()).rev() {
                self.order.swap(at, random.below(at as u64 + 1) as usize);
            }
        }
    }

    /// The image at a position of the endless sequence. Positions go forward, else each change of epoch shuffles anew.
    pub fn at(&mut self, position: u64) -> u32 {
        let images = self.order.len() as u64;
        self.shuffle(position / images);
        self.order[(position % images) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_has_every_image_once_and_the_next_another_order() {
        let mut order = Order::new(3, 100);
        let first: Vec<u32> = (0..100).map(|at| order.at(at)).collect();
        let second: Vec<u32> = (100..200).map(|at| order.at(at)).collect();
        let mut sorted = first.clone();
        sorted.sort();
        assert_eq!(sorted, (0..100).collect::<Vec<_>>());
        assert_ne!(first, second);
        let mut again = Order::new(3, 100);
        assert_eq!(second, (100..200).map(|at| again.at(at)).collect::<Vec<_>>());
    }

    #[test]
    fn streams_differ_and_numbers_keep_their_bounds() {
        let mut a = Random::new(1, Purpose::Augment, 5, 6);
        assert_ne!(a.next_u64(), Random::new(1, Purpose::Augment, 6, 5).next_u64());
        assert_ne!(a.next_u64(), Random::new(2, Purpose::Augment, 5, 6).next_u64());
        let mut sum = 0.0;
        for _ in 0..10_000 {
            assert!((0.0..1.0).contains(&a.unit()) && a.around(2.0).abs() <= 2.0 && a.below(7) < 7);
            sum += a.normal();
        }
        assert!(sum.abs() < 400.0);
    }
}
