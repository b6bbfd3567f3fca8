//! Time of a head's step on a GPU, whole and by kernel, against what the GPU itself can do in the same run: one line a figure.
//!
//! - Times are medians of CUDA events, microseconds. Kernels are timed by `partialfc::trace`, each launch between two events, in steps
//!   of their own that wait for each other; all launches of a kernel in one step count together. Collectives of a head that is alone
//!   are copies.
//! - TFLOP/s and GB/s are the operations and bytes of `gpu/floor.rs` over the time. `share` is the floor's time at the rates that were
//!   measured in this run, over the time: the copy rate by copies here, the products' rate by PyTorch's large products, read from
//!   the file that `gpu/torch_step.py` wrote. Without it, whatever has operations has no share.
//! - `PyTorch` is a plain PyTorch step, or one product of the same shape by cuBLAS, from the same file.
//! - Embeddings, labels, gradients and losses are in the GPU's memory, as a trainer has them: nothing waits inside a step. Embeddings
//!   and labels are random, of four sets in turn. The caches need no rotation beyond that: a step of the smallest shape touches 140 MB
//!   of rows, operands and P, and each kernel finds in them what the step before it left.
//! - `step, prepared` is forward to the end of the update, with the draw and the gathering of the rows done before; `step` has them in
//!   it; `step in a row` is one of many steps, each prepared beside the one before.
//! - Memory is what the GPU has less of, beyond W and its momentum; the driver counts in units of 2 MiB.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use partialfc::comm::Communicator;
use partialfc::device::{self, Device, Labels};
use partialfc::head::{Head, LossTarget, StepInput};
use partialfc::margin::{Margin, MarginGradient};
use partialfc::matrix::{DType, Matrix};
use partialfc::optimizer::{Optimizer, Sgd, StateTensor};
use partialfc::options::{HeadOptions, Placement, Precision, Residency, RowUpdate};
use partialfc::row_terms::RowTermArrays;
use partialfc::trace;

#[path = "gpu/driver.rs"]
mod driver;
#[path = "gpu/floor.rs"]
mod floor;
#[path = "gpu/variants.rs"]
mod variants;
use partialfc_testing::emulator;

use driver::{Memory, Stream};
use floor::{Floor, Rates, Shape};

const HELP: &str = "\
Time of a head's step on GPU 0, whole and by kernel, as a share of what the GPU itself reaches in the same run.

    cargo bench --bench gpu                       the shapes of gpu.md
    cargo bench --bench gpu -- B S D              one shape: rows, classes of the sample, embedding_dim
      --tiny          one tiny shape, two steps: for the emulator (PFC_TEST_DRIVER=simt)
      --rate R        sample rate; there are S / R classes        (default: 0.1)
      --steps N       steps timed                                 (default: 20; medians are printed)
      --variants A,B  the products alone, by the images of folder B, and of more, side by side with those of A
      --torch FILE    the figures of gpu/torch_step.py, to compare with
      --copies        the copy rate alone
      --floors T G    no GPU: the floors' times at T TFLOP/s and G GB/s
      --build-info    no GPU: what this was built from
";

/// Sets of inputs, in turn.
const SETS: usize = 4;
/// Steps before any is timed.
const WARM: usize = 3;
/// Classes of a chunk where P is not kept, and rows and columns of a tile: as src/device/cuda/sizes.rs has them.
const CHUNK: usize = 8448;
const TILE: usize = 128;

struct Run {
    shapes: Vec<Shape>,
    rate: f64,
    steps: usize,
    /// Bytes of a copy that is timed.
    copied: usize,
    torch: Option<serde_json::Value>,
    only_copies: bool,
    /// Folders of images.
    variants: Vec<PathBuf>,
    floors: Option<Rates>,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    if arguments.iter().any(|argument| argument == "--help" || argument == "-h") {
        print!("{HELP}");
        return ExitCode::SUCCESS;
    }
    // SAFETY: the text lives for ever.
    let build = unsafe { CStr::from_ptr(partialfc::capi::status::pfc_build_info()) }.to_string_lossy();
    println!("{build}");
    if arguments.iter().any(|argument| argument == "--build-info") {
        return ExitCode::SUCCESS;
    }
    let outcome = parse(&arguments).map_err(|fault| format!("{fault}; --help tells what there is")).and_then(|run| {
        match run.floors {
            Some(rates) => print_floors(&run.shapes, rates),
            None => on_gpu(&run)?,
        }
        Ok(())
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            eprintln!("gpu: {fault}");
            ExitCode::FAILURE
        }
    }
}

