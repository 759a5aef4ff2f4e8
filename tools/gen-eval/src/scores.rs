//! The text metrics of one reply, and of all replies of a system.

use serde::Serialize;
use textmetrics::{
    BleuOrder, BleuStats, ChrfKind, ChrfStats, Distinct, Rouge, bleu_signature, chrf_signature,
};

/// One reply against its reference.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Scores {
    /// F measures, 0 to 1.
    pub rouge1: f64,
    pub rouge2: f64,
    #[serde(rename = "rougeL")]
    pub rouge_l: f64,
    /// Sentence BLEU with effective order, 0 to 100.
    pub bleu: f64,
    /// 0 to 100.
    pub chrf: f64,
}

/// What adds up over the replies of a system.
pub struct Corpus {
    n: u64,
    /// ROUGE-1, 2, L.
    rouge_sums: [f64; 3],
    bleu: BleuStats,
    chrf: ChrfStats,
    distinct: [Distinct; 2],
}

/// The figures of a system over all its replies: BLEU and chrF from the summed
/// statistics of the segments, ROUGE as the mean of its items.
#[derive(Clone, Debug, Serialize)]
pub struct CorpusScores {
    n: u64,
    bleu: f64,
    chrf: f64,
    #[serde(rename = "chrf++")]
    chrf_plus_plus: f64,
    rouge1: f64,
    rouge2: f64,
    #[serde(rename = "rougeL")]
    rouge_l: f64,
    /// Different n-grams per n-gram over all replies.
    distinct_1: f64,
    distinct_2: f64,
    /// Tokens of the replies per token of the references.
    length_ratio: Option<f64>,
    bleu_signature: String,
    chrf_signature: String,
    #[serde(rename = "chrf++_signature")]
    chrf_plus_plus_signature: String,
    /// Of the `bleu` of single items.
    item_bleu_signature: String,
    rouge_signature: &'static str,
}

impl Corpus {
    /// Nothing yet.
    pub fn new() -> Self {
        Self {
            n: 0,
            rouge_sums: [0.0; 3],
            bleu: BleuStats::default(),
            chrf: ChrfStats::default(),
            distinct: [Distinct::new(1), Distinct::new(2)],
        }
    }

    /// Adds a reply; its own scores.
    pub fn add(&mut self, prediction: &str, reference: &str) -> Scores {
        let rouge = Rouge::new(prediction, reference);
        let bleu = BleuStats::new(prediction, reference);
        let chrf = ChrfStats::new(prediction, reference);
        let scores = Scores {
            rouge1: rouge.n(1).fmeasure(),
            rouge2: rouge.n(2).fmeasure(),
            rouge_l: rouge.l().fmeasure(),
            bleu: bleu.score(BleuOrder::Effective),
            chrf: chrf.score(ChrfKind::Chrf),
        };
        self.n += 1;
        for (sum, score) in
            self.rouge_sums
                .iter_mut()
                .zip([scores.rouge1, scores.rouge2, scores.rouge_l])
        {
            *sum += score;
        }
        self.bleu += bleu;
        self.chrf += chrf;
        self.distinct
            .iter_mut()
            .for_each(|distinct| distinct.add(prediction));
        scores
    }

    /// The figures of what was added so far.
    pub fn scores(&self) -> CorpusScores {
        let [rouge1, rouge2, rouge_l] = self.rouge_sums.map(|sum| sum / self.n.max(1) as f64);
        CorpusScores {
            n: self.n,
            bleu: self.bleu.score(BleuOrder::Full),
            chrf: self.chrf.score(ChrfKind::Chrf),
            chrf_plus_plus: self.chrf.score(ChrfKind::ChrfPlusPlus),
            rouge1,
            rouge2,
            rouge_l,
            distinct_1: self.distinct[0].ratio(),
            distinct_2: self.distinct[1].ratio(),
            length_ratio: (self.bleu.ref_len > 0)
                .then(|| self.bleu.sys_len as f64 / self.bleu.ref_len as f64),
            bleu_signature: bleu_signature(BleuOrder::Full),
            chrf_signature: chrf_signature(ChrfKind::Chrf),
            chrf_plus_plus_signature: chrf_signature(ChrfKind::ChrfPlusPlus),
            item_bleu_signature: bleu_signature(BleuOrder::Effective),
            rouge_signature: "as:rouge_score-0.1.2|stemmer:no|aggregate:mean",
        }
    }
}
