//! A run in MLflow, by its REST API. A point that comes twice with the same time is one
//! there, so that a batch may be repeated.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;

use anyhow::{Error, Result};
use cli::{App, Failure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::figures::{now, shown};
use crate::link::{self, Link, Said};
use crate::sender::Service;
use crate::spool::{Entry, Spool, Standing, Taken, lock};

/// Where people put what opens the server.
pub const SECRETS: &str =
    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN";

/// What one request may hold.
const METRICS: usize = 1000;
const PARAMS: usize = 100;
/// Bytes, of the 1 MB that are documented.
const BYTES: usize = 900_000;

/// What a name and a value may be long, in characters.
const NAME: usize = 250;
const VALUE: usize = 6000;

/// What MLflow calls the run.
#[derive(Clone, Serialize, Deserialize)]
struct Run {
    experiment_id: String,
    run_id: String,
}

/// A run in an experiment.
pub struct Mlflow<'a> {
    app: &'a App,
    link: Link<'a>,
    /// Where people look, without secrets.
    address: String,
    experiment: String,
    run: Option<Run>,
}

impl<'a> Mlflow<'a> {
    /// A run that is made or found once there is something to send. `address` has no `/` at
    /// its end.
    pub fn new(app: &'a App, link: Link<'a>, address: &str, experiment: &str) -> Self {
        Self {
            app,
            link,
            address: address.to_owned(),
            experiment: experiment.to_owned(),
            run: None,
        }
    }

    fn stands(&self, run: &Run, standing: Standing) -> Result<()> {
        let status = match standing {
            Standing::Running => "RUNNING",
            Standing::Finished => "FINISHED",
            Standing::Interrupted => "KILLED",
        };
        let mut body = json!({"run_id": run.run_id, "status": status});
        if standing != Standing::Running {
            body["end_time"] = now().into();
        }
        self.post::<Map<String, Value>>("runs/update", &body)
            .map_err(|error| self.refused(run, error))?;
        Ok(())
    }

    fn run(&mut self, spool: &Mutex<Spool>) -> Result<Run> {
        if let Some(run) = &self.run {
            return Ok(run.clone());
        }
        let noted = lock(spool).run().cloned();
        let (run, is_new) = match noted {
            Some(Value::Null) => {
                let experiment_id = self.experiment()?;
                match self.find(spool, &experiment_id)? {
                    Some(run) => (run, false),
                    None => (self.create(spool, experiment_id)?, true),
                }
            }
            Some(run) => {
                let run = serde_json::from_value(run)
                    .map_err(|error| Failure::World(format!("the run in the state: {error}")))?;
                (run, false)
            }
            None => {
                let experiment_id = self.experiment()?;
                (self.create(spool, experiment_id)?, true)
            }
        };
        if !is_new {
            self.stands(&run, Standing::Running)?;
        }
        self.app.info(format_args!(
            "the run is at {}/#/experiments/{}/runs/{}",
            self.address, run.experiment_id, run.run_id
        ));
        self.run = Some(run.clone());
        Ok(run)
    }

    /// Why something about the run was refused: it may have been deleted, and then no waiting
    /// helps.
    fn refused(&self, run: &Run, error: Error) -> Error {
        #[derive(Deserialize)]
        struct Got {
            run: Stage,
        }
        #[derive(Deserialize)]
        struct Stage {
            info: Lifecycle,
        }
        #[derive(Deserialize)]
        struct Lifecycle {
            lifecycle_stage: Option<String>,
        }
        if !link::is_refused(&error) {
            return error;
        }
        let id = self.link.printable(&run.run_id);
        let asked = [("run_id", run.run_id.as_str())];
        let got: Result<Got> = self.link.get("api/2.0/mlflow/runs/get", &asked);
        let remedy = match got {
            Ok(got) if got.run.info.lifecycle_stage.as_deref() == Some("deleted") => {
                format!(", or `mlflow runs restore --run-id {id}` brings it back")
            }
            Err(error) if link::is_called(&error, "RESOURCE_DOES_NOT_EXIST") => String::new(),
            _ => return error,
        };
        Said::Gone(format!(
            "the run {id} was deleted at the server: another --state sends all to a new one{remedy}"
        ))
        .into()
    }

    /// The experiment's id; it is made where it is missing.
    fn experiment(&self) -> Result<String> {
        #[derive(Deserialize)]
        struct Named {
            experiment: Id,
        }
        #[derive(Deserialize)]
        struct Id {
            experiment_id: String,
        }
        let find = || -> Result<Named> {
            let path = "api/2.0/mlflow/experiments/get-by-name";
            self.link
                .get(path, &[("experiment_name", &self.experiment)])
        };
        match find() {
            Ok(found) => return Ok(found.experiment.experiment_id),
            Err(error) if link::is_missing(&error) => {}
            Err(error) => return Err(error),
        }
        match self.post::<Id>("experiments/create", &json!({"name": self.experiment})) {
            Ok(made) => Ok(made.experiment_id),
            // Another may have made it meanwhile, or an attempt of ours that seemed to fail.
            Err(error) => find()
                .map(|found| found.experiment.experiment_id)
                .map_err(|_| error),
        }
    }

    /// The run that was asked for when no answer came.
    fn find(&self, spool: &Mutex<Spool>, experiment_id: &str) -> Result<Option<Run>> {
        #[derive(Deserialize)]
        struct Found {
            #[serde(default)]
            runs: Vec<Made>,
        }
        let id = lock(spool).head()?.id.clone();
        let found: Found = self.post(
            "runs/search",
            &json!({"experiment_ids": [experiment_id], "filter": format!("tags.track = '{id}'"), "max_results": 1}),
        )?;
        Ok(found.runs.into_iter().next().map(|made| Run {
            experiment_id: experiment_id.to_owned(),
            run_id: made.info.run_id,
        }))
    }

