//! Pictures of a run, as PNG files: loss, ROC, rates compared, matched and mistaken glyphs.

use std::path::Path;

use anyhow::{anyhow, Context, Result};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::dataset::{Dataset, Shot};
use crate::evaluate::{Match, FAR};
use crate::fonts::Located;
use crate::render::SIDE;
use crate::report::Run;

/// The letters of all pictures: a font that is here anyway, so that plots need no font configuration.
const LETTERS: &str = "VL Gothic";
const FAMILY: &str = "letters";
/// Distinguishable with any color vision (Okabe and Ito).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(90, 90, 90),
];
const GREY: RGBColor = RGBColor(110, 110, 110);
const LIGHT: RGBColor = RGBColor(225, 225, 225);

type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;

/// Gives plotters its letters; once, before any picture.
pub fn load_letters(fonts: &[Located]) -> Result<()> {
    let font = fonts.iter().find(|font| font.source.name == LETTERS).context("the plots' font is not among the fonts")?;
    let bytes = std::fs::read(&font.path).with_context(|| format!("could not read {}", font.path.display()))?;
    // plotters keeps fonts for ever.
    plotters::style::register_font(FAMILY, FontStyle::Normal, Vec::leak(bytes))
        .map_err(|_| anyhow!("{} has no usable letters", font.path.display()))
}

fn canvas(path: &Path, width: u32, height: u32) -> Result<Area<'_>> {
    let area = BitMapBackend::new(path, (width, height)).into_drawing_area();
    area.fill(&WHITE).map_err(drawing)?;
    Ok(area)
}

fn save(area: &Area, path: &Path) -> Result<()> {
    area.present().map_err(drawing).with_context(|| format!("could not write {}", path.display()))
}

fn drawing<E: std::error::Error>(error: E) -> anyhow::Error {
    anyhow!("a picture could not be drawn: {error}")
}

fn letters(size: u32) -> TextStyle<'static> {
    (FAMILY, size).into_font().color(&BLACK)
}

/// Every run's loss: single steps faint, their running mean on top.
pub fn loss(path: &Path, runs: &[Run]) -> Result<()> {
    let area = canvas(path, 960, 540)?;
    loss_chart(&area, "Training loss", runs)?;
    save(&area, path)
}

fn loss_chart(area: &Area, title: &str, runs: &[Run]) -> Result<()> {
    let steps = runs.iter().map(|run| run.trained.losses.len()).max().unwrap_or(1);
    let top = runs.iter().flat_map(|run| &run.trained.losses).fold(0.0f64, |top, &loss| top.max(loss));
    let mut chart = ChartBuilder::on(area)
        .caption(title, letters(24))
        .margin(16)
        .margin_right(28)
        .x_label_area_size(48)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..steps as f64, 0.0..top * 1.05)
        .map_err(drawing)?;
    let labels = letters(17);
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(LIGHT)
        .x_desc("step")
        .y_desc("loss over the sampled classes")
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|loss| format!("{loss:.0}"))
        .label_style(labels.clone())
        .axis_desc_style(labels.clone())
        .draw()
        .map_err(drawing)?;
    for (run, color) in runs.iter().zip(COLOURS) {
        let points = |losses: &[f64]| (1..).map(f64::from).zip(losses.iter().copied()).collect::<Vec<_>>();
        chart.draw_series(LineSeries::new(points(&run.trained.losses), color.mix(0.2))).map_err(drawing)?;
        chart
            .draw_series(LineSeries::new(points(&smooth(&run.trained.losses)), color.stroke_width(2)))
            .map_err(drawing)?
            .label(run.title())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], color.stroke_width(3)));
    }
    let legend = SeriesLabelPosition::UpperRight;
    chart
        .configure_series_labels()
        .position(legend)
        .margin(12)
        .border_style(LIGHT)
        .background_style(WHITE)
        .label_font(labels)
        .draw()
        .map_err(drawing)?;
    Ok(())
}

