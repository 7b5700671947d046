//! The link to the node's agent, which alone can make sockets in a pod's network namespace.
//!
//! Both directions move by themselves: an agent that is slow to read must not keep us from reading what it says. When it
//! goes, what we have goes on serving, and we call again until there is an agent once more.

use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use linux::channel::{Channel, LARGEST_MESSAGE};
use mesh::PodUid;
use socket2::Socket;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use wire::pods::{FromAgent, Listener, PodAdded, SocketKind, ToAgent, VERSION};

use crate::watched::watched;

/// The pause between two calls to an agent that is not there.
const CALL_AGAIN: Duration = Duration::from_millis(200);

/// What the agent said, with the sockets that came beside it.
#[derive(Debug)]
pub(crate) enum Said {
    /// The link is up: the agent will say which pods there are.
    Connected,
    /// The agent went away.
    Gone,
    /// Serve this pod.
    PodAdded(PodAdded, Vec<(Listener, TcpListener)>),
    /// Stop serving it.
    PodRemoved(PodUid),
    /// Sockets that were asked for.
    Sockets(PodUid, SocketKind, Vec<Socket>),
}

/// Keeps the link for ever: passes on what the agent says, and to it what is in `outgoing`.
pub(crate) async fn keep(path: PathBuf, said: mpsc::Sender<Said>, mut outgoing: mpsc::UnboundedReceiver<ToAgent>) {
    let mut complained = false;
    while !said.is_closed() {
        match call(&path) {
            Ok(link) => {
                complained = false;
                // What was meant for the last agent means nothing to this one.
                while outgoing.try_recv().is_ok() {}
                let end = converse(&link, &said, &mut outgoing).await;
                tracing::warn!("the agent is gone: {end}");
                if said.send(Said::Gone).await.is_err() {
                    return;
                }
            }
            Err(error) if !complained => {
                complained = true;
                tracing::warn!(path = %path.display(), %error, "no agent to talk to; trying again");
            }
            Err(_) => {}
        }
        tokio::time::sleep(CALL_AGAIN).await;
    }
}

fn call(path: &std::path::Path) -> io::Result<AsyncFd<Channel>> {
    let channel = Channel::connect(path)?;
    channel.set_nonblocking(true)?;
    watched(channel)
}

/// Talks until the link breaks, and says why it did.
async fn converse(
    link: &AsyncFd<Channel>,
    said: &mpsc::Sender<Said>,
    outgoing: &mut mpsc::UnboundedReceiver<ToAgent>,
) -> io::Error {
    let speak = async {
        send(link, &ToAgent::Hello { version: VERSION }).await?;
        while let Some(message) = outgoing.recv().await {
            send(link, &message).await?;
        }
        Ok::<(), io::Error>(())
    };
    let listen = async {
        said.send(Said::Connected).await.map_err(|_| io::ErrorKind::BrokenPipe)?;
        let mut buffer = vec![0; LARGEST_MESSAGE];
        loop {
            let (length, descriptors) = link.async_io(Interest::READABLE, |channel| channel.recv(&mut buffer)).await?;
            if length == 0 {
                return Err::<(), io::Error>(io::ErrorKind::UnexpectedEof.into());
            }
            match understand(&buffer[..length], descriptors) {
                Ok(message) => said.send(message).await.map_err(|_| io::ErrorKind::BrokenPipe)?,
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

async fn send(link: &AsyncFd<Channel>, message: &ToAgent) -> io::Result<()> {
    let bytes = message.encode();
    link.async_io(Interest::WRITABLE, |channel| channel.send(&bytes, &[])).await
}

fn understand(bytes: &[u8], descriptors: Vec<OwnedFd>) -> Result<Said, String> {
    match FromAgent::decode(bytes).map_err(|error| error.to_string())? {
        FromAgent::PodAdded(pod) => {
            if pod.listeners.len() != descriptors.len() {
                return Err(format!("{} listeners and {} descriptors", pod.listeners.len(), descriptors.len()));
            }
            let listeners = pod.listeners.iter().copied().zip(descriptors.into_iter().map(TcpListener::from)).collect();
            Ok(Said::PodAdded(pod, listeners))
        }
        FromAgent::PodRemoved { pod } => Ok(Said::PodRemoved(pod)),
        FromAgent::Sockets { pod, kind, error } => {
            if !error.is_empty() {
                tracing::warn!(%pod, ?kind, got = descriptors.len(), "the agent makes too few sockets: {error}");
            }
            Ok(Said::Sockets(pod, kind, descriptors.into_iter().map(Socket::from).collect()))
        }
    }
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
        })
    }

    fn listener() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").unwrap()
    }

    #[tokio::test]
    async fn the_agent_is_greeted_heard_and_missed() {
        let (ours, theirs) = Channel::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let link = watched(ours).unwrap();
        let (said, mut heard) = mpsc::channel(8);
        let (tell, mut outgoing) = mpsc::unbounded_channel();
        tell.send(ToAgent::PodReady { pod: PodUid::from("uid") }).unwrap();
        let listener = listener();
        theirs.send(&added(vec![Listener::InboundV4]).encode(), &[listener.as_fd()]).unwrap();
        theirs.send(b"\xff", &[]).unwrap();

        let agent = std::thread::spawn(move || {
            let mut buffer = [0; 1024];
            let mut messages = Vec::new();
            for _ in 0..2 {
                let (length, _) = theirs.recv(&mut buffer).unwrap();
                messages.push(ToAgent::decode(&buffer[..length]).unwrap());
            }
            messages
        });
        let end = converse(&link, &said, &mut outgoing).await;
        assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof, "the agent's end of the link is closed");
        let expected = [ToAgent::Hello { version: VERSION }, ToAgent::PodReady { pod: PodUid::from("uid") }];
        assert_eq!(agent.join().unwrap(), expected);
        assert!(matches!(heard.try_recv(), Ok(Said::Connected)));
        let Ok(Said::PodAdded(pod, listeners)) = heard.try_recv() else { panic!("the pod") };
        assert_eq!(pod.name, "web");
        assert_eq!(listeners[0].1.local_addr().unwrap(), listener.local_addr().unwrap());
        assert!(heard.try_recv().is_err(), "what does not parse affects only itself");
    }

    #[test]
    fn listeners_without_descriptors_are_refused() {
        assert!(
            understand(&added(vec![Listener::InboundV4, Listener::InboundV6]).encode(), vec![listener().into()])
                .is_err()
        );
    }
}
