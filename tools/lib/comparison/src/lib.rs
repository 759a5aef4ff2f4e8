//! Two systems held against each other, figure by figure: what sigtest's lines say of them,
//! and what must be said with it, on a screen, on a page and on a model card alike. Here is
//! no layout, and texts that come from the lines are as they stand there.

use record::Record;

/// A larger share of rows without a figure makes those that have one another kind of rows: a
/// judge may refuse just those where one side is worse.
pub const MOST_GAPS: f64 = 0.05;

/// Figures of which less is better; of all others more is.
const LOWER_IS_BETTER: [&str; 2] = ["nll", "perplexity"];

/// Where a judge's verdicts stand in a record.
const VERDICTS: &str = "verdicts.";

/// Systems that learnt nothing, or not the replies to these tweets.
const NOT_TRAINED: [&str; 3] = ["base", "prompted", "shuffled"];

/// One line of sigtest: a test of a figure.
#[derive(Clone, Debug)]
pub struct Test {
    /// Path of the one side.
    pub a: String,
    /// Path of the other.
    pub b: String,
    /// The figure.
    pub metric: String,
    /// `key:value|…`: how it was made.
    pub signature: String,
    test: String,
    p_holm: Option<f64>,
    /// Of a − b; of a one-sided test one end is open.
    ci_low: Option<f64>,
    ci_high: Option<f64>,
    /// Why there is no interval.
    ci_reason: Option<String>,
    /// Why there is no result at all.
    reason: Option<String>,
    method: Option<String>,
    /// Rows with the figure on both sides, on one, and on neither.
    n: u64,
    unpaired: u64,
    missing: u64,
    /// Groups of rows that were flipped and drawn as one.
    clusters: Option<u64>,
    mean_a: Option<f64>,
    mean_b: Option<f64>,
    /// Mean of a − b, and that over the standard deviation of the differences.
    mean_diff: Option<f64>,
    d_z: Option<f64>,
}

impl Test {
    /// Reads a line.
    ///
    /// # Errors
    /// If a key is missing or holds something else.
    pub fn of(line: &Record) -> Result<Self, record::Error> {
        Ok(Self {
            a: line.require("a")?,
            b: line.require("b")?,
            metric: line.require("metric")?,
            test: line.require("test")?,
            p_holm: line.get("p_holm")?,
            ci_low: line.get("ci_low")?,
            ci_high: line.get("ci_high")?,
            ci_reason: line.get("ci_reason")?,
            reason: line.get("reason")?,
            method: line.get("method")?,
            n: line.require("n")?,
            unpaired: line.get("unpaired")?.unwrap_or_default(),
            missing: line.get("missing")?.unwrap_or_default(),
            clusters: line.get("clusters")?,
            mean_a: line.get("mean_a")?,
            mean_b: line.get("mean_b")?,
            mean_diff: line.get("mean_diff")?,
            d_z: line.get("d_z")?,
            signature: line.get("signature")?.unwrap_or_default(),
        })
    }

    /// A part of the signature. Where a text within it holds the same key, the last one is
    /// sigtest's own.
    fn signed(&self, key: &str) -> Option<&str> {
        let mut parts = self.signature.rsplit('|');
        parts.find_map(|part| part.strip_prefix(key)?.strip_prefix(':'))
    }

    fn alpha(&self) -> Option<f64> {
        self.signed("alpha")?.parse().ok()
    }

    fn is_shown(&self) -> bool {
        self.test == "permutation"
    }

    /// Rows that say nothing of the difference.
    fn gaps(&self) -> u64 {
        self.unpaired.saturating_add(self.missing)
    }

    fn rows(&self) -> u64 {
        self.n.saturating_add(self.gaps())
    }

    /// `55 of 100 held-out rows in 20 groups (42 without a figure on either side, 3 on one)`
    fn of_rows(&self) -> String {
        let rows = counted(self.rows(), "held-out row");
        let groups = in_groups(self.clusters);
        let (n, missing, unpaired) = (self.n, self.missing, self.unpaired);
        match self.gaps() {
            0 => format!("{rows}{groups}"),
            _ => format!(
                "{n} of {rows}{groups} ({missing} without a figure on either side, {unpaired} on one)"
            ),
        }
    }
}

