use half::bf16;

use super::*;
use StateTensor::{Centers, Momentum, SecondMoment};

#[test]
fn what_cannot_be_stored_is_named() {
    let message = |tensor, dtype, values: &[f32]| check_row(tensor, dtype, 3, 17, values).err().map(|error| error.message);
    let largest = f32::from_bits(BEYOND_BF16 - 1);
    assert!(bf16::from_f32(largest).is_finite() && bf16::from_f32(f32::from_bits(BEYOND_BF16)).is_infinite());
    let good: [(StateTensor, DType, &[f32]); 4] = [
        (Centers, DType::F32, &[-f32::MAX, f32::MAX, 0.0]),
        (Momentum, DType::Bf16, &[-largest, largest]),
        (SecondMoment, DType::Bf16, &[0.0, -0.0, largest]),
        (Centers, DType::F32, &[]),
    ];
    for (tensor, dtype, values) in good {
        assert_eq!(message(tensor, dtype, values), None, "{values:?}");
    }
    let bad: [(StateTensor, DType, &[f32], &str); 5] = [
        (Centers, DType::F32, &[0.0, f32::NAN], "contains a NaN or an infinity"),
        (SecondMoment, DType::Bf16, &[-1.0, f32::NEG_INFINITY], "contains a NaN or an infinity"),
        (SecondMoment, DType::F32, &[-1e-45], "of the second moment must not be negative"),
        (SecondMoment, DType::Bf16, &[-f32::MAX], "of the second moment must not be negative"),
        (Momentum, DType::Bf16, &[-f32::from_bits(BEYOND_BF16)], "contains a number beyond bfloat16"),
    ];
    for (tensor, dtype, values, text) in bad {
        assert_eq!(message(tensor, dtype, values), Some(format!("row 3 (class 17) {text}")), "{values:?}");
    }
}
