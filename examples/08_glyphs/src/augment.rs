//! Training images vary as fonts do: a little shifted, scaled, turned, slanted and bent, with thinner or thicker strokes.

use crate::random::Random;
use crate::render::{PIXELS, SIDE};

/// How far an image may be changed.
#[derive(Clone, Copy, Debug)]
pub struct Reach {
    /// Pixels, either way.
    pub shift: f32,
    /// Share of the size, each side on its own.
    pub scale: f32,
    /// Radians.
    pub turn: f32,
    /// Pixels sideways for each pixel down.
    pub slant: f32,
    /// Pixels a wave moves rows and columns.
    pub bend: f32,
    /// How much of a thinner or thicker copy is mixed in, at most.
    pub stroke: f32,
}

pub const TRAINING: Reach = Reach { shift: 2.0, scale: 0.12, turn: 0.05, slant: 0.08, bend: 0.8, stroke: 0.8 };

/// Paper around the picture while sampling, so that no lookup needs a check.
const MARGIN: usize = 8;
const PADDED: usize = SIDE + 2 * MARGIN;

/// Draws a changed copy of a picture: 0 paper, 1 ink.
pub fn augment(picture: &[u8], reach: &Reach, random: &mut Random, out: &mut [f32]) {
    let mut padded = [0.0f32; PADDED * PADDED];
    for y in 0..SIDE {
        for x in 0..SIDE {
            padded[(y + MARGIN) * PADDED + x + MARGIN] = f32::from(picture[y * SIDE + x]) / 255.0;
        }
    }
    let (sin, cos) = random.around(reach.turn).sin_cos();
    let (scale_x, scale_y) = (1.0 + random.around(reach.scale), 1.0 + random.around(reach.scale));
    let slant = random.around(reach.slant);
    let (shift_x, shift_y) = (random.around(reach.shift), random.around(reach.shift));
    let (rows, columns) = (wave(reach.bend, random), wave(reach.bend, random));
    let middle = (SIDE as f32 - 1.0) / 2.0;
    let last = PADDED as f32 - 1.001;
    for y in 0..SIDE {
        let from_y = y as f32 - middle;
        for x in 0..SIDE {
            let from_x = x as f32 - middle;
            let u = (cos * from_x + (slant - sin) * from_y) * scale_x + rows[y] + shift_x + middle + MARGIN as f32;
            let v = (sin * from_x + cos * from_y) * scale_y + columns[x] + shift_y + middle + MARGIN as f32;
            let (u, v) = (u.clamp(0.0, last), v.clamp(0.0, last));
            let (left, top) = (u as usize, v as usize);
            let (right_share, bottom_share) = (u - left as f32, v - top as f32);
            let at = top * PADDED + left;
            let upper = padded[at] + (padded[at + 1] - padded[at]) * right_share;
            let lower = padded[at + PADDED] + (padded[at + PADDED + 1] - padded[at + PADDED]) * right_share;
            out[y * SIDE + x] = upper + (lower - upper) * bottom_share;
        }
    }
    let stroke = random.around(reach.stroke);
    if stroke != 0.0 {
        restroke(out, stroke);
    }
}

/// A picture as it is: what evaluation looks at.
pub fn plain(picture: &[u8], out: &mut [f32]) {
    picture.iter().zip(out).for_each(|(&byte, value)| *value = f32::from(byte) / 255.0);
}

/// One to two gentle waves along a side.
fn wave(bend: f32, random: &mut Random) -> [f32; SIDE] {
    let (height, phase, speed) = (random.around(bend), random.unit() * std::f32::consts::TAU, 0.1 + 0.2 * random.unit());
    std::array::from_fn(|at| height * (phase + speed * at as f32).sin())
}

/// Mixes in the darkest (stroke > 0) or lightest of each pixel and its four neighbors.
fn restroke(image: &mut [f32], stroke: f32) {
    let mut before = [0.0f32; PIXELS];
    before.copy_from_slice(image);
    let choose = |a: f32, b: f32| if stroke > 0.0 { a.max(b) } else { a.min(b) };
    for y in 0..SIDE {
        let (up, down) = (y.saturating_sub(1) * SIDE, (y + 1).min(SIDE - 1) * SIDE);
        for x in 0..SIDE {
            let (left, right) = (x.saturating_sub(1), (x + 1).min(SIDE - 1));
            let here = before[y * SIDE + x];
            let best = choose(choose(before[y * SIDE + left], before[y * SIDE + right]), choose(before[up + x], before[down + x]));
            image[y * SIDE + x] = here + (choose(best, here) - here) * stroke.abs();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Purpose;

    fn cross() -> Vec<u8> {
        (0..PIXELS).map(|at| if at / SIDE == 15 || at % SIDE == 16 { 255 } else { 0 }).collect()
    }

    #[test]
    fn values_stay_between_paper_and_ink() {
        let mut out = vec![0.0; PIXELS];
        for step in 0..200 {
            augment(&cross(), &TRAINING, &mut Random::new(0, Purpose::Augment, step, 0), &mut out);
            assert!(out.iter().all(|value| (0.0..=1.0).contains(value)));
            assert!(out.iter().sum::<f32>() > 5.0, "the glyph is gone");
        }
    }

    #[test]
    fn no_reach_changes_nothing() {
        let still = Reach { shift: 0.0, scale: 0.0, turn: 0.0, slant: 0.0, bend: 0.0, stroke: 0.0 };
        let (mut out, mut same) = (vec![0.0; PIXELS], vec![0.0; PIXELS]);
        augment(&cross(), &still, &mut Random::new(0, Purpose::Augment, 0, 0), &mut out);
        plain(&cross(), &mut same);
        assert_eq!(out, same);
    }

    #[test]
    fn the_same_stream_gives_the_same_image() {
        let draw = |row| {
            let mut out = vec![0.0; PIXELS];
            augment(&cross(), &TRAINING, &mut Random::new(4, Purpose::Augment, 2, row), &mut out);
            out
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn strokes_grow_and_shrink() {
        let mut image = vec![0.0; PIXELS];
        plain(&cross(), &mut image);
        let ink = |image: &[f32]| image.iter().sum::<f32>();
        let (mut thick, mut thin) = (image.clone(), image.clone());
        restroke(&mut thick, 1.0);
        restroke(&mut thin, -1.0);
        assert!(ink(&thick) > 2.5 * ink(&image) && ink(&thin) < 0.1 * ink(&image));
    }
}