/// Two systems, figure by figure.
pub struct Comparison<'t> {
    /// Path of the one side.
    pub a: &'t str,
    /// Path of the other.
    pub b: &'t str,
    /// Who gave the verdicts, where they are compared and it is known.
    pub judge: Option<&'t str>,
    /// The rows that all figures, or the most, are of.
    pub rows: String,
    /// Intervals cover 1 − alpha; `None` where it is not told.
    pub alpha: Option<f64>,
    /// The permutation test's, in the order of the lines.
    pub figures: Vec<Figure<'t>>,
    /// What must be known of some figures.
    pub notes: Vec<Note<'t>>,
    /// Said where nothing could have been found.
    pub never: Option<String>,
    /// How the first figure was tested.
    pub signature: &'t str,
}

/// A figure of a comparison, with the paired permutation test's p-value.
pub struct Figure<'t> {
    /// Its name; a judge's is `score`, whoever was compared.
    pub metric: &'t str,
    /// Means of both sides.
    pub means: [Option<f64>; 2],
    /// What b brought: mean of b − a.
    pub difference: Option<f64>,
    /// That over the standard deviation of the differences.
    pub d_z: Option<f64>,
    /// Ends of the interval of b − a; of a one-sided test one is open.
    pub ends: [Option<f64>; 2],
    /// Adjusted over the figures of the comparison (Holm).
    pub p: Option<f64>,
    /// Whether p is below alpha.
    pub significant: bool,
    /// Whether more than [`MOST_GAPS`] of the rows lack the figure.
    pub has_gaps: bool,
    /// Rows with the figure on both sides.
    pub rows: u64,
}

/// What must be known of some figures.
pub struct Note<'t> {
    /// Whose; none where it is about each.
    pub figures: Vec<&'t str>,
    /// What.
    pub text: String,
    /// Why, in sigtest's words, as they stand in the line.
    pub reason: Option<&'t str>,
}

/// Each pair of sides that was compared, in the order of the lines.
pub fn comparisons(tests: &[Test]) -> Vec<Comparison<'_>> {
    let mut sides: Vec<(&str, &str)> = Vec::new();
    for test in tests {
        if !sides.contains(&(&test.a, &test.b)) {
            sides.push((&test.a, &test.b));
        }
    }
    let of = |(a, b)| {
        let of_both = tests.iter().filter(|t| (&*t.a, &*t.b) == (a, b));
        Comparison::of(a, b, &of_both.collect::<Vec<_>>())
    };
    sides.into_iter().map(of).collect()
}

