//! Between the processes of one node: the container runtime, the agent and the proxy.
//!
//! One message per packet of a SEQPACKET Unix socket; descriptors travel beside it. The senders are processes of the
//! same product on the same node, and still each message is bounded and checked: a mistake of one must not become a
//! wrong namespace in the other.

mod cni;

#[cfg(test)]
mod tests;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use identity::SpiffeId;
use mesh::{PodUid, Probes};
use prost::Message;

use crate::proto::v1;

pub use cni::{CniAdd, CniRequest, CniResult};

/// The longest message, in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// The most sockets that one request may ask for: with the descriptors of a message bounded to 253 by the kernel.
pub const MAX_SOCKETS: u32 = 64;
/// The version of what agent and proxy say to each other, which each names first. Who speaks another one is refused. A
/// message or field that one of the two does not know is no other version: it is passed over.
pub const VERSION: u32 = 1;
/// The most connections that one message names.
pub const MAX_CONNECTIONS: usize = 512;
/// The most pods of a node, as the control plane has it.
pub const MAX_PODS: usize = 4096;

/// A message that its receiver cannot accept. It names what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadMessage {
    /// Longer than [`MAX_MESSAGE`].
    #[error("a message of {0} bytes is longer than {MAX_MESSAGE}")]
    TooLong(usize),
    /// Not of the message's form.
    #[error("a message does not parse: {0}")]
    Undecodable(String),
    /// Of the right form, with a value that cannot be.
    #[error("{0} is missing or not understood")]
    Field(&'static str),
}

/// A listener in a pod's namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Listener {
    /// For what the pod's programs send, IPv4.
    OutboundV4,
    /// The same for IPv6.
    OutboundV6,
    /// For what is sent to the pod, IPv4.
    InboundV4,
    /// The same for IPv6.
    InboundV6,
}

/// A fresh client socket in a pod's namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SocketKind {
    /// To the wire, IPv4: marked as the proxy's own.
    OuterV4,
    /// The same for IPv6.
    OuterV6,
    /// To the application, IPv4: transparent, so that it can bear the client's address.
    InnerV4,
    /// The same for IPv6.
    InnerV6,
}

impl SocketKind {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::OuterV4, Self::OuterV6, Self::InnerV4, Self::InnerV6];

    /// The name in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::OuterV4 => "outer-v4",
            Self::OuterV6 => "outer-v6",
            Self::InnerV4 => "inner-v4",
            Self::InnerV6 => "inner-v6",
        }
    }
}

/// A pod that the proxy is to serve. The descriptors beside the message are its listeners, in the order of `listeners`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodAdded {
    /// metadata.uid.
    pub pod: PodUid,
    /// metadata.name.
    pub name: String,
    /// The identity that the proxy must hold a certificate for.
    pub identity: SpiffeId,
    /// status.podIPs: the only source addresses and destinations that belong to it.
    pub addresses: Vec<IpAddr>,
    /// What the descriptors are. None for a pod that is served: what changed is elsewhere in the message.
    pub listeners: Vec<Listener>,
    /// Ports that are never captured: for the next agent.
    pub excluded_ports: Vec<u16>,
    /// What the kubelet and the API server may ask of it where plaintext is refused.
    pub probes: Probes,
    /// The gateways of its default routes: how its node may show itself to it.
    pub gateways: Vec<IpAddr>,
}

/// A connection by its two ends, seen from the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ends {
    /// The pod's.
    pub own: SocketAddr,
    /// The other one.
    pub peer: SocketAddr,
}

/// What the agent keeps for the next proxy: a sealed memory file that it never reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kept {
    /// The view of the mesh.
    View,
    /// SVIDs with their keys.
    Credentials,
}

/// The agent speaks to the proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromAgent {
    /// First. The descriptors beside it are what the last proxy left.
    Hello {
        /// [`VERSION`].
        version: u32,
        /// What the descriptors are.
        kept: Vec<Kept>,
    },
    /// The link ends, for this reason.
    Refused(String),
    /// Another proxy serves all pods from now on: accept no more, and end when the connections have.
    Drain,
    /// Nobody serves, and nobody who would is in sight: the receiver drains, and is to end so that it is started again.
    Needed,
    /// Serve this pod.
    PodAdded(PodAdded),
    /// Stop serving it: its namespace must not be kept alive.
    PodRemoved {
        /// Which.
        pod: PodUid,
    },
    /// The descriptors beside this are sockets of that kind. Fewer than asked for: `error` says why.
    Sockets {
        /// Whose namespace they are in.
        pod: PodUid,
        /// Of which kind.
        kind: SocketKind,
        /// Why there are fewer than asked for; empty where there are not.
        error: String,
    },
    /// What was opened to a pod before its capture and is open still (T11), at most [`MAX_CONNECTIONS`] of it: in place of what
    /// was named before.
    FromBefore {
        /// Whose.
        pod: PodUid,
        /// Which.
        connections: Vec<Ends>,
    },
    /// Something that only a newer version knows.
    Unknown,
}

