//! What is known of a step before its embeddings: the batches, the labels, the sample and which columns are targets.

use super::products::Targets;
use super::row_tensors::{Place, Slots};
use crate::device::SampleIds;
use crate::memory::reserve;
use crate::options::{HeadOptions, Placement};
use crate::protocol::HEADER;
use crate::shard::Shard;
use crate::Result;

/// The classes of a step on this rank.
#[derive(Clone, Debug, Default)]
pub(super) struct Sample {
    first: u64,
    size: usize,
    /// Ascending global ids; empty where the sample is the whole shard.
    ids: Vec<i64>,
}

impl Sample {
    pub fn whole(shard: Shard) -> Sample {
        Sample { first: shard.first, size: shard.rows as usize, ids: Vec::new() }
    }

    /// Of ascending ids of the shard.
    pub fn of(shard: Shard, ids: Vec<i64>) -> Sample {
        if ids.len() as u64 == shard.rows {
            return Sample::whole(shard);
        }
        Sample { first: shard.first, size: ids.len(), ids }
    }

    pub fn len(&self) -> usize {
        self.size
    }

    pub fn known_ids(&self) -> SampleIds<'_> {
        SampleIds { first: self.first as i64, count: self.size, listed: &self.ids }
    }

    /// The row of the shard that a column is.
    pub fn row(&self, column: usize) -> usize {
        match self.ids.get(column) {
            Some(&id) => (id as u64 - self.first) as usize,
            None => column,
        }
    }

    /// The place of a column's row.
    pub fn place(&self, slots: Slots, column: usize) -> Place {
        slots.place(self.row(column), column)
    }

    /// Where in the sample a class of the shard is.
    pub fn column(&self, id: i64) -> Option<usize> {
        if !self.ids.is_empty() {
            return self.ids.binary_search(&id).ok();
        }
        let column = (id as u64).wrapping_sub(self.first);
        (id >= 0 && column < self.size as u64).then_some(column as usize)
    }

    /// A number that two samples share only by a chance of 2^-48: exact in a float64, so that a sum can carry it.
    pub fn digest(&self) -> f64 {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let mut mix = |value: u64| hash = (hash ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        mix(self.size as u64);
        self.ids.iter().for_each(|&id| mix(id as u64));
        (hash >> 16) as f64
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct Draft {
    /// Rows on each rank.
    pub batches: Vec<usize>,
    /// Labels of the rows this rank computes: all ranks' rows (sharded) or its own (replicated).
    pub labels: Vec<i64>,
    /// Labels of all ranks.
    all_labels: Vec<i64>,
    /// This rank's first row among those it computes.
    pub first_row: usize,
    pub sample: Sample,
    pub targets: Targets,
    /// Column of each row's target, where it is in this rank's sample.
    columns: Vec<Option<u32>>,
    /// Valid rows among `labels`.
    pub valid_rows: usize,
}

impl Draft {
    /// With room for the labels of every batch: once the ranks have their labels, none may fail alone.
    pub fn with_room(options: &HeadOptions, ranks: u32) -> Result<Draft> {
        let (mut draft, rows) = (Draft::default(), ranks as usize * options.max_batch as usize);
        reserve(&mut draft.batches, ranks as usize, "the ranks' batches")?;
        reserve(&mut draft.all_labels, rows, "labels")?;
        let computed = if options.placement == Placement::Sharded { rows } else { options.max_batch as usize };
        reserve(&mut draft.labels, computed, "labels")?;
        Ok(draft)
    }

    /// Takes the gathered labels of all ranks, in blocks of equal length; `batches` has their numbers.
    pub fn take_labels(&mut self, options: &HeadOptions, rank: usize, blocks: &[i64]) {
        let length = blocks.len() / self.batches.len();
        self.all_labels.clear();
        for (block, &batch) in blocks.chunks_exact(length).zip(&self.batches) {
            self.all_labels.extend_from_slice(&block[HEADER..HEADER + batch]);
        }
        let before: usize = self.batches[..rank].iter().sum();
        self.labels.clear();
        match options.placement {
            Placement::Sharded => self.labels.extend_from_slice(&self.all_labels),
            Placement::Replicated => self.labels.extend_from_slice(&self.all_labels[before..before + self.batches[rank]]),
        }
        self.first_row = if options.placement == Placement::Sharded { before } else { 0 };
        self.valid_rows = self.labels.iter().filter(|&&label| Some(label) != options.ignore_label).count();
        // Nothing is drawn for them yet.
        self.sample = Sample::default();
        self.columns.clear();
        self.targets = Targets::default();
    }

    /// The shard's classes among the labels: ascending, each once.
    pub fn positives(&self, shard: Shard) -> Result<Vec<i64>> {
        let mut positives = Vec::new();
        reserve(&mut positives, self.all_labels.len(), "positives")?;
        positives.extend(self.all_labels.iter().copied().filter(|&label| shard.contains(label)));
        positives.sort_unstable();
        positives.dedup();
        Ok(positives)
    }

    pub fn set_sample(&mut self, sample: Sample) -> Result<()> {
        reserve(&mut self.columns, self.labels.len(), "columns of targets")?;
        self.columns.extend(self.labels.iter().map(|&label| sample.column(label).map(|column| column as u32)));
        let pairs = self.columns.iter().enumerate().filter_map(|(row, column)| column.map(|column| (column, row as u32)));
        self.targets = Targets::new(pairs)?;
        self.sample = sample;
        Ok(())
    }

    /// The columns that are targets: ascending, each once.
    pub fn target_columns(&self) -> Result<Vec<u32>> {
        let mut columns = Vec::new();
        reserve(&mut columns, self.labels.len(), "columns of targets")?;
        columns.extend(self.columns.iter().flatten());
        columns.sort_unstable();
        columns.dedup();
        Ok(columns)
    }

    /// Column of a row's target, where it is in this rank's sample.
    pub fn column(&self, row: usize) -> Option<usize> {
        self.columns[row].map(|column| column as usize)
    }

    /// The rank a row comes from, and its number there; sharded heads only, whose rows are all ranks'.
    pub fn origin(&self, row: usize) -> (usize, usize) {
        let mut before = 0;
        for (rank, &batch) in self.batches.iter().enumerate() {
            if row < before + batch {
                return (rank, row - before);
            }
            before += batch;
        }
        unreachable!("row {row} of {before}")
    }
}

/// The ascending union of two ascending lists.
pub(super) fn merge(chosen: &[i64], positives: &[i64]) -> Result<Vec<i64>> {
    let mut ids = Vec::new();
    reserve(&mut ids, chosen.len() + positives.len(), "the sample")?;
    ids.extend_from_slice(chosen);
    ids.extend_from_slice(positives);
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}
