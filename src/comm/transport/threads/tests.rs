use super::*;

#[test]
fn shares_cover_all_elements_once() {
    for count in [0, 1, 15, 16, 17, 100, 1000, usize::MAX / 2] {
        for size in [1, 2, 3, 7, 4096] {
            let mut next = 0;
            for rank in 0..size {
                let range = share(count, rank, size);
                assert_eq!(range.start, next, "count {count}, rank {rank} of {size}");
                next = range.end;
            }
            assert_eq!(next, count, "{size} ranks");
        }
    }
}

#[test]
fn absent_ranks_read_well() {
    assert_eq!(absent(&[true, false]), "rank 1");
    assert_eq!(absent(&[false, true, false]), "ranks 0 and 2");
    assert_eq!(absent(&[false; 3]), "ranks 0, 1 and 2");
    assert_eq!(absent(&[false; 96]), "ranks 0, 1, 2, 3, 4, 5 and 90 more");
}
