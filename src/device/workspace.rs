//! How a workspace is divided into arrays.

use crate::memory::Plain;

/// Cuts arrays off a workspace, one after the other; counts their bytes where there is no workspace yet.
pub(super) struct WorkspaceCutter {
    start: *mut u8,
    bytes: u64,
    alignment: u64,
}

impl WorkspaceCutter {
    /// `start`, aligned to `alignment`, or NULL to count bytes. Every array begins at a multiple of `alignment` bytes from it.
    pub fn new(start: *mut u8, alignment: u64) -> WorkspaceCutter {
        WorkspaceCutter { start, bytes: 0, alignment }
    }

    /// The next `count` elements. A size that no memory holds saturates.
    pub fn take<T>(&mut self, count: u64) -> *mut T {
        let array = self.start.wrapping_add(self.bytes as usize);
        let bytes = count.saturating_mul(size_of::<T>() as u64);
        self.bytes = self.bytes.saturating_add(bytes.checked_next_multiple_of(self.alignment).unwrap_or(u64::MAX));
        array.cast()
    }

    /// The next `count` elements, for as long as the workspace is lent.
    ///
    /// # Safety
    /// The workspace is in host memory, has room for them, and any bytes are a `T`. Nothing else refers to it.
    pub unsafe fn slice<'a, T: Plain>(&mut self, count: usize) -> &'a mut [T] {
        let array = self.take(count as u64);
        match count {
            0 => &mut [],
            count => std::slice::from_raw_parts_mut(array, count),
        }
    }

    /// Bytes of the arrays so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Cuts again from where the arrays took `bytes`: what is taken next shares memory with what was taken since.
    pub fn rewind(&mut self, bytes: u64) {
        self.bytes = bytes;
    }
}
