//! Between the processes of one node: the container runtime, the agent and the proxy.
//!
//! One message per packet of a SEQPACKET Unix socket; descriptors travel beside it. The senders are processes of the
//! same product on the same node, and still each message is bounded and checked: a mistake of one must not become a
//! wrong namespace in the other.

use std::net::IpAddr;
use std::path::PathBuf;

use identity::SpiffeId;
use mesh::PodUid;
use prost::Message;

use crate::proto::v1;

/// The longest message, in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// The most sockets that one request may ask for: with the descriptors of a message bounded to 253 by the kernel.
pub const MAX_SOCKETS: u32 = 64;
/// The version that [`ToAgent::Hello`] carries.
pub const VERSION: u32 = 1;

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

/// The container runtime asks the agent, on the CNI socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CniRequest {
    /// A pod's network namespace is set up; its programs wait for the answer.
    Add(CniAdd),
    /// A pod is gone.
    Del {
        /// Which.
        pod: PodUid,
    },
}

/// A pod whose programs are about to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CniAdd {
    /// metadata.uid.
    pub pod: PodUid,
    /// metadata.namespace.
    pub namespace: String,
    /// metadata.name.
    pub name: String,
    /// Path of the network namespace, as `CNI_NETNS`.
    pub netns: PathBuf,
}

/// The agent answers the container runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CniResult {
    /// The pod is captured, and verified to be.
    Captured,
    /// The pod is not to be captured; why.
    NotCaptured(String),
    /// Forgotten, or never known: deletions always succeed.
    Deleted,
    /// The sandbox must fail, so that the runtime tries again; one sentence for its event.
    Failed(String),
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
    /// What the descriptors are.
    pub listeners: Vec<Listener>,
}

/// The agent speaks to the proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromAgent {
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
}

/// The proxy speaks to the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToAgent {
    /// First.
    Hello {
        /// [`VERSION`].
        version: u32,
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
}

impl CniRequest {
    /// The message as bytes.
    pub fn encode(&self) -> Vec<u8> {
        use v1::cni_request::Request;
        let request = match self {
            Self::Add(add) => Request::Add(v1::CniAdd {
                pod_uid: add.pod.to_string(),
                namespace: add.namespace.clone(),
                name: add.name.clone(),
                netns: add.netns.to_string_lossy().into_owned(),
            }),
            Self::Del { pod } => Request::Del(v1::CniDel { pod_uid: pod.to_string() }),
        };
        v1::CniRequest { request: Some(request) }.encode_to_vec()
    }

    /// The message in bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadMessage> {
        use v1::cni_request::Request;
        match decode::<v1::CniRequest>(bytes)?.request.ok_or(BadMessage::Field("request"))? {
            Request::Add(add) => Ok(Self::Add(CniAdd {
                pod: pod_uid(&add.pod_uid)?,
                namespace: text(add.namespace, "namespace")?,
                name: text(add.name, "name")?,
                netns: text(add.netns, "netns")?.into(),
            })),
            Request::Del(del) => Ok(Self::Del { pod: pod_uid(&del.pod_uid)? }),
        }
    }
}

impl CniResult {
    /// The message as bytes.
    pub fn encode(&self) -> Vec<u8> {
        use v1::cni_result::Result as Answer;
        let answer = match self {
            Self::Captured => Answer::Captured(()),
            Self::NotCaptured(why) => Answer::NotCaptured(why.clone()),
            Self::Deleted => Answer::Deleted(()),
            Self::Failed(why) => Answer::Failed(why.clone()),
        };
        v1::CniResult { result: Some(answer) }.encode_to_vec()
    }

    /// The message in bytes. An answer that is not understood is an error, never a success.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadMessage> {
        use v1::cni_result::Result as Answer;
        Ok(match decode::<v1::CniResult>(bytes)?.result.ok_or(BadMessage::Field("result"))? {
            Answer::Captured(()) => Self::Captured,
            Answer::NotCaptured(why) => Self::NotCaptured(why),
            Answer::Deleted(()) => Self::Deleted,
            Answer::Failed(why) => Self::Failed(why),
        })
    }
}

impl FromAgent {
    /// The message as bytes.
    pub fn encode(&self) -> Vec<u8> {
        use v1::to_proxy::Message as M;
        let message = match self {
            Self::PodAdded(pod) => M::PodAdded(v1::PodAdded {
                pod_uid: pod.pod.to_string(),
                name: pod.name.clone(),
                identity: pod.identity.to_string(),
                addresses: pod.addresses.iter().map(IpAddr::to_string).collect(),
                listeners: pod.listeners.iter().map(|listener| v1::Listener::from(*listener).into()).collect(),
            }),
            Self::PodRemoved { pod } => M::PodRemoved(v1::PodRemoved { pod_uid: pod.to_string() }),
            Self::Sockets { pod, kind, error } => M::Sockets(v1::Sockets {
                pod_uid: pod.to_string(),
                kind: v1::SocketKind::from(*kind).into(),
                error: error.clone(),
            }),
        };
        v1::ToProxy { message: Some(message) }.encode_to_vec()
    }