fn parse(arguments: &[String]) -> Result<Run, String> {
    let shape = |[batch, sample, dim]: [usize; 3]| Shape { batch, sample, dim };
    let main_shapes = [[1024, 125_000, 512], [4096, 125_000, 512], [4096, 125_000, 256], [512, 20_000, 512]];
    let mut run = Run {
        shapes: main_shapes.map(shape).to_vec(),
        rate: 0.1,
        steps: 20,
        copied: 1 << 30,
        torch: None,
        only_copies: false,
        variants: Vec::new(),
        floors: None,
    };
    let (mut numbers, mut steps) = (Vec::new(), None);
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let mut number = || {
            let number = rest.next().and_then(|text| text.parse::<f64>().ok()).filter(|&number| number > 0.0);
            number.ok_or(format!("{argument} takes a number above 0"))
        };
        match argument.as_str() {
            "--tiny" => (run.shapes, run.steps, run.copied) = (vec![shape([64, 256, 64])], 2, 1 << 20),
            "--rate" => run.rate = number()?,
            "--steps" => steps = Some(number()?.ceil() as usize),
            "--copies" => run.only_copies = true,
            "--variants" => {
                let folders = rest.next().ok_or("--variants takes folders, with commas between")?;
                run.variants = folders.split(',').map(PathBuf::from).collect();
            }
            "--floors" => run.floors = Some(Rates { flops: 1e12 * number()?, bytes: 1e9 * number()? }),
            "--torch" => {
                let path = rest.next().ok_or("--torch takes a file")?;
                let text = std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
                run.torch = Some(serde_json::from_str(&text).map_err(|error| format!("{path}: {error}"))?);
            }
            text => numbers.push(text.parse().map_err(|_| format!("{text} is no option and no number"))?),
        }
    }
    run.steps = steps.unwrap_or(run.steps);
    if !run.variants.is_empty() && run.shapes.len() > 1 {
        run.shapes.retain(|shape| (shape.sample, shape.dim) == (125_000, 512));
    }
    match numbers[..] {
        [] => Ok(run),
        [batch, sample, dim] if batch * sample * dim > 0 => Ok(Run { shapes: vec![shape([batch, sample, dim])], ..run }),
        _ => Err("a shape is three numbers above 0: B S D".to_owned()),
    }
}

fn print_floors(shapes: &[Shape], rates: Rates) {
    for &shape in shapes {
        for keeps in [true, false] {
            println!("\n{}", title(shape, keeps));
            let line = |what: &str, floor: Floor| {
                println!("{what:<28} {:>10.1} us {:>8.1} GFLOP {:>8.1} MB", floor.time(rates), floor.flops / 1e9, floor.bytes / 1e6)
            };
            line("step", floor::of_step(shape, keeps));
            for kernel in floor::KERNELS {
                line(kernel, floor::of_kernel(kernel, shape, keeps).expect("a kernel with a floor"));
            }
        }
    }
}

fn title(Shape { batch, sample, dim }: Shape, keeps: bool) -> String {
    format!("B {batch}  S {sample}  d {dim}  P {}", if keeps { "kept" } else { "computed twice" })
}

