//! The paired figures of one metric.

use std::collections::HashMap;
use std::ops::{AddAssign, Sub};

/// What is flipped, drawn or left out as one: a row, or with `--cluster` all rows
/// of a cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Unit {
    /// The sum of its rows' differences.
    pub sum: f64,
    /// How many rows.
    pub rows: f64,
}

impl AddAssign for Unit {
    fn add_assign(&mut self, other: Self) {
        self.sum += other.sum;
        self.rows += other.rows;
    }
}

impl Sub for Unit {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            sum: self.sum - other.sum,
            rows: self.rows - other.rows,
        }
    }
}

/// One metric's figures on the rows where both sides have it, divided by `scale`.
pub struct Sample {
    pub a: Vec<f64>,
    pub b: Vec<f64>,
    /// a − b, row by row.
    pub d: Vec<f64>,
    pub units: Vec<Unit>,
    pub clustered: bool,
    /// Whether every figure is 0 or 1.
    pub binary: bool,
    /// The largest power of two in any figure: squares of what is very large or very small
    /// would be infinite or zero. Dividing by it rounds only what is nothing beside that figure.
    scale: f64,
}

impl Sample {
    /// `clusters` names each row's cluster; in their order of first appearance they
    /// become the units.
    pub fn new(mut a: Vec<f64>, mut b: Vec<f64>, clusters: Option<&[&str]>) -> Self {
        let binary = a.iter().chain(&b).all(|&x| x == 0.0 || x == 1.0);
        let largest = (a.iter().chain(&b)).fold(f64::MIN_POSITIVE, |most, x| most.max(x.abs()));
        let scale = power_of_two(largest);
        a.iter_mut().chain(&mut b).for_each(|x| *x /= scale);
        let d: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a - b).collect();
        let mut units: Vec<Unit> = Vec::new();
        let mut at = HashMap::new();
        for (row, &d) in d.iter().enumerate() {
            let unit = match clusters {
                Some(clusters) => *at.entry(clusters[row]).or_insert(units.len()),
                None => units.len(),
            };
            if unit == units.len() {
                units.push(Unit::default());
            }
            units[unit].sum += d;
            units[unit].rows += 1.0;
        }
        Self {
            a,
            b,
            d,
            units,
            clustered: clusters.is_some(),
            binary,
            scale,
        }
    }

    /// A mean or a difference as the records have it; `None` where it is no number or too
    /// large for one.
    pub fn unscaled(&self, x: f64) -> Option<f64> {
        Some(x * self.scale).filter(|x| x.is_finite())
    }

    /// The rows.
    pub fn n(&self) -> f64 {
        self.d.len() as f64
    }

    /// The mean of a − b.
    pub fn mean_diff(&self) -> f64 {
        mean(&self.d)
    }

    /// Whether no two figures differ.
    pub fn all_equal(&self) -> bool {
        self.d.iter().all(|&d| d == 0.0)
    }

    /// The squared deviations of the units from the mean difference.
    pub fn squares(&self) -> f64 {
        let mean = self.mean_diff();
        let deviation = |u: &Unit| u.sum - u.rows * mean;
        self.units.iter().map(|u| deviation(u).powi(2)).sum()
    }

    /// Whether the units differ at all in their differences. Equal ones leave rounding
    /// behind: (0.1 + 0.1 + 0.1) / 3 is not 0.1.
    pub fn vary(&self) -> bool {
        let least = 1e-14 * self.mean_diff().abs() * self.n();
        self.units.len() > 1 && self.squares().sqrt() > least
    }

    /// Rows where a is greater, and where it is less.
    pub fn signs(&self) -> (u64, u64) {
        let count = |f: &dyn Fn(f64) -> bool| self.d.iter().filter(|&&d| f(d)).count() as u64;
        (count(&|d| d > 0.0), count(&|d| d < 0.0))
    }
}

/// The power of two at or below a positive normal number: its exponent, and no fraction.
fn power_of_two(x: f64) -> f64 {
    f64::from_bits(x.to_bits() >> (f64::MANTISSA_DIGITS - 1) << (f64::MANTISSA_DIGITS - 1))
}

/// The mean; not a number of nothing.
pub fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len() as f64
}

/// The unbiased variance.
pub fn variance(x: &[f64]) -> f64 {
    let mean = mean(x);
    x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (x.len() as f64 - 1.0)
}

/// Mid-ranks of the values, doubled so that they are whole, and Σ(t³ − t) over
/// groups of t tied values.
pub fn doubled_ranks(values: &[f64]) -> (Vec<u64>, f64) {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
    let mut ranks = vec![0; values.len()];
    let (mut start, mut ties) = (0, 0.0);
    for group in order.chunk_by(|&i, &j| values[i] == values[j]) {
        // The group has ranks start+1 ..= start+len; twice their mean.
        let doubled = (2 * start + group.len() + 1) as u64;
        group.iter().for_each(|&i| ranks[i] = doubled);
        let t = group.len() as f64;
        ties += t * t * t - t;
        start += group.len();
    }
    (ranks, ties)
}
