//! Compiles kernels/*.cu with nvcc into one image for each source and architecture, and writes the table of them that
//! src/device/cuda/images.rs includes. Without nvcc the table is empty, and the library computes on the CPU alone.
//!
//! The `// launch:` lines of the sources become the constants that src/device/cuda/entries.rs includes.
//!
//! `PFC_CUDA=require` makes a missing nvcc or a failed compile an error of the build; `PFC_CUDA=off` does not look for one.
//! `PFC_CUDA_ARCHS` (such as "90a" or "80,90a,ptx80") replaces the architectures of kernels/nvcc.conf.

use std::collections::hash_map::DefaultHasher;
use std::collections::BTreeSet;
use std::fmt::{self, Write as _};
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;
use std::time::Instant;

use self::nvcc::Nvcc;

#[path = "nvcc.rs"]
mod nvcc;

const FOLDER: &str = "kernels";

/// The release from which every driver that runs the images reads them compressed, too: a fifth of their size.
const COMPRESSING: (u32, u32) = (13, 0);

/// An architecture that images are made for, as kernels/nvcc.conf writes it: "80", "90a", "ptx80".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Arch {
    ptx: bool,
    major: u32,
    minor: u32,
    /// An `a` architecture: its cubins run on this very compute capability.
    exact: bool,
}

impl Arch {
    fn parse(text: &str) -> Result<Arch, String> {
        let wrong = || format!("architecture {text:?} is none: write 80, 90a or ptx80");
        let (ptx, rest) = match text.strip_prefix("ptx") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let (digits, exact) = match rest.strip_suffix('a') {
            Some(digits) => (digits, true),
            None => (rest, false),
        };
        if digits.len() < 2 || !digits.bytes().all(|c| c.is_ascii_digit()) || (ptx && exact) {
            return Err(wrong());
        }
        let (major, minor) = digits.split_at(digits.len() - 1);
        let number = |digits: &str| digits.parse().map_err(|_| wrong());
        Ok(Arch { ptx, major: number(major)?, minor: number(minor)?, exact })
    }

    /// "80,90a" or "80 90a": each once, in the order written.
    fn list(text: &str) -> Result<Vec<Arch>, String> {
        let mut list = Vec::new();
        for word in text.split([',', ' ']).filter(|word| !word.is_empty()) {
            let arch = Arch::parse(word)?;
            if !list.contains(&arch) {
                list.push(arch);
            }
        }
        Ok(list)
    }

    /// The options for one image of this architecture alone, with the report of ptxas, which kernels/gates reads.
    fn nvcc_options(self) -> [String; 3] {
        let number = format!("{}{}{}", self.major, self.minor, if self.exact { "a" } else { "" });
        let code = if self.ptx { "compute" } else { "sm" };
        [format!("-gencode=arch=compute_{number},code={code}_{number}"), "-fatbin".to_owned(), "-Xptxas=-v".to_owned()]
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Arch { ptx, major, minor, exact } = *self;
        write!(f, "{}{major}{minor}{}", if ptx { "ptx" } else { "" }, if exact { "a" } else { "" })
    }
}

/// kernels/nvcc.conf.
struct Settings {
    architectures: Vec<Arch>,
    options: Vec<String>,
}

impl Settings {
    fn read() -> Result<Settings, String> {
        let path = Path::new(FOLDER).join("nvcc.conf");
        let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let mut settings = Settings { architectures: Vec::new(), options: Vec::new() };
        for line in text.lines() {
            match line.split_once(' ') {
                Some(("architectures", rest)) => settings.architectures = Arch::list(rest)?,
                Some(("options", rest)) => settings.options = words(rest),
                _ => {}
            }
        }
        if let Some(list) = variable("PFC_CUDA_ARCHS") {
            settings.architectures = Arch::list(&list).map_err(|e| format!("PFC_CUDA_ARCHS: {e}"))?;
        }
        if settings.architectures.is_empty() {
            return Err(format!("{}: no architectures", path.display()));
        }
        Ok(settings)
    }
}

/// A kernel source.
struct Source {
    path: PathBuf,
    stem: String,
    /// Its lines `// nvcc: ..`.
    options: Vec<String>,
    /// Its line `// architectures: ..`; None: all.
    only: Option<Vec<Arch>>,
    launches: Vec<Launch>,
}

