//! The runtime's socket: root asks to capture a pod before its programs start, and waits for the answer. The agent that is
//! to take this one's place asks here, too.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use linux::channel::Channel;
use linux::netns::NetNs;
use mesh::PodUid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{sleep, timeout};
use wire::pods::{CniAdd, CniRequest, CniResult, MAX_MESSAGE, VERSION};

use crate::door::Door;
use crate::failure::Failure;
use crate::pods::{Request, failed};
use crate::process::Event;

/// Connections at a time: a runtime starts a few pods at once, and each asks on its own.
const MOST_CONNECTIONS: usize = 128;
/// How long a connection may be without a request.
const IDLE: Duration = Duration::from_secs(60);

/// What the runtime asks, and where the answer goes.
#[derive(Debug)]
pub(crate) enum Asked {
    /// Capture this pod, in this namespace.
    Add(CniAdd, NetNs),
    /// Let go of this pod's sandbox, which the runtime calls so.
    Delete(PodUid, String),
    /// Is this pod as it is to be?
    Check(PodUid),
}

/// Serves the runtime for ever. Each request waits for `patience` at most.
pub(crate) async fn serve(door: Door, patience: Duration, events: mpsc::Sender<Event>) {
    let room = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let numbers = Arc::new(std::sync::atomic::AtomicU64::new(1));
    while let Ok(place) = room.clone().acquire_owned().await {
        let channel = door.next().await;
        let caller = Caller { channel, patience, events: events.clone(), numbers: numbers.clone() };
        tokio::spawn(async move {
            if let Err(error) = caller.serve().await {
                tracing::warn!(%error, "a connection of the runtime ended");
            }
            drop(place);
        });
    }
}

struct Caller {
    channel: AsyncFd<Channel>,
    patience: Duration,
    events: mpsc::Sender<Event>,
    numbers: Arc<std::sync::atomic::AtomicU64>,
}

impl Caller {
    async fn serve(&self) -> io::Result<()> {
        let mut buffer = vec![0; MAX_MESSAGE];
        loop {
            let receive = self.channel.async_io(Interest::READABLE, |channel| channel.recv(&mut buffer));
            let (length, descriptors) = match timeout(IDLE, receive).await {
                Ok(received) => received?,
                Err(_) => return Ok(()),
            };
            if length == 0 {
                return Ok(());
            }
            let answer = match CniRequest::decode(&buffer[..length]).map_err(io::Error::other)? {
                CniRequest::HandOver { version } => {
                    self.hand_over(version).await?;
                    continue;
                }
                CniRequest::Taken => {
                    let (there, gone) = oneshot::channel();
                    // Nobody hears it any more where the process ends anyway.
                    let _ = self.events.send(Event::Succeeded(gone)).await;
                    self.outlast(&mut buffer).await;
                    drop(there);
                    return Ok(());
                }
                CniRequest::Add(add) => self.add(add, descriptors).await,
                CniRequest::Del { pod, container } => {
                    self.ask(&pod.to_string(), Asked::Delete(pod.clone(), container)).await
                }
                CniRequest::Check { pod } => self.ask(&pod.to_string(), Asked::Check(pod.clone())).await,
            };
            let answer = answer.encode();
            self.channel.async_io(Interest::WRITABLE, |channel| channel.send(&answer, &[])).await?;
        }
    }

    /// Of the descriptors the first is the namespace; where there is none it is found by its path.
    async fn add(&self, add: CniAdd, descriptors: Vec<OwnedFd>) -> CniResult {
        let (name, path) = (format!("{}/{}", add.namespace, add.name), add.netns.clone());
        // Opened once, here: what the path leads to later is of no interest (T26). Off this thread, as a path may lead to
        // something that blocks.
        let given = descriptors.into_iter().next();
        let open = move || given.map_or_else(|| NetNs::open(&path), NetNs::from_fd);
        match tokio::task::spawn_blocking(open).await {
            Ok(Ok(namespace)) => self.ask(&name, Asked::Add(add, namespace)).await,
            Ok(Err(error)) => failed(&name, &Failure::NoNamespace(error.to_string())),
            Err(_) => failed(&name, &Failure::Internal),
        }
    }

    /// Tells another agent all that it needs.
    async fn hand_over(&self, version: u32) -> io::Result<()> {
        if version != VERSION {
            let sentence = format!("the next agent speaks version {version} of the protocol, and this one {VERSION}");
            return Err(io::Error::other(sentence));
        }
        let (reply, all) = oneshot::channel();
        self.events.send(Event::HandOver(reply)).await.map_err(io::Error::other)?;
        for (message, descriptors) in all.await.map_err(io::Error::other)?? {
            let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
            self.channel.async_io(Interest::WRITABLE, |channel| channel.send(&message, &borrowed)).await?;
        }
        Ok(())
    }

    /// Waits until the agent that took this one's place is gone. It has nothing more to say.
    async fn outlast(&self, buffer: &mut [u8]) {
        while self.channel.async_io(Interest::READABLE, |channel| channel.recv(buffer)).await.is_ok_and(|it| it.0 > 0) {
        }
    }

    async fn ask(&self, name: &str, asked: Asked) -> CniResult {
        let number: Request = self.numbers.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let (reply, mut answer) = oneshot::channel();
        if self.events.send(Event::Asked(number, asked, reply)).await.is_ok() {
            let waited = tokio::select! {
                answer = &mut answer => Some(answer),
                () = sleep(self.patience) => None,
            };
            let answer = match waited {
                Some(answer) => answer,
                // What is missing is known there.
                None => match self.events.send(Event::Overdue(number)).await {
                    Ok(()) => answer.await,
                    Err(_) => return failed(name, &Failure::Internal),
                },
            };
            if let Ok(answer) = answer {
                return answer;
            }
        }
        failed(name, &Failure::Internal)
    }
}
