//! Every figure against rouge-score's and sacrebleu's own, on strings made to disagree.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use serde_json::Value;
use textmetrics::{
    BleuOrder, BleuStats, ChrfKind, ChrfStats, Distinct, Overlap, Rouge, bleu_signature,
    chrf_signature, tokenize_13a,
};

/// Both sides do the same operations on f64 in the same order. Over this dump the
/// largest difference is 0 where both use glibc's `exp` and `log` (the test prints
/// it); another libm may differ in the last place of each, some 1e-14 of 100.
const TOLERANCE: f64 = 1e-12;

struct Dump {
    pairs: Vec<(String, String, Value)>,
    slices: Vec<(usize, usize, Value)>,
}

fn dump() -> Dump {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../tests/parity/textmetrics");
    let text = std::fs::read_to_string(folder.join("cases.jsonl")).unwrap();

    let (mut pairs, mut slices) = (Vec::new(), Vec::new());
    for line in text.split_terminator('\n') {
        let mut line: Value = serde_json::from_str(line).unwrap();
        let expected = line["expected"].take();
        if let Some(slice) = line["slice"].as_array() {
            let bound = |i: usize| slice[i].as_u64().unwrap() as usize;
            slices.push((bound(0), bound(1), expected));
        } else {
            let text = |key: &str| line[key].as_str().unwrap().to_owned();
            pairs.push((text("prediction"), text("reference"), expected));
        }
    }
    assert_eq!((pairs.len(), slices.len()), (360, 6));
    Dump { pairs, slices }
}

/// Fails unless `ours` is within the tolerance; returns by how much it misses.
fn near(ours: f64, theirs: &Value, what: &str) -> f64 {
    let difference = (ours - theirs.as_f64().unwrap()).abs();
    assert!(
        difference <= TOLERANCE,
        "{what}: {ours} instead of {theirs}"
    );
    difference
}

#[test]
fn segments_score_as_in_python() {
    let mut worst = 0.0_f64;
    for (prediction, reference, expected) in dump().pairs {
        let what = |name: &str| format!("{name} of {prediction:?} against {reference:?}");
        let rouge = Rouge::new(&prediction, &reference);
        for (name, overlap) in [
            ("rouge1", rouge.n(1)),
            ("rouge2", rouge.n(2)),
            ("rougeL", rouge.l()),
        ] {
            let ours = [overlap.precision(), overlap.recall(), overlap.fmeasure()];
            for (i, ours) in ours.into_iter().enumerate() {
                worst = worst.max(near(ours, &expected[name][i], &what(name)));
            }
        }
        let tokens = tokenize_13a(&prediction);
        assert_eq!(
            serde_json::json!(tokens),
            expected["tokens"],
            "{}",
            what("tokens")
        );
        let bleu = BleuStats::new(&prediction, &reference);
        let bleu = bleu.score(BleuOrder::Effective);
        worst = worst.max(near(bleu, &expected["bleu"], &what("bleu")));
        let chrf = ChrfStats::new(&prediction, &reference);
        for (name, kind) in [("chrf", ChrfKind::Chrf), ("chrf++", ChrfKind::ChrfPlusPlus)] {
            worst = worst.max(near(chrf.score(kind), &expected[name], &what(name)));
        }
    }
    println!("worst difference: {worst:e}");
}

#[test]
fn a_corpus_scores_as_in_python_from_the_sum_of_its_segments() {
    let dump = dump();
    for (from, to, expected) in &dump.slices {
        let pairs = &dump.pairs[*from..*to];
        let what = |name: &str| format!("{name} of pairs {from}..{to}");
        let bleu: BleuStats = pairs.iter().map(|(p, r, _)| BleuStats::new(p, r)).sum();
        near(
            bleu.score(BleuOrder::Full),
            &expected["bleu"],
            &what("bleu"),
        );
        let chrf: ChrfStats = pairs.iter().map(|(p, r, _)| ChrfStats::new(p, r)).sum();
        near(chrf.score(ChrfKind::Chrf), &expected["chrf"], &what("chrf"));
        near(
            chrf.score(ChrfKind::ChrfPlusPlus),
            &expected["chrf++"],
            &what("chrf++"),
        );
        for n in [1, 2] {
            let mut distinct = Distinct::new(n);
            pairs.iter().for_each(|(p, ..)| distinct.add(p));
            let name = format!("distinct_{n}");
            near(distinct.ratio(), &expected[&name], &what(&name));
        }
    }
}

/// Everything but who computed it must read the same.
#[test]
fn signatures_are_sacrebleus_with_our_name() {
    let dump = dump();
    let expected = &dump.slices[0].2;
    for (name, ours) in [
        ("bleu_signature", bleu_signature(BleuOrder::Full)),
        ("chrf_signature", chrf_signature(ChrfKind::Chrf)),
        ("chrf++_signature", chrf_signature(ChrfKind::ChrfPlusPlus)),
    ] {
        let (settings, version) = expected[name]
            .as_str()
            .unwrap()
            .rsplit_once("|version:")
            .unwrap();
        let (ours, by) = ours.split_once("|version:").unwrap();
        assert_eq!(ours, settings);
        assert!(by.ends_with(&format!("|as:sacrebleu-{version}")), "{by}");
    }
}

#[test]
fn nothing_in_common_and_nothing_at_all_score_zero() {
    for (prediction, reference) in [("", ""), ("a", ""), ("", "a"), ("b", "a")] {
        assert_eq!(Rouge::new(prediction, reference).l().fmeasure(), 0.0);
        assert_eq!(
            BleuStats::new(prediction, reference).score(BleuOrder::Effective),
            0.0
        );
        assert_eq!(
            ChrfStats::new(prediction, reference).score(ChrfKind::Chrf),
            0.0
        );
    }
    assert_eq!(Overlap::default().fmeasure(), 0.0);
    assert_eq!(BleuStats::default().score(BleuOrder::Full), 0.0);
}
