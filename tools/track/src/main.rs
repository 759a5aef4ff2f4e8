//! track sends a run's figures to where people look at them. It is a filter: lines pass
//! through it at once and unchanged, and what is sent is sent beside them, so that a service
//! that is slow or gone holds no training up.
//!
//! Its threads: one reads, one writes what was read, one puts figures into the state, one sends
//! what the state holds, one looks out for signals.

mod event;
mod figures;
mod link;
mod mlflow;
mod reading;
mod sender;
mod spool;
mod tensorboard;
mod wandb;

use std::io::ErrorKind;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, Sender as Channel, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use cli::{App, Common, Counts, Failure, Tool, env_or_dotenv};
use httpclient::{Client, Scheme, Secret, confirm_host};
use jsonl::{Lines, Output, ReadError, Records, Rejects, WriteError};

use figures::Line;
use link::{Link, Said};
use mlflow::Mlflow;
use reading::{Input, LAST_LINES, Reading};
use sender::{Destination, Sender};
use spool::{ANOTHER, Spool, lock};
use tensorboard::TensorBoard;
use wandb::Wandb;

const EXAMPLES: &str = "\
$ track --to tensorboard=runs/main < metrics.jsonl > passed.jsonl
$ track --to tensorboard=b --settings train.yaml < metrics.jsonl > /dev/null
To two places:
$ track --to tensorboard=c < metrics.jsonl | track --to tensorboard=d > both
While a run goes on, with the settings that it is found to have:
  qlora-train --data pairs.jsonl --out out |
    track --to tensorboard=runs/out --settings out/run.json > /dev/null
With MLFLOW_TRACKING_URI or WANDB_API_KEY set; again, it goes on where it was:
  track --to mlflow --state state < metrics.jsonl > /dev/null
  track --to wandb=me/tweets --state state < metrics.jsonl > /dev/null";

/// Send a run's figures to TensorBoard, MLflow or Weights & Biases
///
/// Reads lines as qlora-train prints them and keeps them in metrics.jsonl: `step`, and
/// figures under any other names. Each line passes to standard output at once. Figures go
/// out every --every seconds beside that; what a service does not take is kept in --state
/// and said, and the same command sends it later. A figure that was sent for a step is not
/// sent again, so a run that goes on, or a file that is sent twice, doubles nothing.
///
/// TensorBoard's event file is written into the folder that is named, with the state beside
/// it. Lines have no time of their own: they get that at which they were read.
///
/// Weights & Biases takes a step's figures at once and steps in their order. While lines come
/// the last step waits for the rest of its figures; those that come for a step that was sent
/// are kept, but not shown there, and told.
///
/// A service that fails is asked again after longer and longer, 10 minutes at most unless
/// it asks for more; after a wrong key or a request that it refuses no more is sent.
///
/// The run counts as finished when its lines end. Where --settings names the run.json of
/// qlora-train, an adapter must be beside it, else the run is shown as broken off: MLflow
/// calls it KILLED. The same command shows it as finished once it is.
///
/// After SIGINT, SIGTERM or SIGHUP lines pass for 2 seconds more, and what was read is sent
/// for 5 at most; the rest is kept. Exit 130.
///
/// Secrets are taken from the environment or .env: WANDB_API_KEY; MLFLOW_TRACKING_USERNAME
/// and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, for MLFLOW_TRACKING_URI's host.
#[derive(Parser)]
#[command(version, after_long_help = cli::after_help(EXAMPLES), max_term_width = 80)]
struct Track {
    /// Where figures go: tensorboard=DIR, mlflow[=URI] [env: MLFLOW_TRACKING_URI], or
    /// wandb[=[ENTITY/]PROJECT] [env: WANDB_ENTITY, WANDB_PROJECT]
    #[arg(long, value_name = "DESTINATION")]
    to: String,
    /// Folder for what was read and sent [default for tensorboard: its DIR]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// The run's settings, sent as its parameters: run.json or train.yaml beside its
    /// metrics.jsonl, or other YAML; read with the first line, when it must be there
    #[arg(long, value_name = "FILE")]
    settings: Option<PathBuf>,
    /// The run's name for people [default: the service's choice]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// MLflow's experiment, made where it is missing [env: MLFLOW_EXPERIMENT_NAME]
    /// [default: Default]
    #[arg(long, value_name = "NAME")]
    experiment: Option<String>,
    /// Least time between sending and sending again; W&B hears every 30 seconds that the run
    /// lives [default: 15]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    every: Option<f64>,
    /// Allow sending the secret to this HOST or HOST:PORT: that of WANDB_BASE_URL, or of
    /// mlflow=URI where it is not MLFLOW_TRACKING_URI's
    #[arg(long, value_name = "HOST")]
    send_key_to: Option<String>,
    /// Write malformed lines here (with --max-bad-lines)
    #[arg(long, value_name = "FILE")]
    rejects: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

/// Services, which are asked; TensorBoard's file is written.
const SERVICES: &[&str] = &["mlflow", "wandb"];

/// Seconds of --every.
const EVERY: f64 = 15.0;

fn main() -> ExitCode {
    cli::main::<Track>()
}

impl Tool for Track {
    fn common(&self) -> &Common {
        &self.common
    }

