//! The box's door: a socket in the state directory, at which the command line asks.
//!
//! Each connection is one request and one answer, on a thread of its own, so that a client that says
//! nothing keeps nobody waiting.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use anyhow::{Context, anyhow, bail};
use linux::channel::{Channel, Listener};
use tokio::sync::mpsc::UnboundedSender;

use crate::boot::Event;
use crate::conversation::{self, Answer, Request};
use crate::state::{self, StateDirectory};

/// The most connections at once; an `exec` is one only until its program runs.
const MOST_CLIENTS: usize = 256;

/// An answer on its way, with the descriptors that belong to it.
pub(crate) type Reply = (Answer, Vec<OwnedFd>);

/// Opens the door. Requests arrive as events.
pub(crate) fn open(state: &StateDirectory, events: UnboundedSender<Event>) -> anyhow::Result<()> {
    let listener = Listener::bind(&state.socket(), 0o600).context("cannot listen in the state directory")?;
    let slots = std::sync::Arc::new(());
    thread::Builder::new().name("door".into()).spawn(move || {
        while let Ok(client) = listener.accept() {
            if std::sync::Arc::strong_count(&slots) > MOST_CLIENTS {
                continue;
            }
            let (events, slot) = (events.clone(), slots.clone());
            let served = thread::Builder::new().name("client".into()).spawn(move || {
                // A client that hangs up early is its own loss.
                let _ = serve(&client, &events);
                drop(slot);
            });
            if let Err(error) = served {
                tracing::warn!(%error, "cannot serve a client");
            }
        }
    })?;
    Ok(())
}

fn serve(client: &Channel, events: &UnboundedSender<Event>) -> anyhow::Result<()> {
    let (request, _) = conversation::receive::<Request>(client)?;
    // The directory's permissions say the same; this holds if somebody opens them.
    if client.peer_credentials()?.uid != nix::unistd::geteuid().as_raw() {
        return conversation::send(client, &Answer::Err("this box belongs to another user".into()), &[]);
    }
    let (answer, descriptors) =
        ask(events, request).recv().unwrap_or_else(|_| (Err("the box is ending".to_owned()), Vec::new()));
    conversation::send(client, &answer, &descriptors)
}

pub(crate) fn ask(events: &UnboundedSender<Event>, request: Request) -> Receiver<Reply> {
    let (sender, receiver): (Sender<Reply>, _) = channel();
    // If the box is ending nobody takes the event, and the receiver says so.
    let _ = events.send(Event::Request { request, reply: sender });
    receiver
}

/// Asks the box at `path`.
pub(crate) fn request(path: &Path, request: &Request) -> anyhow::Result<(serde_json::Value, Vec<OwnedFd>)> {
    let client = dial(path)?;
    conversation::send(&client, request, &[])?;
    let (answer, descriptors) = conversation::receive::<Answer>(&client)?;
    match answer {
        Ok(value) => Ok((value, descriptors)),
        Err(sentence) => bail!("{sentence}"),
    }
}

/// Asks the box at `path` to end, and gives its init's process id.
pub(crate) fn ask_to_stop(path: &Path) -> anyhow::Result<u32> {
    let client = dial(path)?;
    conversation::send(&client, &Request::Stop, &[])?;
    Ok(u32::try_from(client.peer_credentials()?.pid)?)
}

fn dial(path: &Path) -> anyhow::Result<Channel> {
    state::connect(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => anyhow!(
            "no box is running at {path}: start one with `justmtls demo start`, or name its directory with --state",
            path = path.display()
        ),
        _ => anyhow!("cannot reach the box at {}: {error}", path.display()),
    })
}