/// The mean of each step and its neighbors, a fortieth of the steps in all; fewer at the ends.
fn smooth(losses: &[f64]) -> Vec<f64> {
    let reach = losses.len() / 80;
    let around = |at: usize| &losses[at.saturating_sub(reach)..(at + reach + 1).min(losses.len())];
    (0..losses.len()).map(|at| around(at).iter().sum::<f64>() / around(at).len() as f64).collect()
}

/// One curve of the ROC.
pub struct Curve<'a> {
    pub name: String,
    pub points: &'a [(f64, f64)],
}

/// TAR over FAR, FAR on a logarithmic scale from a millionth.
pub fn roc(path: &Path, title: &str, curves: &[Curve]) -> Result<()> {
    const LEAST: f64 = 1e-6;
    let area = canvas(path, 960, 600)?;
    let at_least = |curve: &Curve| curve.points.iter().take_while(|point| point.0 <= LEAST).last().map_or(0.0, |point| point.1);
    // From the next tenth below the lowest curve: where all is close to 1, the axis shows it.
    let floor = curves.iter().map(at_least).fold(1.0, f64::min);
    let floor = ((floor * 10.0).floor() / 10.0).min(0.9);
    let mut chart = ChartBuilder::on(&area)
        .caption(title, letters(24))
        .margin(16)
        .margin_right(28)
        .x_label_area_size(48)
        .y_label_area_size(72)
        .build_cartesian_2d((LEAST..1.0f64).log_scale(), floor..1.0)
        .map_err(drawing)?;
    let labels = letters(17);
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(LIGHT)
        .x_desc("false acceptance rate (FAR)")
        .y_desc("true acceptance rate (TAR)")
        .x_label_formatter(&|far| format!("{far:.0e}"))
        .y_label_formatter(&|tar| format!("{tar:.2}"))
        .label_style(labels.clone())
        .axis_desc_style(labels.clone())
        .draw()
        .map_err(drawing)?;
    chart.draw_series(LineSeries::new([(FAR, floor), (FAR, 1.0)], GREY.stroke_width(1))).map_err(drawing)?;
    for (curve, color) in curves.iter().zip(COLOURS) {
        let start = (LEAST, at_least(curve));
        let points = std::iter::once(start).chain(curve.points.iter().copied().filter(|point| point.0 > LEAST));
        chart
            .draw_series(LineSeries::new(points, color.stroke_width(2)))
            .map_err(drawing)?
            .label(curve.name.clone())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], color.stroke_width(3)));
    }
    let legend = SeriesLabelPosition::LowerRight;
    chart
        .configure_series_labels()
        .position(legend)
        .margin(12)
        .border_style(LIGHT)
        .background_style(WHITE)
        .label_font(labels)
        .draw()
        .map_err(drawing)?;
    save(&area, path)
}

/// Rates side by side: their losses, and what accuracy costs in time.
pub fn comparison(path: &Path, runs: &[Run]) -> Result<()> {
    let area = canvas(path, 1440, 560)?;
    let (left, right) = area.split_horizontally(760);
    loss_chart(&left, "Training loss", runs)?;
    let seconds = |run: &Run| run.trained.seconds;
    let rank1 = |run: &Run| run.evaluation.mean_rank1 * 100.0;
    let most = runs.iter().map(seconds).fold(0.0, f64::max);
    let (low, high) = runs.iter().map(rank1).fold((100.0f64, 0.0f64), |(low, high), value| (low.min(value), high.max(value)));
    let room = ((high - low) * 0.5).max(0.5);
    let mut chart = ChartBuilder::on(&right)
        .caption("Accuracy and time", letters(24))
        .margin(16)
        .margin_right(28)
        .x_label_area_size(48)
        .y_label_area_size(72)
        .build_cartesian_2d(0.0..most * 1.25, low - room..(high + room).min(100.0))
        .map_err(drawing)?;
    let labels = letters(17);
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(LIGHT)
        .x_desc("seconds of training")
        .y_desc("mean rank-1 of the held-out fonts, %")
        .x_label_formatter(&|seconds| format!("{seconds:.*}", usize::from(most < 10.0)))
        .y_label_formatter(&|rank1| format!("{rank1:.1}"))
        .label_style(labels.clone())
        .axis_desc_style(labels)
        .draw()
        .map_err(drawing)?;
    for (run, color) in runs.iter().zip(COLOURS) {
        let point = || {
            EmptyElement::at((seconds(run), rank1(run)))
                + Circle::new((0, 0), 6, color.filled())
                + Text::new(run.title(), (12, -8), letters(17))
        };
        chart.draw_series(std::iter::once(point())).map_err(drawing)?;
    }
    save(&area, path)
}