    fn create(&self, spool: &Mutex<Spool>, experiment_id: String) -> Result<Run> {
        #[derive(Deserialize)]
        struct Created {
            run: Made,
        }
        let head = lock(spool).head()?.clone();
        let mut body = json!({
            "experiment_id": experiment_id,
            "start_time": head.began,
            "tags": [{"key": "track", "value": head.id}, {"key": "mlflow.source.name", "value": "track"}],
        });
        if let Some(name) = head.name {
            body["run_name"] = name.into();
        }
        lock(spool).set_run(Value::Null)?;
        let made = self
            .link
            .make::<Created>("api/2.0/mlflow/runs/create", &body);
        let made = match made {
            // It may be there, and a second one would be half a run.
            Err(error) if link::may_be_done(&error) => {
                match self.find(spool, &experiment_id).ok().flatten() {
                    Some(run) => run,
                    None => return Err(error),
                }
            }
            made => Run {
                experiment_id,
                run_id: made?.run.info.run_id,
            },
        };
        lock(spool).set_run(serde_json::to_value(&made)?)?;
        Ok(made)
    }

    fn post<T: serde::de::DeserializeOwned>(&self, path: &str, body: &Value) -> Result<T> {
        self.link.post(&format!("api/2.0/mlflow/{path}"), body)
    }
}

impl Service for Mlflow<'_> {
    fn send(&mut self, spool: &Mutex<Spool>, entries: &[Entry]) -> Result<Taken> {
        let run = self.run(spool)?;
        let (metrics_names, params_names) = {
            let spool = lock(spool);
            let figures = spool.latest().map(|line| names(&line.figures));
            (figures.unwrap_or_default(), names(spool.settings()))
        };
        let (mut metrics, mut params) = (Vec::new(), Vec::new());
        for entry in entries {
            match entry {
                Entry::Line(line) => metrics.extend(line.figures.iter().map(|(name, value)| {
                    json!({"key": metrics_names[name], "value": value, "timestamp": line.at, "step": line.step})
                })),
                Entry::Settings(settings) => params.extend(settings.iter().map(|(key, value)| {
                    let value: String = shown(value).chars().take(VALUE).collect();
                    json!({"key": params_names[key], "value": value})
                })),
            }
        }
        for (kind, items, most) in [("params", params, PARAMS), ("metrics", metrics, METRICS)] {
            for batch in batches(items, most) {
                let body = json!({"run_id": run.run_id, kind: batch});
                self.post::<Map<String, Value>>("runs/log-batch", &body)
                    .map_err(|error| self.refused(&run, error))?;
            }
        }
        Ok(Taken::default())
    }

    fn end(&mut self, spool: &Mutex<Spool>, standing: Standing) -> Result<()> {
        let run = self.run(spool)?;
        self.stands(&run, standing)
    }
}

#[derive(Deserialize)]
struct Made {
    info: Info,
}

#[derive(Deserialize)]
struct Info {
    run_id: String,
}

/// What MLflow is to call each key. Keys that would become one are told apart; of keys that
/// are only ever added to, each keeps its name.
fn names(all: &Map<String, Value>) -> HashMap<String, String> {
    let mut used = HashSet::new();
    let mut unused = |name: &str| {
        let name = plain(name);
        let numbered = (2_u64..).map(|n| {
            let number = format!("_{n}");
            // All of it is ASCII.
            let room = name.len().min(NAME - number.len());
            format!("{}{number}", &name[..room])
        });
        let mut names = std::iter::once(name.clone()).chain(numbered);
        names.find(|name| used.insert(name.clone()))
    };
    all.keys()
        .filter_map(|key| Some((key.clone(), unused(key)?)))
        .collect()
}

/// A name of the characters that MLflow takes, and that is no path out of its folder.
fn plain(name: &str) -> String {
    let is_path = name.split('/').any(|part| matches!(part, "" | "." | ".."));
    let taken = |c: char| {
        c.is_ascii_alphanumeric()
            || matches!(c, '_' | '-' | '.' | ' ' | ':')
            || (c == '/' && !is_path)
    };
    let name = name.chars().take(NAME);
    let name: String = name.map(|c| if taken(c) { c } else { '_' }).collect();
    match name.as_str() {
        "" | "." | ".." => "_".into(),
        _ => name,
    }
}

/// Cuts items into what a request may hold.
fn batches(items: Vec<Value>, most: usize) -> Vec<Vec<Value>> {
    let mut batches: Vec<Vec<Value>> = Vec::new();
    let mut bytes = 0;
    for item in items {
        let length = item.to_string().len() + 1;
        match batches.last_mut() {
            Some(batch) if batch.len() < most && bytes + length <= BYTES => {
                bytes += length;
                batch.push(item);
            }
            _ => {
                bytes = length;
                batches.push(vec![item]);
            }
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_such_as_mlflow_takes() {
        // mlflow/utils/validation.py: _VALID_PARAM_AND_METRIC_NAMES and path_not_unique.
        for (name, taken) in [
            ("training.seed", "training.seed"),
            ("eval/loss", "eval/loss"),
            ("loss (held out)", "loss _held out_"),
            ("größe", "gr__e"),
            ("../up", ".._up"),
            ("a//b", "a__b"),
            ("/root", "_root"),
            (".", "_"),
            ("", "_"),
        ] {
            assert_eq!(plain(name), taken);
        }
    }
}
