//! A service's address in one form, and without secrets.

use crate::error::ConfigError;

/// The address that `text` is, in one form, which may be kept and shown:
/// `HTTPS://API.example.com:443/` is `https://api.example.com`. `name` is what people know it
/// by, and `secrets` where a user and password belong.
///
/// # Errors
/// [`ConfigError::Address`], which never quotes `text`, if it is no http(s) address, or holds a
/// user or password, a query or a fragment.
pub fn address(name: &str, text: &str, secrets: &str) -> Result<String, ConfigError> {
    let refuse = |cause: String| {
        Err(ConfigError::Address {
            name: name.to_owned(),
            cause,
        })
    };
    let Ok(url) = crate::parse_base(text) else {
        return refuse("is no http:// or https:// address of a server".into());
    };
    if !url.username().is_empty() || url.password().is_some() {
        return refuse(format!(
            "holds a user or password: what opens the server goes into {secrets}"
        ));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return refuse("has a `?` or `#`: name the server alone".into());
    }
    Ok(url.as_str().trim_end_matches('/').to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_address_has_one_form() {
        for (text, form) in [
            ("https://api.example.com", "https://api.example.com"),
            ("HTTPS://API.Example.com:443/", "https://api.example.com"),
            ("http://127.0.0.1:5000//", "http://127.0.0.1:5000"),
            ("https://example.com/wandb/", "https://example.com/wandb"),
        ] {
            assert_eq!(address("A", text, "B").unwrap(), form);
        }
    }

    #[test]
    fn one_that_may_hold_a_secret_is_not_quoted() {
        for text in [
            "https://me:hunter2@example.com",
            "https:///me:hunter2@example.com",
            "https://hunter2@example.com",
            "https://example.com?token=hunter2",
            "https://example.com/#hunter2",
            "ftp://me:hunter2@example.com",
            "hunter2",
        ] {
            let error = address("THE_URL", text, "THE_KEY").unwrap_err();
            let shown = format!("{error} {error:?}");
            assert!(
                shown.contains("THE_URL: ") && !shown.contains("hunter2"),
                "{text}: {shown}"
            );
        }
    }
}
