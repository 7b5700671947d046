//! The link to the node's agent, which alone can make sockets in a pod's network namespace.
//!
//! Both directions move by themselves: an agent that is slow to read must not keep us from reading what it says. When it
//! goes, what we have goes on serving, and we call again until there is an agent once more: to that one we hand over what
//! it cannot know (`estate`).

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use linux::channel::{Channel, LARGEST_MESSAGE};
use mesh::PodUid;
use socket2::Socket;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};
use wire::pods::{Ends, FromAgent, Kept, Listener, PodAdded, SocketKind, ToAgent, VERSION};

use crate::watched::watched;

/// The pause between two calls to an agent that is not there.
const CALL_AGAIN: Duration = Duration::from_millis(200);

/// What the agent said, with the sockets that came beside it.
#[derive(Debug)]
pub(crate) enum Said {
    /// The link is up, and this is what the last proxy left: the agent will say which pods there are.
    Connected(Vec<(Kept, OwnedFd)>),
    /// The agent went away.
    Gone,
    /// Another proxy serves all pods.
    Drain,
    /// No proxy serves any more.
    Needed,
    /// Serve this pod.
    PodAdded(PodAdded, Vec<(Listener, TcpListener)>),
    /// Stop serving it.
    PodRemoved(PodUid),
    /// What was opened to a pod before its capture.
    FromBefore(PodUid, Vec<Ends>),
    /// Sockets that were asked for.
    Sockets(PodUid, SocketKind, Vec<Socket>),
}

/// Where the agent is.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    /// Its socket.
    pub(crate) path: PathBuf,
    /// The user that it runs as: to no other are keys and sockets handed.
    pub(crate) uid: u32,
}

/// What an agent is told by itself, and told again when it is new.
pub(crate) struct Told {
    /// The pods that are served, with duplicates of their listeners.
    pub(crate) pods: Box<dyn Fn() -> Vec<(PodAdded, Vec<OwnedFd>)> + Send + Sync>,
    /// What changes while the link is up.
    pub(crate) state: watch::Receiver<State>,
    /// When this process started, since the machine did.
    pub(crate) started: Duration,
}

/// What an agent must know of us at any time.
#[derive(Debug, Clone, Default)]
pub(crate) struct State {
    /// The view, sealed, for the next proxy.
    pub(crate) view: Option<Arc<OwnedFd>>,
    /// SVIDs with their keys, sealed, for the next proxy.
    pub(crate) credentials: Option<Arc<OwnedFd>>,
    /// We accept no more, and need an agent for what is open.
    pub(crate) leaving: bool,
}

/// Keeps the link: passes on what the agent says, and to it what is in `outgoing`.
pub(crate) async fn keep(
    place: Place,
    said: mpsc::Sender<Said>,
    mut outgoing: mpsc::UnboundedReceiver<ToAgent>,
    mut told: Told,
) {
    let mut complained = false;
    while !said.is_closed() {
        match call(&place) {
            Ok(link) => {
                // What was meant for the last agent means nothing to this one.
                while outgoing.try_recv().is_ok() {}
                let end = converse(&link, &said, &mut outgoing, &mut told).await;
                if !complained || end.kind() != io::ErrorKind::ConnectionRefused {
                    tracing::warn!("the link to the agent ended: {end}");
                }
                complained = end.kind() == io::ErrorKind::ConnectionRefused;
                if said.send(Said::Gone).await.is_err() {
                    return;
                }
            }
            Err(error) if !complained => {
                complained = true;
                tracing::warn!(path = %place.path.display(), %error, "no agent to talk to; trying again");
            }
            Err(_) => {}
        }
        tokio::time::sleep(CALL_AGAIN).await;
    }
}

fn call(place: &Place) -> io::Result<AsyncFd<Channel>> {
    let channel = Channel::connect(&place.path)?;
    let peer = channel.peer_credentials()?;
    if peer.uid != place.uid {
        let sentence = format!("user {} listens there, and the agent is user {} (--agent-uid)", peer.uid, place.uid);
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, sentence));
    }
    channel.set_nonblocking(true)?;
    watched(channel)
}

