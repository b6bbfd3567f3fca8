//! Which fonts photograph the characters, where Debian keeps them, and how the missing ones are installed.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{bail, ensure, Context, Result};

/// What a font is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Its images are trained on.
    Train,
    /// Trained on, and what the held-out fonts' images are searched in.
    Gallery,
    /// Never trained on; evaluation asks for its images.
    HeldOut,
}

/// A font as the table lists it.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    pub name: &'static str,
    pub package: &'static str,
    /// The file's name, without its folder: releases move files about.
    pub file: &'static str,
    /// Which face of a collection (.ttc); 0 for a file with one face.
    pub face: u32,
    pub role: Role,
}

const fn font(name: &'static str, package: &'static str, file: &'static str, face: u32, role: Role) -> Source {
    Source { name, package, file, face, role }
}

/// A collection's faces draw some characters as one region writes them. Noto: 0 Japan, 1 Korea, 2 mainland China, 3 Taiwan, 4 Hong
/// Kong; uming and ukai: 0 mainland China, 1 Taiwan. The weights of Noto take different regions, so that training sees several
/// habits.
///
/// Not listed on purpose: WenKai Light and Mono, wqy-zenhei's other faces and HanaMinB are near copies of held-out fonts, and
/// DroidSansFallback, TakaoPMincho and VL-PGothic are copies of fonts that are here.
pub const FONTS: [Source; 26] = [
    font("Noto Serif CJK Regular", "fonts-noto-cjk", "NotoSerifCJK-Regular.ttc", 2, Role::Gallery),
    font("Noto Serif CJK Bold", "fonts-noto-cjk", "NotoSerifCJK-Bold.ttc", 0, Role::Train),
    font("Noto Sans CJK Regular", "fonts-noto-cjk", "NotoSansCJK-Regular.ttc", 0, Role::Train),
    font("Noto Sans CJK Bold", "fonts-noto-cjk", "NotoSansCJK-Bold.ttc", 3, Role::Train),
    font("AR PL UMing", "fonts-arphic-uming", "uming.ttc", 0, Role::Train),
    font("AR PL UKai", "fonts-arphic-ukai", "ukai.ttc", 0, Role::Train),
    font("AR PL KaitiM Big5", "fonts-arphic-bkai00mp", "bkai00mp.ttf", 0, Role::Train),
    font("AR PL Mingti2L Big5", "fonts-arphic-bsmi00lp", "bsmi00lp.ttf", 0, Role::Train),
    font("AR PL SungtiL GB", "fonts-arphic-gbsn00lp", "gbsn00lp.ttf", 0, Role::Train),
    font("AR PL KaitiM GB", "fonts-arphic-gkai00mp", "gkai00mp.ttf", 0, Role::Train),
    font("WenQuanYi Micro Hei", "fonts-wqy-microhei", "wqy-microhei.ttc", 0, Role::Train),
    font("cwTeX Kai", "fonts-cwtex-kai", "cwkai.ttf", 0, Role::Train),
    font("cwTeX Ming", "fonts-cwtex-ming", "cwming.ttf", 0, Role::Train),
    font("cwTeX FangSong", "fonts-cwtex-fs", "cwfs.ttf", 0, Role::Train),
    font("cwTeX Hei Bold", "fonts-cwtex-heib", "cwheib.ttf", 0, Role::Train),
    font("Droid Sans Fallback", "fonts-droid-fallback", "DroidSansFallbackFull.ttf", 0, Role::Train),
    font("BabelStone Han", "fonts-babelstone-han", "BabelStoneHan.ttf", 0, Role::Train),
    font("CNS11643 Kai", "fonts-cns11643-kai", "TW-Kai-98_1.ttf", 0, Role::Train),
    font("CNS11643 Sung", "fonts-cns11643-sung", "TW-Sung-98_1.ttf", 0, Role::Train),
    font("Takao Mincho", "fonts-takao-mincho", "TakaoMincho.ttf", 0, Role::Train),
    font("VL Gothic", "fonts-vlgothic", "VL-Gothic-Regular.ttf", 0, Role::Train),
    font("LXGW WenKai Regular", "fonts-lxgw-wenkai", "LXGWWenKai-Regular.ttf", 0, Role::HeldOut),
    font("LXGW WenKai Bold", "fonts-lxgw-wenkai", "LXGWWenKai-Bold.ttf", 0, Role::HeldOut),
    font("WenQuanYi Zen Hei", "fonts-wqy-zenhei", "wqy-zenhei.ttc", 0, Role::HeldOut),
    font("HanaMinA", "fonts-hanazono", "HanaMinA.ttf", 0, Role::HeldOut),
    font("cwTeX Yen", "fonts-cwtex-yen", "cwyen.ttf", 0, Role::HeldOut),
];

