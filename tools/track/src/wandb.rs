//! A run at Weights & Biases. Its API is not documented; what is sent here is what its own
//! client sends (`tests/parity/track` holds the two against each other).

use std::sync::Mutex;

use anyhow::Result;
use cli::{App, Failure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::figures::Line;
use crate::link::{Link, Said};
use crate::sender::Service;
use crate::spool::{Entry, Head, Spool, Standing, Taken, lock};

/// Where the service is.
pub const HOME: &str = "https://api.wandb.ai";

/// Where people look.
const SEEN_AT: &str = "https://wandb.ai";

/// Makes the run, or finds it by its name.
const UPSERT: &str = "mutation UpsertBucket($name: String, $project: String, $entity: String, $displayName: String, \
     $config: JSONString) { upsertBucket(input: {name: $name, modelName: $project, entityName: $entity, \
     displayName: $displayName, config: $config}) { bucket { project { name entity { name } } } } }";

/// Where the run's lines go.
#[derive(Clone, Serialize, Deserialize)]
struct Run {
    entity: String,
    project: String,
}

/// A run in a project.
pub struct Wandb<'a> {
    app: &'a App,
    link: Link<'a>,
    base: String,
    /// None: the key's own.
    entity: Option<String>,
    project: String,
    /// Once it is made, with how many settings.
    run: Option<(Run, usize)>,
    told_to_stop: bool,
}

impl<'a> Wandb<'a> {
    /// A run that is made once there is something to send. `base` has no `/` at its end.
    pub fn new(
        app: &'a App,
        link: Link<'a>,
        base: &str,
        (entity, project): (Option<String>, String),
    ) -> Self {
        Self {
            app,
            link,
            base: base.to_owned(),
            entity,
            project,
            run: None,
            told_to_stop: false,
        }
    }

    /// The run as it is there, with the settings that are known.
    fn run(&mut self, spool: &Mutex<Spool>) -> Result<Run> {
        let (head, noted, settings) = {
            let spool = lock(spool);
            if let Some((run, settings)) = &self.run
                && *settings == spool.settings().len()
            {
                return Ok(run.clone());
            }
            (
                spool.head()?.clone(),
                spool.run().cloned(),
                spool.settings().clone(),
            )
        };
        // Once it is made it stays where it is, whatever the key's own entity becomes.
        let noted: Option<Run> = noted.map(serde_json::from_value).transpose()?;
        let entity = noted.as_ref().map(|run| run.entity.clone());
        let known = settings.len();
        // All of them each time: what is sent takes the place of what was.
        let config: Map<String, Value> = (settings.into_iter())
            .map(|(key, value)| (key, json!({ "value": value })))
            .collect();
        let config = (!config.is_empty()).then(|| Value::from(config).to_string());
        let answer: Answer = self.link.post(
            "graphql",
            &json!({"query": UPSERT, "operationName": "UpsertBucket", "variables": {
                "name": head.id, "project": self.project, "entity": entity.or_else(|| self.entity.clone()),
                "displayName": head.name, "config": config,
            }}),
        )?;
        let bucket = answer.bucket().map_err(|cause| {
            let cause = self.link.printable(&cause);
            Said::Passing(format!("Weights & Biases makes no run: {cause}"))
        })?;
        let run = Run {
            entity: bucket.project.entity.name,
            project: bucket.project.name,
        };
        for name in [&run.entity, &run.project] {
            check_name(name).map_err(|cause| {
                let cause = self.link.printable(&cause);
                Failure::World(format!("the answer of Weights & Biases: {cause}"))
            })?;
        }
        if noted.is_none() {
            lock(spool).set_run(serde_json::to_value(&run)?)?;
            let site = match self.base == HOME {
                true => SEEN_AT,
                false => &self.base,
            };
            self.app.info(format_args!(
                "the run is at {site}/{}/{}/runs/{}",
                run.entity, run.project, head.id
            ));
        }
        self.run = Some((run.clone(), known));
        Ok(run)
    }

    fn stream(&mut self, spool: &Mutex<Spool>, run: &Run, body: &Value) -> Result<()> {
        #[derive(Deserialize)]
        struct Streamed {
            #[serde(default)]
            stopped: Option<bool>,
        }
        let id = lock(spool).head()?.id.clone();
        let path = format!("files/{}/{}/{id}/file_stream", run.entity, run.project);
        let answer: Streamed = self.link.post(&path, body)?;
        if answer.stopped == Some(true) && !std::mem::replace(&mut self.told_to_stop, true) {
            self.app.warn(
                "Weights & Biases asks to stop the run (its Stop button): it goes on, for only who began it ends it",
            );
        }
        Ok(())
    }
}