/// A line `// launch: ..`, which kernels/ptx/shim.h explains.
struct Launch {
    entry: String,
    blocks: u32,
    per_multiprocessor: bool,
    threads: u32,
    shared: u32,
}

impl Launch {
    fn parse(text: &str) -> Result<Launch, String> {
        let (grid, per_multiprocessor) = (text.replacen(" per SM ", " ", 1), text.contains(" per SM "));
        let words = words(&grid);
        let number = |word: &String| word.parse::<u32>().ok();
        match words.as_slice() {
            [entry, b, blocks, t, threads, s, shared] if [b, t, s] == ["blocks", "threads", "shared"] => {
                if let [Some(blocks), Some(threads), Some(shared)] = [blocks, threads, shared].map(number) {
                    return Ok(Launch { entry: entry.clone(), blocks, per_multiprocessor, threads, shared });
                }
            }
            _ => {}
        }
        Err(format!("a launch line is `// launch: entry blocks N [per SM] threads N shared N`, got {text:?}"))
    }
}

impl fmt::Display for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Launch { entry, blocks, per_multiprocessor, threads, shared } = self;
        let grid = if *per_multiprocessor { "PerMultiprocessor" } else { "Fixed" };
        let shape = format!("LaunchShape {{ blocks: Blocks::{grid}({blocks}), threads: {threads}, shared: {shared} }}");
        write!(f, "pub(super) const {entry}: LaunchShape = {shape};")
    }
}

impl Source {
    /// kernels/*.cu, by name.
    fn all() -> Result<Vec<Source>, String> {
        let unreadable = |path: &Path, e: std::io::Error| format!("{}: {e}", path.display());
        let folder = Path::new(FOLDER);
        let mut paths = Vec::new();
        for entry in fs::read_dir(folder).map_err(|e| unreadable(folder, e))? {
            let path = entry.map_err(|e| unreadable(folder, e))?.path();
            if path.extension().is_some_and(|extension| extension == "cu") {
                paths.push(path);
            }
        }
        paths.sort();
        paths
            .into_iter()
            .map(|path| fs::read_to_string(&path).map_err(|e| unreadable(&path, e)).and_then(|t| Source::new(path, &t)))
            .collect()
    }

    fn new(path: PathBuf, text: &str) -> Result<Source, String> {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let mut source = Source { path, stem, options: Vec::new(), only: None, launches: Vec::new() };
        for line in text.lines() {
            if let Some(options) = line.strip_prefix("// nvcc:") {
                source.options.extend(words(options));
            } else if let Some(list) = line.strip_prefix("// architectures:") {
                let list = Arch::list(list).map_err(|e| format!("{}: {e}", source.path.display()))?;
                source.only = Some(list);
            } else if let Some(launch) = line.strip_prefix("// launch:") {
                source.launches.push(Launch::parse(launch.trim()).map_err(|e| format!("{}: {e}", source.path.display()))?);
            }
        }
        Ok(source)
    }
}

/// One image to be compiled.
struct Job<'a> {
    source: &'a Source,
    arch: Arch,
}

