//! A run in MLflow, by its REST API. A point that comes twice with the same time is one
//! there, so that a batch may be repeated.

use std::collections::HashSet;
use std::sync::Mutex;

use anyhow::{Context, Result};
use cli::{App, Failure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::figures::{now, shown};
use crate::link::{self, Link};
use crate::spool::{Entry, Spool, Standing, lock};

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
    /// A run that is made or found once there is something to send.
    pub fn new(app: &'a App, link: Link<'a>, address: &str, experiment: &str) -> Self {
        Self {
            app,
            link,
            address: address.trim_end_matches('/').to_owned(),
            experiment: experiment.to_owned(),
            run: None,
        }
    }

    /// Sends some entries.
    ///
    /// # Errors
    /// Of the service, or of the state.
    pub fn send(&mut self, spool: &Mutex<Spool>, entries: &[Entry]) -> Result<()> {
        let run = self.run(spool)?.run_id;
        let (mut metrics, mut params) = (Vec::new(), Vec::new());
        for entry in entries {
            match entry {
                Entry::Line(line) => metrics.extend(line.figures.iter().map(|(name, value)| {
                    json!({"key": plain(name), "value": value, "timestamp": line.at, "step": line.step})
                })),
                Entry::Settings(settings) => params.extend(parameters(settings)),
            }
        }
        for (kind, items, most) in [("params", params, PARAMS), ("metrics", metrics, METRICS)] {
            for batch in batches(items, most) {
                let _: Map<String, Value> =
                    self.post("runs/log-batch", &json!({"run_id": run, kind: batch}))?;
            }
        }
        Ok(())
    }

    /// Says that the run is over, for now.
    ///
    /// # Errors
    /// Of the service, or of the state.
    pub fn end(&mut self, spool: &Mutex<Spool>, standing: Standing) -> Result<()> {
        let run = self.run(spool)?;
        self.stands(&run, standing)
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
        let _: Map<String, Value> = self.post("runs/update", &body)?;
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
                let run = serde_json::from_value(run).context("the run in the state")?;
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

#[derive(Deserialize)]
struct Made {
    info: Info,
}

#[derive(Deserialize)]
struct Info {
    run_id: String,
}

/// Checks an address before anything is sent to it.
///
/// # Errors
/// If it is none of a server, or holds a password, which the state would keep.
pub fn check(address: &str) -> Result<(), Failure> {
    // It may hold a password, and is not shown.
    let refuse = |cause: &str| Err(Failure::Usage(format!("--to mlflow=URI: {cause}")));
    let rest = (address.strip_prefix("https://")).or_else(|| address.strip_prefix("http://"));
    let Some(rest) = rest else {
        return refuse("is no http:// or https:// address of a tracking server (`mlflow server`)");
    };
    if rest.split('/').next().unwrap_or_default().contains('@') {
        return refuse(
            "holds a user or password: put them into MLFLOW_TRACKING_USERNAME and \
             MLFLOW_TRACKING_PASSWORD",
        );
    }
    if rest.contains(['?', '#']) {
        return refuse("has a `?` or `#`: name the server alone");
    }
    Ok(())
}

/// Settings as parameters. Two names that would become one are told apart.
fn parameters(settings: &Map<String, Value>) -> Vec<Value> {
    let mut used = HashSet::new();
    let mut unused = |name: &str| {
        let name = plain(name);
        let numbered = (2..).map(|n| format!("{name}_{n}"));
        let mut names = std::iter::once(name.clone()).chain(numbered);
        names.find(|name| used.insert(name.clone()))
    };
    settings
        .iter()
        .map(|(key, value)| {
            let value: String = shown(value).chars().take(VALUE).collect();
            json!({"key": unused(key), "value": value})
        })
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
