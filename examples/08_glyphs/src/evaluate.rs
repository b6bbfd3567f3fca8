//! How well the embeddings recognize fonts never trained on: identification against a gallery, and verification over all pairs.

use anyhow::Result;
use rayon::prelude::*;
use serde::Serialize;

use crate::augment::plain;
use crate::backbone::Backbone;
use crate::dataset::{Dataset, Shot};
use crate::fonts::Role;
use crate::product::{product, View};
use crate::render::PIXELS;

/// The share of impostor pairs that verification may accept.
pub const FAR: f64 = 1e-4;
/// Images embedded at a time.
const BATCH: usize = 512;
/// Queries compared with the whole gallery at a time.
const QUERIES: usize = 128;
/// Cosines from -1 to 1 fall into this many bins.
const BINS: usize = 20_000;

/// One held-out font's results.
#[derive(Clone, Debug, Serialize)]
pub struct FontScore {
    pub font: String,
    pub queries: usize,
    /// Share of the queries whose nearest gallery image is their own character.
    pub rank1: f64,
    /// Share of the genuine pairs accepted where one impostor pair of ten thousand is.
    pub tar: f64,
    /// (FAR, TAR), FAR ascending.
    #[serde(skip)]
    pub roc: Vec<(f64, f64)>,
}

/// A query, what it was taken for, and what it is.
#[derive(Clone, Copy, Debug)]
pub struct Match {
    pub query: Shot,
    pub found: Shot,
    pub truth: Shot,
    pub cosine: f32,
}

impl Match {
    pub fn right(&self) -> bool {
        self.found.label == self.truth.label
    }
}

pub struct Evaluation {
    pub gallery: usize,
    pub fonts: Vec<FontScore>,
    pub mean_rank1: f64,
    /// TAR at FAR over the pairs of all held-out fonts together.
    pub tar: f64,
    pub threshold: f64,
    /// (FAR, TAR), FAR ascending.
    pub roc: Vec<(f64, f64)>,
    pub matches: Vec<Match>,
    pub seconds: f64,
}

/// How many pairs have a cosine in each bin.
#[derive(Clone)]
pub struct Pairs {
    genuine: Vec<u64>,
    impostor: Vec<u64>,
}

impl Default for Pairs {
    fn default() -> Self {
        Pairs { genuine: vec![0; BINS], impostor: vec![0; BINS] }
    }
}

impl Pairs {
    fn bin(cosine: f32) -> usize {
        (((cosine + 1.0) * (BINS as f32 / 2.0)) as usize).min(BINS - 1)
    }

    pub fn genuine(&mut self, cosine: f32) {
        self.genuine[Self::bin(cosine)] += 1;
    }

    pub fn impostor(&mut self, cosine: f32) {
        self.impostor[Self::bin(cosine)] += 1;
    }

    fn add(&mut self, other: &Pairs) {
        self.genuine.iter_mut().zip(&other.genuine).for_each(|(sum, more)| *sum += more);
        self.impostor.iter_mut().zip(&other.impostor).for_each(|(sum, more)| *sum += more);
    }

    /// (threshold, FAR, TAR) for every threshold between bins, the strictest first; without pairs, nothing is accepted.
    fn operating_points(&self) -> impl Iterator<Item = (f64, f64, f64)> + '_ {
        let all = |counts: &[u64]| counts.iter().sum::<u64>().max(1) as f64;
        let (genuine, impostor) = (all(&self.genuine), all(&self.impostor));
        let mut accepted = (0u64, 0u64);
        let point = move |at: usize, accepted: (u64, u64)| {
            (at as f64 * 2.0 / BINS as f64 - 1.0, accepted.1 as f64 / impostor, accepted.0 as f64 / genuine)
        };
        std::iter::once(point(BINS, (0, 0))).chain((0..BINS).rev().map(move |at| {
            accepted = (accepted.0 + self.genuine[at], accepted.1 + self.impostor[at]);
            point(at, accepted)
        }))
    }

    /// The most genuine pairs that can be accepted with at most `far` of the impostors, and the threshold that does it.
    pub fn tar_at(&self, far: f64) -> (f64, f64) {
        let within = self.operating_points().take_while(|point| point.1 <= far).last();
        within.map_or((0.0, 1.0), |(threshold, _, tar)| (tar, threshold))
    }

    /// The curve, without points that change nothing.
    pub fn roc(&self) -> Vec<(f64, f64)> {
        let mut curve: Vec<(f64, f64)> = self.operating_points().map(|(_, far, tar)| (far, tar)).collect();
        curve.dedup();
        curve
    }
}

