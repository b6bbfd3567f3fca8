//! The kernels' images that build.rs embedded, and which of them a device loads.
//!
//! A cubin runs on its own compute capability and on later minor ones of the same major; that of an `a` architecture on its own
//! alone. Where none fits, the driver compiles the embedded PTX.

use std::borrow::Cow;
use std::path::Path;

use crate::{ensure, environment, error, Result};

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

/// The pipeline of a product's main loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pipeline {
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
    pub stages: u32,
}

/// How an entry is launched by images from a folder: with the last of the pipelines that the GPU has the shared memory for.
#[derive(Debug, PartialEq, Eq)]
pub struct Launch {
    pub entry: String,
    pub pipelines: Vec<Pipeline>,
}

/// The images that one device loads.
#[derive(Debug)]
pub struct Images {
    pub list: Vec<Image>,
    /// What holds over the launches that the library knows.
    pub launches: Vec<Launch>,
}

/// Beside images in a folder: how they are launched, where that is not as the library's own are.
const LAUNCHES: &str = "launches.txt";

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
        Ok(Images { list, launches: Vec::new() })
    }

    /// `<stem>.cubin` of every source; those of sources that are not for all devices may be missing, and so may `launches.txt`.
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
        let path = folder.join(LAUNCHES);
        let launches = match std::fs::read_to_string(&path) {
            Ok(text) => text.lines().map(|line| Launch::parse(line, &path)).collect::<Result<_>>()?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(error!(Io, "PFC_KERNEL_IMAGES: {}: {e}", path.display())),
        };
        Ok(Images { list, launches })
    }
}

impl Launch {
    /// `gemm_x 74496 2 148224 4`: the entry, and bytes and stages of each pipeline.
    fn parse(line: &str, path: &Path) -> Result<Launch> {
        let mut words = line.split_whitespace();
        let entry = words.next().unwrap_or_default().to_owned();
        let numbers: Vec<u32> = words.map_while(|word| word.parse().ok()).collect();
        let pipelines: Vec<Pipeline> = numbers.chunks_exact(2).map(|of| Pipeline { shared: of[0], stages: of[1] }).collect();
        // As many as were read, in pairs; the main loop waits for no other number of stages.
        let whole = line.split_whitespace().count() == 1 + 2 * pipelines.len() && !pipelines.is_empty();
        ensure!(
            whole && pipelines.iter().all(|pipeline| (2..=4).contains(&pipeline.stages)),
            InvalidArgument,
            "PFC_KERNEL_IMAGES: {}: a line must be a kernel, its bytes of shared memory and 2 to 4 stages, got {line:?}",
            path.display()
        );
        Ok(Launch { entry, pipelines })
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
