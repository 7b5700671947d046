//! `justmtls coverage`: who talked to whom, and how, as all proxies have seen it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::bail;
use k8s_openapi::api::core::v1::Pod;
use serde::Serialize;
use serde_json::{Value, json};

use crate::cluster::{Cluster, Place};
use crate::pages::{self, NodePages, Process};
use crate::status::{namespace_is_there, pods};
use crate::table::{Table, printable};

/// What the verb takes.
#[derive(clap::Args, Clone, Debug)]
pub struct Arguments {
    /// Edges from or to this namespace alone.
    #[arg(short, long)]
    pub namespace: Option<String>,
    /// Each pod by itself, with bytes.
    #[arg(long)]
    pub wide: bool,
    /// Output for programs.
    #[arg(long)]
    pub json: bool,
    /// Which cluster is meant.
    #[command(flatten)]
    pub place: Place,
}

/// Who talked to whom, and how.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Debug)]
struct Edge {
    source: String,
    destination: String,
    port: u64,
    /// `mtls`, `plaintext`, or `none` where nothing came of it.
    security: String,
    /// Why it was in clear, or refused.
    reason: String,
}

/// How much of it there was.
#[derive(Clone, Copy, PartialEq, Eq, Default, Serialize, Debug)]
struct Counts {
    /// Connections that are open.
    open: u64,
    /// Connections that have ended.
    ended: u64,
    sent: u64,
    received: u64,
    /// Seconds since 1970.
    last_seen: u64,
    /// A captured pod was dialled in clear: it would refuse that in strict mode.
    refused_by_strict: bool,
}

/// As `--json` shows it.
#[derive(Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    edge: &'a Edge,
    #[serde(flatten)]
    counts: &'a Counts,
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.open += other.open;
        self.ended += other.ended;
        self.sent += other.sent;
        self.received += other.received;
        self.last_seen = self.last_seen.max(other.last_seen);
        self.refused_by_strict |= other.refused_by_strict;
    }

    /// Both ends of a connection may have counted it: the end that saw more is right.
    fn of_both_ends(self, other: Self) -> Self {
        Self {
            open: self.open.max(other.open),
            ended: self.ended.max(other.ended),
            sent: self.sent.max(other.sent),
            received: self.received.max(other.received),
            last_seen: self.last_seen.max(other.last_seen),
            refused_by_strict: self.refused_by_strict || other.refused_by_strict,
        }
    }
}

/// Plaintext that strict mode takes all the same: a pod to itself, its own node's declared probes, and what the API server is
/// declared to call.
const TAKEN_BY_STRICT: &[&str] = &["self", "probe", "api-server"];

/// Says what was seen.
pub(crate) async fn run(arguments: &Arguments) -> anyhow::Result<i32> {
    let cluster = Cluster::connect(&arguments.place).await?;
    let wanted = [(Process::Proxy, "/coverage"), (Process::Proxy, "/connections")];
    let pages = pages::of_nodes(&cluster, &wanted).await?;
    let pods = pods(&cluster, None).await?;
    let mut edges = merge(&pages, &names(&pods));
    if !arguments.wide {
        edges = by_workload(edges, &workloads(&pods));
    }
    if let Some(namespace) = &arguments.namespace {
        let within = format!("{namespace}/");
        edges.retain(|edge, _| edge.source.starts_with(&within) || edge.destination.starts_with(&within));
    }
    if edges.is_empty() {
        namespace_is_there(&cluster, arguments.namespace.as_deref()).await?;
    }
    let silent: Vec<_> = pages
        .iter()
        .filter_map(|(node, pages)| {
            Some((node, wanted.iter().find_map(|(process, page)| pages.failure(*process, page))?))
        })
        .collect();
    if let Some(sentence) = nobody(&pages, &silent) {
        bail!("{sentence}");
    }
    for (node, why) in &silent {
        anstream::eprintln!("warning: node {node} says nothing, and what it saw is left out: {why}");
    }
    if arguments.json {
        let edges: Vec<_> = edges.iter().map(|(edge, counts)| Row { edge, counts }).collect();
        let silent: Vec<_> = silent.iter().map(|(node, _)| node).collect();
        anstream::println!("{:#}", json!({ "edges": edges, "silent_nodes": silent }));
    } else {
        print(&edges, arguments.wide);
    }
    Ok(i32::from(!silent.is_empty()) * 2)
}

