//! What is checked of nodes and pods, as pure functions of what their processes say.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::jiff::{Timestamp, Unit};
use serde_json::Value;

use super::finding::{Finding, all_or, failed, ok, warning};
use super::ids::Id;
use crate::cluster::is_refusal;
use crate::leaving;
use crate::pages::{NodePages, Process};
use crate::status::PodRow;
use crate::table::some;
use crate::values::VERSION;

/// The pages that are asked for.
pub(super) const PAGES: &[(Process, &str)] = &[
    (Process::Agent, "/readyz"),
    (Process::Agent, "/plugin"),
    (Process::Agent, "/pods"),
    (Process::Proxy, "/readyz"),
    (Process::Proxy, "/certificates"),
    (Process::Proxy, "/workloads"),
];

/// Whether all nodes run one version, and it is ours.
pub(super) fn versions(pods: &[Pod]) -> Vec<Finding> {
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for pod in pods.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()) {
        let labels = pod.metadata.labels.as_ref();
        let version = labels.and_then(|labels| labels.get("app.kubernetes.io/version")).cloned().unwrap_or_default();
        let node =
            pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_else(|| "no node yet".to_owned());
        found.entry(version).or_default().push(node);
    }
    let wrong: Vec<_> = found
        .iter()
        .filter(|(version, _)| *version != VERSION)
        .map(|(version, nodes)| {
            warning(Id::NodeVersions, format!("version {version} on {}, and this is {VERSION}", some(nodes)))
        })
        .collect();
    if found.is_empty() {
        return vec![failed(Id::NodeVersions, "no node has a pod of justmtls")];
    }
    all_or(Id::NodeVersions, wrong, format!("all nodes run {VERSION}"))
}

/// The names of the nodes that can have a pod of ours: those with another system cannot.
fn with_linux(nodes: &[Node]) -> BTreeSet<&str> {
    let linux = nodes.iter().filter(|node| {
        let labels = node.metadata.labels.as_ref();
        labels.and_then(|labels| labels.get("kubernetes.io/os")).is_none_or(|os| os == "linux")
    });
    linux.filter_map(|node| node.metadata.name.as_deref()).collect()
}

/// The nodes of which nothing at all can be heard, and why: one cause is to have one line, and not one in each check.
pub(super) fn silent(nodes: &[Node], pages: &BTreeMap<String, NodePages>) -> BTreeMap<String, String> {
    let none = NodePages::default();
    let why = |name: &str| {
        let pages = pages.get(name).unwrap_or(&none);
        let failures: Option<Vec<&str>> = PAGES.iter().map(|(process, name)| pages.failure(*process, name)).collect();
        failures?.first().map(|why| (*why).to_owned())
    };
    with_linux(nodes).into_iter().filter_map(|name| Some((name.to_owned(), why(name)?))).collect()
}

/// Agents, proxies, plugins, roots and certificates of all nodes but the silent ones, which are named.
pub(super) fn of_pages(
    nodes: &[Node],
    pages: &BTreeMap<String, NodePages>,
    silent: &BTreeMap<String, String>,
) -> Vec<Finding> {
    let names = with_linux(nodes);
    if names.is_empty() {
        return vec![failed(Id::NodeAgents, "the cluster has no node with Linux")];
    }
    let all: Vec<(&str, &NodePages)> = pages
        .iter()
        .map(|(name, pages)| (name.as_str(), pages))
        .filter(|(name, _)| names.contains(name) && !silent.contains_key(*name))
        .collect();
    let (refused, mute): (Vec<_>, Vec<_>) = silent.iter().partition(|(_, why)| is_refusal(why));
    let mut findings: Vec<_> =
        mute.iter().map(|(node, why)| failed(Id::NodeAgents, format!("{node}: {why}"))).collect();
    // What whoever checks may not do is the same on each.
    if let Some((_, why)) = refused.first() {
        findings.push(failed(Id::NodeAgents, format!("{} nodes cannot be asked: {why}", refused.len())));
    }
    if all.is_empty() {
        return findings;
    }
    let each = |id, judge: &dyn Fn(&NodePages) -> Result<(), String>, right: &str| {
        let wrong = all.iter().filter_map(|(node, pages)| Some(failed(id, format!("{node}: {}", judge(pages).err()?))));
        all_or(id, wrong.collect(), right)
    };
    let agents = each(
        Id::NodeAgents,
        &|pages| ready(pages, Process::Agent),
        "every agent that answers has its pods and captures new ones",
    );
    findings.extend(agents);
    findings.extend(each(
        Id::NodeProxies,
        &|pages| ready(pages, Process::Proxy),
        "every proxy that answers has a current view and serves its pods",
    ));
    findings.extend(each(Id::NodePlugins, &plugin, "the CNI plugin is in place on every node that answers"));
    findings.extend(roots(&all));
    findings.extend(certificates(&all));
    findings.push(api_servers(&all));
    findings
}