/// Compares every held-out image of a class with the gallery.
pub fn evaluate(data: &Dataset, backbone: &Backbone) -> Result<Evaluation> {
    let start = std::time::Instant::now();
    let gallery: Vec<Shot> = data.albums_with(Role::Gallery).into_iter().flat_map(|album| data.shots_of(album)).collect();
    let known = embed(data, backbone, &gallery)?;
    let mut place = vec![None; data.classes()];
    gallery.iter().enumerate().for_each(|(at, shot)| place[shot.label as usize] = Some(at));

    let (mut fonts, mut all, mut matches) = (Vec::new(), Pairs::default(), Vec::new());
    for album in data.albums_with(Role::HeldOut) {
        let queries: Vec<Shot> = data.shots_of(album).into_iter().filter(|shot| place[shot.label as usize].is_some()).collect();
        let asked = embed(data, backbone, &queries)?;
        let (pairs, found) = compare(&asked, &queries, &known, &gallery, &place, backbone.dim());
        let right = found.iter().filter(|found| found.right()).count();
        fonts.push(FontScore {
            font: data.albums[album].name.clone(),
            queries: queries.len(),
            rank1: right as f64 / queries.len().max(1) as f64,
            tar: pairs.tar_at(FAR).0,
            roc: pairs.roc(),
        });
        all.add(&pairs);
        matches.extend(found);
    }
    let (tar, threshold) = all.tar_at(FAR);
    let mean_rank1 = fonts.iter().map(|font| font.rank1).sum::<f64>() / fonts.len() as f64;
    Ok(Evaluation {
        gallery: gallery.len(),
        fonts,
        mean_rank1,
        tar,
        threshold,
        roc: all.roc(),
        matches,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// Embeddings of length 1.
fn embed(data: &Dataset, backbone: &Backbone, shots: &[Shot]) -> Result<Vec<f32>> {
    let mut all = Vec::with_capacity(shots.len() * backbone.dim());
    for batch in shots.chunks(BATCH) {
        let mut images = vec![0.0; batch.len() * PIXELS];
        batch.iter().zip(images.chunks_exact_mut(PIXELS)).for_each(|(&shot, image)| plain(data.picture(shot), image));
        let mut embeddings = backbone.embed(images)?;
        for embedding in embeddings.chunks_exact_mut(backbone.dim()) {
            let norm = embedding.iter().map(|value| value * value).sum::<f32>().sqrt().max(1e-12);
            embedding.iter_mut().for_each(|value| *value /= norm);
        }
        all.extend(embeddings);
    }
    Ok(all)
}

/// All queries with all of the gallery; `place` says where a class is in the gallery.
fn compare(
    asked: &[f32],
    queries: &[Shot],
    known: &[f32],
    gallery: &[Shot],
    place: &[Option<usize>],
    dim: usize,
) -> (Pairs, Vec<Match>) {
    let parts: Vec<(Pairs, Vec<Match>)> = asked
        .par_chunks(QUERIES * dim)
        .zip(queries.par_chunks(QUERIES))
        .map(|(asked, queries)| {
            let mut cosines = vec![0.0; queries.len() * gallery.len()];
            product(&mut cosines, View::rows(asked, queries.len(), dim), View::rows(known, gallery.len(), dim).transposed(), false);
            let (mut pairs, mut matches) = (Pairs::default(), Vec::with_capacity(queries.len()));
            for (row, &query) in cosines.chunks_exact(gallery.len()).zip(queries) {
                let truth = place[query.label as usize].expect("queries have a gallery image");
                let mut best = 0;
                for (at, &cosine) in row.iter().enumerate() {
                    if cosine > row[best] {
                        best = at;
                    }
                    if at != truth {
                        pairs.impostor(cosine);
                    }
                }
                pairs.genuine(row[truth]);
                matches.push(Match { query, found: gallery[best], truth: gallery[truth], cosine: row[best] });
            }
            (pairs, matches)
        })
        .collect();
    let (mut pairs, mut matches) = (Pairs::default(), Vec::with_capacity(queries.len()));
    for (more, found) in parts {
        pairs.add(&more);
        matches.extend(found);
    }
    (pairs, matches)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tar_and_roc_of_known_pairs() {
        let mut pairs = Pairs::default();
        // Ten thousand impostors: one at 0.8, the rest at 0. Four genuine: 0.9, 0.85, 0.5, -0.5.
        pairs.impostor(0.8);
        (1..10_000).for_each(|_| pairs.impostor(0.0));
        [0.9, 0.85, 0.5, -0.5].into_iter().for_each(|cosine| pairs.genuine(cosine));
        let (tar, threshold) = pairs.tar_at(1e-4);
        assert_eq!(tar, 0.75);
        assert!((0.0..=0.5).contains(&threshold));
        assert_eq!(pairs.tar_at(0.0).0, 0.5);
        assert_eq!(pairs.tar_at(1.0).0, 1.0);
        let roc = pairs.roc();
        assert_eq!((roc[0], *roc.last().unwrap()), ((0.0, 0.0), (1.0, 1.0)));
        assert!(roc.is_sorted_by(|a, b| a.0 <= b.0 && a.1 <= b.1));
        assert!(roc.contains(&(1e-4, 0.75)));
    }

    #[test]
    fn no_pairs_no_tar() {
        assert_eq!(Pairs::default().tar_at(FAR), (0.0, -1.0));
    }

    #[test]
    fn search_finds_the_nearest() {
        let shot = |label| Shot { album: 0, place: 0, label };
        let gallery = [shot(0), shot(1), shot(2)];
        let known = [1.0, 0.0, 0.0, 1.0, -1.0, 0.0];
        // The first query lies at its own class, the second, of class 2, at class 1.
        let (pairs, matches) =
            compare(&[0.8, 0.6, 0.0, 1.0], &[shot(0), shot(2)], &known, &gallery, &[Some(0), Some(1), Some(2)], 2);
        assert_eq!(matches.iter().map(|found| (found.found.label, found.right())).collect::<Vec<_>>(), [(0, true), (1, false)]);
        assert_eq!((pairs.genuine.iter().sum::<u64>(), pairs.impostor.iter().sum::<u64>()), (2, 4));
    }
}