impl<'t> Comparison<'t> {
    /// Of the tests of two sides, of which there is one.
    fn of(a: &'t str, b: &'t str, tests: &[&'t Test]) -> Self {
        let shown: Vec<&Test> = tests.iter().copied().filter(|t| t.is_shown()).collect();
        // Where the figures do not all have the same gaps, each tells its own in a note.
        let rows = |t: &Test| (t.n, t.unpaired, t.missing, t.clusters);
        let alike = shown.windows(2).all(|pair| rows(pair[0]) == rows(pair[1]));
        let head = match shown.first() {
            Some(first) if alike => first.of_rows(),
            _ => {
                let all = tests.iter().map(|t| t.rows()).max().unwrap_or(0);
                let groups = tests.iter().filter_map(|t| t.clusters).max();
                format!("{}{}", counted(all, "held-out row"), in_groups(groups))
            }
        };
        let alpha = shown.first().and_then(|t| t.alpha());
        let name = |test: &'t Test| match test.metric.starts_with(VERDICTS) {
            true => "score",
            false => &test.metric,
        };
        let mut notes: Vec<Note> = Vec::new();
        for &test in &shown {
            let mut add = |text: String, reason: Option<&'t str>| {
                let same = |note: &&mut Note| (&note.text, note.reason) == (&text, reason);
                match notes.iter_mut().find(same) {
                    Some(known) => known.figures.push(name(test)),
                    None => notes.push(Note {
                        figures: vec![name(test)],
                        text,
                        reason,
                    }),
                }
            };
            if let (_, Some(reason)) = interval(test, tests) {
                let lacks = match test.p_holm {
                    Some(_) => "no interval",
                    None => "no interval, no p",
                };
                add(lacks.into(), Some(reason));
            }
            if !alike && test.gaps() > 0 {
                add(test.of_rows(), None);
            }
        }
        for note in &mut notes {
            if note.figures.len() == shown.len() && shown.len() > 1 {
                note.figures.clear();
            }
        }
        let figure = |test: &&'t Test| {
            let of_means = || Some(test.mean_b? - test.mean_a?);
            Figure {
                metric: name(test),
                means: [test.mean_a, test.mean_b],
                // Zero has no sign.
                difference: test.mean_diff.map(|d| 0.0 - d).or_else(of_means),
                d_z: test.d_z.map(|d| 0.0 - d),
                ends: interval(test, tests).0,
                p: test.p_holm,
                significant: test.p_holm.zip(alpha).is_some_and(|(p, alpha)| p < alpha),
                has_gaps: test.gaps() as f64 > MOST_GAPS * test.rows() as f64,
                rows: test.n,
            }
        };
        let first = shown.first().or(tests.first());
        Self {
            a,
            b,
            judge: first.and_then(|t| t.signed("judge")),
            rows: head,
            alpha,
            figures: shown.iter().map(figure).collect(),
            notes,
            never: never(&shown, alpha),
            signature: first.map_or("", |t| &t.signature),
        }
    }

    /// Whether it is a judge's verdicts that are compared.
    pub fn is_of_verdicts(&self) -> bool {
        self.a.starts_with(VERDICTS)
    }

    /// Whether an adapter is held against this system.
    fn is_against(&self, name: &str) -> bool {
        let sides = [self.a, self.b].map(system);
        sides.contains(&name) && sides.iter().any(|side| !NOT_TRAINED.contains(side))
    }

    /// What is to be known of who gave the verdicts.
    pub fn of_judge(&self) -> Option<&'static str> {
        self.judge
            .and_then(of_judge)
            .filter(|_| self.is_of_verdicts())
    }

    /// What is compared and on how many rows; `name` writes a system's.
    pub fn title(&self, name: impl Fn(&str) -> String) -> String {
        let by_judge = match self.is_of_verdicts() {
            true => " by the judge's score",
            false => "",
        };
        let (a, b) = (name(system(self.a)), name(system(self.b)));
        format!("{b} against {a}{by_judge}, {}", self.rows)
    }

    /// `95%`, what the intervals cover; `interval` where it is not told.
    pub fn level(&self) -> String {
        self.alpha.map_or("interval".into(), level)
    }
}

impl Figure<'_> {
    /// Significant, and with few enough gaps to be called so.
    pub fn star(&self) -> bool {
        self.significant && !self.has_gaps
    }

    /// `<0.0001`; `-` without one.
    pub fn p(&self) -> String {
        self.p.map_or("-".into(), |p| match p < 0.0001 {
            true => "<0.0001".into(),
            false => format!("{p:.4}"),
        })
    }

    /// `-2.000 to -1.500`; `-` without one.
    pub fn interval(&self) -> String {
        match self.ends.map(|end| end.map(|end| figure(end, "+"))) {
            [Some(low), Some(high)] => format!("{low} to {high}"),
            [Some(low), None] => format!("from {low}"),
            [None, Some(high)] => format!("to {high}"),
            [None, None] => "-".into(),
        }
    }
}