/// The proxy speaks to the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToAgent {
    /// First.
    Hello {
        /// [`VERSION`].
        version: u32,
        /// When it started, since the machine did: which of two proxies is the newer one.
        started: Duration,
        /// It accepts no more, and ends when its connections have.
        leaving: bool,
    },
    /// The pod's listeners are accepted on and its certificate is held: its rules may be loaded.
    PodReady {
        /// Which.
        pod: PodUid,
    },
    /// More client sockets, please.
    WantSockets {
        /// In whose namespace.
        pod: PodUid,
        /// Of which kind.
        kind: SocketKind,
        /// How many, 1 to [`MAX_SOCKETS`].
        count: u32,
    },
    /// A pod that the sender serves. The descriptors beside the message are its listeners.
    Held(PodAdded),
    /// That were all of them.
    HeldAll,
    /// The descriptor beside this is to be kept for the next proxy.
    Keep(Kept),
    /// The sender accepts no more, and ends when its connections have.
    Leaving,
    /// Of what the agent has named as open from before a capture this is refused, and to be ended.
    End {
        /// Whose.
        pod: PodUid,
        /// Which, at most [`MAX_CONNECTIONS`].
        connections: Vec<Ends>,
    },
    /// Something that only a newer version knows.
    Unknown,
}

impl FromAgent {
    /// The message as bytes.
    pub fn encode(&self) -> Vec<u8> {
        use v1::to_proxy::Message as M;
        let message = match self {
            Self::Hello { version, kept } => {
                let kept = kept.iter().map(|kept| v1::Kept::from(*kept).into()).collect();
                M::Hello(v1::AgentHello { version: *version, kept })
            }
            Self::Refused(why) => M::Refused(why.clone()),
            Self::Drain => M::Drain(()),
            Self::Needed => M::Needed(()),
            Self::PodAdded(pod) => M::PodAdded(pod.to_proto()),
            Self::PodRemoved { pod } => M::PodRemoved(v1::PodRemoved { pod_uid: pod.to_string() }),
            Self::Sockets { pod, kind, error } => M::Sockets(v1::Sockets {
                pod_uid: pod.to_string(),
                kind: v1::SocketKind::from(*kind).into(),
                error: error.clone(),
            }),
            Self::FromBefore { pod, connections } => M::FromBefore(connections_to_proto(pod, connections)),
            Self::Unknown => return v1::ToProxy { message: None }.encode_to_vec(),
        };
        v1::ToProxy { message: Some(message) }.encode_to_vec()
    }

    /// The message in bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadMessage> {
        use v1::to_proxy::Message as M;
        let Some(message) = decode::<v1::ToProxy>(bytes)?.message else { return Ok(Self::Unknown) };
        match message {
            M::Hello(hello) => {
                let kept = hello.kept.iter().map(|number| kept(*number)).collect::<Result<_, _>>()?;
                Ok(Self::Hello { version: hello.version, kept })
            }
            M::Refused(why) => Ok(Self::Refused(why)),
            M::Drain(()) => Ok(Self::Drain),
            M::Needed(()) => Ok(Self::Needed),
            M::PodAdded(pod) => Ok(Self::PodAdded(PodAdded::from_proto(pod)?)),
            M::PodRemoved(removed) => Ok(Self::PodRemoved { pod: pod_uid(&removed.pod_uid)? }),
            M::Sockets(sockets) => Ok(Self::Sockets {
                pod: pod_uid(&sockets.pod_uid)?,
                kind: socket_kind(sockets.kind)?,
                error: sockets.error,
            }),
            M::FromBefore(it) => {
                connections_from_proto(&it).map(|(pod, connections)| Self::FromBefore { pod, connections })
            }
        }
    }
}

