//! Time of a whole step by phase, its share of the machine's GEMM rate R in the same run, and peak memory: one line a shape.
//!
//! R is the rate of the crate gemm-f32: one-thread products of 1024 x 1024 x 512 side by side, one on each thread, measured before and
//! after the steps of each shape; the larger counts. A step's flop are 6BSd where the numerators P are kept, 8BSd where they are computed
//! twice. Each shape runs in a process of its own, so that its peak memory is its own. A last line times the sampler by itself: 10M rows
//! of 512 would not fit most machines, its draw does. The line before it is no measurement: how well the tasks of a large step would fill
//! more threads than this machine has. With the rows in a file, a line more has the disk's part: the time of reading and
//! writing the rows of the last sample alone. Where there is PyTorch, a line more has what a plain PartialFC head in it takes for the same
//! step, right after ours: `torch_step.py`.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Instant;

use partialfc::comm::Communicator;
use partialfc::device::{self, SampleDraw};
use partialfc::head::{Head, Labels, LossTarget, Metrics, StepInput};
use partialfc::margin::{Margin, MarginGradient};
use partialfc::matrix::{DType, Matrix};
use partialfc::optimizer::{Optimizer, Sgd, StateTensor};
use partialfc::options::{HeadOptions, Placement, Precision, Residency, RowUpdate};
use partialfc::row_terms::RowTermArrays;

const HELP: &str = "\
Time of a whole step by phase, as a share of the machine's GEMM rate, and peak memory.

    cargo bench --bench step                      the shapes of the README
    cargo bench --bench step -- --quick           two small shapes, some seconds
    cargo bench --bench step -- B C RATE D        one shape: rows, classes, sample rate, embedding_dim
      --threads N     threads of each rank        (default: cores / ranks)
      --ranks N       in-process ranks, B rows over all of them   (default: 1)
      --half          precision half; PyTorch by autocast in bfloat16
      --torch PYTHON  the interpreter that has PyTorch    (default: python3, if it has)
      --bf16          store class centers and momentum in bfloat16
      --block N       draw negatives in runs of N classes         (default: 1)
      --file DIR      keep the rows in a file; also times the disk alone
      --cache N       of a file's rows keep the first N of each rank in memory
      --recompute     compute the softmax's numerators twice instead of keeping them
      --steps N       steps timed                 (default: 7; the median is printed)
";

#[derive(Clone, Debug, PartialEq)]
struct Shape {
    batch: usize,
    classes: u64,
    rate: f64,
    dim: usize,
    threads: usize,
    ranks: usize,
    half: bool,
    bf16: bool,
    block: usize,
    file: Option<PathBuf>,
    /// Rows.
    cache: usize,
    recompute: bool,
    steps: usize,
}

impl Shape {
    fn new(batch: usize, classes: u64, rate: f64) -> Shape {
        Shape {
            batch,
            classes,
            rate,
            dim: 512,
            threads: cores(),
            ranks: 1,
            half: false,
            bf16: false,
            block: 1,
            file: None,
            cache: 0,
            recompute: false,
            steps: 7,
        }
    }

