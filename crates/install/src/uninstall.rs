//! `justmtls uninstall`: every pod leaves the mesh, then the nodes go, so that each agent takes its CNI plugin out; then the rest, by name.

mod farewell;
mod standing;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use k8s_openapi::api::core::v1::Event;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

use crate::cluster::{Cluster, Place, is_refusal, path};
use crate::hang::endings;
use crate::install::{is_ours, recorded};
use crate::leaving::Stage;
use crate::looks::Looks;
use crate::objects::{AUTHORITY, CONTROL, NAMESPACE, NODE, PART_OF, SETTINGS, TRUST_BUNDLE, all, definitions};
use crate::source::Source;
use crate::table::{printable, some};
use crate::values::Values;
use crate::wait::{EVENTS, LOOK, pods_of};

/// What the verb takes.
#[derive(clap::Args, Clone, Debug)]
pub struct Arguments {
    /// Change nothing: say what would be deleted, and what would stay.
    #[arg(long)]
    pub dry_run: bool,
    /// Go on although pods have not left, or those of some nodes do not end: the former are cut off, the latter keep the CNI plugin.
    #[arg(long)]
    pub force: bool,
    /// How long each wait may take, as 90s or 5m: for pods to leave the mesh, for the pods of the nodes to end, for the namespace
    /// to go. By default a minute or two, and for the first two of them the drain time besides, as open connections have that.
    #[arg(long, value_name = "TIME", value_parser = crate::values::patience)]
    pub timeout: Option<u64>,
    /// Which cluster is meant.
    #[command(flatten)]
    pub place: Place,
}

/// The control plane's records of captured pods: their collection, and what they are selected by.
const RECORDS: &str = "/api/v1/namespaces/justmtls-system/configmaps";
const RECORDED: &str = "labelSelector=justmtls.dev%2Frecord%3Dcaptured";

/// What else may be in our namespace, and is not ours: collections and kinds.
const FOREIGN: &[(&str, &str)] = &[
    ("/api/v1", "configmaps"),
    ("/api/v1", "secrets"),
    ("/api/v1", "services"),
    ("/api/v1", "pods"),
    ("/api/v1", "persistentvolumeclaims"),
    ("/apis/apps/v1", "deployments"),
    ("/apis/apps/v1", "daemonsets"),
    ("/apis/apps/v1", "statefulsets"),
    ("/apis/batch/v1", "jobs"),
    ("/apis/batch/v1", "cronjobs"),
    ("/apis/networking.k8s.io/v1", "networkpolicies"),
    ("/apis/security.istio.io/v1", "peerauthentications"),
    ("/apis/security.istio.io/v1", "authorizationpolicies"),
];

/// How far it has come: what whoever interrupts it must know.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Progress {
    /// Nothing was changed.
    Nothing,
    /// No policy is enforced any more.
    Announced,
    /// Every pod was told to leave.
    Begun,
    /// The DaemonSet is being taken away, and then all else.
    Taken,
}

impl Progress {
    /// What is so from then on, and both ways out: for whoever interrupts it, and where it fails.
    fn sentence(self) -> &'static str {
        match self {
            Self::Nothing => "nothing was changed",
            Self::Announced => {
                "pods are still in the mesh, and plaintext is let in everywhere, as no policy is enforced any more; \
                 `justmtls uninstall` goes on, `justmtls upgrade` takes it back"
            }
            Self::Begun => {
                "every pod has left the mesh or is leaving it, talks in clear from now on, and no policy is enforced any more; \
                 `justmtls uninstall` goes on, `justmtls upgrade` takes it back"
            }
            Self::Taken => {
                "part of justmtls is taken away: pods that have left the mesh talk in clear, others are cut off when nobody serves \
                 them, and no policy is enforced any more; `justmtls uninstall` goes on, `justmtls install` takes it back"
            }
        }
    }

    /// An error, with what is so after it: nobody may think that it left everything as it was.
    fn after(self, error: anyhow::Error) -> anyhow::Error {
        match self {
            Self::Nothing => error,
            _ => anyhow!("{error:#}. By now {}", self.sentence()),
        }
    }
}