impl Service for Wandb<'_> {
    fn takes_whole_steps(&self) -> bool {
        true
    }

    fn begin(&mut self, spool: &Mutex<Spool>) -> Result<()> {
        self.run(spool).map(|_| ())
    }

    fn send(&mut self, spool: &Mutex<Spool>, entries: &[Entry]) -> Result<Taken> {
        let run = self.run(spool)?;
        let (head, used, last, summary) = {
            let spool = lock(spool);
            (
                spool.head()?.clone(),
                spool.taken().rows,
                spool.last_step(),
                spool.latest().cloned(),
            )
        };
        let summary = summary.map(|line| row(&head, line)).unwrap_or_default();
        let (lines, hidden) = steps(entries, last);
        let taken = Taken {
            rows: used + lines.len() as u64,
            hidden,
        };
        if lines.is_empty() {
            return Ok(taken);
        }
        let rows: Vec<String> = (lines.into_iter())
            .map(|line| Value::from(row(&head, line)).to_string())
            .collect();
        let body = json!({"files": {
            "wandb-history.jsonl": {"offset": used, "content": rows},
            "wandb-summary.json": {"offset": 0, "content": [Value::from(summary).to_string()]},
        }});
        self.stream(spool, &run, &body)?;
        Ok(taken)
    }

    fn wants_heartbeats(&self) -> bool {
        true
    }

    fn heartbeat(&mut self, spool: &Mutex<Spool>) -> Result<()> {
        match self.run.clone() {
            Some((run, _)) => self.stream(spool, &run, &json!({})),
            None => Ok(()),
        }
    }

    fn end(&mut self, spool: &Mutex<Spool>, standing: Standing) -> Result<()> {
        let run = self.run(spool)?;
        let exit = match standing {
            Standing::Interrupted => 255,
            _ => 0,
        };
        self.stream(spool, &run, &json!({"complete": true, "exitcode": exit}))
    }
}

#[derive(Deserialize)]
struct Answer {
    data: Option<Data>,
    errors: Option<Vec<Message>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Data {
    upsert_bucket: Option<Upserted>,
}

#[derive(Deserialize)]
struct Upserted {
    bucket: Bucket,
}

#[derive(Deserialize)]
struct Bucket {
    project: Project,
}

#[derive(Deserialize)]
struct Project {
    name: String,
    entity: Entity,
}

#[derive(Deserialize)]
struct Entity {
    name: String,
}

#[derive(Deserialize)]
struct Message {
    message: String,
}

impl Answer {
    /// The run, or why there is none.
    fn bucket(self) -> Result<Bucket, String> {
        if let Some(error) = self.errors.unwrap_or_default().into_iter().next() {
            return Err(error.message);
        }
        let made = self.data.and_then(|data| data.upsert_bucket);
        made.map(|made| made.bucket)
            .ok_or_else(|| "it does not say why".into())
    }
}

/// Lines as the history may have them: those of one step that stand together as one, and each
/// step after the one before, `last` first. Any other it would pass over, as its own client
/// does ("steps must be monotonically increasing, so this data will be ignored"): how many
/// points those are.
fn steps(entries: &[Entry], mut last: Option<u64>) -> (Vec<Line>, usize) {
    let (mut lines, mut hidden): (Vec<Line>, usize) = (Vec::new(), 0);
    for entry in entries {
        let Entry::Line(line) = entry else { continue };
        match lines.last_mut() {
            Some(before) if before.step == line.step => {
                before.at = line.at;
                before.figures.extend(line.figures.clone());
            }
            _ if last.is_some_and(|last| line.step <= last) => hidden += line.figures.len(),
            _ => {
                last = Some(line.step);
                lines.push(line.clone());
            }
        }
    }
    (lines, hidden)
}

/// A line's figures, and the service's own columns.
fn row(head: &Head, line: Line) -> Map<String, Value> {
    let seconds = |milliseconds: u64| milliseconds as f64 / 1000.0;
    let mut row = line.figures;
    row.insert("_step".into(), line.step.into());
    let since = line.at.saturating_sub(head.began);
    row.insert("_runtime".into(), seconds(since).into());
    row.insert("_timestamp".into(), seconds(line.at).into());
    row
}

/// Refuses what is no name of an entity or project, and would be another path.
///
/// # Errors
/// What is wrong with it, in words.
pub fn check_name(name: &str) -> Result<(), String> {
    let odd = |c: char| c.is_control() || "/\\#?%:".contains(c);
    match name.is_empty() || name.contains(odd) || name.starts_with('.') {
        true => Err(format!("`{name}` is no name of an entity or project")),
        false => Ok(()),
    }
}
