//! What processes know: pages of their admin sockets, read by `exec` in our own pods and in no other.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{anyhow, bail};
use futures_util::stream::{self, StreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::AttachParams;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::cluster::Cluster;
use crate::objects::{CONTROL_ADMIN, NAMESPACE, NODE, PROXY_ADMIN, agent_admin};
use crate::table::printable;
use crate::wait::{pods_of, runs};

/// How many pods are asked at once.
const AT_ONCE: usize = 16;
/// The longest that one answer may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// The largest page, in bytes.
const LARGEST: u64 = 64 << 20;

/// A process of a node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Process {
    /// The privileged half.
    Agent,
    /// The data path.
    Proxy,
    /// A replica of the control plane.
    Control,
}

/// What one node's processes say: each page, or why it cannot be had.
#[derive(Clone, Default, Debug)]
pub(crate) struct NodePages {
    /// The pod that was asked; none where the node has none that runs.
    pub(crate) pod: Option<String>,
    pages: BTreeMap<(Process, &'static str), Result<Value, String>>,
}

impl NodePages {
    /// A page as it was said; null where it could not be had.
    pub(crate) fn page(&self, process: Process, page: &'static str) -> &Value {
        self.pages.get(&(process, page)).and_then(|answer| answer.as_ref().ok()).unwrap_or(&Value::Null)
    }

    /// Why a page could not be had.
    pub(crate) fn failure(&self, process: Process, page: &'static str) -> Option<&str> {
        match self.pages.get(&(process, page)) {
            Some(Err(why)) => Some(why),
            Some(Ok(_)) => None,
            None => Some("there is no pod of justmtls that runs on this node"),
        }
    }