impl ToAgent {
    /// The message as bytes.
    pub fn encode(&self) -> Vec<u8> {
        use v1::to_agent::Message as M;
        let message = match self {
            Self::Hello { version, started, leaving } => M::Hello(v1::ProxyHello {
                version: *version,
                started_milliseconds: u64::try_from(started.as_millis()).unwrap_or(u64::MAX),
                leaving: *leaving,
            }),
            Self::PodReady { pod } => M::PodReady(v1::PodReady { pod_uid: pod.to_string() }),
            Self::WantSockets { pod, kind, count } => M::WantSockets(v1::WantSockets {
                pod_uid: pod.to_string(),
                kind: v1::SocketKind::from(*kind).into(),
                count: *count,
            }),
            Self::Held(pod) => M::Held(pod.to_proto()),
            Self::HeldAll => M::HeldAll(()),
            Self::Keep(kept) => M::Keep(v1::Keep { what: v1::Kept::from(*kept).into() }),
            Self::Leaving => M::Leaving(()),
            Self::End { pod, connections } => M::End(connections_to_proto(pod, connections)),
            Self::Unknown => return v1::ToAgent { message: None }.encode_to_vec(),
        };
        v1::ToAgent { message: Some(message) }.encode_to_vec()
    }

    /// The message in bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadMessage> {
        use v1::to_agent::Message as M;
        let Some(message) = decode::<v1::ToAgent>(bytes)?.message else { return Ok(Self::Unknown) };
        match message {
            M::Hello(hello) => Ok(Self::Hello {
                version: hello.version,
                started: Duration::from_millis(hello.started_milliseconds),
                leaving: hello.leaving,
            }),
            M::PodReady(ready) => Ok(Self::PodReady { pod: pod_uid(&ready.pod_uid)? }),
            M::WantSockets(want) if (1..=MAX_SOCKETS).contains(&want.count) => {
                Ok(Self::WantSockets { pod: pod_uid(&want.pod_uid)?, kind: socket_kind(want.kind)?, count: want.count })
            }
            M::WantSockets(_) => Err(BadMessage::Field("count")),
            M::Held(pod) => Ok(Self::Held(PodAdded::from_proto(pod)?)),
            M::HeldAll(()) => Ok(Self::HeldAll),
            M::Keep(keep) => Ok(Self::Keep(kept(keep.what)?)),
            M::Leaving(()) => Ok(Self::Leaving),
            M::End(it) => connections_from_proto(&it).map(|(pod, connections)| Self::End { pod, connections }),
        }
    }
}

impl PodAdded {
    fn to_proto(&self) -> v1::PodAdded {
        v1::PodAdded {
            pod_uid: self.pod.to_string(),
            name: self.name.clone(),
            identity: self.identity.to_string(),
            addresses: self.addresses.iter().map(IpAddr::to_string).collect(),
            listeners: self.listeners.iter().map(|listener| v1::Listener::from(*listener).into()).collect(),
            excluded_ports: self.excluded_ports.iter().copied().map(u32::from).collect(),
            probes: crate::probe::encode(&self.probes),
            api_server_calls: crate::probe::encode_calls(&self.probes),
            gateways: self.gateways.iter().map(IpAddr::to_string).collect(),
        }
    }

    fn from_proto(pod: v1::PodAdded) -> Result<Self, BadMessage> {
        let gateways = pod.gateways.iter().map(|a| a.parse()).collect::<Result<_, _>>();
        let ports = pod.excluded_ports.iter().map(|port| u16::try_from(*port)).collect::<Result<_, _>>();
        Ok(Self {
            pod: pod_uid(&pod.pod_uid)?,
            name: text(pod.name, "name")?,
            identity: pod.identity.parse().map_err(|_| BadMessage::Field("identity"))?,
            addresses: addresses(&pod.addresses)?,
            listeners: pod.listeners.iter().map(|number| listener(*number)).collect::<Result<_, _>>()?,
            excluded_ports: ports.map_err(|_| BadMessage::Field("excluded_ports"))?,
            probes: crate::probe::decode(&pod.probes, &pod.api_server_calls).ok_or(BadMessage::Field("probes"))?,
            gateways: gateways.map_err(|_| BadMessage::Field("gateways"))?,
        })
    }
}

fn connections_to_proto(pod: &PodUid, connections: &[Ends]) -> v1::Connections {
    let ends = |ends: &Ends| v1::Ends { own: ends.own.to_string(), peer: ends.peer.to_string() };
    v1::Connections { pod_uid: pod.to_string(), connections: connections.iter().map(ends).collect() }
}

