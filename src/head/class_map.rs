//! Which classes of one numbering become which of another, as a head loads a checkpoint or is given other classes: identities come, go,
//! and turn out to be one.

use std::fmt::Display;
use std::ops::Range;

use crate::memory::zeros;
use crate::shard::Shard;
use crate::{ensure, error, Result};

/// A class that becomes none.
const DROPPED: i64 = -1;

/// The classes that a caller has for old ones.
#[derive(Clone, Copy, Default)]
pub struct ClassTable<'a> {
    /// For each old class the new one, or -1: none; `None`: the same, if there is one.
    pub map: Option<&'a [i64]>,
    /// How much each old class counts where several become one; `None`: all alike.
    pub weights: Option<&'a [f32]>,
}

/// What becomes of old classes on this rank.
pub(super) struct ClassMap<'a> {
    table: ClassTable<'a>,
    /// Old ones, and new ones.
    classes: u64,
    num_classes: u64,
    /// The new ones of this rank.
    shard: Shard,
    /// With a table, for each row of the shard: how many classes become it.
    sources: Vec<u32>,
}

impl<'a> ClassMap<'a> {
    /// From `classes` of `whose`, as an error has it, to `num_classes`. Refuses a table that is not of the former, or not of the latter.
    pub fn new(table: ClassTable<'a>, whose: impl Display, classes: u64, num_classes: u64, shard: Shard) -> Result<ClassMap<'a>> {
        let ClassTable { map, weights } = table;
        let counts = [("class_map", map.map(<[i64]>::len)), ("class_weights", weights.map(<[f32]>::len))];
        for (name, count) in counts.into_iter().filter_map(|(name, count)| Some((name, count?))) {
            ensure!(count as u64 == classes, Mismatch, "{name} has {count} entries, and {whose} has {classes} classes");
        }
        ensure!(map.is_some() || weights.is_none(), InvalidArgument, "class_weights must be NULL without class_map");
        if let Some(class) = weights.and_then(|weights| weights.iter().position(|&weight| !(weight > 0.0 && weight.is_finite()))) {
            let weight = weights.unwrap_or(&[])[class];
            return Err(error!(InvalidArgument, "class_weights[{class}] must be above 0 and finite, got {weight:?}"));
        }
        let Some(map) = map else { return Ok(ClassMap { table, classes, num_classes, shard, sources: Vec::new() }) };
        let mut sources = zeros(&[shard.rows as usize], "sources of classes")?;
        for (class, &to) in map.iter().enumerate() {
            ensure!(
                to == DROPPED || (to >= 0 && (to as u64) < num_classes),
                InvalidArgument,
                "class_map[{class}] must be -1 or a class of the head, 0 to {}, got {to}",
                num_classes - 1
            );
            if shard.contains(to) {
                sources[(to as u64 - shard.first) as usize] += 1;
            }
        }
        Ok(ClassMap { table, classes, num_classes, shard, sources })
    }

    /// A number that tables share only if they are equal, but for a chance of 2^-32; 0 without one.
    pub fn checksum(&self) -> u32 {
        let ClassTable { map: Some(map), weights } = self.table else { return 0 };
        let mut hasher = crc32fast::Hasher::new();
        map.iter().for_each(|to| hasher.update(&to.to_le_bytes()));
        weights.unwrap_or(&[]).iter().for_each(|weight| hasher.update(&weight.to_bits().to_le_bytes()));
        hasher.finalize()
    }

    pub fn is_given(&self) -> bool {
        self.table.map.is_some()
    }

    /// Whether a class becomes any, on whichever rank.
    pub fn is_kept(&self, class: u64) -> bool {
        self.table.map.map_or(class < self.num_classes, |map| map[class as usize] != DROPPED)
    }

    pub fn keeps_number(&self, class: u64) -> bool {
        self.table.map.is_none_or(|map| map[class as usize] == class as i64)
    }

    /// The row of the shard that a class becomes.
    fn row(&self, class: u64) -> Option<u64> {
        let class = self.table.map.map_or(class as i64, |map| map[class as usize]);
        self.shard.contains(class).then(|| class as u64 - self.shard.first)
    }

    fn is_alone(&self, row: u64) -> bool {
        !self.is_given() || self.sources[row as usize] == 1
    }

    /// How much a class counts where several become one.
    pub fn weight(&self, class: u64) -> f64 {
        self.table.weights.map_or(1.0, |weights| weights[class as usize].into())
    }

    /// The classes, of these, that the shard may have: others need not be looked at.
    pub fn of_shard(&self, classes: Shard) -> Option<Range<u64>> {
        let range = match self.table.map {
            None => classes.first.max(self.shard.first)..classes.end().min(self.shard.end()),
            Some(_) => {
                let ours = |class: &u64| self.row(*class).is_some();
                let first = (classes.first..classes.end()).find(ours)?;
                let last = (first..classes.end()).rfind(ours)?;
                first..last + 1
            }
        };
        (range.start < range.end).then_some(range)
    }

    /// Whether any of these classes becomes a row of the shard.
    pub fn has_any(&self, classes: Range<u64>) -> bool {
        classes.into_iter().any(|class| self.row(class).is_some())
    }

    /// Gives `body` runs of these classes that become rows one after the other, none of them with others: (classes, first row).
    pub fn runs(&self, classes: Range<u64>, mut body: impl FnMut(Range<u64>, u64) -> Result<()>) -> Result<()> {
        let alone = |class: u64| self.row(class).filter(|&row| self.is_alone(row));
        let mut class = classes.start;
        while class < classes.end {
            let Some(row) = alone(class) else {
                class += 1;
                continue;
            };
            let first = class;
            class += 1;
            while class < classes.end && alone(class) == Some(row + (class - first)) {
                class += 1;
            }
            body(first..class, row)?;
        }
        Ok(())
    }

    /// Those of these classes that become a row together with others: (class, row).
    pub fn merging(&self, classes: Range<u64>) -> impl Iterator<Item = (u64, u64)> + '_ {
        let rows = classes.into_iter().filter_map(|class| Some((class, self.row(class)?)));
        rows.filter(|&(_, row)| !self.is_alone(row))
    }

    /// Rows that no class becomes, or several.
    pub fn rows_without_one_source(&self) -> impl Iterator<Item = u64> + '_ {
        let beyond = self.classes.clamp(self.shard.first, self.shard.end()) - self.shard.first..self.shard.rows;
        let beyond = if self.is_given() { 0..0 } else { beyond };
        beyond.chain((0..).zip(&self.sources).filter(|&(_, &sources)| sources != 1).map(|(row, _)| row))
    }
}

#[cfg(test)]
mod tests;