    fn run(self, app: &App) -> Result<()> {
        for (flag, given) in [
            ("--config", self.common.config.is_some()),
            ("--print-config", self.common.print_config.is_some()),
        ] {
            if given {
                let cause =
                    format!("{flag}: track has no settings of its own; --settings names the run's");
                return Err(Failure::Usage(cause).into());
            }
        }
        if let Some(path) = &self.settings {
            app.reads("--settings", path)?;
            // A run that begins now writes it before its first line; what is there already is
            // looked at before anything is written.
            if path.is_file() {
                figures::settings(path)?;
            }
        }
        let reading = Arc::new(Reading::default());
        let (to, destination) = self.destination(app, &reading)?;
        let folder = self.folder(&destination)?;
        let rejects = app.rejects("--rejects", self.rejects.as_deref())?;
        let input = Input::new(jsonl::open("-".as_ref())?, Arc::clone(&reading))?;
        let records = app.records(Lines::new("-", input));
        let spool = Spool::open(folder, &to, self.name.as_deref())?;
        let kept_in = folder.display().to_string();
        app.interrupted()?;
        app.keeps(format_args!("what was read is kept in {kept_in}"));
        let before = (spool.shown(), spool.taken().hidden);
        let spool = Mutex::new(spool);
        let sender = Sender {
            app,
            spool: &spool,
            every: match destination {
                Destination::File(_) => Duration::ZERO,
                Destination::Service(_) => Duration::from_secs_f64(self.every.unwrap_or(EVERY)),
            },
            destination,
            to: &to,
            kept_in: &kept_in,
            settings: self.settings.as_deref(),
            reading: &reading,
        };
        let (read, kept, sent) = thread::scope(|scope| {
            let (lines, to_keep) = channel();
            let (news, is_news) = channel();
            let (_over, is_over) = channel();
            let watched = &reading;
            scope.spawn(move || watched.watch(app, &is_over));
            let keeper = scope.spawn(|| keep(app, &spool, to_keep, news));
            let sender = scope.spawn(move || sender.run(&is_news));
            let read = self.pass(app, (records, rejects), (&spool, &to), &reading, &lines);
            if read.is_err() || app.interrupted().unwrap_or(false) {
                reading.cut();
            }
            // Only now: at their end the rest is sent, and how the run stands.
            drop(lines);
            let [kept, sent] = [keeper.join(), sender.join()]
                .map(|ended| ended.unwrap_or_else(|panic| resume_unwind(panic)));
            (read, kept, sent)
        });
        let spool = lock(&spool);
        let unsent = match (spool.has_more(), spool.unsent()) {
            (false, _) => "all points are sent".to_owned(),
            (true, unsent) => format!("{unsent} points are not sent, and kept in {kept_in}"),
        };
        if let Err(error) = &read {
            if !matches!(error.downcast_ref(), Some(WriteError::ReaderGone)) {
                match &sent {
                    Err(why) => app.info(format_args!("{why}: {unsent}")),
                    Ok(()) if spool.has_more() => app.info(&unsent),
                    Ok(()) => {}
                }
            }
            return read;
        }
        kept?;
        if spool.differing > 0 {
            app.warn(format_args!(
                "{} points were sent before with other values, which stay: {ANOTHER}",
                spool.differing
            ));
        }
        let hidden = spool.taken().hidden - before.1;
        if hidden > 0 {
            app.warn(format_args!(
                "{hidden} points came for steps that are at Weights & Biases already, and are not shown there; a \
                 run's whole metrics.jsonl with another --state makes a run that has them"
            ));
        }
        if let Err(error) = sent {
            let is_gone = matches!(error.downcast_ref(), Some(Said::Gone(_)));
            let what = match spool.has_more() {
                true => unsent,
                false => format!("{unsent}, but not how the run stands"),
            };
            let cause = match is_gone {
                true => format!("{error}: {what}"),
                false => format!("{error}: {what}; the same command sends it"),
            };
            return Err(match app.interrupted()? {
                true => Failure::Interrupted(cause),
                false => Failure::World(cause),
            }
            .into());
        }
        if reading.is_cut() {
            let cause = "interrupted; what was read is sent, and the same command with all lines sends the rest";
            return Err(Failure::Interrupted(cause.into()).into());
        }
        let shown = match to == "tensorboard" {
            true => &self.to,
            false => &to,
        };
        app.detail(format_args!(
            "{shown} has {} points, {} of them new",
            spool.shown(),
            spool.shown() - before.0
        ));
        Ok(())
    }
}

impl Track {
    /// Where figures go, in words and ready to be sent to.
    fn destination<'a>(
        &self,
        app: &'a App,
        reading: &'a Reading,
    ) -> Result<(String, Destination<'a>)> {
        let usage = |cause: String| anyhow::Error::from(Failure::Usage(cause));
        let wrong = |error: httpclient::ConfigError| usage(error.to_string());
        let (kind, place) = match self.to.split_once('=') {
            Some((kind, place)) => (kind, Some(place).filter(|place| !place.is_empty())),
            None => (self.to.as_str(), None),
        };
        for (flag, given, meant) in [
            ("--experiment", self.experiment.is_some(), &["mlflow"][..]),
            ("--send-key-to", self.send_key_to.is_some(), SERVICES),
            ("--name", self.name.is_some(), SERVICES),
            ("--every", self.every.is_some(), SERVICES),
        ] {
            if given && !meant.contains(&kind) {
                let meant = meant.join(" or ");
                return Err(usage(format!("{flag} is for --to {meant}")));
            }
        }
        match kind {
            "tensorboard" => {
                let folder =
                    place.ok_or_else(|| usage("--to tensorboard=DIR: name its folder".into()))?;
                let to = Destination::File(TensorBoard::new(folder.as_ref()));
                // The folder may be moved, and the state with it.
                Ok(("tensorboard".into(), to))
            }
            "mlflow" => {
                let set = env_or_dotenv("MLFLOW_TRACKING_URI")?;
                let (name, text) = match (place, &set) {
                    (Some(place), _) => ("--to mlflow=URI", place),
                    (None, Some(set)) => ("MLFLOW_TRACKING_URI", set.as_str()),
                    (None, None) => {
                        let cause =
                            "--to mlflow: name the server, mlflow=URI or MLFLOW_TRACKING_URI";
                        return Err(usage(cause.into()));
                    }
                };
                let address = httpclient::address(name, text, mlflow::SECRETS).map_err(wrong)?;
                let experiment = match &self.experiment {
                    Some(name) => name.clone(),
                    None => {
                        env_or_dotenv("MLFLOW_EXPERIMENT_NAME")?.unwrap_or_else(|| "Default".into())
                    }
                };
                let secret = mlflow_secret(&address)?;
                if let Some(secret) = &secret {
                    // What else may stand there (a folder, a database) is no host's.
                    let home = set.and_then(|set| httpclient::address("", &set, "").ok());
                    let confirmed = self.send_key_to.as_deref();
                    confirm_host(secret.name(), home.as_deref(), &address, confirmed)
                        .map_err(|e| usage(format!("{e}, or set MLFLOW_TRACKING_URI to it")))?;
                }
                let client = with_secret(client(&address)?, secret);
                let link = Link::new(app, client, reading)?;
                let run = Mlflow::new(app, link, &address, &experiment);
                let to = format!("mlflow={address}, experiment {experiment}");
                Ok((to, Destination::Service(Box::new(run))))
            }
            "wandb" => {
                let (entity, project) = match place.map(|place| place.split_once('/').ok_or(place))
                {
                    Some(Ok((entity, project))) => {
                        (Some(entity.to_owned()), Some(project.to_owned()))
                    }
                    Some(Err(project)) => (None, Some(project.to_owned())),
                    None => (None, env_or_dotenv("WANDB_PROJECT")?),
                };
                let entity = entity
                    .map_or_else(|| env_or_dotenv("WANDB_ENTITY"), |entity| Ok(Some(entity)))?;
                let project = project.ok_or_else(|| {
                    usage(
                        "--to wandb: name the project, wandb=ENTITY/PROJECT or WANDB_PROJECT"
                            .into(),
                    )
                })?;
                for name in entity.iter().chain([&project]) {
                    wandb::check_name(name)
                        .map_err(|cause| usage(format!("--to wandb: {cause}")))?;
                }
                let key = env_or_dotenv("WANDB_API_KEY")?.ok_or_else(|| {
                    usage("WANDB_API_KEY is not set: put it into .env or the environment (https://wandb.ai/authorize)".into())
                })?;
                let base = env_or_dotenv("WANDB_BASE_URL")?.unwrap_or_else(|| wandb::HOME.into());
                let base =
                    httpclient::address("WANDB_BASE_URL", &base, "WANDB_API_KEY").map_err(wrong)?;
                confirm_host(
                    "WANDB_API_KEY",
                    wandb::HOME,
                    &base,
                    self.send_key_to.as_deref(),
                )
                .map_err(wrong)?;
                let secret = Secret::bind("WANDB_API_KEY", &key, Scheme::Basic("api"), &base)
                    .map_err(wrong)?;
                let link = Link::new(app, with_secret(client(&base)?, Some(secret)), reading)?;
                let place = entity
                    .as_ref()
                    .map_or_else(|| project.clone(), |entity| format!("{entity}/{project}"));
                let to = match base == wandb::HOME {
                    true => format!("wandb={place}"),
                    false => format!("wandb={place} at {base}"),
                };
                let run = Wandb::new(app, link, &base, (entity, project));
                Ok((to, Destination::Service(Box::new(run))))
            }
            _ => Err(usage(format!(
                "--to {}: there are tensorboard=DIR, mlflow=URI and wandb=ENTITY/PROJECT",
                self.to
            ))),
        }
    }