    /// The message in bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadMessage> {
        use v1::to_proxy::Message as M;
        match decode::<v1::ToProxy>(bytes)?.message.ok_or(BadMessage::Field("message"))? {
            M::PodAdded(pod) => {
                let addresses = pod.addresses.iter().map(|a| a.parse()).collect::<Result<_, _>>();
                let listeners = pod.listeners.iter().map(|number| listener(*number)).collect::<Result<_, _>>()?;
                Ok(Self::PodAdded(PodAdded {
                    pod: pod_uid(&pod.pod_uid)?,
                    name: text(pod.name, "name")?,
                    identity: pod.identity.parse().map_err(|_| BadMessage::Field("identity"))?,
                    addresses: addresses.map_err(|_| BadMessage::Field("addresses"))?,
                    listeners,
                }))
            }
            M::PodRemoved(removed) => Ok(Self::PodRemoved { pod: pod_uid(&removed.pod_uid)? }),
            M::Sockets(sockets) => Ok(Self::Sockets {
                pod: pod_uid(&sockets.pod_uid)?,
                kind: socket_kind(sockets.kind)?,
                error: sockets.error,
            }),
        }
    }
}

impl ToAgent {
    /// The message as bytes.
    pub fn encode(&self) -> Vec<u8> {
        use v1::to_agent::Message as M;
        let message = match self {
            Self::Hello { version } => M::Hello(v1::ProxyHello { version: *version }),
            Self::PodReady { pod } => M::PodReady(v1::PodReady { pod_uid: pod.to_string() }),
            Self::WantSockets { pod, kind, count } => M::WantSockets(v1::WantSockets {
                pod_uid: pod.to_string(),
                kind: v1::SocketKind::from(*kind).into(),
                count: *count,
            }),
        };
        v1::ToAgent { message: Some(message) }.encode_to_vec()
    }

    /// The message in bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadMessage> {
        use v1::to_agent::Message as M;
        match decode::<v1::ToAgent>(bytes)?.message.ok_or(BadMessage::Field("message"))? {
            M::Hello(hello) => Ok(Self::Hello { version: hello.version }),
            M::PodReady(ready) => Ok(Self::PodReady { pod: pod_uid(&ready.pod_uid)? }),
            M::WantSockets(want) if (1..=MAX_SOCKETS).contains(&want.count) => {
                Ok(Self::WantSockets { pod: pod_uid(&want.pod_uid)?, kind: socket_kind(want.kind)?, count: want.count })
            }
            M::WantSockets(_) => Err(BadMessage::Field("count")),
        }
    }
}

fn decode<M: Message + Default>(bytes: &[u8]) -> Result<M, BadMessage> {
    if bytes.len() > MAX_MESSAGE {
        return Err(BadMessage::TooLong(bytes.len()));
    }
    M::decode(bytes).map_err(|error| BadMessage::Undecodable(error.to_string()))
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id() -> SpiffeId {
        "spiffe://cluster.local/ns/shop/sa/web".parse().expect("a SPIFFE ID")
    }

    #[test]
    fn every_message_survives_the_wire() {
        let pod = PodUid::from("0d2b");
        let requests = [
            CniRequest::Add(CniAdd {
                pod: pod.clone(),
                namespace: "shop".into(),
                name: "web".into(),
                netns: "/run/netns/web".into(),
            }),
            CniRequest::Del { pod: pod.clone() },
        ];
        for request in requests {
            assert_eq!(CniRequest::decode(&request.encode()), Ok(request));
        }
        let answers = [
            CniResult::Captured,
            CniResult::NotCaptured("opted-out".into()),
            CniResult::Deleted,
            CniResult::Failed("no".into()),
        ];
        for answer in answers {
            assert_eq!(CniResult::decode(&answer.encode()), Ok(answer));
        }
        let added = PodAdded {
            pod: pod.clone(),
            name: "web".into(),
            identity: id(),
            addresses: vec!["10.0.0.1".parse().expect("v4"), "fd00::1".parse().expect("v6")],
            listeners: vec![Listener::OutboundV4, Listener::OutboundV6, Listener::InboundV4, Listener::InboundV6],
        };
        let mut down = vec![FromAgent::PodAdded(added), FromAgent::PodRemoved { pod: pod.clone() }];
        let mut up = vec![ToAgent::Hello { version: VERSION }, ToAgent::PodReady { pod: pod.clone() }];
        for kind in SocketKind::ALL {
            down.push(FromAgent::Sockets { pod: pod.clone(), kind, error: String::new() });
            up.push(ToAgent::WantSockets { pod: pod.clone(), kind, count: MAX_SOCKETS });
        }
        for message in down {
            assert_eq!(FromAgent::decode(&message.encode()), Ok(message));
        }
        for message in up {
            assert_eq!(ToAgent::decode(&message.encode()), Ok(message));
        }
    }

    #[test]
    fn a_count_out_of_bounds_and_an_empty_answer_are_refused() {
        for count in [0, MAX_SOCKETS + 1] {
            let message = ToAgent::WantSockets { pod: PodUid::from("a"), kind: SocketKind::OuterV4, count };
            assert_eq!(ToAgent::decode(&message.encode()), Err(BadMessage::Field("count")));
        }
        assert_eq!(CniResult::decode(&[]), Err(BadMessage::Field("result")));
        assert_eq!(FromAgent::decode(&vec![0; MAX_MESSAGE + 1]), Err(BadMessage::TooLong(MAX_MESSAGE + 1)));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = CniRequest::decode(&bytes);
            let _ = CniResult::decode(&bytes);
            let _ = FromAgent::decode(&bytes);
            let _ = ToAgent::decode(&bytes);
        }
    }
}