/// Talks until the link breaks, and says why it did.
async fn converse(
    link: &AsyncFd<Channel>,
    said: &mpsc::Sender<Said>,
    outgoing: &mut mpsc::UnboundedReceiver<ToAgent>,
    told: &mut Told,
) -> io::Error {
    let speak = async {
        let leaving = told.state.borrow().leaving;
        send(link, &ToAgent::Hello { version: VERSION, started: told.started, leaving }, &[]).await?;
        // The listeners of one that leaves are another's.
        if !leaving {
            for (pod, listeners) in (told.pods)() {
                let borrowed: Vec<_> = listeners.iter().map(AsFd::as_fd).collect();
                send(link, &ToAgent::Held(pod), &borrowed).await?;
            }
            send(link, &ToAgent::HeldAll, &[]).await?;
        }
        let mut before = State { leaving, ..State::default() };
        loop {
            let now = told.state.borrow_and_update().clone();
            tell(link, &before, &now).await?;
            before = now;
            tokio::select! {
                message = outgoing.recv() => match message {
                    Some(message) => send(link, &message, &[]).await?,
                    None => return Ok(()),
                },
                changed = told.state.changed() => if changed.is_err() {
                    return Ok::<(), io::Error>(());
                },
            }
        }
    };
    let listen = async {
        let mut buffer = vec![0; LARGEST_MESSAGE];
        let mut greeted = false;
        loop {
            let (length, descriptors) = link.async_io(Interest::READABLE, |channel| channel.recv(&mut buffer)).await?;
            if length == 0 {
                return Err::<(), io::Error>(io::ErrorKind::UnexpectedEof.into());
            }
            match understand(&buffer[..length], descriptors) {
                Ok(Heard::Nothing) => {}
                Ok(Heard::Refused(why)) => return Err(io::Error::new(io::ErrorKind::ConnectionRefused, why)),
                Ok(Heard::Said(message)) if greeted || matches!(message, Said::Connected(_)) => {
                    greeted = true;
                    said.send(message).await.map_err(|_| io::ErrorKind::BrokenPipe)?;
                }
                Ok(Heard::Said(_)) => return Err(refused("the agent's first message is not a hello")),
                // It affects only itself; what came with it is closed.
                Err(why) => tracing::error!("a message of the agent is ignored: {why}"),
            }
        }
    };
    match tokio::try_join!(speak, listen) {
        Ok(_) => io::ErrorKind::UnexpectedEof.into(),
        Err(error) => error,
    }
}

/// Says what is different from what was said before.
async fn tell(link: &AsyncFd<Channel>, before: &State, now: &State) -> io::Result<()> {
    let files = [(Kept::View, &before.view, &now.view), (Kept::Credentials, &before.credentials, &now.credentials)];
    for (what, before, now) in files {
        let same = |before: &Arc<OwnedFd>| now.as_ref().is_some_and(|now| Arc::ptr_eq(before, now));
        if let Some(file) = now
            && !before.as_ref().is_some_and(same)
        {
            send(link, &ToAgent::Keep(what), &[file.as_fd()]).await?;
        }
    }
    if now.leaving && !before.leaving {
        send(link, &ToAgent::Leaving, &[]).await?;
    }
    Ok(())
}

async fn send(link: &AsyncFd<Channel>, message: &ToAgent, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = message.encode();
    link.async_io(Interest::WRITABLE, |channel| channel.send(&bytes, descriptors)).await
}

/// What a message comes to.
enum Heard {
    /// Something to be passed on.
    Said(Said),
    /// The agent does not want us, and says why.
    Refused(String),
    /// Something that only a newer agent means.
    Nothing,
}

