//! What a run leaves: tables on the terminal and a JSON file with every number.

use std::ffi::CStr;
use std::path::Path;

use anyhow::{Context, Result};
use partialfc::capi::status::pfc_build_info;
use serde::Serialize;

use crate::dataset::Dataset;
use crate::evaluate::{Evaluation, FAR};
use crate::fonts::Role;
use crate::progress::clock;
use crate::train::{Phases, Settings, Trained};

/// A finished run.
pub struct Run {
    pub settings: Settings,
    pub trained: Trained,
    pub evaluation: Evaluation,
}

impl Run {
    pub fn title(&self) -> String {
        format!("rate {}", self.settings.sample_rate)
    }

    pub fn images_per_second(&self) -> f64 {
        (self.settings.steps * self.settings.batch) as f64 / self.trained.seconds
    }

    fn milliseconds(&self, seconds: f64) -> f64 {
        seconds / self.settings.steps as f64 * 1e3
    }

    /// The mean loss of the last twentieth of the steps.
    fn final_loss(&self) -> f64 {
        let losses = &self.trained.losses;
        let last = &losses[losses.len() - (losses.len() / 20).max(1)..];
        last.iter().sum::<f64>() / last.len() as f64
    }
}

#[derive(Serialize)]
struct Results<'a> {
    library: String,
    classes: usize,
    training_images: usize,
    gallery_images: usize,
    gallery_font: Vec<&'a str>,
    training_fonts: Vec<&'a str>,
    far: f64,
    runs: Vec<RunResults<'a>>,
}

#[derive(Serialize)]
struct RunResults<'a> {
    settings: &'a Settings,
    training_seconds: f64,
    images_per_second: f64,
    /// Totals of rank 0.
    seconds_by_phase: &'a Phases,
    backbone_parameters: usize,
    sample_size: usize,
    collective_bytes_per_step: f64,
    final_loss: f64,
    final_top1_of_sample: f64,
    evaluation_seconds: f64,
    mean_rank1: f64,
    tar_at_far: f64,
    threshold_at_far: f64,
    fonts: &'a [crate::evaluate::FontScore],
    losses: &'a [f64],
}

pub fn write_json(path: &Path, data: &Dataset, runs: &[Run]) -> Result<()> {
    let names = |gallery: bool| {
        let albums = data.albums.iter().filter(|album| album.role != Role::HeldOut && (!gallery || album.role == Role::Gallery));
        albums.map(|album| album.name.as_str()).collect()
    };
    // SAFETY: the text ends with a zero and lives for ever.
    let library = unsafe { CStr::from_ptr(pfc_build_info()) }.to_string_lossy().into_owned();
    let results = Results {
        library,
        classes: data.classes(),
        training_images: data.shots.len(),
        gallery_images: runs.first().map_or(0, |run| run.evaluation.gallery),
        gallery_font: names(true),
        training_fonts: names(false),
        far: FAR,
        runs: runs
            .iter()
            .map(|run| RunResults {
                settings: &run.settings,
                training_seconds: run.trained.seconds,
                images_per_second: run.images_per_second(),
                seconds_by_phase: &run.trained.phases,
                backbone_parameters: run.trained.backbone.parameters(),
                sample_size: run.trained.sample,
                collective_bytes_per_step: run.trained.traffic,
                final_loss: run.final_loss(),
                final_top1_of_sample: run.trained.top1,
                evaluation_seconds: run.evaluation.seconds,
                mean_rank1: run.evaluation.mean_rank1,
                tar_at_far: run.evaluation.tar,
                threshold_at_far: run.evaluation.threshold,
                fonts: &run.evaluation.fonts,
                losses: &run.trained.losses,
            })
            .collect(),
    };
    let text = serde_json::to_string_pretty(&results)?;
    std::fs::write(path, text).with_context(|| format!("could not write {}", path.display()))
}

/// One run: each held-out font, and where the time went.
pub fn print_run(run: &Run) {
    let evaluation = &run.evaluation;
    let phases = run.trained.phases.named().map(|(name, seconds)| format!("{name} {:.1}", run.milliseconds(seconds))).join(", ");
    println!(
        "\nTrained {} steps in {} ({:.0} images/s) at rate {}; milliseconds a step: {phases}",
        run.settings.steps,
        clock(run.trained.seconds),
        run.images_per_second(),
        run.settings.sample_rate,
    );
    if run.settings.ranks > 1 {
        println!("The {} replicas of the backbone are bitwise equal.", run.settings.ranks);
    }
    println!("\n{:<24} {:>9} {:>9} {:>16}", "held-out font", "images", "rank-1", "TAR at FAR 1e-4");
    for font in &evaluation.fonts {
        println!("{:<24} {:>9} {:>8.2}% {:>15.2}%", font.font, font.queries, font.rank1 * 100.0, font.tar * 100.0);
    }
    println!(
        "{:<24} {:>9} {:>8.2}% {:>15.2}%   (TAR over all pairs; cosine {:.3})",
        "mean",
        evaluation.matches.len(),
        evaluation.mean_rank1 * 100.0,
        evaluation.tar * 100.0,
        evaluation.threshold
    );
}

/// Several rates side by side.
pub fn print_comparison(runs: &[Run]) {
    println!(
        "\n{:>7} {:>9} {:>14} {:>14} {:>11} {:>10} {:>16}",
        "rate", "sample", "head, ms/step", "step, ms", "training", "rank-1", "TAR at FAR 1e-4"
    );
    for run in runs {
        println!(
            "{:>7} {:>9} {:>14.1} {:>14.1} {:>11} {:>9.2}% {:>15.2}%",
            run.settings.sample_rate,
            run.trained.sample,
            run.milliseconds(run.trained.phases.head),
            run.milliseconds(run.trained.seconds),
            clock(run.trained.seconds),
            run.evaluation.mean_rank1 * 100.0,
            run.evaluation.tar * 100.0
        );
    }
}
