//! A container runtime for tests: it says what a test wants it to say, to whoever asks as kubelet does.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

use super::Sandbox;
use crate::proto::runtime::v1;
use crate::proto::runtime::v1::runtime_service_server::{RuntimeService, RuntimeServiceServer};

/// What it has: sandboxes, each with its network namespace where it has one.
#[derive(Debug, Clone, Default)]
pub struct Double(Arc<Mutex<Vec<Placed>>>);

/// A sandbox, and where its network namespace is.
type Placed = (Sandbox, Option<PathBuf>);

impl Double {
    /// From here on these are its sandboxes.
    pub fn has(&self, sandboxes: Vec<(Sandbox, Option<PathBuf>)>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = sandboxes;
    }

    /// Serves until its runtime ends.
    ///
    /// # Errors
    /// The listener fails.
    pub async fn serve(self, listener: UnixListener) -> Result<(), tonic::transport::Error> {
        let server = tonic::transport::Server::builder().add_service(RuntimeServiceServer::new(self));
        server.serve_with_incoming(UnixListenerStream::new(listener)).await
    }

    fn all(&self) -> Vec<Placed> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn item(sandbox: &Sandbox) -> v1::PodSandbox {
    let metadata = v1::PodSandboxMetadata {
        name: sandbox.name.clone(),
        uid: sandbox.pod.to_string(),
        namespace: sandbox.namespace.clone(),
        attempt: sandbox.attempt,
    };
    v1::PodSandbox {
        id: sandbox.id.clone(),
        metadata: Some(metadata),
        state: i32::from(!sandbox.ready),
        created_at: sandbox.created_at,
    }
}

#[tonic::async_trait]
impl RuntimeService for Double {
    async fn version(&self, _: Request<v1::VersionRequest>) -> Result<Response<v1::VersionResponse>, Status> {
        let (name, version) = ("double".to_owned(), "v0".to_owned());
        Ok(Response::new(v1::VersionResponse { runtime_name: name, runtime_version: version, ..Default::default() }))
    }

    async fn list_pod_sandbox(
        &self,
        _: Request<v1::ListPodSandboxRequest>,
    ) -> Result<Response<v1::ListPodSandboxResponse>, Status> {
        let items = self.all().iter().map(|(sandbox, _)| item(sandbox)).collect();
        Ok(Response::new(v1::ListPodSandboxResponse { items }))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<v1::PodSandboxStatusRequest>,
    ) -> Result<Response<v1::PodSandboxStatusResponse>, Status> {
        let asked = request.into_inner();
        let found = self.all().into_iter().find(|(sandbox, _)| sandbox.id == asked.pod_sandbox_id && asked.verbose);
        let (sandbox, path) = found.ok_or_else(|| Status::not_found("no such sandbox"))?;
        let network = path.map(|path| serde_json::json!({ "type": "network", "path": path }));
        let namespaces: Vec<_> = network.into_iter().collect();
        let info = serde_json::json!({ "runtimeSpec": { "linux": { "namespaces": namespaces } } }).to_string();
        let status = Some(item(&sandbox));
        Ok(Response::new(v1::PodSandboxStatusResponse { status, info: [("info".to_owned(), info)].into() }))
    }
}

#[cfg(test)]
mod tests {
    use mesh::PodUid;

    use crate::cri::{ContainerRuntime, CriError};

    use super::*;

    #[tokio::test]
    async fn a_runtime_is_asked_over_its_socket_and_what_is_not_there_is_named() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("cri.sock");
        let error = ContainerRuntime::connect(&path).await.unwrap_err();
        assert!(matches!(error, CriError::Unreachable { .. }), "{error}");
        let double = Double::default();
        let serving = tokio::spawn(double.clone().serve(UnixListener::bind(&path).unwrap()));
        let (mut runtime, name) = ContainerRuntime::connect(&path).await.unwrap();
        assert_eq!((name.as_str(), runtime.sandboxes().await.unwrap()), ("double v0", vec![]));
        let sandbox = |id: &str, ready| Sandbox {
            id: id.into(),
            pod: PodUid::from("a"),
            namespace: "shop".into(),
            name: "web".into(),
            attempt: 2,
            ready,
            created_at: 7,
        };
        let all = [sandbox("s", true), sandbox("host", false)];
        double.has(vec![(all[0].clone(), Some("/run/netns/s".into())), (all[1].clone(), None)]);
        assert_eq!(runtime.sandboxes().await.unwrap(), all);
        assert_eq!(runtime.network_namespace("s").await.unwrap(), PathBuf::from("/run/netns/s"));
        assert!(matches!(runtime.network_namespace("host").await, Err(CriError::NoNamespace { .. })));
        let error = runtime.network_namespace("t").await.unwrap_err();
        assert!(error.to_string().contains("no such sandbox"), "{error}");
        serving.abort();
    }
}
