//! The hub as a tool speaks of it: the environment, progress, exit codes.

use std::path::PathBuf;

use anyhow::Result;
use cli::{App, Failure, env_or_dotenv};

use crate::{ENDPOINT, Error, Event, Hub, cache, has_config, token_of};

/// Where a model lies, after downloading it if need be from the hub that the
/// environment names. `remedy` is the flag or key that names another model.
///
/// # Errors
/// As [`Hub::fetch`]; a model that cannot be meant and an address or a token that
/// cannot be used are wrong usage.
pub fn fetch(app: &App, model: &str, remedy: &str) -> Result<PathBuf> {
    if let Some(folder) = in_folder(model) {
        return Ok(folder);
    }
    hub()?
        .fetch(model, telling(app))
        .map_err(|error| match error {
            Error::NoModel(_) => Failure::Usage(format!("{error}, with {remedy}")).into(),
            Error::Config(_) => {
                let cause = format!("HF_ENDPOINT and its token, environment or .env: {error}");
                Failure::Usage(cause).into()
            }
            error => error.into(),
        })
}

/// Where a model lies, if it is on this machine, as [`Hub::find`].
///
/// # Errors
/// If `.env` cannot be read.
pub fn find(app: &App, model: &str) -> Result<Option<PathBuf>> {
    if let Some(folder) = in_folder(model) {
        return Ok(Some(folder));
    }
    Ok(hub()?.find(model, telling(app)))
}

/// A model's own folder, for which nothing of the hub is asked, nor of `.env`.
fn in_folder(model: &str) -> Option<PathBuf> {
    let folder = PathBuf::from(model);
    has_config(&folder).then_some(folder)
}

fn hub() -> Result<Hub> {
    let cache = cache::folder(env_or_dotenv)?;
    let endpoint = env_or_dotenv("HF_ENDPOINT")?.unwrap_or_else(|| ENDPOINT.into());
    let token = env_or_dotenv(token_of(&endpoint))?;
    Ok(Hub::new(endpoint, token, cache))
}

/// Shows how it goes.
fn telling(app: &App) -> impl FnMut(Event) {
    let mut progress = None;
    move |event| match event {
        Event::Found(found) => {
            progress = None;
            app.info(found);
        }
        Event::Passed(passed) => {
            progress = None;
            app.warn(passed);
        }
        Event::Checks(bytes) => {
            let what = "checking the Hugging Face cache, MB";
            progress = Some(app.progress(what, Some(bytes / 1_000_000)));
        }
        Event::Begins(plan) => {
            app.info(&plan);
            progress = Some(app.progress("downloading MB", Some(plan.bytes / 1_000_000)));
        }
        Event::Bytes(bytes) => {
            if let Some(progress) = &progress {
                progress.set(bytes / 1_000_000);
            }
        }
        Event::Retrying(retry) => app.warn(retry),
    }
}
