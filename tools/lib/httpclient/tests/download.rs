//! Files that come in pieces, from a local server.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use harness::server::{Reply, Server};
use httpclient::{Chunk, Client, DownloadError, Error, Policy};

fn policy() -> Policy {
    Policy {
        attempts: 3,
        first_wait: Duration::from_millis(1),
        timeout: Duration::from_millis(200),
        ..Policy::default()
    }
}

/// The file from byte `at` on, pieces joined, and how often it began anew.
fn fetch(server: &Server, at: u64) -> (Result<(), DownloadError>, String, usize) {
    let client = Client::new(&server.url(), policy()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (mut text, mut restarts) = (String::new(), 0);
    let request = client.get("file").unwrap();
    let result = runtime.block_on(request.download(at, |chunk| {
        match chunk {
            Chunk::Bytes(bytes) => text.push_str(std::str::from_utf8(bytes).unwrap()),
            Chunk::Restart => {
                text.clear();
                restarts += 1;
            }
        }
        Ok(())
    }));
    (result, text, restarts)
}

#[track_caller]
fn network_error(result: Result<(), DownloadError>) -> (String, u32) {
    match result {
        Err(DownloadError::Http(Error::Network {
            cause, attempts, ..
        })) => (cause, attempts),
        other => panic!("{other:?}"),
    }
}

#[test]
fn redirects_in_a_circle_end() {
    let server = Server::start(|_, _| Reply::text(302, "").header("location", "/file"));
    let (result, ..) = fetch(&server, 0);
    assert_eq!(network_error(result).0, "redirects more than 5 times");
    assert_eq!(server.requests().len(), 6);
}

#[test]
fn redirects_out_of_the_web_are_not_followed() {
    for to in ["file:///etc/passwd", "ftp://example.com/x", "http://"] {
        let server = Server::start(move |_, _| Reply::text(302, "").header("location", to));
        let (result, ..) = fetch(&server, 0);
        assert!(
            network_error(result).0.contains("must not be followed"),
            "{to}"
        );
    }
}

#[test]
fn a_broken_connection_goes_on_and_a_dead_server_is_given_up() {
    let server = Server::start(|_, before| match before {
        0 => Reply::text(200, "0123456789").cut_after(4),
        1 => Reply::text(206, "456789").header("content-range", "bytes 4-9/10"),
        _ => Reply::hang_up(),
    });
    let (result, text, restarts) = fetch(&server, 0);
    result.unwrap();
    assert_eq!((text.as_str(), restarts), ("0123456789", 0));

    let server = Server::start(|_, _| Reply::hang_up());
    let (result, ..) = fetch(&server, 0);
    assert_eq!(network_error(result).1, 3);
}

#[test]
fn a_range_that_is_another_than_asked_for_is_no_answer() {
    let server =
        Server::start(|_, _| Reply::text(206, "3456789").header("content-range", "bytes 3-9/10"));
    let (result, text, _) = fetch(&server, 5);
    assert!(matches!(
        result,
        Err(DownloadError::Http(Error::Status { status: 206, .. }))
    ));
    assert_eq!(text, "");
}

#[test]
fn the_whole_file_where_a_part_was_asked_for_begins_anew() {
    let server = Server::start(|_, _| Reply::text(200, "0123456789"));
    let (result, text, restarts) = fetch(&server, 5);
    result.unwrap();
    assert_eq!((text.as_str(), restarts), ("0123456789", 1));
}
