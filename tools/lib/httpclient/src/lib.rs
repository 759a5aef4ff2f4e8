//! Requests to the few paid services the tools talk to: retried as each service
//! documents, bounded in size and time, and careful with secrets.
//!
//! A [`Client`] is one service: a base URL, a [`Policy`] and at most one [`Secret`].
//! The secret is bound to the origin of that base URL and is left out of a request
//! to any other; redirects are not followed, because a service that moves its API
//! says so in its documentation, while a redirect that collects keys does not.
//! Everything a server says that may reach a terminal or a log is first stripped of
//! the secret, of control characters, and of length.

mod address;
mod download;
mod error;
mod policy;
mod retrying;
mod secret;

use std::sync::{Arc, Once, mpsc};
use std::time::{Duration, SystemTime};

use reqwest::header::{HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use reqwest::{Method, Url};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

pub use address::address;
pub use download::{Chunk, DownloadError};
pub use error::{ConfigError, Error};
pub use policy::Policy;
pub use retrying::Retrying;
pub use secret::{Scheme, Secret, confirm_host};

/// One service: where it is, how patiently it is asked, and what opens it.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    base: Url,
    policy: Policy,
    headers: HeaderMap,
    secret: Option<Secret>,
    told: Option<mpsc::Sender<Retrying>>,
    given_up: Arc<watch::Sender<bool>>,
}

/// A successful answer, read to its end.
#[derive(Debug, Clone)]
pub struct Response {
    headers: HeaderMap,
    body: Vec<u8>,
    request: String,
    attempts: u32,
    /// Kept so that it can be taken out of what an error shows of the body.
    secret: Option<Secret>,
}

/// One request before it is sent. Made by [`Client::get`] and [`Client::post`].
#[derive(Debug, Clone)]
pub struct Request<'a> {
    client: &'a Client,
    method: Method,
    url: Url,
    body: Option<Vec<u8>>,
    once: bool,
}

impl Client {
    /// A client for the service at `base`, e.g. `https://api.apify.com/v2`.
    ///
    /// # Errors
    /// When `base` is not an http(s) URL, or the machine has no CA certificates.
    pub fn new(base: &str, policy: Policy) -> Result<Self, ConfigError> {
        let base = parse_base(base)?;
        install_tls_provider();
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("tweet-reply-tools/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(policy.connect_timeout)
            .timeout(policy.timeout);
        if secret::is_loopback(&base) {
            // A proxy is never between us and ourselves.
            builder = builder.no_proxy();
        }
        let http = builder.build().map_err(|e| ConfigError::Tls {
            cause: error::chain(&e),
        })?;
        Ok(Self {
            http,
            base,
            policy,
            headers: HeaderMap::new(),
            secret: None,
            told: None,
            given_up: Arc::new(watch::Sender::new(false)),
        })
    }

    /// The same client, sending `secret` to the origin it is bound to.
    #[must_use]
    pub fn with_secret(mut self, secret: Secret) -> Self {
        self.secret = Some(secret);
        self
    }

    /// The same client with one more header on every request.
    #[must_use]
    pub fn with_header(mut self, name: &'static str, value: &'static str) -> Self {
        self.headers.insert(
            HeaderName::from_static(name),
            HeaderValue::from_static(value),
        );
        self
    }

    /// The same client, telling `to` of every failed attempt before it waits for the next:
    /// a minute of retries is silent otherwise.
    #[must_use]
    pub fn with_retries_told(mut self, to: mpsc::Sender<Retrying>) -> Self {
        self.told = Some(to);
        self
    }

    /// From now on no failed attempt is repeated, by this client or a copy of it, and waits
    /// between attempts end at once with the error. What is under way is not cut short.
    pub fn give_up(&self) {
        self.given_up.send_replace(true);
    }

    /// `GET path`, relative to the base URL.
    ///
    /// # Errors
    /// When `path` does not make a URL.
    pub fn get(&self, path: &str) -> Result<Request<'_>, ConfigError> {
        self.request(Method::GET, path)
    }

