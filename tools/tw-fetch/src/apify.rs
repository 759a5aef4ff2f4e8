//! The Apify API, as far as collecting needs it: runs of an actor and the items of
//! their datasets (API v2, `https://api.apify.com/v2`).

use std::sync::mpsc;
use std::time::Duration;

use anyhow::Context;
use cli::Failure;
use httpclient::{Client, Error, Policy, Response, Retrying};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The service's own address.
pub const HOME: &str = "https://api.apify.com/v2";
/// The environment variable that opens it.
pub const TOKEN: &str = "APIFY_API_TOKEN";

/// Seconds for which one request waits for a run to end: the service's most.
const WAIT_SECONDS: u64 = 60;

/// A run of an actor. Everything but its id may be missing.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Run {
    pub id: String,
    /// The actor by its own id, which is not its `user~name`.
    pub act_id: Option<String>,
    #[serde(default)]
    pub status: String,
    pub status_message: Option<String>,
    pub default_dataset_id: Option<String>,
    pub usage_total_usd: Option<f64>,
    pub started_at: Option<String>,
}

#[derive(Deserialize)]
struct Envelope<T> {
    data: T,
}

/// A page of a dataset.
pub struct Page {
    /// One JSON object a line, as the service wrote them.
    pub lines: String,
    /// Items in the whole dataset, where the service says so.
    pub total: Option<u64>,
}

/// What one run may fetch and cost.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    pub max_items: u64,
    pub max_usd: f64,
}

impl Run {
    /// Whether it is over, well or badly.
    pub fn is_over(&self) -> bool {
        matches!(
            self.status.as_str(),
            "SUCCEEDED" | "FAILED" | "ABORTED" | "TIMED-OUT"
        )
    }

    /// What the service says of its end, for a message.
    pub fn verdict(&self) -> String {
        match self.status_message.as_deref().filter(|m| !m.is_empty()) {
            Some(message) => format!("{} ({message})", self.status),
            None => self.status.clone(),
        }
    }
}

/// The API behind one token.
pub struct Api {
    client: Client,
    retries: mpsc::Receiver<Retrying>,
}

/// Apify documents: 500 ms, then a wait between the delay and twice that, doubling.
pub fn policy(attempts: u32) -> Policy {
    Policy {
        attempts: attempts.max(1),
        first_wait: Duration::from_millis(500),
        max_wait: Duration::from_secs(60),
        spread: (1.0, 2.0),
        timeout: Duration::from_secs(WAIT_SECONDS + 30),
        max_body: 256 << 20,
        ..Policy::default()
    }
}

impl Api {
    pub fn new(client: Client) -> Self {
        let (told, retries) = mpsc::channel();
        Self {
            client: client.with_retries_told(told),
            retries,
        }
    }

    /// Failed attempts since this was last asked.
    pub fn retries(&self) -> impl Iterator<Item = Retrying> {
        self.retries.try_iter()
    }

    /// Repeats nothing from now on; waits between attempts end.
    pub fn give_up(&self) {
        self.client.give_up();
    }

    /// Starts a run of `actor` (`user~name`) on `input`.
    ///
    /// # Errors
    /// [`Started::Refused`] says that no run was made; [`Started::Unknown`], that one may
    /// have been, and cost money, though its id never arrived.
    pub async fn start(&self, actor: &str, input: &Value, limits: Limits) -> Result<Run, Started> {
        let refused = |e: anyhow::Error| Started::Refused(e);
        let request = self
            .client
            .post(&format!("acts/{actor}/runs"))
            .map_err(|e| refused(e.into()))?
            .query([
                ("maxItems", limits.max_items.to_string()),
                ("maxTotalChargeUsd", format!("{:.4}", limits.max_usd)),
            ])
            .json(input)
            .map_err(|e| refused(e.into()))?
            .once();
        let response = request.send().await.map_err(|error| match &error {
            Error::Network { sent: true, .. } => Started::Unknown(error.into()),
            Error::Status {
                status: 408 | 500..,
                ..
            } => Started::Unknown(error.into()),
            Error::Status {
                status: 402 | 403, ..
            } => Started::Refused(no_credit(error)),
            _ => Started::Refused(error.into()),
        })?;
        let run: Envelope<Run> = response.json().map_err(|e| Started::Unknown(e.into()))?;
        Ok(run.data)
    }

