//! What a run shows while it works: a bar on a terminal, a line every few seconds elsewhere.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::train::{Progress, Settings};

/// Between lines, where there is no terminal.
const EVERY: Duration = Duration::from_secs(10);
/// Share of a new loss in the loss that is shown, which would jump about otherwise.
const FRESH: f64 = 0.05;

pub struct Display {
    steps: usize,
    batch: usize,
    bar: Option<ProgressBar>,
    shown: Mutex<Shown>,
}

#[derive(Default)]
struct Shown {
    loss: Option<f64>,
    last_line: Duration,
}

impl Display {
    pub fn new(settings: &Settings) -> Self {
        let bar = std::io::stdout().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:25} {pos}/{len}  {msg}\n{prefix}").expect("the template is valid");
            ProgressBar::with_draw_target(Some(settings.steps as u64), ProgressDrawTarget::stdout()).with_style(style)
        });
        Display { steps: settings.steps, batch: settings.batch, bar, shown: Mutex::default() }
    }

    pub fn step(&self, progress: Progress) {
        let mut shown = self.shown.lock().unwrap();
        let before = shown.loss.unwrap_or(progress.loss);
        let loss = before + FRESH * (progress.loss - before);
        shown.loss = Some(loss);
        let last = progress.step == self.steps;
        if let Some(bar) = &self.bar {
            bar.set_message(self.pace(&progress, loss));
            bar.set_prefix(phases(&progress));
            bar.set_position(progress.step as u64);
            if last {
                bar.finish();
            }
        } else if last || progress.elapsed >= shown.last_line + EVERY {
            shown.last_line = progress.elapsed;
            let (pace, phases) = (self.pace(&progress, loss), phases(&progress));
            println!("step {:5} of {}  {pace}; {phases}", progress.step, self.steps);
        }
    }

    fn pace(&self, progress: &Progress, loss: f64) -> String {
        let (steps, seconds) = (progress.step as f64, progress.elapsed.as_secs_f64());
        let left = seconds / steps * (self.steps as f64 - steps);
        format!("loss {loss:.3}, {:.0} images/s, {} left", steps * self.batch as f64 / seconds, clock(left))
    }
}

fn phases(progress: &Progress) -> String {
    format!("seconds: {}", progress.phases.named().map(|(name, total)| format!("{name} {total:.1}")).join(", "))
}

/// Minutes and seconds.
pub fn clock(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    format!("{}:{:02}", whole / 60, whole % 60)
}
