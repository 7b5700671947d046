//! What one agent leaves to the next: its pods with their listeners, and the files that it keeps for the next proxy.
//!
//! It comes from a proxy that outlived its agent, or from the agent that is still there at an upgrade, in the same messages.
//! Who may hand it over is decided by the doors; what a pod's listeners are, and in which network namespace, by the kernel:
//! a listener tells both, whatever is said of it.

use std::io;
use std::net::IpAddr;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use linux::channel::Channel;
use linux::netns::NetNs;
use linux::sockets::namespace_of;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;
use wire::discovery::NodePod;
use wire::pods::{CniRequest, Listener, MAX_MESSAGE, PodAdded, ToAgent, VERSION};

use crate::door::own_uid;
use crate::listeners::Listeners;
use crate::process::Handed;
use crate::proxy::{Said, understand};
use crate::rules::{INBOUND_PORT, OUTBOUND_PORT};
use crate::watched::watched;

/// How long the other agent may take for all of it.
const PATIENCE: Duration = Duration::from_secs(5);

/// A pod that an agent before this one had.
#[derive(Debug)]
pub(crate) struct Inherited {
    /// Who it is, by the word of that agent.
    pub(crate) pod: NodePod,
    /// The namespace of its listeners.
    pub(crate) namespace: NetNs,
    /// Its listeners.
    pub(crate) listeners: Arc<Listeners>,
}

impl Inherited {
    /// Takes it in.
    ///
    /// # Errors
    /// The listeners are not those of one captured pod; in words.
    pub(crate) fn new(added: PodAdded, descriptors: Vec<OwnedFd>) -> Result<Self, String> {
        let [mut out_v4, mut out_v6, mut in_v4, mut in_v6] = [None, None, None, None];
        let mut namespace: Option<NetNs> = None;
        for (kind, descriptor) in added.listeners.iter().zip(descriptors) {
            let listener = TcpListener::from(descriptor);
            let (place, address) = match kind {
                Listener::OutboundV4 => (&mut out_v4, SocketAddr::from(([127, 0, 0, 1], OUTBOUND_PORT))),
                Listener::OutboundV6 => (&mut out_v6, SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], OUTBOUND_PORT))),
                Listener::InboundV4 => (&mut in_v4, SocketAddr::from(([0; 4], INBOUND_PORT))),
                Listener::InboundV6 => (&mut in_v6, SocketAddr::from(([0; 8], INBOUND_PORT))),
            };
            let own = listener.local_addr().map_err(|error| error.to_string())?;
            if own != address {
                return Err(format!("a listener is on {own}, and not on {address}"));
            }
            let of = namespace_of(&listener).map_err(|error| error.to_string())?;
            if namespace.as_ref().is_some_and(|other| *other != of) {
                return Err("its listeners are in several network namespaces".into());
            }
            namespace = Some(of);
            *place = Some(listener);
        }
        let (Some(out_v4), Some(in_v4), Some(namespace)) = (out_v4, in_v4, namespace) else {
            return Err("it has no listeners for IPv4".into());
        };
        if out_v6.is_some() != in_v6.is_some() {
            return Err("it has one listener for IPv6, and not two".into());
        }
        let pod = NodePod {
            pod: added.pod,
            // A service account's namespace is that of its pods.
            namespace: added.identity.namespace().to_owned(),
            name: added.name,
            identity: added.identity,
            addresses: added.addresses,
            capture: Ok(()),
            release: false,
            excluded_ports: added.excluded_ports,
            probes: added.probes,
        };
        Ok(Self { pod, namespace, listeners: Arc::new(Listeners { out_v4, out_v6, in_v4, in_v6 }) })
    }
}

