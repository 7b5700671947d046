//! What a watch says: a line for each event.
//!
//! Only the line is looked into here; the object in it is handed as it stands to the one who reads it, once. (Through the client's
//! own type, an enum with a tag, each object is read twice, and the code of each kind exists twice.)

use std::pin::Pin;

use futures_util::{AsyncBufRead, AsyncBufReadExt};
use kube::Client;
use kube::core::Status;
use kube::core::watch::Bookmark;
use manifests::ObjectKey;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::read::{Read, Reading};
use crate::kubernetes::{Failure, ask};

/// The longest line that is taken in, in bytes: several times what an API server stores of one object.
const LONGEST: usize = 16 << 20;
/// The bookmark at the end of a list as a stream.
const END_OF_LIST: &str = "k8s.io/initial-events-end";

/// One event.
#[derive(Debug)]
pub(super) enum Event {
    /// An object as it is now.
    There(Reading),
    /// One that is gone, and the version of the list since then.
    Gone(ObjectKey, Option<String>),
    /// Everything was said up to this version; and whether a list as a stream ends here.
    Bookmark { version: String, ends_list: bool },
}

/// The events of one watch.
pub(super) struct Events {
    body: Pin<Box<dyn AsyncBufRead + Send>>,
    read: Read,
    /// The beginning of a line.
    begun: Vec<u8>,
}

impl Events {
    /// Begins to watch.
    pub(super) async fn of(
        client: &Client,
        request: Result<axum::http::Request<Vec<u8>>, kube::core::request::Error>,
        read: Read,
    ) -> Result<Self, Failure> {
        let request = request.map_err(kube::Error::BuildRequest)?;
        let body = ask(client.request_stream(request)).await?;
        Ok(Self::new(body, read))
    }

    fn new(body: impl AsyncBufRead + Send + 'static, read: Read) -> Self {
        Self { body: Box::pin(body), read, begun: Vec::new() }
    }

    /// Waits for the next events: those that came together, and behind them what went wrong. `None`: the watch has ended, and
    /// a line that is not whole is none.
    pub(super) async fn next(&mut self) -> Option<Vec<Result<Event, Failure>>> {
        loop {
            let came = match self.body.fill_buf().await {
                Ok([]) => return None,
                Ok(came) => came,
                Err(error) if is_end(&error) => return None,
                Err(error) => return Some(vec![Err(kube::Error::ReadEvents(error).into())]),
            };
            let length = came.len();
            let whole = came.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
            let (lines, rest) = came.split_at(whole);
            self.begun.extend_from_slice(lines);
            let lines = if whole == 0 { Vec::new() } else { std::mem::take(&mut self.begun) };
            self.begun.extend_from_slice(rest);
            self.body.consume_unpin(length);
            if self.begun.len() > LONGEST {
                return Some(vec![Err(Failure::Away(format!("a line of a watch is longer than {LONGEST} bytes")))]);
            }
            if !lines.is_empty() {
                return Some(events(&lines, self.read));
            }
        }
    }
}

/// Whether a connection merely went, as whoever stands between may let it after a while: the watch goes on from where it was.
fn is_end(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{TimedOut, UnexpectedEof};
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        if matches!(kind, Some(UnexpectedEof | TimedOut)) {
            return true;
        }
        next = error.source();
    }
    false
}

/// The events of whole lines, up to the first that is none.
fn events(lines: &[u8], read: Read) -> Vec<Result<Event, Failure>> {
    let mut events = Vec::new();
    for line in lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        events.push(event(line, read));
        if events.last().is_some_and(Result::is_err) {
            break;
        }
    }
    events
}

#[derive(Deserialize)]
struct Line<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(borrow)]
    object: &'a RawValue,
}

fn event(line: &[u8], read: Read) -> Result<Event, Failure> {
    let parsed = || -> serde_json::Result<Result<Event, Failure>> {
        let Line { kind, object } = serde_json::from_slice(line)?;
        let object = object.get();
        Ok(match kind {
            "ADDED" | "MODIFIED" => Ok(Event::There(read(object)?)),
            "DELETED" => read(object).map(|reading| Ok(Event::Gone(reading.key, reading.version)))?,
            "BOOKMARK" => {
                let Bookmark { metadata, .. } = serde_json::from_str(object)?;
                let ends_list = metadata.annotations.contains_key(END_OF_LIST);
                Ok(Event::Bookmark { version: metadata.resource_version, ends_list })
            }
            "ERROR" => {
                serde_json::from_str(object).map(|Status { code, message, .. }| Err(Failure::of(code, &message)))?
            }
            other => Err(Failure::Away(format!("a watch says {other:?}, which no watch says"))),
        })
    };
    parsed().unwrap_or_else(|error| Err(kube::Error::SerdeError(error).into()))
}

