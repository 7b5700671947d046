//! The proxies' socket: pods with their listeners go out; readiness, requests for sockets, and what an agent that is new
//! cannot know come in.
//!
//! What a proxy says is checked like a stranger's: it reads what strangers send.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use linux::channel::Channel;
use mesh::PodUid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use wire::pods::{BadMessage, Ends, FromAgent, Kept, MAX_MESSAGE, PodAdded, SocketKind, ToAgent, VERSION};

use crate::door::Door;
use crate::process::Event;

/// Messages that may wait for a proxy that is slow to read; with more of them it is given up.
const MOST_WAITING: usize = 1024;
/// How long a connection may take to say hello.
const HELLO: Duration = Duration::from_secs(5);
/// Connections at a time: of one proxy that serves, its successor, and others that drain.
const MOST_CONNECTIONS: usize = 16;
/// Batches of sockets on their way at a time, of all pods: at 64 sockets each, a bound on descriptors.
const MOST_BATCHES: usize = 32;

/// What the proxy of a link says.
#[derive(Debug)]
pub(crate) enum Said {
    /// It said hello, and when it started.
    Hello(Link, Duration),
    /// It said hello, and drains.
    Drains(Link),
    /// It is gone.
    Gone,
    /// It accepts on a pod's listeners, and has its certificate.
    Ready(PodUid),
    /// It needs sockets.
    Want(PodUid, SocketKind, usize),
    /// It serves this pod, and these are duplicates of its listeners.
    Held(PodAdded, Vec<OwnedFd>),
    /// That were all that it serves.
    HeldAll,
    /// The file is for the next proxy.
    Keep(Kept, OwnedFd),
    /// It accepts no more, and ends when its connections have.
    Leaving,
    /// What was open to a pod before its capture and is refused by now.
    End(PodUid, Vec<Ends>),
}

