//! Every pod leaves the mesh while it runs, before anything is taken away.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::bail;
use k8s_openapi::api::core::v1::Node;
use kube::Error;
use serde_json::Value;

use super::standing::{self, NotLeft, doubts};
use super::{Progress, RECORDED, RECORDS, Work};
use crate::leaving::{self, Stage};
use crate::looks::Looks;
use crate::objects::{Object, settings_object};
use crate::pages::{self, NodePages, Process};
use crate::status;
use crate::table::{printable, some};
use crate::values::Values;
use crate::wait::{LOOK, is_static, runs};

/// How long pods may take to leave beyond the drain time, in seconds: everybody is told, and each replica waits a while for
/// nodes that it does not see.
const LEAVE: u64 = 60;
/// For how long nodes may be silent, or pods not looked into, when nothing else is waited for, in seconds: twice what an agent takes
/// that is made anew.
const SILENCE: u64 = 120;

impl Work {
    /// Every captured pod leaves the mesh, in order and while it runs: its peers are told first, then its rules go. What it has
    /// open goes on for as long as the drain time.
    /// Settings that somebody deleted are made anew for it: who is told nothing stays in the mesh, and would be cut off.
    pub(super) async fn farewell(
        &self,
        values: &Values,
        has_nodes: bool,
        stays: &mut Vec<String>,
    ) -> anyhow::Result<()> {
        let settings = self.cluster.get(&leaving::place()).await?.unwrap_or_default();
        let stage = Stage::of(&settings);
        if !self.dry_run {
            // One that was interrupted goes on, and what that one changed is changed.
            let is_taken = !has_nodes && stage != Stage::No;
            self.progress.set(if is_taken { Progress::Taken } else { stage.into() });
        }
        let not_left = self.not_left(has_nodes && stage == Stage::Begun).await?;
        if not_left.is_empty() {
            return Ok(());
        }
        if !has_nodes {
            stays.push(format!(
                "rules in the network namespaces of pods, perhaps ({}), which are cut off then, since the DaemonSet was deleted before \
                 it was known that they had left: they go when the pods are made anew, or with `justmtls install` and `justmtls uninstall`",
                not_left.who()
            ));
            return Ok(());
        }
        if self.dry_run {
            anstream::println!("every captured pod would leave the mesh first");
            return Ok(());
        }
        if stage == Stage::Begun {
            // To announce it once more would take back those that have left.
            return self.wait_for_all(values.drain(), stays).await;
        }
        let mut settings = settings_object(values);
        // Who leaves first must not be refused by who leaves later.
        let patience = self.until(LEAVE);
        self.tell(&mut settings, "announced", Progress::Announced).await?;
        let mut looks = Looks::default();
        let enforcing = loop {
            let enforcing = looks.heard(self.enforcing().await)?;
            let over = Instant::now() >= patience;
            match enforcing {
                Some(nodes) if over || nodes.is_empty() => break nodes,
                _ => tokio::time::sleep(LOOK).await,
            }
        };
        if !enforcing.is_empty() {
            anstream::eprintln!(
                "the proxies of {} do not say that they let plaintext in by now; where they do not, pods that leave first are refused \
                 until theirs have left, too",
                enforcing.join(", ")
            );
        }
        self.tell(&mut settings, "begun", Progress::Begun).await?;
        self.wait_for_all(values.drain(), stays).await
    }

