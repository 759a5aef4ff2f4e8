//! A secret that knows where it may go.

use std::fmt;
use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::Url;
use reqwest::header::{HeaderName, HeaderValue};

use crate::error::ConfigError;

/// How a service wants to see its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme<'a> {
    /// `Authorization: Bearer …`
    Bearer,
    /// `x-api-key: …`
    ApiKey,
    /// `Authorization: Basic …` of this user, whose password the value is (RFC 7617).
    Basic(&'a str),
}

/// A key or token bound to one origin (scheme, host and port). It has no way to be
/// read back, and `Debug` shows its name only.
#[derive(Clone)]
pub struct Secret {
    name: String,
    value: String,
    header: HeaderValue,
    header_name: HeaderName,
    home: Url,
}

impl Secret {
    /// `value`, known to people as `name` (the environment variable it came from), for
    /// requests to the origin of `home`.
    ///
    /// # Errors
    /// When the value cannot be a header (a stray newline), or `home` would send it in
    /// clear text over a network.
    pub fn bind(
        name: &str,
        value: &str,
        scheme: Scheme<'_>,
        home: &str,
    ) -> Result<Self, ConfigError> {
        let home = crate::parse_base(home)?;
        if home.scheme() != "https" && !is_loopback(&home) {
            return Err(ConfigError::ClearText {
                name: name.to_owned(),
                host: home.host_str().unwrap_or("").to_owned(),
            });
        }
        let value = value.trim().to_owned();
        let authorization = reqwest::header::AUTHORIZATION;
        let (header_name, text) = match scheme {
            Scheme::Bearer => (authorization, format!("Bearer {value}")),
            Scheme::ApiKey => (HeaderName::from_static("x-api-key"), value.clone()),
            Scheme::Basic(user) => {
                let both = STANDARD.encode(format!("{user}:{value}"));
                (authorization, format!("Basic {both}"))
            }
        };
        let unsendable = || ConfigError::Secret {
            name: name.to_owned(),
        };
        if value.is_empty() {
            return Err(unsendable());
        }
        let mut header = HeaderValue::from_str(&text).map_err(|_| unsendable())?;
        header.set_sensitive(true);
        Ok(Self {
            name: name.to_owned(),
            value,
            header,
            header_name,
            home,
        })
    }

    /// The environment variable's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The header for a request to `url`, if the secret belongs there.
    pub(crate) fn header_for(&self, url: &Url) -> Option<(HeaderName, HeaderValue)> {
        (url.origin() == self.home.origin())
            .then(|| (self.header_name.clone(), self.header.clone()))
    }

    /// `text` with the value, wherever it stands, replaced by the name; also as the header
    /// has it, which a server may quote.
    pub(crate) fn redact(&self, text: &str) -> String {
        let name = format!("[{}]", self.name);
        let text = text.replace(&self.value, &name);
        // The scheme's own word tells nothing.
        match self.header.to_str().map(|sent| sent.rsplit(' ').next()) {
            Ok(Some(sent)) if !sent.is_empty() => text.replace(sent, &name),
            _ => text,
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Secret({} for {})",
            self.name,
            self.home.host_str().unwrap_or("")
        )
    }
}

/// Lets the secret `name` of `service` go to `url`: freely where both have one origin,
/// else, and where it is not known whose it is, only where `confirmed` names the host of
/// `url` (with its port, if it has one).
///
/// A wrong address in a configuration from elsewhere must not be enough to give a key
/// away; saying the host twice is.
///
/// # Errors
/// [`ConfigError::Elsewhere`] or [`ConfigError::Homeless`] when it was not confirmed.
pub fn confirm_host<'a>(
    name: &str,
    service: impl Into<Option<&'a str>>,
    url: &str,
    confirmed: Option<&str>,
) -> Result<(), ConfigError> {
    let service = service.into().map(crate::parse_base).transpose()?;
    let url = crate::parse_base(url)?;
    let shown = |url: &Url| {
        let port = url.port().map(|p| format!(":{p}")).unwrap_or_default();
        format!("{}{port}", url.host_str().unwrap_or(""))
    };
    let host = shown(&url);
    if confirmed == Some(host.as_str()) {
        return Ok(());
    }
    let name = name.to_owned();
    match service {
        Some(service) if service.origin() == url.origin() => Ok(()),
        Some(service) => Err(ConfigError::Elsewhere {
            name,
            service: shown(&service),
            host,
        }),
        None => Err(ConfigError::Homeless { name, host }),
    }
}

