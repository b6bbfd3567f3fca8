//! All photographs in memory, their cache file, and who is a class.
//!
//! The cache holds bytes as they were drawn, font after font; which characters become classes is worked out on loading, so that
//! options which choose classes need no new cache.

use std::fs::File;
use std::io::{BufReader, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Result};

use crate::fonts::{Located, Role};
use crate::render::{Photographs, FIRST, LAST, PIXELS, RENDER_VERSION, SIDE};

/// A character needs this many training fonts to be a class.
pub const LEAST_FONTS: usize = 4;
const MAGIC: &[u8; 8] = b"pfcglyph";
const CODES: usize = (LAST - FIRST + 1) as usize;

/// One font's photographs.
pub struct Album {
    pub name: String,
    pub role: Role,
    pub photographs: Photographs,
}

/// A training image: the album, the place in it, and its class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shot {
    pub album: u16,
    pub place: u16,
    pub label: u32,
}

pub struct Dataset {
    pub albums: Vec<Album>,
    /// The class of a character, by its code less FIRST.
    labels: Vec<Option<u32>>,
    /// The character of a class.
    pub characters: Vec<char>,
    /// The training images.
    pub shots: Vec<Shot>,
}

impl Dataset {
    /// Splits the albums: characters with enough training fonts become classes, at most `limit` of them, spread evenly over the
    /// code points; their images in training fonts become shots.
    pub fn new(albums: Vec<Album>, limit: Option<usize>) -> Result<Dataset> {
        let mut fonts = vec![0usize; CODES];
        let trained = |album: &&Album| album.role != Role::HeldOut;
        for album in albums.iter().filter(trained) {
            album.photographs.codes.iter().for_each(|&code| fonts[code as usize] += 1);
        }
        let mut chosen: Vec<usize> = (0..CODES).filter(|&code| fonts[code] >= LEAST_FONTS).collect();
        if let Some(limit) = limit.filter(|&limit| limit < chosen.len()) {
            chosen = (0..limit).map(|at| chosen[at * chosen.len() / limit]).collect();
        }
        ensure!(!chosen.is_empty(), "no character has {LEAST_FONTS} training fonts, so there is nothing to train on");
        let mut labels = vec![None; CODES];
        chosen.iter().enumerate().for_each(|(label, &code)| labels[code] = Some(label as u32));
        let mut shots = Vec::new();
        for (at, album) in albums.iter().enumerate().filter(|(_, album)| trained(album)) {
            for (place, &code) in album.photographs.codes.iter().enumerate() {
                if let Some(label) = labels[code as usize] {
                    shots.push(Shot { album: at as u16, place: place as u16, label });
                }
            }
        }
        let characters = chosen.iter().filter_map(|&code| char::from_u32(FIRST + code as u32)).collect();
        Ok(Dataset { albums, labels, characters, shots })
    }

    pub fn classes(&self) -> usize {
        self.characters.len()
    }

    pub fn picture(&self, shot: Shot) -> &[u8] {
        self.albums[shot.album as usize].picture(shot.place as usize)
    }

    /// An album's images of classes: what evaluation compares.
    pub fn shots_of(&self, album: usize) -> Vec<Shot> {
        let codes = self.albums[album].photographs.codes.iter().enumerate();
        codes
            .filter_map(|(place, &code)| {
                Some(Shot { album: album as u16, place: place as u16, label: self.labels[code as usize]? })
            })
            .collect()
    }

    pub fn albums_with(&self, role: Role) -> Vec<usize> {
        (0..self.albums.len()).filter(|&at| self.albums[at].role == role).collect()
    }
}

impl Album {
    pub fn picture(&self, place: usize) -> &[u8] {
        &self.photographs.pixels[place * PIXELS..][..PIXELS]
    }
}

/// The albums from the cache, or drawn anew; `drawn` hears of each font before it is drawn.
pub fn albums(fonts: &[Located], folder: &Path, mut drawn: impl FnMut(usize, &Located)) -> Result<(Vec<Album>, PathBuf, bool)> {
    let digest = digest(fonts)?;
    let path = folder.join(format!("glyphs-v{RENDER_VERSION}-{digest:016x}.bin"));
    let cached = match read_cache(&path, digest, fonts.len()) {
        Ok(photographs) => photographs,
        Err(error) => {
            eprintln!("{error:#}; drawing the characters anew.");
            None
        }
    };
    let hit = cached.is_some();
    let photographs = match cached {
        Some(photographs) => photographs,
        None => {
            let mut all = Vec::with_capacity(fonts.len());
            for (at, font) in fonts.iter().enumerate() {
                drawn(at, font);
                all.push(crate::render::photograph(font)?);
            }
            std::fs::create_dir_all(folder).with_context(|| format!("could not make the cache folder {}", folder.display()))?;
            write_cache(&path, digest, &all).with_context(|| format!("could not write the cache {}", path.display()))?;
            all
        }
    };
    let name = |font: &Located| font.source.name.to_string();
    let albums =
        fonts.iter().zip(photographs).map(|(font, photographs)| Album { name: name(font), role: font.source.role, photographs });
    Ok((albums.collect(), path, hit))
}

