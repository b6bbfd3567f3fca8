//! Shards: which contiguous range of class centers a rank owns.

/// A contiguous range of classes: `first .. first + rows`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Global id of the first class center.
    pub first: u64,
    /// How many there are; may be 0 where there are more ranks than classes.
    pub rows: u64,
}

impl Shard {
    /// The range of `rank`, 0 <= rank < ranks: of C classes over N ranks each owns C / N, and the first C mod N ranks one more.
    ///
    /// # Panics
    /// If `rank` is not below `ranks`.
    pub fn of(num_classes: u64, ranks: u64, rank: u64) -> Shard {
        assert!(rank < ranks, "rank must be below ranks, {ranks}, got {rank}");
        let (each, more) = (num_classes / ranks, num_classes % ranks);
        Shard { first: rank * each + rank.min(more), rows: each + u64::from(rank < more) }
    }

    /// All classes: the range of every rank of a replicated head.
    pub fn whole(num_classes: u64) -> Shard {
        Shard { first: 0, rows: num_classes }
    }

    /// One past the last class center.
    pub fn end(&self) -> u64 {
        self.first + self.rows
    }

    /// Whether the class lies in this range; negative ids lie in none.
    pub fn contains(&self, id: i64) -> bool {
        u64::try_from(id).is_ok_and(|id| id.wrapping_sub(self.first) < self.rows)
    }

    /// The rank whose [`Shard::of`] holds class `id`, 0 <= id < num_classes.
    ///
    /// # Panics
    /// If `id` is not below `num_classes`, or `ranks` is 0.
    pub fn owner(num_classes: u64, ranks: u64, id: u64) -> u64 {
        assert!(id < num_classes, "id must be below num_classes, {num_classes}, got {id}");
        let (each, more) = (num_classes / ranks, num_classes % ranks);
        let larger = more * (each + 1);
        if id < larger {
            id / (each + 1)
        } else {
            more + (id - larger) / each
        }
    }
}

#[cfg(test)]
mod tests;