fn understand(bytes: &[u8], descriptors: Vec<OwnedFd>) -> Result<Heard, String> {
    Ok(Heard::Said(match FromAgent::decode(bytes).map_err(|error| error.to_string())? {
        FromAgent::Hello { version: VERSION, kept } => {
            if kept.len() != descriptors.len() {
                return Err(format!("{} files and {} descriptors", kept.len(), descriptors.len()));
            }
            Said::Connected(kept.into_iter().zip(descriptors).collect())
        }
        FromAgent::Hello { version, .. } => {
            return Ok(Heard::Refused(format!(
                "the agent speaks version {version} of the protocol, and this proxy {VERSION}: install the same version of both"
            )));
        }
        FromAgent::Refused(why) => return Ok(Heard::Refused(format!("the agent refuses this proxy: {why}"))),
        FromAgent::Unknown => return Ok(Heard::Nothing),
        FromAgent::Drain => Said::Drain,
        FromAgent::Needed => Said::Needed,
        FromAgent::PodAdded(pod) => {
            if pod.listeners.len() != descriptors.len() {
                return Err(format!("{} listeners and {} descriptors", pod.listeners.len(), descriptors.len()));
            }
            let listeners = pod.listeners.iter().copied().zip(descriptors.into_iter().map(TcpListener::from)).collect();
            Said::PodAdded(pod, listeners)
        }
        FromAgent::PodRemoved { pod } => Said::PodRemoved(pod),
        FromAgent::FromBefore { pod, connections } => Said::FromBefore(pod, connections),
        FromAgent::Sockets { pod, kind, error } => {
            if !error.is_empty() {
                tracing::warn!(%pod, ?kind, got = descriptors.len(), "the agent makes too few sockets: {error}");
            }
            Said::Sockets(pod, kind, descriptors.into_iter().map(Socket::from).collect())
        }
    }))
}