impl From<Stage> for Progress {
    fn from(stage: Stage) -> Self {
        match stage {
            Stage::No => Self::Nothing,
            Stage::Announced => Self::Announced,
            Stage::Begun => Self::Begun,
        }
    }
}

/// The exit status of who was interrupted, as shells have it.
const INTERRUPTED: i32 = 130;

/// Uninstalls.
pub(crate) async fn run(arguments: &Arguments) -> anyhow::Result<i32> {
    let &Arguments { dry_run, force, timeout, .. } = arguments;
    let cluster = Cluster::connect(&arguments.place).await?;
    let work = Work { cluster, dry_run, force, timeout, progress: Cell::new(Progress::Nothing) };
    tokio::select! {
        ended = work.all() => ended.map(|()| 0).map_err(|error| work.progress.get().after(error)),
        heard = interrupted() => {
            heard.context("signals cannot be heard")?;
            anstream::eprintln!("interrupted: {}", work.progress.get().sentence());
            Ok(INTERRUPTED)
        }
    }
}

/// Until somebody wants it to end: the mesh must not be left half-way without a word.
async fn interrupted() -> io::Result<()> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    tokio::select! {
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
    }
}

/// What is said where the namespace goes before the nodes do.
const NAMESPACE_GOES: &str = "the namespace justmtls-system is being deleted, and nobody is left who could tell pods to leave the mesh: \
     those that are captured are cut off when the pod of justmtls on their node has ended";

struct Work {
    cluster: Cluster,
    dry_run: bool,
    force: bool,
    timeout: Option<u64>,
    progress: Cell<Progress>,
}

impl Work {
    async fn all(&self) -> anyhow::Result<()> {
        let namespace = self.cluster.get(&namespace_place()).await?;
        let nodes = self.cluster.get(&nodes_place()).await?;
        let has_nodes = nodes.is_some();
        let serves = nodes.is_some_and(|nodes| !is_going(&nodes));
        let goes = namespace.as_ref().is_some_and(is_going);
        if goes && has_nodes {
            if !self.force && !self.dry_run {
                bail!(
                    "{NAMESPACE_GOES}; wait until it is gone, run `justmtls install`, which serves them again, and then \
                     `justmtls uninstall`, which cleans the nodes; or take away by --force what can be"
                );
            }
            anstream::eprintln!("{NAMESPACE_GOES}");
        }
        let values = namespace.as_ref().and_then(|it| recorded(it).ok()).unwrap_or_default();
        let mut stays = Vec::new();
        if goes && has_nodes {
            stays.push(ON_NODES.to_owned());
        } else {
            self.farewell(&values, serves, &mut stays).await?;
        }
        let without_namespace = goes || namespace.is_none();
        let rest = self.rest(&values, (has_nodes, without_namespace, namespace.is_some()), &mut stays).await;
        // Also where the rest failed: what is left on a node is to be known at once.
        for sentence in &stays {
            anstream::println!("stays: {sentence}");
        }
        let gone = rest?;
        match (gone, self.dry_run) {
            (0, _) => anstream::println!("nothing of justmtls is installed"),
            (some, true) => anstream::println!("{some} objects would be deleted; nothing was changed"),
            (_, false) => anstream::println!("justmtls is uninstalled"),
        }
        Ok(())
    }

    /// What goes when pods have been told: the nodes, all else that is ours, and the namespace.
    async fn rest(
        &self,
        values: &Values,
        (has_nodes, without_namespace, there): (bool, bool, bool),
        stays: &mut Vec<String>,
    ) -> anyhow::Result<usize> {
        let mut gone = self.nodes(values, stays).await?;
        gone += self.ours().await?;
        gone += self.definitions(stays).await?;
        if is_unseen(gone, has_nodes, without_namespace) {
            stays.push(ON_NODES.to_owned());
        }
        gone += self.namespace(there, stays).await?;
        Ok(gone)
    }

    /// When a wait is over: as was said, or after so many seconds.
    fn until(&self, default: u64) -> Instant {
        Instant::now() + Duration::from_secs(self.timeout.unwrap_or(default))
    }

