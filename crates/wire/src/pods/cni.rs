//! Between the container runtime and the agent: a pod's programs wait until it is captured.

use std::net::IpAddr;
use std::path::PathBuf;

use mesh::PodUid;
use prost::Message;

use super::{BadMessage, addresses, decode, pod_uid, text};
use crate::proto::v1;

/// The container runtime asks the agent, on the CNI socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CniRequest {
    /// A pod's network namespace is set up; its programs wait for the answer.
    Add(CniAdd),
    /// A pod is gone.
    Del {
        /// Which.
        pod: PodUid,
        /// Which of its sandboxes, as in [`CniAdd`].
        container: String,
    },
    /// Is the pod as it is to be?
    Check {
        /// Which.
        pod: PodUid,
    },
    /// Another agent is to take this one's place. It is answered with messages of [`ToAgent`](super::ToAgent): what a
    /// proxy would hand over, and what the agent keeps.
    HandOver {
        /// [`VERSION`](super::VERSION) of the other agent.
        version: u32,
    },
    /// The other agent has all of it, and listens: this one may go.
    Taken,
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
    /// Path of the network namespace, as `CNI_NETNS`. Where a descriptor comes beside the message, that is the namespace.
    pub netns: PathBuf,
    /// The runtime's name for the sandbox, as `CNI_CONTAINERID`; empty where it has none.
    pub container: String,
    /// Its addresses: those that the plugins before gave it. Kubernetes knows them only when the sandbox is made, so nobody
    /// else can say them now, and after a reboot its `status.podIPs` are those of the sandbox before. Empty where the runtime
    /// does not say them.
    pub addresses: Vec<IpAddr>,
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
                container: add.container.clone(),
                addresses: add.addresses.iter().map(ToString::to_string).collect(),
            }),
            Self::Del { pod, container } => {
                Request::Del(v1::CniDel { pod_uid: pod.to_string(), container: container.clone() })
            }
            Self::Check { pod } => Request::Check(v1::CniCheck { pod_uid: pod.to_string() }),
            Self::HandOver { version } => Request::HandOver(v1::HandOver { version: *version }),
            Self::Taken => Request::Taken(()),
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
                container: add.container,
                addresses: addresses(&add.addresses)?,
            })),
            Request::Del(del) => Ok(Self::Del { pod: pod_uid(&del.pod_uid)?, container: del.container }),
            Request::Check(check) => Ok(Self::Check { pod: pod_uid(&check.pod_uid)? }),
            Request::HandOver(asked) => Ok(Self::HandOver { version: asked.version }),
            Request::Taken(()) => Ok(Self::Taken),
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
