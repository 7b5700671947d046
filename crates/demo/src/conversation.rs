//! Requests to a box and its answers: JSON over a channel that also carries descriptors.
//!
//! A message of the channel is bounded, a status or a manifest is not so small: each is sent in parts,
//! and the sum of the parts is bounded instead.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context, bail};
use linux::channel::{Channel, LARGEST_MESSAGE};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The most bytes of a request or an answer: a manifest file of 4 MiB, escaped.
const LARGEST: usize = 16 << 20;
const MORE: u8 = 0;
const LAST: u8 = 1;

/// What one can ask of a box.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Request {
    /// How everything is.
    Status,
    /// The namespaces of a pod (`NAMESPACE/NAME`) or of a node.
    Exec { place: Place },
    /// Takes a manifest's objects.
    Apply { file: String, text: String },
    /// Removes a manifest's objects.
    Delete { file: String, text: String },
    /// Kills a process of the product; with `hold` it is not started again.
    Kill { process: String, hold: bool },
    /// Starts a process that is held down.
    Resume { process: String },
    /// Puts a new process in the place of one that runs, by hand-over.
    Upgrade { process: String, binary: Option<PathBuf> },
    /// A page of a process' admin socket.
    Admin { process: String, path: String },
    /// The end.
    Stop,
}

/// Where a program is to run.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// In a pod.
    Pod {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// Outside of pods: on a node, or at `control` or `outside`.
    Node(String),
}

/// An answer: a value, or one sentence.
pub(crate) type Answer = Result<serde_json::Value, String>;

/// Sends a value in as many parts as it takes, the descriptors with the last one.
pub(crate) fn send(channel: &Channel, value: &impl Serialize, descriptors: &[OwnedFd]) -> anyhow::Result<()> {
    let text = serde_json::to_vec(value)?;
    let mut parts = text.chunks(LARGEST_MESSAGE - 1).peekable();
    while let Some(part) = parts.next() {
        let last = parts.peek().is_none();
        let mut message = vec![if last { LAST } else { MORE }];
        message.extend_from_slice(part);
        let all: Vec<_> = descriptors.iter().filter(|_| last).map(AsFd::as_fd).collect();
        channel.send(&message, &all)?;
    }
    Ok(())
}

/// Receives what [`send`] sent.
pub(crate) fn receive<T: DeserializeOwned>(channel: &Channel) -> anyhow::Result<(T, Vec<OwnedFd>)> {
    let mut buffer = vec![0; LARGEST_MESSAGE];
    let mut text = Vec::new();
    loop {
        let (length, descriptors) = channel.recv(&mut buffer)?;
        let Some((kind, part)) = buffer[..length].split_first() else {
            bail!("the other side closed the connection");
        };
        if text.len() + part.len() > LARGEST {
            bail!("the message is longer than {LARGEST} bytes");
        }
        text.extend_from_slice(part);
        if *kind == LAST {
            return Ok((serde_json::from_slice(&text).context("a message that makes no sense")?, descriptors));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_arrives_whole_with_its_descriptors() {
        let (here, there) = Channel::pair().unwrap();
        let text = "x".repeat(3 * LARGEST_MESSAGE);
        let sent = Request::Apply { file: "shop.yaml".into(), text: text.clone() };
        let sender = std::thread::spawn(move || {
            let null = std::fs::File::open("/dev/null").unwrap();
            send(&here, &sent, &[null.into()]).unwrap();
        });
        let (received, descriptors) = receive::<Request>(&there).unwrap();
        sender.join().unwrap();
        assert!(matches!(received, Request::Apply { text: received, .. } if received == text));
        assert_eq!(descriptors.len(), 1);
    }

    #[test]
    fn the_end_of_a_conversation_and_nonsense_are_errors() {
        let (here, there) = Channel::pair().unwrap();
        here.send(b"\x01{not json", &[]).unwrap();
        assert!(receive::<Request>(&there).is_err());
        drop(here);
        assert!(receive::<Request>(&there).is_err());
    }
}
