//! `justmtls status`: nodes, and pods with identity, capture and mode, as the nodes' own processes say.

use std::collections::BTreeMap;

use anyhow::bail;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::jiff::Timestamp;
use manifests::SYSTEM_NAMESPACES;
use serde::Serialize;
use serde_json::{Value, json};

use crate::cluster::{Cluster, Place, is_refusal};
use crate::leaving::{self, Leaving};
use crate::objects::NAMESPACE;
use crate::pages::{self, NodePages, Process};
use crate::table::Table;

/// What the verb takes.
#[derive(clap::Args, Clone, Debug)]
pub struct Arguments {
    /// Pods of this namespace alone.
    #[arg(short, long)]
    pub namespace: Option<String>,
    /// Output for programs.
    #[arg(long)]
    pub json: bool,
    /// Which cluster is meant.
    #[command(flatten)]
    pub place: Place,
}

/// What is known of one pod.
#[derive(Clone, PartialEq, Eq, Serialize, Debug)]
pub(crate) struct PodRow {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) node: String,
    /// Who it is, where its node knows.
    pub(crate) identity: Option<String>,
    /// `captured`, or the state that it is in.
    pub(crate) capture: String,
    /// Why it is not captured, or what went wrong.
    pub(crate) reason: Option<String>,
    /// `permissive` or `strict`, and ports that differ.
    pub(crate) mode: Option<String>,
    #[serde(skip)]
    pub(crate) uid: String,
    /// Since when it has had a node, where it has not started.
    #[serde(skip)]
    pub(crate) starting_since: Option<Timestamp>,
}

impl PodRow {
    /// Whether it should be captured, and is not. One that leaves should not, from the moment it does, and of one that is deleted
    /// the sandbox goes before the object.
    pub(crate) fn is_amiss(&self) -> bool {
        !["captured", "not-captured", "starting", "leaving", "ending"].contains(&self.capture.as_str())
    }
}

/// The pages that rows are made of.
pub(crate) const PAGES: &[(Process, &str)] = &[(Process::Agent, "/pods"), (Process::Proxy, "/workloads")];

/// Says the status.
pub(crate) async fn run(arguments: &Arguments) -> anyhow::Result<i32> {
    let cluster = Cluster::connect(&arguments.place).await?;
    // Who may look at some namespaces alone may not list nodes.
    let nodes: Option<Vec<Node>> = match cluster.list("/api/v1/nodes", "").await {
        Ok(nodes) => Some(nodes),
        Err(error) if is_refusal(&error.to_string()) => {
            anstream::eprintln!("nodes are left out: who asks may not list them");
            None
        }
        Err(error) => return Err(error),
    };
    let pods = pods(&cluster, arguments.namespace.as_deref()).await?;
    let pages = pages::of_nodes(&cluster, PAGES).await?;
    let leaving = Leaving::look(&cluster).await;
    if let Some(sentence) = leaving.stage.sentence() {
        anstream::eprintln!("{sentence}; `justmtls uninstall` goes on, `justmtls upgrade` takes it back");
    }
    let rows = rows(&pods, &pages, &leaving);
    let nodes = nodes.map(|nodes| node_rows(&nodes, &pages));
    if arguments.json {
        anstream::println!("{:#}", json!({ "nodes": nodes, "pods": rows }));
        return Ok(0);
    }
    if let Some(nodes) = nodes {
        print_nodes(&nodes);
    }
    let mut table = Table::new(&["POD", "NODE", "CAPTURE", "MODE", "IDENTITY", "REASON"]);
    for row in rows {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let name = format!("{}/{}", row.namespace, row.name);
        table.row([
            name,
            row.node,
            row.capture,
            or_dash(row.mode),
            or_dash(row.identity),
            row.reason.unwrap_or_default(),
        ]);
    }
    if table.is_empty() {
        anstream::println!(
            "there are no pods{}",
            arguments.namespace.as_ref().map_or_else(String::new, |it| format!(" in {it}"))
        );
    } else {
        table.print();
    }
    Ok(0)
}

fn print_nodes(nodes: &[Value]) {
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let mut table = Table::new(&["NODE", "JUSTMTLS", "CAPTURED", "REASON"]);
    for node in nodes {
        table.row([
            text(&node["name"]),
            text(&node["pod"]),
            node["captured"].to_string(),
            node["reason"].as_str().unwrap_or("").to_owned(),
        ]);
    }
    table.print();
    anstream::println!();
}

