//! The hub as this tool speaks of it: see the crate `hub`.

use std::cell::OnceCell;
use std::path::PathBuf;

use anyhow::Result;
use cli::{App, Failure};
use hub::{Event, Hub};

/// Where a model lies, after downloading it if need be.
pub fn fetch(app: &App, model: &str) -> Result<PathBuf> {
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
        hub::Error::NoModel(_) => Failure::Usage(format!("{error}, with --model")).into(),
        hub::Error::Config(_) => {
            let cause = format!("HF_ENDPOINT and HF_TOKEN, environment or .env: {error}");
            Failure::Usage(cause).into()
        }
        error => error.into(),
    })
}
