//! ROUGE, BLEU and chrF, figure for figure as rouge-score and sacrebleu print them.
//!
//! A metric is only comparable when everybody computes the same one, so nothing
//! here is improved upon: the tokenisers, the smoothing and the odd corners (what
//! counts as white space, how chrF++ splits punctuation off) are those of
//! rouge-score 0.1.2 without stemmer and of sacrebleu 2.6.0, and
//! `tests/parity/textmetrics` holds them to it on strings made to disagree.
//!
//! BLEU and chrF of a corpus are not means of their segments. Each therefore comes
//! as *sufficient statistics* of one segment, integers that add: sum them and
//! score the sum. Tests of significance take the figures of single segments instead.

mod bleu;
mod chrf;
mod diversity;
mod ngram;
mod python;
mod rouge;

pub use bleu::{BleuOrder, BleuStats, bleu_signature, tokenize_13a};
pub use chrf::{ChrfKind, ChrfStats, chrf_signature};
pub use diversity::Distinct;
pub use rouge::{Overlap, Rouge};

/// What a signature's `version` says: this implementation, and the one whose
/// figures it reproduces.
const VERSION: &str = concat!(
    "version:textmetrics-",
    env!("CARGO_PKG_VERSION"),
    "|as:sacrebleu-2.6.0"
);