impl Job<'_> {
    fn file(&self, extension: &str) -> String {
        format!("{}.{}.{extension}", self.source.stem, self.arch)
    }

    fn image(&self) -> String {
        self.file("fatbin")
    }

    /// Compiles, unless the image that lies there is of the same text, options and compiler. What the compiler says is kept beside
    /// it.
    fn run(&self, nvcc: &Nvcc, settings: &Settings, folder: &Path) -> Result<(), String> {
        let start = Instant::now();
        let (image, log, key_file) = (folder.join(self.image()), folder.join(self.file("log")), folder.join(self.file("key")));
        let mut arguments = settings.options.clone();
        arguments.extend(self.source.options.iter().cloned());
        arguments.extend(self.arch.nvcc_options());
        if nvcc.release >= COMPRESSING {
            arguments.push("--compress-mode=size".to_owned());
        }
        arguments.extend(nvcc.includes.iter().map(|path| format!("-I{}", path.display())));
        arguments.push(format!("-I{FOLDER}"));

        let mut hasher = DefaultHasher::new();
        (&arguments, &nvcc.version).hash(&mut hasher);
        hash_text(&self.source.path, &mut BTreeSet::new(), &mut hasher);
        let key = format!("{:016x}", hasher.finish());
        if image.exists() && fs::read_to_string(&key_file).is_ok_and(|old| old == key) {
            return Ok(());
        }

        let fresh = folder.join(self.file("new"));
        let failed = |what: &dyn fmt::Display| format!("{} for {}: {what}", self.source.path.display(), self.arch);
        let output = Command::new(&nvcc.path)
            .args(&arguments)
            .arg(&self.source.path)
            .arg("-o")
            .arg(&fresh)
            .output()
            .map_err(|e| failed(&format!("{}: {e}", nvcc.path.display())))?;
        if !output.status.success() {
            return Err(failed(&String::from_utf8_lossy(&output.stderr).trim()));
        }
        let write = |path: &Path, bytes: &[u8]| fs::write(path, bytes).map_err(|e| failed(&format!("{}: {e}", path.display())));
        // The key last: it vouches for the image and the log.
        let _ = fs::remove_file(&key_file);
        fs::rename(&fresh, &image).map_err(|e| failed(&format!("{}: {e}", image.display())))?;
        write(&log, &[output.stdout, output.stderr].concat())?;
        write(&key_file, key.as_bytes())?;
        println!("compiled {} for {} in {:.1} s", self.source.path.display(), self.arch, start.elapsed().as_secs_f64());
        Ok(())
    }
}

/// Makes the images, their table and the launch shapes, and sets PFC_CUDA_IMAGES to the architectures.
pub fn build() {
    // Cargo looks into folders too.
    println!("cargo:rerun-if-changed={FOLDER}");
    for name in ["PFC_CUDA", "PFC_CUDA_ARCHS", "PFC_NVCC", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "PYTHONPATH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let sources = Source::all().unwrap_or_else(|e| stop(&e));
    let made = make(&sources, &out.join("images"));
    let (archs, absent) = match made {
        Ok(made) => (made, String::new()),
        Err(Missing::Chosen(reason)) => (Made::default(), reason),
        Err(Missing::Failed(reason)) => {
            for line in reason.lines() {
                println!("cargo:warning={line}");
            }
            println!(
                "cargo:warning=so this build computes on the CPU alone (PFC_CUDA=off: no warning; PFC_CUDA=require: an error)"
            );
            // The reason itself may name paths of this machine.
            (Made::default(), "no working nvcc was found when it was built".to_owned())
        }
    };
    let architectures = match archs.archs.as_slice() {
        [] => "none".to_owned(),
        list => list.iter().map(Arch::to_string).collect::<Vec<_>>().join(" "),
    };
    println!("cargo:rustc-env=PFC_CUDA_IMAGES={architectures}");
    let table = table(&sources, &archs, &absent);
    let launches: String = sources.iter().flat_map(|source| &source.launches).map(|launch| format!("{launch}\n")).collect();
    for (name, text) in [("images.rs", table), ("launches.rs", launches)] {
        fs::write(out.join(name), text).unwrap_or_else(|e| stop(&format!("{}: {e}", out.join(name).display())));
    }
}

/// The compiled architectures, and the release of nvcc that compiled them.
#[derive(Default)]
struct Made {
    archs: Vec<Arch>,
    release: Option<(u32, u32)>,
}

/// Why there are no images.
enum Missing {
    Chosen(String),
    Failed(String),
}

fn make(sources: &[Source], folder: &Path) -> Result<Made, Missing> {
    let required = match variable("PFC_CUDA").as_deref() {
        None => false,
        Some("require") => true,
        Some("off") => return Err(Missing::Chosen("PFC_CUDA was off when it was built".to_owned())),
        Some(other) => stop(&format!("PFC_CUDA is {other:?}: it may be require or off, or unset")),
    };
    // A wrong list of architectures is a mistake of who builds, whatever there is to build.
    let settings = Settings::read().unwrap_or_else(|e| stop(&e));
    let fail = |reason: String| match required {
        true => stop(&format!("PFC_CUDA=require: {reason}")),
        false => Missing::Failed(reason),
    };
    let nvcc = Nvcc::find().map_err(fail)?;
    println!("cargo:rerun-if-changed={}", nvcc.path.display());
    println!("{} is release {}.{}", nvcc.path.display(), nvcc.release.0, nvcc.release.1);
    fs::create_dir_all(folder).unwrap_or_else(|e| stop(&format!("{}: {e}", folder.display())));

    let jobs: Vec<Job> = sources
        .iter()
        .flat_map(|source| {
            let fits = |arch: &&Arch| source.only.as_ref().is_none_or(|only| only.contains(arch));
            settings.architectures.iter().filter(fits).map(move |&arch| Job { source, arch })
        })
        .collect();
    let (next, errors) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let threads = variable("NUM_JOBS").and_then(|n| n.parse().ok()).unwrap_or(1usize).clamp(1, jobs.len().max(1));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = job.run(&nvcc, &settings, folder) {
                        errors.lock().expect("no job panics").push(error);
                    }
                }
            });
        }
    });
    let errors = errors.into_inner().expect("no job panics");
    if let Some(first) = errors.first() {
        let more = if errors.len() > 1 { format!("\nand {} more failed", errors.len() - 1) } else { String::new() };
        return Err(fail(format!("{} failed on a kernel\n{first}{more}", nvcc.path.display())));
    }
    let archs = settings.architectures.iter().copied().filter(|&arch| jobs.iter().any(|job| job.arch == arch)).collect();
    Ok(Made { archs, release: Some(nvcc.release) })
}