    /// `POST path` with no body; [`Request::json`] adds one.
    ///
    /// # Errors
    /// When `path` does not make a URL.
    pub fn post(&self, path: &str) -> Result<Request<'_>, ConfigError> {
        self.request(Method::POST, path)
    }

    fn request(&self, method: Method, path: &str) -> Result<Request<'_>, ConfigError> {
        Ok(Request {
            client: self,
            method,
            url: self.url(path)?,
            body: None,
            once: false,
        })
    }

    /// `path` below the base URL; an absolute URL stands as it is (and gets no secret
    /// unless it has the base's origin).
    fn url(&self, path: &str) -> Result<Url, ConfigError> {
        if path.starts_with("http://") || path.starts_with("https://") {
            return parse_base(path);
        }
        let joined = format!(
            "{}/{}",
            self.base.as_str().trim_end_matches('/'),
            path.trim_start_matches('/')
        );
        parse_base(&joined)
    }

    /// What the service said in `text`, fit for a terminal and a log: without the secret,
    /// control characters escaped, cut at 300 characters. For what stands in a success;
    /// errors are so already.
    #[must_use]
    pub fn printable(&self, text: &str) -> String {
        error::printable(text, self.secret.as_ref())
    }
}

impl Request<'_> {
    /// Adds query parameters, percent-encoded.
    #[must_use]
    pub fn query<K: AsRef<str>, V: AsRef<str>>(
        mut self,
        pairs: impl IntoIterator<Item = (K, V)>,
    ) -> Self {
        self.url.query_pairs_mut().extend_pairs(pairs);
        self
    }

    /// Sends `value` as the JSON body.
    ///
    /// # Errors
    /// When `value` cannot be written as JSON.
    pub fn json<T: Serialize + ?Sized>(mut self, value: &T) -> Result<Self, ConfigError> {
        self.body = Some(serde_json::to_vec(value)?);
        Ok(self)
    }

    /// For a request that costs money or makes something: it is repeated only where
    /// the server has said that it did nothing (429, or no connection at all). A
    /// timeout or an answer cut short comes back as [`Error::Network`] with
    /// `sent: true`, and what happened is then the caller's to find out.
    #[must_use]
    pub fn once(mut self) -> Self {
        self.once = true;
        self
    }

    /// Sends it, and again as the policy allows, until an answer below 300.
    ///
    /// # Errors
    /// [`Error`], after the last attempt.
    pub async fn send(self) -> Result<Response, Error> {
        let mut attempt = 1;
        loop {
            let failure = match self.attempt(attempt).await {
                Ok(response) => return Ok(response),
                Err(failure) => failure,
            };
            if !self.client.waits(&failure, attempt).await {
                return Err(failure.error);
            }
            attempt += 1;
        }
    }

    /// Sends it once, as attempt number `attempt` (from 1). For whoever decides on each
    /// attempt, since each may cost something: between two, [`Client::waits`].
    ///
    /// # Errors
    /// [`Failure`], with what [`Client::waits`] needs to know.
    pub async fn attempt(&self, attempt: u32) -> Result<Response, Failure> {
        let client = self.client;
        let name = self.name();
        let mut request = client
            .http
            .request(self.method.clone(), self.url.clone())
            .headers(client.headers.clone());
        if let Some(secret) = &client.secret
            && let Some((header, value)) = secret.header_for(&self.url)
        {
            request = request.header(header, value);
        }
        if let Some(body) = &self.body {
            request = request
                .header(reqwest::header::CONTENT_TYPE, "application/json")
                .body(body.clone());
        }
        let network = |e| self.broken(e, attempt);
        let mut response = request.send().await.map_err(network)?;
        let status = response.status().as_u16();
        let headers = std::mem::take(response.headers_mut());
        let limit = client.policy.max_body;
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(network)? {
            if body.len() + chunk.len() > limit {
                let error = Error::TooLarge {
                    request: name,
                    limit,
                };
                return Err(error.into());
            }
            body.extend_from_slice(&chunk);
        }
        if (200..300).contains(&status) {
            return Ok(Response {
                headers,
                body,
                request: name,
                attempts: attempt,
                secret: client.secret.clone(),
            });
        }
        Err(self.refused(status, &headers, &body, attempt))
    }

    /// What a connection that failed means.
    fn broken(&self, e: reqwest::Error, attempts: u32) -> Failure {
        // The cause may quote the URL, query and all; the request is named already.
        let e = e.without_url();
        let sent = !e.is_connect();
        Failure {
            retry: if sent && self.once {
                Retry::Never
            } else {
                Retry::Backoff
            },
            error: Error::Network {
                request: self.name(),
                cause: self.client.printable(&error::chain(&e)),
                attempts,
                sent,
            },
        }
    }

    /// What an answer that is no success means.
    fn refused(&self, status: u16, headers: &HeaderMap, body: &[u8], attempts: u32) -> Failure {
        let client = self.client;
        let policy = &client.policy;
        let asked = headers
            .get(RETRY_AFTER)
            .and_then(|v| v.to_str().ok())
            .and_then(|v| policy::retry_after(v, SystemTime::now()));
        let text = String::from_utf8_lossy(body);
        let is_final = asked.is_none() && policy.final_markers.iter().any(|m| text.contains(m));
        let repeatable = if self.once {
            status == 429
        } else {
            (policy.retries)(status)
        };
        let retry = match (repeatable && !is_final, asked) {
            (false, _) => Retry::Never,
            (true, Some(wait)) => Retry::After(wait),
            (true, None) => Retry::Backoff,
        };
        let (kind, message) = error::server_message(body);
        let location = headers
            .get(reqwest::header::LOCATION)
            .and_then(|v| v.to_str().ok());
        Failure {
            retry,
            error: Error::Status {
                request: self.name(),
                status,
                kind: kind.map(|k| client.printable(&k)),
                message: match location {
                    Some(to) if (300..400).contains(&status) => {
                        format!(
                            "redirects to {}, which is not followed",
                            client.printable(to)
                        )
                    }
                    _ => client.printable(&message),
                },
                attempts,
                retry_after: asked,
                secret: client.secret.as_ref().map(|s| s.name().to_owned()),
            },
        }
    }

    /// `POST https://host/path`: no user, password, query or fragment.
    fn name(&self) -> String {
        let url = &self.url;
        let port = url.port().map(|p| format!(":{p}")).unwrap_or_default();
        let shown = format!(
            "{}://{}{port}{}",
            url.scheme(),
            url.host_str().unwrap_or(""),
            url.path()
        );
        self.client.printable(&format!("{} {shown}", self.method))
    }
}

