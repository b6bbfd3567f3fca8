//! Finds nvcc.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::variable;

/// The first release that knows all architectures of kernels/nvcc.conf.
const OLDEST: (u32, u32) = (12, 8);

pub struct Nvcc {
    pub path: PathBuf,
    /// Such as (13, 0).
    pub release: (u32, u32),
    /// All that `nvcc --version` writes.
    pub version: String,
    /// Folders of headers that nvcc does not know itself.
    pub includes: Vec<PathBuf>,
}

impl Nvcc {
    /// $PFC_NVCC, $CUDA_HOME, $CUDA_PATH, PATH, then python3's packages. What PFC_NVCC names must work; of the others the first
    /// that is there is taken.
    pub fn find() -> Result<Nvcc, String> {
        if let Some(path) = variable("PFC_NVCC") {
            return Nvcc::new(PathBuf::from(path)).map_err(|e| format!("PFC_NVCC: {e}"));
        }
        let mut looked = vec!["$PFC_NVCC".to_owned()];
        for name in ["CUDA_HOME", "CUDA_PATH"] {
            looked.push(format!("${name}/bin/nvcc"));
            if let Some(path) = variable(name).map(|root| Path::new(&root).join("bin/nvcc")).filter(|path| path.is_file()) {
                return Nvcc::new(path);
            }
        }
        looked.push("PATH".to_owned());
        let on_path = std::env::var_os("PATH")
            .and_then(|path| std::env::split_paths(&path).map(|folder| folder.join("nvcc")).find(|file| file.is_file()));
        if let Some(path) = on_path {
            return Nvcc::new(path);
        }
        looked.push("python3's package nvidia-cuda-nvcc".to_owned());
        match in_python() {
            Some(path) => Nvcc::new(path),
            None => Err(format!(
                "nvcc was not found ({}); release {}.{} or later makes the CUDA kernels",
                looked.join(", "),
                OLDEST.0,
                OLDEST.1
            )),
        }
    }

    fn new(path: PathBuf) -> Result<Nvcc, String> {
        let shown = path.display().to_string();
        let output = Command::new(&path).arg("--version").output().map_err(|e| format!("{shown}: {e}"))?;
        let version = String::from_utf8_lossy(&output.stdout).into_owned();
        let release = release(&version).ok_or_else(|| format!("{shown} --version names no release"))?;
        if release < OLDEST {
            return Err(format!(
                "{shown} is release {}.{}; the kernels need {}.{} or later",
                release.0, release.1, OLDEST.0, OLDEST.1
            ));
        }
        Ok(Nvcc { includes: includes(&path), path, release, version })
    }
}

/// (13, 0) of "Cuda compilation tools, release 13.0, V13.0.88".
fn release(version: &str) -> Option<(u32, u32)> {
    let (_, rest) = version.split_once("release ")?;
    let (major, minor) = rest.split([',', '\n']).next()?.split_once('.')?;
    Some((major.trim().parse().ok()?, minor.trim().parse().ok()?))
}

/// The packages of CUDA 13 share one folder, and there nvcc finds the headers itself; those of CUDA 12 have one each.
fn includes(nvcc: &Path) -> Vec<PathBuf> {
    let packages = nvcc.ancestors().nth(3).filter(|_| nvcc.ends_with("cuda_nvcc/bin/nvcc"));
    let folders = packages
        .into_iter()
        .flat_map(|root| ["cuda_runtime", "cuda_nvcc", "cuda_cccl"].map(|name| root.join(name).join("include")));
    folders.filter(|folder| folder.is_dir()).collect()
}

/// nvcc among the packages that python3 sees. Those that PYTHONPATH and the user's own folder add are left out (-I): python would run
/// code of theirs.
fn in_python() -> Option<PathBuf> {
    let list = "import sys; print('\\n'.join(path for path in sys.path if path))";
    let output = Command::new("python3").args(["-I", "-c", list]).output().ok()?;
    let folders = String::from_utf8_lossy(&output.stdout).into_owned();
    let places = ["nvidia/cu13/bin/nvcc", "nvidia/cuda_nvcc/bin/nvcc"];
    folders.lines().flat_map(|folder| places.map(|place| Path::new(folder).join(place))).find(|path| path.is_file())
}