/// What the pictures depend on: how they are drawn, and the fonts by name, face and size.
fn digest(fonts: &[Located]) -> Result<u64> {
    let mut text = format!("{RENDER_VERSION} {SIDE} {FIRST} {LAST}\n");
    for font in fonts {
        let size = std::fs::metadata(&font.path).with_context(|| format!("could not read {}", font.path.display()))?.len();
        text += &format!("{} {} {} {size}\n", font.source.name, font.source.file, font.source.face);
    }
    // FNV-1a.
    Ok(text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)))
}

/// Magic, digest, number of fonts; then for each font the number of images, the codes, the pixels.
fn write_cache(path: &Path, digest: u64, all: &[Photographs]) -> Result<()> {
    // Under another name first: a run that is stopped leaves no half cache behind.
    let part = path.with_extension(format!("part{}", std::process::id()));
    let mut file = BufWriter::new(File::create(&part)?);
    file.write_all(MAGIC)?;
    file.write_all(&digest.to_le_bytes())?;
    file.write_all(&(all.len() as u64).to_le_bytes())?;
    for photographs in all {
        file.write_all(&(photographs.codes.len() as u64).to_le_bytes())?;
        let codes: Vec<u8> = photographs.codes.iter().flat_map(|code| code.to_le_bytes()).collect();
        file.write_all(&codes)?;
        file.write_all(&photographs.pixels)?;
    }
    file.into_inner()?.sync_all()?;
    std::fs::rename(&part, path)?;
    Ok(())
}

/// None if there is no cache; an error if there is one that cannot be used.
fn read_cache(path: &Path, digest: u64, fonts: usize) -> Result<Option<Vec<Photographs>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("The cache {} cannot be opened", path.display())),
    };
    parse_cache(&mut BufReader::new(file), digest, fonts)
        .map(Some)
        .with_context(|| format!("The cache {} is damaged", path.display()))
}

fn parse_cache(file: &mut impl Read, digest: u64, fonts: usize) -> Result<Vec<Photographs>> {
    let mut magic = [0; 8];
    file.read_exact(&mut magic)?;
    ensure!(&magic == MAGIC, "it does not start with its magic");
    ensure!(number(file)? == digest, "it is of other fonts");
    ensure!(number(file)? == fonts as u64, "it has another number of fonts");
    let mut all = Vec::with_capacity(fonts);
    for _ in 0..fonts {
        let count = number(file)? as usize;
        ensure!(count <= CODES, "a font with {count} characters of {CODES}");
        let mut bytes = vec![0; count * 2];
        file.read_exact(&mut bytes)?;
        let codes: Vec<u16> = bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect();
        ensure!(
            codes.is_sorted_by(|a, b| a < b) && codes.last().is_none_or(|&last| (last as usize) < CODES),
            "its codes are no codes"
        );
        let mut pixels = vec![0; count * PIXELS];
        file.read_exact(&mut pixels)?;
        all.push(Photographs { codes, pixels });
    }
    ensure!(file.read(&mut [0])? == 0, "it is too long");
    Ok(all)
}

fn number(file: &mut impl Read) -> Result<u64> {
    let mut bytes = [0; 8];
    file.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn album(name: &str, role: Role, codes: &[u16]) -> Album {
        let pixels = codes.iter().flat_map(|&code| [code as u8; PIXELS]).collect();
        Album { name: name.into(), role, photographs: Photographs { codes: codes.to_vec(), pixels } }
    }

    fn albums() -> Vec<Album> {
        vec![
            album("a", Role::Gallery, &[1, 2, 3, 9]),
            album("b", Role::Train, &[1, 2, 9]),
            album("c", Role::Train, &[1, 2, 9]),
            album("d", Role::Train, &[1, 9]),
            album("e", Role::HeldOut, &[1, 2, 9]),
        ]
    }

    #[test]
    fn classes_need_enough_training_fonts() {
        let data = Dataset::new(albums(), None).unwrap();
        // 2 has three training fonts and a held-out one, which does not count.
        let expected: Vec<char> = [1, 9].iter().map(|code| char::from_u32(FIRST + code).unwrap()).collect();
        assert_eq!(data.characters, expected);
        assert_eq!(data.shots.len(), 8);
        assert!(data.shots.iter().all(|shot| data.albums[shot.album as usize].role != Role::HeldOut));
        let nine = data.shots.iter().find(|shot| shot.album == 3 && shot.label == 1).unwrap();
        assert_eq!(data.picture(*nine), [9; PIXELS]);
        assert_eq!(data.shots_of(4).iter().map(|shot| shot.label).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(data.shots_of(4)[1].place, 2);
    }

    #[test]
    fn a_limit_keeps_fewer_classes() {
        let data = Dataset::new(albums(), Some(1)).unwrap();
        assert_eq!((data.classes(), data.shots.len()), (1, 4));
        assert!(Dataset::new(vec![album("a", Role::Train, &[1])], None).is_err());
    }

    #[test]
    fn cache_round_trip_and_damage() {
        let folder = std::env::temp_dir().join(format!("glyphs-test-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("cache.bin");
        assert!(read_cache(&path, 7, 5).unwrap().is_none());
        let all: Vec<Photographs> = albums().into_iter().map(|album| album.photographs).collect();
        write_cache(&path, 7, &all).unwrap();
        assert_eq!(read_cache(&path, 7, 5).unwrap().unwrap(), all);
        assert!(read_cache(&path, 8, 5).is_err());
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert!(read_cache(&path, 7, 5).is_err());
        std::fs::write(&path, [&bytes[..], &[0]].concat()).unwrap();
        assert!(read_cache(&path, 7, 5).is_err());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
