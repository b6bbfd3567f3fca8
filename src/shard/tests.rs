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
