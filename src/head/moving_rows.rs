//! Rows that leave one numbering of classes for another, into the head that has the other.

use std::collections::btree_map::{BTreeMap, Entry};
use std::ops::Range;

use super::class_map::ClassMap;
use super::staged::Staged;
use crate::device::HeadDevice;
use crate::memory::zeros;
use crate::Result;

pub(super) struct MovingRows<'a> {
    classes: &'a ClassMap<'a>,
    merged: MergedRows,
    /// A class center on its way into those.
    center: Vec<f32>,
}

impl<'a> MovingRows<'a> {
    /// `center` has room for one.
    pub fn new(classes: &'a ClassMap<'a>, center: Vec<f32>) -> MovingRows<'a> {
        MovingRows { classes, merged: MergedRows::default(), center }
    }

    /// Takes these classes, which are staged from row `at` on. Returns how many of them have become rows of their own. Of classes that
    /// keep their number `is_start` tells which the new head has by itself.
    pub fn take(
        &mut self,
        to: &mut dyn HeadDevice,
        staged: &mut Staged,
        at: usize,
        classes: Range<u64>,
        is_start: impl Fn(usize) -> bool,
    ) -> Result<u64> {
        let MovingRows { classes: map, merged, center } = self;
        let place = |class: u64| at + (class - classes.start) as usize;
        let mut alone = 0;
        map.runs(classes.clone(), |run, row| {
            alone += run.end - run.start;
            let skipped = |class: u64| map.keeps_number(class) && is_start(place(class));
            let mut class = run.start;
            while class < run.end {
                let first = class;
                let skips = skipped(class);
                class += 1;
                while class < run.end && skipped(class) == skips {
                    class += 1;
                }
                if !skips {
                    to.write_rows(row + (first - run.start), staged.part(place(first)..place(class)))?;
                }
            }
            Ok(())
        })?;
        for (class, row) in map.merging(classes.clone()) {
            staged.read_center(place(class), center);
            merged.add(row, center, map.weight(class))?;
        }
        Ok(alone)
    }

    /// Writes the rows that several classes have become, and of those that none becomes the ones that `start` gives values for. The
    /// state of both is zero. `staged` has room for some of them in f32, and zeros.
    pub fn finish(self, to: &mut dyn HeadDevice, staged: &mut Staged, start: impl Fn(u64, &mut [f32]) -> bool) -> Result<()> {
        let (mut first, mut count) = (0, 0);
        for row in self.classes.rows_without_one_source() {
            if count > 0 && (count == staged.capacity() || row != first + count as u64) {
                to.write_rows(first, staged.part(0..count))?;
                count = 0;
            }
            let center = staged.center(count);
            if self.merged.write(row, center) || start(row, center) {
                first = row - count as u64;
                count += 1;
            }
        }
        match count {
            0 => Ok(()),
            _ => to.write_rows(first, staged.part(0..count)),
        }
    }
}

/// Rows that several classes become: the weighted mean of their directions, as long as they are in the weighted mean.
#[derive(Default)]
struct MergedRows {
    rows: BTreeMap<u64, MergedRow>,
}

struct MergedRow {
    /// The weighted sum of w / |w|.
    directions: Vec<f64>,
    /// The weighted sum of |w|.
    lengths: f64,
    /// The sum of the weights.
    weight: f64,
}

impl MergedRows {
    fn add(&mut self, row: u64, center: &[f32], weight: f64) -> Result<()> {
        let merged = match self.rows.entry(row) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let directions = zeros(&[center.len()], "classes that become one")?;
                entry.insert(MergedRow { directions, lengths: 0.0, weight: 0.0 })
            }
        };
        let length = center.iter().map(|&w| f64::from(w) * f64::from(w)).sum::<f64>().sqrt();
        // A row without a length has no direction.
        let inverse = if length > 0.0 { weight / length } else { 0.0 };
        merged.directions.iter_mut().zip(center).for_each(|(sum, &w)| *sum += f64::from(w) * inverse);
        merged.lengths += weight * length;
        merged.weight += weight;
        Ok(())
    }

    /// Writes a row's class center. Gives false for one that no classes become.
    fn write(&self, row: u64, center: &mut [f32]) -> bool {
        let Some(MergedRow { directions, lengths, weight }) = self.rows.get(&row) else { return false };
        let length = directions.iter().map(|sum| sum * sum).sum::<f64>().sqrt();
        let scale = if length > 0.0 { lengths / weight / length } else { 0.0 };
        center.iter_mut().zip(directions).for_each(|(w, sum)| *w = (sum * scale) as f32);
        true
    }
}

#[cfg(test)]
mod tests;
