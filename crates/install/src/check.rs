//! `justmtls check`: everything that must hold, in order, each with a name, and with what to do where it does not.

mod applied;
mod finding;
mod ids;
mod nodes;
mod problems;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod};
use k8s_openapi::jiff::Timestamp;
use serde_json::Value;

use crate::cluster::{Cluster, Place};
use crate::install::supported;
use crate::leaving::Leaving;
use crate::objects::{CONTROL, NAMESPACE, NODE, TRUST_BUNDLE};
use crate::pages::NodePages;
use crate::status::PodRow;
use crate::{pages, status, wait};

use finding::{Finding, State, as_json, exit_status, failed, ok, print, warning, worst};
use ids::Id;

/// What the verb takes.
#[derive(clap::Args, Clone, Debug)]
pub struct Arguments {
    /// Look again until nothing fails.
    #[arg(long)]
    pub wait: bool,
    /// How long, as 90s or 5m.
    #[arg(long, default_value_t = 300, value_name = "TIME", value_parser = crate::values::patience, requires = "wait")]
    pub timeout: u64,
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

/// A root that has fewer days than these left is worth a warning.
const FEW_DAYS: i64 = 90;
/// The pause between two looks.
const AGAIN: Duration = Duration::from_secs(2);
/// In how many looks something of a pod must be wrong: one that ends is gone from its agent, or from its node, before the API
/// server has heard of it.
const LOOKS: usize = 3;

/// Checks. The exit status is 0 where all is well, 1 where something failed and 2 where there are warnings alone.
pub(crate) async fn run(arguments: &Arguments) -> anyhow::Result<i32> {
    let until = Instant::now() + Duration::from_secs(arguments.timeout);
    let mut findings = look(arguments).await;
    while arguments.wait && worst(&findings) == State::Failed && Instant::now() < until {
        tokio::time::sleep(AGAIN).await;
        findings = look(arguments).await;
    }
    if arguments.json {
        anstream::println!("{:#}", as_json(&findings));
    } else {
        print(&findings);
    }
    Ok(exit_status(&findings))
}

/// Makes all checks; a failed one that the rest depends on ends them.
async fn look(arguments: &Arguments) -> Vec<Finding> {
    let mut findings = Vec::new();
    let cluster = match Cluster::connect(&arguments.place).await {
        Ok(cluster) => cluster,
        Err(error) => return vec![failed(Id::ApiReachable, format!("{error:#}"))],
    };
    let (numbers, version) = match cluster.version().await {
        Ok(found) => found,
        Err(error) => return vec![failed(Id::ApiReachable, format!("{error:#}"))],
    };
    findings.push(ok(Id::ApiReachable, format!("the API server answers, {version}")));
    match supported(numbers, &version) {
        Ok(()) => findings.push(ok(Id::ApiVersion, format!("Kubernetes is {} or newer", crate::MINIMUM_KUBERNETES))),
        Err(error) => findings.push(failed(Id::ApiVersion, format!("{error:#}"))),
    }
    let (is_there, applied) = applied::findings(&cluster).await;
    findings.extend(applied);
    if !is_there {
        return findings;
    }
    findings.extend(control_plane(&cluster).await);
    findings.extend(nodes_and_pods(&cluster, arguments.namespace.as_deref()).await);
    findings
}

async fn control_plane(cluster: &Cluster) -> Vec<Finding> {
    let mut findings = workload(cluster, Id::ControlReplicas, "deployments", CONTROL).await;
    let place = format!("/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/{CONTROL}");
    let (lease, pods) = (cluster.get(&place).await, wait::pods_of(cluster, CONTROL).await);
    findings.push(match (lease, pods) {
        (Ok(lease), Ok(pods)) => held(lease.as_ref(), &pods),
        (Err(error), _) | (_, Err(error)) => failed(Id::ControlLease, format!("{error:#}")),
    });
    match cluster.get(&format!("/api/v1/namespaces/{NAMESPACE}/configmaps/{TRUST_BUNDLE}")).await {
        Ok(bundle) => findings.extend(roots(bundle, now())),
        Err(error) => findings.push(failed(Id::RootsPublished, format!("{error:#}"))),
    }
    findings.extend(problems::findings(cluster).await);
    findings
}

/// The time of day, in seconds since 1970.
fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// A Deployment or DaemonSet that is to be ready.
async fn workload(cluster: &Cluster, id: Id, resource: &str, name: &str) -> Vec<Finding> {
    let progress = match wait::Progress::look(cluster, resource, name).await {
        Ok(Some(progress)) => progress,
        Ok(None) => return vec![failed(id, format!("{name} is missing"))],
        Err(error) => return vec![failed(id, format!("{error:#}"))],
    };
    if progress.is_done() {
        return vec![ok(id, format!("{name}: {progress}"))];
    }
    let mut wrong = vec![failed(id, format!("{name}: {progress}"))];
    // What holds it up is said where it can be found out.
    for (hang, line) in wait::explain(cluster, name).await.unwrap_or_default() {
        wrong.push(failed(id, wait::sentence(&hang, line.as_deref())));
    }
    wrong
}

/// Whether one of the control plane's pods has the Lease.
fn held(lease: Option<&Value>, pods: &[Pod]) -> Finding {
    let holder = lease.and_then(|lease| lease["spec"]["holderIdentity"].as_str()).unwrap_or_default();
    let there = |pod: &Pod| pod.metadata.name.as_deref().is_some_and(|name| holder.starts_with(name));
    match (lease, holder, pods.iter().any(there)) {
        (None, ..) => {
            failed(Id::ControlLease, "no replica has ever held the Lease: nothing writes the authority and the roots")
        }
        (_, "", _) => failed(Id::ControlLease, "no replica holds the Lease"),
        (_, _, true) => ok(Id::ControlLease, format!("{holder} holds the Lease")),
        _ => failed(Id::ControlLease, format!("the Lease is held by {holder}, which is no pod of the control plane")),
    }
}

/// The roots, and how long they live.
fn roots(bundle: Option<Value>, now: i64) -> Vec<Finding> {
    let map: Option<ConfigMap> = bundle.and_then(|bundle| serde_json::from_value(bundle).ok());
    let Some(text) = map.and_then(|map| map.data?.remove("bundle.pem")) else {
        return vec![failed(
            Id::RootsPublished,
            format!("ConfigMap {TRUST_BUNDLE} has no bundle.pem: no node can begin"),
        )];
    };
    let mut ends = Vec::new();
    for pem in x509_parser::pem::Pem::iter_from_buffer(text.as_bytes()) {
        let end = pem.ok().and_then(|pem| Some(pem.parse_x509().ok()?.validity().not_after.timestamp()));
        match end {
            Some(end) => ends.push(end),
            None => {
                return vec![failed(
                    Id::RootsPublished,
                    format!("bundle.pem of ConfigMap {TRUST_BUNDLE} cannot be read"),
                )];
            }
        }
    }
    let Some(last) = ends.iter().max() else {
        return vec![failed(Id::RootsPublished, format!("bundle.pem of ConfigMap {TRUST_BUNDLE} has no root"))];
    };
    let days = (last - now).div_euclid(86_400);
    let message = format!("the last root has {days} days left");
    let left = match days {
        ..0 => failed(Id::RootDaysLeft, format!("the last root ended {} days ago", -days)),
        0..FEW_DAYS => warning(Id::RootDaysLeft, message),
        _ => ok(Id::RootDaysLeft, message),
    };
    let published = match ends.len() {
        1 => "one root is published".to_owned(),
        count => format!("{count} roots are published"),
    };
    vec![ok(Id::RootsPublished, published), left]
}

/// What the API server and the nodes say of nodes and pods.
struct Asked {
    nodes: Vec<Node>,
    pods_of_nodes: Vec<Pod>,
    rows: Vec<PodRow>,
    pages: BTreeMap<String, NodePages>,
}

async fn ask(cluster: &Cluster, namespace: Option<&str>) -> anyhow::Result<Asked> {
    let pods_of_nodes = wait::pods_of(cluster, NODE).await?;
    let nodes: Vec<Node> = cluster.list("/api/v1/nodes", "").await?;
    let pods = status::pods(cluster, namespace).await?;
    let pages = pages::of_pods(cluster, &pods_of_nodes, nodes::PAGES).await;
    let rows = status::rows(&pods, &pages, &Leaving::look(cluster).await);
    Ok(Asked { nodes, pods_of_nodes, rows, pages })
}

async fn nodes_and_pods(cluster: &Cluster, namespace: Option<&str>) -> Vec<Finding> {
    let mut findings = workload(cluster, Id::NodePods, "daemonsets", NODE).await;
    let mut asked = match ask(cluster, namespace).await {
        Ok(asked) => asked,
        Err(error) => {
            findings.push(failed(Id::NodeAgents, format!("{error:#}")));
            return findings;
        }
    };
    let mut unheard = None;
    for _ in 1..LOOKS {
        // Of a node that is silent nothing else is to be expected so soon, and to ask it takes long.
        let silent = nodes::silent(&asked.nodes, &asked.pages);
        let is_doubtful = |row: &PodRow| row.is_amiss() && !silent.contains_key(&row.node);
        if !asked.rows.iter().any(is_doubtful) {
            break;
        }
        tokio::time::sleep(AGAIN).await;
        match ask(cluster, namespace).await {
            Ok(again) => {
                let before = std::mem::replace(&mut asked, again).rows;
                asked.rows.retain(|row| !row.is_amiss() || before.iter().any(|it| it.is_amiss() && it.uid == row.uid));
            }
            // What is known of the rest stays.
            Err(error) => {
                unheard = Some(failed(Id::PodsCaptured, format!("{error:#}")));
                asked.rows.retain(|row| !is_doubtful(row));
                break;
            }
        }
    }
    let Asked { nodes, pods_of_nodes, rows, pages } = asked;
    // Where there are none nobody can be asked, for the cause that is named already.
    if !pods_of_nodes.is_empty() {
        let silent = nodes::silent(&nodes, &pages);
        findings.extend(nodes::versions(&pods_of_nodes));
        findings.extend(nodes::of_pages(&nodes, &pages, &silent));
        findings.extend(nodes::captures(&rows, &silent, Timestamp::now()));
    }
    findings.extend(unheard);
    findings
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_are_unique_and_groups_stand_together() {
        let mut names: Vec<_> = Id::ALL.iter().map(|id| id.as_str()).collect();
        assert!(Id::ALL.is_sorted_by_key(|id| id.group()));
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Id::ALL.len());
    }