/// The pods that run, or are about to.
///
/// # Errors
/// The API server does not say, or there is no such namespace: a name that is mistyped is not to look as if all were well.
pub(crate) async fn pods(cluster: &Cluster, namespace: Option<&str>) -> anyhow::Result<Vec<Pod>> {
    let place = namespace.map_or_else(|| "/api/v1/pods".to_owned(), |name| format!("/api/v1/namespaces/{name}/pods"));
    let pods = cluster.list(&place, "fieldSelector=status.phase%21%3DSucceeded%2Cstatus.phase%21%3DFailed").await?;
    if pods.is_empty() {
        namespace_is_there(cluster, namespace).await?;
    }
    Ok(pods)
}

/// An error where the cluster has no such namespace. Who may not read namespaces is believed.
pub(crate) async fn namespace_is_there(cluster: &Cluster, namespace: Option<&str>) -> anyhow::Result<()> {
    if let Some(name) = namespace
        && matches!(cluster.get(&format!("/api/v1/namespaces/{name}")).await, Ok(None))
    {
        bail!("there is no namespace {name}; `kubectl get namespaces` lists them");
    }
    Ok(())
}

/// One row for each pod, in the order of their names.
pub(crate) fn rows(pods: &[Pod], pages: &BTreeMap<String, NodePages>, leaving: &Leaving) -> Vec<PodRow> {
    let mut said = BTreeMap::new();
    for pages in pages.values() {
        for (page, uid, list) in [
            (Process::Agent, "uid", pages.page(Process::Agent, "/pods")),
            (Process::Proxy, "pod_uid", &pages.page(Process::Proxy, "/workloads")["workloads"]),
        ] {
            for entry in list.as_array().into_iter().flatten() {
                said.insert((page, entry[uid].as_str().unwrap_or_default()), entry);
            }
        }
    }
    let none = NodePages::default();
    let mut rows: Vec<_> = pods
        .iter()
        .map(|pod| {
            let uid = pod.metadata.uid.as_deref().unwrap_or_default();
            let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
            let agent = said.get(&(Process::Agent, uid)).copied().unwrap_or(&Value::Null);
            let view = said.get(&(Process::Proxy, uid)).copied().unwrap_or(&Value::Null);
            let (capture, reason) = capture(pod, agent, pages.get(&node).unwrap_or(&none));
            let reason = reason.map(|said| leaving.reason(pod, said));
            let identity = agent["identity"].as_str().or(view["identity"].as_str());
            PodRow {
                starting_since: waits(pod).then(|| scheduled(pod)).flatten(),
                namespace: pod.metadata.namespace.clone().unwrap_or_default(),
                name: pod.metadata.name.clone().unwrap_or_default(),
                uid: uid.to_owned(),
                identity: identity.filter(|_| capture == "captured").map(str::to_owned),
                mode: mode(view).filter(|_| capture == "captured"),
                node,
                capture,
                reason,
            }
        })
        .collect();
    rows.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    rows
}

/// Whether a pod has not started.
fn waits(pod: &Pod) -> bool {
    pod.status.as_ref().is_none_or(|status| status.phase.as_deref() == Some("Pending"))
}

/// Whether a pod is deleted and nothing of it runs any more.
fn is_ending(pod: &Pod) -> bool {
    let kinds = pod.status.iter().flat_map(|status| {
        [&status.container_statuses, &status.init_container_statuses, &status.ephemeral_container_statuses]
    });
    let mut states = kinds.flatten().flatten().filter_map(|container| container.state.as_ref());
    pod.metadata.deletion_timestamp.is_some() && !states.any(|state| state.running.is_some())
}

/// When a node was chosen for a pod.
fn scheduled(pod: &Pod) -> Option<Timestamp> {
    let mut conditions = pod.status.as_ref()?.conditions.iter().flatten();
    let scheduled = conditions.find(|condition| condition.type_ == "PodScheduled" && condition.status == "True");
    // A static pod has its node from the beginning.
    let since = scheduled.and_then(|it| it.last_transition_time.as_ref()).or(pod.metadata.creation_timestamp.as_ref());
    pod.spec.as_ref()?.node_name.as_ref().and(since).map(|time| time.0)
}

