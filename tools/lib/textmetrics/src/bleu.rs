//! BLEU (Papineni et al., 2002) as sacrebleu computes it: 13a tokens, orders 1 to
//! 4, exponential smoothing, one reference.

use std::iter::Sum;
use std::ops::{Add, AddAssign};

use crate::{VERSION, ngram, python};

/// The highest n-gram order of BLEU.
const ORDERS: usize = 4;

/// Which orders enter the geometric mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BleuOrder {
    /// All four. What a corpus is scored by; a segment of under four tokens gets 0.
    Full,
    /// Only the orders the prediction is long enough to have (`eff:yes`). What
    /// single segments are scored by.
    Effective,
}

/// The sufficient statistics of BLEU: add those of the segments, score the sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BleuStats {
    /// Tokens of the prediction.
    pub sys_len: u64,
    /// Tokens of the reference.
    pub ref_len: u64,
    /// Predicted n-grams found in the reference, each at most as often as there; by order from 1.
    pub correct: [u64; ORDERS],
    /// Predicted n-grams, by order from 1.
    pub total: [u64; ORDERS],
}

impl BleuStats {
    /// The statistics of one segment, both sides as plain untokenised text.
    pub fn new(prediction: &str, reference: &str) -> Self {
        let (prediction, reference) = (tokenize_13a(prediction), tokenize_13a(reference));
        let by_order = |f: &dyn Fn(usize) -> u64| std::array::from_fn(|i| f(i + 1));
        Self {
            sys_len: prediction.len() as u64,
            ref_len: reference.len() as u64,
            correct: by_order(&|n| ngram::shared(&prediction, &reference, n)),
            total: by_order(&|n| ngram::total(prediction.len(), n)),
        }
    }

    /// exp(1 − reference/prediction) where the prediction is the shorter, else 1.
    pub fn brevity_penalty(&self) -> f64 {
        match (self.sys_len, self.ref_len) {
            (sys, reference) if sys >= reference => 1.0,
            (0, _) => 0.0,
            (sys, reference) => (1.0 - reference as f64 / sys as f64).exp(),
        }
    }

    /// The score, 0 to 100. An order without a match counts as ½, ¼, … of one
    /// (`smooth:exp`, NIST's method); no match of any order is 0.
    pub fn score(&self, order: BleuOrder) -> f64 {
        if self.correct.iter().all(|&c| c == 0) {
            return 0.0;
        }
        let (mut smoothing, mut log_sum, mut orders) = (1.0, 0.0, 0);
        for (&correct, &total) in self.correct.iter().zip(&self.total) {
            if total == 0 {
                break;
            }
            let precision = if correct == 0 {
                smoothing *= 2.0;
                100.0 / (smoothing * total as f64)
            } else {
                100.0 * correct as f64 / total as f64
            };
            log_sum += precision.ln();
            orders += 1;
        }
        if order == BleuOrder::Full && orders < ORDERS {
            return 0.0; // the log of a precision of zero
        }
        self.brevity_penalty() * (log_sum / f64::from(orders as u32)).exp()
    }
}

impl AddAssign for BleuStats {
    fn add_assign(&mut self, other: Self) {
        self.sys_len += other.sys_len;
        self.ref_len += other.ref_len;
        for i in 0..ORDERS {
            self.correct[i] += other.correct[i];
            self.total[i] += other.total[i];
        }
    }
}

impl Add for BleuStats {
    type Output = Self;

    fn add(mut self, other: Self) -> Self {
        self += other;
        self
    }
}

impl Sum for BleuStats {
    fn sum<I: Iterator<Item = Self>>(segments: I) -> Self {
        segments.fold(Self::default(), Add::add)
    }
}

/// The signature to print beside a BLEU, in sacrebleu's form.
pub fn bleu_signature(order: BleuOrder) -> String {
    let effective = match order {
        BleuOrder::Full => "no",
        BleuOrder::Effective => "yes",
    };
    format!("nrefs:1|case:mixed|eff:{effective}|tok:13a|smooth:exp|{VERSION}")
}

/// The tokeniser of mteval-v13a.pl as sacrebleu has it: four entities unescaped,
/// ASCII punctuation set apart, full stops and commas kept inside numbers only.
pub fn tokenize_13a(text: &str) -> Vec<String> {
    let mut line = text
        .trim_end_matches(python::is_space)
        .replace("<skipped>", "")
        .replace("-\n", "")
        .replace('\n', " ");
    // In this order: `&amp;lt;` becomes `<`.
    for (entity, plain) in [
        ("&quot;", "\""),
        ("&amp;", "&"),
        ("&lt;", "<"),
        ("&gt;", ">"),
    ] {
        line = line.replace(entity, plain);
    }
    let mut line: Vec<char> = format!(" {line} ").chars().collect();

    line = rewrite(&line, |window, out| {
        let apart =
            matches!(window[0], ' '..='&' | '('..='+' | '/' | ':'..='@' | '['..='`' | '{'..='~');
        apart.then(|| out.extend([' ', window[0], ' ']))?;
        Some(1)
    });
    let point = |c: char| c == '.' || c == ',';
    line = rewrite(&line, |window, out| match *window {
        [before, mark, ..] if !before.is_ascii_digit() && point(mark) => {
            out.extend([before, ' ', mark, ' ']);
            Some(2)
        }
        _ => None,
    });
    line = rewrite(&line, |window, out| match *window {
        [mark, after, ..] if point(mark) && !after.is_ascii_digit() => {
            out.extend([' ', mark, ' ', after]);
            Some(2)
        }
        _ => None,
    });
    line = rewrite(&line, |window, out| match *window {
        [before, '-', ..] if before.is_ascii_digit() => {
            out.extend([before, ' ', '-', ' ']);
            Some(2)
        }
        _ => None,
    });
    let line: String = line.into_iter().collect();
    python::split(&line).map(str::to_owned).collect()
}

/// One left-to-right pass of a substitution. `rule` sees the rest of the line; where
/// it matches it writes the replacement and says how many characters it consumed,
/// which later matches cannot use again, exactly as with a regular expression.
fn rewrite(line: &[char], rule: impl Fn(&[char], &mut Vec<char>) -> Option<usize>) -> Vec<char> {
    let mut out = Vec::with_capacity(line.len() * 2);
    let mut at = 0;
    while at < line.len() {
        at += rule(&line[at..], &mut out).unwrap_or_else(|| {
            out.push(line[at]);
            1
        });
    }
    out
}
