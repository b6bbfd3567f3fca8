//! The CPU backend.

mod accumulation;
mod arrivals;
mod batch_room;
mod buffers;
mod forward;
mod head;
mod loss;
mod nearest;
mod operands;
mod passes;
mod pool;
mod products;
mod row_file;
mod row_reader;
mod row_set;
mod row_tensors;
mod row_terms;
mod rows;
mod sample;
mod schedule;
mod sizes;
mod stateless;
mod step_rows;
mod table;
mod vector;

use std::ffi::{CStr, CString};
use std::sync::Arc;

use self::pool::Pool;
use crate::simd::Simd;
use crate::{ensure, error, Result};

pub use schedule::step_efficiency;
pub(crate) use sizes::{memory_needed, storage_needed};

/// More threads than any machine has are a mistake of the caller's.
const MOST_THREADS: u32 = 4096;

pub(super) struct Cpu {
    pool: Arc<Pool>,
    info: CString,
}

impl Cpu {
    pub fn new(threads: u32) -> Result<Cpu> {
        ensure!(threads <= MOST_THREADS, InvalidArgument, "threads must be 0 to {MOST_THREADS}, got {threads}");
        let pool = Arc::new(Pool::new(threads as usize));
        Simd::asked_for()?;
        let text = format!("cpu: {} threads, {}", pool.threads(), Simd::best().name());
        let info = CString::new(text).map_err(|_| error!(Device, "the device's name contains a zero byte"))?;
        Ok(Cpu { pool, info })
    }

    fn info(&self) -> &CStr {
        &self.info
    }
}
