//! The charts, as SVG. They are drawn in the colours of the light page, of which the style
//! sheet makes those of the dark one, so the palette here is all that a chart may use.

use std::ops::Range;

use anyhow::Result;
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use serde::Serialize;

/// Blue, orange and green of Okabe and Ito, told apart by the colour-blind; page.css names
/// the same.
pub const BLUE: RGBColor = RGBColor(0x00, 0x72, 0xB2);
pub const ORANGE: RGBColor = RGBColor(0xD5, 0x5E, 0x00);
const GREEN: RGBColor = RGBColor(0x00, 0x9E, 0x73);
const PALE: RGBColor = RGBColor(0x9D, 0xC3, 0xDC);
pub const GREY: RGBColor = RGBColor(0x8C, 0x8C, 0x8C);
pub const DARK_GREY: RGBColor = RGBColor(0x5F, 0x5F, 0x5F);
pub const LIGHT_GREY: RGBColor = RGBColor(0xC4, 0xC4, 0xC4);
const INK: RGBColor = RGBColor(0x1F, 0x1F, 0x1F);
const MUTED: RGBColor = RGBColor(0x59, 0x59, 0x59);
const GRID: RGBColor = RGBColor(0xE2, 0xE2, 0xE2);
pub const SHADE: RGBColor = RGBColor(0xEA, 0xF2, 0xF8);

/// A backend's coordinates are whole numbers: so many of them make a pixel of the page.
const FINE: u32 = 4;

/// A chart that lies in the page.
#[derive(Serialize)]
pub struct Chart {
    /// Of the view box.
    pub width: u32,
    /// Of the view box.
    pub height: u32,
    /// What it shows, in words.
    pub label: String,
    /// What is inside the `svg` element: plotters has escaped its texts.
    pub body: String,
    /// Whether it takes the width of a column, not of a panel.
    pub wide: bool,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Plane<'a> = ChartContext<'a, SVGBackend<'a>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Draws on an area of so many pixels.
fn chart(
    (width, height): (u32, u32),
    label: String,
    draw: impl FnOnce(&Area) -> Result<()>,
) -> Result<Chart> {
    let (width, height) = (width * FINE, height * FINE);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
        draw(&area)?;
        area.present()?;
    }
    // The element itself is the page's, with a name for those who cannot see it.
    let inside = svg.split_once('\n').map_or("", |(_, inside)| inside);
    let body = inside.trim_end().trim_end_matches("</svg>");
    Ok(Chart {
        width,
        height,
        label,
        body: body
            .replace("font-family=\"sans-serif\" ", "")
            .replace("opacity=\"1\" ", ""),
        wide: width > PANEL.0 * FINE,
    })
}

/// Sizes in pixels: of a chart as wide as a column, and of one of several side by side.
const COLUMN: u32 = 440;
const PANEL: (u32, u32) = (320, 190);

/// Pixels in the backend's coordinates.
fn px(pixels: u32) -> u32 {
    pixels * FINE
}

/// A text of so many pixels. The backend divides by 1.24.
fn font(pixels: f64, color: RGBColor) -> TextStyle<'static> {
    let size = pixels * f64::from(FINE) * 1.24;
    TextStyle {
        color: color.to_backend_color(),
        ..("sans-serif", size).into_font().into()
    }
}