fn on_gpu(run: &Run) -> Result<(), String> {
    if std::env::var_os("PFC_TEST_DRIVER").is_some() {
        emulator::ready();
    }
    driver::enter()?;
    let stream = Stream::new();
    // SAFETY: a live stream, which outlives the device.
    let device = unsafe { device::cuda(0, stream.raw()) }.map_err(|error| error.to_string())?;
    println!("{}", device.info().to_string_lossy());
    if device.info().to_string_lossy().contains("emulator") {
        println!("an emulator: its times tell nothing");
    }
    if !run.variants.is_empty() {
        return variants::compare(run, &stream, &run.variants);
    }
    let copies = copy_rate(&stream, run);
    println!("copies of {} MiB: {:.1} GB/s, read and written", run.copied >> 20, copies / 1e9);
    if run.only_copies {
        return Ok(());
    }
    let products = run.torch.as_ref().and_then(|torch| torch["gemm_tflops"].as_f64());
    match products {
        Some(rate) => println!("large products by PyTorch: {rate:.0} TFLOP/s"),
        None => println!("large products: rate unknown, for want of a file of gpu/torch_step.py"),
    }
    let bench =
        Bench { run, stream: &stream, device, rates: Rates { flops: 1e12 * products.unwrap_or(f64::INFINITY), bytes: copies } };
    let mut measured = Vec::new();
    for &shape in &run.shapes {
        let kept = bench.steps(shape, 0);
        let (columns, memory) = (shape.sample.next_multiple_of(TILE), kept.memory);
        measured.push(kept);
        if columns > TILE {
            // Less than keeping P takes, and enough for whole chunks.
            let chunk = CHUNK.min(columns - TILE);
            let a_column = 2 * shape.batch.next_multiple_of(TILE) + 4 * shape.dim.next_multiple_of(64);
            measured.push(bench.steps(shape, memory - (columns - chunk) * a_column));
        }
    }
    // From here on every head's kernels stand between events, which whole steps are not to pay for.
    trace::start();
    for steps in &measured {
        bench.report(steps, &bench.kernels(steps));
    }
    Ok(())
}

/// Bytes a second, read and written, of large copies within the GPU's memory.
fn copy_rate(stream: &Stream, run: &Run) -> f64 {
    let values = noise(run.copied / 4, 1);
    let (from, to) = (Memory::of(&values), Memory::of(&values));
    let copy = || stream.time(|| to.copy(&from, stream));
    copy();
    2e6 * run.copied as f64 / median((0..run.steps).map(|_| copy()).collect())
}