/// Whether `url` stays on this machine. Names are not resolved, `localhost` apart.
pub(crate) fn is_loopback(url: &Url) -> bool {
    let host = url
        .host_str()
        .unwrap_or("")
        .trim_start_matches('[')
        .trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn secret() -> Secret {
        Secret::bind(
            "THE_KEY",
            "s3cr3t-value",
            Scheme::Bearer,
            "https://api.example.com/v2",
        )
        .unwrap()
    }

    #[test]
    fn it_goes_to_its_own_origin_and_nowhere_else() {
        let goes = |to: &str| secret().header_for(&Url::parse(to).unwrap()).is_some();
        assert!(goes("https://api.example.com/v2/acts"));
        assert!(goes("https://api.example.com:443/elsewhere"));
        for other in [
            "http://api.example.com/v2",
            "https://api.example.com:8443/",
            "https://api.example.com.evil.test/",
            "https://evil.test/?api.example.com",
            "https://api.example.com@evil.test/",
        ] {
            assert!(!goes(other), "{other}");
        }
    }

    #[test]
    fn it_is_never_shown() {
        assert_eq!(
            format!("{:?}", secret()),
            "Secret(THE_KEY for api.example.com)"
        );
        assert_eq!(
            secret().redact("bad token s3cr3t-value."),
            "bad token [THE_KEY]."
        );
    }

    #[test]
    fn a_password_goes_with_its_user_and_is_shown_in_neither_form() {
        // The example of RFC 7617, section 2.
        let home = "https://example.com";
        let secret = Secret::bind("PW", "open sesame", Scheme::Basic("Aladdin"), home).unwrap();
        let (name, value) = secret.header_for(&Url::parse(home).unwrap()).unwrap();
        assert_eq!(name, "authorization");
        assert_eq!(value, "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
        assert_eq!(
            secret.redact("no `Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==`, no `open sesame`"),
            "no `Basic [PW]`, no `[PW]`"
        );
    }

    #[test]
    fn another_host_must_be_said_twice() {
        let confirm = |url, host| confirm_host("K", "https://api.example.com", url, host).is_ok();
        assert!(confirm("https://api.example.com/v2", None));
        assert!(!confirm("https://proxy.test/", None));
        assert!(!confirm("https://proxy.test/", Some("api.example.com")));
        assert!(confirm("https://proxy.test/", Some("proxy.test")));
        assert!(!confirm("https://proxy.test:8443/", Some("proxy.test")));
        assert!(confirm("https://proxy.test:8443/", Some("proxy.test:8443")));
        let homeless = |host| confirm_host("K", None, "https://proxy.test/", host);
        assert!(matches!(homeless(None), Err(ConfigError::Homeless { .. })));
        assert!(homeless(Some("proxy.test")).is_ok());
    }

    #[test]
    fn it_is_not_sent_in_clear_text_or_broken() {
        let bind = |value, home| Secret::bind("K", value, Scheme::ApiKey, home);
        assert!(matches!(
            bind("v", "http://example.com"),
            Err(ConfigError::ClearText { .. })
        ));
        assert!(bind("v", "http://127.0.0.1:9").is_ok());
        assert!(bind("v", "http://[::1]:9").is_ok());
        assert!(matches!(
            bind("a\nb", "https://example.com"),
            Err(ConfigError::Secret { .. })
        ));
        assert!(matches!(
            bind("  ", "https://example.com"),
            Err(ConfigError::Secret { .. })
        ));
        assert!(
            bind("v\n", "https://example.com").is_ok(),
            "a trailing newline is an editor's"
        );
    }
}