/// A font and its file on this machine.
#[derive(Clone, Debug)]
pub struct Located {
    pub source: Source,
    pub path: PathBuf,
}

/// Finds the file of every font, after installing the packages that are missing.
pub fn locate_or_install() -> Result<Vec<Located>> {
    let missing = missing_packages()?;
    if !missing.is_empty() {
        install(&missing)?;
        let still = missing_packages()?;
        ensure!(still.is_empty(), "apt-get ran, but these packages are still not installed: {}", still.join(" "));
    }
    FONTS.iter().map(|source| Ok(Located { source: *source, path: find(source)? })).collect()
}

/// The fonts' packages that dpkg does not have, each once.
fn missing_packages() -> Result<Vec<&'static str>> {
    let mut missing = Vec::new();
    for source in &FONTS {
        if !missing.contains(&source.package) && files_of(source.package)?.is_none() {
            missing.push(source.package);
        }
    }
    Ok(missing)
}

/// The files of a package, or none if it is not installed (removed packages that left settings behind list no font).
fn files_of(package: &str) -> Result<Option<Vec<PathBuf>>> {
    let output =
        Command::new("dpkg").args(["-L", package]).stderr(Stdio::null()).output().context(
            "dpkg did not run; the fonts come from Debian or Ubuntu packages, so this example needs one of these systems",
        )?;
    let text = String::from_utf8_lossy(&output.stdout);
    let files: Vec<PathBuf> = text.lines().map(PathBuf::from).filter(|path| is_font(path) && path.exists()).collect();
    Ok((output.status.success() && !files.is_empty()).then_some(files))
}

fn is_font(path: &Path) -> bool {
    ["ttf", "ttc", "otf"].iter().any(|known| path.extension() == Some(OsStr::new(known)))
}

fn find(source: &Source) -> Result<PathBuf> {
    let files = files_of(source.package)?.unwrap_or_default();
    let found = files.iter().find(|path| path.file_name() == Some(OsStr::new(source.file)));
    found.cloned().with_context(|| {
        let has: Vec<String> = files.iter().map(|path| path.display().to_string()).collect();
        format!("package {} has no file {}; it has {}", source.package, source.file, has.join(", "))
    })
}

/// apt-get update and install, as root or through sudo.
fn install(packages: &[&str]) -> Result<()> {
    let by_hand = format!("apt-get install --no-install-recommends {}", packages.join(" "));
    let prefix: &[&str] = if is_root() {
        &[]
    } else if runs("sudo", &["--version"]) {
        &["sudo"]
    } else {
        bail!("these font packages are missing, and installing them takes root or sudo; as root, run: {by_hand}");
    };
    println!("Installing {} font packages: {}", packages.len(), packages.join(" "));
    // An old package list may name files that the mirrors no longer have. If it cannot be renewed, installing may still work.
    if let Err(error) = apt_get(prefix, &["update", "-q"]) {
        eprintln!("The package lists could not be renewed ({error:#}); trying to install all the same.");
    }
    let mut arguments = vec!["install", "-q", "-y", "--no-install-recommends"];
    arguments.extend(packages);
    apt_get(prefix, &arguments).with_context(|| format!("the fonts could not be installed; as root, run: {by_hand}"))
}

fn apt_get(prefix: &[&str], arguments: &[&str]) -> Result<()> {
    // env and not Command::env: sudo hands no environment on.
    let mut words = prefix.to_vec();
    words.extend(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
    words.extend(arguments);
    let status = Command::new(words[0])
        .args(&words[1..])
        .stdout(Stdio::null())
        .status()
        .with_context(|| format!("{} did not run", words[0]))?;
    ensure!(status.success(), "`{}` failed ({status})", words.join(" "));
    Ok(())
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

fn runs(program: &str, arguments: &[&str]) -> bool {
    Command::new(program).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn held_out_fonts_share_no_file_with_the_others() {
        let held_out: Vec<_> = FONTS.iter().filter(|font| font.role == Role::HeldOut).collect();
        assert_eq!(held_out.len(), 5);
        for font in held_out {
            assert!(!FONTS.iter().any(|other| other.role != Role::HeldOut && other.package == font.package), "{}", font.name);
        }
    }

    #[test]
    fn one_gallery_and_no_font_twice() {
        assert_eq!(FONTS.iter().filter(|font| font.role == Role::Gallery).count(), 1);
        for (at, font) in FONTS.iter().enumerate() {
            assert!(FONTS[..at].iter().all(|other| (other.name != font.name) && (other.file != font.file)), "{}", font.name);
        }
    }
}
