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
mod tests {
    use super::*;
    use crate::Status;

    const fn arch(ptx: bool, major: u32, minor: u32, exact: bool) -> Arch {
        Arch { ptx, major, minor, exact }
    }

    const ALL: [Arch; 7] = [
        arch(false, 8, 0, false),
        arch(false, 8, 6, false),
        arch(false, 8, 9, false),
        arch(false, 9, 0, true),
        arch(false, 10, 0, false),
        arch(false, 12, 0, false),
        arch(true, 8, 0, false),
    ];
    const ROWS: Stem = Stem { name: "rows", everywhere: true };

    /// `rows` for all of ALL, each image's bytes being its index there.
    fn rows() -> Vec<Embedded> {
        const PLACES: [&[u8]; 7] = [&[0], &[1], &[2], &[3], &[4], &[5], &[6]];
        ALL.iter().zip(PLACES).map(|(&arch, bytes)| Embedded { stem: "rows", arch, bytes }).collect()
    }

    #[test]
    fn a_device_gets_the_best_image_that_runs_on_it() {
        let expect = [
            ((8, 0), 0),
            ((8, 6), 1),
            ((8, 7), 1),
            ((8, 9), 2),
            ((9, 0), 3),
            ((10, 0), 4),
            ((10, 3), 4),
            ((11, 0), 6),
            ((12, 0), 5),
            ((12, 1), 5),
            ((13, 0), 6),
        ];
        for (capability, index) in expect {
            let images = Images::choose(&[ROWS], &rows(), capability).unwrap();
            assert_eq!(images.list.len(), 1);
            assert_eq!(images.list[0].stem, "rows");
            assert_eq!(*images.list[0].bytes, [index], "{capability:?}");
        }
    }

    #[test]
    fn an_exact_image_is_for_its_own_capability() {
        let only_90a = [Embedded { stem: "rows", arch: arch(false, 9, 0, true), bytes: &[0] }];
        assert!(Images::choose(&[ROWS], &only_90a, (9, 0)).is_ok());
        for capability in [(8, 9), (9, 1), (10, 0)] {
            assert_eq!(Images::choose(&[ROWS], &only_90a, capability).unwrap_err().status, Status::Unsupported, "{capability:?}");
        }
        // Plain 9.0 serves where the exact one does not, and loses where it does.
        let both = [
            Embedded { stem: "rows", arch: arch(false, 9, 0, true), bytes: &[0] },
            Embedded { stem: "rows", arch: arch(false, 9, 0, false), bytes: &[1] },
        ];
        assert_eq!(*Images::choose(&[ROWS], &both, (9, 0)).unwrap().list[0].bytes, [0]);
        assert_eq!(*Images::choose(&[ROWS], &both, (9, 1)).unwrap().list[0].bytes, [1]);
    }

    #[test]
    fn a_device_that_nothing_fits_is_named() {
        let error = Images::choose(&[ROWS], &rows(), (7, 5)).unwrap_err();
        assert_eq!(error.status, Status::Unsupported);
        assert!(error.message.contains("capability 7.5") && error.message.contains(ARCHITECTURES), "{error}");
    }

    #[test]
    fn a_build_without_images_says_so() {
        let error = Images::choose(&[ROWS], &[], (9, 0)).unwrap_err();
        assert_eq!(error.status, Status::Unsupported);
        assert!(error.message.contains("contains no CUDA kernels"), "{error}");
    }

    #[test]
    fn sources_for_some_devices_are_left_out_on_the_others() {
        let stems = [ROWS, Stem { name: "hopper", everywhere: false }];
        let mut embedded = rows();
        embedded.push(Embedded { stem: "hopper", arch: arch(false, 9, 0, true), bytes: &[9] });
        let names = |capability| -> Vec<String> {
            let images = Images::choose(&stems, &embedded, capability).unwrap();
            images.list.iter().map(|image| image.stem.to_string()).collect()
        };
        assert_eq!(names((9, 0)), ["rows", "hopper"]);
        assert_eq!(names((8, 0)), ["rows"]);
        assert_eq!(names((12, 0)), ["rows"]);
    }

    #[test]
    fn images_are_read_from_a_folder() {
        let folder = std::env::temp_dir().join(format!("partialfc-images-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let stems = [ROWS, Stem { name: "hopper", everywhere: false }];
        let missing = Images::read(&stems, &folder).unwrap_err();
        std::fs::write(folder.join("rows.cubin"), b"image").unwrap();
        let images = Images::read(&stems, &folder);
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(missing.status, Status::Io);
        assert!(missing.message.contains("rows.cubin"), "{missing}");
        let images = images.unwrap();
        assert_eq!(images.list.len(), 1);
        assert_eq!(*images.list[0].bytes, *b"image");
    }

    #[test]
    fn an_older_driver_is_refused_with_both_versions() {
        assert!(check_release(Some((13, 0)), 13000).is_ok());
        assert!(check_release(Some((13, 0)), 13020).is_ok());
        assert!(check_release(Some((13, 2)), 13000).is_ok());
        assert!(check_release(None, 11040).is_ok());
        let error = check_release(Some((13, 0)), 12080).unwrap_err();
        assert_eq!(error.status, Status::Unsupported);
        for part in ["CUDA 12.8", "nvcc 13.0", "driver 580"] {
            assert!(error.message.contains(part), "{error}");
        }
    }

    #[test]
    fn embedded_images_are_whole() {
        for image in EMBEDDED {
            assert!(STEMS.iter().any(|stem| stem.name == image.stem));
            assert!(image.bytes.starts_with(&[0x50, 0xed, 0x55, 0xba]), "{}", image.stem);
        }
        assert_eq!(EMBEDDED.is_empty(), ARCHITECTURES == "none");
    }
}
