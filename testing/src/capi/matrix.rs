//! Matrix arguments.

use half::{bf16, f16};
use partialfc::capi::types::pfc_matrix;
use partialfc::matrix::DType;

/// Elements of a matrix argument in their own type.
#[derive(Clone, Debug)]
enum Elements {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

/// A matrix argument that owns its memory. Between `cols` and `row_stride` lies a mark that no call may overwrite.
#[derive(Clone, Debug)]
pub struct Rows {
    elements: Elements,
    pub rows: usize,
    pub cols: usize,
    pub stride: usize,
}

const MARK: f32 = 7.25;

impl Rows {
    /// Rounds to f32, then to the type's nearest even: `from_f64` of the half crate looks at a part of the f64 only.
    pub fn new(values: &[f64], cols: usize, dtype: DType, padding: usize) -> Rows {
        let (rows, stride) = (values.len() / cols, cols + padding);
        assert_eq!(values.len(), rows * cols, "whole rows");
        let mut padded = vec![f64::from(MARK); rows * stride];
        for (to, from) in padded.chunks_exact_mut(stride).zip(values.chunks_exact(cols)) {
            to[..cols].copy_from_slice(from);
        }
        let elements = match dtype {
            DType::F32 => Elements::F32(padded.iter().map(|&x| x as f32).collect()),
            DType::F16 => Elements::F16(padded.iter().map(|&x| f16::from_f32(x as f32)).collect()),
            DType::Bf16 => Elements::Bf16(padded.iter().map(|&x| bf16::from_f32(x as f32)).collect()),
            other => panic!("no matrix holds {other:?}"),
        };
        Rows { elements, rows, cols, stride }
    }

    pub fn f32(values: &[f32], cols: usize) -> Rows {
        let values: Vec<f64> = values.iter().map(|&x| f64::from(x)).collect();
        Rows::new(&values, cols, DType::F32, 0)
    }

    /// Somewhere to write: holds a number that nothing computes.
    pub fn output(rows: usize, cols: usize) -> Rows {
        Rows::new(&vec![-123.0; rows * cols], cols, DType::F32, 0)
    }

    pub fn dtype(&self) -> DType {
        match self.elements {
            Elements::F32(_) => DType::F32,
            Elements::F16(_) => DType::F16,
            Elements::Bf16(_) => DType::Bf16,
        }
    }

    fn padded(&self) -> Vec<f64> {
        match &self.elements {
            Elements::F32(values) => values.iter().map(|&x| f64::from(x)).collect(),
            Elements::F16(values) => values.iter().map(|x| x.to_f64()).collect(),
            Elements::Bf16(values) => values.iter().map(|x| x.to_f64()).collect(),
        }
    }

    /// The values, without what lies between the rows; asserts that nothing was written there.
    pub fn values(&self) -> Vec<f64> {
        let padded = self.padded();
        let mut values = Vec::with_capacity(self.rows * self.cols);
        for row in padded.chunks_exact(self.stride) {
            values.extend_from_slice(&row[..self.cols]);
            assert!(row[self.cols..].iter().all(|&x| x == f64::from(MARK)), "written between the rows: {:?}", &row[self.cols..]);
        }
        values
    }

    pub fn values_f32(&self) -> Vec<f32> {
        self.values().iter().map(|&x| x as f32).collect()
    }

    /// The argument itself. What it points to may be written by the call it is made for.
    pub fn view(&mut self) -> pfc_matrix {
        let data = match &mut self.elements {
            Elements::F32(values) => values.as_mut_ptr().cast(),
            Elements::F16(values) => values.as_mut_ptr().cast(),
            Elements::Bf16(values) => values.as_mut_ptr().cast(),
        };
        let (rows, cols, row_stride) = (self.rows as u64, self.cols as u64, self.stride as u64);
        pfc_matrix { data, dtype: self.dtype() as i32, reserved: 0, rows, cols, row_stride }
    }
}
