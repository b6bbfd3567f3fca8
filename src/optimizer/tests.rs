use super::*;

pub const COLUMNS: usize = 133;

/// A row with its state, as the library keeps it and as a dense f64 optimizer would.
#[derive(Clone)]
pub struct Row {
    pub w: Vec<f32>,
    pub m: Vec<f32>,
    pub v: Vec<f32>,
    pub truth: Vec<[f64; 3]>,
}

pub fn values(seed: u32, scale: f32) -> Vec<f32> {
    (0..COLUMNS as u32).map(|i| (((i + 31 * seed) * 7919 % 1009) as f32 / 504.0 - 1.0) * scale).collect()
}

impl Row {
    pub fn new(optimizer: &Optimizer) -> Row {
        let (w, m) = (values(1, 0.05), vec![0.0; COLUMNS]);
        let v = vec![0.0; if optimizer.state_tensors() == 2 { COLUMNS } else { 0 }];
        let truth = w.iter().map(|&w| [f64::from(w), 0.0, 0.0]).collect();
        Row { w, m, v, truth }
    }

    /// From here on the truth is what the row holds.
    pub fn trust(&mut self) {
        for (column, truth) in self.truth.iter_mut().enumerate() {
            *truth = [self.w[column], self.m[column], self.v.get(column).copied().unwrap_or(0.0)].map(f64::from);
        }
    }

    pub fn bits(&self) -> [Vec<u32>; 3] {
        [&self.w, &self.m, &self.v].map(|tensor| tensor.iter().map(|x| x.to_bits()).collect())
    }

    pub fn step_truth(&mut self, optimizer: &Optimizer, lr: f64, update: u64, g: &[f32]) {
        for ([w, m, v], &g) in self.truth.iter_mut().zip(g) {
            let (g, t) = (f64::from(g), update as f64);
            match *optimizer {
                Optimizer::Sgd(sgd) => {
                    *m = sgd.momentum * *m + (g + sgd.weight_decay * *w);
                    *w -= lr * *m;
                }
                Optimizer::Adamw(adamw) => {
                    *w *= 1.0 - lr * adamw.weight_decay;
                    *m = adamw.beta1 * *m + (1.0 - adamw.beta1) * g;
                    *v = adamw.beta2 * *v + (1.0 - adamw.beta2) * g * g;
                    let (m_hat, v_hat) = (*m / (1.0 - adamw.beta1.powf(t)), *v / (1.0 - adamw.beta2.powf(t)));
                    *w -= lr * m_hat / (v_hat.sqrt() + adamw.epsilon);
                }
            }
        }
    }

    /// Largest error of w, relative to how far it moved from `before` plus its own rounding; and of m, v relative to their
    /// largest.
    pub fn check(&self, before: &[f32], what: &str) {
        let moved = self.truth.iter().zip(before).map(|(t, &b)| (t[0] - f64::from(b)).abs()).fold(0.0, f64::max);
        let largest = self.truth.iter().map(|t| t[1].abs()).fold(1e-30, f64::max);
        for (column, [w, m, v]) in self.truth.iter().enumerate() {
            let error = (f64::from(self.w[column]) - w).abs();
            assert!(
                error <= 3e-6 * moved + 2.5e-7 * w.abs().max(1e-3),
                "{what}: w[{column}] is {} for {w}, moved {moved}",
                self.w[column]
            );
            let error = (f64::from(self.m[column]) - m).abs();
            assert!(error <= 2e-6 * m.abs() + 1e-7 * largest, "{what}: m[{column}] is {} for {m}", self.m[column]);
            if !self.v.is_empty() {
                assert!(
                    (f64::from(self.v[column]) - v).abs() <= 2e-6 * v.abs() + 1e-30,
                    "{what}: v[{column}] is {} for {v}",
                    self.v[column]
                );
            }
        }
    }
}

