//! Images as they were drawn, with their classes, for trainers in other languages: one file, little endian.
//!
//! The magic "pfcimage"; u64: classes, pixels of an image, images of training fonts, images of held-out fonts; i64: each image's
//! class, training fonts first; u8: each image's pixels, 0 paper, 255 ink.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::Result;

use crate::dataset::{Dataset, Shot};
use crate::fonts::Role;
use crate::render::PIXELS;

const MAGIC: &[u8; 8] = b"pfcimage";

pub fn export(path: &Path, data: &Dataset) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let mut file = BufWriter::new(File::create(path)?);
    write(&mut file, data)?;
    file.into_inner()?.sync_all()?;
    Ok(())
}

fn write(file: &mut impl Write, data: &Dataset) -> Result<()> {
    let held_out: Vec<Shot> = data.albums_with(Role::HeldOut).into_iter().flat_map(|album| data.shots_of(album)).collect();
    file.write_all(MAGIC)?;
    for count in [data.classes(), PIXELS, data.shots.len(), held_out.len()] {
        file.write_all(&(count as u64).to_le_bytes())?;
    }
    let all = || data.shots.iter().chain(&held_out);
    for shot in all() {
        file.write_all(&i64::from(shot.label).to_le_bytes())?;
    }
    for &shot in all() {
        file.write_all(data.picture(shot))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::Album;
    use crate::render::Photographs;

    #[test]
    fn the_file_is_as_it_is_described() {
        let album = |role, codes: &[u16]| {
            let pixels = codes.iter().flat_map(|&code| [code as u8; PIXELS]).collect();
            Album { name: String::new(), role, photographs: Photographs { codes: codes.to_vec(), pixels } }
        };
        let training = || album(Role::Train, &[7, 9]);
        let albums = vec![training(), training(), album(Role::HeldOut, &[9]), training(), training()];
        let mut bytes = Vec::new();
        write(&mut bytes, &Dataset::new(albums, None).unwrap()).unwrap();
        let (header, rest) = bytes.split_at(40);
        assert_eq!(&header[..8], MAGIC);
        let words =
            |bytes: &[u8]| -> Vec<u64> { bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect() };
        assert_eq!(words(&header[8..]), [2, PIXELS as u64, 8, 1]);
        let (labels, pixels) = rest.split_at(72);
        assert_eq!(words(labels), [0, 1, 0, 1, 0, 1, 0, 1, 1]);
        let inks: Vec<u8> = pixels.chunks(PIXELS).map(|image| image[0]).collect();
        assert_eq!((inks, pixels.len()), (vec![7, 9, 7, 9, 7, 9, 7, 9, 9], 9 * PIXELS));
    }
}