fn right(style: TextStyle<'static>) -> TextStyle<'static> {
    style.pos(Pos::new(HPos::Right, VPos::Center))
}

fn line(color: RGBColor, pixels: f64) -> ShapeStyle {
    color.stroke_width((pixels * f64::from(FINE)) as u32)
}

/// A number beside an axis, without the noise of binary fractions.
pub fn tick(x: f64) -> String {
    let size = x.abs();
    if size < 1e-12 {
        return "0".into();
    }
    if !(1e-3..1e6).contains(&size) {
        return format!("{:e}", format!("{x:.2e}").parse().unwrap_or(x));
    }
    let text = format!("{x:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Where values lie, with a little room; `None` where there are none, or where they are too
/// large or too near one another for an axis of floats.
fn span(values: impl IntoIterator<Item = f64>) -> Option<Range<f64>> {
    let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
    for value in values {
        (low, high) = (low.min(value), high.max(value));
        if !(-1e12..=1e12).contains(&value) {
            return None;
        }
    }
    let (middle, size) = ((low + high) / 2.0, low.abs().max(high.abs()));
    if low > high {
        return None;
    }
    if high - low <= 1e-9 * size {
        // Equal, or as good as that: a line in the middle.
        let room = if size > 0.0 { 0.1 * size } else { 1.0 };
        return Some(middle - room..middle + room);
    }
    let room = 0.05 * (high - low);
    Some(low - room..high + room)
}

/// A plane with labelled axes.
fn plane<'a>(
    area: &Area<'a>,
    (x, y): (Range<f64>, Range<f64>),
    (x_desc, y_desc): (&str, &str),
) -> Result<Plane<'a>> {
    let mut plane = ChartBuilder::on(area)
        .margin(px(6))
        .margin_right(px(14))
        .x_label_area_size(px(38))
        .y_label_area_size(px(54))
        .build_cartesian_2d(x, y)?;
    let label = font(12.0, MUTED);
    plane
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(line(GRID, 1.0))
        .axis_style(line(GREY, 1.0))
        .x_labels(6)
        .y_labels(5)
        .x_label_style(label.clone())
        .y_label_style(label)
        .axis_desc_style(font(12.0, INK))
        .x_label_formatter(&|x| tick(*x))
        .y_label_formatter(&|y| tick(*y))
        .x_desc(x_desc)
        .y_desc(y_desc)
        .draw()?;
    Ok(plane)
}

/// Of many points the least and the largest in each of so many columns: the same picture, in
/// a file of a size that does not grow with the run.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    const COLUMNS: usize = 500;
    if points.len() <= 4 * COLUMNS {
        return points.to_vec();
    }
    let mut kept = Vec::new();
    for at in 0..COLUMNS {
        let column = &points[at * points.len() / COLUMNS..(at + 1) * points.len() / COLUMNS];
        let by = |x: &&(f64, f64), y: &&(f64, f64)| x.1.total_cmp(&y.1);
        let mut ends: Vec<(f64, f64)> = (column.iter().min_by(by).into_iter())
            .chain(column.iter().max_by(by))
            .copied()
            .collect();
        ends.sort_by(|x, y| x.0.total_cmp(&y.0));
        kept.extend(ends);
    }
    kept
}

/// The mean of up to so many values around each one.
fn smooth(points: &[(f64, f64)], window: usize) -> Vec<(f64, f64)> {
    let half = window / 2;
    let around = |at: usize| {
        // As many on either side, so that the ends do not lean.
        let reach = half.min(at).min(points.len() - 1 - at);
        let near = &points[at - reach..=at + reach];
        let sum: f64 = near.iter().map(|(_, y)| y).sum();
        (points[at].0, sum / near.len() as f64)
    };
    (0..points.len()).map(around).collect()
}

/// Training steps that the smoothed loss is a mean of: about a twentieth, odd.
pub fn window(steps: usize) -> usize {
    (steps / 20).clamp(2, 500) | 1
}

/// Training loss, raw and smoothed, held-out loss, and the step that was chosen, if one was.
pub fn losses(
    label: String,
    train: &[(f64, f64)],
    held_out: &[(f64, f64)],
    chosen: Option<f64>,
) -> Result<Option<Chart>> {
    let all = || train.iter().chain(held_out);
    let Some((x, y)) = span(all().map(|p| p.0)).zip(span(all().map(|p| p.1))) else {
        return Ok(None);
    };
    chart((COLUMN, 250), label, |area| {
        let mut plane = plane(area, (x, y.clone()), ("step", "loss, nats/token"))?;
        if let Some(at) = chosen {
            let whole = [(at, y.start), (at, y.end)];
            plane.draw_series([PathElement::new(whole, line(GREEN, 1.5))])?;
        }
        plane.draw_series([PathElement::new(thin(train), line(PALE, 1.0))])?;
        let smoothed = smooth(train, window(train.len()));
        plane.draw_series([PathElement::new(thin(&smoothed), line(BLUE, 2.0))])?;
        plane.draw_series([PathElement::new(held_out.to_vec(), line(ORANGE, 1.5))])?;
        let points = held_out.iter();
        plane.draw_series(points.map(|&at| Circle::new(at, px(3), ORANGE.filled())))?;
        Ok(())
    })
    .map(Some)
}

