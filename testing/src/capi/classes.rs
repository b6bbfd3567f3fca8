//! Other classes for a head.

use partialfc::capi::classes as c_classes;
use partialfc::capi::classes::pfc_remap_options;

use super::{outcome, Head, Outcome};

impl Head {
    pub fn resize(&mut self, num_classes: u64) -> Outcome {
        // SAFETY: a live handle, the defaults.
        outcome(unsafe { c_classes::pfc_head_resize(self.raw, num_classes, std::ptr::null()) })
    }

    pub fn remap(&mut self, num_classes: u64, class_map: &[i64]) -> Outcome {
        let (data, count) = (class_map.as_ptr(), class_map.len() as u64);
        // SAFETY: a live handle, a table that outlives the call, the defaults.
        outcome(unsafe { c_classes::pfc_head_remap(self.raw, num_classes, data, count, std::ptr::null()) })
    }

    /// With what each of the head's `classes` classes counts. Returns their new numbers.
    pub fn merge(&mut self, from: &[i64], into: &[i64], classes: u64, class_weights: Option<&[f32]>) -> Outcome<Vec<i64>> {
        assert_eq!(from.len(), into.len(), "a class for each");
        let mut class_map = vec![-77; classes as usize];
        // SAFETY: a live handle, arrays that outlive the call; all zeros is a value of the options, the size is their own.
        unsafe {
            let mut options: pfc_remap_options = std::mem::zeroed();
            outcome(c_classes::pfc_remap_options_init_sized(&mut options, size_of::<pfc_remap_options>() as u64))?;
            if let Some(weights) = class_weights {
                (options.class_weights, options.class_weights_count) = (weights.as_ptr(), weights.len() as u64);
            }
            let (from, into, count) = (from.as_ptr(), into.as_ptr(), from.len() as u64);
            outcome(c_classes::pfc_head_merge(self.raw, from, into, count, class_map.as_mut_ptr(), classes, &options))?;
        }
        Ok(class_map)
    }
}