/// The Rust text of the table.
fn table(sources: &[Source], made: &Made, absent: &str) -> String {
    let mut text = String::new();
    let mut line = |line: fmt::Arguments| writeln!(text, "{line}").expect("strings take all");
    line(format_args!("static STEMS: &[Stem] = &["));
    for Source { stem, only, .. } in sources {
        line(format_args!("    Stem {{ name: {stem:?}, everywhere: {} }},", only.is_none()));
    }
    line(format_args!("];"));
    line(format_args!("static EMBEDDED: &[Embedded] = &["));
    for source in sources {
        for &arch in made.archs.iter().filter(|arch| source.only.as_ref().is_none_or(|only| only.contains(arch))) {
            let (job, stem) = (Job { source, arch }, &source.stem);
            let Arch { ptx, major, minor, exact } = arch;
            line(format_args!(
                "    Embedded {{ stem: {stem:?}, arch: Arch {{ ptx: {ptx}, major: {major}, minor: {minor}, exact: {exact} }}, \
                 bytes: include_bytes!(concat!(env!(\"OUT_DIR\"), \"/images/{}\")) }},",
                job.image()
            ));
        }
    }
    line(format_args!("];"));
    line(format_args!("/// The release of the nvcc that made them."));
    line(format_args!("const RELEASE: Option<(u32, u32)> = {:?};", made.release));
    line(format_args!("/// Why there are none."));
    line(format_args!("const ABSENT: &str = {absent:?};"));
    text
}

/// Hashes a file and the files under kernels/ that it includes.
fn hash_text(path: &Path, seen: &mut BTreeSet<PathBuf>, hasher: &mut DefaultHasher) {
    let Ok(path) = path.canonicalize() else { return };
    let inside = Path::new(FOLDER).canonicalize().is_ok_and(|folder| path.starts_with(folder));
    if !inside || !seen.insert(path.clone()) {
        return;
    }
    let Ok(text) = fs::read_to_string(&path) else { return };
    text.hash(hasher);
    for line in text.lines() {
        let Some(rest) = line.trim_start().strip_prefix('#').and_then(|rest| rest.trim_start().strip_prefix("include")) else {
            continue;
        };
        let Some(name) = rest.trim_start().strip_prefix('"').and_then(|rest| rest.split('"').next()) else { continue };
        for folder in [path.parent().unwrap_or(Path::new(FOLDER)), Path::new(FOLDER)] {
            hash_text(&folder.join(name), seen, hasher);
        }
    }
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// An environment variable that is set to something.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Ends the build; cargo shows what was written to stderr.
fn stop(reason: &str) -> ! {
    eprintln!("{reason}");
    std::process::exit(1)
}