/// One figure of each step.
pub fn steps(label: String, unit: &str, points: &[(f64, f64)]) -> Result<Option<Chart>> {
    let values = points.iter().map(|p| p.1);
    let least = values.clone().fold(0.0, f64::min);
    let Some((x, y)) = span(points.iter().map(|p| p.0)).zip(span(values.chain([0.0]))) else {
        return Ok(None);
    };
    let y = if least < 0.0 { y } else { 0.0..y.end };
    chart(PANEL, label, |area| {
        let mut plane = plane(area, (x, y), ("step", unit))?;
        plane.draw_series([PathElement::new(thin(points), line(BLUE, 1.5))])?;
        Ok(())
    })
    .map(Some)
}

/// Rows with a name before each, over one axis.
fn rows<'a>(
    area: &Area<'a>,
    names: &[String],
    left: u32,
    x: Range<f64>,
    x_desc: &str,
) -> Result<Plane<'a>> {
    let mut plane = ChartBuilder::on(area)
        .margin(px(6))
        .margin_right(px(14))
        .x_label_area_size(px(38))
        .y_label_area_size(px(left))
        .build_cartesian_2d(x.clone(), names.len() as f64..0.0)?;
    plane
        .configure_mesh()
        .disable_y_mesh()
        .disable_x_mesh()
        .disable_y_axis()
        .axis_style(line(GREY, 1.0))
        .x_labels(6)
        .y_labels(0)
        .x_label_style(font(12.0, MUTED))
        .axis_desc_style(font(12.0, INK))
        .x_label_formatter(&|x| tick(*x))
        .x_desc(x_desc)
        .draw()?;
    for (at, name) in names.iter().enumerate() {
        let (x, y) = plane.backend_coord(&(x.start, at as f64 + 0.5));
        area.draw_text(name, &right(font(12.0, INK)), (x - px(6) as i32, y))?;
    }
    Ok(plane)
}

/// The height of a chart of so many rows of so many pixels each.
fn height(count: usize, each: u32) -> u32 {
    50 + each * u32::try_from(count).unwrap_or(u32::MAX / each / 2)
}

/// A number of each name, as bars.
pub fn bars(label: String, unit: &str, counts: &[(String, u64, RGBColor)]) -> Result<Chart> {
    let names: Vec<String> = counts.iter().map(|(name, ..)| name.clone()).collect();
    let most = counts.iter().map(|(_, count, _)| *count).max().unwrap_or(0);
    chart((COLUMN, height(names.len(), 19)), label, |area| {
        let end = 1.15 * most.max(1) as f64;
        let mut plane = rows(area, &names, 172, 0.0..end, unit)?;
        for (at, (_, count, color)) in counts.iter().enumerate() {
            let (at, count) = (at as f64, *count as f64);
            let bar = [(0.0, at + 0.12), (count, at + 0.88)];
            plane.draw_series([Rectangle::new(bar, color.filled())])?;
            let (x, y) = plane.backend_coord(&(count, at + 0.5));
            let text = font(12.0, INK).pos(Pos::new(HPos::Left, VPos::Center));
            area.draw_text(&count.to_string(), &text, (x + px(4) as i32, y))?;
        }
        Ok(())
    })
}

/// For each name a bar of several parts.
pub fn stacked(
    label: String,
    unit: &str,
    bars: &[(String, Vec<(u64, RGBColor)>)],
) -> Result<Chart> {
    let names: Vec<String> = bars.iter().map(|(name, _)| name.clone()).collect();
    let sum = |parts: &[(u64, RGBColor)]| parts.iter().map(|part| part.0).sum::<u64>();
    let most = bars
        .iter()
        .map(|(_, parts)| sum(parts))
        .max()
        .unwrap_or(0)
        .max(1) as f64;
    chart((COLUMN, height(names.len(), 46)), label, |area| {
        let mut plane = rows(area, &names, 128, 0.0..most, unit)?;
        for (at, (_, parts)) in bars.iter().enumerate() {
            let (at, mut from) = (at as f64, 0.0);
            for &(count, color) in parts.iter().filter(|part| part.0 > 0) {
                let to = from + count as f64;
                let bar = [(from, at + 0.4), (to, at + 0.9)];
                plane.draw_series([Rectangle::new(bar, color.filled())])?;
                let text = font(12.0, INK).pos(Pos::new(HPos::Center, VPos::Bottom));
                let middle = plane.backend_coord(&((from + to) / 2.0, at + 0.36));
                // Of parts too thin for it the table tells the number.
                if to - from > 0.05 * most {
                    area.draw_text(&count.to_string(), &text, middle)?;
                }
                from = to;
            }
        }
        Ok(())
    })
}