impl Note<'_> {
    /// The note with its figures; `name` writes one, `quote` a reason.
    pub fn said(&self, name: impl Fn(&str) -> String, quote: impl Fn(&str) -> String) -> String {
        let of = match self.figures.is_empty() {
            true => "each figure".into(),
            false => (self.figures.iter().map(|of| name(of)).collect::<Vec<_>>()).join(", "),
        };
        match self.reason {
            Some(reason) => format!("{of}: {}: {}", self.text, quote(reason)),
            None => format!("{of}: {}", self.text),
        }
    }
}

/// Ends of the interval of b − a of a permutation test, or why there is none. Lines from
/// before it had one have the bootstrap's.
fn interval<'t>(test: &'t Test, tests: &[&'t Test]) -> ([Option<f64>; 2], Option<&'t str>) {
    let own = test.ci_low.is_some() || test.ci_high.is_some();
    let of = match own || test.ci_reason.is_some() || test.reason.is_some() {
        true => Some(test),
        false => (tests.iter().copied()).find(|t| t.test == "bootstrap" && t.metric == test.metric),
    };
    let Some(of) = of else {
        return ([None, None], None);
    };
    // Differences are written a − b; a reader asks what b brought. Zero has no sign.
    let ends = [of.ci_high, of.ci_low].map(|end| end.map(|end| 0.0 - end));
    let reason = of.ci_reason.as_deref().or(of.reason.as_deref());
    (ends, reason.filter(|_| ends == [None, None]))
}

/// Says where no p-value of a table can be below alpha, whatever the figures are: the test
/// has so few sign patterns, of which the one seen is always as extreme as itself, and in a
/// two-sided test its opposite too; or so few were drawn, to which the one seen is added.
fn never(shown: &[&Test], alpha: Option<f64>) -> Option<String> {
    let alpha = alpha?;
    let tested: Vec<&&Test> = shown.iter().filter(|t| t.p_holm.is_some()).collect();
    // sigtest's own reason, given with each interval that there is none of, is enough.
    if tested.iter().all(|t| t.ci_reason.is_some()) {
        return None;
    }
    let exact = tested
        .iter()
        .filter(|t| t.method.as_deref() == Some("exact"));
    let (of, least) = match exact.count() {
        0 => {
            let drawn: u32 = tested.first()?.signed("resamples")?.parse().ok()?;
            let of = format!("with {}", counted(drawn.into(), "resample"));
            (of, 1.0 / (1.0 + f64::from(drawn)))
        }
        all if all == tested.len() => {
            let (units, noun) = match tested.iter().filter_map(|t| t.clusters).max() {
                Some(groups) => (groups, "group"),
                None => (tested.iter().map(|t| t.n).max()?, "row"),
            };
            let mut kinds = tested.iter().map(|t| t.signed("alternative"));
            let sides = match kinds.all(|kind| kind == Some("two-sided")) {
                true => 2.0,
                false => 1.0,
            };
            let of = format!("of {}", counted(units, noun));
            (of, sides * 0.5_f64.powf(units as f64))
        }
        _ => return None,
    };
    let least = least * tested.len() as f64;
    (least >= alpha).then(|| {
        format!(
            "No p can be below {alpha} here: {of} the least, adjusted over {}, is {:.2}.",
            counted(tested.len() as u64, "figure"),
            least.min(1.0)
        )
    })
}

