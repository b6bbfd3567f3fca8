//! A GPU through the driver's own functions: memory as callers have it, and a device for this thread.

use std::ffi::{c_char, c_void, CStr};

use partialfc::capi::device::pfc_device_cuda;
use partialfc::capi::types::pfc_matrix;
use partialfc::matrix::DType;

use super::ffi::{outcome, Device};

pub fn driver_function(name: &CStr) -> *mut c_void {
    // SAFETY: a name that ends; the driver is loaded for everyone to see.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr().cast::<c_char>()) };
    assert!(!found.is_null(), "{name:?}");
    found
}

/// Memory on the GPU, of `values` to begin with.
pub struct Remote {
    pub address: u64,
    bytes: usize,
}

impl Remote {
    pub fn of<T: Copy>(values: &[T]) -> Remote {
        let bytes = std::mem::size_of_val(values);
        let mut address = 0u64;
        // SAFETY: the driver's functions, of these types; the device's context is current on this thread.
        unsafe {
            let alloc: unsafe extern "C" fn(*mut u64, usize) -> i32 = std::mem::transmute(driver_function(c"cuMemAlloc_v2"));
            let copy: unsafe extern "C" fn(u64, *const c_void, usize) -> i32 =
                std::mem::transmute(driver_function(c"cuMemcpyHtoD_v2"));
            assert_eq!((alloc(&mut address, bytes), copy(address, values.as_ptr().cast(), bytes)), (0, 0));
        }
        Remote { address, bytes }
    }

    pub fn read<T: Copy + Default>(&self) -> Vec<T> {
        let mut values = vec![T::default(); self.bytes / std::mem::size_of::<T>()];
        // SAFETY: as above; as many bytes.
        unsafe {
            let copy: unsafe extern "C" fn(*mut c_void, u64, usize) -> i32 =
                std::mem::transmute(driver_function(c"cuMemcpyDtoH_v2"));
            assert_eq!(copy(values.as_mut_ptr().cast(), self.address, self.bytes), 0);
        }
        values
    }

    /// Of float32 values, so many a row.
    pub fn matrix(&self, cols: usize) -> pfc_matrix {
        let (rows, cols) = ((self.bytes / 4 / cols) as u64, cols as u64);
        pfc_matrix { data: self.address as *mut c_void, dtype: DType::F32 as i32, reserved: 0, rows, cols, row_stride: cols }
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        // SAFETY: made by `of`; every test waits for its steps first.
        unsafe {
            let free: unsafe extern "C" fn(u64) -> i32 = std::mem::transmute(driver_function(c"cuMemFree_v2"));
            free(self.address);
        }
    }
}

/// GPU 0 with the default stream, its primary context current on this thread.
pub fn gpu() -> Device {
    let mut raw = std::ptr::null_mut();
    // SAFETY: an output that outlives the call; the default stream. The primary context is made current for this thread.
    unsafe {
        let init: unsafe extern "C" fn(u32) -> i32 = std::mem::transmute(driver_function(c"cuInit"));
        let retain: unsafe extern "C" fn(*mut *mut c_void, i32) -> i32 =
            std::mem::transmute(driver_function(c"cuDevicePrimaryCtxRetain"));
        let set: unsafe extern "C" fn(*mut c_void) -> i32 = std::mem::transmute(driver_function(c"cuCtxSetCurrent"));
        let mut context = std::ptr::null_mut();
        assert_eq!((init(0), retain(&mut context, 0), set(context)), (0, 0, 0));
        outcome(pfc_device_cuda(0, std::ptr::null_mut(), &mut raw)).expect("GPU 0");
    }
    Device(raw)
}
