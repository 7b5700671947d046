//! The container runtime of the node, as kubelet asks it (CRI, runtime.v1): which pods run, and in which network
//! namespace each is.
//!
//! The runtime is root's and trusted with the node; still all that it says is bounded, and each question has its time, as
//! one that hangs must not hang the agent.

#[doc(hidden)]
pub mod double;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use mesh::PodUid;
use serde::Deserialize;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use crate::proto::runtime::v1;
use crate::proto::runtime::v1::runtime_service_client::RuntimeServiceClient;

/// The most sandboxes that are looked at: a node has some hundreds of pods at most, and dead ones beside them for a while.
pub const MOST_SANDBOXES: usize = 16_384;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// The largest answer, in bytes: the list of the sandboxes of a large node with all their labels.
const LARGEST: usize = 16 * 1024 * 1024;
/// The longest name, UID or id that is believed, in bytes.
const LONGEST_NAME: usize = 253;

/// Why the runtime cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum CriError {
    /// Nothing listens.
    #[error("the container runtime at {} does not answer: {because}", socket.display())]
    Unreachable {
        /// Its socket.
        socket: PathBuf,
        /// Why.
        because: String,
    },
    /// It answers, and not what it was asked for.
    #[error("the container runtime does not say {what}: {because}")]
    Refused {
        /// The question.
        what: &'static str,
        /// Its words.
        because: String,
    },
    /// A sandbox without a network namespace of its own.
    #[error("the container runtime names no network namespace for sandbox {sandbox}")]
    NoNamespace {
        /// Which.
        sandbox: String,
    },
}

/// A sandbox: the place that a pod's containers share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sandbox {
    /// The runtime's name for it, which is also `CNI_CONTAINERID`.
    pub id: String,
    /// metadata.uid of its pod.
    pub pod: PodUid,
    /// metadata.namespace.
    pub namespace: String,
    /// metadata.name.
    pub name: String,
    /// How many the pod had before.
    pub attempt: u32,
    /// Whether it runs.
    pub ready: bool,
    /// When it was made, in nanoseconds since 1970.
    pub created_at: i64,
}

/// A connection to a node's container runtime.
#[derive(Debug, Clone)]
pub struct ContainerRuntime {
    client: RuntimeServiceClient<Channel>,
}

impl ContainerRuntime {
    /// Connects to the runtime that listens at `socket`, and hears who it is.
    ///
    /// # Errors
    /// Nobody answers there, or nobody who speaks runtime.v1.
    pub async fn connect(socket: &Path) -> Result<(Self, String), CriError> {
        let unreachable = |because: String| CriError::Unreachable { socket: socket.to_owned(), because };
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_: tonic::codegen::http::Uri| {
            let path = path.clone();
            async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
        });
        // The URI names nothing: the socket is the address.
        let endpoint = Endpoint::from_static("http://runtime").connect_timeout(PATIENCE).timeout(PATIENCE);
        let channel = endpoint.connect_with_connector(connector).await.map_err(|error| unreachable(reason(&error)))?;
        let mut client = RuntimeServiceClient::new(channel).max_decoding_message_size(LARGEST);
        let version = client
            .version(asked(v1::VersionRequest::default()))
            .await
            .map_err(|status| unreachable(status.message().to_owned()))?
            .into_inner();
        Ok((Self { client }, format!("{} {}", version.runtime_name, version.runtime_version)))
    }

    /// All sandboxes, also those that do not run any more. What has no pod, or a name that no pod has, is left out.
    ///
    /// # Errors
    /// The runtime is gone, or says more than anybody can have.
    pub async fn sandboxes(&mut self) -> Result<Vec<Sandbox>, CriError> {
        let answer = self.client.list_pod_sandbox(asked(v1::ListPodSandboxRequest::default())).await;
        let items = answer.map_err(|status| refused("which pods run", &status))?.into_inner().items;
        if items.len() > MOST_SANDBOXES {
            let because = format!("{} sandboxes are more than {MOST_SANDBOXES}", items.len());
            return Err(CriError::Refused { what: "which pods run", because });
        }
        Ok(items.into_iter().filter_map(sandbox).collect())
    }

    /// Where the network namespace of a sandbox is, as the runtime's own host sees it. A pod on the host's network has none.
    ///
    /// # Errors
    /// The runtime is gone, the sandbox is, or it says no namespace.
    pub async fn network_namespace(&mut self, sandbox: &str) -> Result<PathBuf, CriError> {
        let question = v1::PodSandboxStatusRequest { pod_sandbox_id: sandbox.to_owned(), verbose: true };
        let answer = self.client.pod_sandbox_status(asked(question)).await;
        let info = answer.map_err(|status| refused("where a pod's network is", &status))?.into_inner().info;
        info.get("info")
            .and_then(|text| namespace_in(text))
            .ok_or_else(|| CriError::NoNamespace { sandbox: sandbox.to_owned() })
    }
}

