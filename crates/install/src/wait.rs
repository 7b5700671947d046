//! Waiting for a workload to be ready, with progress, and with what holds it up when time is over.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::bail;
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::{Event, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::Value;

use crate::cluster::Cluster;
use crate::hang::{Hang, hangs, log_path, telling_line};
use crate::looks::Looks;
use crate::objects::{NAME, NAMESPACE};

/// How often is looked.
pub(crate) const LOOK: Duration = Duration::from_millis(500);
/// For how long something may not be ready before it is said what holds it up.
const BE_QUIET: Duration = Duration::from_secs(10);

/// How far a workload is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Progress {
    /// Pods of the newest version that are ready.
    ready: u64,
    /// Pods that there are to be.
    wanted: u64,
    /// Pods of a Deployment's versions before that are there still, and serve.
    older: u64,
    /// What is said here is about the newest version.
    current: bool,
}

impl Progress {
    /// How far a Deployment (`deployments`) or DaemonSet (`daemonsets`) is; `None` where there is none.
    ///
    /// # Errors
    /// The API server does not say.
    pub(crate) async fn look(cluster: &Cluster, resource: &str, name: &str) -> anyhow::Result<Option<Self>> {
        let object = cluster.get(&format!("/apis/apps/v1/namespaces/{NAMESPACE}/{resource}/{name}")).await?;
        let Some(object) = object else { return Ok(None) };
        let (mut pods, mut revisions) = (Vec::new(), Vec::new());
        if resource == "daemonsets" {
            (pods, revisions) = (pods_of(cluster, name).await?, revisions_of(cluster, name).await?);
        }
        Ok(Some(Self::of(&object, &revisions, &pods)))
    }

    /// From the object of a Deployment or DaemonSet, and the revisions and pods of the latter: of a node's two pods its status counts
    /// the older one, which ends for as long as connections are open, and not the one that serves.
    fn of(object: &Value, revisions: &[ControllerRevision], pods: &[Pod]) -> Self {
        let status = &object["status"];
        let number = |name: &str| status[name].as_u64().unwrap_or(0);
        let seen = status["observedGeneration"].as_u64();
        let current = seen.is_some() && seen >= object["metadata"]["generation"].as_u64();
        if object["kind"] == "DaemonSet" {
            // One that is taken back to is the newest again.
            let newest = revisions.iter().max_by_key(|it| it.revision).and_then(|it| hash(&it.metadata));
            let nodes: BTreeSet<_> = pods.iter().filter_map(|pod| ready_node(pod, newest?)).collect();
            Self { ready: nodes.len() as u64, wanted: number("desiredNumberScheduled"), older: 0, current }
        } else {
            let wanted = object["spec"]["replicas"].as_u64().unwrap_or(1);
            let (updated, available) = (number("updatedReplicas"), number("availableReplicas"));
            // Which pods are available is not said: those of the version before are, as a roll-out begins with them.
            let older = number("replicas").saturating_sub(updated).min(available);
            Self { ready: (available - older).min(updated), wanted, older, current }
        }
    }

    /// Whether there is nothing to wait for.
    pub(crate) fn is_done(self) -> bool {
        self.current && self.wanted > 0 && self.ready >= self.wanted && self.older == 0
    }
}

impl std::fmt::Display for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {} ready", self.ready.min(self.wanted), self.wanted)?;
        match self.older {
            0 => Ok(()),
            older => write!(f, ", and {older} of the version before"),
        }
    }
}

/// Of which revision of its DaemonSet something is.
fn hash(metadata: &ObjectMeta) -> Option<&str> {
    metadata.labels.as_ref()?.get("controller-revision-hash").map(String::as_str)
}

