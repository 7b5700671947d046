//! The API server: how it is asked, and what the control plane keeps there.
//!
//! Reading the cluster's objects is `watch::kubernetes`; here is what several replicas agree on by way of the API server: who
//! of them leads, the authority's Secret, the roots that are published, the record of captured pods, what policies are told about
//! themselves, and what owners of pods are told that cannot be captured.

pub(crate) mod duties;
pub(crate) mod history;
pub(crate) mod lease;
pub(crate) mod pod_events;
pub(crate) mod records;
pub(crate) mod secret;
pub(crate) mod status;

#[cfg(test)]
pub(crate) mod fake;

use std::future::Future;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use kube::api::{ApiResource, GroupVersionKind, ObjectMeta, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::Status;
use kube::{Client, Config};
use manifests::Kind;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::labels;

/// The name that the API server notes as the manager of the fields that we write.
pub(crate) const FIELD_MANAGER: &str = "justmtls";
/// Longer answers are not waited for.
const LONGEST_ANSWER: Duration = Duration::from_secs(10);
/// How long a connection to the API server may take.
const CONNECT: Duration = Duration::from_secs(5);

/// What became of something that was asked of the API server, where that is not an answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Failure {
    /// No such object, or no such kind.
    #[error("there is no such object or kind")]
    Absent,
    /// It is there already, or is not any more as it was when it was read.
    #[error("somebody else wrote it first")]
    Conflict,
    /// Changes were asked for from a point that is forgotten.
    #[error("the API server has forgotten the changes since then")]
    Gone,
    /// The API server says no: asking again brings the same.
    #[error("the API server refuses: {0}")]
    Refused(String),
    /// It would be in a namespace that is being deleted.
    #[error("its namespace is being deleted: {0}")]
    Terminating(String),
    /// The API server does not answer, or not now.
    #[error("the API server cannot be asked: {0}")]
    Away(String),
}

impl From<kube::Error> for Failure {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) if is_terminating(&status) => Self::Terminating(status.message.clone()),
            kube::Error::Api(status) => Self::of(status.code, &status.message),
            // Without the answer's text: it may be a Secret's.
            kube::Error::SerdeError(error) => {
                Self::Away(format!("its answer is not what was asked for (column {})", error.column()))
            }
            error => Self::Away(chain(&error)),
        }
    }
}

impl Failure {
    /// What a status code of HTTP says.
    pub(crate) fn of(code: u16, message: &str) -> Self {
        match code {
            404 => Self::Absent,
            409 => Self::Conflict,
            410 => Self::Gone,
            429 | 500.. => Self::Away(message.to_owned()),
            _ => Self::Refused(message.to_owned()),
        }
    }
}

/// Whether something was not made because its namespace is being deleted, which has no code of its own.
fn is_terminating(status: &Status) -> bool {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    status.code == 403 && causes.into_iter().any(|cause| cause.reason == "NamespaceTerminating")
}

/// An error with its causes, each once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

/// A client for the cluster that this process runs in, or for the one of a file.
///
/// # Errors
/// One sentence: this is no pod, or the file is no good.
pub(crate) async fn connect(kubeconfig: Option<&Path>) -> Result<Client> {
    let mut config = match kubeconfig {
        None => Config::incluster().context(
            "--kubernetes needs the service account of a pod (KUBERNETES_SERVICE_HOST and the token below \
             /var/run/secrets/kubernetes.io/serviceaccount); run it in one",
        )?,
        Some(path) => {
            let read = Kubeconfig::read_from(path).with_context(|| format!("{} (--kubeconfig)", path.display()))?;
            let config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await;
            config.with_context(|| format!("{} (--kubeconfig)", path.display()))?
        }
    };
    config.connect_timeout = Some(CONNECT);
    Client::try_from(config).context("cannot make a client for the API server")
}

/// How what we write is written.
pub(crate) fn parameters() -> PostParams {
    PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() }
}

/// Metadata of an object of ours.
pub(crate) fn metadata(name: &str) -> ObjectMeta {
    ObjectMeta { name: Some(name.to_owned()), labels: Some(labels()), ..ObjectMeta::default() }
}

/// A kind in one of its versions, as `group/version`.
pub(crate) fn resource(kind: Kind, version: &str) -> ApiResource {
    let (group, version) = version.split_once('/').unwrap_or(("", version));
    ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind.as_str()))
}

/// Tells those who watch, if it is another value than before; whether it is.
pub(crate) fn tell<T: PartialEq>(watched: &watch::Sender<T>, value: T) -> bool {
    watched.send_if_modified(|now| {
        let changed = *now != value;
        *now = value;
        changed
    })
}

/// Asks, and does not wait for ever.
pub(crate) async fn ask<T>(asked: impl Future<Output = kube::Result<T>>) -> Result<T, Failure> {
    match timeout(LONGEST_ANSWER, asked).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(Failure::Away(format!("no answer within {} s", LONGEST_ANSWER.as_secs()))),
    }
}

/// Asks for something that may hold a secret, in or out: no text of it reaches a log.
pub(crate) async fn ask_in_silence<T: serde::de::DeserializeOwned>(
    client: &Client,
    request: Result<axum::http::Request<Vec<u8>>, impl std::fmt::Display>,
) -> Result<T, Failure> {
    let request = request.map_err(|error| Failure::Refused(error.to_string()))?;
    let text = zeroize::Zeroizing::new(ask(client.request_text(request)).await?);
    serde_json::from_str(&text).map_err(|error| Failure::from(kube::Error::SerdeError(error)))
}

/// How long to wait after so many failures in a row: up to half a minute, and not all at once.
pub(crate) fn pause(failures: u32) -> Duration {
    let longest = Duration::from_millis(250).saturating_mul(1 << failures.min(7)).min(Duration::from_secs(30));
    longest.mul_f64(0.5 + wire::dice::fraction() / 2.0)
}