    fn arguments(&self) -> Vec<String> {
        let numbers = [self.batch.to_string(), self.classes.to_string(), self.rate.to_string(), self.dim.to_string()];
        let flags = [("--threads", self.threads), ("--ranks", self.ranks), ("--steps", self.steps), ("--block", self.block)];
        let flags = flags.into_iter().flat_map(|(name, value)| [name.to_owned(), value.to_string()]);
        let switches = [(self.half, "--half"), (self.bf16, "--bf16"), (self.recompute, "--recompute")];
        let switches = switches.into_iter().filter(|(on, _)| *on).map(|(_, name)| name.to_owned());
        let file = self.file.iter().flat_map(|folder| ["--file".to_owned(), folder.display().to_string()]);
        let cache = (self.cache > 0).then(|| ["--cache".to_owned(), self.cache.to_string()]).into_iter().flatten();
        numbers.into_iter().chain(flags).chain(switches).chain(file).chain(cache).collect()
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    if arguments.iter().any(|argument| argument == "--help" || argument == "-h") {
        print!("{HELP}");
        return ExitCode::SUCCESS;
    }
    let child = arguments.iter().position(|argument| argument == "--child").map(|at| arguments.remove(at)).is_some();
    let (shapes, torch) = match shapes(&arguments) {
        Ok(asked_for) => asked_for,
        Err(fault) => {
            eprintln!("step: {fault}; --help tells what there is");
            return ExitCode::FAILURE;
        }
    };
    if child {
        shapes.iter().for_each(run);
        return ExitCode::SUCCESS;
    }
    let torch = match with_torch(torch) {
        Ok(torch) => torch,
        Err(fault) => {
            eprintln!("step: {fault}");
            return ExitCode::FAILURE;
        }
    };
    println!(
        "{:>5} {:>9} {:>5} {:>4} {:>4} {:>4} {:>5} {:>7} {:>5} | {:>8} {:>6} {:>6} {:>6} | {:>7} {:>7} {:>8} {:>7} {:>8} {:>8} | {:>8}",
        "B",
        "C",
        "rate",
        "d",
        "W",
        "prec",
        "ranks",
        "threads",
        "P",
        "step ms",
        "GF/s",
        "R",
        "share",
        "gather",
        "sample",
        "forward",
        "reduce",
        "backward",
        "update",
        "peak MB"
    );
    for shape in &shapes {
        let threads = shape.ranks * shape.threads;
        let before = gemm_rate(threads);
        let program = std::env::current_exe().expect("this program has a path");
        let output = Command::new(program).arg("--child").args(shape.arguments()).stderr(Stdio::inherit()).output();
        let output = output.expect("this program runs again");
        if !output.status.success() {
            return ExitCode::FAILURE;
        }
        let figures = String::from_utf8_lossy(&output.stdout);
        let figures: Vec<f64> = figures.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        report(shape, &figures, before.max(gemm_rate(threads)));
        if let Some(python) = &torch {
            report_torch(shape, python, figures[0]);
        }
    }
    many_threads();
    sampler(if arguments.iter().any(|argument| argument == "--quick") { 1_000_000 } else { 10_000_000 });
    ExitCode::SUCCESS
}

/// How well a step's tasks would fill more threads than this machine has.
fn many_threads() {
    const BATCH: usize = 1024;
    const CLASSES: usize = 125_000;
    print!("a model of more threads, {BATCH} rows and {CLASSES} classes in the sample; share of their time in forward, update:");
    for threads in [8, 16, 32, 64, 96, 128, 192] {
        let [forward, update] = device::step_efficiency(BATCH, 512, CLASSES, threads);
        print!("  {threads}: {forward:.2}, {update:.2}");
    }
    println!();
}

/// The line of a shape from its process's figures: {seconds, sample, seconds of six phases, peak MB, seconds of the disk alone}.
fn report(shape: &Shape, figures: &[f64], rate: f64) {
    let [seconds, sample, gather, draw, forward, reduce, backward, update, peak, disk] = figures[..] else {
        panic!("a shape's process prints ten figures, not {figures:?}");
    };
    let products = if shape.recompute { 8.0 } else { 6.0 };
    let flops = products * shape.batch as f64 * sample * shape.dim as f64 / seconds / 1e9;
    println!(
        "{:>5} {:>9} {:>5} {:>4} {:>4} {:>4} {:>5} {:>7} {:>5} | {:>8.1} {:>6.0} {:>6.0} {:>6.2} | {:>7.2} {:>7.2} {:>8.1} {:>7.2} {:>8.2} {:>8.1} | {:>8.0}",
        shape.batch,
        shape.classes,
        shape.rate,
        shape.dim,
        if shape.bf16 { "bf16" } else { "f32" },
        if shape.half { "half" } else { "f32" },
        shape.ranks,
        shape.threads,
        if shape.recompute { "twice" } else { "kept" },
        1e3 * seconds,
        flops,
        rate,
        flops / rate,
        1e3 * gather,
        1e3 * draw,
        1e3 * forward,
        1e3 * reduce,
        1e3 * backward,
        1e3 * update,
        peak
    );
    if shape.file.is_some() {
        println!(
            "      rows in a file but for {} of a rank, drawn in runs of {}: moving them alone takes {:.1} ms, the step {:.2} times that",
            shape.cache,
            shape.block,
            1e3 * disk,
            seconds / disk
        );
    }
}

/// The interpreter that has PyTorch: the one that was asked for, or python3 if it has.
fn with_torch(asked_for: Option<String>) -> Result<Option<String>, String> {
    let python = asked_for.clone().unwrap_or("python3".to_owned());
    let import = Command::new(&python).args(["-c", "import torch"]).stderr(Stdio::null()).status();
    match import.is_ok_and(|status| status.success()) {
        true => Ok(Some(python)),
        false if asked_for.is_some() => Err(format!("{python} has no PyTorch")),
        false => Ok(None),
    }
}

/// The line of a plain head in PyTorch, where it does the same: `ours` is the seconds of our step.
fn report_torch(shape: &Shape, python: &str, ours: f64) {
    if shape.ranks > 1 || shape.block > 1 || shape.bf16 || shape.recompute || shape.file.is_some() {
        return;
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/torch_step.py");
    let flags = [("--threads", shape.threads), ("--steps", shape.steps)];
    let output = Command::new(python)
        .arg(script)
        .args([shape.batch.to_string(), shape.classes.to_string(), shape.rate.to_string(), shape.dim.to_string()])
        .args(flags.into_iter().flat_map(|(name, value)| [name.to_owned(), value.to_string()]))
        .args(shape.half.then_some("--half"))
        .stderr(Stdio::inherit())
        .output()
        .expect("the interpreter runs again");
    let text = String::from_utf8_lossy(&output.stdout);
    let figures: Vec<f64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    match figures[..] {
        [seconds, peak] => println!(
            "      PyTorch{}: {:.1} ms, {:.1} times ours; peak {peak:.0} MB",
            if shape.half { " in bfloat16" } else { "" },
            1e3 * seconds,
            seconds / ours
        ),
        _ => println!("      PyTorch: {script} has failed"),
    }
}

/// Times the draw of a tenth of the classes, beside 256 positives.
fn sampler(classes: u64) {
    let device = device::cpu(0).expect("a device");
    let positives: Vec<i64> = (0..256).map(|i| i * (classes as i64 / 256)).collect();
    let mut ids = vec![0i64; classes as usize / 10];
    let mut draws: Vec<f64> = (0..7)
        .map(|step| {
            let draw = SampleDraw {
                seed: 1,
                step,
                first: 0,
                rows: classes,
                positives: positives.as_ptr(),
                positive_count: positives.len(),
                sample_size: ids.len() as u64,
            };
            let start = Instant::now();
            device.sample_classes(&draw, ids.as_mut_ptr()).expect("a sample");
            start.elapsed().as_secs_f64()
        })
        .collect();
    draws.sort_by(f64::total_cmp);
    println!(
        "sampling {} of {classes} classes: {:.1} ms ({})",
        ids.len(),
        1e3 * draws[draws.len() / 2],
        device.info().to_string_lossy()
    );
}

/// The shapes that are asked for, and the interpreter that has PyTorch, if one is named.
fn shapes(arguments: &[String]) -> Result<(Vec<Shape>, Option<String>), String> {
    let mut shape = Shape::new(0, 0, 0.0);
    let (mut numbers, mut quick, mut threads, mut torch) = (Vec::new(), false, None, None);
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let mut count = || rest.next().and_then(|n| n.parse().ok()).filter(|&n| n > 0).ok_or(format!("{argument} takes a number"));
        match argument.as_str() {
            "--quick" => quick = true,
            "--half" => shape.half = true,
            "--bf16" => shape.bf16 = true,
            "--recompute" => shape.recompute = true,
            "--threads" => threads = Some(count()?),
            "--ranks" => shape.ranks = count()?,
            "--steps" => shape.steps = count()?,
            "--torch" => torch = Some(rest.next().ok_or("--torch takes an interpreter")?.clone()),
            "--block" => shape.block = count()?,
            "--cache" => shape.cache = count()?,
            "--file" => shape.file = Some(rest.next().ok_or("--file takes a folder")?.into()),
            number => numbers.push(number.parse::<f64>().map_err(|_| format!("{number} is no option and no number"))?),
        }
    }
    shape.threads = threads.unwrap_or((cores() / shape.ranks).max(1));
    if shape.cache > 0 && shape.file.is_none() {
        return Err("--cache is for rows in a file: give --file as well".to_owned());
    }
    let shapes = match numbers[..] {
        [_, classes, ..] if shape.cache * shape.ranks >= classes as usize => {
            Err("--cache takes fewer rows than a rank has".to_owned())
        }
        [batch, classes, rate, dim] => {
            Ok(vec![Shape { batch: batch as usize, classes: classes as u64, rate, dim: dim as usize, ..shape }])
        }
        [] if quick => {
            let small = |shape: Shape| Shape { dim: 128, steps: 3, ..shape };
            let shape = Shape::new(64, 20_000, 0.1);
            let recomputed = Shape { recompute: true, ..Shape::new(64, 5_000, 1.0) };
            Ok([shape.clone(), Shape { half: true, ..shape }, recomputed].map(small).to_vec())
        }
        [] => Ok(vec![
            Shape::new(256, 1_000_000, 0.1),
            Shape { half: true, ..Shape::new(256, 1_000_000, 0.1) },
            Shape::new(1024, 100_000, 1.0),
            Shape { half: true, ..Shape::new(1024, 100_000, 1.0) },
            Shape { recompute: true, ..Shape::new(1024, 100_000, 1.0) },
            Shape { ranks: 2, threads: 1, ..Shape::new(256, 1_000_000, 0.1) },
            Shape { ranks: 2, threads: 1, ..Shape::new(1024, 100_000, 1.0) },
        ]),
        _ => Err("a shape is four numbers: B C RATE D".to_owned()),
    };
    Ok((shapes?, torch))
}

/// GF/s of one-thread products side by side, one on each of `threads` threads.
fn gemm_rate(threads: usize) -> f64 {
    const M: usize = 1024;
    const K: usize = 512;
    let rate = || {
        let operand = |seed: u32| -> Vec<f32> { (0..M * M).map(|i| noise(i as u32 ^ seed)).collect() };
        let (left, right, mut product) = (operand(1), operand(2), operand(3));
        let mut multiply = || {
            // SAFETY: 1024 x 512, 512 x 1024 and 1024 x 1024 fit the three operands of 1024 x 1024.
            unsafe {
                gemm_f32::gemm::f32::get_gemm_fn()(
                    M,
                    M,
                    K,
                    product.as_mut_ptr(),
                    M as isize,
                    1,
                    false,
                    left.as_ptr(),
                    M as isize,
                    1,
                    right.as_ptr(),
                    K as isize,
                    1,
                    0.0f32,
                    1.0f32,
                    false,
                    false,
                    false,
                    gemm_common::Parallelism::None,
                );
            }
        };
        multiply();
        let start = Instant::now();
        let mut done = 0;
        while start.elapsed().as_secs_f64() < 0.25 {
            multiply();
            done += 1;
        }
        (done * 2 * M * M * K) as f64 / start.elapsed().as_secs_f64() / 1e9
    };
    let sides: Vec<f64> = std::thread::scope(|scope| {
        let sides: Vec<_> = (0..threads).map(|_| scope.spawn(rate)).collect();
        sides.into_iter().map(|side| side.join().expect("a product ends")).collect()
    });
    sides.iter().sum()
}

/// A value in [-1, 1) that depends on the seed alone.
fn noise(seed: u32) -> f32 {
    let mixed = seed.wrapping_mul(0x9e37_79b9).rotate_left(15).wrapping_mul(0x85eb_ca6b) ^ seed >> 7;
    (mixed.wrapping_mul(0xc2b2_ae35) >> 8) as f32 / 8_388_608.0 - 1.0
}

fn options(shape: &Shape) -> HeadOptions {
    let mut options = HeadOptions {
        num_classes: shape.classes,
        embedding_dim: shape.dim as u32,
        placement: Placement::Sharded,
        sample_rate: shape.rate,
        seed: 1,
        max_batch: shape.batch.div_ceil(shape.ranks) as u64,
        margin: Margin {
            scale: 64.0,
            m1: 1.0,
            m2: 0.5,
            m3: 0.0,
            interclass_filter: 0.0,
            gradient: MarginGradient::Exact,
            guard: false,
        },
        row_update: RowUpdate::Lazy,
        optimizer: Optimizer::Sgd(Sgd { momentum: 0.9, weight_decay: 5e-4 }),
        gradient_scale: 1.0,
        init_std: 0.01,
        ignore_label: None,
        precision: if shape.half { Precision::Half } else { Precision::F32 },
        gather_dtype: None,
        row_terms: false,
        sample_block: shape.block as u32,
        residency: shape.file.clone().map_or(Residency::Device, |directory| {
            let record = shape.dim * if shape.bf16 { 4 } else { 8 };
            Residency::File { directory, cache: (shape.cache * record) as u64 }
        }),
        weight_dtype: DType::F32,
        state_dtype: DType::F32,
        workspace_limit: 0,
    };
    if shape.bf16 {
        (options.weight_dtype, options.state_dtype) = (DType::Bf16, DType::Bf16);
    }
    if shape.recompute {
        // Enough for everything but the numerators.
        let plan = partialfc::plan::plan(&options, shape.ranks as u32, options.max_batch).expect("a plan");
        options.workspace_limit = plan.memory.activation;
    }
    options
}

/// A shape's process: prints its figures for `report`.
fn run(shape: &Shape) {
    let comms = Communicator::threads(shape.ranks as u32).expect("ranks");
    let mut ranks: Vec<(Vec<(f64, Metrics)>, f64)> = std::thread::scope(|scope| {
        let ranks: Vec<_> = comms.into_iter().map(|comm| scope.spawn(|| steps(shape, comm))).collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank ends")).collect()
    });
    let (mut timed, disk) = ranks.swap_remove(0);
    timed.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (seconds, median) = &timed[timed.len() / 2];
    let sample = median.sample_size as usize * shape.ranks;
    let phase = &median.seconds;
    println!(
        "{seconds} {sample} {} {} {} {} {} {} {} {disk}",
        phase.gather,
        phase.sample,
        phase.forward,
        phase.reduce,
        phase.backward,
        phase.update,
        peak_megabytes()
    );
}

/// One rank's steps, each with its seconds, and those of the disk alone: 0 where the rows are in memory.
fn steps(shape: &Shape, comm: Arc<Communicator>) -> (Vec<(f64, Metrics)>, f64) {
    let rank = comm.rank() as usize;
    let device = device::cpu(shape.threads as u32).expect("a device");
    let mut head = Head::create(comm.clone(), Ok((device, options(shape)))).expect("a head");
    let rows = (rank + 1) * shape.batch / shape.ranks - rank * shape.batch / shape.ranks;
    let mut timed = Vec::new();
    if shape.file.is_some() {
        write_all(&mut head, shape.dim);
    }
    for step in 0..shape.steps + 1 {
        let seed = (step * shape.ranks + rank) as u32;
        let mut embeddings: Vec<f32> = (0..rows * shape.dim).map(|i| noise(i as u32 ^ seed << 20)).collect();
        let labels: Vec<i64> =
            (0..rows).map(|row| (noise(row as u32 ^ seed << 12 ^ 77).to_bits() as u64 % shape.classes) as i64).collect();
        let mut gradient = vec![0.0; rows * shape.dim];
        let input = StepInput {
            embeddings: Matrix::of_f32(&mut embeddings, rows, shape.dim),
            labels: Some(Labels { data: labels.as_ptr(), count: rows }),
            terms: RowTermArrays::NONE,
        };
        comm.barrier().expect("all ranks begin");
        let start = Instant::now();
        head.step(Ok((input, Matrix::of_f32(&mut gradient, rows, shape.dim))), 0.1, LossTarget::Host).expect("a step");
        let seconds = start.elapsed().as_secs_f64();
        // The first step touches every page for the first time.
        if step > 0 {
            timed.push((seconds, head.metrics().expect("metrics")));
        }
    }
    let disk = shape.file.as_ref().map_or(0.0, |folder| {
        let (first, cached) = (head.shard().first + shape.cache as u64, shape.cache as u64);
        let ids: Vec<i64> = head.sample_ids().expect("the last sample").into_iter().filter(|&id| id as u64 >= first).collect();
        let path = folder.join(format!("rows-{rank}-of-{}.partialfc", shape.ranks));
        // The system may have been slow in any one try.
        (0..3).map(|_| disk_alone(&path, head.shard().rows - cached, first, &ids)).fold(f64::INFINITY, f64::min)
    });
    (timed, disk)
}

/// Writes every row as it is: a row's first write takes longer than those after it, and a row that has none is not read.
fn write_all(head: &mut Head, dim: usize) {
    let shard = head.shard();
    let mut rows = vec![0.0; dim << 12];
    for first in (shard.first..shard.end()).step_by(1 << 12) {
        let count = (shard.end() - first).min(1 << 12) as usize;
        let some = Matrix::of_f32(&mut rows[..count * dim], count, dim);
        head.read_rows(StateTensor::Centers, first, &some).expect("rows");
        head.write_rows(StateTensor::Centers, first, &some).expect("rows");
    }
}

/// Seconds of reading the records of these rows and writing them back, as they are, from 16 threads past the page cache: each run of
/// consecutive rows in one transfer, of 256 KiB at most.
fn disk_alone(path: &Path, rows: u64, first: u64, ids: &[i64]) -> f64 {
    const LONGEST: usize = 256 << 10;
    const SECTOR: u64 = 4096;
    let open = |flags: i32| File::options().read(true).write(true).custom_flags(flags).open(path);
    let file = open(libc::O_DIRECT).or_else(|_| open(0)).expect("the head's file");
    let stride = (file.metadata().expect("the file").len() / rows) as usize;
    let mut runs: Vec<(u64, usize)> = Vec::new();
    for &id in ids {
        let at = (id as u64 - first) * stride as u64;
        let (at, end) = (at / SECTOR * SECTOR, (at + stride as u64).next_multiple_of(SECTOR));
        match runs.last_mut() {
            Some((begin, length)) if at <= *begin + *length as u64 && (end - *begin) as usize <= LONGEST => {
                *length = (end - *begin) as usize;
            }
            _ => runs.push((at, (end - at) as usize)),
        }
    }
    let next = AtomicUsize::new(0);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                let memory = vec![0u8; LONGEST + 4096];
                let (offset, mut memory) = (memory.as_ptr().align_offset(4096), memory);
                while let Some(&(at, length)) = runs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let piece = &mut memory[offset..offset + length];
                    file.read_exact_at(piece, at).expect("rows");
                    file.write_all_at(piece, at).expect("rows");
                }
            });
        }
    });
    start.elapsed().as_secs_f64()
}

/// The largest resident size of this process so far; NaN where the system does not tell.
fn peak_megabytes() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kibibytes = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<f64>().ok());
    kibibytes.map_or(f64::NAN, |kibibytes| kibibytes * 1.024e-3)
}