/// From where proxies take calls to be the API server's.
fn api_servers(all: &[(&str, &NodePages)]) -> Finding {
    let settings = all.iter().map(|(_, pages)| &pages.page(Process::Proxy, "/workloads")["settings"]);
    let named = settings.flat_map(|settings| settings["api_servers"].as_array().into_iter().flatten());
    // An address alone is shown without the length of its range.
    let alone = |text: &str| text.strip_suffix("/32").or(text.strip_suffix("/128")).unwrap_or(text).to_owned();
    let named: BTreeSet<String> = named.filter_map(|address| address.as_str().map(alone)).collect();
    if named.is_empty() {
        let message = "no address of an API server is known: strict refuses its calls of webhooks and aggregated APIs";
        return warning(Id::ApiServers, message);
    }
    let named: Vec<_> = named.into_iter().collect();
    ok(Id::ApiServers, format!("webhooks and aggregated APIs are called from {}", some(&named)))
}

/// A page, or why it is not there.
fn page<'a>(pages: &'a NodePages, process: Process, name: &'static str) -> Result<&'a Value, String> {
    match pages.failure(process, name) {
        Some(why) => Err(why.to_owned()),
        None => Ok(pages.page(process, name)),
    }
}

fn ready(pages: &NodePages, process: Process) -> Result<(), String> {
    let said = page(pages, process, "/readyz")?;
    // One that was ready once stays it; pods that it does not know yet it cannot find.
    let runtime = said["runtime_failure"].as_str();
    if said["ready"] == true {
        return runtime.map_or(Ok(()), |why| Err(format!("the container runtime does not answer: {why}")));
    }
    // What is false, and which lists are not empty, is what is missing.
    let fields = said.as_object().into_iter().flatten();
    let missing: Vec<_> = fields
        .filter_map(|(name, value)| match value {
            // An agent that has none to wait for, or waits for none, lacks nothing.
            Value::Bool(false) if !["ready", "inherited", "stands_by"].contains(&name.as_str()) => {
                Some(format!("no {name}"))
            }
            Value::Array(list) if !list.is_empty() => Some(format!("{name}: {}", names(list))),
            Value::String(why) => Some(why.clone()),
            _ => None,
        })
        .collect();
    Err(if missing.is_empty() { "is not ready".to_owned() } else { format!("is not ready ({})", missing.join(", ")) })
}

fn plugin(pages: &NodePages) -> Result<(), String> {
    let said = page(pages, Process::Agent, "/plugin")?;
    if said["installed"] == true {
        return Ok(());
    }
    let text = |field: &str| said[field].as_str().unwrap_or_default();
    let error = if text("error").is_empty() { String::new() } else { format!(": {}", text("error")) };
    Err(format!("the CNI plugin is not in place ({}){error}", text("state")))
}

/// Whether all proxies trust the same roots.
fn roots(all: &[(&str, &NodePages)]) -> Vec<Finding> {
    let mut by_digest: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let mut wrong = Vec::new();
    for (node, pages) in all {
        match page(pages, Process::Proxy, "/certificates") {
            Ok(said) => match said["bundle"]["digest"].as_str() {
                Some(digest) => by_digest.entry(digest).or_default().push((*node).to_owned()),
                None => wrong.push(failed(Id::NodeRoots, format!("{node}: its proxy has no roots"))),
            },
            Err(why) => wrong.push(failed(Id::NodeRoots, format!("{node}: {why}"))),
        }
    }
    if by_digest.len() > 1 {
        let mut groups: Vec<_> = by_digest.values().collect();
        groups.sort_by_key(|nodes| nodes.len());
        let few: Vec<_> = groups[..groups.len() - 1].iter().flat_map(|nodes| nodes.iter().cloned()).collect();
        wrong.push(warning(Id::NodeRoots, format!("{} have other roots than the rest", some(&few))));
    }
    all_or(Id::NodeRoots, wrong, "every proxy that answers trusts the same roots")
}

