//! Real recognition training on the partialfc head: every Han character is an identity, every font a photograph of it.

mod augment;
mod backbone;
mod block;
mod dataset;
mod evaluate;
mod export;
mod fonts;
mod head;
mod plots;
mod product;
mod progress;
mod random;
mod render;
mod report;
mod train;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{ensure, Context, Result};
use clap::{Parser, ValueEnum};

use crate::dataset::Dataset;
use crate::plots::Curve;
use crate::report::Run;
use crate::train::{Precision, RowType, Settings};

/// Trains a network to recognize Han characters in fonts it has never seen, with partialfc as its classification head.
///
/// Installs the fonts that are missing (Debian or Ubuntu, as root or through sudo), draws about 340,000 images of 21,000 characters
/// once, trains on the CPU, and reports how well five held-out fonts are recognized against one gallery font.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Data-parallel ranks: threads with a replica of the backbone each and a shard of the head
    #[arg(long, default_value_t = 1, value_name = "N")]
    ranks: usize,
    /// Where class centers live: each on one rank, or all on every rank
    #[arg(long, value_enum, default_value_t = Placement::Sharded)]
    placement: Placement,
    /// Share of the classes in each step's sample, 0 to 1; the batch's own classes are always in it
    #[arg(long, default_value_t = 0.1, value_name = "SHARE")]
    sample_rate: f64,
    /// Consecutive classes that are drawn into a sample together: a power of two, 1 to 1024
    #[arg(long, default_value_t = 1, value_name = "CLASSES")]
    sample_block: u32,
    /// The type class centers and their optimizer state are stored in
    #[arg(long, value_enum, default_value_t = RowType::F32)]
    row_type: RowType,
    /// What the head multiplies: float32, or for its gradients bfloat16, which is faster on some processors
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    precision: Precision,
    /// Train once for each of these sample rates, from the same start, and compare them; for example 1.0,0.1,0.02
    #[arg(long, value_delimiter = ',', conflicts_with = "sample_rate", value_name = "SHARES")]
    compare: Vec<f64>,
    /// ArcFace's additive angular margin, radians
    #[arg(long, default_value_t = 0.3, value_name = "RADIANS")]
    margin: f64,
    /// What cosines are multiplied by to become logits
    #[arg(long, default_value_t = 30.0)]
    scale: f64,
    /// Steps of training
    #[arg(long, default_value_t = 1500, value_name = "N")]
    steps: usize,
    /// Images in a step, of all ranks together
    #[arg(long, default_value_t = 512, value_name = "IMAGES")]
    batch: usize,
    /// Numbers in an embedding
    #[arg(long, default_value_t = 256, value_name = "N")]
    dim: usize,
    /// Highest learning rate of backbone and head; it rises over the first steps and falls to 0 along a cosine
    #[arg(long, default_value_t = 0.1, value_name = "RATE")]
    learning_rate: f64,
    /// Weight decay of backbone and head
    #[arg(long, default_value_t = 5e-4, value_name = "DECAY")]
    weight_decay: f64,
    /// Seeds start values, the order of images, their changes and the sampling
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Keep this many classes only, spread evenly (default: all)
    #[arg(long, value_name = "N")]
    classes: Option<usize>,
    /// Threads of all ranks together (default: one for each core)
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Folder for the drawn images, 450 MB (default: partialfc-glyphs in $XDG_CACHE_HOME, or else target/glyphs)
    #[arg(long, value_name = "FOLDER")]
    cache: Option<PathBuf>,
    /// Folder for results.json and the pictures
    #[arg(long, default_value = "out/glyphs", value_name = "FOLDER")]
    out: PathBuf,
    /// Write the images for other trainers to this file, and train nothing; see examples/05_mpi
    #[arg(long, value_name = "FILE")]
    export: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Placement {
    Sharded,
    Replicated,
}

impl Options {
    fn settings(&self, sample_rate: f64) -> Settings {
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        Settings {
            ranks: self.ranks,
            replicated: self.placement == Placement::Replicated,
            sample_rate,
            sample_block: self.sample_block,
            row_type: self.row_type,
            precision: self.precision,
            margin: self.margin,
            scale: self.scale,
            steps: self.steps,
            batch: self.batch,
            dim: self.dim,
            learning_rate: self.learning_rate,
            weight_decay: self.weight_decay,
            seed: self.seed,
            threads: self.threads.unwrap_or(cores),
        }
    }

    fn rates(&self) -> Vec<f64> {
        if self.compare.is_empty() {
            vec![self.sample_rate]
        } else {
            self.compare.clone()
        }
    }

