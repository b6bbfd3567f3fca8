//! Host memory that may be refused: large, aligned, zeroed arrays whose allocation failure is an error, not an abort.

use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};

use crate::{error, Result};

/// Wide enough for any vector load and for whole cache lines.
const ALIGNMENT: usize = 64;
/// What the system gives at once where it gives huge pages.
const HUGE_PAGE: usize = 2 << 20;
/// From here on an allocation is worth huge pages: the last one is not full.
const MAPPED: usize = 8 * HUGE_PAGE;

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
unsafe impl Plain for u16 {}
unsafe impl Plain for i32 {}
unsafe impl Plain for u32 {}
unsafe impl Plain for f32 {}
unsafe impl Plain for f64 {}
unsafe impl Plain for u64 {}
unsafe impl Plain for i64 {}
unsafe impl Plain for u8 {}
unsafe impl Plain for usize {}

// SAFETY: owned memory of plain numbers.
unsafe impl<T: Plain> Send for Buffer<T> {}
unsafe impl<T: Plain> Sync for Buffer<T> {}

impl<T: Plain> Buffer<T> {
    /// `len` zeros. `what` names them in the error.
    pub fn zeroed(len: usize, what: &str) -> Result<Buffer<T>> {
        let size = std::mem::size_of::<T>();
        let data = match len.checked_mul(size) {
            Some(0) => std::ptr::NonNull::<T>::dangling().as_ptr(),
            Some(bytes) if bytes <= isize::MAX as usize - HUGE_PAGE => allocate(bytes).cast(),
            _ => std::ptr::null_mut(),
        };
        match data.is_null() {
            true => Err(error!(OutOfMemory, "cannot allocate {} bytes for {what}", len as u128 * size as u128)),
            false => Ok(Buffer { data, len }),
        }
    }

    fn bytes(&self) -> usize {
        self.len * std::mem::size_of::<T>()
    }

    /// A pointer that several threads may take disjoint parts from.
    pub fn parts(&mut self) -> Parts<'_, T> {
        Parts { data: self.data, len: self.len, borrow: PhantomData }
    }
}

impl<T: Plain> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: data points to len initialized values (dangling for 0).
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
        if self.len > 0 {
            // SAFETY: from `allocate` with as many bytes.
            unsafe { release(self.data.cast(), self.bytes()) }
        }
    }
}

fn small_layout(bytes: usize) -> Layout {
    // The alignment is a power of two and the size far below isize::MAX.
    Layout::from_size_align(bytes, ALIGNMENT).expect("a size that was checked")
}

/// Zeros, aligned to [`ALIGNMENT`]; NULL where there are none. `bytes` is not 0.
fn allocate(bytes: usize) -> *mut u8 {
    #[cfg(target_os = "linux")]
    if bytes >= MAPPED {
        let length = bytes.next_multiple_of(HUGE_PAGE);
        // Mapped, not malloc'ed: rows are read at random, and with 4 KiB pages the TLB misses cost more than the bytes, so the hint
        // must come before the first touch; and the threads that fill the pages are then those that touch them first.
        // SAFETY: a fresh private mapping; the hint's failure means nothing.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let data = libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            if data == libc::MAP_FAILED {
                return std::ptr::null_mut();
            }
            libc::madvise(data, length, libc::MADV_HUGEPAGE);
            return data.cast();
        }
    }
    // SAFETY: the layout is not empty.
    unsafe { alloc_zeroed(small_layout(bytes)) }
}

/// # Safety
/// `data` is from `allocate(bytes)`.
unsafe fn release(data: *mut u8, bytes: usize) {
    #[cfg(target_os = "linux")]
    if bytes >= MAPPED {
        libc::munmap(data.cast(), bytes.next_multiple_of(HUGE_PAGE));
        return;
    }
    dealloc(data, small_layout(bytes));
}

/// A tensor of zeros, or what it would have taken.
pub(crate) fn zeros<T: Clone + Default>(shape: &[usize], what: &str) -> Result<Vec<T>> {
    let length = shape.iter().fold(1usize, |product, &side| product.saturating_mul(side));
    let mut values = Vec::new();
    reserve(&mut values, length, what)?;
    values.resize(length, T::default());
    Ok(values)
}

/// Makes room for exactly `more` values, or says what they would have taken.
pub(crate) fn reserve<T>(values: &mut Vec<T>, more: usize, what: &str) -> Result<()> {
    let bytes = more.saturating_mul(std::mem::size_of::<T>());
    values.try_reserve_exact(more).map_err(|_| error!(OutOfMemory, "cannot allocate {bytes} bytes for {what}"))
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
    /// No other thread writes what is in `range`.
    pub unsafe fn shared(&self, range: Range<usize>) -> &'a [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        std::slice::from_raw_parts(self.data.add(range.start), range.end - range.start)
    }

    /// # Safety
    /// No other thread holds a part that overlaps `range`.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn range(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        std::slice::from_raw_parts_mut(self.data.add(range.start), range.end - range.start)
    }
}