    /// The state's folder.
    fn folder(&self, destination: &Destination<'_>) -> Result<&Path> {
        let beside = match destination {
            Destination::File(_) => self.to.split_once('=').map(|(_, folder)| Path::new(folder)),
            Destination::Service(_) => None,
        };
        self.state.as_deref().or(beside).ok_or_else(|| {
            let cause = "--state DIR is needed, so that what cannot be sent is kept, and nothing is sent twice";
            Failure::Usage(cause.into()).into()
        })
    }

    /// Passes lines on, each at once, and hands their figures to whoever keeps them.
    fn pass(
        &self,
        app: &App,
        (mut records, mut rejects): (Records, Rejects),
        (spool, to): (&Mutex<Spool>, &str),
        reading: &Reading,
        lines: &Channel<Line>,
    ) -> Result<()> {
        let mut out = Output::stdout();
        let mut counts = Counts::default();
        let understand = |record| Ok((Line::of(&record)?, record));
        loop {
            let (line, record) = match records.next_with(&mut rejects, understand) {
                Ok(Some((_, both))) => both,
                Ok(None) => break,
                // What was read before a signal stays, and a line that is half there is none.
                Err(ReadError::Io { source, .. })
                    if source.kind() == ErrorKind::TimedOut
                        && reading.signalled_before(LAST_LINES) =>
                {
                    break;
                }
                Err(error) => return Err(error.into()),
            };
            if !reading.has_begun() {
                let settings = self
                    .settings
                    .as_deref()
                    .map(figures::settings)
                    .transpose()?;
                let mut spool = lock(spool);
                spool.begin(to, self.name.as_deref(), line.at)?;
                settings.map_or(Ok(()), |settings| spool.add_settings(settings))?;
                reading.begin();
            }
            // Whoever keeps them says why they no longer do.
            let _ = lines.send(line);
            out.record(&record)?;
            out.flush()?;
            counts.written += 1;
        }
        rejects.commit()?;
        out.finish()?;
        let bad = records.bad();
        if bad > 0 {
            app.warn(format_args!("{bad} malformed lines passed over"));
        }
        (counts.read, counts.rejected) = (counts.written + bad, bad);
        app.count(counts);
        Ok(())
    }
}

