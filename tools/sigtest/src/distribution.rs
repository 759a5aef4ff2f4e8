//! Tail probabilities and quantiles, and which tail an alternative asks for.

use clap::ValueEnum;
use statrs::distribution::{Continuous, ContinuousCDF, Normal, StudentsT};
use statrs::function::gamma::ln_gamma;

/// What is held against "no difference". The difference is a − b.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Alternative {
    /// a and b differ
    TwoSided,
    /// a is greater than b
    Greater,
    /// a is less than b
    Less,
}

impl Alternative {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::TwoSided => "two-sided",
            Self::Greater => "greater",
            Self::Less => "less",
        }
    }

    /// The p-value from the probabilities of a statistic at most and at least as
    /// large as the one seen.
    pub fn p(self, at_most: f64, at_least: f64) -> f64 {
        match self {
            Self::TwoSided => (2.0 * at_most.min(at_least)).min(1.0),
            Self::Greater => at_least.min(1.0),
            Self::Less => at_most.min(1.0),
        }
    }

    /// The probabilities left outside a confidence interval of level 1 − α, below
    /// and above; 0 where the interval has no end on that side.
    pub fn tails(self, alpha: f64) -> (f64, f64) {
        match self {
            Self::TwoSided => (alpha / 2.0, alpha / 2.0),
            Self::Greater => (alpha, 0.0),
            Self::Less => (0.0, alpha),
        }
    }
}

/// An interval; an end that is not there stands for infinity.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Interval {
    pub low: Option<f64>,
    pub high: Option<f64>,
}

/// P(Z ≤ z) of the standard normal distribution.
pub fn normal_cdf(z: f64) -> f64 {
    Normal::standard().cdf(z)
}

/// The z below which the probability `p` lies, 0 < p < 1.
pub fn normal_quantile(p: f64) -> f64 {
    Normal::standard().inverse_cdf(p)
}

/// Student's t distribution.
pub struct Student(StudentsT);

impl Student {
    /// `None` unless `df` is positive.
    pub fn new(df: f64) -> Option<Self> {
        StudentsT::new(0.0, 1.0, df).ok().map(Self)
    }

    /// P(T ≤ t) and P(T ≥ t).
    pub fn tails(&self, t: f64) -> (f64, f64) {
        (self.0.cdf(t), self.0.sf(t))
    }

    /// The t ≥ 0 above which the probability `tail` lies, 0 < tail ≤ ½. The library's
    /// quantile is a first guess; Newton's method on its exact tail brings it to the
    /// last few digits.
    pub fn upper_quantile(&self, tail: f64) -> f64 {
        let mut t = -self.0.inverse_cdf(tail);
        for _ in 0..4 {
            let density = self.0.pdf(t);
            if density > 0.0 {
                t += (self.0.sf(t) - tail) / density;
            }
        }
        t
    }
}

/// P(X ≤ k) of a fair coin thrown `n` times.
pub fn coin_at_most(k: u64, n: u64) -> f64 {
    if k >= n {
        return 1.0;
    }
    if 2 * k >= n {
        return 1.0 - coin_at_most(n - k - 1, n);
    }
    // Downwards from the largest term; each is the one before times i / (n − i + 1).
    let ln_factorial = |x: u64| ln_gamma(x as f64 + 1.0);
    let ln_first =
        ln_factorial(n) - ln_factorial(k) - ln_factorial(n - k) - n as f64 * std::f64::consts::LN_2;
    let (mut term, mut sum) = (1.0, 1.0);
    for i in (1..=k).rev() {
        term *= i as f64 / (n - i + 1) as f64;
        sum += term;
    }
    ln_first.exp() * sum
}