    #[test]
    fn each_check_is_explained_where_it_says() {
        let specification = include_str!("../../../SPECIFICATION.md");
        for id in Id::ALL {
            let (file, anchor) = id.documentation().split_once('#').unwrap();
            assert_eq!(file, "SPECIFICATION.md");
            assert!(specification.contains(&format!("<a id=\"{anchor}\"></a>`{}`", id.as_str())), "{anchor}");
        }
    }

    fn pod(name: &str) -> Pod {
        serde_json::from_value(json!({ "metadata": { "name": name } })).unwrap()
    }

    #[test]
    fn the_lease_is_held_by_one_of_our_pods_or_not() {
        let lease = |holder: &str| json!({ "spec": { "holderIdentity": holder } });
        assert_eq!(held(Some(&lease("justmtls-control-a")), &[pod("justmtls-control-a")]).state, State::Ok);
        for (lease, pods) in
            [(None, vec![]), (Some(lease("")), vec![]), (Some(lease("gone")), vec![pod("justmtls-control-a")])]
        {
            assert_eq!(held(lease.as_ref(), &pods).state, State::Failed);
        }
    }

    /// A root that ends with 2049.
    fn root() -> String {
        let mut parameters = rcgen::CertificateParams::default();
        parameters.not_after = rcgen::date_time_ymd(2050, 1, 1);
        parameters.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem()
    }

    #[test]
    fn the_days_of_the_roots_are_counted() {
        let bundle = |text: &str| Some(json!({ "data": { "bundle.pem": text } }));
        let states = |bundle, now| roots(bundle, now).into_iter().map(|finding| finding.state).collect::<Vec<_>>();
        let end = 2_524_608_000; // 2050-01-01
        assert_eq!(states(bundle(&root()), 1_800_000_000), [State::Ok, State::Ok]);
        assert_eq!(states(bundle(&root()), end - 10 * 86_400), [State::Ok, State::Warning]);
        assert_eq!(states(bundle(&root()), end + 10 * 86_400), [State::Ok, State::Failed]);
        assert_eq!(states(bundle(""), 0), [State::Failed]);
        assert_eq!(
            states(bundle("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), 0),
            [State::Failed]
        );
        assert_eq!(states(None, 0), [State::Failed]);
    }
}