/// Uniform in [-1, 1).
fn noise(count: usize, seed: u32) -> Vec<f32> {
    let value = |i: usize| {
        let i = i as u32 ^ seed << 24;
        let mixed = i.wrapping_mul(0x9e37_79b9).rotate_left(15).wrapping_mul(0x85eb_ca6b) ^ i >> 7;
        (mixed.wrapping_mul(0xc2b2_ae35) >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..count).map(value).collect()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A batch in the GPU's memory, and where its step leaves what it gives.
struct Batch {
    shape: Shape,
    embeddings: Memory,
    labels: Memory,
    gradient: Memory,
    loss: Memory,
    /// For one class center.
    row: Memory,
}

impl Batch {
    fn new(shape: Shape, classes: u64, seed: u32) -> Batch {
        let labels = noise(shape.batch, 100 + seed);
        let labels: Vec<i64> = labels.iter().map(|&at| ((f64::from(at) + 1.0) / 2.0 * classes as f64) as i64).collect();
        let values = noise(shape.batch * shape.dim, seed);
        Batch {
            shape,
            embeddings: Memory::of(&values),
            labels: Memory::of(&labels),
            gradient: Memory::of(&values),
            loss: Memory::of(&[f64::NAN]),
            row: Memory::of(&values[..shape.dim]),
        }
    }

    fn sets(shape: Shape, classes: u64) -> Vec<Batch> {
        (0..SETS).map(|set| Batch::new(shape, classes, set as u32)).collect()
    }

    fn matrix(&self, memory: &Memory) -> Matrix {
        let Shape { batch: rows, dim: cols, .. } = self.shape;
        Matrix { data: memory.pointer(), dtype: DType::F32, rows, cols, row_stride: cols }
    }

    fn prepare(&self, head: &mut Head) {
        head.prepare(Ok(Labels { data: self.labels.pointer(), count: self.shape.batch })).expect("to prepare");
    }

    /// Of a prepared step.
    fn forward(&self, head: &mut Head) {
        let input = StepInput { embeddings: self.matrix(&self.embeddings), labels: None, terms: RowTermArrays::NONE };
        head.forward(Ok(input), LossTarget::Device(self.loss.pointer())).expect("a forward");
    }

    fn finish(&self, head: &mut Head) {
        head.backward(1.0, 1.0, Ok(self.matrix(&self.gradient))).expect("a backward");
        head.update(0.1).expect("an update");
    }

    /// Makes the caller's stream wait for the update, as whoever reads a class center does.
    fn join(&self, head: &mut Head) {
        let row = Matrix { rows: 1, ..self.matrix(&self.row) };
        head.read_rows(StateTensor::Centers, 0, &row).expect("a row");
    }

    fn step(&self, head: &mut Head) {
        self.prepare(head);
        self.forward(head);
        self.finish(head);
    }
}

struct Bench<'a> {
    run: &'a Run,
    stream: &'a Stream,
    device: Arc<dyn Device>,
    rates: Rates,
}

/// Whole steps of a shape: times in microseconds.
struct Steps {
    shape: Shape,
    workspace_limit: usize,
    /// Bytes beyond W and momentum.
    memory: usize,
    loss: f64,
    prepared: f64,
    whole: f64,
    in_a_row: f64,
}

impl Steps {
    /// Whether P is kept.
    fn keeps(&self) -> bool {
        self.workspace_limit == 0
    }
}

impl Bench<'_> {
    fn head(&self, options: &HeadOptions) -> Head {
        head_on(&self.device, options)
    }

    fn steps(&self, shape: Shape, workspace_limit: usize) -> Steps {
        let options = options(shape, self.run.rate, workspace_limit);
        let batches = Batch::sets(shape, options.num_classes);
        let free = driver::free_memory();
        let mut head = self.head(&options);
        let state = 8 * options.num_classes as usize * shape.dim.next_multiple_of(4);
        let memory = free - driver::free_memory() - state;

        let count = self.run.steps;
        let in_turn = |count: usize| (0..count).map(|step| &batches[step % SETS]);
        for batch in in_turn(WARM) {
            batch.step(&mut head);
        }
        let prepared = in_turn(count).map(|batch| {
            batch.prepare(&mut head);
            driver::synchronize();
            self.stream.time(|| {
                batch.forward(&mut head);
                batch.finish(&mut head);
                batch.join(&mut head);
            })
        });
        let prepared = median(prepared.collect());
        let whole = in_turn(count).map(|batch| {
            driver::synchronize();
            self.stream.time(|| {
                batch.step(&mut head);
                batch.join(&mut head);
            })
        });
        let whole = median(whole.collect());
        // From the end of one forward to that of another: so many whole steps lie between.
        batches[0].prepare(&mut head);
        batches[0].forward(&mut head);
        let in_a_row = self.stream.time(|| {
            for step in 0..count {
                let (batch, next) = (&batches[step % SETS], &batches[(step + 1) % SETS]);
                next.prepare(&mut head);
                batch.finish(&mut head);
                next.forward(&mut head);
            }
        }) / count as f64;
        head.wait().expect("good steps");
        let loss = batches[0].loss.read();
        Steps { shape, workspace_limit, memory, loss, prepared, whole, in_a_row }
    }

    /// Each kernel's time in a step of a head of its own.
    fn kernels(&self, steps: &Steps) -> Vec<Kernel> {
        let options = options(steps.shape, self.run.rate, steps.workspace_limit);
        let batches = Batch::sets(steps.shape, options.num_classes);
        let mut head = self.head(&options);
        for batch in batches.iter().cycle().take(WARM) {
            batch.step(&mut head);
        }
        head.wait().expect("good steps");
        trace::take();
        for batch in batches.iter().cycle().take(self.run.steps) {
            batch.prepare(&mut head);
            // Nothing of another step is to run beside a kernel, nor the draw.
            driver::synchronize();
            batch.forward(&mut head);
            batch.finish(&mut head);
            driver::synchronize();
        }
        head.wait().expect("good steps");
        let mut spans = trace::take();
        // The host's are no kernels.
        spans.retain(|span| span.track != "host");
        let kernels = Kernel::all(&spans, self.run.steps);
        let gathers = kernels.iter().find(|kernel| kernel.name == "gather_centers").map_or(0, |kernel| kernel.launches);
        assert_eq!(gathers == 1, steps.keeps(), "{}: rows are gathered {gathers} times a step", title(steps.shape, steps.keeps()));
        kernels
    }

    fn report(&self, steps: &Steps, kernels: &[Kernel]) {
        let (shape, keeps) = (steps.shape, steps.keeps());
        println!("\n{}: {:.1} MB beyond W and momentum, loss {:.4}", title(shape, keeps), steps.memory as f64 / 1e6, steps.loss);
        println!(
            "{:<28} {:>10} {:>8} {:>8} {:>8} {:>6} {:>10} {:>7}",
            "", "us", "launches", "TFLOP/s", "GB/s", "share", "PyTorch us", "times"
        );
        let floor = Some(floor::of_step(shape, keeps));
        let launches = kernels.iter().map(|kernel| kernel.launches).sum();
        self.line("step, prepared", steps.prepared, None, floor, self.torch(shape, "prepared_us"));
        self.line("step", steps.whole, Some(launches), floor, self.torch(shape, "step_us"));
        self.line("step in a row", steps.in_a_row, None, floor, None);
        for Kernel { name, time, launches } in kernels {
            let product = name.strip_prefix("gemm_").filter(|_| keeps);
            let torch = product.and_then(|product| self.torch(shape, &format!("{product}_us")));
            self.line(name, *time, Some(*launches), floor::of_kernel(name, shape, keeps), torch);
        }
    }

    fn line(&self, what: &str, time: f64, launches: Option<usize>, floor: Option<Floor>, torch: Option<f64>) {
        let text = |value: Option<f64>, decimals: usize| value.map_or("-".to_owned(), |value| format!("{value:.decimals$}"));
        let flops = floor.filter(|floor| floor.flops > 0.0);
        // An unknown rate leaves a product without a share.
        let known = floor.filter(|floor| floor.flops == 0.0 || self.rates.flops.is_finite());
        println!(
            "{what:<28} {time:>10.1} {:>8} {:>8} {:>8} {:>6} {:>10} {:>7}",
            launches.map_or("-".to_owned(), |launches| launches.to_string()),
            text(flops.map(|floor| floor.flops / time / 1e6), 1),
            text(floor.map(|floor| floor.bytes / time / 1e3), 0),
            text(known.map(|floor| floor.time(self.rates) / time), 2),
            text(torch, 1),
            text(torch.map(|torch| torch / time), 2),
        );
    }

    /// A figure of PyTorch's at this shape.
    fn torch(&self, shape: Shape, figure: &str) -> Option<f64> {
        let shapes = self.run.torch.as_ref()?["shapes"].as_array()?;
        let is = |entry: &&serde_json::Value| {
            let number = |name: &str| entry[name].as_u64().map(|number| number as usize);
            [number("batch"), number("sample"), number("dim")] == [shape.batch, shape.sample, shape.dim].map(Some)
        };
        shapes.iter().find(is)?[figure].as_f64()
    }
}