/// How far the capture of a pod is, by its node's agent, and why no further.
fn capture(pod: &Pod, agent: &Value, pages: &NodePages) -> (String, Option<String>) {
    let spec = pod.spec.as_ref();
    let (waits, is_ending) = (waits(pod), is_ending(pod));
    if spec.and_then(|spec| spec.host_network) == Some(true) {
        return ("not-captured".to_owned(), Some("host-network".to_owned()));
    }
    if spec.is_none_or(|spec| spec.node_name.is_none()) {
        return ("starting".to_owned(), Some("no node yet".to_owned()));
    }
    let text = |field: &str| agent[field].as_str().map(str::to_owned);
    let stands = agent["stands"] == true && text("not_captured").is_some();
    match text("state") {
        Some(state) if stands && !["captured", "damaged", "leaving"].contains(&state.as_str()) => {
            ("rules-left".to_owned(), Some("not captured, and its rules still stand in the kernel".to_owned()))
        }
        Some(state) if state == "captured" => (state, text("failure")),
        Some(state) if state == "no-sandbox" && text("not_captured").is_some() => {
            ("not-captured".to_owned(), text("not_captured"))
        }
        Some(state) if state == "no-sandbox" && is_ending => ("ending".to_owned(), None),
        Some(_) if waits => ("starting".to_owned(), text("failure").or_else(|| text("not_captured"))),
        Some(state) => (state, text("failure").or_else(|| text("not_captured"))),
        // Nobody need be asked about a pod that is left out by its namespace, unless a label says otherwise.
        None if is_system(pod) => ("not-captured".to_owned(), Some("system-namespace".to_owned())),
        None => match pages.failure(Process::Agent, "/pods") {
            why if waits => ("starting".to_owned(), why.map(str::to_owned)),
            Some(why) => ("unknown".to_owned(), Some(why.to_owned())),
            None if is_ending => ("ending".to_owned(), None),
            None => ("unknown".to_owned(), Some("its node's agent does not know it".to_owned())),
        },
    }
}

/// Whether a pod is in a namespace of the system, or ours, and does not ask to be captured all the same.
fn is_system(pod: &Pod) -> bool {
    let mode = pod.metadata.labels.as_ref().and_then(|labels| labels.get(leaving::MODE)).map(String::as_str);
    let is_system = |name: &str| name == NAMESPACE || SYSTEM_NAMESPACES.contains(&name);
    mode != Some("on") && pod.metadata.namespace.as_deref().is_some_and(is_system)
}

fn mode(view: &Value) -> Option<String> {
    let default = view["mode"].as_str()?;
    let ports = view["port_modes"].as_object().into_iter().flatten();
    let mut ports: Vec<_> = ports.filter_map(|(port, mode)| Some(format!("{port}:{}", mode.as_str()?))).collect();
    ports.sort();
    Some(if ports.is_empty() { default.to_owned() } else { format!("{default} ({})", ports.join(" ")) })
}