    /// The run, after it ended or a minute passed.
    pub async fn wait(&self, run: &str) -> anyhow::Result<Run> {
        let request = self.client.get(&format!("actor-runs/{run}"))?;
        run_of(
            &request
                .query([("waitForFinish", WAIT_SECONDS.to_string())])
                .send()
                .await?,
        )
    }

    /// The run as it is now.
    pub async fn look(&self, run: &str) -> anyhow::Result<Run> {
        run_of(
            &self
                .client
                .get(&format!("actor-runs/{run}"))?
                .send()
                .await?,
        )
    }

    /// The id of `actor` (`user~name`), as its runs have it.
    pub async fn actor(&self, actor: &str) -> anyhow::Result<String> {
        #[derive(Deserialize)]
        struct Actor {
            id: String,
        }
        let response = self.client.get(&format!("acts/{actor}"))?.send().await?;
        Ok(response.json::<Envelope<Actor>>()?.data.id)
    }

    /// Asks for a run to end.
    pub async fn abort(&self, run: &str) -> anyhow::Result<Run> {
        run_of(
            &self
                .client
                .post(&format!("actor-runs/{run}/abort"))?
                .send()
                .await?,
        )
    }

    /// Lets an aborted run go on.
    pub async fn resurrect(&self, run: &str) -> anyhow::Result<Run> {
        run_of(
            &self
                .client
                .post(&format!("actor-runs/{run}/resurrect"))?
                .send()
                .await?,
        )
    }

    /// Items `offset..offset + limit` of a dataset; empty ones are left out, so a page
    /// may be shorter than `limit` and yet not the last.
    pub async fn page(&self, dataset: &str, offset: u64, limit: u64) -> anyhow::Result<Page> {
        let request = self
            .client
            .get(&format!("datasets/{dataset}/items"))?
            .query([
                ("format", "jsonl".to_owned()),
                ("clean", "1".to_owned()),
                ("offset", offset.to_string()),
                ("limit", limit.to_string()),
            ]);
        let response = request.send().await?;
        let total = response
            .header("x-apify-pagination-total")
            .and_then(|t| t.trim().parse().ok());
        let lines =
            String::from_utf8(response.body().to_vec()).context("a dataset page is not UTF-8")?;
        // What is kept is read again by every later run: nothing but records may get there.
        for line in lines.lines().filter(|line| !line.trim().is_empty()) {
            record::Record::parse(line).map_err(|e| {
                Failure::World(format!(
                    "items {offset} and on of the dataset {dataset} are no JSON lines ({e}); run this again later"
                ))
            })?;
        }
        Ok(Page { lines, total })
    }
}

fn run_of(response: &Response) -> anyhow::Result<Run> {
    Ok(response.json::<Envelope<Run>>()?.data)
}

/// Whether the service said that it does not have, or will not show, what was asked for.
pub fn is_hidden(error: &anyhow::Error) -> bool {
    let status = |error: &Error| {
        matches!(
            error,
            Error::Status {
                status: 403 | 404,
                ..
            }
        )
    };
    error.downcast_ref().is_some_and(status)
}

/// Why [`Api::start`] has no run to show.
pub enum Started {
    /// No run was made.
    Refused(anyhow::Error),
    /// Nobody here knows.
    Unknown(anyhow::Error),
}

fn no_credit(error: Error) -> anyhow::Error {
    Failure::World(format!(
        "{error}\nApify will not start the run: most often the account's credit is used up or {TOKEN} may not run \
         this actor; see https://console.apify.com/billing. Tweets exported elsewhere come in with --method file --input PATH"
    ))
    .into()
}
