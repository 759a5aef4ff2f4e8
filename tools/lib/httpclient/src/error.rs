//! What can go wrong, worded for the person who has to do something about it.

use std::time::Duration;

use serde_json::Value;

use crate::secret::Secret;

/// A request that cannot be made: wrong settings, not the world's fault.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The URL is none, or no http(s).
    #[error("`{url}` is not a usable URL: {cause}")]
    Url {
        /// As given, made printable.
        url: String,
        /// The parser's words.
        cause: String,
    },
    /// The address of a service is none, or holds what belongs elsewhere.
    #[error("{name}: {cause}")]
    Address {
        /// The setting or environment variable.
        name: String,
        /// What is wrong with it, without quoting it.
        cause: String,
    },
    /// The secret would cross a network unencrypted.
    #[error("{name} would travel to {host} in clear text: use an https:// URL")]
    ClearText {
        /// The environment variable.
        name: String,
        /// Where it would have gone.
        host: String,
    },
    /// The secret would go to a host that is not its service's, and nobody said so.
    #[error(
        "{name} belongs to {service} and would be sent to {host}: say --send-key-to {host} if that is meant"
    )]
    Elsewhere {
        /// The environment variable.
        name: String,
        /// The service's own host.
        service: String,
        /// Where it would have gone.
        host: String,
    },
    /// The same, of a secret whose own host nobody named.
    #[error(
        "{name} is for a server that nothing names, and would be sent to {host}: say --send-key-to {host} if that is meant"
    )]
    Homeless {
        /// The environment variable.
        name: String,
        /// Where it would have gone.
        host: String,
    },
    /// The secret is empty or has characters that no header can carry.
    #[error(
        "{name} is empty or has characters that cannot be sent: copy it again, on one line, without quotes"
    )]
    Secret {
        /// The environment variable.
        name: String,
    },
    /// The TLS client could not be made.
    #[error(
        "cannot set up TLS: {cause}; install the system's CA certificates (package ca-certificates)"
    )]
    Tls {
        /// What the library says.
        cause: String,
    },
    /// The body could not be written as JSON.
    #[error("cannot write the request as JSON: {0}")]
    Body(#[from] serde_json::Error),
}

/// A request that was made and failed. `request` is always method and URL without
/// query or credentials; what a server said is redacted, escaped and cut.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server answered with something other than success.
    #[error("{request}: {}", status_text(*status, kind.as_deref(), message, *attempts, *retry_after, secret.as_deref()))]
    Status {
        /// Method and URL.
        request: String,
        /// The HTTP status.
        status: u16,
        /// `error.type` or `error_code` of the body, where there is one.
        kind: Option<String>,
        /// `error.message` of the body, or its beginning.
        message: String,
        /// Requests made.
        attempts: u32,
        /// What the server asked us to wait.
        retry_after: Option<Duration>,
        /// Name of the secret that the request carried.
        secret: Option<String>,
    },
    /// No complete answer came.
    #[error("{request}: {cause} ({}); check the network and run it again", times(*attempts))]
    Network {
        /// Method and URL.
        request: String,
        /// The chain of causes.
        cause: String,
        /// Requests made.
        attempts: u32,
        /// Whether the last request may have reached the server.
        sent: bool,
    },
    /// The body went on past the limit.
    #[error("{request}: the answer is larger than {} MiB: ask for fewer items at a time", limit >> 20)]
    TooLarge {
        /// Method and URL.
        request: String,
        /// The limit in bytes.
        limit: usize,
    },
    /// A success whose body is not what the service documents.
    #[error("{request}: the answer is not the documented JSON: {cause}; it starts `{starts}`")]
    Json {
        /// Method and URL.
        request: String,
        /// The parser's words, with line and column.
        cause: String,
        /// The body's first characters.
        starts: String,
    },
}

