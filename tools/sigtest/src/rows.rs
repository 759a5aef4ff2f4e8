//! What is asked, and the rows that can answer it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use clap::Args;
use cli::{App, Counts, Failure};
use jsonl::{Lines, Position};
use record::Record;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::figures;

/// Where judge writes.
const VERDICTS: &str = "verdicts.";

/// What is compared.
#[derive(Args)]
pub struct Question {
    // The empty default stands for none where --print-config asks for neither.
    /// Dotted path to a number, or to an object of numbers
    #[arg(
        long,
        value_name = "FIELD",
        required_unless_present = "print_config",
        default_value = "",
        hide_default_value = true
    )]
    pub a: String,
    /// The same for the other side
    #[arg(
        long,
        value_name = "FIELD",
        required_unless_present = "print_config",
        default_value = "",
        hide_default_value = true
    )]
    pub b: String,
    /// Compare only these metrics of an object
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub metrics: Vec<String>,
    /// Rows with the same value here are not independent: one cluster, flipped and drawn as one
    #[arg(long, value_name = "FIELD")]
    pub cluster: Option<String>,
}

/// What one record says.
pub struct Row {
    /// As it is written.
    id: Option<Box<RawValue>>,
    pub a: HashMap<String, f64>,
    pub b: HashMap<String, f64>,
    pub cluster: Option<String>,
    /// Who gave the verdicts, where verdicts are compared.
    pub judge: Option<String>,
    /// What is `null` on either side.
    nulls: BTreeSet<String>,
}

impl Question {
    /// The rows, and the metrics that both sides have somewhere, in the order in
    /// which a has them.
    pub fn read(
        &self,
        app: &App,
        rejects: Option<&Path>,
    ) -> anyhow::Result<(Vec<Row>, Vec<String>, Counts)> {
        let mut rejects = app.rejects("--rejects", rejects)?;
        let mut records = app.records(Lines::open(Path::new("-"))?);
        let (mut rows, mut names, mut counts) = (Vec::new(), Vec::new(), Counts::default());
        let mut seen = HashMap::new();
        while let Some((position, row)) =
            records.next_with(&mut rejects, |record| self.row(&record, &mut names))?
        {
            counts.read += 1;
            if let Some(row) = row {
                self.refuse_again(&row, &position, &mut seen)?;
                rows.push(row);
            }
        }
        counts.rejected = records.bad();
        counts.read += counts.rejected;
        rejects.commit()?;
        if rows.is_empty() {
            return Err(Failure::Input(
                "-: the input is empty: there is nothing to compare".into(),
            )
            .into());
        }
        self.tell_of_nulls(app, &rows);
        let metrics = self.choose(&rows, &names)?;
        for name in &metrics {
            let alone = |row: &&Row| {
                row.a.contains_key(name) != row.b.contains_key(name) && !row.nulls.contains(name)
            };
            let one_sided = rows.iter().filter(alone).count();
            if one_sided > 0 {
                let all = rows.len();
                app.warn(format_args!(
                    "`{name}` is on one side only in {one_sided} of {}, left out",
                    cli::counted(all, "row")
                ));
            }
        }
        Ok((rows, metrics, counts))
    }

    /// A row that comes again, as where a file was given twice, makes luck look like a
    /// difference. In one cluster with its like it does not.
    fn refuse_again(
        &self,
        row: &Row,
        position: &Position,
        seen: &mut HashMap<String, u64>,
    ) -> Result<(), Failure> {
        let Some(id) = row.id.as_deref().map(RawValue::get) else {
            return Ok(());
        };
        match seen.insert(id.to_owned(), position.line) {
            Some(before) if self.cluster.as_deref() != Some("id") => Err(Failure::Input(format!(
                "{position}: key `id`: {id} is on line {before} too, and rows that are counted twice look \
                 significant: leave one out, or, where several rows of one id are meant, add --cluster id"
            ))),
            _ => Ok(()),
        }
    }

    /// A figure that is null was not measured: without a word its rows, or the whole
    /// metric, would be missing.
    fn tell_of_nulls(&self, app: &App, rows: &[Row]) {
        let mut counts = BTreeMap::new();
        for name in rows.iter().flat_map(|row| &row.nulls) {
            *counts.entry(name).or_insert(0) += 1;
        }
        for (name, count) in counts {
            if self.wants(name) {
                let all = cli::counted(rows.len(), "row");
                app.warn(format_args!(
                    "`{name}` is null, so not measured, in {count} of {all}, left out of that metric"
                ));
            }
        }
    }

