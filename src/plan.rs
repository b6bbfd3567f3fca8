//! What a head will need, before there is one: bytes of memory, and bytes a step hands to the communicator.

use crate::device::{gpu_memory_needed, memory_needed, sample_capacity, storage_needed, Memory};
use crate::options::{HeadOptions, Placement, Precision};
use crate::protocol::{label_block, sum_elements, REPLICATED_SLOT, REPLICATED_TOTALS};
use crate::{ensure, Result};

/// Bytes that one rank hands to the collectives of one step, as `Communicator::traffic` counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTraffic {
    pub labels: u64,
    pub embeddings: u64,
    pub sums: u64,
    pub grad_embeddings: u64,
    pub grad_centers: u64,
}

impl StepTraffic {
    pub fn total(&self) -> u64 {
        self.labels + self.embeddings + self.sums + self.grad_embeddings + self.grad_centers
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Rows of W on the rank that owns most.
    pub shard_rows: u64,
    pub sample_capacity: u64,
    /// Of the rank that owns most.
    pub memory: Memory,
    /// Of these bytes those in the host's memory.
    pub host: u64,
    /// Bytes of its file.
    pub storage: u64,
    pub traffic: StepTraffic,
}

/// For a head on the CPU device with one thread a core, `ranks` ranks with `batch` rows each. There `auto` is precision f32.
pub fn plan(options: &HeadOptions, ranks: u32, batch: u64) -> Result<Plan> {
    let options = &checked(options, ranks, batch)?;
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
    let (memory, storage) = (memory_needed(options, ranks, threads)?, storage_needed(options, options.shard(ranks, 0)));
    let traffic = step_traffic(options, ranks, batch, Precision::F32);
    Ok(Plan { storage, ..plan_of(options, ranks, (memory, memory.total()), traffic) })
}

/// For a head on a GPU with so many bytes of memory for it. `auto` is precision half, and `max_batch` rows are handed over, whatever a
/// batch has.
pub fn plan_cuda(options: &HeadOptions, ranks: u32, batch: u64, gpu_memory: u64) -> Result<Plan> {
    let options = &checked(options, ranks, batch)?;
    let memory = gpu_memory_needed(options, ranks, gpu_memory)?;
    Ok(plan_of(options, ranks, memory, step_traffic(options, ranks, options.max_batch, Precision::Half)))
}

/// The options, with the `max_batch` that such a batch makes of 0.
fn checked(options: &HeadOptions, ranks: u32, batch: u64) -> Result<HeadOptions> {
    ensure!(ranks > 0, InvalidArgument, "ranks must be at least 1, got 0");
    options.check(ranks)?;
    let options = HeadOptions { max_batch: options.batch_room(batch, ranks), ..options.clone() };
    ensure!(batch <= options.max_batch, InvalidArgument, "batch must be at most max_batch, {}, got {batch}", options.max_batch);
    Ok(options)
}

fn plan_of(options: &HeadOptions, ranks: u32, (memory, host): (Memory, u64), traffic: StepTraffic) -> Plan {
    let shard = options.shard(ranks, 0);
    Plan { shard_rows: shard.rows, sample_capacity: sample_capacity(options, ranks, shard), memory, host, storage: 0, traffic }
}

/// `auto` is what that precision is on the device. The class centers' gradient of a replicated head is as large as its sample; where
/// positives outnumber `int(rate * C)`, more than that travels.
fn step_traffic(options: &HeadOptions, ranks: u32, batch: u64, auto: Precision) -> StepTraffic {
    let (n, d) = (u64::from(ranks), u64::from(options.embedding_dim));
    let gathered = options.gathered_dtype(auto).size() as u64;
    let labels = 8 * label_block(options.max_batch) as u64;
    match options.placement {
        Placement::Sharded => StepTraffic {
            labels,
            embeddings: batch * d * gathered,
            sums: 4 * sum_elements((n * batch) as usize, options) as u64,
            grad_embeddings: 4 * n * batch * d,
            grad_centers: 0,
        },
        Placement::Replicated => StepTraffic {
            labels,
            sums: 8 * (REPLICATED_TOTALS as u64 + REPLICATED_SLOT as u64 * n),
            grad_centers: 4 * d * crate::sample::sample_size(options.sample_rate, options.num_classes),
            ..StepTraffic::default()
        },
    }
}