pub fn optimizers() -> Vec<Optimizer> {
    let mut all = Vec::new();
    for weight_decay in [0.0, 5e-2] {
        for momentum in [0.0, 0.9] {
            all.push(Optimizer::Sgd(Sgd { momentum, weight_decay }));
        }
        for (beta1, beta2) in [(0.9, 0.999), (0.5, 0.9), (0.99, 0.9), (0.0, 0.99), (0.9, 0.0), (0.0, 0.0)] {
            all.push(Optimizer::Adamw(Adamw { beta1, beta2, epsilon: 1e-8, weight_decay }));
        }
    }
    all
}

/// A warm-up, then stairs: the rate changes inside every long gap.
pub fn rate(update: u64) -> f64 {
    (0.02 * update as f64).min(0.1) * 0.5f64.powi((update / 300) as i32)
}

#[test]
fn steps_are_those_of_f64() {
    for optimizer in optimizers() {
        let mut row = Row::new(&optimizer);
        for update in 1..=20 {
            let (g, before) = (values(update as u32 * 7, 0.3), row.w.clone());
            let rule = UpdateRule::new(&optimizer, rate(update), update);
            rule.apply(&mut row.w, &mut row.m, &mut row.v, &g);
            row.step_truth(&optimizer, rate(update), update, &g);
            row.check(&before, &format!("{optimizer:?} update {update}"));
            // Errors of one step at a time.
            row.trust();
        }
    }
}

#[test]
fn every_copy_has_the_same_bits() {
    for optimizer in optimizers() {
        let results = Simd::available().into_iter().map(|simd| {
            let mut row = Row::new(&optimizer);
            let rule = UpdateRule { simd, ..UpdateRule::new(&optimizer, 0.1, 3) };
            rule.apply(&mut row.w, &mut row.m, &mut row.v, &values(3, 0.3));
            row.bits()
        });
        let results: Vec<_> = results.collect();
        assert!(results.iter().all(|result| *result == results[0]), "{optimizer:?}");
    }
}

#[test]
fn ranges_are_checked_at_both_ends() {
    let (sgd, adamw) =
        (Sgd { momentum: 0.9, weight_decay: 5e-4 }, Adamw { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 5e-4 });
    type Make = Box<dyn Fn(f64) -> Optimizer>;
    type Ends = (Vec<f64>, Vec<f64>);
    let below_one = (vec![0.0, 0.5, 0.999_999], vec![-0.1, 1.0, f64::NAN, f64::INFINITY]);
    let decays = (vec![0.0, 5e-4, 10.0], vec![-1e-9, f64::NAN, f64::INFINITY]);
    let epsilons = (vec![1e-30, 1e-8, 1.0], vec![0.0, -1.0, 1e-31, f64::NAN, f64::INFINITY]);
    let cases: [(&str, Make, &Ends); 6] = [
        ("momentum", Box::new(move |momentum| Optimizer::Sgd(Sgd { momentum, ..sgd })), &below_one),
        ("weight_decay", Box::new(move |weight_decay| Optimizer::Sgd(Sgd { weight_decay, ..sgd })), &decays),
        ("beta1", Box::new(move |beta1| Optimizer::Adamw(Adamw { beta1, ..adamw })), &below_one),
        ("beta2", Box::new(move |beta2| Optimizer::Adamw(Adamw { beta2, ..adamw })), &below_one),
        ("epsilon", Box::new(move |epsilon| Optimizer::Adamw(Adamw { epsilon, ..adamw })), &epsilons),
        ("weight_decay", Box::new(move |weight_decay| Optimizer::Adamw(Adamw { weight_decay, ..adamw })), &decays),
    ];
    for (name, make, (good, bad)) in cases {
        for &value in good {
            assert_eq!(make(value).check(), Ok(()), "{name} = {value}");
        }
        for &value in bad {
            let refused = make(value).check().unwrap_err();
            assert_eq!(refused.status, crate::Status::InvalidArgument);
            assert!(
                refused.message.starts_with(&format!("{name} must be ")) && refused.message.ends_with(&format!(", got {value:?}")),
                "{}",
                refused.message
            );
        }
    }
}