/// How the figures are to be read, sentence by sentence.
pub fn legend(tests: &[Test]) -> Vec<String> {
    let shown = || tests.iter().filter(|t| t.is_shown());
    // One run's comparisons are made with the same settings; if not, all are named.
    let distinct = |of: &dyn Fn(&Test) -> Option<String>| {
        let mut all: Vec<String> = Vec::new();
        for value in shown().filter_map(of) {
            if !all.contains(&value) {
                all.push(value);
            }
        }
        (!all.is_empty()).then(|| all.join(" or "))
    };
    let is_there = |name: &str| shown().any(|t| t.metric.ends_with(name));
    let more = if is_there("perplexity") {
        " and perplexity"
    } else {
        ""
    };
    let mut said = vec![format!(
        "Lower is better for nll (nats a token){more}, higher for the others; differences are right − left."
    )];
    let of_rows = ["bleu", "chrf", "rouge", "nll"];
    if shown().any(|t| of_rows.iter().any(|name| t.metric.starts_with(name))) {
        let text = "Figures are means over rows, bleu and chrf too: not those of the corpus.";
        said.push(text.into());
    }
    if let Some(level) = distinct(&|t| t.alpha().map(level)) {
        said.push(format!("Intervals: each {level}, not adjusted."));
    }
    let kind = distinct(&|t| {
        let kind = match t.signed("alternative")? {
            "two-sided" => "two-sided",
            "greater" => "one-sided: left greater",
            "less" => "one-sided: left less",
            _ => return None,
        };
        Some(kind.into())
    });
    let kind = kind.map_or(String::new(), |kind| format!(" ({kind})"));
    let star = distinct(&|t| t.alpha().map(|alpha| alpha.to_string()));
    let star = star.map_or(String::new(), |alpha| format!("; * below {alpha}"));
    said.push(format!(
        "p: permutation test{kind}, adjusted over the figures of a table (Holm), over these \
         held-out rows, for this one adapter (one seed, one decoding){star}."
    ));
    if shown().any(|t| [&t.a, &t.b].iter().any(|path| system(path) == "prompted")) {
        let text = "prompted: the base, shown rows of the training data in its prompt, or told what is wanted.";
        said.push(text.into());
    }
    said
}

/// Said where a star was withheld.
pub fn withheld(comparisons: &[Comparison]) -> Option<String> {
    let mut figures = comparisons.iter().flat_map(|c| &c.figures);
    figures.any(|f| f.significant && f.has_gaps).then(|| {
        format!(
            "No * where over {:.0}% of the rows lack the figure on a side: those that have it may \
             not be like the others.",
            100.0 * MOST_GAPS
        )
    })
}

/// What is said of what was not compared: without it a gain says less.
pub fn lacking(comparisons: &[Comparison]) -> Vec<&'static str> {
    let against = |name: &str| comparisons.iter().any(|c| c.is_against(name));
    let mut lacking = Vec::new();
    if !against("prompted") {
        lacking.push("No prompted base (generation.prompted): a better prompt may do as much.");
    }
    if !against("shuffled") {
        lacking.push("No control (CONTROL=shuffled): part of a gain may be style alone.");
    }
    lacking
}

/// What is to be known of a judge, by its name.
pub fn of_judge(judge: &str) -> Option<&'static str> {
    (judge == "reference-chrf-rank").then_some(
        "Offline: to the point or not, whatever the manner, which is most of what is learnt.",
    )
}

/// The system that a path leads to: `systems.NAME`, `verdicts.score.NAME` or
/// `verdicts.scores.A:B.NAME`. Names may hold dots.
pub fn system(path: &str) -> &str {
    let whole = |prefix| path.strip_prefix(prefix);
    if let Some(name) = whole("systems.").or_else(|| whole("verdicts.score.")) {
        return name;
    }
    let last = || path.rsplit('.').next().unwrap_or(path);
    let Some(rest) = whole("verdicts.scores.") else {
        return last();
    };
    let parts = rest.match_indices('.').map(|(at, _)| rest.split_at(at));
    let is_of_pair = |(pair, name): (&str, &'_ str)| {
        let (a, b) = pair.split_once(':')?;
        [a, b].contains(&&name[1..]).then_some(())
    };
    let mut names = parts.filter(|&part| is_of_pair(part).is_some());
    names.next().map_or_else(last, |(_, name)| &name[1..])
}

/// Whether less of a figure is better.
pub fn lower_is_better(metric: &str) -> bool {
    let last = metric.rsplit('.').next().unwrap_or(metric);
    !metric.starts_with(VERDICTS) && LOWER_IS_BETTER.contains(&last)
}

/// A figure that fits its column, whatever its size.
pub fn figure(x: f64, sign: &str) -> String {
    match (x.abs() < 1e5, sign) {
        (true, "+") => format!("{x:+.3}"),
        (true, _) => format!("{x:.3}"),
        (false, "+") => format!("{x:+.2e}"),
        (false, _) => format!("{x:.2e}"),
    }
}