/// Why a link ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum End {
    #[error("it closed the connection")]
    Closed,
    #[error("it was refused, or did not read what it was sent")]
    Dropped,
    #[error("it said nothing for {} s", HELLO.as_secs())]
    Silent,
    #[error("its first message is not a hello")]
    NoHello,
    #[error("it said hello twice")]
    SecondHello,
    #[error("it speaks version {0} of the protocol, and this agent {VERSION}: install the same version of both")]
    Version(u32),
    #[error("its message {0} came with {1} descriptors")]
    Descriptors(&'static str, usize),
    #[error("it is not understood: {0}")]
    Malformed(#[from] BadMessage),
    #[error("the connection broke: {0}")]
    Broken(#[from] io::Error),
}

/// The way to a proxy. Dropping it closes the connection.
#[derive(Debug)]
pub(crate) struct Link {
    say: mpsc::Sender<Outgoing>,
    _open: oneshot::Sender<()>,
}

/// One message, with what goes beside it.
#[derive(Debug)]
struct Outgoing {
    message: Vec<u8>,
    descriptors: Vec<OwnedFd>,
    /// Returned when the message was sent, or will never be.
    _turn: Option<Turn>,
}

impl Link {
    /// A link, what is queued on it, and what ends when it is dropped.
    fn new() -> (Self, mpsc::Receiver<Outgoing>, oneshot::Receiver<()>) {
        let (say, outgoing) = mpsc::channel(MOST_WAITING);
        let (open, closed) = oneshot::channel();
        (Self { say, _open: open }, outgoing, closed)
    }

    /// Queues a message. `false`: the proxy does not read, or is gone.
    pub(crate) fn send(&self, message: &FromAgent, descriptors: Vec<OwnedFd>) -> bool {
        self.sender().send(message, descriptors, None)
    }

    /// Something that outlives this and sends to the same proxy.
    pub(crate) fn sender(&self) -> Sender {
        Sender(self.say.clone())
    }
}

/// Sends to one proxy, and to no successor of it.
#[derive(Debug, Clone)]
pub(crate) struct Sender(mpsc::Sender<Outgoing>);

impl Sender {
    /// As [`Link::send`]; `turn` is given back when the message has left.
    pub(crate) fn send(&self, message: &FromAgent, descriptors: Vec<OwnedFd>, turn: Option<Turn>) -> bool {
        self.0.try_send(Outgoing { message: message.encode(), descriptors, _turn: turn }).is_ok()
    }
}

/// Accepts proxies for ever.
pub(crate) async fn serve(door: Door, events: mpsc::Sender<Event>) {
    let room = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let mut number = 0_u64;
    while let Ok(place) = room.clone().acquire_owned().await {
        let channel = door.next().await;
        number += 1;
        tokio::spawn(converse(number, channel, events.clone(), place));
    }
}

async fn converse(number: u64, channel: AsyncFd<Channel>, events: mpsc::Sender<Event>, _place: OwnedSemaphorePermit) {
    let end = match timeout(HELLO, greet(&channel)).await {
        Ok(Ok(since)) => {
            let (link, mut outgoing, closed) = Link::new();
            let said = match since {
                Some(started) => Said::Hello(link, started),
                None => Said::Drains(link),
            };
            let hello = Event::Proxy(number, said);
            if events.send(hello).await.is_err() {
                return;
            }
            let end = tokio::select! {
                end = speak(&channel, &mut outgoing) => end,
                end = listen(number, &channel, &events) => end,
                _ = closed => End::Dropped,
            };
            if matches!(end, End::Dropped) {
                say_the_rest(&channel, &mut outgoing);
            }
            // The loop may be gone; then nothing is left to be told.
            let _ = events.send(Event::Proxy(number, Said::Gone)).await;
            end
        }
        Ok(Err(end)) => {
            // It is told why, in the one message of which every version knows the form.
            let refusal = FromAgent::Refused(end.to_string()).encode();
            let _ = channel.get_ref().send(&refusal, &[]);
            end
        }
        Err(_) => End::Silent,
    };
    tracing::warn!("the link to a proxy ended: {end}");
}

/// When the proxy started; `None` where it drains.
async fn greet(channel: &AsyncFd<Channel>) -> Result<Option<Duration>, End> {
    match receive(channel, &mut vec![0; MAX_MESSAGE]).await?.0 {
        ToAgent::Hello { version: VERSION, started, leaving } => Ok((!leaving).then_some(started)),
        ToAgent::Hello { version, .. } => Err(End::Version(version)),
        _ => Err(End::NoHello),
    }
}

async fn listen(number: u64, channel: &AsyncFd<Channel>, events: &mpsc::Sender<Event>) -> End {
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        let said = match receive(channel, &mut buffer).await {
            Ok((message, descriptors)) => match understand(message, descriptors) {
                Ok(Some(said)) => said,
                Ok(None) => continue,
                Err(end) => return end,
            },
            Err(end) => return end,
        };
        if events.send(Event::Proxy(number, said)).await.is_err() {
            return End::Dropped;
        }
    }
}

/// What a message and its descriptors come to; `None` where only a newer version knows. Descriptors that nobody asked for
/// are closed.
pub(crate) fn understand(message: ToAgent, mut descriptors: Vec<OwnedFd>) -> Result<Option<Said>, End> {
    let count = descriptors.len();
    Ok(Some(match message {
        ToAgent::Hello { .. } => return Err(End::SecondHello),
        ToAgent::PodReady { pod } => Said::Ready(pod),
        ToAgent::WantSockets { pod, kind, count } => Said::Want(pod, kind, count as usize),
        ToAgent::Held(pod) if pod.listeners.len() == count => Said::Held(pod, descriptors),
        ToAgent::Held(_) => return Err(End::Descriptors("held", count)),
        ToAgent::HeldAll => Said::HeldAll,
        ToAgent::Keep(what) => match descriptors.pop().filter(|_| count == 1) {
            Some(file) => Said::Keep(what, file),
            None => return Err(End::Descriptors("keep", count)),
        },
        ToAgent::Leaving => Said::Leaving,
        ToAgent::End { pod, connections } => Said::End(pod, connections),
        ToAgent::Unknown => return Ok(None),
    }))
}

async fn receive(channel: &AsyncFd<Channel>, buffer: &mut [u8]) -> Result<(ToAgent, Vec<OwnedFd>), End> {
    let (length, descriptors) = channel.async_io(Interest::READABLE, |channel| channel.recv(buffer)).await?;
    match length {
        0 => Err(End::Closed),
        _ => Ok((ToAgent::decode(&buffer[..length])?, descriptors)),
    }
}

/// What a link was told before it was dropped, as far as the peer has room for it.
fn say_the_rest(channel: &AsyncFd<Channel>, outgoing: &mut mpsc::Receiver<Outgoing>) {
    while let Ok(next) = outgoing.try_recv() {
        let borrowed: Vec<_> = next.descriptors.iter().map(AsFd::as_fd).collect();
        if channel.get_ref().send(&next.message, &borrowed).is_err() {
            return;
        }
    }
}

async fn speak(channel: &AsyncFd<Channel>, outgoing: &mut mpsc::Receiver<Outgoing>) -> End {
    while let Some(next) = outgoing.recv().await {
        let borrowed: Vec<_> = next.descriptors.iter().map(AsFd::as_fd).collect();
        let sent = channel.async_io(Interest::WRITABLE, |channel| channel.send(&next.message, &borrowed)).await;
        if let Err(error) = sent {
            return End::Broken(error);
        }
    }
    End::Dropped
}

/// Bounds what is on its way to the proxy: one batch of each kind for each pod, and some of them at a time (T18).
#[derive(Debug, Clone)]
pub(crate) struct Batches {
    taken: Arc<Mutex<HashSet<(PodUid, SocketKind)>>>,
    room: Arc<Semaphore>,
}

/// The right to make one batch.
#[derive(Debug)]
pub(crate) struct Turn {
    batches: Batches,
    key: (PodUid, SocketKind),
    room: Option<OwnedSemaphorePermit>,
}

impl Batches {
    /// Nothing is on its way.
    pub(crate) fn new() -> Self {
        Self { taken: Arc::default(), room: Arc::new(Semaphore::new(MOST_BATCHES)) }
    }

    /// `None` while the last batch of that kind for that pod is on its way.
    pub(crate) fn turn(&self, pod: &PodUid, kind: SocketKind) -> Option<Turn> {
        let key = (pod.clone(), kind);
        let free = self.taken.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone());
        free.then(|| Turn { batches: self.clone(), key, room: None })
    }
}