/// The node of a DaemonSet's pod that is of this revision, is ready and does not end.
fn ready_node<'a>(pod: &'a Pod, revision: &str) -> Option<&'a str> {
    let is_newest = hash(&pod.metadata) == Some(revision);
    let mut conditions = pod.status.as_ref()?.conditions.iter().flatten();
    let is_ready = conditions.any(|it| it.type_ == "Ready" && it.status == "True");
    let serves = is_newest && is_ready && pod.metadata.deletion_timestamp.is_none();
    pod.spec.as_ref()?.node_name.as_deref().filter(|_| serves)
}

/// Where what happened to our pods is told.
pub(crate) const EVENTS: &str = "/api/v1/namespaces/justmtls-system/events";

/// Waits until a Deployment (`deployments`) or DaemonSet (`daemonsets`) is ready.
///
/// # Errors
/// It is not at `until`: with all that holds it up, and what to do.
pub(crate) async fn ready(cluster: &Cluster, resource: &str, name: &str, until: Instant) -> anyhow::Result<()> {
    let begun = Instant::now();
    let (mut said, mut complained, mut looks) = (None, Vec::new(), Looks::default());
    loop {
        let Some(look) = looks.heard(Progress::look(cluster, resource, name).await)? else {
            tokio::time::sleep(LOOK).await;
            continue;
        };
        let Some(progress) = look else {
            bail!("{name} is gone while it was waited for; somebody deleted it: run the command again");
        };
        if said != Some(progress) {
            anstream::eprintln!("{name}: {progress}");
            said = Some(progress);
        }
        if progress.is_done() {
            return Ok(());
        }
        let over = Instant::now() >= until;
        if over || begun.elapsed() >= BE_QUIET {
            let found = looks.heard(explain(cluster, name).await)?.unwrap_or_default();
            let lines: Vec<_> = found.iter().map(|(hang, line)| sentence(hang, line.as_deref())).collect();
            if over {
                let nothing = vec!["nothing says why: look at the controllers of the cluster".to_owned()];
                let lines = if lines.is_empty() { nothing } else { lines };
                bail!("{name} is not ready in time ({progress}):\n  {}", lines.join("\n  "));
            }
            let kinds: Vec<_> = found.iter().map(|(hang, _)| (hang.who.clone(), hang.kind)).collect();
            if kinds != complained {
                lines.iter().for_each(|line| anstream::eprintln!("  {line}"));
                complained = kinds;
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// What holds a workload up, with the telling line of a log where there is one.
pub(crate) async fn explain(cluster: &Cluster, name: &str) -> anyhow::Result<Vec<(Hang, Option<String>)>> {
    let pods: Vec<Pod> = pods_of(cluster, name).await?;
    let events: Vec<Event> = cluster.list(EVENTS, "").await?;
    let mut found = Vec::new();
    for hang in hangs(name, &pods, &events) {
        let mut line = None;
        if let Some((pod, container, previous)) = &hang.log {
            // A log that is not there yet takes nothing from what is known.
            let log = cluster.text(&log_path(pod, container, *previous)).await.unwrap_or_default();
            line = telling_line(&log);
        }
        found.push((hang, line));
    }
    Ok(found)
}

/// The pods of a workload of ours.
pub(crate) async fn pods_of(cluster: &Cluster, name: &str) -> anyhow::Result<Vec<Pod>> {
    cluster.list(&format!("/api/v1/namespaces/{NAMESPACE}/pods"), &format!("labelSelector={NAME}%3D{name}")).await
}

/// The revisions of a DaemonSet of ours.
async fn revisions_of(cluster: &Cluster, name: &str) -> anyhow::Result<Vec<ControllerRevision>> {
    let place = format!("/apis/apps/v1/namespaces/{NAMESPACE}/controllerrevisions");
    cluster.list(&place, &format!("labelSelector={NAME}%3D{name}")).await
}

/// Whether a pod runs and is not about to end: whether its processes can be asked.
pub(crate) fn runs(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    phase == Some("Running") && pod.metadata.deletion_timestamp.is_none()
}

/// Whether a pod is a file of its node, and this object its mirror, with a UID of its own.
pub(crate) fn is_static(pod: &Pod) -> bool {
    pod.metadata.annotations.as_ref().is_some_and(|it| it.contains_key("kubernetes.io/config.mirror"))
}

/// One hang as a line.
pub(crate) fn sentence(hang: &Hang, line: Option<&str>) -> String {
    let line = line.map_or_else(String::new, |line| format!(": {line}"));
    format!("{}: {}; {}{line}", hang.who, hang.what, hang.hint)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_workload_is_ready_when_all_pods_of_its_newest_version_are() {
        let revision = |number: u64, hash: &str| -> ControllerRevision {
            let metadata = json!({ "labels": { "controller-revision-hash": hash } });
            serde_json::from_value(json!({ "metadata": metadata, "revision": number })).unwrap()
        };
        // The first of them was taken back to.
        let revisions = [revision(3, "7"), revision(2, "6")];
        let pod = |node: &str, hash: &str, ready: &str, ends: bool| -> Pod {
            let deleted = ends.then_some("2026-12-01T06:30:00Z");
            serde_json::from_value(json!({
                "metadata": { "labels": { "controller-revision-hash": hash }, "deletionTimestamp": deleted },
                "spec": { "nodeName": node, "containers": [] },
                "status": { "conditions": [{ "type": "Ready", "status": ready }] },
            }))
            .unwrap()
        };
        let daemon_set = |observed: u64, desired: u64, pods: &[Pod]| {
            // As the controller counts while the pods from before end.
            let status = json!({
                "observedGeneration": observed, "desiredNumberScheduled": desired, "numberReady": 0,
                "updatedNumberScheduled": 0, "numberAvailable": 0,
            });
            let metadata = json!({ "generation": 2 });
            Progress::of(&json!({ "kind": "DaemonSet", "metadata": metadata, "status": status }), &revisions, pods)
        };
        let both = [pod("a", "7", "True", false), pod("b", "7", "True", false)];
        assert!(daemon_set(2, 2, &both).is_done());
        assert!(!daemon_set(1, 2, &both).is_done(), "the status is about the version before");
        assert!(!daemon_set(2, 0, &[]).is_done(), "no node was seen yet");
        let [a, b] = both;
        let old = pod("b", "6", "True", true);
        assert!(daemon_set(2, 2, &[a.clone(), b, old.clone()]).is_done(), "what ends holds nothing up");
        for other in [old, pod("a", "7", "True", false), pod("b", "7", "False", false), pod("b", "7", "True", true)] {
            assert_eq!(daemon_set(2, 2, &[a.clone(), other]).to_string(), "1 of 2 ready");
        }
        let deployment = |replicas: u64, updated: u64, available: u64| {
            Progress::of(
                &json!({ "kind": "Deployment", "metadata": { "generation": 1 }, "spec": { "replicas": 2 }, "status": {
                "observedGeneration": 1, "replicas": replicas, "updatedReplicas": updated, "availableReplicas": available,
            } }),
                &[],
                &[],
            )
        };
        assert!(deployment(2, 2, 2).is_done());
        for (counts, said) in [
            ((2, 0, 2), "0 of 2 ready, and 2 of the version before"),
            ((3, 1, 2), "0 of 2 ready, and 2 of the version before"),
            ((3, 1, 3), "1 of 2 ready, and 2 of the version before"),
            ((3, 2, 3), "2 of 2 ready, and 1 of the version before"),
            ((2, 2, 1), "1 of 2 ready"),
        ] {
            let (replicas, updated, available) = counts;
            let progress = deployment(replicas, updated, available);
            assert!(!progress.is_done(), "{counts:?}");
            assert_eq!(progress.to_string(), said, "{counts:?}");
        }
        assert!(
            !Progress::of(&json!({ "kind": "Deployment", "metadata": { "generation": 1 }, "spec": {} }), &[], &[])
                .is_done()
        );
    }
}