/// Puts figures into the state as they come, those that came meanwhile together.
fn keep(app: &App, spool: &Mutex<Spool>, lines: Receiver<Line>, news: Channel<()>) -> Result<()> {
    // What an earlier run left is news too.
    let _ = news.send(());
    while let Ok(first) = lines.recv() {
        let together = std::iter::once(first).chain(lines.try_iter());
        let kept = lock(spool).add(together);
        if let Err(error) = kept {
            app.warn(format_args!(
                "{error}: lines go on, and are neither kept nor sent"
            ));
            let remedy = "the same command with the run's metrics.jsonl sends the rest";
            return Err(error.context(remedy));
        }
        let _ = news.send(());
    }
    Ok(())
}

fn client(address: &str) -> Result<Client, Failure> {
    Client::new(address, link::policy()).map_err(|error| Failure::Usage(error.to_string()))
}

fn with_secret(client: Client, secret: Option<Secret>) -> Client {
    match secret {
        Some(secret) => client.with_secret(secret),
        None => client,
    }
}

/// A user's password, or else a token, as MLflow's own client chooses.
fn mlflow_secret(address: &str) -> Result<Option<Secret>> {
    let user = env_or_dotenv("MLFLOW_TRACKING_USERNAME")?;
    let password = env_or_dotenv("MLFLOW_TRACKING_PASSWORD")?;
    let token = env_or_dotenv("MLFLOW_TRACKING_TOKEN")?;
    let secret = match (&user, &password, &token) {
        (Some(user), Some(password), _) => {
            let scheme = Scheme::Basic(user);
            Secret::bind("MLFLOW_TRACKING_PASSWORD", password, scheme, address)
        }
        (_, _, Some(token)) => {
            Secret::bind("MLFLOW_TRACKING_TOKEN", token, Scheme::Bearer, address)
        }
        (None, None, None) => return Ok(None),
        _ => {
            let cause =
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD go together: one is not set";
            return Err(Failure::Usage(cause.into()).into());
        }
    };
    secret
        .map(Some)
        .map_err(|error| Failure::Usage(error.to_string()).into())
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse::<f64>().map_err(|error| error.to_string())?;
    match (0.0..=3600.0).contains(&seconds) {
        true => Ok(seconds),
        false => Err("it must be 0 to 3600".into()),
    }
}