fn refused(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionRefused, why.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn added(listeners: Vec<Listener>) -> FromAgent {
        FromAgent::PodAdded(PodAdded {
            pod: PodUid::from("uid"),
            name: "web".into(),
            identity: "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap(),
            addresses: vec!["10.0.0.1".parse().unwrap()],
            listeners,
            excluded_ports: Vec::new(),
            probes: mesh::Probes::default(),
            gateways: Vec::new(),
        })
    }

    fn listener() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").unwrap()
    }

    /// Talks to an agent that is a thread: it says `first`, then reads so many messages, and goes.
    async fn talk(state: State, first: Vec<(FromAgent, Vec<OwnedFd>)>, reads: usize) -> Talk {
        let (ours, theirs) = Channel::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let link = watched(ours).unwrap();
        let (said, mut heard) = mpsc::channel(8);
        let (tell, mut outgoing) = mpsc::unbounded_channel();
        tell.send(ToAgent::PodReady { pod: PodUid::from("uid") }).unwrap();
        let (_change, state) = watch::channel(state);
        let pods = Box::new(|| vec![(held(), vec![listener().into()])]);
        for (message, descriptors) in first {
            let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
            // Of a message that is not known all that is left is that there was one: here its number is 31.
            let bytes = if message == FromAgent::Unknown { vec![0xfa, 0x01, 0x00] } else { message.encode() };
            theirs.send(&bytes, &borrowed).unwrap();
        }
        let agent = std::thread::spawn(move || {
            let mut buffer = [0; 1024];
            (0..reads)
                .map(|_| {
                    let (length, descriptors) = theirs.recv(&mut buffer).unwrap();
                    (ToAgent::decode(&buffer[..length]).unwrap(), descriptors.len())
                })
                .collect()
        });
        let end = converse(&link, &said, &mut outgoing, &mut Told { pods, state, started: Duration::ZERO }).await;
        drop(link);
        let mut all = Vec::new();
        while let Ok(said) = heard.try_recv() {
            all.push(said);
        }
        Talk { end, heard: all, told: agent.join().unwrap() }
    }

    struct Talk {
        end: io::Error,
        heard: Vec<Said>,
        told: Vec<(ToAgent, usize)>,
    }

    fn held() -> PodAdded {
        let FromAgent::PodAdded(pod) = added(vec![Listener::InboundV4]) else { unreachable!("a pod") };
        pod
    }

    fn hello() -> (FromAgent, Vec<OwnedFd>) {
        (FromAgent::Hello { version: VERSION, kept: Vec::new() }, Vec::new())
    }

    #[tokio::test]
    async fn the_agent_is_greeted_heard_and_missed() {
        let listener = listener();
        let address = listener.local_addr().unwrap();
        let added = (added(vec![Listener::InboundV4]), vec![listener.into()]);
        let talk = talk(State::default(), vec![hello(), (FromAgent::Unknown, Vec::new()), added], 4).await;
        assert!([io::ErrorKind::UnexpectedEof, io::ErrorKind::BrokenPipe].contains(&talk.end.kind()), "{}", talk.end);
        let ready = ToAgent::PodReady { pod: PodUid::from("uid") };
        let hello = ToAgent::Hello { version: VERSION, started: Duration::ZERO, leaving: false };
        assert_eq!(talk.told, [(hello, 0), (ToAgent::Held(held()), 1), (ToAgent::HeldAll, 0), (ready, 0)]);
        let [Said::Connected(left), Said::PodAdded(pod, listeners)] = &talk.heard[..] else {
            panic!("{:?}", talk.heard)
        };
        assert_eq!((left.len(), pod.name.as_str()), (0, "web"));
        assert_eq!(listeners[0].1.local_addr().unwrap(), address);
    }

    #[tokio::test]
    async fn what_is_to_be_kept_goes_beside_its_name() {
        let file = || Some(Arc::new(linux::sealed::seal("test", b"x").unwrap()));
        let state = State { view: file(), credentials: file(), leaving: false };
        let talk = talk(state, vec![hello()], 5).await;
        assert_eq!(talk.told[3..], [(ToAgent::Keep(Kept::View), 1), (ToAgent::Keep(Kept::Credentials), 1)]);
    }

    #[tokio::test]
    async fn who_drains_says_so_with_its_hello_and_holds_nothing() {
        let talk = talk(State { leaving: true, ..State::default() }, vec![hello()], 2).await;
        let hello = ToAgent::Hello { version: VERSION, started: Duration::ZERO, leaving: true };
        assert_eq!(talk.told, [(hello, 0), (ToAgent::PodReady { pod: PodUid::from("uid") }, 0)]);
    }

    #[tokio::test]
    async fn the_farewell_is_said_once() {
        let (ours, theirs) = Channel::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let link = watched(ours).unwrap();
        let leaving = State { leaving: true, ..State::default() };
        tell(&link, &State::default(), &leaving).await.unwrap();
        tell(&link, &leaving, &leaving).await.unwrap();
        drop(link);
        let mut buffer = [0; 64];
        let (length, _) = theirs.recv(&mut buffer).unwrap();
        assert_eq!(ToAgent::decode(&buffer[..length]).unwrap(), ToAgent::Leaving);
        assert_eq!(theirs.recv(&mut buffer).unwrap().0, 0, "nothing more");
    }

    #[tokio::test]
    async fn an_agent_of_another_version_is_refused_by_name_and_so_are_we() {
        let other = FromAgent::Hello { version: VERSION + 1, kept: Vec::new() };
        for (message, name) in [
            (other, "speaks version 2"),
            (FromAgent::Refused("it speaks version 1".into()), "refuses this proxy: it speaks version 1"),
            (FromAgent::Drain, "is not a hello"),
        ] {
            let talk = talk(State::default(), vec![(message, Vec::new())], 1).await;
            assert!(talk.end.to_string().contains(name) && talk.heard.is_empty(), "{}", talk.end);
        }
    }

    #[test]
    fn a_stranger_at_the_agents_place_is_not_talked_to() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("agent");
        let _door = linux::channel::Listener::bind(&path, 0o600).unwrap();
        let own = linux::privileges::describe().unwrap().uid;
        let call_as = |uid| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async { call(&Place { path: path.clone(), uid }).map(drop) })
        };
        assert_eq!(call_as(own + 1).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert!(call_as(own).is_ok());
    }

    #[test]
    fn listeners_without_descriptors_are_refused() {
        assert!(
            understand(&added(vec![Listener::InboundV4, Listener::InboundV6]).encode(), vec![listener().into()])
                .is_err()
        );
    }
}
