use std::sync::Arc;

use super::*;
use crate::device::cpu::pool::Pool;
use crate::device::test_spec::spec;
use crate::device::{HeadDevice, TensorRows};
use crate::matrix::Matrix;
use crate::optimizer::StateTensor;
use crate::options::RowUpdate;
use crate::Status;

#[test]
fn rows_that_memory_does_not_have_yet_are_not_free_for_batches() {
    let head = |rows| CpuHead::new(spec(1000, 1, |options| options.row_update = rows), Arc::new(Pool::new(1))).expect("a head");
    let mut lazy = head(RowUpdate::Lazy);
    assert_eq!(lazy.rows.unstored(), 1000);
    assert_eq!(head(RowUpdate::Dense).rows.unstored(), 0);
    let mut values = [1.0f32; 2 * 512];
    let rows = Matrix::of_f32(&mut values, 2, 512);
    for (first, tensor) in [(3, StateTensor::Centers), (4, StateTensor::Momentum)] {
        lazy.write_rows(first, &[TensorRows { tensor, rows }]).expect("rows");
    }
    assert_eq!(lazy.rows.unstored(), 997);

    let spec = spec(1000, 1, |_| ());
    let sizes = |rows| affordable_sizes(&spec, 1, "what", move |_| rows);
    assert!(sizes(0).expect("sizes").kept_chunks > 0);
    assert_eq!(sizes(1 << 60).expect_err("too much").status, Status::OutOfMemory);
}