/// Rows of a block in the picture of matches.
const ROWS: usize = 10;
/// A glyph's pixels are drawn this large.
const ZOOM: i32 = 2;
const CELL: i32 = SIDE as i32 * ZOOM;

/// Some matched and some mistaken glyphs: the query, what was found, what it truly is, and in words.
pub fn matches(path: &Path, data: &Dataset, matches: &[Match]) -> Result<()> {
    let (right, wrong): (Vec<&Match>, Vec<&Match>) = matches.iter().partition(|found| found.right());
    let (block, top, line) = (640, 72, CELL + 12);
    let area = canvas(path, 2 * block as u32, (top + ROWS as i32 * line + 12) as u32)?;
    for (column, (title, found)) in [("matched", &right), ("mistaken", &wrong)].into_iter().enumerate() {
        let left = column as i32 * block + 24;
        let share = found.len() as f64 / matches.len().max(1) as f64 * 100.0;
        text(&area, &format!("{title}: {} of {} ({share:.2}%)", found.len(), matches.len()), left, 12, 21, BLACK)?;
        for (at, name) in ["query", "found", "true"].into_iter().enumerate() {
            text(&area, name, left + at as i32 * (CELL + 12), 46, 17, GREY)?;
        }
        // Evenly spread, so that all fonts and characters have their turn.
        let rows = ROWS.min(found.len());
        for row in 0..rows {
            let shown = found[(2 * row + 1) * found.len() / (2 * rows)];
            let y = top + row as i32 * line;
            for (at, shot) in [shown.query, shown.found, shown.truth].into_iter().enumerate() {
                glyph(&area, data, shot, left + at as i32 * (CELL + 12), y, at == 1 && !shown.right())?;
            }
            let name = |shot: Shot| format!("U+{:04X}", data.characters[shot.label as usize] as u32);
            let x = left + 3 * (CELL + 12) + 8;
            text(&area, &data.albums[shown.query.album as usize].name, x, y + 2, 18, BLACK)?;
            let verdict = if shown.right() {
                format!("found {}", name(shown.found))
            } else {
                format!("found {}, true {}", name(shown.found), name(shown.truth))
            };
            text(&area, &verdict, x, y + 24, 18, BLACK)?;
            text(&area, &format!("cosine {:.3}", shown.cosine), x, y + 46, 16, GREY)?;
        }
    }
    save(&area, path)
}

fn text(area: &Area, words: &str, x: i32, y: i32, size: u32, color: RGBColor) -> Result<()> {
    area.draw(&Text::new(words.to_string(), (x, y), (FAMILY, size).into_font().color(&color))).map_err(drawing)
}

/// A picture as the network sees it, in a frame.
fn glyph(area: &Area, data: &Dataset, shot: Shot, x: i32, y: i32, wrong: bool) -> Result<()> {
    for (at, &ink) in data.picture(shot).iter().enumerate() {
        let (left, top) = (x + at as i32 % SIDE as i32 * ZOOM, y + at as i32 / SIDE as i32 * ZOOM);
        let gray = 255 - ink;
        let pixel = [(left, top), (left + ZOOM, top + ZOOM)];
        area.draw(&Rectangle::new(pixel, RGBColor(gray, gray, gray).filled())).map_err(drawing)?;
    }
    let frame = if wrong { COLOURS[1].stroke_width(2) } else { RGBColor(190, 190, 190).stroke_width(1) };
    area.draw(&Rectangle::new([(x - 2, y - 2), (x + CELL + 1, y + CELL + 1)], frame)).map_err(drawing)
}
