//! `PFC_CHECK=1`: before each operation the ranks compare what they are about to do.
//!
//! Ranks that make different calls, or the same call with other sizes, mix up their data or wait for each other for ever; some
//! transports notice, MPI and NCCL do not. The comparison is a small all-gather of its own, through the host's memory, which traffic
//! does not count. It has to be on for all ranks or for none.

use std::fmt;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::transport::{Call, MemorySpace, Operation, Reduction, Signature, Transport};
use crate::matrix::{DType, ReduceOp};
use crate::{environment, error, Result};

/// Whether the environment asks for it. It is asked once: a program may change its environment meanwhile.
pub(super) fn is_on() -> Result<bool> {
    static ON: OnceLock<Result<bool>> = OnceLock::new();
    ON.get_or_init(|| environment::switch("PFC_CHECK")).clone()
}

/// How long ranks that do not agree wait for each other.
const PARTING: Duration = Duration::from_secs(1);

/// As it travels: operation, sequence, count, dtype, operation of a reduction, root.
type Words = [u64; 6];

fn words(signature: &Signature, sequence: u64) -> Words {
    let (dtype, op) = signature.reduction.map_or((0, 0), |Reduction { dtype, op }| (dtype as u64, op as u64));
    [signature.operation as u64, sequence, signature.count, dtype, op, signature.root.into()]
}

/// Refuses an operation that the ranks do not agree on, with the same error on all.
pub(super) fn agree(transport: &dyn Transport, call: &Call<'_>) -> Result<()> {
    let own = words(&call.signature, call.sequence);
    let mut all = vec![Words::default(); transport.size() as usize];
    let signature = Signature { operation: Operation::AllGather, count: size_of::<Words>() as u64, reduction: None, root: 0 };
    let gather = Call { signature, space: MemorySpace::Host, ..*call };
    // SAFETY: host memory of a block and of one for each rank.
    unsafe { transport.all_gather(own.as_ptr().cast(), all.as_mut_ptr().cast(), size_of::<Words>(), &gather) }
        .map_err(|error| error.during(format_args!("PFC_CHECK before {}", call.label())))?;
    let Some(rank) = all.iter().position(|words| words != &all[0]) else { return Ok(()) };
    let verdict = error!(
        Mismatch,
        "PFC_CHECK: rank 0 is about to run {}, but rank {rank} {} (this is rank {})",
        Described(&all[0]),
        Described(&all[rank]),
        transport.rank()
    );
    // Ending the communicator now could cancel the gather on slower ranks. A second gather proves that they finished the first; its
    // failure is harmless.
    let parting = Call { deadline: Instant::now() + PARTING, timeout: PARTING, ..gather };
    // SAFETY: as above.
    let _ = unsafe { transport.all_gather(own.as_ptr().cast(), all.as_mut_ptr().cast(), size_of::<Words>(), &parting) };
    Err(verdict)
}

/// Words of any rank's, for people.
struct Described<'a>(&'a Words);

impl fmt::Display for Described<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [operation, sequence, count, dtype, op, root] = *self.0;
        let known = Operation::ALL.into_iter().find(|&known| known as u64 == operation);
        write!(f, "{} #{sequence}", known.map_or("an unknown operation", Operation::name))?;
        let reduction = (DType::from_code(dtype as i32), ReduceOp::from_code(op as i32));
        match (known, reduction) {
            (Some(Operation::Barrier), _) => Ok(()),
            (Some(Operation::Broadcast), _) => write!(f, " of {count} bytes from rank {root}"),
            (_, (Some(dtype), Some(op))) => write!(f, " of {count} {} ({})", dtype.name(), op.name()),
            _ => write!(f, " of {count} bytes"),
        }
    }
}
