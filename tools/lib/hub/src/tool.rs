//! The hub as a tool speaks of it: the environment, progress, exit codes.

use std::cell::OnceCell;
use std::path::PathBuf;

use anyhow::Result;
use cli::{App, Failure};

use crate::{Error, Event, Hub};

/// Where a model lies, after downloading it if need be from the hub that the
/// environment names. `remedy` is the flag or key that names another model.
///
/// # Errors
/// As [`Hub::fetch`]; a model that cannot be meant and an address or a token that
/// cannot be used are wrong usage.
pub fn fetch(app: &App, model: &str, remedy: &str) -> Result<PathBuf> {
    let hub = Hub::new(
        cli::env_or_dotenv("HF_ENDPOINT")?,
        cli::env_or_dotenv("HF_TOKEN")?,
    );
    let progress = OnceCell::new();
    let fetched = hub.fetch(model, |event| match event {
        Event::Begins(plan) => {
            app.info(&plan);
            progress.get_or_init(|| app.progress("downloading MB", Some(plan.bytes / 1_000_000)));
        }
        Event::Bytes(bytes) => {
            if let Some(progress) = progress.get() {
                progress.set(bytes / 1_000_000);
            }
        }
        Event::Retrying(retry) => app.warn(retry),
    });
    fetched.map_err(|error| match error {
        Error::NoModel(_) => Failure::Usage(format!("{error}, with {remedy}")).into(),
        Error::Config(_) => {
            let cause = format!("HF_ENDPOINT and HF_TOKEN, environment or .env: {error}");
            Failure::Usage(cause).into()
        }
        error => error.into(),
    })
}