    #[cfg(test)]
    pub(crate) fn told(pod: &str, pages: &[(Process, &'static str, Value)]) -> Self {
        let pages = pages.iter().map(|(process, page, value)| ((*process, *page), Ok(value.clone()))).collect();
        Self { pod: Some(pod.to_owned()), pages }
    }
}

/// Asks each node for these pages. A node that does not answer costs nothing of the others.
pub(crate) async fn of_nodes(
    cluster: &Cluster,
    wanted: &[(Process, &'static str)],
) -> anyhow::Result<BTreeMap<String, NodePages>> {
    Ok(of_pods(cluster, &pods_of(cluster, NODE).await?, wanted).await)
}

/// As [`of_nodes`], where the pods of the nodes are known already.
pub(crate) async fn of_pods(
    cluster: &Cluster,
    pods: &[Pod],
    wanted: &[(Process, &'static str)],
) -> BTreeMap<String, NodePages> {
    let pods: BTreeMap<String, String> = stream::iter(candidates(pods))
        .map(|(node, pods)| async move { (node, holder(cluster, pods).await) })
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    let questions =
        pods.iter().flat_map(|(node, pod)| wanted.iter().map(move |(process, page)| (node, pod, *process, *page)));
    let answers = stream::iter(questions).map(|(node, pod, process, page)| async move {
        (node, (process, page), ask(cluster, pod, process, page).await.map_err(|error| format!("{error:#}")))
    });
    let mut all: BTreeMap<String, NodePages> = pods
        .iter()
        .map(|(node, pod)| (node.clone(), NodePages { pod: Some(pod.clone()), ..NodePages::default() }))
        .collect();
    let mut answers = answers.buffer_unordered(AT_ONCE);
    while let Some((node, page, answer)) = answers.next().await {
        if let Some(pages) = all.get_mut(node) {
            pages.pages.insert(page, answer);
        }
    }
    all
}

/// The pods of each node that run and do not end: those that are ready first, and the newest of them.
fn candidates(pods: &[Pod]) -> BTreeMap<String, Vec<String>> {
    let mut found: BTreeMap<String, Vec<(bool, String, String)>> = BTreeMap::new();
    for pod in pods {
        let (Some(spec), Some(status), Some(name)) = (&pod.spec, &pod.status, &pod.metadata.name) else { continue };
        let (Some(node), true) = (&spec.node_name, runs(pod)) else { continue };
        let ready = status.conditions.iter().flatten().any(|it| it.type_ == "Ready" && it.status == "True");
        let made = pod.metadata.creation_timestamp.as_ref().map(|time| time.0.to_string()).unwrap_or_default();
        found.entry(node.clone()).or_default().push((ready, made, name.clone()));
    }
    let names = |mut pods: Vec<(bool, String, String)>| {
        pods.sort_by(|a, b| b.cmp(a));
        pods.into_iter().map(|(_, _, name)| name).collect()
    };
    found.into_iter().map(|(node, pods)| (node, names(pods))).collect()
}

/// Of a node's pods the one that has the place: during an upgrade the agent of another stands by, and shows what it had.
async fn holder(cluster: &Cluster, pods: Vec<String>) -> String {
    let mut pods = pods.into_iter();
    let first = pods.next().unwrap_or_default();
    if pods.len() == 0 || !stands_by(cluster, &first).await {
        return first;
    }
    for other in pods {
        if !stands_by(cluster, &other).await {
            return other;
        }
    }
    first
}

/// Whether a pod's agent stands by. One that gives no answer does not.
async fn stands_by(cluster: &Cluster, pod: &str) -> bool {
    ask(cluster, pod, Process::Agent, "/version").await.is_ok_and(|page| page["stands_by"] == true)
}

/// One page of a process in a pod.
///
/// # Errors
/// It cannot be had, in one sentence.
pub(crate) async fn ask(cluster: &Cluster, pod: &str, process: Process, page: &str) -> anyhow::Result<Value> {
    let (container, socket) = match process {
        Process::Agent => ("agent", agent_admin(pod)),
        Process::Proxy => ("proxy", PROXY_ADMIN.to_owned()),
        Process::Control => ("control", CONTROL_ADMIN.to_owned()),
    };
    let answer = tokio::time::timeout(PATIENCE, exec(cluster, pod, container, &socket, page)).await;
    let text = answer.map_err(|_| anyhow!("{pod} does not answer within {} s", PATIENCE.as_secs()))??;
    serde_json::from_str(&text).map_err(|_| anyhow!("{pod} ({container}) answers what is no JSON"))
}

/// Runs `justmtls admin SOCKET PAGE` in a container, as `kubectl exec` would.
async fn exec(cluster: &Cluster, pod: &str, container: &str, socket: &str, page: &str) -> anyhow::Result<String> {
    let api: Api<Pod> = Api::namespaced(cluster.client.clone(), NAMESPACE);
    let options = AttachParams::default().container(container).stdin(false).stdout(true).stderr(true);
    let process = api.exec(pod, ["/justmtls", "admin", socket, page], &options).await;
    let mut process = process.map_err(|error| cluster.explain(error, &format!("asking {pod} ({container})")))?;
    let (stdout, stderr) = (process.stdout(), process.stderr());
    let status = process.take_status();
    let (text, complaint) = tokio::try_join!(text_of(stdout, LARGEST), text_of(stderr, 4096))?;
    let status = match status {
        Some(status) => status.await,
        None => None,
    };
    // `/readyz` says no with a page that says why.
    let well = status.as_ref().is_some_and(|status| status.status.as_deref() == Some("Success"));
    if !well && text.is_empty() {
        let why = complaint.trim();
        let said = || status.and_then(|status| status.message).unwrap_or_else(|| "the connection ended".to_owned());
        let why = if why.is_empty() { said() } else { why.to_owned() };
        bail!("{pod} ({container}): {}", printable(&why));
    }
    Ok(text)
}

/// What a stream says, up to so many bytes.
async fn text_of(stream: Option<impl AsyncRead + Unpin>, most: u64) -> std::io::Result<String> {
    let mut text = String::new();
    if let Some(stream) = stream {
        stream.take(most).read_to_string(&mut text).await?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(name: &str, node: &str, phase: &str, ready: &str, made: &str, ending: Option<&str>) -> Pod {
        serde_json::from_value(json!({
            "metadata": { "name": name, "creationTimestamp": made, "deletionTimestamp": ending },
            "spec": { "nodeName": node, "containers": [] },
            "status": { "phase": phase, "conditions": [{ "type": "Ready", "status": ready }] },
        }))
        .unwrap()
    }

    #[test]
    fn pods_that_are_ready_are_asked_first_and_those_that_do_not_run_never() {
        let (old, new) = ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z");
        let pods = [
            pod("a-old", "a", "Running", "True", old, None),
            pod("a-starting", "a", "Running", "False", new, None),
            pod("b-ending", "b", "Running", "True", new, Some(new)),
            pod("b-old", "b", "Running", "False", old, None),
            pod("c-pending", "c", "Pending", "False", new, None),
        ];
        let expected = [("a", vec!["a-old", "a-starting"]), ("b", vec!["b-old"])];
        let expected = expected.map(|(node, pods)| (node.to_owned(), pods.into_iter().map(str::to_owned).collect()));
        assert_eq!(candidates(&pods), BTreeMap::from(expected));
    }

    #[test]
    fn a_node_without_a_pod_says_so() {
        let pages = NodePages::default();
        assert!(pages.page(Process::Agent, "/pods").is_null());
        assert!(pages.failure(Process::Agent, "/pods").unwrap().contains("no pod"));
        let pages = NodePages::told("x", &[(Process::Agent, "/pods", json!([]))]);
        assert_eq!(pages.failure(Process::Agent, "/pods"), None);
    }
}
