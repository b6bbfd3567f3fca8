//! What callers pass in: checks of it, and copies from and to wherever it lies, in the host's memory or in the device's, which the
//! host does not read.

use super::{failure, BackwardCall, Head, LossTarget, StepInput};
use crate::device::{Device, Labels, UpdateCall};
use crate::matrix::{check_address, Matrix};
use crate::memory::{zeros, Buffer, Plain};
use crate::row_terms::MarginGradientArrays;
use crate::{ensure, error, Contribution, Result, Status};

/// Checks of a step's arguments.
impl Head {
    /// Where a loss pointer of the caller's lies. An unusable pointer is `Nowhere`, with the error that fails the step.
    pub fn loss_target(&self, loss: *mut f64) -> (LossTarget, Result<()>) {
        let rank = self.rank();
        let on_device = match loss.is_null() {
            true => Err(error!(InvalidArgument, "loss must not be NULL (rank {rank})")),
            false => check_address("loss", loss, 1).and_then(|()| self.backend.is_device_memory("loss", loss.cast_const().cast())),
        };
        match on_device {
            Ok(true) => (LossTarget::Device(loss), Ok(())),
            Ok(false) => (LossTarget::Host, Ok(())),
            Err(error) => (LossTarget::Nowhere, Err(error)),
        }
    }

    /// A forward's embeddings lie where the device can use them; after `prepare` they and the labels fit what it had.
    pub(super) fn check_input(&self, input: StepInput) -> Result<StepInput> {
        self.check_memory("embeddings", &input.embeddings)?;
        for (term, array) in input.terms.given() {
            self.check_row_array(term.name(), array, input.embeddings.rows)?;
        }
        match self.prepared.is_some() {
            true => self.check_prepared(input),
            false => Ok(input),
        }
    }

    /// A forward's labels, where `prepare` has had none.
    pub(super) fn require_labels(&self, input: &StepInput) -> Result<Labels> {
        input
            .labels
            .ok_or_else(|| error!(InvalidArgument, "labels must not be NULL without pfc_head_prepare (rank {})", self.rank()))
    }

    /// The labels of a batch that is not too large; an error names this rank, since it is for the others too.
    pub(super) fn check_batch(&self, labels: Contribution<Labels>) -> Contribution<Labels> {
        let largest = self.options.largest_batch(self.comm.size());
        let labels = labels.and_then(|labels| {
            ensure!(
                labels.count as u64 <= largest,
                InvalidArgument,
                "the batch must be at most {}{largest}, got {} rows (rank {})",
                if self.options.grows() { "" } else { "max_batch, " },
                labels.count,
                self.rank()
            );
            Ok(labels)
        });
        labels.map_err(|error| failure::on_rank(&error, self.rank()))
    }

    /// A forward after `prepare`: its batch, and its labels if it has any, are those of then.
    fn check_prepared(&self, input: StepInput) -> Result<StepInput> {
        let (batch, known) = self.backend.next_labels();
        let rows = input.embeddings.rows;
        ensure!(
            rows == batch,
            InvalidArgument,
            "embeddings.rows must be {batch}, the batch of pfc_head_prepare, got {rows} (rank {})",
            self.rank()
        );
        let given = match input.labels {
            Some(labels) if labels.count > 0 && !self.backend.is_device_memory("labels", labels.data.cast())? => Some(labels),
            _ => None,
        };
        if let (Some(labels), Some(known)) = (given, known) {
            // SAFETY: the caller of the head's entry gave this many labels, and they are in host memory.
            let labels = unsafe { labels.as_slice() };
            let differs = labels.iter().zip(known).position(|(now, then)| now != then);
            if let Some(row) = differs {
                return Err(error!(
                    InvalidArgument,
                    "labels[{row}] must be {}, as in pfc_head_prepare, got {} (rank {})",
                    known[row],
                    labels[row],
                    self.rank()
                ));
            }
        }
        Ok(input)
    }

    /// Whether the device writes to the matrix itself, while the host goes on.
    pub(super) fn is_on_device(&self, matrix: &Matrix) -> bool {
        self.device.streams().is_some() && self.backend.is_device_memory("a matrix", matrix.data).unwrap_or(false)
    }

    /// A matrix for the gradient of `rows` embeddings.
    pub(super) fn check_gradient(&self, gradient: Matrix, rows: usize) -> Result<Matrix> {
        ensure!(
            gradient.rows == rows,
            InvalidArgument,
            "grad_embeddings.rows must be {rows}, the batch, got {} (rank {})",
            gradient.rows,
            self.rank()
        );
        self.check_memory("grad_embeddings", &gradient)?;
        Ok(gradient)
    }

    pub(super) fn check_margin_gradients(&self, gradients: &MarginGradientArrays) -> Result<()> {
        gradients.given().try_for_each(|(name, array)| self.check_row_array(name, array.cast_const(), self.backend.batch()))
    }

