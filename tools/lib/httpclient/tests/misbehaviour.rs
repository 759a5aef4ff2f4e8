//! The client against a server that does everything a service has been seen to do.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use harness::server::{Reply, Request, Server};
use httpclient::{Client, Error, Policy, Response, Scheme, Secret};
use serde_json::{Value, json};

const KEY: &str = "sk-very-secret";

fn policy() -> Policy {
    Policy {
        attempts: 3,
        first_wait: Duration::from_millis(5),
        timeout: Duration::from_secs(2),
        max_body: 1 << 20,
        ..Policy::default()
    }
}

/// Posts to `server` with a key bound to it.
fn ask(server: &Server, policy: Policy, once: bool) -> Result<Response, Error> {
    let secret = Secret::bind("THE_KEY", KEY, Scheme::ApiKey, &server.url()).unwrap();
    let client = Client::new(&server.url(), policy)
        .unwrap()
        .with_secret(secret);
    let request = client
        .post("/v1/things?kind=a")
        .unwrap()
        .json(&json!({"a": 1}))
        .unwrap();
    block_on(if once {
        request.once().send()
    } else {
        request.send()
    })
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

/// A server whose first answer is `first` and every later one `{"ok":true}`.
fn first(first: Reply) -> Server {
    Server::start(move |_, before| if before == 0 { first.clone() } else { fine() })
}

fn always(reply: Reply) -> Server {
    Server::start(move |_: &Request, _| reply.clone())
}

fn fine() -> Reply {
    Reply::json(200, &json!({"ok": true}))
}

#[test]
fn a_passing_fault_is_retried() {
    for fault in [
        Reply::json(
            429,
            &json!({"error": {"type": "rate-limit-exceeded", "message": "slow"}}),
        ),
        Reply::text(503, "<h1>busy</h1>"),
        Reply::json(
            529,
            &json!({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}),
        ),
        Reply::text(408, ""),
        fine().cut_after(4),
        Reply::hang_up(),
    ] {
        let server = first(fault.clone());
        let response = ask(&server, policy(), false).unwrap();
        assert_eq!(response.attempts(), 2, "{fault:?}");
        assert_eq!(response.json::<Value>().unwrap(), json!({"ok": true}));
        assert_eq!(
            server.requests()[1].json(),
            json!({"a": 1}),
            "the repeat carries the body too"
        );
    }
}

#[test]
fn a_slow_answer_times_out_and_is_retried() {
    let server = first(fine().after(Duration::from_secs(2)));
    let quick = Policy {
        timeout: Duration::from_millis(300),
        ..policy()
    };
    assert_eq!(ask(&server, quick, false).unwrap().attempts(), 2);
}

#[test]
fn retry_after_is_waited_for() {
    let server = first(Reply::text(429, "").header("retry-after", "1"));
    let start = Instant::now();
    ask(&server, policy(), false).unwrap();
    assert!(
        start.elapsed() >= Duration::from_secs(1),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn a_retry_after_beyond_patience_ends_it_and_says_so() {
    let server = always(Reply::text(429, "").header("retry-after", "86400"));
    let error = ask(&server, policy(), false).unwrap_err().to_string();
    assert_eq!(server.requests().len(), 1);
    assert!(error.contains("asks for 86400 s of rest"), "{error}");
}

#[test]
fn it_gives_up_after_the_last_attempt() {
    let server = always(Reply::text(500, "boom"));
    let error = ask(&server, policy(), false).unwrap_err();
    assert_eq!(server.requests().len(), 3);
    assert_eq!(error.status(), Some(500));
    assert!(
        error.to_string().contains("500: boom (tried 3 times)"),
        "{error}"
    );
}

#[test]
fn what_will_not_get_better_is_not_retried() {
    for status in [301, 400, 401, 402, 403, 404, 413] {
        let server = always(Reply::text(status, "no"));
        assert_eq!(
            ask(&server, policy(), false).unwrap_err().status(),
            Some(status)
        );
        assert_eq!(server.requests().len(), 1, "{status}");
    }
    let spent = Policy {
        final_markers: &["enforced_spend_limit_reached"],
        ..policy()
    };
    let body = json!({"error": {"message": "limit", "details": {"reason": "enforced_spend_limit_reached"}}});
    let server = always(Reply::json(429, &body));
    ask(&server, spent, false).unwrap_err();
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn what_costs_money_is_repeated_only_when_nothing_happened() {
    for (fault, requests) in [
        (Reply::text(429, ""), 2),
        (Reply::text(503, ""), 1),
        (fine().cut_after(2), 1),
        (Reply::hang_up(), 1),
    ] {
        let server = first(fault.clone());
        let sent = match ask(&server, policy(), true) {
            Err(Error::Network { sent, .. }) => sent,
            _ => true,
        };
        assert!(sent);
        assert_eq!(server.requests().len(), requests, "{fault:?}");
    }
}

/// Of what may be billed, whoever pays wants to know.
#[test]
fn a_failure_tells_whether_the_server_may_have_done_it() {
    let quick = || Policy {
        attempts: 1,
        timeout: Duration::from_millis(300),
        max_body: 100,
        ..policy()
    };
    for (fault, done) in [
        (fine().cut_after(2), true),
        (Reply::hang_up(), true),
        (fine().after(Duration::from_secs(2)), true),
        (Reply::text(200, &"x".repeat(200)), true),
        (Reply::text(307, "").header("location", "/x"), false),
        (Reply::text(400, ""), false),
        (Reply::text(429, ""), false),
        (Reply::text(529, ""), false),
    ] {
        let error = ask(&always(fault.clone()), quick(), false).unwrap_err();
        assert_eq!(error.may_be_done(), done, "{fault:?}: {error}");
    }
    let odd = ask(&always(Reply::text(200, "<h1>")), quick(), false).unwrap();
    assert!(odd.json::<Value>().unwrap_err().may_be_done());
    let nobody = always(fine()).url();
    let client = Client::new(&nobody, quick()).unwrap();
    let error = block_on(client.post("x").unwrap().send()).unwrap_err();
    assert!(!error.may_be_done(), "{error}");
}

#[test]
fn attempts_can_be_made_one_by_one() {
    let server = first(Reply::text(503, ""));
    let client = Client::new(&server.url(), policy()).unwrap();
    let request = client.get("x").unwrap();
    block_on(async {
        let failure = request.attempt(1).await.unwrap_err();
        assert_eq!(server.requests().len(), 1, "it is not repeated by itself");
        assert!(client.waits(&failure, 1).await);
        assert!(!client.waits(&failure, 3).await, "after the last of three");
        assert_eq!(request.attempt(2).await.unwrap().attempts(), 2);
        let unreadable = request.attempt(3).await.unwrap().json::<u8>().unwrap_err();
        assert!(!client.waits(&unreadable.into(), 1).await);
    });
}

#[test]
fn nobody_listening_is_a_network_error_that_was_not_sent() {
    let server = always(fine());
    let url = server.url();
    drop(server);
    let client = Client::new(&url, policy()).unwrap();
    let error = block_on(client.get("x").unwrap().once().send()).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Network {
                sent: false,
                attempts: 3,
                ..
            }
        ),
        "{error:?}"
    );
}

#[test]
fn an_endless_body_is_refused() {
    let server = always(Reply::text(200, &"x".repeat(2 << 20)));
    let error = ask(&server, policy(), false).unwrap_err();
    assert!(
        matches!(
            error,
            Error::TooLarge {
                limit: 1_048_576,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn odd_bodies_are_errors_that_name_the_place() {
    for body in ["", "{", "nul", "<html>", "\u{0}\u{1b}[2J", "[]"] {
        let server = always(Reply::text(200, body));
        let response = ask(&server, policy(), false).unwrap();
        let error = response
            .json::<std::collections::HashMap<String, Value>>()
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("/v1/things: the answer is not the documented JSON"),
            "{error}"
        );
        assert!(!error.contains('\u{1b}'), "{error:?}");
    }
}

#[test]
fn the_key_goes_to_its_host_only_and_is_never_repeated_back() {
    let away = always(fine());
    let target = format!("{}/steal", away.url());
    let home = always(Reply::text(302, "").header("location", &target));
    let error = ask(&home, policy(), false).unwrap_err().to_string();
    assert!(error.contains("not followed"), "{error}");
    assert_eq!(home.requests()[0].header("x-api-key"), Some(KEY));
    assert!(away.requests().is_empty());

    // An absolute URL of another host, as a service may hand out for its results.
    let secret = Secret::bind("THE_KEY", KEY, Scheme::ApiKey, &home.url()).unwrap();
    let client = Client::new(&home.url(), policy())
        .unwrap()
        .with_secret(secret);
    block_on(client.get(&target).unwrap().send()).unwrap();
    assert_eq!(away.requests()[0].header("x-api-key"), None);

    let echo = Server::start(|r, _| {
        Reply::text(401, &format!("bad key {}", r.header("x-api-key").unwrap()))
    });
    let error = ask(&echo, policy(), false).unwrap_err();
    let shown = format!("{error} {error:?}");
    assert!(!shown.contains(KEY), "{shown}");
    assert!(
        shown.contains("bad key [THE_KEY]; check THE_KEY"),
        "{shown}"
    );

    let echo =
        Server::start(|r, _| Reply::json(200, &json!({"n": r.header("x-api-key").unwrap()})));
    let response = ask(&echo, policy(), false).unwrap();
    let error = response.json::<std::collections::HashMap<String, u64>>();
    let shown = format!("{0} {0:?}", error.unwrap_err());
    assert!(
        !shown.contains(KEY) && shown.contains("[THE_KEY]"),
        "{shown}"
    );
}

#[test]
fn retries_are_told_and_can_be_ended() {
    let server = always(Reply::text(503, "out of order"));
    let (tell, told) = std::sync::mpsc::channel();
    let client = Client::new(&server.url(), policy())
        .unwrap()
        .with_retries_told(tell);
    let send = || block_on(client.get("/things").unwrap().send()).unwrap_err();
    send();
    let told: Vec<_> = told.try_iter().collect();
    let counted: Vec<_> = told.iter().map(|r| (r.attempt, r.attempts)).collect();
    assert_eq!(counted, [(1, 3), (2, 3)], "nothing follows the third");
    let shown = told[0].to_string();
    assert!(
        shown.contains("/things: HTTP 503: out of order; attempt 1 of 3, the next in 0.0 s"),
        "{shown}"
    );
    client.give_up();
    let before = server.requests().len();
    assert_eq!(send().status(), Some(503));
    assert_eq!(server.requests().len(), before + 1, "asked once, no more");
}

#[test]
fn giving_up_ends_a_wait_that_has_begun() {
    let server = always(Reply::text(429, "").header("retry-after", "60"));
    let client = Client::new(&server.url(), policy()).unwrap();
    let begun = Instant::now();
    let error = block_on(async {
        let give_up = async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            client.clone().give_up();
        };
        tokio::join!(client.get("/things").unwrap().send(), give_up).0
    });
    assert_eq!(error.unwrap_err().status(), Some(429));
    let took = begun.elapsed();
    assert!((0.3..10.0).contains(&took.as_secs_f64()), "{took:?}");
}
