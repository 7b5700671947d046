//! Which pods have rules of ours, as the agents say, and which nodes do not say. Pure.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::pages::{NodePages, Process};
use crate::table::{printable, some};

/// The pages that are asked for.
pub(super) const PAGES: &[(Process, &str)] = &[(Process::Agent, "/pods"), (Process::Agent, "/readyz")];

/// States in which a pod has rules, or may have: who is still looked at may turn out to have them. `failed` is none of them: whose
/// taking over fails is said to stand besides, until it is known that nothing does.
const STANDS: &[&str] =
    &["waiting", "looking", "found", "preparing", "offered", "beginning", "captured", "damaged", "leaving"];

/// A pod with rules of ours.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Standing {
    /// `namespace/name`.
    pub(super) name: String,
    /// It captures nothing new, and what was captured is still open.
    pub(super) leaving: bool,
}

impl Standing {
    /// What an agent shows of a pod, where rules stand in it or may.
    fn read(pod: &Value) -> Option<Self> {
        let state = pod["state"].as_str().unwrap_or_default();
        (pod["stands"] == true || STANDS.contains(&state))
            .then(|| Self { name: name(pod), leaving: state == "leaving" })
    }
}

fn name(pod: &Value) -> String {
    printable(pod["name"].as_str().unwrap_or_default())
}

/// The pods whose sandbox an agent does not know: one that is younger than their rules cannot say whether those stand. It is nothing
/// where the pod does not run.
pub(super) fn doubts(pages: &NodePages) -> impl Iterator<Item = (&str, String)> {
    let pods = pages.page(Process::Agent, "/pods").as_array().into_iter().flatten();
    // In its node's network none ever stood. Any other reason may be younger than the rules: a label that was taken away, a
    // redirection that came.
    let doubtful = pods.filter(|pod| pod["state"] == "no-sandbox" && pod["not_captured"] != "host-network");
    doubtful.map(|pod| (pod["uid"].as_str().unwrap_or_default(), name(pod)))
}

/// What has not left the mesh yet.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(super) struct NotLeft {
    /// Pods with rules of ours, of all nodes.
    pub(super) pods: Vec<Standing>,
    /// Pods that run, and that their agents have not looked into.
    pub(super) unseen: Vec<String>,
    /// The nodes of which nothing is known, and why.
    pub(super) silent: BTreeMap<String, String>,
}

impl NotLeft {
    /// By what the nodes say, and which pods run.
    pub(super) fn of(pages: &BTreeMap<String, NodePages>, running: &BTreeSet<String>) -> Self {
        let mut found = Self::default();
        for (node, pages) in pages {
            match heard(pages, running) {
                Ok((pods, unseen)) => {
                    found.pods.extend(pods);
                    found.unseen.extend(unseen);
                }
                Err(why) => {
                    found.silent.insert(printable(node), printable(&why));
                }
            }
        }
        found
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pods.is_empty() && self.is_known()
    }

    /// Whether somebody says of each pod whether it has left.
    pub(super) fn is_known(&self) -> bool {
        self.unseen.is_empty() && self.silent.is_empty()
    }

    /// The pods whose rules capture still, or may.
    pub(super) fn capturing(&self) -> Vec<String> {
        self.pods.iter().filter(|pod| !pod.leaving).map(|pod| pod.name.clone()).collect()
    }

    /// The pods that are held by what they have open.
    pub(super) fn held(&self) -> Vec<String> {
        self.pods.iter().filter(|pod| pod.leaving).map(|pod| pod.name.clone()).collect()
    }

    /// All of it, as short as it can be said.
    pub(super) fn who(&self) -> String {
        let pods: Vec<_> = self.pods.iter().map(|pod| pod.name.clone()).chain(self.unseen.iter().cloned()).collect();
        let pods = Some(some(&pods)).filter(|_| !pods.is_empty());
        let nodes = Some(format!("all on {}", self.nodes())).filter(|_| !self.silent.is_empty());
        pods.into_iter().chain(nodes).collect::<Vec<_>>().join(", and ")
    }

    /// The nodes of which nothing is known.
    pub(super) fn nodes(&self) -> String {
        self.silent.keys().cloned().collect::<Vec<_>>().join(", ")
    }

    /// The same, with the reasons.
    pub(super) fn nodes_and_why(&self) -> String {
        self.silent.iter().map(|(node, why)| format!("{node} ({why})")).collect::<Vec<_>>().join(", ")
    }

    /// What is waited for.
    pub(super) fn waiting(&self) -> String {
        let names: Vec<_> = self.pods.iter().map(|pod| pod.name.clone()).collect();
        let mut parts = Vec::new();
        if !names.is_empty() {
            parts.push(format!("until {} pods have left the mesh: {}", names.len(), some(&names)));
        }
        if !self.unseen.is_empty() {
            parts.push(format!("until agents have looked into {} pods: {}", self.unseen.len(), some(&self.unseen)));
        }
        if !self.silent.is_empty() {
            parts.push(format!("to hear whether the pods of {} have left the mesh", self.nodes_and_why()));
        }
        format!("waiting {}", parts.join("; and "))
    }
}

/// The pods of a node that have rules of ours, and those that its agent has not looked into; or why nobody can say.
fn heard(pages: &NodePages, running: &BTreeSet<String>) -> Result<(Vec<Standing>, Vec<String>), String> {
    for (process, page) in PAGES {
        if let Some(why) = pages.failure(*process, page) {
            return Err(why.to_owned());
        }
    }
    if let Some(why) = not_ready(pages.page(Process::Agent, "/readyz")) {
        return Err(why.to_owned());
    }
    let unseen = doubts(pages).filter(|(uid, _)| running.contains(*uid)).map(|(_, name)| name).collect();
    let pods = pages.page(Process::Agent, "/pods").as_array().into_iter().flatten();
    Ok((pods.filter_map(Standing::read).collect(), unseen))
}