fn asked<M>(message: M) -> Request<M> {
    let mut request = Request::new(message);
    request.set_timeout(PATIENCE);
    request
}

fn refused(what: &'static str, status: &Status) -> CriError {
    CriError::Refused { what, because: status.message().to_owned() }
}

/// The last cause is the one that names the socket's state.
fn reason(error: &tonic::transport::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

fn sandbox(item: v1::PodSandbox) -> Option<Sandbox> {
    let ready = item.state() == v1::PodSandboxState::SandboxReady;
    let metadata = item.metadata?;
    let named = [&item.id, &metadata.uid, &metadata.namespace, &metadata.name];
    let believed = named.iter().all(|name| !name.is_empty() && name.len() <= LONGEST_NAME);
    believed.then(|| Sandbox {
        id: item.id,
        pod: PodUid::from(metadata.uid.as_str()),
        namespace: metadata.namespace,
        name: metadata.name,
        attempt: metadata.attempt,
        ready,
        created_at: item.created_at,
    })
}

/// The part of a runtime's `info` that is read: containerd and CRI-O both show the sandbox's OCI specification there.
#[derive(Deserialize)]
struct Info {
    #[serde(rename = "runtimeSpec")]
    spec: Option<Spec>,
}

#[derive(Deserialize)]
struct Spec {
    linux: Option<Linux>,
}

#[derive(Deserialize)]
struct Linux {
    #[serde(default)]
    namespaces: Vec<Namespace>,
}

#[derive(Deserialize)]
struct Namespace {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    path: PathBuf,
}

fn namespace_in(info: &str) -> Option<PathBuf> {
    let info: Info = serde_json::from_str(info).ok()?;
    let mut networks = info.spec?.linux?.namespaces.into_iter().filter(|namespace| namespace.kind == "network");
    // Two would be a riddle, and which of them the pod is in is not to be guessed (T26).
    match (networks.next(), networks.next()) {
        (Some(network), None) if network.path.is_absolute() => Some(network.path),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_namespace_is_read_from_what_containerd_and_crio_say() {
        let containerd = r#"{"pid":1234,"processStatus":"running","netNamespaceClosed":false,"image":"pause",
            "config":{"metadata":{"name":"web"}},"runtimeSpec":{"ociVersion":"1.0.2","linux":{"namespaces":[
            {"type":"pid"},{"type":"ipc"},{"type":"network","path":"/var/run/netns/cni-1"},{"type":"mount"}]}}}"#;
        let crio = r#"{"image":"pause","pid":7,"runtimeSpec":{"linux":{"namespaces":[
            {"type":"network","path":"/var/run/netns/a"},{"type":"uts","path":"/var/run/utsns/a"}]}}}"#;
        assert_eq!(namespace_in(containerd), Some("/var/run/netns/cni-1".into()));
        assert_eq!(namespace_in(crio), Some("/var/run/netns/a".into()));
    }

    #[test]
    fn a_pod_of_the_hosts_network_and_an_info_that_is_none_have_no_namespace() {
        for info in [
            "",
            "{}",
            "[1,2]",
            r#"{"runtimeSpec":null}"#,
            r#"{"runtimeSpec":{"linux":{"namespaces":[{"type":"pid"}]}}}"#,
            r#"{"runtimeSpec":{"linux":{"namespaces":[{"type":"network"}]}}}"#,
            r#"{"runtimeSpec":{"linux":{"namespaces":[{"type":"network","path":"cni-1"}]}}}"#,
            r#"{"runtimeSpec":{"linux":{"namespaces":[{"type":"network","path":"/a"},{"type":"network","path":"/b"}]}}}"#,
        ] {
            assert_eq!(namespace_in(info), None, "{info}");
        }
    }

    #[test]
    fn a_sandbox_without_a_pod_or_with_an_endless_name_is_left_out() {
        let metadata = |name: &str| v1::PodSandboxMetadata {
            name: name.into(),
            uid: "u".into(),
            namespace: "shop".into(),
            attempt: 1,
        };
        let item = |metadata| v1::PodSandbox { id: "s".into(), metadata, state: 1, created_at: 5 };
        assert_eq!(sandbox(item(None)), None);
        assert_eq!(sandbox(item(Some(metadata("")))), None);
        assert_eq!(sandbox(item(Some(metadata(&"a".repeat(300))))), None);
        let there = sandbox(item(Some(metadata("web")))).unwrap();
        assert_eq!((there.ready, there.attempt, there.name.as_str(), there.created_at), (false, 1, "web", 5));
    }
}