fn head_on(device: &Arc<dyn Device>, options: &HeadOptions) -> Head {
    Head::create(Communicator::single().expect("a communicator"), Ok((device.clone(), options.clone()))).expect("a head")
}

/// All launches of a kernel in one step.
struct Kernel {
    name: String,
    time: f64,
    launches: usize,
}

impl Kernel {
    /// Those with a floor in the order of a step, then the others, longest first.
    fn all(spans: &[trace::Span], steps: usize) -> Vec<Kernel> {
        let mut by_name: BTreeMap<&str, BTreeMap<u64, Vec<f64>>> = BTreeMap::new();
        for span in spans {
            by_name.entry(&span.name).or_default().entry(span.step).or_default().push(span.duration_us);
        }
        let kernel = |(name, by_step): (&str, BTreeMap<u64, Vec<f64>>)| Kernel {
            name: name.to_owned(),
            launches: by_step.values().map(Vec::len).sum::<usize>().div_ceil(steps),
            time: median(by_step.values().map(|launches| launches.iter().sum()).collect()),
        };
        let mut kernels: Vec<Kernel> = by_name.into_iter().map(kernel).collect();
        let place = |kernel: &Kernel| floor::KERNELS.iter().position(|name| kernel.name.starts_with(name));
        kernels.sort_by_key(|kernel| place(kernel).unwrap_or(floor::KERNELS.len()));
        let with_floor = kernels.iter().take_while(|kernel| place(kernel).is_some()).count();
        kernels[with_floor..].sort_by(|a, b| b.time.total_cmp(&a.time));
        kernels
    }
}

fn options(shape: Shape, rate: f64, workspace_limit: usize) -> HeadOptions {
    HeadOptions {
        num_classes: (shape.sample as f64 / rate).round() as u64,
        embedding_dim: shape.dim as u32,
        placement: Placement::Sharded,
        sample_rate: rate,
        seed: 1,
        max_batch: shape.batch as u64,
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
        precision: Precision::Half,
        gather_dtype: None,
        row_terms: false,
        sample_block: 1,
        residency: Residency::Device,
        weight_dtype: DType::F32,
        state_dtype: DType::F32,
        workspace_limit: workspace_limit as u64,
    }
}