    /// A number for each row, of a head that has row terms.
    fn check_row_array(&self, name: &str, array: *const f32, rows: usize) -> Result<()> {
        ensure!(
            self.options.row_terms,
            InvalidArgument,
            "{name} must be NULL for a head without row_terms, got {array:p} (rank {})",
            self.rank()
        );
        check_address(name, array, rows as u64)?;
        match rows {
            0 => Ok(()),
            _ => self.check_reachable(name, array),
        }
    }

    /// Whether the device can use a matrix where it lies.
    fn check_memory(&self, name: &str, matrix: &Matrix) -> Result<()> {
        match matrix.rows {
            0 => Ok(()),
            _ => self.check_reachable(name, matrix.data),
        }
    }

    pub(super) fn check_backward(&self, call: BackwardCall) -> Result<BackwardCall> {
        self.check_factor("loss_weight", call.loss_weight)?;
        self.check_factor("loss_scale", call.loss_scale)?;
        Ok(call)
    }

    /// An update whose factor, unless the device alone can read it, is all in one number.
    pub(super) fn check_update(&self, update: UpdateCall) -> Result<UpdateCall> {
        self.check_factor("learning_rate", update.learning_rate)?;
        let pointer = update.device_factor;
        if pointer.is_null() {
            return Ok(update);
        }
        check_address("device_factor", pointer, 1)?;
        if self.backend.is_device_memory("device_factor", pointer.cast())? {
            return Ok(update);
        }
        // SAFETY: the caller of the head's entry gave a number, and it is in host memory.
        let factor = update.factor * f64::from(unsafe { *pointer });
        Ok(UpdateCall { factor, device_factor: std::ptr::null(), ..update })
    }

    pub(super) fn check_factor(&self, name: &str, value: f64) -> Result<()> {
        ensure!(
            (0.0..=f64::from(f32::MAX)).contains(&value),
            InvalidArgument,
            "{name} must be a float32 of at least 0, got {value:?} (rank {})",
            self.rank()
        );
        Ok(())
    }
}

/// Callers' arrays, wherever they lie.
impl Head {
    /// Whether the head can use a caller's array where it lies. The error names the argument.
    pub fn check_reachable<T>(&self, name: &str, pointer: *const T) -> Result<()> {
        self.backend.is_device_memory(name, pointer.cast()).map(|_| ())
    }

    /// Refuses what the host writes by itself and cannot.
    pub fn require_host<T>(&self, name: &str, pointer: *const T) -> Result<()> {
        require_host(&*self.device, self.rank(), name, pointer)
    }

    /// Writes values to a caller's array; they are there when it returns.
    ///
    /// # Safety
    /// There is room for as many at `to`.
    pub unsafe fn write_values<T: Plain>(&self, name: &str, to: *mut T, values: &[T]) -> Result<()> {
        match values {
            [] => Ok(()),
            // Plain numbers are their bytes.
            values => {
                let bytes = std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values));
                self.backend.write_values(name, to.cast(), bytes)
            }
        }
    }

    /// The values of a caller's array.
    ///
    /// # Safety
    /// There are as many at `from`.
    pub(super) unsafe fn read_values<T: Plain + Default>(&self, name: &str, from: *const T, count: usize) -> Result<Vec<T>> {
        let mut values: Vec<T> = zeros(&[count], name)?;
        if count > 0 {
            // Plain numbers are their bytes.
            let bytes = std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values.as_slice()));
            self.backend.read_values(name, from.cast(), bytes)?;
        }
        Ok(values)
    }

    /// A caller's matrix where the host can read it, and the copy that it is of, if it is one.
    ///
    /// # Safety
    /// It describes memory of the host's or the device's.
    pub(super) unsafe fn readable(&self, name: &str, matrix: &Matrix) -> Result<(Matrix, Option<Buffer<u8>>)> {
        if matrix.rows == 0 || !self.backend.is_device_memory(name, matrix.data)? {
            return Ok((*matrix, None));
        }
        // What lies after the last row is not the matrix's.
        let elements = (matrix.rows - 1) * matrix.row_stride + matrix.cols;
        let mut copy = Buffer::zeroed(elements * matrix.dtype.size(), name)?;
        self.backend.read_values(name, matrix.data, &mut copy)?;
        Ok((Matrix { data: copy.as_mut_ptr(), ..*matrix }, Some(copy)))
    }
}

/// Refuses what the host writes by itself and cannot.
pub fn require_host<T>(device: &dyn Device, rank: u32, name: &str, pointer: *const T) -> Result<()> {
    let on_device = match device.is_device_memory(name, pointer.cast()) {
        // A device that has failed no longer knows any pointer, and what it does not know is the host's.
        Err(error) if error.status == Status::Device => false,
        known => known?,
    };
    ensure!(!on_device, InvalidArgument, "{name} must be in host memory, got device memory (rank {rank})");
    Ok(())
}