    /// Deletes one object. Gives 1 where it was there.
    async fn delete(&self, title: &str, place: &str) -> anyhow::Result<usize> {
        let there = match self.dry_run {
            true => self.cluster.get(place).await?.is_some(),
            false => self.take(place).await?,
        };
        if there {
            anstream::println!("{title}: {}", if self.dry_run { "would be deleted" } else { "deleted" });
        }
        Ok(usize::from(there))
    }

    /// Deletes what is at a place; gives whether it was there.
    async fn take(&self, place: &str) -> anyhow::Result<bool> {
        // An answer that is not heard any more may have been a yes.
        let before = self.progress.replace(Progress::Taken);
        let taken = self.cluster.delete(place).await;
        let is_as_before = match &taken {
            Ok(there) => !there,
            Err(error) => is_refusal(&format!("{error:#}")),
        };
        if is_as_before {
            self.progress.set(before);
        }
        taken
    }

    /// The DaemonSet, and its pods: an agent whose DaemonSet is being deleted takes out what it put onto its node.
    async fn nodes(&self, values: &Values, stays: &mut Vec<String>) -> anyhow::Result<usize> {
        let place = nodes_place();
        let gone = self.delete(&format!("DaemonSet {NODE}"), &place).await?;
        if gone == 0 || self.dry_run {
            return Ok(gone);
        }
        let begun = Instant::now();
        let until = self.until(values.drain() + 120);
        let mut said = 0;
        let mut looks = Looks::default();
        loop {
            let look = async { anyhow::Ok((pods_of(&self.cluster, NODE).await?, self.cluster.get(&place).await?)) };
            let Some((pods, there)) = looks.heard(look.await)? else {
                tokio::time::sleep(LOOK).await;
                continue;
            };
            if pods.is_empty() && there.is_none() {
                return Ok(gone);
            }
            // While one agent takes another's place a node has two.
            let nodes: BTreeSet<_> = pods.iter().filter_map(|pod| pod.spec.as_ref()?.node_name.as_deref()).collect();
            let named: Vec<_> = nodes.iter().map(|node| printable(node)).collect();
            if nodes.len() != said && !nodes.is_empty() {
                anstream::eprintln!("waiting until the pods of {} have ended", some(&named));
                said = nodes.len();
            }
            if Instant::now() >= until {
                let nodes = named.join(", ");
                if !self.force {
                    let events: Vec<Event> = self.cluster.list(EVENTS, "").await.unwrap_or_default();
                    let why: String = endings(&pods, &events).iter().map(|why| format!("\n  {why}")).collect();
                    bail!(
                        "pods of justmtls do not end on {nodes} within {} s, so that the CNI plugin may still be there and keep \
                         new pods from starting; let those nodes end them (`kubectl -n {NAMESPACE} describe pods` says what they \
                         wait for) and run the command again, or go on without them by --force{why}",
                        begun.elapsed().as_secs()
                    );
                }
                stays.push(format!(
                    "the CNI plugin, on {nodes}: remove 00-justmtls.conflist from the CNI configurations there"
                ));
                return Ok(gone);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// All else that is ours, in the reverse order of its making; then what the control plane wrote.
    async fn ours(&self) -> anyhow::Result<usize> {
        let mut gone = 0;
        let objects = all(Source::Values(&Values::default()));
        for object in objects.iter().rev().filter(|object| !["Namespace", "DaemonSet"].contains(&object.kind())) {
            gone += self.delete(&object.title(), &path(object)).await?;
        }
        let in_ours = format!("/api/v1/namespaces/{NAMESPACE}");
        for (kind, place) in [
            ("Secret", format!("{in_ours}/secrets/{AUTHORITY}")),
            ("ConfigMap", format!("{in_ours}/configmaps/{TRUST_BUNDLE}")),
            ("Lease", format!("/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/{CONTROL}")),
        ] {
            let name = place.rsplit('/').next().unwrap_or_default();
            gone += self.delete(&format!("{kind} {name}"), &place).await?;
        }
        for record in self.cluster.list::<Value>(RECORDS, RECORDED).await? {
            let name = record["metadata"]["name"].as_str().unwrap_or_default();
            gone += self.delete(&format!("ConfigMap {name}"), &format!("{RECORDS}/{name}")).await?;
        }
        for version in ["v1", "v1beta1", "v1alpha1"] {
            let bundles = format!("/apis/certificates.k8s.io/{version}/clustertrustbundles");
            for bundle in self.cluster.list::<Value>(&bundles, "").await? {
                let name = bundle["metadata"]["name"].as_str().unwrap_or_default();
                if name.starts_with("justmtls.dev:") {
                    gone += self.delete(&format!("ClusterTrustBundle {name}"), &format!("{bundles}/{name}")).await?;
                }
            }
        }
        Ok(gone)
    }

    /// The definitions that we made, and that nobody uses.
    async fn definitions(&self, stays: &mut Vec<String>) -> anyhow::Result<usize> {
        let mut gone = 0;
        for definition in definitions() {
            let place = path(&definition);
            let Some(is) = self.cluster.get(&place).await? else { continue };
            let resource = definition.name().split('.').next().unwrap_or_default();
            let used: Vec<Value> = self.cluster.list(&format!("/apis/security.istio.io/v1/{resource}"), "").await?;
            match who_keeps(&is, &used) {
                Some(why) => stays.push(format!("{}: {why}", definition.title())),
                None => gone += self.delete(&definition.title(), &place).await?,
            }
        }
        Ok(gone)
    }

    /// The namespace, unless there is something of others in it.
    async fn namespace(&self, there: bool, stays: &mut Vec<String>) -> anyhow::Result<usize> {
        if !there {
            return Ok(0);
        }
        let mut others = Vec::new();
        for (api, resource) in FOREIGN {
            let all: Vec<Value> = self.cluster.list(&format!("{api}/namespaces/{NAMESPACE}/{resource}"), "").await?;
            others.extend(all.iter().filter(|object| is_foreign(object)).map(|object| {
                format!("{resource}/{}", printable(object["metadata"]["name"].as_str().unwrap_or_default()))
            }));
        }
        if !others.is_empty() {
            stays.push(format!("Namespace {NAMESPACE}: others have {} in it", others.join(", ")));
            return Ok(0);
        }
        let place = namespace_place();
        let gone = self.delete(&format!("Namespace {NAMESPACE}"), &place).await?;
        if self.dry_run {
            return Ok(gone);
        }
        let begun = Instant::now();
        let until = self.until(120);
        let mut looks = Looks::default();
        loop {
            let there = looks.heard(self.cluster.get(&place).await)?;
            if matches!(there, Some(None)) {
                return Ok(gone);
            }
            if Instant::now() >= until {
                bail!(
                    "the namespace {NAMESPACE} does not go within {} s; `kubectl get namespace {NAMESPACE} -o yaml` says what holds it",
                    begun.elapsed().as_secs()
                );
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// Where our namespace is.
pub(crate) fn namespace_place() -> String {
    format!("/api/v1/namespaces/{NAMESPACE}")
}

/// Where the DaemonSet is.
pub(crate) fn nodes_place() -> String {
    format!("/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/{NODE}")
}

/// Whether somebody deletes an object that is there still.
pub(crate) fn is_going(object: &Value) -> bool {
    !object["metadata"]["deletionTimestamp"].is_null()
}

/// What is said of nodes that nobody could be asked about.
const ON_NODES: &str = "on nodes, perhaps: the CNI plugin, and rules in the network namespaces of pods, which are cut off by them, as the \
     namespace was deleted before they could be taken away; `justmtls install` and then `justmtls uninstall` clean the nodes";

/// Whether something of ours was there still, and our namespace, with who could have cleaned the nodes, was not.
fn is_unseen(gone: usize, has_nodes: bool, without_namespace: bool) -> bool {
    gone > 0 && !has_nodes && without_namespace
}

/// Why a definition stays, if it does.
fn who_keeps(definition: &Value, used: &[Value]) -> Option<String> {
    if !is_ours(definition) {
        return Some("it is not ours".to_owned());
    }
    let name = |object: &Value| {
        let text = |field: &str| printable(object["metadata"][field].as_str().unwrap_or_default());
        format!("{}/{}", text("namespace"), text("name"))
    };
    let names: Vec<_> = used.iter().take(5).map(name).collect();
    (!used.is_empty())
        .then(|| format!("{} objects of yours use it, such as {}; delete them first", used.len(), names.join(", ")))
}

/// Whether an object of our namespace is neither ours nor one that Kubernetes puts into every namespace, nor about to go.
fn is_foreign(object: &Value) -> bool {
    let metadata = &object["metadata"];
    let name = metadata["name"].as_str().unwrap_or_default();
    let known =
        ["kube-root-ca.crt", "openshift-service-ca.crt", "istio-ca-root-cert", SETTINGS, TRUST_BUNDLE, AUTHORITY];
    let helm = object["type"] == "helm.sh/release.v1";
    let ours = metadata["labels"][PART_OF] == "justmtls";
    let owned = metadata["ownerReferences"].as_array().is_some_and(|owners| !owners.is_empty());
    !(known.contains(&name) || helm || ours || owned || !metadata["deletionTimestamp"].is_null())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn whoever_interrupts_it_is_told_what_is_so_from_now_on_and_both_ways_out() {
        for progress in [Progress::Announced, Progress::Begun, Progress::Taken] {
            let sentence = progress.sentence();
            let back = if progress == Progress::Taken { "`justmtls install`" } else { "`justmtls upgrade`" };
            assert!(sentence.contains("`justmtls uninstall` goes on") && sentence.contains(back), "{sentence}");
        }
        assert!(Progress::Begun.sentence().contains("in clear"));
        assert!(Progress::Nothing.sentence().contains("nothing was changed"));
        assert!(!Progress::Taken.sentence().contains("every pod"), "some may have been left behind by --force");
    }

    #[test]
    fn an_error_says_what_is_so_after_it_unless_nothing_was_changed() {
        let after = |progress: Progress| progress.after(anyhow!("listing x: the API server answers 500")).to_string();
        assert_eq!(after(Progress::Nothing), "listing x: the API server answers 500");
        for progress in [Progress::Announced, Progress::Begun, Progress::Taken] {
            let said = after(progress);
            assert!(said.starts_with("listing x: ") && said.ends_with(progress.sentence()), "{said}");
        }
    }

    #[test]
    fn what_nodes_may_have_is_said_where_the_namespace_went_before_it_could_be_taken_away() {
        assert!(ON_NODES.contains("`justmtls install` and then `justmtls uninstall`"));
        assert!(is_unseen(5, false, true));
        // Nothing was there; the nodes were asked; or the namespace is there, and what was on nodes was taken away.
        assert_eq!([is_unseen(0, false, true), is_unseen(5, true, true), is_unseen(5, false, false)], [false; 3]);
    }

    #[test]
    fn a_namespace_goes_from_when_somebody_deleted_it() {
        assert!(is_going(&json!({ "metadata": { "deletionTimestamp": "2026-12-01T00:00:00Z" } })));
        assert!(!is_going(&json!({ "metadata": {} })));
    }

    #[test]
    fn a_definition_goes_only_where_it_is_ours_and_unused() {
        let [first, _] = &definitions()[..] else { panic!("two") };
        assert_eq!(who_keeps(&first.value, &[]), None);
        let used = [json!({ "metadata": { "name": "strict", "namespace": "shop" } })];
        assert!(who_keeps(&first.value, &used).unwrap().contains("shop/strict"));
        assert_eq!(
            who_keeps(&json!({ "metadata": { "labels": { "app": "istio" } } }), &[]).as_deref(),
            Some("it is not ours")
        );
    }

    #[test]
    fn what_others_put_into_the_namespace_keeps_it() {
        assert!(is_foreign(&json!({ "metadata": { "name": "strict" } })));
        assert!(is_foreign(&json!({ "metadata": { "name": "x", "labels": { PART_OF: "other" } } })));
        for own in [
            json!({ "metadata": { "name": "kube-root-ca.crt" } }),
            json!({ "metadata": { "name": "x", "labels": { PART_OF: "justmtls" } } }),
            json!({ "metadata": { "name": "x", "ownerReferences": [{}] } }),
            json!({ "metadata": { "name": "x", "deletionTimestamp": "2026-01-01T00:00:00Z" } }),
            json!({ "metadata": { "name": "sh.helm.release.v1.justmtls.v1" }, "type": "helm.sh/release.v1" }),
        ] {
            assert!(!is_foreign(&own), "{own}");
        }
    }
}
