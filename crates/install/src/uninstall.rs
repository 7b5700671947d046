//! `justmtls uninstall`: every pod leaves the mesh, then the nodes go, so that each agent takes its CNI plugin out; then the rest, by name.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::bail;
use k8s_openapi::api::core::v1::Node;
use serde_json::Value;

use crate::cluster::{Cluster, Place, path};
use crate::install::{is_ours, recorded};
use crate::objects::{
    AUTHORITY, CONTROL, NAMESPACE, NODE, Object, PART_OF, SETTINGS, TRUST_BUNDLE, all, definitions, settings_object,
};
use crate::pages::{self, NodePages, Process};
use crate::source::Source;
use crate::table::{printable, some};
use crate::values::Values;
use crate::wait::{LOOK, pods_of};

/// What the verb takes.
#[derive(clap::Args, Clone, Debug)]
pub struct Arguments {
    /// Change nothing: say what would be deleted, and what would stay.
    #[arg(long)]
    pub dry_run: bool,
    /// Go on although pods of some nodes do not end: those nodes keep the CNI plugin.
    #[arg(long)]
    pub force: bool,
    /// How long the pods of the nodes may take to end, as 90s or 5m. By default their drain time and two minutes.
    #[arg(long, value_name = "TIME", value_parser = crate::values::patience)]
    pub timeout: Option<u64>,
    /// Which cluster is meant.
    #[command(flatten)]
    pub place: Place,
}

/// How long pods may take to leave beyond the drain time, in seconds: everybody is told, and each replica waits a while for
/// nodes that it does not see.
const LEAVE: u64 = 60;

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

/// Uninstalls.
pub(crate) async fn run(arguments: &Arguments) -> anyhow::Result<i32> {
    let work = Work { cluster: Cluster::connect(&arguments.place).await?, dry_run: arguments.dry_run };
    let namespace = work.cluster.get(&format!("/api/v1/namespaces/{NAMESPACE}")).await?;
    let values = match &namespace {
        Some(namespace) => recorded(namespace).unwrap_or_default(),
        None => Values::default(),
    };
    let mut stays = Vec::new();
    work.farewell(arguments, &values, &mut stays).await?;
    let mut gone = work.nodes(arguments, &values, &mut stays).await?;
    gone += work.ours().await?;
    gone += work.definitions(&mut stays).await?;
    gone += work.namespace(namespace.is_some(), &mut stays).await?;
    for sentence in &stays {
        anstream::println!("stays: {sentence}");
    }
    match (gone, arguments.dry_run) {
        (0, _) => anstream::println!("nothing of justmtls is installed"),
        (some, true) => anstream::println!("{some} objects would be deleted; nothing was changed"),
        (_, false) => anstream::println!("justmtls is uninstalled"),
    }
    Ok(0)
}

struct Work {
    cluster: Cluster,
    dry_run: bool,
}

impl Work {
    /// Deletes one object. Gives 1 where it was there.
    async fn delete(&self, title: &str, place: &str) -> anyhow::Result<usize> {
        let there = match self.dry_run {
            true => self.cluster.get(place).await?.is_some(),
            false => self.cluster.delete(place).await?,
        };
        if there {
            anstream::println!("{title}: {}", if self.dry_run { "would be deleted" } else { "deleted" });
        }
        Ok(usize::from(there))
    }