/// Whether each certificate is valid.
fn certificates(all: &[(&str, &NodePages)]) -> Vec<Finding> {
    let (mut count, mut wrong) = (0, Vec::new());
    for (node, pages) in all {
        let said = match page(pages, Process::Proxy, "/certificates") {
            Ok(said) => said,
            Err(why) => {
                wrong.push(failed(Id::NodeCertificates, format!("{node}: {why}")));
                continue;
            }
        };
        for svid in said["svids"].as_array().into_iter().flatten() {
            count += 1;
            if svid["valid"] != true {
                let identity = svid["identity"].as_str().unwrap_or_default();
                wrong.push(failed(Id::NodeCertificates, format!("{node}: the certificate of {identity} is not valid")));
            }
        }
    }
    all_or(Id::NodeCertificates, wrong, format!("{count} certificates are valid"))
}

/// After how many minutes a pod that has a node and does not start is worth a warning: images take their time.
const LONG_START: f64 = 5.0;

/// Whether each pod that is to be captured is, and each pod starts. Those of silent nodes are counted.
pub(super) fn captures(rows: &[PodRow], silent: &BTreeMap<String, String>, now: Timestamp) -> Vec<Finding> {
    let (unheard, amiss): (Vec<_>, Vec<_>) =
        rows.iter().filter(|row| row.is_amiss()).partition(|row| silent.contains_key(&row.node));
    let mut by_node: BTreeMap<&str, usize> = BTreeMap::new();
    unheard.iter().for_each(|row| *by_node.entry(&row.node).or_default() += 1);
    let unheard = by_node.iter().map(|(node, count)| {
        failed(Id::PodsCaptured, format!("{node}: nobody says whether its pods are captured, {count} of them"))
    });
    let amiss = amiss.iter().map(|row| {
        let reason = row.reason.as_deref().unwrap_or("no reason is known");
        failed(Id::PodsCaptured, format!("{}/{} on {}: {} ({reason})", row.namespace, row.name, row.node, row.capture))
    });
    let long = rows.iter().filter_map(|row| {
        let minutes = row.starting_since?.until(now).ok()?.total(Unit::Minute).ok()?;
        let hint = format!("`kubectl -n {} describe pod {}` says why", row.namespace, row.name);
        (minutes >= LONG_START).then(|| {
            let pod = format!("{}/{} on {}", row.namespace, row.name, row.node);
            warning(Id::PodsCaptured, format!("{pod} has been starting for {minutes:.0} minutes; {hint}"))
        })
    });
    let wrong: Vec<_> = unheard.chain(amiss).chain(long).collect();
    let count = |state: &str| rows.iter().filter(|row| row.capture == state).count();
    let (captured, out, starting) = (count("captured"), count("not-captured"), count("starting"));
    let left =
        rows.iter().filter(|row| row.capture == "not-captured" && row.reason.as_deref() == Some(leaving::REASON));
    let left = left.count();
    let mut counts =
        format!("{captured} pods are captured, {} are left out by name, {starting} are starting", out - left);
    for (count, what) in [
        (left, "have left the mesh, which is being uninstalled"),
        (count("leaving"), "leave and are held by what they have open"),
        (count("ending"), "are ending"),
    ] {
        if count > 0 {
            counts.push_str(&format!(", {count} {what}"));
        }
    }
    all_or(Id::PodsCaptured, wrong, counts)
}