impl Turn {
    /// Waits until not too many are on their way.
    pub(crate) async fn wait(&mut self) {
        // Never closed.
        self.room = self.batches.room.clone().acquire_owned().await.ok();
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.batches.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

/// Links without a proxy.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// What is queued on a link.
    pub(crate) struct Queue {
        outgoing: mpsc::Receiver<Outgoing>,
        _open: oneshot::Receiver<()>,
    }

    impl Queue {
        /// The next message; `None` where there is none now.
        pub(crate) fn next(&mut self) -> Option<FromAgent> {
            Some(FromAgent::decode(&self.outgoing.try_recv().ok()?.message).unwrap())
        }
    }

    /// A link, and what is queued on it.
    pub(crate) fn link() -> (Link, Queue) {
        let (link, outgoing, open) = Link::new();
        (link, Queue { outgoing, _open: open })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_has_one_batch_of_each_kind_on_its_way() {
        let batches = Batches::new();
        let (a, b) = (PodUid::from("a"), PodUid::from("b"));
        let first = batches.turn(&a, SocketKind::OuterV4).unwrap();
        assert!(batches.turn(&a, SocketKind::OuterV4).is_none());
        assert!(batches.turn(&a, SocketKind::OuterV6).is_some() && batches.turn(&b, SocketKind::OuterV4).is_some());
        drop(first);
        assert!(batches.turn(&a, SocketKind::OuterV4).is_some());
    }

    #[tokio::test]
    async fn not_too_many_batches_are_on_their_way_at_a_time() {
        let batches = Batches::new();
        let mut turns = Vec::new();
        for number in 0..MOST_BATCHES {
            let mut turn = batches.turn(&PodUid::from(number.to_string().as_str()), SocketKind::InnerV4).unwrap();
            turn.wait().await;
            turns.push(turn);
        }
        let mut late = batches.turn(&PodUid::from("late"), SocketKind::InnerV4).unwrap();
        tokio::select! {
            biased;
            () = late.wait() => panic!("one too many"),
            () = tokio::task::yield_now() => {}
        }
        turns.pop();
        late.wait().await;
    }
}
