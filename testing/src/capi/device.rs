//! Devices, and which of them a suite runs on.

use partialfc::capi::device::{pfc_device, pfc_device_cpu, pfc_device_cuda, pfc_device_free};
use partialfc::options::Precision;

use super::outcome;
use crate::emulator;

pub struct Device(pub *mut pfc_device);

// SAFETY: a device may be used from several threads at once.
unsafe impl Send for Device {}
unsafe impl Sync for Device {}

impl Device {
    pub fn cpu(threads: u32) -> Device {
        let mut raw = std::ptr::null_mut();
        // SAFETY: an output that outlives the call.
        outcome(unsafe { pfc_device_cpu(threads, &mut raw) }).expect("a CPU device");
        Device(raw)
    }

    /// What a suite runs on: the CPU, with so many threads; with `PFC_TEST_DEVICE=cuda` GPU 0 of the driver that [`emulator`] names.
    pub fn under_test(threads: u32) -> Device {
        if !on_cuda() {
            return Device::cpu(threads);
        }
        emulator::ready();
        let mut raw = std::ptr::null_mut();
        // SAFETY: an output that outlives the call; the default stream.
        outcome(unsafe { pfc_device_cuda(0, std::ptr::null_mut(), &mut raw) }).expect("GPU 0");
        Device(raw)
    }
}

/// Whether suites that take any device run on a GPU.
pub fn on_cuda() -> bool {
    match std::env::var("PFC_TEST_DEVICE").as_deref() {
        Ok("cuda") => true,
        Ok("cpu") | Err(std::env::VarError::NotPresent) => false,
        other => panic!("PFC_TEST_DEVICE must be cpu or cuda, got {other:?}"),
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if on_cuda() && !std::thread::panicking() {
            let findings = emulator::findings();
            assert!(findings.is_empty(), "the emulator's findings:\n{findings}");
        }
        // SAFETY: made by pfc_device_cpu, freed once.
        unsafe { pfc_device_free(self.0) };
    }
}

/// The precision of heads that are not asked for one: float32, to which the suites hold every device, unless `PFC_TEST_PRECISION` is half.
pub fn tested_precision() -> Precision {
    match std::env::var("PFC_TEST_PRECISION").as_deref() {
        Ok("f32") | Err(std::env::VarError::NotPresent) => Precision::F32,
        Ok("half") => Precision::Half,
        other => panic!("PFC_TEST_PRECISION must be f32 or half, got {other:?}"),
    }
}

/// Where heads that are not asked for anything else keep their rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TestedResidency {
    Device,
    Host,
    /// On the CPU alone.
    File,
}

impl TestedResidency {
    /// `PFC_TEST_RESIDENCY`.
    pub fn get() -> TestedResidency {
        match std::env::var("PFC_TEST_RESIDENCY").as_deref() {
            Ok("device") | Err(std::env::VarError::NotPresent) => TestedResidency::Device,
            Ok("host") => TestedResidency::Host,
            Ok("file") if !on_cuda() => TestedResidency::File,
            other => panic!("PFC_TEST_RESIDENCY must be device, host or, on a CPU, file, got {other:?}"),
        }
    }
}