/// Why an agent cannot say of each pod whether rules stand in it. Whether its plugin is in place is no matter for pods that run.
fn not_ready(said: &Value) -> Option<&'static str> {
    let knows = said["pods_named"] == true || said["inherited"] == true;
    let is_idle = said["pending"].as_array().is_none_or(Vec::is_empty);
    match (said["ready"] == true, knows, said["proxy"] == true, is_idle) {
        (true, ..) | (false, true, true, true) => None,
        (false, false, ..) => Some("its agent does not know its pods yet"),
        (false, true, false, _) => Some("its agent has no proxy yet"),
        (false, true, true, false) => Some("its agent is not ready yet"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(ready: Value, pods: Value) -> NodePages {
        NodePages::told("x", &[(Process::Agent, "/pods", pods), (Process::Agent, "/readyz", ready)])
    }

    fn of(pages: NodePages) -> NotLeft {
        let running = BTreeSet::from(["runs".to_owned()]);
        NotLeft::of(&BTreeMap::from([("a".to_owned(), pages)]), &running)
    }

    #[test]
    fn a_pod_has_rules_from_before_it_is_captured_until_it_has_left_and_where_its_agent_finds_them() {
        let read = |state: &str| Standing::read(&json!({ "name": "shop/web", "state": state })).map(|pod| pod.leaving);
        assert_eq!(["captured", "beginning", "looking"].map(read), [Some(false); 3]);
        assert_eq!(read("leaving"), Some(true));
        // One that was never captured may fail, too; one whose rules are taken over, and fails at it, has them all the same.
        let read = |state: &str, stands: bool| {
            let pod = json!({ "name": "shop/web", "state": state, "stands": stands });
            Standing::read(&pod).map(|pod| pod.leaving)
        };
        for state in ["not-captured", "failed"] {
            assert_eq!([read(state, false), read(state, true)], [None, Some(false)], "{state}");
        }
        assert_eq!([read("preparing", false), read("leaving", true)], [Some(false), Some(true)]);
    }

    #[test]
    fn an_agent_that_is_younger_than_what_it_should_know_is_not_believed() {
        let ready = json!({ "ready": true, "pods_named": true, "proxy": true, "pending": [] });
        let left = json!([{ "uid": "runs", "name": "shop/web", "state": "not-captured", "not_captured": "opted-out" }]);
        assert!(of(node(ready.clone(), left.clone())).is_empty());
        for (said, word) in [
            (
                json!({ "ready": false, "pods_named": false, "inherited": false, "proxy": true, "pending": [] }),
                "know its pods",
            ),
            (json!({ "ready": false, "pods_named": true, "proxy": false, "pending": [] }), "no proxy"),
            (json!({ "ready": false, "pods_named": true, "proxy": true, "pending": ["shop/web"] }), "not ready"),
        ] {
            let found = of(node(said, json!([])));
            assert!(found.silent["a"].contains(word), "{found:?}");
            assert!(found.waiting().contains("whether the pods of a (its agent"), "{}", found.waiting());
        }
        // What keeps new pods from being captured says nothing of those that leave.
        let no_plugin = json!({ "ready": false, "pods_named": true, "proxy": true, "plugin": false, "pending": [] });
        assert!(of(node(no_plugin, left)).is_empty());
    }

    #[test]
    fn a_pod_that_runs_and_was_not_looked_into_is_in_doubt_for_whichever_reason_it_is_not_captured() {
        let ready = json!({ "ready": true });
        let unseen = |uid: &str, why: Value| json!([{ "uid": uid, "name": "shop/web", "state": "no-sandbox", "not_captured": why }]);
        // What was captured by a label that is gone, or before another mesh took it, may have its rules still.
        for why in [json!("opted-out"), json!("system-namespace"), json!("not-capturable"), Value::Null] {
            let found = of(node(ready.clone(), unseen("runs", why.clone())));
            assert!(!found.is_empty() && !found.is_known() && found.unseen == ["shop/web"], "{why}: {found:?}");
            assert_eq!(found.waiting(), "waiting until agents have looked into 1 pods: shop/web");
            assert!(of(node(ready.clone(), unseen("ended", why))).is_empty());
        }
        assert!(of(node(ready.clone(), unseen("runs", json!("host-network")))).is_empty());
        // It hides no other pod of its node.
        let mut pods = unseen("runs", json!("opted-out"));
        pods.as_array_mut().unwrap().push(json!({ "uid": "x", "name": "shop/db", "state": "leaving" }));
        let found = of(node(ready, pods));
        assert_eq!((found.held(), found.unseen.len()), (vec!["shop/db".to_owned()], 1));
    }

    #[test]
    fn a_node_that_says_nothing_is_named_and_is_not_a_node_without_pods() {
        let found = of(NodePages::default());
        assert!(!found.is_empty() && found.nodes() == "a", "{found:?}");
        assert!(found.waiting().contains("a (there is no pod of justmtls"), "{}", found.waiting());
        let ready = json!({ "ready": true });
        let pods = json!([{ "name": "shop/web", "state": "captured" }, { "name": "shop/db", "state": "leaving" }]);
        let found = of(node(ready, pods));
        assert_eq!((found.capturing(), found.held()), (vec!["shop/web".to_owned()], vec!["shop/db".to_owned()]));
        assert_eq!(found.waiting(), "waiting until 2 pods have left the mesh: shop/web, shop/db");
    }
}
