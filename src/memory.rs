//! Host memory that may be refused: large, aligned, zeroed arrays whose allocation failure is an error, not an abort.

use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};

use crate::{error, Result};

/// Wide enough for any vector load and for whole cache lines.
const ALIGNMENT: usize = 64;
/// From here on an allocation is worth huge pages.
const HUGE: usize = 8 << 20;

/// A zeroed array of plain numbers. Pages that are never touched cost nothing.
pub struct Buffer<T: Plain> {
    data: *mut T,
    len: usize,
}

/// Numbers for which all-zero bytes are a value.
///
/// # Safety
/// No padding, no drop, valid when zeroed.
pub unsafe trait Plain: Copy + Send + Sync + 'static {}
// SAFETY: plain numbers.
unsafe impl Plain for f32 {}
unsafe impl Plain for f64 {}
unsafe impl Plain for u64 {}
unsafe impl Plain for i64 {}
unsafe impl Plain for u8 {}

// SAFETY: owned memory of plain numbers.
unsafe impl<T: Plain> Send for Buffer<T> {}
unsafe impl<T: Plain> Sync for Buffer<T> {}

impl<T: Plain> Buffer<T> {
    /// `len` zeros. `what` names them in the error.
    pub fn zeroed(len: usize, what: &str) -> Result<Buffer<T>> {
        if len == 0 {
            return Ok(Buffer { data: std::ptr::NonNull::<T>::dangling().as_ptr(), len });
        }
        let refused = || error!(OutOfMemory, "{what}: {} bytes are not to be had", len as u128 * std::mem::size_of::<T>() as u128);
        let layout = Self::layout(len).ok_or_else(refused)?;
        // SAFETY: the layout is not empty; zero bytes are a value of T.
        let data = unsafe { alloc_zeroed(layout) }.cast::<T>();
        if data.is_null() {
            return Err(refused());
        }
        #[cfg(target_os = "linux")]
        if layout.size() >= HUGE {
            // Rows are read at random: with 4 KiB pages the TLB misses cost more than the bytes. A hint, its failure means nothing.
            let start = (data as usize).next_multiple_of(4096);
            let bytes = (data as usize + layout.size()).saturating_sub(start) & !4095;
            // SAFETY: whole pages inside the allocation.
            unsafe { libc::madvise(start as *mut libc::c_void, bytes, libc::MADV_HUGEPAGE) };
        }
        Ok(Buffer { data, len })
    }

    fn layout(len: usize) -> Option<Layout> {
        let bytes = len.checked_mul(std::mem::size_of::<T>())?;
        Layout::from_size_align(bytes, ALIGNMENT).ok()
    }

    /// A pointer that several threads may take disjoint parts from.
    pub fn parts(&mut self) -> Parts<'_, T> {
        Parts { data: self.data, len: self.len, borrow: PhantomData }
    }
}

impl<T: Plain> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: data points to len initialised values (dangling for 0).
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }
}

impl<T: Plain> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.len) }
    }
}

impl<T: Plain> Drop for Buffer<T> {
    fn drop(&mut self) {
        if let Some(layout) = Self::layout(self.len).filter(|_| self.len > 0) {
            // SAFETY: allocated by alloc_zeroed with this layout.
            unsafe { dealloc(self.data.cast(), layout) }
        }
    }
}

/// A mutable array, lent to several threads that promise to touch different parts.
#[derive(Clone, Copy)]
pub struct Parts<'a, T: Plain> {
    data: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `range`, whose caller answers for disjointness.
unsafe impl<T: Plain> Send for Parts<'_, T> {}
unsafe impl<T: Plain> Sync for Parts<'_, T> {}

impl<'a, T: Plain> Parts<'a, T> {
    pub fn of(slice: &'a mut [T]) -> Parts<'a, T> {
        Parts { data: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// # Safety
    /// No other thread holds a part that overlaps `range`.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn range(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        std::slice::from_raw_parts_mut(self.data.add(range.start), range.end - range.start)
    }
}