    async fn wait_for_all(&self, drain: u64, stays: &mut Vec<String>) -> anyhow::Result<()> {
        let begun = Instant::now();
        // When what is open has had its time, and when nobody wants to wait any more.
        let mut drained = begun + Duration::from_secs(drain + LEAVE);
        let given_up = self.until(drain + LEAVE);
        let (mut said, mut drains, mut silence) = (None, false, None);
        let mut looks = Looks::default();
        loop {
            let Some(not_left) = looks.heard(self.not_left(true).await)? else {
                tokio::time::sleep(LOOK).await;
                continue;
            };
            if not_left.is_empty() {
                return Ok(());
            }
            let (capturing, held) = (not_left.capturing(), not_left.held());
            // Only what is open holds these.
            if !drains && not_left.is_known() && capturing.is_empty() {
                drains = true;
                drained = drained.min(Instant::now() + Duration::from_secs(drain));
                anstream::eprintln!(
                    "what pods have open that leave goes on for {drain} s at most, the drain time, and is waited for; --timeout waits \
                     less"
                );
            }
            let news = (not_left.pods.len(), not_left.unseen.clone(), not_left.silent.clone());
            if said.as_ref() != Some(&news) {
                anstream::eprintln!("{}", not_left.waiting());
                said = Some(news);
            }
            silence = not_left.pods.is_empty().then(|| silence.unwrap_or_else(Instant::now));
            let now = Instant::now();
            let is_silence = silence.is_some_and(|since| now >= since + Duration::from_secs(SILENCE));
            if now >= drained || now >= given_up || is_silence {
                if !self.force
                    && let Some(sentence) = too_early(&not_left, now >= drained, begun.elapsed())
                {
                    bail!("{sentence}");
                }
                if !held.is_empty() {
                    anstream::eprintln!("the time is over: what these have open is ended: {}", held.join(", "));
                }
                if !capturing.is_empty() {
                    stays.push(format!(
                        "rules in the network namespaces of {}, which are cut off: they go when the pods are made anew",
                        some(&capturing)
                    ));
                }
                if !not_left.unseen.is_empty() {
                    stays.push(format!(
                        "perhaps, rules in the network namespaces of {}, which their agents could not look into: they go when the pods \
                         are made anew",
                        some(&not_left.unseen)
                    ));
                }
                if !not_left.silent.is_empty() {
                    stays.push(format!(
                        "rules in the network namespaces of pods on {0}: they go when the pods are made anew; and, where no agent has taken \
                         it out, the CNI plugin: remove 00-justmtls.conflist from the CNI configurations of {0}",
                        not_left.nodes()
                    ));
                }
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn tell(&self, settings: &mut Object, leaving: &str, progress: Progress) -> anyhow::Result<()> {
        settings.value["data"]["leaving"] = leaving.into();
        // An answer that is not heard any more may have been a yes.
        let before = self.progress.replace(progress);
        let told = self.cluster.apply(settings, false, true).await;
        if matches!(&told, Err(Error::Api(status)) if status.code < 500) {
            self.progress.set(before);
        }
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

    /// The pods that have rules of ours, and the nodes of which nobody says whether theirs have. `begun`: pods were told to leave.
    async fn not_left(&self, begun: bool) -> anyhow::Result<NotLeft> {
        let pages = pages::of_nodes(&self.cluster, standing::PAGES).await?;
        let mut running = BTreeSet::new();
        if pages.values().any(|pages| doubts(pages).next().is_some()) {
            let pods = status::pods(&self.cluster, None).await?;
            // No agent finds a static pod by the UID of its mirror, and so none has ever captured one.
            let pods = pods.into_iter().filter(|pod| runs(pod) && !is_static(pod));
            running.extend(pods.filter_map(|pod| pod.metadata.uid));
        }
        let mut found = NotLeft::of(&pages, &running);
        // The control plane remembers pods also where no agent runs that could be asked.
        let records: Vec<Value> = self.cluster.list(RECORDS, RECORDED).await?;
        let of_record = |record| node_of_record(record, begun);
        let unasked: Vec<_> = records.iter().filter_map(of_record).filter(|it| !pages.contains_key(it)).collect();
        if !unasked.is_empty() {
            let nodes: Vec<Node> = self.cluster.list("/api/v1/nodes", "").await?;
            let there = |name: &String| nodes.iter().any(|node| node.metadata.name.as_ref() == Some(name));
            let why = NodePages::default().failure(Process::Agent, "/pods").unwrap_or_default().to_owned();
            found.silent.extend(unasked.into_iter().filter(there).map(|node| (printable(&node), why.clone())));
        }
        Ok(found)
    }
}

/// Why nothing is to be taken away yet; `None` where only connections are left that have had their time.
fn too_early(not_left: &NotLeft, is_drained: bool, waited: Duration) -> Option<String> {
    let (capturing, held) = (not_left.capturing(), not_left.held());
    let mut wrong = Vec::new();
    if !not_left.silent.is_empty() {
        let nodes = not_left.nodes_and_why();
        wrong.push(format!("nobody says whether the pods of {nodes} have left the mesh"));
    }
    if !not_left.unseen.is_empty() {
        let unseen = &not_left.unseen;
        wrong.push(format!(
            "nobody says whether {} pods have rules of ours ({}): the agent of each could not look into it",
            unseen.len(),
            some(unseen)
        ));
    }
    if !capturing.is_empty() {
        wrong.push(format!("{} pods have not left the mesh ({})", capturing.len(), some(&capturing)));
    }
    if !held.is_empty() && !is_drained {
        wrong.push(format!("{} pods have connections open ({})", held.len(), some(&held)));
    }
    (!wrong.is_empty()).then(|| {
        format!(
            "after {} s {}; pods that have not left are cut off when nobody serves them. Run the command again to go on, with a longer \
             --timeout, or with --force to go on without them",
            waited.as_secs(),
            wrong.join(", and ")
        )
    })
}

/// The node of a record of captured pods that names any. Once pods were told to leave each is taken out before its peers are told,
/// and long before its rules go: a node that had any then counts by having a record.
fn node_of_record(record: &Value, begun: bool) -> Option<String> {
    let pods = record["data"]["pods"].as_str().unwrap_or_default();
    let node = record["data"]["node"].as_str().filter(|node| !node.is_empty())?;
    (begun || !pods.trim().is_empty()).then(|| node.to_owned())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::super::standing::Standing;
    use super::*;

    #[test]
    fn a_record_names_its_node_while_it_names_pods() {
        let of = |pods: &str, begun| node_of_record(&json!({ "data": { "node": "a", "pods": pods } }), begun);
        assert_eq!((of("1-2\n3-4", false), of(" \n", false)), (Some("a".to_owned()), None));
        assert_eq!(of("", true), Some("a".to_owned()), "what it named may have rules still");
        assert_eq!(node_of_record(&json!({}), true), None);
    }

    #[test]
    fn only_connections_that_have_had_their_time_are_ended_without_a_word_of_the_administrator() {
        let pod =
            |leaving| NotLeft { pods: vec![Standing { name: "shop/web".to_owned(), leaving }], ..NotLeft::default() };
        let sentence = |not_left: &NotLeft, drained| too_early(not_left, drained, Duration::from_secs(20));
        assert_eq!(sentence(&pod(true), true), None);
        let early = sentence(&pod(true), false).unwrap();
        assert!(early.starts_with("after 20 s 1 pods have connections open (shop/web);"), "{early}");
        assert!(early.contains("--timeout") && early.contains("--force"), "{early}");
        assert!(sentence(&pod(false), true).unwrap().contains("1 pods have not left the mesh (shop/web)"));
        let silent = NotLeft { silent: BTreeMap::from([("a".to_owned(), "why".to_owned())]), ..NotLeft::default() };
        assert!(sentence(&silent, true).unwrap().contains("whether the pods of a (why) have left"));
        let unseen = NotLeft { unseen: vec!["shop/web".to_owned()], ..NotLeft::default() };
        let unseen = sentence(&unseen, true).unwrap();
        assert!(unseen.contains("1 pods have rules of ours (shop/web): the agent of each could not look into it"));
        assert!(unseen.contains("--force"), "{unseen}");
    }
}
