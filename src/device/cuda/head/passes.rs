//! A head's passes over its sample: the products of a forward, chunk by chunk.

use super::super::products::Offsets;
use super::super::streams::StreamRole;
use super::launch::run;
use super::CudaHead;

/// Multiprocessors that the weighted centers leave to the collectives beside them.
const RESERVED_BESIDE_WEIGHTED: u32 = 4;

impl CudaHead {
    /// W^ and P of a chunk of the current step.
    pub(super) fn numerators(&mut self, role: StreamRole, first: u32, offsets: Offsets) {
        let arrays = self.arrays();
        if !(first == 0 && std::mem::take(&mut self.drafts[self.current].gathered)) {
            self.gather(role, self.current, first);
        }
        self.product(role, "gemm_numerators", |products, stream| products.numerators(stream, arrays, first, offsets));
    }

    /// P of all chunks and P @ W^ of all but the last.
    pub(super) fn multiply(&mut self) {
        match self.spec.options.margin.has_row_offsets() {
            true => self.multiply_twice(),
            false => self.multiply_by(Offsets::Common),
        }
    }

    fn multiply_by(&mut self, offsets: Offsets) {
        for first in self.chunks() {
            if let Some(before) = self.deferred_chunk.replace(first) {
                self.weighted_centers(before);
            }
            self.numerators(StreamRole::Main, first, offsets);
        }
    }

    /// The same where rows may have offsets of their own: only the sums of all chunks tell which. Nothing tells the host, so that what
    /// finds them is always followed by what takes their tiles again.
    fn multiply_twice(&mut self) {
        let arrays = self.arrays();
        for first in self.chunks() {
            self.numerators(StreamRole::Main, first, Offsets::Common);
        }
        run!(self, Main, reduce_rows, (arrays,));
        run!(self, Main, find_far_rows, (arrays,));
        if self.sizes().keeps_probabilities() {
            // P is in its place but for the tiles with such rows, and W^ is there as well.
            self.deferred_chunk = Some(0);
            self.product(StreamRole::Main, "gemm_numerators", |products, stream| {
                products.numerators(stream, arrays, 0, Offsets::Own { far_only: true })
            });
        } else {
            self.multiply_by(Offsets::Own { far_only: false });
        }
    }

    /// What numerators that are computed again are relative to.
    pub(super) fn offsets(&self) -> Offsets {
        match self.spec.options.margin.has_row_offsets() {
            true => Offsets::Own { far_only: false },
            false => Offsets::Common,
        }
    }

    /// What is left to collectives, where any run beside the products.
    pub(super) fn reserved(&self, multiprocessors: u32) -> u32 {
        match self.spec.collectives_beside {
            true => multiprocessors,
            false => 0,
        }
    }

    /// P @ W^ of a chunk.
    pub(super) fn weighted_centers(&mut self, first: u32) {
        let (arrays, reserved) = (self.arrays(), self.reserved(RESERVED_BESIDE_WEIGHTED));
        self.product(StreamRole::Main, "gemm_weighted_centers", |products, stream| {
            products.weighted_centers(stream, arrays, first, reserved)
        });
    }
}
