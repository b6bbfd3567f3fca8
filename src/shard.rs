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
mod tests {
    use super::*;

    #[test]
    fn shards_tile_the_classes_in_order() {
        for num_classes in [0u64, 1, 2, 7, 8, 9, 100, 1_000_003] {
            for ranks in [1u64, 2, 3, 7, 8, 64] {
                let mut next = 0;
                for rank in 0..ranks {
                    let shard = Shard::of(num_classes, ranks, rank);
                    assert_eq!(shard.first, next);
                    assert_eq!(shard.rows, num_classes / ranks + u64::from(rank < num_classes % ranks));
                    next = shard.end();
                }
                assert_eq!(next, num_classes);
            }
        }
    }

    #[test]
    fn owner_is_the_one_shard_that_contains_the_class() {
        for (num_classes, ranks) in [(1u64, 1u64), (7, 3), (8, 4), (5, 8), (100, 7)] {
            for id in 0..num_classes {
                let owner = Shard::owner(num_classes, ranks, id);
                for rank in 0..ranks {
                    assert_eq!(
                        Shard::of(num_classes, ranks, rank).contains(id as i64),
                        rank == owner,
                        "{num_classes} {ranks} {id} {rank}"
                    );
                }
            }
        }
    }

    #[test]
    fn ids_outside_are_not_contained() {
        let shard = Shard { first: 10, rows: 5 };
        let inside: Vec<i64> = (-20..30).filter(|&id| shard.contains(id)).collect();
        assert_eq!(inside, [10, 11, 12, 13, 14]);
        assert!(!Shard::whole(100).contains(i64::MIN) && !Shard::whole(100).contains(-1) && !Shard::whole(100).contains(i64::MAX));
        assert!(!Shard { first: 3, rows: 0 }.contains(3));
    }

    #[test]
    fn products_do_not_overflow_for_the_largest_counts() {
        let shard = Shard::of(i64::MAX as u64, 3, 2);
        assert_eq!(shard.end(), i64::MAX as u64);
        assert_eq!(Shard::owner(i64::MAX as u64, 3, i64::MAX as u64 - 1), 2);
    }

    #[test]
    #[should_panic(expected = "rank must be below ranks")]
    fn a_rank_out_of_range_is_refused() {
        Shard::of(10, 3, 3);
    }
}
