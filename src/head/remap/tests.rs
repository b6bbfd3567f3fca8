use super::*;

#[test]
fn classes_behind_merged_ones_move_up() {
    let table = |from: &[i64], into: &[i64]| merge_table(6, from, into);
    assert_eq!(table(&[1, 4, 5], &[3, 0, 3]).expect("a table"), (3, vec![0, 2, 1, 2, 0, 2]));
    assert_eq!(table(&[], &[]).expect("a table"), (6, vec![0, 1, 2, 3, 4, 5]));
    let refused = |from: &[i64], into: &[i64]| table(from, into).expect_err("a refusal").message;
    assert_eq!(refused(&[0, 6], &[1, 1]), "from[1] must be a class, 0 to 5, got 6");
    assert_eq!(refused(&[0, 0], &[1, 2]), "from[1] is class 0, which is in from already");
    assert_eq!(refused(&[0], &[-1]), "into[0] must be a class, 0 to 5, got -1");
    let text = "into[1] is class 0, which is in from itself: name the class that both become";
    assert_eq!(refused(&[0, 2], &[1, 0]), text);
    assert_eq!(refused(&[3], &[3]), "into[0] is class 3, which is in from itself: name the class that both become");
}