    /// What this program itself relies on; the head checks its own options.
    fn check(&self) -> Result<()> {
        ensure!(self.ranks >= 1, "--ranks is 0: at least one rank must train");
        ensure!(self.steps >= 1, "--steps is 0: there is nothing to train");
        ensure!(self.dim >= 1, "--dim is 0: an embedding needs numbers");
        ensure!(self.threads != Some(0), "--threads is 0: at least one must compute");
        let least = 2 * self.ranks;
        ensure!(
            self.batch >= least,
            "--batch is {}: batch normalization needs two images on each of {} ranks",
            self.batch,
            self.ranks
        );
        for (i, rate) in self.rates().iter().enumerate() {
            ensure!((0.0..=1.0).contains(rate), "the sample rate {rate} is not between 0 and 1");
            ensure!(!self.rates()[..i].contains(rate), "--compare has the sample rate {rate} twice");
        }
        let classes = self.classes.unwrap_or(usize::MAX);
        ensure!(classes >= 2, "--classes is {classes}: telling characters apart takes two at least");
        Ok(())
    }

    fn cache(&self) -> PathBuf {
        let shared = || Some(PathBuf::from(std::env::var_os("XDG_CACHE_HOME")?).join("partialfc-glyphs"));
        self.cache.clone().or_else(shared).unwrap_or_else(|| PathBuf::from("target/glyphs"))
    }
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    options.check()?;
    keep_memory();
    let settings = options.settings(0.0);
    // candle's element-wise operations have threads of their own: as many as a rank has, unless the user says otherwise.
    if std::env::var_os("CANDLE_NUM_THREADS").is_none() {
        std::env::set_var("CANDLE_NUM_THREADS", settings.threads_of_a_rank().to_string());
    }
    // Drawing and evaluation; ranks have pools of their own.
    rayon::ThreadPoolBuilder::new().num_threads(settings.threads).build_global()?;

    let data = load(options)?;
    if let Some(path) = &options.export {
        export::export(path, &data).with_context(|| format!("could not write {}", path.display()))?;
        println!("Wrote {}", path.display());
        return Ok(());
    }
    std::fs::create_dir_all(&options.out).with_context(|| format!("could not make the folder {}", options.out.display()))?;
    let mut runs = Vec::new();
    for rate in options.rates() {
        let settings = options.settings(rate);
        println!(
            "\nTraining: rate {rate}, ranks {}, threads of a rank {}, batch {}, steps {}",
            settings.ranks,
            settings.threads_of_a_rank(),
            settings.batch,
            settings.steps
        );
        let display = progress::Display::new(&settings);
        let trained = train::train(&data, &settings, &|progress| display.step(progress))?;
        let evaluation = evaluate::evaluate(&data, &trained.backbone)?;
        let run = Run { settings, trained, evaluation };
        report::print_run(&run);
        runs.push(run);
    }
    if runs.len() > 1 {
        report::print_comparison(&runs);
    }
    write(&options.out, &data, &runs)
}

fn load(options: &Options) -> Result<Dataset> {
    let fonts = fonts::locate_or_install()?;
    plots::load_letters(&fonts)?;
    let count = fonts.len();
    let (albums, path, cached) =
        dataset::albums(&fonts, &options.cache(), |at, font| println!("Drawing font {} of {count}: {}", at + 1, font.source.name))?;
    println!("{} {}", if cached { "Read the cached images of" } else { "Wrote the images to" }, path.display());
    let data = Dataset::new(albums, options.classes)?;
    println!("{} classes, {} training images of {} fonts", data.classes(), data.shots.len(), fonts.len());
    Ok(data)
}

/// The JSON file and the pictures.
fn write(out: &Path, data: &Dataset, runs: &[Run]) -> Result<()> {
    let mut written = vec![out.join("results.json"), out.join("loss.png"), out.join("roc.png")];
    report::write_json(&written[0], data, runs)?;
    plots::loss(&written[1], runs)?;
    let curves: Vec<Curve> = match runs {
        [run] => {
            let fonts = run.evaluation.fonts.iter().map(|font| Curve { name: font.font.clone(), points: &font.roc });
            fonts.chain([Curve { name: "all five together".into(), points: &run.evaluation.roc }]).collect()
        }
        _ => runs.iter().map(|run| Curve { name: run.title(), points: &run.evaluation.roc }).collect(),
    };
    plots::roc(&written[2], "Verification of held-out fonts against the gallery", &curves)?;
    if runs.len() > 1 {
        written.push(out.join("compare.png"));
        plots::comparison(&written[3], runs)?;
    }
    for run in runs {
        let name = if runs.len() > 1 { format!("matches-{}.png", run.settings.sample_rate) } else { "matches.png".into() };
        written.push(out.join(name));
        plots::matches(&written[written.len() - 1], data, &run.evaluation.matches)?;
    }
    println!();
    written.iter().for_each(|path| println!("Wrote {}", path.display()));
    Ok(())
}

/// Keeps freed memory instead of giving it back to the system and faulting it in again in every step, which takes as long as the
/// arithmetic. Activations are tens of megabytes, beyond the size that the C library keeps by itself.
fn keep_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: called before there are threads; these settings only choose where memory comes from.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}