/// Why there is nothing to be shown, where no node has said anything: that nobody talked would be untrue.
fn nobody(pages: &BTreeMap<String, NodePages>, silent: &[(&String, &str)]) -> Option<String> {
    match silent.first() {
        None if pages.is_empty() => {
            Some("no node has a pod of ours that could be asked; `justmtls check` says why".to_owned())
        }
        Some((node, why)) if silent.len() == pages.len() => Some(format!(
            "no node says what it saw, {} of them; node {}: {}",
            silent.len(),
            printable(node),
            printable(why)
        )),
        _ => None,
    }
}

fn print(edges: &BTreeMap<Edge, Counts>, wide: bool) {
    let head = ["SOURCE", "DESTINATION", "PORT", "SECURITY", "OPEN", "ENDED", "REASON", "SENT", "RECEIVED"];
    let shown = if wide { head.len() } else { head.len() - 2 };
    let mut table = Table::new(&head[..shown]);
    for (edge, counts) in edges {
        let cells = [
            edge.source.clone(),
            edge.destination.clone(),
            edge.port.to_string(),
            edge.security.clone(),
            counts.open.to_string(),
            counts.ended.to_string(),
            edge.reason.clone(),
            counts.sent.to_string(),
            counts.received.to_string(),
        ];
        table.row(cells.into_iter().take(shown));
    }
    if table.is_empty() {
        anstream::println!("no connection has been seen yet");
        return;
    }
    table.print();
    anstream::println!();
    anstream::println!("{}", summary(edges));
    for (edge, _) in edges.iter().filter(|(_, counts)| counts.refused_by_strict) {
        anstream::println!(
            "strict would refuse: {} → {}:{} ({})",
            edge.source,
            edge.destination,
            edge.port,
            edge.reason
        );
    }
}

fn summary(edges: &BTreeMap<Edge, Counts>) -> String {
    let of = |security: &str| -> u64 {
        edges.iter().filter(|(edge, _)| edge.security == security).map(|(_, counts)| counts.open + counts.ended).sum()
    };
    let (mtls, plaintext, none) = (of("mtls"), of("plaintext"), of("none"));
    format!("{mtls} connections with mTLS, {plaintext} in clear, {none} that came to nothing")
}

/// The names of pods by their addresses. A pod in the host's network has its node's address, and is not told by it.
fn names(pods: &[Pod]) -> BTreeMap<IpAddr, String> {
    let own = pods.iter().filter(|pod| pod.spec.as_ref().and_then(|spec| spec.host_network) != Some(true));
    own.flat_map(|pod| {
        let addresses = pod.status.iter().flat_map(|status| status.pod_ips.iter().flatten());
        addresses.filter_map(|address| Some((address.ip.parse().ok()?, title(pod))))
    })
    .collect()
}

fn title(pod: &Pod) -> String {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    format!("{}/{}", text(&pod.metadata.namespace), text(&pod.metadata.name))
}

/// What stands behind pods: their Deployment and the like, by their names.
fn workloads(pods: &[Pod]) -> BTreeMap<String, String> {
    let owner = |pod: &Pod| {
        let owners = pod.metadata.owner_references.iter().flatten();
        let owner = owners.clone().find(|owner| owner.controller == Some(true))?;
        let hash = pod.metadata.labels.as_ref().and_then(|labels| labels.get("pod-template-hash"));
        let name = match hash {
            Some(hash) if owner.kind == "ReplicaSet" => {
                owner.name.strip_suffix(&format!("-{hash}")).unwrap_or(&owner.name)
            }
            _ => &owner.name,
        };
        Some((title(pod), format!("{}/{name}", pod.metadata.namespace.as_deref().unwrap_or_default())))
    };
    pods.iter().filter_map(owner).collect()
}