impl Error {
    /// The status, where the server gave one.
    #[must_use]
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Status { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// Whether the server may have done what was asked, and may bill it: the request went
    /// out, and no refusal came back.
    #[must_use]
    pub fn may_be_done(&self) -> bool {
        match self {
            Self::Status { .. } => false,
            Self::Network { sent, .. } => *sent,
            Self::TooLarge { .. } | Self::Json { .. } => true,
        }
    }

    /// Request and cause, without the remedies that are for the end.
    #[must_use]
    pub fn brief(&self) -> String {
        match self {
            Self::Status {
                request,
                status,
                kind,
                message,
                ..
            } => format!(
                "{request}: {}",
                answer_text(*status, kind.as_deref(), message)
            ),
            Self::Network { request, cause, .. } => format!("{request}: {cause}"),
            Self::TooLarge { .. } | Self::Json { .. } => self.to_string(),
        }
    }
}

/// `HTTP 429: rate-limit-exceeded: Too many requests`.
fn answer_text(status: u16, kind: Option<&str>, message: &str) -> String {
    let mut text = format!("HTTP {status}");
    for part in [kind.unwrap_or(""), message] {
        if !part.is_empty() {
            text = format!("{text}: {part}");
        }
    }
    text
}

fn status_text(
    status: u16,
    kind: Option<&str>,
    message: &str,
    attempts: u32,
    retry_after: Option<Duration>,
    secret: Option<&str>,
) -> String {
    let mut text = answer_text(status, kind, message);
    if attempts > 1 {
        text = format!("{text} ({})", times(attempts));
    }
    let remedy = match (status, secret) {
        (401 | 403, Some(name)) => format!("check {name}: is it right, and allowed to do this?"),
        (401 | 403, None) => "the service wants a key and was sent none".into(),
        (402, _) => "the account has no credit left for this".into(),
        (404, _) => "check the URL and the name in it".into(),
        (429, _) => match retry_after {
            Some(wait) => format!(
                "the service asks for {} s of rest: run it again later",
                wait.as_secs()
            ),
            None => "too many requests: run it again later".into(),
        },
        (408 | 500..=599, _) => "the service has trouble: run it again later".into(),
        _ => return text,
    };
    format!("{text}; {remedy}")
}

fn times(attempts: u32) -> String {
    match attempts {
        1 => "tried once".into(),
        n => format!("tried {n} times"),
    }
}

/// An error and its causes in one line: the outer ones alone say "error sending request".
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

/// `error.type` and `error.message` of a body as Apify and Anthropic both write it;
/// else a top-level `error_code` and `message`, as MLflow does, else the text itself.
pub(crate) fn server_message(body: &[u8]) -> (Option<String>, String) {
    let text = || String::from_utf8_lossy(body).trim().to_owned();
    let Ok(value) = serde_json::from_slice::<Value>(body) else {
        return (None, text());
    };
    let string = |pointer: &str| {
        value
            .pointer(pointer)
            .and_then(Value::as_str)
            .map(str::to_owned)
    };
    let message = string("/error/message")
        .or_else(|| string("/message"))
        .or_else(|| string("/error"));
    let kind = string("/error/type").or_else(|| string("/error_code"));
    (kind, message.unwrap_or_else(text))
}

/// `text` fit for a terminal and a log: without the secret, control characters
/// escaped, cut at 300 characters. Redaction comes first, so that a cut never
/// leaves half a secret standing.
pub(crate) fn printable(text: &str, secret: Option<&Secret>) -> String {
    const LONGEST: usize = 300;
    let text = secret.map_or_else(|| text.to_owned(), |s| s.redact(text));
    let mut out = String::new();
    for (i, c) in text.chars().enumerate() {
        if i == LONGEST {
            out.push('…');
            break;
        }
        // Bidirectional overrides are no control characters to Rust, and reorder a terminal's line.
        if c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::secret::Scheme;

    #[test]
    fn what_a_server_says_is_made_harmless() {
        let secret = Secret::bind("K", "hunter2", Scheme::ApiKey, "https://example.com").unwrap();
        let said = format!("\x1b[31mno\n{}hunter2{}", "x".repeat(290), "y".repeat(90));
        let shown = printable(&said, Some(&secret));
        assert!(shown.starts_with("\\u{1b}[31mno\\n"), "{shown}");
        assert!(!shown.contains("hunter"), "{shown}");
        assert!(shown.ends_with('…'));
    }

    #[test]
    fn messages_are_found_in_the_documented_shapes_and_in_none() {
        let apify = br#"{"error":{"type":"rate-limit-exceeded","message":"slow down"}}"#;
        assert_eq!(
            server_message(apify),
            (Some("rate-limit-exceeded".into()), "slow down".into())
        );
        let mlflow = br#"{"error_code":"RESOURCE_DOES_NOT_EXIST","message":"No such run"}"#;
        assert_eq!(
            server_message(mlflow),
            (Some("RESOURCE_DOES_NOT_EXIST".into()), "No such run".into())
        );
        assert_eq!(
            server_message(b"<h1>Bad gateway</h1>"),
            (None, "<h1>Bad gateway</h1>".into())
        );
        assert_eq!(server_message(b"[1]"), (None, "[1]".into()));
        assert_eq!(server_message(b"\xff\x00"), (None, "\u{fffd}\0".into()));
    }
}