    /// Every captured pod leaves the mesh, in order and while it runs: its peers are told first, then its rules go. What it has
    /// open goes on for as long as the drain time.
    async fn farewell(&self, arguments: &Arguments, values: &Values, stays: &mut Vec<String>) -> anyhow::Result<()> {
        let place = format!("/api/v1/namespaces/{NAMESPACE}/configmaps/{SETTINGS}");
        let standing = self.standing().await?;
        if self.cluster.get(&place).await?.is_none() || standing.is_empty() {
            return Ok(());
        }
        if self.cluster.get(&format!("/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/{NODE}")).await?.is_none() {
            let nodes: Vec<_> = standing.keys().map(|node| printable(node)).collect();
            stays.push(format!(
                "rules in the network namespaces of pods on {}, which are cut off, since the DaemonSet was deleted before they had \
                 left: they go when the pods are made anew",
                nodes.join(", ")
            ));
            return Ok(());
        }
        if self.dry_run {
            anstream::println!("every captured pod would leave the mesh first");
            return Ok(());
        }
        let mut settings = settings_object(values);
        // Who leaves first must not be refused by who leaves later.
        let patience = Instant::now() + Duration::from_secs(LEAVE);
        self.tell(&mut settings, "announced").await?;
        let mut enforcing = self.enforcing().await?;
        while !enforcing.is_empty() && Instant::now() < patience {
            tokio::time::sleep(LOOK).await;
            enforcing = self.enforcing().await?;
        }
        if !enforcing.is_empty() {
            anstream::eprintln!(
                "the proxies of {} do not say that they let plaintext in by now; where they do not, pods that leave first are refused \
                 until theirs have left, too",
                enforcing.join(", ")
            );
        }
        self.tell(&mut settings, "begun").await?;
        let drain = values.drain();
        let mut until = Instant::now() + Duration::from_secs(drain + LEAVE);
        let (mut said, mut drains) = (usize::MAX, false);
        loop {
            let standing = self.standing().await?;
            let pods: usize = standing.values().flatten().map(Vec::len).sum();
            if standing.is_empty() {
                return Ok(());
            }
            // Only what is open holds these.
            if !drains && standing.values().all(|pods| pods.iter().flatten().all(|pod| pod.leaving)) {
                drains = true;
                until = until.min(Instant::now() + Duration::from_secs(drain));
            }
            if pods != said {
                let names: Vec<_> = standing.values().flatten().flatten().map(|pod| printable(&pod.name)).collect();
                anstream::eprintln!("waiting until {pods} pods have left the mesh: {}", some(&names));
                said = pods;
            }
            if Instant::now() >= until {
                let silent: Vec<_> =
                    standing.iter().filter(|(_, pods)| pods.is_none()).map(|(node, _)| printable(node)).collect();
                if !silent.is_empty() && !arguments.force {
                    bail!(
                        "the agents of {} do not say whether their pods have left the mesh, and pods that have not are cut off when \
                         nobody serves them; bring those nodes back and run the command again, or go on without them by --force. \
                         Meanwhile no policy is enforced, and every other pod is out of the mesh; `justmtls install` takes all of it back",
                        silent.join(", ")
                    );
                }
                let names = standing.values().flatten().flatten().map(|pod| printable(&pod.name)).collect::<Vec<_>>();
                if !names.is_empty() {
                    anstream::eprintln!("the drain time is over: what these have open is ended: {}", names.join(", "));
                }
                if !silent.is_empty() {
                    stays.push(format!(
                        "rules in the network namespaces of pods on {0}: they go when the pods are made anew; and, where no agent has taken \
                         it out, the CNI plugin: remove 00-justmtls.conflist from the CNI configurations of {0}",
                        silent.join(", ")
                    ));
                }
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn tell(&self, settings: &mut Object, leaving: &str) -> anyhow::Result<()> {
        settings.value["data"]["leaving"] = leaving.into();
        let told = self.cluster.apply(settings, false, true).await;
        told.map(drop).map_err(|error| self.cluster.explain(error, "telling every pod to leave"))
    }

    /// The nodes whose proxies do not know, or do not say, that plaintext is refused nowhere any more.
    async fn enforcing(&self) -> anyhow::Result<Vec<String>> {
        let pages = pages::of_nodes(&self.cluster, &[(Process::Proxy, "/workloads")]).await?;
        let permissive = |workload: &Value| {
            let ports = workload["port_modes"].as_object();
            workload["mode"] == "permissive" && ports.is_none_or(|ports| ports.is_empty())
        };
        let known = |pages: &NodePages| {
            let workloads = pages.page(Process::Proxy, "/workloads")["workloads"].as_array();
            workloads.is_some_and(|workloads| workloads.iter().all(permissive))
        };
        Ok(pages.iter().filter(|(_, pages)| !known(pages)).map(|(node, _)| printable(node)).collect())
    }

    /// By node, the pods that have rules of ours; `None` where no agent says. Nodes without any are left out.
    async fn standing(&self) -> anyhow::Result<BTreeMap<String, Option<Vec<Standing>>>> {
        let pages = pages::of_nodes(&self.cluster, &[(Process::Agent, "/pods")]).await?;
        let of_node = |pages: &NodePages| {
            let pods = pages.page(Process::Agent, "/pods").as_array()?;
            Some(pods.iter().filter_map(Standing::read).collect::<Vec<_>>())
        };
        let all = pages.iter().map(|(node, pages)| (node.clone(), of_node(pages)));
        let mut all: BTreeMap<_, _> =
            all.filter(|(_, pods)| pods.as_ref().is_none_or(|pods| !pods.is_empty())).collect();
        // The control plane remembers pods also where no agent runs that could be asked.
        let records: Vec<Value> = self.cluster.list(RECORDS, RECORDED).await?;
        let unasked: Vec<_> = records.iter().filter_map(node_of_record).filter(|it| !pages.contains_key(it)).collect();
        if !unasked.is_empty() {
            let nodes: Vec<Node> = self.cluster.list("/api/v1/nodes", "").await?;
            let there = |name: &String| nodes.iter().any(|node| node.metadata.name.as_ref() == Some(name));
            all.extend(unasked.into_iter().filter(there).map(|node| (node, None)));
        }
        Ok(all)
    }

    /// The DaemonSet, and its pods: an agent whose DaemonSet is being deleted takes out what it put onto its node.
    async fn nodes(&self, arguments: &Arguments, values: &Values, stays: &mut Vec<String>) -> anyhow::Result<usize> {
        let place = format!("/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/{NODE}");
        let gone = self.delete(&format!("DaemonSet {NODE}"), &place).await?;
        if gone == 0 || self.dry_run {
            return Ok(gone);
        }
        let drain = values.drain();
        let patience = Duration::from_secs(arguments.timeout.unwrap_or(drain + 120));
        let until = Instant::now() + patience;
        let mut said = usize::MAX;
        loop {
            let pods = pods_of(&self.cluster, NODE).await?;
            if pods.is_empty() && self.cluster.get(&place).await?.is_none() {
                return Ok(gone);
            }
            if pods.len() != said {
                anstream::eprintln!("waiting until the pods of {} nodes have ended", pods.len());
                said = pods.len();
            }
            if Instant::now() >= until {
                let mut nodes: Vec<_> = pods
                    .iter()
                    .filter_map(|pod| pod.spec.as_ref()?.node_name.clone())
                    .map(|node| printable(&node))
                    .collect();
                nodes.sort();
                let nodes = nodes.join(", ");
                if !arguments.force {
                    bail!(
                        "pods of justmtls do not end on {nodes} within {} s, so that the CNI plugin may still be there and keep \
                         new pods from starting; bring those nodes back and run the command again, or go on without them by --force",
                        patience.as_secs()
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
        let place = format!("/api/v1/namespaces/{NAMESPACE}");
        let gone = self.delete(&format!("Namespace {NAMESPACE}"), &place).await?;
        let until = Instant::now() + Duration::from_secs(120);
        while !self.dry_run && self.cluster.get(&place).await?.is_some() {
            if Instant::now() >= until {
                bail!(
                    "the namespace {NAMESPACE} does not go within 120 s; `kubectl get namespace {NAMESPACE} -o yaml` says what holds it"
                );
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(gone)
    }
}

/// The node of a record of captured pods that names any.
fn node_of_record(record: &Value) -> Option<String> {
    let pods = record["data"]["pods"].as_str().unwrap_or_default();
    let node = record["data"]["node"].as_str().filter(|node| !node.is_empty())?;
    (!pods.trim().is_empty()).then(|| node.to_owned())
}

/// A pod with rules of ours.
#[derive(PartialEq, Eq, Debug)]
struct Standing {
    /// `namespace/name`.
    name: String,
    /// It captures nothing new, and what was captured is still open.
    leaving: bool,
}

impl Standing {
    /// What an agent shows of a pod, where it has rules or is about to load some.
    fn read(pod: &Value) -> Option<Self> {
        let state = pod["state"].as_str().filter(|state| ["beginning", "captured", "leaving"].contains(state))?;
        Some(Self { name: pod["name"].as_str().unwrap_or_default().to_owned(), leaving: state == "leaving" })
    }
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
    fn a_pod_has_rules_while_it_is_captured_and_until_it_has_left() {
        let read = |state: &str| Standing::read(&json!({ "name": "shop/web", "state": state })).map(|pod| pod.leaving);
        assert_eq!(["captured", "beginning", "leaving"].map(read), [Some(false), Some(false), Some(true)]);
        assert_eq!(["not-captured", "waiting"].map(read), [None, None]);
    }

    #[test]
    fn a_record_names_its_node_while_it_names_pods() {
        let of = |pods: &str| node_of_record(&json!({ "data": { "node": "a", "pods": pods } }));
        assert_eq!((of("1-2\n3-4"), of(" \n")), (Some("a".to_owned()), None));
        assert_eq!(node_of_record(&json!({})), None);
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
