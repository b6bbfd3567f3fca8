//! Which classes of a checkpoint become which of the head that loads it: identities come, go, and turn out to be one.

use std::collections::btree_map::{BTreeMap, Entry};
use std::ops::Range;
use std::path::Path;

use crate::memory::zeros;
use crate::shard::Shard;
use crate::{ensure, Result};

/// A class of the checkpoint that becomes none of the head's.
const DROPPED: i64 = -1;

/// What becomes of a checkpoint's classes on this rank.
pub(super) struct ClassMap<'a> {
    /// For each class of the checkpoint that of the head; `None`: the same.
    table: Option<&'a [i64]>,
    shard: Shard,
    /// With a table, for each row of the shard: how many classes become it.
    sources: Vec<u32>,
}

impl<'a> ClassMap<'a> {
    /// Refuses a table that is not of these `classes` of a checkpoint, or not of the head's classes.
    pub fn new(table: Option<&'a [i64]>, directory: &Path, classes: u64, num_classes: u64, shard: Shard) -> Result<ClassMap<'a>> {
        let Some(table) = table else { return Ok(ClassMap { table: None, shard, sources: Vec::new() }) };
        ensure!(
            table.len() as u64 == classes,
            Mismatch,
            "class_map has {} entries, and the checkpoint {} has {classes} classes",
            table.len(),
            directory.display()
        );
        let mut sources = zeros(&[shard.rows as usize], "sources of classes")?;
        for (class, &to) in table.iter().enumerate() {
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
        Ok(ClassMap { table: Some(table), shard, sources })
    }

    /// A number that tables share only if they are equal, but for a chance of 2^-32; 0 without one.
    pub fn checksum(&self) -> u32 {
        let Some(table) = self.table else { return 0 };
        let mut hasher = crc32fast::Hasher::new();
        table.iter().for_each(|to| hasher.update(&to.to_le_bytes()));
        hasher.finalize()
    }

    pub fn is_given(&self) -> bool {
        self.table.is_some()
    }

    /// The row of the shard that a class becomes.
    fn row(&self, class: u64) -> Option<u64> {
        let class = self.table.map_or(class as i64, |table| table[class as usize]);
        self.shard.contains(class).then(|| class as u64 - self.shard.first)
    }

    fn is_alone(&self, row: u64) -> bool {
        self.table.is_none() || self.sources[row as usize] == 1
    }

    /// The classes, of these, that the shard may have: others need not be looked at.
    pub fn of_shard(&self, classes: Shard) -> Option<Range<u64>> {
        let range = match self.table {
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
        (0..).zip(&self.sources).filter(|&(_, &sources)| sources != 1).map(|(row, _)| row)
    }
}

/// Rows that several classes become: the mean of their directions, as long as they are in the mean.
#[derive(Default)]
pub(super) struct MergedRows {
    rows: BTreeMap<u64, MergedRow>,
}

struct MergedRow {
    /// The sum of w / |w|.
    directions: Vec<f64>,
    /// The sum of |w|.
    lengths: f64,
    count: u32,
}

impl MergedRows {
    pub fn add(&mut self, row: u64, center: &[f32]) -> Result<()> {
        let merged = match self.rows.entry(row) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let directions = zeros(&[center.len()], "classes that become one")?;
                entry.insert(MergedRow { directions, lengths: 0.0, count: 0 })
            }
        };
        let length = center.iter().map(|&w| f64::from(w) * f64::from(w)).sum::<f64>().sqrt();
        // A row without a length has no direction.
        let inverse = if length > 0.0 { 1.0 / length } else { 0.0 };
        merged.directions.iter_mut().zip(center).for_each(|(sum, &w)| *sum += f64::from(w) * inverse);
        merged.lengths += length;
        merged.count += 1;
        Ok(())
    }

    /// Writes a row's class center. Gives false for one that no classes become.
    pub fn write(&self, row: u64, center: &mut [f32]) -> bool {
        let Some(MergedRow { directions, lengths, count }) = self.rows.get(&row) else { return false };
        let length = directions.iter().map(|sum| sum * sum).sum::<f64>().sqrt();
        let scale = if length > 0.0 { lengths / f64::from(*count) / length } else { 0.0 };
        center.iter_mut().zip(directions).for_each(|(w, sum)| *w = (sum * scale) as f32);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;

    #[test]
    fn a_table_moves_runs_of_classes() {
        let shard = Shard { first: 2, rows: 5 };
        // The head's classes 2 to 6 are the rows 0 to 4.
        let table = [3, 4, -1, 5, 2, 2, 9];
        let map = ClassMap::new(Some(&table), Path::new("here"), 7, 10, shard).expect("a table");
        let mut runs = Vec::new();
        map.runs(0..7, |classes, row| {
            runs.push((classes, row));
            Ok(())
        })
        .expect("runs");
        assert_eq!(runs, [(0..2, 1), (3..4, 3)]);
        assert_eq!(map.merging(0..7).collect::<Vec<_>>(), [(4, 0), (5, 0)]);
        assert_eq!(map.rows_without_one_source().collect::<Vec<_>>(), [0, 4]);
        assert_eq!(map.of_shard(Shard { first: 0, rows: 7 }), Some(0..6));
        assert_eq!(map.of_shard(Shard { first: 6, rows: 1 }), None);
        assert!(map.has_any(1..3) && !map.has_any(2..3));
        let same = ClassMap::new(None, Path::new("here"), 10, 10, shard).expect("no table");
        assert_eq!(same.of_shard(Shard { first: 0, rows: 4 }), Some(2..4));
        assert!(same.checksum() == 0 && map.checksum() != 0);
    }

    #[test]
    fn a_table_of_others_is_refused() {
        let shard = Shard { first: 0, rows: 5 };
        let refused = |table: &[i64]| ClassMap::new(Some(table), Path::new("here"), 3, 5, shard).err().expect("a refusal");
        let text = "class_map[1] must be -1 or a class of the head, 0 to 4, got 5";
        assert_eq!((refused(&[0, 5, 1]).status, refused(&[0, 5, 1]).message), (Status::InvalidArgument, text.to_owned()));
        assert!(refused(&[0, 1, -2]).message.contains("class_map[2]"));
        let text = "class_map has 2 entries, and the checkpoint here has 3 classes";
        assert_eq!((refused(&[0, 1]).status, refused(&[0, 1]).message), (Status::Mismatch, text.to_owned()));
    }

    #[test]
    fn classes_that_become_one_have_their_mean_direction() {
        let mut merged = MergedRows::default();
        merged.add(7, &[3.0, 0.0]).expect("a row");
        merged.add(7, &[0.0, 1.0]).expect("a row");
        let mut center = [9.0; 2];
        assert!(merged.write(7, &mut center));
        assert_eq!(center, [2f32.sqrt(); 2], "length 2, halfway between");
        assert!(!merged.write(8, &mut center));
        // Opposite ones have none.
        merged.add(8, &[1.0, 0.0]).expect("a row");
        merged.add(8, &[-4.0, 0.0]).expect("a row");
        assert!(merged.write(8, &mut center));
        assert_eq!(center, [0.0; 2]);
    }
}
