//! How far the API server's own history is, asked for anew: it tells a replica whose watches lag from one whose API server was set
//! back, as by a backup of etcd that was restored.

use std::time::Duration;

use kube::api::{ListMeta, ListParams};
use kube::core::Request;
use kube::{Client, Resource};
use manifests::k8s_openapi::api::core::v1::Namespace;
use serde::Deserialize;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::{Failure, ask};

/// An answer counts for as long, whoever asks: nodes that come by thousands cost one question.
const COUNTS: Duration = Duration::from_secs(1);

/// Asks.
pub(crate) struct History {
    client: Client,
    last: Mutex<Option<(Instant, u64)>>,
}

#[derive(Deserialize)]
struct Answer {
    metadata: ListMeta,
}

impl History {
    pub(crate) fn new(client: &Client) -> Self {
        Self { client: client.clone(), last: Mutex::default() }
    }

    /// The version of the last change of the whole cluster.
    ///
    /// # Errors
    /// The API server does not answer, or has versions that are no numbers.
    pub(crate) async fn present(&self) -> Result<u64, Failure> {
        let mut last = self.last.lock().await;
        if let Some((_, version)) = last.filter(|(when, _)| when.elapsed() < COUNTS) {
            return Ok(version);
        }
        // A list without a version is as new as the store, whatever the API server has cached.
        let request = Request::new(Namespace::url_path(&(), None)).list(&ListParams::default().limit(1));
        let request = request.map_err(|error| Failure::from(kube::Error::BuildRequest(error)))?;
        let text = ask(self.client.request_text(request)).await?;
        let answer: Answer =
            serde_json::from_str(&text).map_err(|error| Failure::from(kube::Error::SerdeError(error)))?;
        let version = answer.metadata.resource_version.as_deref().and_then(|version| version.parse().ok());
        let version = version.ok_or_else(|| Failure::Away("its versions are no numbers".to_owned()))?;
        *last = Some((Instant::now(), version));
        Ok(version)
    }
}