#[cfg(test)]
mod tests {
    use futures_util::TryStreamExt;
    use manifests::k8s_openapi::api::core::v1::Pod;
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::read::plain;
    use super::*;

    fn pod(name: &str, version: &str) -> serde_json::Value {
        json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "resourceVersion": version } })
    }

    /// All that a watch says whose bytes come in these pieces, as text.
    fn said(pieces: Vec<Vec<u8>>) -> Vec<String> {
        let body = futures_util::stream::iter(pieces.into_iter().map(std::io::Result::Ok)).into_async_read();
        let mut events = Events::new(body, plain::<Pod>);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut said = Vec::new();
            while let Some(came) = events.next().await {
                said.extend(came.into_iter().map(|event| match event {
                    Ok(Event::There(it)) => format!("{} is there at {}", it.key, it.version.unwrap()),
                    Ok(Event::Gone(key, version)) => format!("{key} is gone at {}", version.unwrap()),
                    Ok(Event::Bookmark { version, ends_list }) => format!("all up to {version}, {ends_list}"),
                    Err(failure) => failure.to_string(),
                }));
            }
            said
        })
    }

    fn lines(events: &[serde_json::Value]) -> Vec<u8> {
        events.iter().flat_map(|event| format!("{event}\n").into_bytes()).collect()
    }

    proptest! {
        #[test]
        fn however_the_bytes_come_the_events_are_the_same(cuts in prop::collection::vec(1_usize..200, 0..20)) {
            let mark = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "resourceVersion": "3",
                "annotations": { END_OF_LIST: "true" } } });
            let bytes = lines(&[
                json!({ "type": "ADDED", "object": pod("one", "1") }),
                json!({ "object": pod("two", "2"), "type": "MODIFIED" }),
                json!({ "type": "BOOKMARK", "object": mark }),
                json!({ "type": "DELETED", "object": pod("one", "4") }),
                json!({ "type": "ADDED", "object": pod("cut", "5") }),
            ]);
            // The last line has no end.
            let mut rest = &bytes[..bytes.len() - 1];
            let mut pieces = Vec::new();
            for cut in cuts {
                let (piece, behind) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece.to_vec());
                rest = behind;
            }
            pieces.push(rest.to_vec());
            pieces.retain(|piece| !piece.is_empty());
            prop_assert_eq!(said(pieces), [
                "Pod default/one is there at 1",
                "Pod default/two is there at 2",
                "all up to 3, true",
                "Pod default/one is gone at 4",
            ]);
        }
    }

    #[test]
    fn what_is_no_event_is_a_failure_that_says_nothing_of_its_text() {
        let before = json!({ "type": "ADDED", "object": pod("one", "1") });
        let said = |line: &str| {
            let mut bytes = lines(std::slice::from_ref(&before));
            bytes.extend(line.as_bytes());
            bytes.push(b'\n');
            bytes.extend(lines(std::slice::from_ref(&before)));
            let said = said(vec![bytes]);
            assert_eq!(said.len(), 2, "nothing is read behind it: {said:?}");
            said[1].clone()
        };
        let gone = json!({ "type": "ERROR", "object": { "code": 410, "message": "too old" } });
        assert_eq!(said(&gone.to_string()), Failure::Gone.to_string());
        assert!(said(r#"{"type":"ADDED","object":{"metadata":"a secret"}}"#).contains("not what was asked for"));
        assert!(!said(r#"{"type":"ADDED","object":{"metadata":"a secret"}}"#).contains("secret"));
        assert!(said("<html>").contains("not what was asked for"));
        assert!(said(r#"{"type":"NEWS","object":{}}"#).contains("NEWS"));
    }

    #[test]
    fn a_line_that_does_not_end_is_given_up() {
        let said = said(vec![vec![b' '; LONGEST / 2]; 3]);
        assert!(said.iter().all(|text| text.contains("longer than")) && !said.is_empty(), "{said:?}");
    }
}
