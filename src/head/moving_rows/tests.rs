use super::*;

#[test]
fn classes_that_become_one_have_their_mean_direction() {
    let mut merged = MergedRows::default();
    merged.add(7, &[3.0, 0.0], 1.0).expect("a row");
    merged.add(7, &[0.0, 1.0], 1.0).expect("a row");
    let mut center = [9.0; 2];
    assert!(merged.write(7, &mut center));
    assert_eq!(center, [2f32.sqrt(); 2], "length 2, halfway between");
    assert!(!merged.write(8, &mut center));
    // One that counts three times.
    merged.add(9, &[4.0, 0.0], 3.0).expect("a row");
    merged.add(9, &[0.0, 8.0], 1.0).expect("a row");
    assert!(merged.write(9, &mut center));
    let length = 10f32.sqrt();
    assert_eq!(center, [5.0 * 3.0 / length, 5.0 / length], "length 5, three times as near to the first");
    // Opposite ones have none.
    merged.add(8, &[1.0, 0.0], 1.0).expect("a row");
    merged.add(8, &[-4.0, 0.0], 1.0).expect("a row");
    assert!(merged.write(8, &mut center));
    assert_eq!(center, [0.0; 2]);
}