fn connections_from_proto(message: &v1::Connections) -> Result<(PodUid, Vec<Ends>), BadMessage> {
    const BAD: BadMessage = BadMessage::Field("connections");
    if message.connections.len() > MAX_CONNECTIONS {
        return Err(BAD);
    }
    let end = |text: &str| text.parse().map_err(|_| BAD);
    let ends = |ends: &v1::Ends| Ok(Ends { own: end(&ends.own)?, peer: end(&ends.peer)? });
    Ok((pod_uid(&message.pod_uid)?, message.connections.iter().map(ends).collect::<Result<_, _>>()?))
}

fn decode<M: Message + Default>(bytes: &[u8]) -> Result<M, BadMessage> {
    if bytes.len() > MAX_MESSAGE {
        return Err(BadMessage::TooLong(bytes.len()));
    }
    M::decode(bytes).map_err(|error| BadMessage::Undecodable(error.to_string()))
}

/// More addresses than any pod has mean that somebody talks nonsense.
const MOST_ADDRESSES: usize = 64;

fn addresses(texts: &[String]) -> Result<Vec<IpAddr>, BadMessage> {
    let parsed = texts.iter().map(|text| text.parse().map_err(|_| BadMessage::Field("addresses")));
    match texts.len() <= MOST_ADDRESSES {
        true => parsed.collect(),
        false => Err(BadMessage::Field("addresses")),
    }
}

fn pod_uid(text: &str) -> Result<PodUid, BadMessage> {
    if text.is_empty() { Err(BadMessage::Field("pod_uid")) } else { Ok(PodUid::from(text)) }
}

fn text(value: String, name: &'static str) -> Result<String, BadMessage> {
    if value.is_empty() { Err(BadMessage::Field(name)) } else { Ok(value) }
}

fn listener(number: i32) -> Result<Listener, BadMessage> {
    match v1::Listener::try_from(number) {
        Ok(v1::Listener::OutboundV4) => Ok(Listener::OutboundV4),
        Ok(v1::Listener::OutboundV6) => Ok(Listener::OutboundV6),
        Ok(v1::Listener::InboundV4) => Ok(Listener::InboundV4),
        Ok(v1::Listener::InboundV6) => Ok(Listener::InboundV6),
        Ok(v1::Listener::Unspecified) | Err(_) => Err(BadMessage::Field("listeners")),
    }
}

fn socket_kind(number: i32) -> Result<SocketKind, BadMessage> {
    match v1::SocketKind::try_from(number) {
        Ok(v1::SocketKind::OuterV4) => Ok(SocketKind::OuterV4),
        Ok(v1::SocketKind::OuterV6) => Ok(SocketKind::OuterV6),
        Ok(v1::SocketKind::InnerV4) => Ok(SocketKind::InnerV4),
        Ok(v1::SocketKind::InnerV6) => Ok(SocketKind::InnerV6),
        Ok(v1::SocketKind::Unspecified) | Err(_) => Err(BadMessage::Field("kind")),
    }
}

fn kept(number: i32) -> Result<Kept, BadMessage> {
    match v1::Kept::try_from(number) {
        Ok(v1::Kept::View) => Ok(Kept::View),
        Ok(v1::Kept::Credentials) => Ok(Kept::Credentials),
        Ok(v1::Kept::Unspecified) | Err(_) => Err(BadMessage::Field("kept")),
    }
}

impl From<Kept> for v1::Kept {
    fn from(kept: Kept) -> Self {
        match kept {
            Kept::View => Self::View,
            Kept::Credentials => Self::Credentials,
        }
    }
}

impl From<Listener> for v1::Listener {
    fn from(listener: Listener) -> Self {
        match listener {
            Listener::OutboundV4 => Self::OutboundV4,
            Listener::OutboundV6 => Self::OutboundV6,
            Listener::InboundV4 => Self::InboundV4,
            Listener::InboundV6 => Self::InboundV6,
        }
    }
}

impl From<SocketKind> for v1::SocketKind {
    fn from(kind: SocketKind) -> Self {
        match kind {
            SocketKind::OuterV4 => Self::OuterV4,
            SocketKind::OuterV6 => Self::OuterV6,
            SocketKind::InnerV4 => Self::InnerV4,
            SocketKind::InnerV6 => Self::InnerV6,
        }
    }
}