/// What lies between, by linear interpolation (type 7 of Hyndman and Fan).
pub fn quantile(sorted: &[u64], share: f64) -> f64 {
    let at = share * sorted.len().saturating_sub(1) as f64;
    let value = |at: f64| sorted.get(at as usize).copied().unwrap_or(0) as f64;
    value(at.floor()) + (value(at.ceil()) - value(at.floor())) * at.fract()
}

/// For each name how its values lie: 5th to 95th hundredth, quarters, median.
pub fn boxes(label: String, unit: &str, of: &[(String, Vec<u64>)]) -> Result<Chart> {
    let names: Vec<String> = of.iter().map(|(name, _)| name.clone()).collect();
    let sorted: Vec<Vec<u64>> = (of.iter())
        .map(|(_, values)| {
            let mut values = values.clone();
            values.sort_unstable();
            values
        })
        .collect();
    let most = sorted
        .iter()
        .map(|values| quantile(values, 0.95))
        .fold(1.0, f64::max);
    chart((COLUMN, height(names.len(), 28)), label, |area| {
        let mut plane = rows(area, &names, 112, 0.0..1.05 * most, unit)?;
        for (at, values) in sorted
            .iter()
            .enumerate()
            .filter(|(_, values)| !values.is_empty())
        {
            let (at, of) = (at as f64, |share| quantile(values, share));
            let whiskers = [(of(0.05), at + 0.5), (of(0.95), at + 0.5)];
            plane.draw_series([PathElement::new(whiskers, line(DARK_GREY, 1.5))])?;
            let quarters = [(of(0.25), at + 0.22), (of(0.75), at + 0.78)];
            plane.draw_series([Rectangle::new(quarters, PALE.filled())])?;
            let median = [(of(0.5), at + 0.16), (of(0.5), at + 0.84)];
            plane.draw_series([PathElement::new(median, line(BLUE, 2.5))])?;
        }
        Ok(())
    })
}

/// A figure's difference in a comparison.
pub struct Strip {
    /// The figure.
    pub name: String,
    /// Its unit, and which way is better.
    pub unit: String,
    /// Whether less is better.
    pub lower: bool,
    /// The mean difference.
    pub mean: Option<f64>,
    /// Ends of its interval.
    pub ends: [Option<f64>; 2],
}

/// Differences with their intervals. Figures have different units, and to divide by a spread
/// would give an interval that takes that spread for known: so each has an axis of its own,
/// with zero in the middle.
pub fn forest(label: String, strips: &[Strip]) -> Result<Option<Chart>> {
    let drawn: Vec<(&Strip, f64)> = (strips.iter())
        .filter_map(|strip| {
            let values = strip.ends.into_iter().flatten().chain(strip.mean);
            let reach = span(values.map(f64::abs).chain([0.0]))?.end;
            (strip.mean.is_some() || strip.ends != [None, None]).then_some((strip, 1.1 * reach))
        })
        .collect();
    if drawn.is_empty() {
        return Ok(None);
    }
    let each = 54;
    let whole = (COLUMN, each * u32::try_from(drawn.len()).unwrap_or(1));
    chart(whole, label, |area| {
        for (part, (strip, reach)) in area.split_evenly((drawn.len(), 1)).iter().zip(&drawn) {
            let mut plane = ChartBuilder::on(part)
                .margin_left(px(4))
                .margin_right(px(18))
                .margin_top(px(6))
                .x_label_area_size(px(22))
                .y_label_area_size(px(152))
                .build_cartesian_2d(-reach..*reach, 0.0..1.0)?;
            let side = if strip.lower { -reach } else { *reach };
            let better = [(0.0, 0.0), (side, 1.0)];
            plane.draw_series([Rectangle::new(better, SHADE.filled())])?;
            plane
                .configure_mesh()
                .disable_mesh()
                .disable_y_axis()
                .axis_style(line(GREY, 1.0))
                .x_labels(6)
                .y_labels(0)
                .x_label_style(font(12.0, MUTED))
                .x_label_formatter(&|x| tick(*x))
                .draw()?;
            let zero = [(0.0, 0.0), (0.0, 1.0)];
            plane.draw_series([PathElement::new(zero, line(DARK_GREY, 1.0))])?;
            if strip.ends != [None, None] {
                let [low, high] = strip.ends;
                let ends = [(low.unwrap_or(-reach), 0.5), (high.unwrap_or(*reach), 0.5)];
                plane.draw_series([PathElement::new(ends, line(BLUE, 3.0))])?;
                for end in strip.ends.into_iter().flatten() {
                    let cap = [(end, 0.2), (end, 0.8)];
                    plane.draw_series([PathElement::new(cap, line(BLUE, 2.0))])?;
                }
            }
            if let Some(mean) = strip.mean {
                plane.draw_series([Circle::new((mean, 0.5), px(3), INK.filled())])?;
            }
            let (x, y) = within(part, plane.backend_coord(&(-reach, 0.5)));
            let gap = px(10) as i32;
            part.draw_text(
                &strip.name,
                &right(font(13.0, INK)),
                (x - gap, y - px(7) as i32),
            )?;
            part.draw_text(
                &strip.unit,
                &right(font(11.0, MUTED)),
                (x - gap, y + px(9) as i32),
            )?;
        }
        Ok(())
    })
    .map(Some)
}