/// `95%`
fn level(alpha: f64) -> String {
    format!("{}%", (1e4 * (1.0 - alpha)).round() / 100.0)
}

/// A number with its noun.
pub fn counted(count: u64, noun: &str) -> String {
    cli::counted(usize::try_from(count).unwrap_or(usize::MAX), noun)
}

fn in_groups(groups: Option<u64>) -> String {
    groups.map_or(String::new(), |n| format!(" in {}", counted(n, "group")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn test(a: &str, b: &str, metric: &str, more: &str) -> Test {
        let line = format!(
            r#"{{"a":"{a}","b":"{b}","metric":"{metric}","test":"permutation","n":9,"p_holm":0.5{more}}}"#
        );
        Test::of(&Record::parse(&line).unwrap()).unwrap()
    }

    #[test]
    fn a_path_leads_to_a_system_whose_name_may_hold_dots() {
        for (path, name) in [
            ("systems.lora", "lora"),
            ("systems.v1.5", "v1.5"),
            ("verdicts.score.v1.5", "v1.5"),
            ("verdicts.scores.base:v1.5.v1.5", "v1.5"),
            ("verdicts.scores.base:v1.5.base", "base"),
            ("verdicts.scores.v.prompted:a.b.v.prompted", "v.prompted"),
            ("other.place.x", "x"),
            ("x", "x"),
        ] {
            assert_eq!(system(path), name, "{path}");
        }
    }

    #[test]
    fn more_of_a_judges_score_is_better_whoever_it_is_of() {
        for metric in ["nll", "systems.x.nll", "perplexity"] {
            assert!(lower_is_better(metric), "{metric}");
        }
        for metric in ["chrf", "verdicts.score", "verdicts.scores.base:v.nll"] {
            assert!(!lower_is_better(metric), "{metric}");
        }
    }

    #[test]
    fn only_what_an_adapter_is_held_against_takes_a_caution_away() {
        let lacks = |sides: &[(&str, &str)]| {
            let tests: Vec<Test> = (sides.iter())
                .map(|(a, b)| test(&format!("systems.{a}"), &format!("systems.{b}"), "nll", ""))
                .collect();
            lacking(&comparisons(&tests)).len()
        };
        assert_eq!(lacks(&[("base", "lora")]), 2);
        assert_eq!(lacks(&[("base", "lora"), ("base", "prompted")]), 2);
        assert_eq!(lacks(&[("prompted", "shuffled")]), 2);
        assert_eq!(lacks(&[("base", "lora"), ("prompted", "lora")]), 1);
        assert_eq!(
            lacks(&[("lora", "prompted"), ("shuffled", "v.prompted")]),
            0
        );
        let verdicts = [test(
            "verdicts.score.base",
            "verdicts.score.v.prompted",
            "verdicts.score",
            "",
        )];
        assert_eq!(lacking(&comparisons(&verdicts)).len(), 2);
    }

    #[test]
    fn where_no_p_can_be_small_it_is_said() {
        let said = |figures: usize, method: &str, resamples: u32| {
            let more = format!(
                r#","method":"{method}","signature":"alternative:two-sided|resamples:{resamples}|alpha:0.05""#
            );
            let names = ["chrf", "bleu", "nll", "rouge1", "rouge2", "rougeL"];
            let tests: Vec<Test> = (names[..figures].iter())
                .map(|name| test("systems.base", "systems.lora", name, &more))
                .collect();
            comparisons(&tests)[0].never.clone()
        };
        // 6 / 101 and 5 / 101; of nine rows 2 / 2^9 times the figures.
        let never = said(6, "sampled", 100).unwrap();
        assert!(
            never.contains("with 100 resamples the least, adjusted over 6 figures, is 0.06"),
            "{never}"
        );
        assert_eq!(said(5, "sampled", 100), None);
        assert_eq!(said(6, "exact", 100), None);
    }
}
