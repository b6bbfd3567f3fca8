use super::*;
use crate::Status;

#[test]
fn a_table_moves_runs_of_classes() {
    let shard = Shard { first: 2, rows: 5 };
    // The head's classes 2 to 6 are the rows 0 to 4.
    let table = [3, 4, -1, 5, 2, 2, 9];
    let map = ClassMap::new(ClassTable { map: Some(&table), weights: None }, "here", 7, 10, shard).expect("a table");
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
    let same = ClassMap::new(ClassTable::default(), "here", 6, 10, shard).expect("no table");
    assert_eq!(same.of_shard(Shard { first: 0, rows: 4 }), Some(2..4));
    assert_eq!(same.rows_without_one_source().collect::<Vec<_>>(), [4], "class 6 is new");
    assert!(same.checksum() == 0 && map.checksum() != 0);
    assert!(!map.keeps_number(1) && map.keeps_number(5) == (table[5] == 5) && same.keeps_number(3));
    assert!(map.is_kept(1) && !map.is_kept(2) && same.is_kept(9) && !same.is_kept(10));
    let weighted = ClassTable { map: Some(&table), weights: Some(&[1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]) };
    let weighted = ClassMap::new(weighted, "here", 7, 10, shard).expect("a table");
    assert!(weighted.checksum() != map.checksum() && weighted.weight(1) == 2.0 && map.weight(1) == 1.0);
}

#[test]
fn a_table_of_others_is_refused() {
    let shard = Shard { first: 0, rows: 5 };
    let refused = |table: &[i64]| {
        let table = ClassTable { map: Some(table), weights: None };
        ClassMap::new(table, "the checkpoint here", 3, 5, shard).err().expect("a refusal")
    };
    let text = "class_map[1] must be -1 or a class of the head, 0 to 4, got 5";
    assert_eq!((refused(&[0, 5, 1]).status, refused(&[0, 5, 1]).message), (Status::InvalidArgument, text.to_owned()));
    assert!(refused(&[0, 1, -2]).message.contains("class_map[2]"));
    let text = "class_map has 2 entries, and the checkpoint here has 3 classes";
    assert_eq!((refused(&[0, 1]).status, refused(&[0, 1]).message), (Status::Mismatch, text.to_owned()));
    for (weight, shown) in [(0.0, "0.0"), (-1.0, "-1.0"), (f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let weights = [1.0, weight, 1.0];
        let table = |map| ClassTable { map, weights: Some(&weights) };
        let refused = |map| ClassMap::new(table(map), "the head", 3, 5, shard).err().expect("a refusal").message;
        assert_eq!(refused(Some(&[0, 1, 1])), format!("class_weights[1] must be above 0 and finite, got {shown}"));
        assert_eq!(refused(None), "class_weights must be NULL without class_map");
    }
}
