//! The kernels' images that build.rs embedded, and which of them a device loads.
//!
//! A cubin runs on its own compute capability and on later minor ones of the same major; that of an `a` architecture on its own
//! alone. Where none fits, the driver compiles the embedded PTX.

use std::borrow::Cow;
use std::path::Path;

use crate::{environment, error, Result};

/// A kernel source.
struct Stem {
    name: &'static str,
    /// It is compiled for every architecture; others are for devices that have what they need.
    everywhere: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Arch {
    ptx: bool,
    major: u32,
    minor: u32,
    exact: bool,
}

impl Arch {
    fn runs_on(self, (major, minor): (u32, u32)) -> bool {
        match self {
            Arch { ptx: true, .. } => (self.major, self.minor) <= (major, minor),
            Arch { exact: true, .. } => (self.major, self.minor) == (major, minor),
            _ => self.major == major && self.minor <= minor,
        }
    }

    /// Orders images that run on a device, the best last: compiled before PTX, made for this very device, then the later.
    fn rank(self) -> (bool, bool, u32, u32) {
        (!self.ptx, self.exact, self.major, self.minor)
    }
}

/// One source, compiled for one architecture.
struct Embedded {
    stem: &'static str,
    arch: Arch,
    bytes: &'static [u8],
}

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// The architectures of this build, such as "80 90a ptx80", or "none".
pub const ARCHITECTURES: &str = env!("PFC_CUDA_IMAGES");

/// A module for the driver to load.
#[derive(Debug)]
pub struct Image {
    /// Name of the kernel source, without .cu.
    pub stem: Cow<'static, str>,
    /// A fatbin of one architecture's code; from PFC_KERNEL_IMAGES a cubin or a fatbin.
    pub bytes: Cow<'static, [u8]>,
}

/// The images that one device loads.
#[derive(Debug)]
pub struct Images {
    pub list: Vec<Image>,
}

impl Images {
    /// The images for a device of this compute capability; from the folder that PFC_KERNEL_IMAGES names, if it names one.
    pub fn for_device(capability: (u32, u32)) -> Result<Images> {
        match environment::setting("PFC_KERNEL_IMAGES") {
            Some(folder) => Images::read(STEMS, Path::new(&folder)),
            None => Images::choose(STEMS, EMBEDDED, capability),
        }
    }

    /// The image of a kernel source.
    pub fn of(&self, stem: &str) -> Result<&[u8]> {
        let image = self.list.iter().find(|image| image.stem == stem);
        image.map(|image| &*image.bytes).ok_or_else(|| error!(Unsupported, "this build of the library contains no image of {stem}"))
    }

    fn choose(stems: &[Stem], embedded: &[Embedded], capability: (u32, u32)) -> Result<Images> {
        let (major, minor) = capability;
        if embedded.is_empty() {
            return Err(error!(Unsupported, "this build of the library contains no CUDA kernels: {ABSENT}"));
        }
        let mut list = Vec::new();
        for stem in stems {
            let fitting = embedded.iter().filter(|image| image.stem == stem.name && image.arch.runs_on(capability));
            match fitting.max_by_key(|image| image.arch.rank()) {
                Some(image) => list.push(Image { stem: stem.name.into(), bytes: image.bytes.into() }),
                None if stem.everywhere => {
                    return Err(error!(
                        Unsupported,
                        "this build of the library has no kernels for compute capability {major}.{minor}, only for {ARCHITECTURES}"
                    ))
                }
                None => {}
            }
        }
        Ok(Images { list })
    }

    /// `<stem>.cubin` of every source; those of sources that are not for all devices may be missing.
    fn read(stems: &[Stem], folder: &Path) -> Result<Images> {
        let mut list = Vec::new();
        for stem in stems {
            let path = folder.join(format!("{}.cubin", stem.name));
            match std::fs::read(&path) {
                Ok(bytes) => list.push(Image { stem: stem.name.into(), bytes: bytes.into() }),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound && !stem.everywhere => {}
                Err(e) => return Err(error!(Io, "PFC_KERNEL_IMAGES: {}: {e}", path.display())),
            }
        }
        Ok(Images { list })
    }
}

/// Refuses a driver that is older than the nvcc that made the images. `version` is what cuDriverGetVersion tells: 13000 is 13.0.
///
/// Cubins run with every driver of their CUDA's major version; PTX asks for the minor too, and its loading says so itself.
pub fn check_driver(version: i32) -> Result<()> {
    check_release(RELEASE, version)
}

fn check_release(release: Option<(u32, u32)>, version: i32) -> Result<()> {
    let Some((major, minor)) = release else { return Ok(()) };
    if version / 1000 >= major as i32 {
        return Ok(());
    }
    // The first driver of a major version; those of later ones are named by their CUDA alone.
    let driver = match major {
        12 => " (driver 525)",
        13 => " (driver 580)",
        _ => "",
    };
    let (has, has_minor) = (version / 1000, version % 1000 / 10);
    Err(error!(
        Unsupported,
        "the driver must be of CUDA {major}.0{driver} or later, got CUDA {has}.{has_minor}: nvcc {major}.{minor} built the kernels of \
         this library"
    ))
}

#[cfg(test)]
mod tests;
