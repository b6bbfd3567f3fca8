//! Characters to pictures: 32 x 32 pixels of gray, the glyph's bounding box scaled and centerd.

use std::collections::HashMap;

use ab_glyph::{point, Font, FontVec, Glyph, GlyphId, OutlinedGlyph, PxScale, PxScaleFactor};
use anyhow::{Context, Result};
use rayon::prelude::*;

use crate::fonts::Located;

/// Pixels along a side.
pub const SIDE: usize = 32;
pub const PIXELS: usize = SIDE * SIDE;
/// The characters: CJK Unified Ideographs.
pub const FIRST: u32 = 0x4E00;
pub const LAST: u32 = 0x9FFF;

/// The bounding box fills this many pixels; the rest is room for shifts.
const BOX: f32 = 28.0;
/// The box's longer side is stretched no further than this beyond its shorter side's scale: a square face evens out the fonts'
/// proportions, but "one" must not become a blot.
const STRETCH: f32 = 1.25;
/// A font that shows one picture for more characters than this shows a placeholder: real glyphs are shared by two or three at most.
const SHARED: usize = 4;

/// Changes whenever the pictures do, so that caches of older pictures are made anew.
pub const RENDER_VERSION: u32 = 1;

/// A font's characters and their pictures, ascending by character.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Photographs {
    /// Character less FIRST.
    pub codes: Vec<u16>,
    /// PIXELS bytes each, 0 paper, 255 ink.
    pub pixels: Vec<u8>,
}

/// Photographs every character the font really has.
pub fn photograph(font: &Located) -> Result<Photographs> {
    let bytes = std::fs::read(&font.path).with_context(|| format!("could not read {}", font.path.display()))?;
    let face = FontVec::try_from_vec_and_index(bytes, font.source.face)
        .with_context(|| format!("{} has no usable face {}", font.path.display(), font.source.face))?;
    let pictures: Vec<(u16, [u8; PIXELS])> = (FIRST..=LAST)
        .into_par_iter()
        .filter_map(|code| {
            let glyph = face.glyph_id(char::from_u32(code)?);
            // Glyph 0 is .notdef: the font does not have the character.
            (glyph.0 != 0).then_some(())?;
            Some(((code - FIRST) as u16, picture(&face, glyph)?))
        })
        .collect();
    Ok(without_placeholders(pictures, picture(&face, GlyphId(0))))
}

/// Leaves out what stands for a missing character: a copy of .notdef, or a picture that many characters share.
fn without_placeholders(pictures: Vec<(u16, [u8; PIXELS])>, notdef: Option<[u8; PIXELS]>) -> Photographs {
    let mut uses: HashMap<[u8; PIXELS], usize> = HashMap::with_capacity(pictures.len());
    for (_, pixels) in &pictures {
        *uses.entry(*pixels).or_default() += 1;
    }
    let mut kept = Photographs::default();
    for (code, pixels) in pictures {
        if uses[&pixels] <= SHARED && Some(pixels) != notdef {
            kept.codes.push(code);
            kept.pixels.extend_from_slice(&pixels);
        }
    }
    kept
}

/// One glyph's picture, or none if it has no ink.
fn picture(face: &FontVec, id: GlyphId) -> Option<[u8; PIXELS]> {
    let outline = face.outline(id)?;
    let (from, to) = (outline.bounds.min, outline.bounds.max);
    let (width, height) = ((to.x - from.x).abs(), (to.y - from.y).abs());
    (width > 0.0 && height > 0.0).then_some(())?;
    let least = BOX / width.max(height);
    let scale = |side: f32| (BOX / side).min(least * STRETCH);
    let factor = PxScaleFactor { horizontal: scale(width), vertical: scale(height) };
    // The middle of the box falls on the middle of the picture; a font's y points up, a picture's down.
    let half = SIDE as f32 / 2.0;
    let position = point(half - (from.x + to.x) / 2.0 * factor.horizontal, half + (from.y + to.y) / 2.0 * factor.vertical);
    let outlined = OutlinedGlyph::new(Glyph { id, scale: PxScale::from(BOX), position }, outline, factor);
    let origin = outlined.px_bounds().min;
    let mut pixels = [0u8; PIXELS];
    let mut ink = false;
    outlined.draw(|x, y, coverage| {
        let (x, y) = (origin.x as i32 + x as i32, origin.y as i32 + y as i32);
        if (0..SIDE as i32).contains(&x) && (0..SIDE as i32).contains(&y) {
            let value = (coverage.clamp(0.0, 1.0) * 255.0).round() as u8;
            ink |= value > 127;
            pixels[y as usize * SIDE + x as usize] = value;
        }
    });
    ink.then_some(pixels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_are_left_out() {
        let (box_, notdef, real) = ([9; PIXELS], [7; PIXELS], [5; PIXELS]);
        let mut pictures: Vec<(u16, [u8; PIXELS])> = (0..=SHARED as u16).map(|code| (code, box_)).collect();
        pictures.extend([(100, notdef), (101, real), (102, real)]);
        let kept = without_placeholders(pictures, Some(notdef));
        assert_eq!(kept.codes, [101, 102]);
        assert_eq!(kept.pixels.len(), 2 * PIXELS);
    }
}