    /// Of the names of numbers, those that some row has on both sides and that are
    /// asked for.
    fn choose(&self, rows: &[Row], names: &[String]) -> Result<Vec<String>, Failure> {
        let none = |cause: String| Err(Failure::Input(format!("-: {cause}")));
        let count = rows.len();
        if rows.iter().all(|row| row.a.is_empty()) {
            return none(format!(
                "none of {count} records has a number at --a {}",
                self.a
            ));
        }
        if rows.iter().all(|row| row.b.is_empty()) {
            return none(format!(
                "none of {count} records has a number at --b {}",
                self.b
            ));
        }
        let both = |name: &String| {
            rows.iter()
                .any(|row| row.a.contains_key(name) && row.b.contains_key(name))
        };
        let common: Vec<String> = names.iter().filter(|name| both(name)).cloned().collect();
        if common.is_empty() {
            return none(format!(
                "no record has the same number at both --a {} and --b {}",
                self.a, self.b
            ));
        }
        if let Some(absent) = self.metrics.iter().find(|name| !common.contains(name)) {
            let have = common.join(", ");
            return none(format!(
                "no record has --metrics {absent} on both sides; there are: {have}"
            ));
        }
        Ok(common.into_iter().filter(|name| self.wants(name)).collect())
    }

    /// Whether a metric is asked for.
    fn wants(&self, name: &String) -> bool {
        self.metrics.is_empty() || self.metrics.contains(name)
    }

    /// The figures of one record, or `None` for the corpus line. New names of
    /// figures are added to `names`.
    fn row(&self, record: &Record, names: &mut Vec<String>) -> Result<Option<Row>, record::Error> {
        let (a, b) = (
            figures::find(record, &self.a)?,
            figures::find(record, &self.b)?,
        );
        if record.contains("corpus") && a.is_none() && b.is_none() {
            return Ok(None);
        }
        let mut nulls = BTreeSet::new();
        let mut side = |value: Option<Value>| -> HashMap<String, f64> {
            let figures = value
                .map(|value| figures::numbers(&value))
                .unwrap_or_default();
            let mut numbers = HashMap::new();
            for (mut name, figure) in figures {
                if name.is_empty() {
                    name = figures::common_name(&self.a, &self.b);
                }
                let Some(figure) = figure else {
                    nulls.insert(name);
                    continue;
                };
                if !names.contains(&name) {
                    names.push(name.clone());
                }
                numbers.insert(name, figure);
            }
            numbers
        };
        let is_one = a.as_ref().is_some_and(Value::is_number);
        let (a, b) = (side(a), side(b));
        let too_far = |name: &&String| match (a.get(*name), b.get(*name)) {
            (Some(a), Some(b)) => !(a - b).is_finite() && self.wants(name),
            _ => false,
        };
        if let Some(name) = names.iter().find(too_far) {
            let (of_a, of_b) = (cli::shown(a[name]), cli::shown(b[name]));
            return Err(record::Error::Field {
                key: match is_one {
                    true => self.a.clone(),
                    false => format!("{}.{name}", self.a),
                },
                cause: format!(
                    "{of_a}, less {of_b} at --b {}, is beyond what a number can hold",
                    self.b
                ),
            });
        }
        let cluster = match &self.cluster {
            None => None,
            Some(path) => match figures::find(record, path)?.filter(|value| !value.is_null()) {
                Some(value) => Some(
                    value
                        .as_str()
                        .map_or_else(|| value.to_string(), str::to_owned),
                ),
                None => return Err(record::Error::Missing(path.clone())),
            },
        };
        let judge = match self.a.starts_with(VERDICTS) || self.b.starts_with(VERDICTS) {
            true => figures::find(record, &format!("{VERDICTS}judge"))?,
            false => None,
        };
        Ok(Some(Row {
            id: record.get("id")?,
            a,
            b,
            cluster,
            judge: judge.and_then(|judge| judge.as_str().map(str::to_owned)),
            nulls,
        }))
    }
}
