//! Files of any size: handed on piece by piece, and gone on with where the
//! connection broke.
//!
//! Stores answer a request for a file with a redirect to where it lies, signed in
//! its address. Here redirects are followed, then, and the secret still goes to its
//! own origin only.

use std::io;
use std::time::Duration;

use reqwest::header::{CONTENT_RANGE, HeaderMap, LOCATION, RANGE};

use crate::error::{self, Error};
use crate::{Failure, Request, Retry};

/// Redirects of one request at most.
const REDIRECTS: usize = 5;

/// A whole file may take this long; a pause in it only [`Policy::timeout`](crate::Policy).
const WHOLE: Duration = Duration::from_secs(7 * 24 * 3600);

/// What comes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chunk<'a> {
    /// The server sends the file from its start: what came before is void.
    Restart,
    /// The next bytes.
    Bytes(&'a [u8]),
}

/// Why a file did not come whole.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    /// The server or the network.
    #[error(transparent)]
    Http(#[from] Error),
    /// Whoever took the pieces failed.
    #[error(transparent)]
    Sink(#[from] io::Error),
}

enum Stop {
    Failure(Failure),
    Sink(io::Error),
}

impl Request<'_> {
    /// Streams the file from byte `at` on to `sink`. Where the connection breaks it is
    /// asked for the rest, as patiently as the policy says; pieces that came renew its
    /// patience. That all came is as the server says: compare length and hash.
    ///
    /// # Errors
    /// [`DownloadError`], after the last attempt.
    pub async fn download(
        self,
        mut at: u64,
        mut sink: impl FnMut(Chunk<'_>) -> io::Result<()>,
    ) -> Result<(), DownloadError> {
        let mut attempt = 1;
        loop {
            let before = at;
            let failure = match self.stream(&mut at, attempt, &mut sink).await {
                Ok(()) => return Ok(()),
                Err(Stop::Sink(error)) => return Err(error.into()),
                Err(Stop::Failure(failure)) => failure,
            };
            if at > before {
                attempt = 1;
            }
            if !self.client.waits(&failure, attempt).await {
                return Err(failure.error.into());
            }
            attempt += 1;
        }
    }

    async fn stream(
        &self,
        at: &mut u64,
        attempt: u32,
        sink: &mut impl FnMut(Chunk<'_>) -> io::Result<()>,
    ) -> Result<(), Stop> {
        let mut response = self.ask(*at, attempt).await.map_err(Stop::Failure)?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let patience = self.client.policy.timeout;
        match status {
            206 if starts_at(&headers, *at) => {}
            200 => {
                if *at > 0 {
                    sink(Chunk::Restart).map_err(Stop::Sink)?;
                    *at = 0;
                }
            }
            _ => {
                let body = beginning(&mut response, patience).await;
                let failure = self.refused(status, &headers, &body, attempt);
                return Err(Stop::Failure(failure));
            }
        }
        loop {
            let chunk = match tokio::time::timeout(patience, response.chunk()).await {
                Ok(chunk) => chunk.map_err(|e| Stop::Failure(self.broken(e, attempt)))?,
                Err(_) => {
                    let cause = format!("nothing came for {} s", patience.as_secs());
                    return Err(Stop::Failure(self.network(cause, attempt, Retry::Backoff)));
                }
            };
            let Some(bytes) = chunk else { return Ok(()) };
            sink(Chunk::Bytes(&bytes)).map_err(Stop::Sink)?;
            *at += bytes.len() as u64;
        }
    }

    /// The answer of wherever the redirects end.
    async fn ask(&self, at: u64, attempt: u32) -> Result<reqwest::Response, Failure> {
        let client = self.client;
        let mut url = self.url.clone();
        for _ in 0..=REDIRECTS {
            let mut request = client.http.get(url.clone()).timeout(WHOLE);
            if let Some(secret) = &client.secret
                && let Some((header, value)) = secret.header_for(&url)
            {
                request = request.header(header, value);
            }
            if at > 0 {
                request = request.header(RANGE, format!("bytes={at}-"));
            }
            let response = request.send().await.map_err(|e| self.broken(e, attempt))?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(response);
            }
            let location = response
                .headers()
                .get(LOCATION)
                .and_then(|v| v.to_str().ok());
            let next = location.and_then(|to| url.join(to).ok());
            // From https to http is no redirect but an accident or an attack.
            let Some(next) = next.filter(|n| {
                n.scheme() == "https" || (n.scheme() == "http" && url.scheme() == "http")
            }) else {
                let cause = "redirects to where it must not be followed".to_owned();
                return Err(self.network(cause, attempt, Retry::Never));
            };
            url = next;
        }
        let cause = format!("redirects more than {REDIRECTS} times");
        Err(self.network(cause, attempt, Retry::Never))
    }

    fn network(&self, cause: String, attempts: u32, retry: Retry) -> Failure {
        Failure {
            retry,
            error: Error::Network {
                request: self.name(),
                cause: error::printable(&cause, None),
                attempts,
                sent: true,
            },
        }
    }
}

/// As much of a refusal's body as a message needs, and no more: it may be of any length.
async fn beginning(response: &mut reqwest::Response, patience: Duration) -> Vec<u8> {
    let mut body = Vec::new();
    while body.len() < 4096
        && let Ok(Ok(Some(chunk))) = tokio::time::timeout(patience, response.chunk()).await
    {
        body.extend_from_slice(&chunk);
    }
    body
}

/// Whether a partial answer begins where it was asked to: `bytes 100-199/200`.
fn starts_at(headers: &HeaderMap, at: u64) -> bool {
    let range = headers.get(CONTENT_RANGE).and_then(|v| v.to_str().ok());
    let start = range.and_then(|r| r.strip_prefix("bytes ")?.split('-').next());
    start.and_then(|s| s.trim().parse().ok()) == Some(at)
}