impl Response {
    /// How many requests it took.
    #[must_use]
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// A header's value where it is plain text.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The body as it came.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// The body as `T`.
    ///
    /// # Errors
    /// [`Error::Json`] when it is something else, with where and why.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Error> {
        serde_json::from_slice(&self.body).map_err(|e| Error::Json {
            request: self.request.clone(),
            cause: error::printable(&e.to_string(), self.secret.as_ref()),
            starts: error::printable(&String::from_utf8_lossy(&self.body), self.secret.as_ref())
                .chars()
                .take(60)
                .collect(),
        })
    }
}

/// A failed attempt and what may be done about it.
#[derive(Debug)]
pub struct Failure {
    retry: Retry,
    /// What went wrong.
    pub error: Error,
}

impl From<Error> for Failure {
    /// One that is not to be repeated, such as a success that cannot be read.
    fn from(error: Error) -> Self {
        Self {
            retry: Retry::Never,
            error,
        }
    }
}

impl Failure {
    /// How long to wait before another attempt; none is to be made where it is `None`.
    fn wait(&self, policy: &Policy, attempt: u32) -> Option<Duration> {
        let wait = match self.retry {
            Retry::Never => None,
            Retry::Backoff => Some(policy.backoff(attempt)),
            Retry::After(asked) if asked <= policy.longest_wait => Some(asked),
            // Sleeping for an hour looks like hanging: say it and stop.
            Retry::After(_) => None,
        };
        wait.filter(|_| attempt < policy.attempts)
    }
}

#[derive(Debug)]
enum Retry {
    Never,
    Backoff,
    After(Duration),
}

fn parse_base(text: &str) -> Result<Url, ConfigError> {
    let url = Url::parse(text).map_err(|e| ConfigError::Url {
        url: error::printable(text, None),
        cause: e.to_string(),
    })?;
    match (url.scheme(), url.has_host()) {
        ("http" | "https", true) => Ok(url),
        _ => Err(ConfigError::Url {
            url: error::printable(text, None),
            cause: "not an http:// or https:// URL".into(),
        }),
    }
}

/// reqwest is built without a TLS provider of its own: ring serves every client.
fn install_tls_provider() {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        // An error means that another part of the process chose one already, which will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}
