//! When a cluster is up: asked of its API server, as any user would.

use super::components::PROGRAMS;
use super::images::MACHINE;
use super::layout::{Cluster, Node};
use super::life::wait_until;
use super::{init, node};
use crate::process::succeeds_with_input;
use anyhow::{Result, bail, ensure};
use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::Duration;

const SYSTEM: &str = include_str!("../../cluster/system.yaml");

/// How long any one step may take. Each takes a second or two; this is for a machine that does much else.
const STEP: Duration = Duration::from_secs(180);

/// A program that ended so often is not waiting for another one to start, but broken.
const ENDS: usize = 8;

const LAST_LINES: usize = 15;

/// Waits until nodes, DNS and the default service account are there; makes what is missing on the way.
pub(super) fn wait(cluster: &Cluster) -> Result<()> {
    until(cluster, "the API server is ready", || asked(cluster, &["get", "--raw", "/readyz"]).is_some())?;
    let system = SYSTEM.replace("IMAGE", MACHINE).replace("PROGRAMS", PROGRAMS);
    until(cluster, "the system's objects are applied", || apply(cluster, &system).is_ok_and(|applied| applied))?;
    for node in Node::ALL {
        let known = ["get", "node", node.name(), "-o", "name"];
        until(cluster, "both nodes are registered", || asked(cluster, &known).is_some())?;
        describe(cluster, node)?;
    }
    until(cluster, "both nodes are Ready", || {
        let path = "jsonpath={.items[*].status.conditions[?(@.type=='Ready')].status}";
        asked(cluster, &["get", "nodes", "-o", path]).is_some_and(|states| states == "True True")
    })?;
    until(cluster, "the default service account is there", || {
        asked(cluster, &["get", "serviceaccount", "default", "-o", "name"]).is_some()
    })?;
    until(cluster, "CoreDNS is ready", || {
        let path = "jsonpath={.status.readyReplicas}";
        asked(cluster, &["-n", "kube-system", "get", "deployment", "coredns", "-o", path])
            .is_some_and(|count| count == "1")
    })
}

/// Says of a node what kubelet may not say of itself, and which pods it has: their ranges are fixed here, since the
/// plugins of both nodes are written before there is an API server.
fn describe(cluster: &Cluster, node: Node) -> Result<()> {
    let pods = node.pods();
    let mut patch = serde_json::json!({"spec": {"podCIDR": pods[0], "podCIDRs": pods}});
    if node == Node::A {
        patch["metadata"]["labels"]["node-role.kubernetes.io/control-plane"] = "".into();
    }
    let patch = patch.to_string();
    let arguments = ["patch", "node", node.name(), "--type=merge", "-p", &patch];
    until(cluster, "both nodes have their ranges of pods", || asked(cluster, &arguments).is_some())
}

/// Waits for one thing; on failure says which program is at fault and what it said last.
fn until(cluster: &Cluster, what: &str, mut holds: impl FnMut() -> bool) -> Result<()> {
    let held = wait_until(STEP, || {
        for node in Node::ALL {
            check_node(cluster, node)?;
        }
        Ok(holds())
    })?;
    ensure!(
        held,
        "after {} s it is not so that {what}; the logs are below {}",
        STEP.as_secs(),
        cluster.folder.join("nodes").display()
    );
    Ok(())
}

/// An error if the node gave up, or if one of its programs ends again and again.
fn check_node(cluster: &Cluster, node: Node) -> Result<()> {
    if node::life(cluster, node).is_none() {
        bail!("node {} gave up; it said last:\n{}", node.name(), tail(cluster, node, init::LOG));
    }
    let ended = std::fs::read_to_string(cluster.logs(node).join(init::ENDED)).unwrap_or_default();
    let mut counts: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
    for (name, how) in ended.lines().filter_map(|line| line.split_once(' ')) {
        let count = counts.entry(name).or_default();
        *count = (count.0 + 1, how);
    }
    if let Some((name, (count, how))) = counts.into_iter().find(|(_, (count, _))| *count >= ENDS) {
        let log = tail(cluster, node, &format!("{name}.log"));
        bail!("{name} on node {} ended {count} times ({how}); it said last:\n{log}", node.name());
    }
    Ok(())
}

fn tail(cluster: &Cluster, node: Node, log: &str) -> String {
    let file = cluster.logs(node).join(log);
    let text = std::fs::read(&file).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let last = lines[lines.len().saturating_sub(LAST_LINES)..].join("\n");
    format!("{last}\n(from {})", file.display())
}

/// What kubectl prints; `None` if it fails, as it does until the cluster is up.
fn asked(cluster: &Cluster, arguments: &[&str]) -> Option<String> {
    let output = kubectl(cluster).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn apply(cluster: &Cluster, objects: &str) -> Result<bool> {
    let mut apply = kubectl(cluster);
    apply.args(["apply", "--server-side", "--force-conflicts", "-f", "-"]).stdout(Stdio::null()).stderr(Stdio::null());
    succeeds_with_input(&mut apply, objects)
}

fn kubectl(cluster: &Cluster) -> Command {
    let mut command = Command::new(cluster.programs().join("kubectl"));
    command
        .arg("--request-timeout=5s")
        .arg("--kubeconfig")
        .arg(cluster.kubeconfig())
        .env("HOME", &cluster.folder)
        .stdin(Stdio::null());
    command
}
