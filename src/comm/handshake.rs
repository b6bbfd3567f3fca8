//! The handshake: every rank gives a few words, or its own failure, and all ranks reach the same conclusion.
//!
//! A rank whose own checks failed takes part all the same, so that nobody waits for it. What travels has a size that is known
//! beforehand, whatever happened locally.

use super::Communicator;
use crate::agreement::Field;
use crate::memory::{reserve, zeros};
use crate::{ensure, error, Contribution, Error, Result};

/// Compares fields over the ranks. Collective: one all-gather of `8 * (N + 2)` bytes from each rank.
///
/// Every rank passes the same fields in the same order, or the error of its own checks.
///
/// # Errors
/// A rank's own error; REMOTE on the others, naming that rank and its status; MISMATCH on all ranks alike, naming field, rank
/// and both values; the communicator's failure. After all but the last the communicator can be used.
pub fn agree<const N: usize>(comm: &Communicator, mine: Contribution<[Field; N]>) -> Result<()> {
    let words = mine.clone().map(|fields| fields.map(|field| field.bits));
    let all = gather_words(comm, words)?;
    let fields = mine?;
    for (i, field) in fields.iter().enumerate() {
        require_equal(field.name, &all, |words| words[i], |bits| field.show(bits))?;
    }
    Ok(())
}

/// MISMATCH if a word of the gathered blocks is not equal on all ranks. No communication: all ranks judge the same blocks.
pub(super) fn require_equal<const N: usize>(
    name: &str,
    all: &[[u64; N]],
    word: impl Fn(&[u64; N]) -> u64,
    show: impl Fn(u64) -> String,
) -> Result<()> {
    let Some(first) = all.first().map(&word) else { return Ok(()) };
    match all.iter().map(word).enumerate().find(|&(_, bits)| bits != first) {
        None => Ok(()),
        Some((rank, bits)) => Err(error!(Mismatch, "{name} is {} on rank 0 and {} on rank {rank}", show(first), show(bits))),
    }
}

/// Gathers `N` words from every rank, in rank order, or the news that a rank failed. Collective, as [`agree`].
///
/// # Errors
/// A rank's own error; REMOTE on the others, naming the lowest rank that failed and its status; the communicator's failure; COMM where
/// the gather brought back something else than the ranks' blocks in their order.
pub fn gather_words<const N: usize>(comm: &Communicator, mine: Contribution<[u64; N]>) -> Result<Vec<[u64; N]>> {
    // Status and rank, then the words.
    const BEFORE: usize = 2;
    // Without memory for the gather this rank cannot tell the others, and must not let them wait.
    let memory = |ranks: usize| comm.or_abort(zeros::<i64>(&[ranks, BEFORE + N], "the handshake"));
    let (mut block, mut gathered) = (memory(1)?, memory(comm.size() as usize)?);
    let rank = comm.rank() as usize;
    block[1] = rank as i64;
    match &mine {
        Ok(words) => block[BEFORE..].iter_mut().zip(words).for_each(|(to, &word)| *to = word as i64),
        Err(error) => block[0] = error.status as i64,
    }
    let outcome = comm.all_gather(&block, &mut gathered);
    // A rank's own error says more than what came of telling the others.
    mine?;
    outcome?;
    let blocks = gathered.chunks_exact(BEFORE + N);
    comm.or_abort(in_rank_order(&block, blocks.clone(), rank))?;
    match blocks.clone().enumerate().find(|(_, block)| block[0] != 0) {
        Some((rank, block)) => Err(Error::remote(rank, block[0])),
        None => {
            let mut all = Vec::new();
            comm.or_abort(reserve(&mut all, blocks.len(), "the handshake"))?;
            all.extend(blocks.map(|block| std::array::from_fn(|i| block[BEFORE + i] as u64)));
            Ok(all)
        }
    }
}

/// Refuses what a gather of {status, rank, words} brought back if this rank's own block is another, or blocks are at wrong places:
/// counts among the words would not be those of the ranks' memory.
fn in_rank_order<'a>(own: &[i64], mut blocks: impl Iterator<Item = &'a [i64]> + Clone, rank: usize) -> Result<()> {
    ensure!(
        blocks.clone().nth(rank) == Some(own),
        Comm,
        "all_gather did not bring back the own block of rank {rank} at its place as it was sent"
    );
    match blocks.by_ref().enumerate().find(|(place, block)| block[1] != *place as i64) {
        None => Ok(()),
        Some((place, block)) => {
            Err(error!(Comm, "all_gather brought back a block of rank {} at the place of rank {place}", block[1]))
        }
    }
}

#[cfg(test)]
mod tests;