/// What a proxy, or the next agent, is told of a pod: with duplicates of its listeners.
///
/// # Errors
/// There is no descriptor left.
pub(crate) fn added(pod: &NodePod, listeners: &Listeners, gateways: &[IpAddr]) -> io::Result<(PodAdded, Vec<OwnedFd>)> {
    let all = [
        (Listener::OutboundV4, Some(&listeners.out_v4)),
        (Listener::OutboundV6, listeners.out_v6.as_ref()),
        (Listener::InboundV4, Some(&listeners.in_v4)),
        (Listener::InboundV6, listeners.in_v6.as_ref()),
    ];
    let there = all.into_iter().filter_map(|(kind, listener)| Some((kind, listener?)));
    let all: io::Result<Vec<_>> =
        there.map(|(kind, listener)| Ok((kind, listener.as_fd().try_clone_to_owned()?))).collect();
    let (listeners, descriptors) = all?.into_iter().unzip();
    Ok((told(pod, listeners, gateways), descriptors))
}

/// The same without descriptors, for a pod that is served already.
pub(crate) fn told(pod: &NodePod, listeners: Vec<Listener>, gateways: &[IpAddr]) -> PodAdded {
    PodAdded {
        pod: pod.pod.clone(),
        name: pod.name.clone(),
        identity: pod.identity.clone(),
        addresses: pod.addresses.clone(),
        listeners,
        excluded_ports: pod.excluded_ports.clone(),
        probes: pod.probes.clone(),
        gateways: gateways.to_vec(),
    }
}

/// What was handed over, for the agent itself, should it have to take its place back.
///
/// # Errors
/// A message is not understood.
pub(crate) fn kept(handed: Vec<Handed>) -> io::Result<Vec<Said>> {
    let said = handed.into_iter().map(|(message, descriptors)| {
        understand(ToAgent::decode(&message).map_err(io::Error::other)?, descriptors).map_err(io::Error::other)
    });
    said.filter_map(Result::transpose).collect()
}

/// An agent whose place this one takes.
pub(crate) struct Predecessor(AsyncFd<Channel>);

impl Predecessor {
    /// Asks the agent that listens at `path`, if there is one, for all that it has. It goes on until it hears
    /// [`Predecessor::taken`].
    pub(crate) async fn ask(path: &Path) -> Option<(Self, Vec<Said>)> {
        let channel = Channel::connect(path).ok()?;
        let asked = timeout(PATIENCE, ask(channel)).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        asked.inspect_err(|error| tracing::warn!(%error, "another agent listens, and hands nothing over")).ok()
    }

    /// Whether it is there still, standing by: it says nothing more, and its end of the connection is open.
    pub(crate) fn stands_by(&self) -> bool {
        let heard = self.0.get_ref().recv(&mut [0; 1]);
        heard.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }

    /// All of it is taken, and whoever asks finds this agent: the other one may go.
    pub(crate) fn taken(&self) {
        let message = CniRequest::Taken.encode();
        if let Err(error) = self.0.get_ref().send(&message, &[]) {
            tracing::warn!(%error, "the agent before this one was gone before it was told to go");
        }
    }
}

async fn ask(channel: Channel) -> io::Result<(Predecessor, Vec<Said>)> {
    let uid = channel.peer_credentials()?.uid;
    if ![0, own_uid()?].contains(&uid) {
        return Err(io::Error::other(format!("it is of user {uid}")));
    }
    channel.set_nonblocking(true)?;
    let channel = watched(channel)?;
    channel.get_ref().send(&CniRequest::HandOver { version: VERSION }.encode(), &[])?;
    let (mut all, mut buffer) = (Vec::new(), vec![0; MAX_MESSAGE]);
    loop {
        let (length, descriptors) = channel.async_io(Interest::READABLE, |channel| channel.recv(&mut buffer)).await?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let message = ToAgent::decode(&buffer[..length]).map_err(io::Error::other)?;
        match understand(message, descriptors).map_err(io::Error::other)? {
            Some(Said::HeldAll) => return Ok((Predecessor(channel), all)),
            Some(said @ (Said::Held(..) | Said::Keep(..))) => all.push(said),
            // Nothing else belongs here.
            _ => {}
        }
    }
}