/// One row for each node, with all its captured pods, whichever namespace is asked for.
fn node_rows(nodes: &[Node], pages: &BTreeMap<String, NodePages>) -> Vec<Value> {
    let none = NodePages::default();
    let node = |name: &str| {
        let pages = pages.get(name).unwrap_or(&none);
        let said = pages.page(Process::Agent, "/pods").as_array().into_iter().flatten();
        let captured = said.filter(|pod| pod["state"] == "captured").count();
        let failures = PAGES.iter().find_map(|(process, page)| pages.failure(*process, page));
        json!({ "name": name, "pod": pages.pod, "captured": captured, "reason": failures })
    };
    nodes.iter().filter_map(|it| it.metadata.name.as_deref()).map(node).collect()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;

    pub(crate) fn pod(name: &str, node: Option<&str>, phase: &str, host: bool) -> Pod {
        serde_json::from_value(json!({
            "metadata": { "name": name, "namespace": "shop", "uid": format!("uid-{name}") },
            "spec": { "nodeName": node, "hostNetwork": host, "containers": [] },
            "status": { "phase": phase },
        }))
        .unwrap()
    }

    fn deleted(mut pod: Pod) -> Pod {
        pod.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
        pod
    }

    fn running(mut pod: Pod) -> Pod {
        let statuses = json!([{
            "name": "c", "image": "i", "imageID": "", "ready": true, "restartCount": 0, "state": { "running": {} },
        }]);
        pod.status.as_mut().unwrap().container_statuses = serde_json::from_value(statuses).unwrap();
        pod
    }

    fn told() -> BTreeMap<String, NodePages> {
        let agent = json!([
            { "uid": "uid-web", "state": "captured", "identity": "spiffe://c/ns/shop/sa/web" },
            { "uid": "uid-out", "state": "not-captured", "not_captured": "opted-out" },
            { "uid": "uid-bad", "state": "failed", "failure": "no-interface" },
            { "uid": "uid-new", "state": "waiting" },
            { "uid": "uid-gone-deleted", "state": "no-sandbox" },
            { "uid": "uid-ruled", "state": "not-captured", "not_captured": "opted-out", "stands": true },
        ]);
        let proxy = json!({ "workloads": [
            { "pod_uid": "uid-web", "mode": "permissive", "port_modes": { "9090": "strict" }, "identity": "spiffe://c/ns/shop/sa/web" },
        ] });
        let pages =
            NodePages::told("node-pod", &[(Process::Agent, "/pods", agent), (Process::Proxy, "/workloads", proxy)]);
        BTreeMap::from([("a".to_owned(), pages)])
    }

    #[test]
    fn each_pod_has_its_capture_and_each_that_has_none_its_reason() {
        let pods = [
            pod("web", Some("a"), "Running", false),
            pod("out", Some("a"), "Running", false),
            pod("bad", Some("a"), "Running", false),
            pod("new", Some("a"), "Pending", false),
            pod("host", Some("a"), "Running", true),
            pod("lost", Some("a"), "Running", false),
            pod("away", Some("b"), "Running", false),
            pod("ruled", Some("a"), "Running", false),
            pod("unplaced", None, "Pending", false),
            pod("unborn", Some("b"), "Pending", false),
            deleted(pod("away-deleted", Some("b"), "Running", false)),
            deleted(pod("lost-deleted", Some("a"), "Running", false)),
            deleted(pod("gone-deleted", Some("a"), "Running", false)),
            running(deleted(pod("lost-running", Some("a"), "Running", false))),
        ];
        let rows = rows(&pods, &told(), &Leaving::default());
        let found: Vec<_> =
            rows.iter().map(|row| (&*row.name, &*row.capture, row.reason.as_deref().unwrap_or(""))).collect();
        let expected = [
            ("away", "unknown", "there is no pod of justmtls that runs on this node"),
            ("away-deleted", "unknown", "there is no pod of justmtls that runs on this node"),
            ("bad", "failed", "no-interface"),
            ("gone-deleted", "ending", ""),
            ("host", "not-captured", "host-network"),
            ("lost", "unknown", "its node's agent does not know it"),
            ("lost-deleted", "ending", ""),
            ("lost-running", "unknown", "its node's agent does not know it"),
            ("new", "starting", ""),
            ("out", "not-captured", "opted-out"),
            ("ruled", "rules-left", "not captured, and its rules still stand in the kernel"),
            ("unborn", "starting", "there is no pod of justmtls that runs on this node"),
            ("unplaced", "starting", "no node yet"),
            ("web", "captured", ""),
        ];
        assert_eq!(found, expected);
        let amiss: Vec<_> = rows.iter().filter(|row| row.is_amiss()).map(|row| &*row.name).collect();
        assert_eq!(amiss, ["away", "away-deleted", "bad", "lost", "lost-running", "ruled"]);
        let web = rows.last().unwrap();
        assert_eq!(web.identity.as_deref(), Some("spiffe://c/ns/shop/sa/web"));
        assert_eq!(web.mode.as_deref(), Some("permissive (9090:strict)"));
    }

    #[test]
    fn a_pod_of_the_system_that_nobody_knows_is_left_out_as_one_that_somebody_knows() {
        let of = |namespace: &str, mode: Option<&str>| {
            let mut pod = pod("lost", Some("b"), "Running", false);
            pod.metadata.namespace = Some(namespace.to_owned());
            pod.metadata.labels = mode.map(|mode| [("justmtls.dev/mode".to_owned(), mode.to_owned())].into());
            rows(&[pod], &told(), &Leaving::default()).remove(0)
        };
        let left_out = of("kube-system", None);
        assert_eq!((&*left_out.capture, left_out.reason.as_deref()), ("not-captured", Some("system-namespace")));
        assert!(!of("justmtls-system", None).is_amiss());
        assert!(of("kube-system", Some("on")).is_amiss() && of("shop", None).is_amiss());
    }

    #[test]
    fn a_node_counts_its_captured_pods_and_says_why_it_is_silent() {
        let nodes: Vec<Node> = ["a", "b"]
            .iter()
            .map(|name| serde_json::from_value(json!({ "metadata": { "name": name } })).unwrap())
            .collect();
        let nodes = node_rows(&nodes, &told());
        assert_eq!(
            (&nodes[0]["captured"], &nodes[0]["pod"], &nodes[0]["reason"]),
            (&json!(1), &json!("node-pod"), &Value::Null)
        );
        assert!(nodes[1]["reason"].as_str().unwrap().contains("no pod"));
    }
}