fn names(list: &[Value]) -> String {
    let names: Vec<_> = list.iter().map(|name| name.as_str().map_or_else(|| name.to_string(), str::to_owned)).collect();
    some(&names)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::finding::State;
    use super::*;

    fn node(name: &str) -> Node {
        serde_json::from_value(json!({ "metadata": { "name": name } })).unwrap()
    }

    fn good() -> Vec<(Process, &'static str, Value)> {
        vec![
            (Process::Agent, "/readyz", json!({ "ready": true })),
            (Process::Agent, "/plugin", json!({ "installed": true, "state": "in-place" })),
            (Process::Agent, "/pods", json!([])),
            (Process::Proxy, "/readyz", json!({ "ready": true })),
            (
                Process::Proxy,
                "/certificates",
                json!({ "bundle": { "digest": "d" }, "svids": [{ "valid": true, "identity": "x" }] }),
            ),
            (Process::Proxy, "/workloads", json!({ "settings": { "api_servers": ["10.0.0.1/32", "10.1.0.0/16"] } })),
        ]
    }

    fn with(process: Process, page: &'static str, said: Value) -> NodePages {
        let pages: Vec<_> = good()
            .into_iter()
            .map(
                |(p, name, value)| {
                    if (p, name) == (process, page) { (p, name, said.clone()) } else { (p, name, value) }
                },
            )
            .collect();
        NodePages::told("pod", &pages)
    }

    fn wrong(pages: NodePages) -> Vec<(Id, State, String)> {
        let pages = BTreeMap::from([("a".to_owned(), NodePages::told("pod", &good())), ("b".to_owned(), pages)]);
        let nodes = [node("a"), node("b")];
        let findings = of_pages(&nodes, &pages, &silent(&nodes, &pages));
        findings.into_iter().filter(|it| it.state != State::Ok).map(|it| (it.id, it.state, it.message)).collect()
    }

    #[test]
    fn a_node_on_which_all_is_well_has_no_fault() {
        assert_eq!(wrong(NodePages::told("pod", &good())), []);
    }

    #[test]
    fn each_fault_of_a_node_is_named_with_the_node() {
        let cases = [
            (
                with(Process::Agent, "/readyz", json!({ "ready": false, "proxy": false, "pending": ["shop/web"] })),
                Id::NodeAgents,
                "no proxy",
            ),
            (
                with(Process::Agent, "/readyz", json!({ "ready": false, "runtime_failure": "no runtime at /run/x" })),
                Id::NodeAgents,
                "is not ready (no runtime at /run/x)",
            ),
            (
                with(Process::Agent, "/readyz", json!({ "ready": true, "runtime_failure": "it is gone" })),
                Id::NodeAgents,
                "the container runtime does not answer: it is gone",
            ),
            (with(Process::Proxy, "/readyz", json!({ "ready": false, "view": false })), Id::NodeProxies, "no view"),
            (
                with(
                    Process::Agent,
                    "/plugin",
                    json!({ "installed": false, "state": "no-primary", "error": "no file" }),
                ),
                Id::NodePlugins,
                "no file",
            ),
            (with(Process::Proxy, "/certificates", json!({ "bundle": null, "svids": [] })), Id::NodeRoots, "no roots"),
            (
                with(
                    Process::Proxy,
                    "/certificates",
                    json!({ "bundle": { "digest": "d" }, "svids": [{ "valid": false, "identity": "spiffe://x" }] }),
                ),
                Id::NodeCertificates,
                "spiffe://x",
            ),
        ];
        for (pages, id, word) in cases {
            let found = wrong(pages);
            let [(found, state, message)] = &found[..] else { panic!("{found:?}") };
            assert_eq!((*found, *state), (id, State::Failed));
            assert!(message.starts_with("b: ") && message.contains(word), "{message}");
        }
        let other = with(Process::Proxy, "/certificates", json!({ "bundle": { "digest": "e" }, "svids": [] }));
        assert_eq!(wrong(other)[0].1, State::Warning);
        // One cause has one line.
        let [(id, state, message)] = &wrong(NodePages::default())[..] else { panic!("one line") };
        assert!(
            (*id, *state) == (Id::NodeAgents, State::Failed) && message.starts_with("b: there is no pod"),
            "{message}"
        );
    }

    #[test]
    fn from_where_api_servers_call_is_shown_and_that_nobody_knows_is_a_warning() {
        let of = |pages: &NodePages| api_servers(&[("a", pages)]);
        let known = of(&NodePages::told("pod", &good()));
        assert_eq!(known.state, State::Ok);
        assert!(known.message.ends_with("are called from 10.0.0.1, 10.1.0.0/16"), "{}", known.message);
        let nobody = with(Process::Proxy, "/workloads", json!({ "settings": { "api_servers": [] } }));
        assert_eq!(of(&nobody).state, State::Warning);
    }

    #[test]
    fn versions_that_differ_are_a_warning_with_their_nodes() {
        let pod = |version: &str, node: &str| -> Pod {
            serde_json::from_value(json!({
                "metadata": { "name": "x", "labels": { "app.kubernetes.io/version": version } }, "spec": { "nodeName": node, "containers": [] },
            }))
            .unwrap()
        };
        assert_eq!(versions(&[pod(VERSION, "a")])[0].state, State::Ok);
        // No pod is no agreement.
        assert_eq!(versions(&[])[0].state, State::Failed);
        assert_eq!(of_pages(&[], &BTreeMap::new(), &BTreeMap::new())[0].state, State::Failed);
        let [one] = &versions(&[pod(VERSION, "a"), pod("0.0.1", "b")])[..] else { panic!("one") };
        assert!(one.state == State::Warning && one.message.contains("0.0.1 on b"), "{one:?}");
    }

    #[test]
    fn nodes_that_whoever_checks_may_not_ask_are_one_line() {
        let why =
            crate::cluster::of_status(403, "pods \"x\" is forbidden: User \"a\" cannot create resource \"pods/exec\"");
        let silent = BTreeMap::from(["a", "b"].map(|node| (node.to_owned(), why.clone())));
        let found = of_pages(&[node("a"), node("b")], &BTreeMap::new(), &silent);
        let [one] = &found[..] else { panic!("{found:?}") };
        assert!(
            one.message.starts_with("2 nodes cannot be asked: ") && one.message.contains("pods/exec"),
            "{}",
            one.message
        );
    }

    #[test]
    fn pods_that_have_left_a_mesh_that_is_uninstalled_are_not_left_out_by_name() {
        let mut gone = row("a", "not-captured");
        gone.reason = Some(leaving::REASON.to_owned());
        let found = captures(&[gone, row("b", "not-captured")], &BTreeMap::new(), Timestamp::UNIX_EPOCH);
        let said = "0 pods are captured, 1 are left out by name, 0 are starting, 1 have left the mesh, which is being uninstalled";
        assert_eq!((found.len(), &*found[0].message), (1, said));
    }

    fn row(name: &str, capture: &str) -> PodRow {
        PodRow {
            namespace: "shop".to_owned(),
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            node: "a".to_owned(),
            identity: None,
            capture: capture.to_owned(),
            reason: None,
            mode: None,
            starting_since: None,
        }
    }

    #[test]
    fn a_pod_that_is_not_captured_and_should_be_fails_by_name() {
        assert_eq!(
            captures(
                &[row("a", "captured"), row("b", "not-captured"), row("c", "starting")],
                &BTreeMap::new(),
                Timestamp::UNIX_EPOCH
            )[0]
            .state,
            State::Ok
        );
        let mut starting = row("c", "starting");
        starting.starting_since = Some(Timestamp::UNIX_EPOCH);
        let after = |minutes: i64| Timestamp::from_second(minutes * 60).unwrap();
        assert_eq!(captures(std::slice::from_ref(&starting), &BTreeMap::new(), after(4))[0].state, State::Ok);
        let found = captures(&[starting], &BTreeMap::new(), after(7));
        assert!(
            found[0].state == State::Warning && found[0].message.contains("shop/c on a has been starting for 7 min")
        );
        // What is well with others is no news where something is not.
        let found = captures(&[row("a", "captured"), row("b", "failed")], &BTreeMap::new(), Timestamp::UNIX_EPOCH);
        assert_eq!((found[0].state, found.len()), (State::Failed, 1));
        assert!(found[0].message.contains("shop/b on a"));
        let silent = BTreeMap::from([("a".to_owned(), "why".to_owned())]);
        let found = captures(
            &[row("a", "unknown"), row("b", "unknown"), row("c", "not-captured")],
            &silent,
            Timestamp::UNIX_EPOCH,
        );
        assert_eq!((found[0].state, found.len()), (State::Failed, 1));
        assert!(found[0].message.starts_with("a: ") && found[0].message.ends_with("2 of them"), "{}", found[0].message);
    }
}