/// A chart tells where a point is on the whole image; an area draws from its own corner.
fn within(area: &Area, (x, y): (i32, i32)) -> (i32, i32) {
    let (left, top) = area.get_base_pixel();
    (x - left, y - top)
}

/// A round width, this or a little more.
fn bin_width(rough: f64) -> f64 {
    let power = 10.0_f64.powf(rough.log10().floor());
    let factors = [1.0, 2.0, 2.5, 5.0, 10.0];
    let enough = factors.into_iter().find(|factor| factor * power >= rough);
    power * enough.unwrap_or(10.0)
}

/// Rows by difference. No bin holds both sides of zero, and what is zero stands by itself.
pub fn histogram(label: String, unit: &str, lower: bool, values: &[f64]) -> Result<Option<Chart>> {
    let own = span(values.iter().copied());
    let Some((own, whole)) = own.zip(span(values.iter().copied().chain([0.0]))) else {
        return Ok(None);
    };
    // Fine enough for the values, and not for a hair far from zero.
    let width = bin_width(((own.end - own.start) / 22.0).max((whole.end - whole.start) / 80.0));
    // Bins are told by their outer end, in widths: …, −2, −1, 1, 2, …
    let bin = |x: f64| (x / width).abs().ceil().copysign(x) as i64;
    let mut counts = std::collections::BTreeMap::<i64, u64>::new();
    for &x in values {
        *counts.entry(if x == 0.0 { 0 } else { bin(x) }).or_default() += 1;
    }
    let most = counts.values().copied().max().unwrap_or(0) as f64;
    let ends = counts
        .keys()
        .fold((-1, 1), |(low, high), &bin| (low.min(bin), high.max(bin)));
    let (from, to) = (ends.0 as f64 * width, ends.1 as f64 * width);
    let room = 0.02 * (to - from);
    chart(PANEL, label, |area| {
        let ranges = (from - room..to + room, 0.0..1.08 * most);
        let mut plane = plane(area, ranges, (unit, "rows"))?;
        for (&bin, &count) in &counts {
            let outer = bin as f64 * width;
            let (bar, color) = match bin {
                0 => ([(-0.3 * width, 0.0), (0.3 * width, count as f64)], GREY),
                _ => {
                    let color = if (bin < 0) == lower { BLUE } else { ORANGE };
                    let inner = outer - width.copysign(outer);
                    let gap = 0.08 * width.copysign(outer);
                    ([(inner + gap, 0.0), (outer, count as f64)], color)
                }
            };
            plane.draw_series([Rectangle::new(bar, color.filled())])?;
        }
        let zero = [(0.0, 0.0), (0.0, 1.08 * most)];
        plane.draw_series([PathElement::new(zero, line(DARK_GREY, 1.0))])?;
        Ok(())
    })
    .map(Some)
}