/// All edges of all nodes, each once, with names for addresses where there are.
fn merge(pages: &BTreeMap<String, NodePages>, names: &BTreeMap<IpAddr, String>) -> BTreeMap<Edge, Counts> {
    let mut seen: BTreeMap<(Edge, bool), Counts> = BTreeMap::new();
    for pages in pages.values() {
        let ended = pages.page(Process::Proxy, "/coverage").as_array().into_iter().flatten().map(ended);
        let open = pages.page(Process::Proxy, "/connections").as_array().into_iter().flatten().filter_map(open);
        for (mut edge, inbound, mut counts) in ended.chain(open) {
            for end in [&mut edge.source, &mut edge.destination] {
                if let Some(name) = end.parse().ok().and_then(|address: IpAddr| names.get(&address)) {
                    end.clone_from(name);
                }
            }
            counts.refused_by_strict =
                inbound && edge.security == "plaintext" && !TAKEN_BY_STRICT.contains(&edge.reason.as_str());
            seen.entry((edge, inbound)).or_default().add(counts);
        }
    }
    let mut edges: BTreeMap<Edge, Counts> = BTreeMap::new();
    for ((edge, _), counts) in seen {
        let known = edges.entry(edge).or_default();
        *known = known.of_both_ends(counts);
    }
    edges
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// An edge of `/coverage`, and whether this node is the server's.
fn ended(entry: &Value) -> (Edge, bool, Counts) {
    let (edge, counts) = (&entry["edge"], &entry["counts"]);
    let number = |name: &str| counts[name].as_u64().unwrap_or(0);
    let counts = Counts {
        ended: number("connections"),
        sent: number("sent"),
        received: number("received"),
        last_seen: number("last_seen"),
        ..Counts::default()
    };
    let inbound = edge["direction"] == "inbound";
    let edge = Edge {
        source: text(&edge["source"]),
        destination: text(&edge["destination"]),
        port: edge["port"].as_u64().unwrap_or(0),
        security: text(&edge["security"]),
        reason: text(&edge["reason"]),
    };
    (edge, inbound, counts)
}

/// A connection of `/connections` that was decided, as an edge.
fn open(entry: &Value) -> Option<(Edge, bool, Counts)> {
    let address = |field: &str| entry[field].as_str().and_then(|text| text.parse::<std::net::SocketAddr>().ok());
    let (to, from) = (address("to")?, address("source"));
    let inbound = entry["direction"] == "inbound";
    let pod = text(&entry["pod"]);
    let other = entry["other"].as_str().map(str::to_owned);
    let (source, destination) = match inbound {
        true => (other.or_else(|| Some(from?.ip().to_string()))?, pod),
        false => (pod, other.unwrap_or_else(|| to.ip().to_string())),
    };
    let number = |name: &str| entry[name].as_u64().unwrap_or(0);
    let counts = Counts { open: 1, sent: number("sent"), received: number("received"), ..Counts::default() };
    let edge = Edge {
        source,
        destination,
        port: to.port().into(),
        security: text(&entry["security"]),
        reason: text(&entry["reason"]),
    };
    Some((edge, inbound, counts))
}

/// The same, with workloads in the place of their pods.
fn by_workload(edges: BTreeMap<Edge, Counts>, workloads: &BTreeMap<String, String>) -> BTreeMap<Edge, Counts> {
    let mut summed: BTreeMap<Edge, Counts> = BTreeMap::new();
    for (mut edge, counts) in edges {
        for end in [&mut edge.source, &mut edge.destination] {
            if let Some(workload) = workloads.get(end.as_str()) {
                end.clone_from(workload);
            }
        }
        summed.entry(edge).or_default().add(counts);
    }
    summed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edge(direction: &str, source: &str, destination: &str, security: &str, reason: &str, connections: u64) -> Value {
        json!({
            "edge": { "direction": direction, "source": source, "destination": destination, "port": 8080, "security": security, "reason": reason },
            "counts": { "connections": connections, "sent": 10, "received": 20, "last_seen": 5 },
        })
    }

    fn node(coverage: Value, connections: Value) -> NodePages {
        NodePages::told("x", &[(Process::Proxy, "/coverage", coverage), (Process::Proxy, "/connections", connections)])
    }

    fn pod(name: &str, owner: &str, hash: &str, address: &str) -> Pod {
        serde_json::from_value(json!({
            "metadata": {
                "name": name, "namespace": "shop", "labels": { "pod-template-hash": hash },
                "ownerReferences": [{ "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": owner, "uid": "u", "controller": true }],
            },
            "spec": { "containers": [] },
            "status": { "podIPs": [{ "ip": address }] },
        }))
        .unwrap()
    }

    #[test]
    fn what_both_ends_saw_is_counted_once_and_addresses_get_their_names() {
        let pages = BTreeMap::from([
            (
                "a".to_owned(),
                node(json!([edge("outbound", "shop/client-1-x", "shop/web-1-y", "mtls", "", 7)]), json!([])),
            ),
            ("b".to_owned(), node(json!([edge("inbound", "10.0.0.1", "shop/web-1-y", "mtls", "", 6)]), json!([]))),
        ]);
        let pods = [pod("client-1-x", "client-1", "1", "10.0.0.1"), pod("web-1-y", "web-1", "1", "10.0.1.1")];
        let edges = merge(&pages, &names(&pods));
        let [(seen, counts)] = &edges.iter().collect::<Vec<_>>()[..] else { panic!("{edges:?}") };
        assert_eq!(
            (&*seen.source, &*seen.destination, counts.ended, counts.sent),
            ("shop/client-1-x", "shop/web-1-y", 7, 10)
        );
        let summed = by_workload(edges.clone(), &workloads(&pods));
        let (workload, _) = summed.first_key_value().unwrap();
        assert_eq!((&*workload.source, &*workload.destination), ("shop/client", "shop/web"));
        assert_eq!(summary(&edges), "7 connections with mTLS, 0 in clear, 0 that came to nothing");
    }

    #[test]
    fn that_no_node_says_anything_is_no_answer() {
        let (a, b) = ("a".to_owned(), "b".to_owned());
        let pages = BTreeMap::from([(a.clone(), NodePages::default()), (b.clone(), NodePages::default())]);
        assert!(nobody(&BTreeMap::new(), &[]).unwrap().contains("no node has a pod"));
        let sentence = nobody(&pages, &[(&a, "refused"), (&b, "refused")]).unwrap();
        assert_eq!(sentence, "no node says what it saw, 2 of them; node a: refused");
        assert_eq!(nobody(&pages, &[(&a, "refused")]), None);
    }

    #[test]
    fn open_connections_count_beside_those_that_have_ended() {
        let connection = json!({ "direction": "outbound", "pod": "shop/client", "source": "10.0.0.1:40000", "to": "10.0.1.1:8080",
            "other": "shop/web", "security": "mtls", "reason": "", "sent": 1, "received": 2 });
        let undecided =
            json!({ "direction": "outbound", "pod": "shop/client", "source": "10.0.0.1:40001", "to": null });
        let coverage = json!([edge("outbound", "shop/client", "shop/web", "mtls", "", 3)]);
        let edges = merge(
            &BTreeMap::from([("a".to_owned(), node(coverage, json!([connection, undecided])))]),
            &BTreeMap::new(),
        );
        let counts: Vec<_> = edges.values().map(|counts| (counts.open, counts.ended)).collect();
        assert_eq!(counts, [(1, 3)]);
    }

    #[test]
    fn strict_would_refuse_what_came_in_clear_to_a_captured_pod_and_nothing_else() {
        let coverage = json!([
            edge("inbound", "legacy/old", "shop/web", "plaintext", "opted-out", 1),
            edge("inbound", "10.9.9.9", "shop/web", "plaintext", "probe", 1),
            edge("inbound", "10.9.9.9", "shop/web", "plaintext", "api-server", 1),
            edge("outbound", "shop/client", "192.0.2.1", "plaintext", "outside", 1),
            edge("inbound", "shop/client", "shop/web", "mtls", "", 1),
        ]);
        let edges = merge(&BTreeMap::from([("a".to_owned(), node(coverage, json!([])))]), &BTreeMap::new());
        let refused: Vec<_> =
            edges.iter().filter(|(_, counts)| counts.refused_by_strict).map(|(edge, _)| &*edge.source).collect();
        assert_eq!(refused, ["legacy/old"]);
    }
}
