//! Kernels of several folders of images, side by side: each against the first, step by step in turn on heads that are fed the same, so
//! that a clock which changes changes for both.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use partialfc::device::{self, Device};
use partialfc::trace;

use super::driver::{self, Stream};
use super::floor::Shape;
use super::{options, Batch, Kernel, Run, SETS, WARM};

/// The products of a step, in its order.
const PRODUCTS: [&str; 3] = ["gemm_numerators", "gemm_weighted_centers", "gemm_center_gradient"];
/// A loss of the same inputs may differ by the order of sums, which goes into the next steps' rows.
const LOSS_TOLERANCE: f64 = 1e-3;

/// A folder of images, loaded.
struct Variant {
    name: String,
    device: Arc<dyn Device>,
}

impl Variant {
    fn load(folder: &Path, stream: &Stream) -> Result<Variant, String> {
        // Read when a device is made; no other thread runs.
        std::env::set_var("PFC_KERNEL_IMAGES", folder);
        // SAFETY: a live stream, which outlives the device.
        let device = unsafe { device::cuda(0, stream.raw()) }.map_err(|error| format!("{}: {error}", folder.display()))?;
        // A pack has them as variants/NAME/images.
        let mut names = folder.iter().rev().filter(|name| *name != "images");
        let name = names.next().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Variant { name, device })
    }
}

/// What one head's timed steps took.
struct Measured {
    /// Medians, microseconds, of the products in order.
    times: [f64; 3],
    /// Of the last step.
    loss: f64,
}

impl Measured {
    fn whole(&self) -> f64 {
        self.times.iter().sum()
    }
}

/// Prints a line for each folder and shape. The first is also held against itself: how far its ratio is from 1 is the noise.
pub fn compare(run: &Run, stream: &Stream, folders: &[PathBuf]) -> Result<(), String> {
    let variants = folders.iter().map(|folder| Variant::load(folder, stream)).collect::<Result<Vec<_>, String>>()?;
    trace::start();
    let mut wrong = Vec::new();
    for &Shape { batch, sample, dim } in &run.shapes {
        println!("\nB {batch}  S {sample}  d {dim}: microseconds of the products, and ratios to {} beside them", variants[0].name);
        println!(
            "{:<20} {:>11} {:>6} {:>16} {:>6} {:>15} {:>6} {:>10} {:>6} {:>8}",
            "", "numerators", "", "weighted centers", "", "center gradient", "", "together", "", "loss"
        );
        for variant in &variants {
            let [first, own] = side_by_side(run, [&variants[0], variant], Shape { batch, sample, dim });
            let ratio = |place: usize| own.times[place] / first.times[place];
            println!(
                "{:<20} {:>11.1} {:>6.3} {:>16.1} {:>6.3} {:>15.1} {:>6.3} {:>10.1} {:>6.3} {:>8.4}",
                variant.name,
                own.times[0],
                ratio(0),
                own.times[1],
                ratio(1),
                own.times[2],
                ratio(2),
                own.whole(),
                own.whole() / first.whole(),
                own.loss
            );
            let near = (own.loss - first.loss).abs() <= LOSS_TOLERANCE * first.loss.abs();
            if !near {
                wrong.push(format!("{} at B {batch}: loss {}, {} of {}", variant.name, own.loss, first.loss, variants[0].name));
            }
        }
    }
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(wrong.join("; "))
    }
}

/// Steps of two heads in turn.
fn side_by_side(run: &Run, pair: [&Variant; 2], shape: Shape) -> [Measured; 2] {
    let options = options(shape, run.rate, 0);
    let batches = Batch::sets(shape, options.num_classes);
    let mut heads = pair.map(|variant| super::head_on(&variant.device, &options));
    let (mut spans, mut losses) = ([Vec::new(), Vec::new()], [f64::NAN; 2]);
    for step in 0..WARM + run.steps {
        let batch = &batches[step % SETS];
        for ((head, spans), loss) in heads.iter_mut().zip(&mut spans).zip(&mut losses) {
            batch.prepare(head);
            driver::synchronize();
            batch.forward(head);
            batch.finish(head);
            driver::synchronize();
            head.wait().expect("a good step");
            *loss = batch.loss.read();
            let taken = trace::take();
            if step >= WARM {
                spans.extend(taken.into_iter().filter(|span| span.name.starts_with("gemm_")));
            }
        }
    }
    let measured = |spans: &[trace::Span], loss| {
        let kernels = Kernel::all(spans, run.steps);
        let time = |product: &str| kernels.iter().filter(|kernel| kernel.name.starts_with(product)).map(|kernel| kernel.time).sum();
        Measured { times: PRODUCTS.map(time), loss }
    };
    [0, 1].map(|place| measured(&spans[place], losses[place]))
}
