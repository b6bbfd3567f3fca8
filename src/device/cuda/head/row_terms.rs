//! A head's row terms on a GPU: the caller's arrays, wherever they lie, to and from the kernels.

use super::super::driver::MemorySpace;
use super::super::streams::StreamRole;
use super::{run, CudaHead};
use crate::device::HeadDevice;
use crate::row_terms::{MarginGradientArrays, RowTerm, RowTermArrays};
use crate::Result;

impl CudaHead {
    /// Takes the terms of this rank's rows. Kernels read what is in device memory where it is, in the order of the caller's stream.
    pub(super) fn take_terms(&mut self, terms: &RowTermArrays) -> Result<()> {
        if !self.spec.options.row_terms {
            return Ok(());
        }
        let mut there = [std::ptr::null_mut(); RowTerm::ALL.len()];
        for (place, (term, array)) in there.iter_mut().zip(RowTerm::ALL.into_iter().zip(terms.0)) {
            *place = match array.is_null() || self.batch() == 0 {
                true => std::ptr::null_mut(),
                false => self.readable_by_kernels(term, array)?.cast_mut(),
            };
        }
        let arrays = self.arrays();
        run!(self, Main, take_terms, (arrays, there[0].cast(), there[1].cast(), there[2].cast()));
        Ok(())
    }

    /// A caller's numbers, one for each row, where kernels can read them.
    fn readable_by_kernels(&self, term: RowTerm, array: *const f32) -> Result<*const f32> {
        if self.gpu.context.memory_space(term.name(), array.cast())? == MemorySpace::Device {
            return Ok(array);
        }
        let copy = self.row_arrays()?[term as usize];
        // SAFETY: the caller gave as many numbers as the batch has rows.
        unsafe {
            let bytes = std::slice::from_raw_parts(array.cast(), self.batch() * size_of::<f32>());
            self.staging.borrow_mut().copy(&self.gpu.stream, copy.cast(), bytes)
        }?;
        Ok(copy)
    }

    /// Memory of the head's for as many arrays of the host's.
    fn row_arrays(&self) -> Result<[*mut f32; 3]> {
        self.staging.borrow_mut().row_arrays(&self.gpu.stream, self.arrays().max_batch as usize)
    }

    pub(super) fn write_margin_gradients(&mut self, factor: f64, gradients: &MarginGradientArrays) -> Result<()> {
        if self.batch() == 0 {
            return Ok(());
        }
        let bytes = self.batch() * size_of::<f32>();
        let (mut there, mut of_host) = (gradients.0, [false; 2]);
        for (slot, (name, array)) in ["grad_m2", "grad_m3"].into_iter().zip(gradients.0).enumerate() {
            of_host[slot] =
                !array.is_null() && self.gpu.context.memory_space(name, array.cast_const().cast())? == MemorySpace::Host;
            if of_host[slot] {
                there[slot] = self.row_arrays()?[slot];
            }
        }
        let arrays = self.arrays();
        run!(self, Main, margin_gradients, (arrays, factor, there[0].cast(), there[1].cast()));
        self.pending_error()?;
        for slot in (0..2).filter(|&slot| of_host[slot]) {
            // SAFETY: the caller has room for a number for each row.
            unsafe { self.gpu.stream.download(gradients.0[slot].cast(), there[slot].cast(), bytes) }?;
        }
        match of_host.contains(&true) {
            // The caller's memory is the host's: it is written when the call returns.
            true => self.gpu.stream.synchronize(),
            false => Ok(()),
        }
    }
}
