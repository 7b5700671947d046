//! Which pods run, are meant to be captured, and cannot be: by the index, or by the word of their node's agent.
//!
//! An agent speaks of the pods of its own node alone, and its word is one name of a closed set: what people read is made here.

use std::collections::BTreeMap;

use mesh::{PodUid, Uncaptured};
use wire::report::CaptureFailure;

use crate::index::Index;
use crate::nodes::Nodes;

/// Pods that are told of at once, of each source. More would bring more events than anybody reads; `status` has all of them.
pub(crate) const MOST: usize = 4096;

/// One of them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Uncapturable {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) node: String,
    /// Why, by the name that logs and pages have.
    pub(crate) why: &'static str,
    /// What it is and what to do, as one sentence that follows the name.
    pub(crate) sentence: String,
    /// Whether an agent found it. Then it is told by the replica that serves that agent, and else by the one that leads.
    pub(crate) by_agent: bool,
}

/// All of them.
pub(crate) type Uncapturables = BTreeMap<PodUid, Uncapturable>;

/// What agents have said last, by node.
#[derive(Default, Debug)]
pub(crate) struct Failures(BTreeMap<String, BTreeMap<PodUid, CaptureFailure>>);

impl Failures {
    /// Takes in what a node's agent says now, in place of what it said before.
    pub(crate) fn reported(&mut self, node: &str, failed: BTreeMap<PodUid, CaptureFailure>) {
        if failed.is_empty() {
            self.0.remove(node);
        } else {
            self.0.insert(node.to_owned(), failed);
        }
    }

    /// What holds now. What an agent said counts for as long as it is told here what to capture: it tells another replica how its
    /// node is, otherwise.
    pub(crate) fn all(&mut self, index: &Index, nodes: &Nodes) -> Uncapturables {
        // A node that is gone comes back with a report.
        self.0.retain(|node, _| nodes.serves_agent_of(node) || index.has_node(node));
        let served = self.0.iter().filter(|(node, _)| nodes.serves_agent_of(node));
        let said = served.flat_map(|(node, failed)| failed.iter().map(move |(pod, why)| (node, pod, *why)));
        let by_agents = said.filter_map(|(node, pod, why)| {
            let (namespace, name) = index.runs_to_be_captured(node, pod)?;
            let found = Uncapturable {
                namespace: namespace.to_owned(),
                name: name.to_owned(),
                node: node.clone(),
                why: why.as_str(),
                sentence: sentence(why, node),
                by_agent: true,
            };
            Some((pod.clone(), found))
        });
        let by_agents = by_agents.take(MOST);
        let by_index = index.foreign().take(MOST).map(|(pod, foreign)| {
            let found = Uncapturable {
                namespace: pod.name.namespace.clone(),
                name: pod.name.name.clone(),
                node: pod.node.clone(),
                why: Uncaptured::NotCapturable.in_clear().as_str(),
                sentence: foreign.sentence(),
                by_agent: false,
            };
            (pod.uid.clone(), found)
        });
        by_agents.chain(by_index).collect()
    }
}

/// What a failure means, and what to do.
fn sentence(why: CaptureFailure, node: &str) -> String {
    let text = match why {
        CaptureFailure::NoControlPlane => "the node's agent has no connection to the control plane; see its log",
        CaptureFailure::UnknownPod => "its node's agent does not know it; delete the pod to have it made anew",
        CaptureFailure::NoAddress => "it has no address yet; look at the node's CNI plugins",
        CaptureFailure::OtherName => {
            "the container runtime has another pod under its UID; delete the pod to have it made anew"
        }
        CaptureFailure::AmbiguousNamespace => {
            "its network namespace is another pod's, too; delete both pods to have them made anew"
        }
        CaptureFailure::NoNamespace => {
            "the container runtime names no network namespace of it that could be opened; delete the pod to have it made \
             anew"
        }
        CaptureFailure::NoProxy => {
            "no proxy of the node is connected to its agent; look at the node's pod in justmtls-system"
        }
        CaptureFailure::ProxyNotReady => {
            "the node's proxy has no certificate for it yet; see the proxy's log for the reason"
        }
        CaptureFailure::SandboxGone => {
            "its sandbox was deleted or replaced meanwhile; it is captured with the next one"
        }
        CaptureFailure::NotItsAddress => {
            "its network namespace does not have the addresses of its status.podIPs; look at the node's CNI plugins, or delete the \
             pod to have it made anew"
        }
        CaptureFailure::NoIpv6 => "it has an IPv6 address, and its network namespace no IPv6; see the node's sysctls",
        CaptureFailure::NoInterface => {
            "no interface but lo has its addresses, so that no guard could stand there; opt it out by the label \
             justmtls.dev/mode: off, or give it an interface"
        }
        CaptureFailure::TooManyExcludedPorts => {
            "more ports are excluded than fit the guard on its interface; set fewer as excludedPorts"
        }
        CaptureFailure::Resources => "the node's agent has no descriptors left; see its log",
        CaptureFailure::StillOpen | CaptureFailure::DoesNotStand => {
            "something else changes its rules or connections; find out which program of the node does, and see the agent's log"
        }
        CaptureFailure::Socket => {
            "a listener could not be made; if a program of the pod has port 15001 or 15006, let it use another, else see the \
             agent's log"
        }
        CaptureFailure::BatchSize
        | CaptureFailure::Namespace
        | CaptureFailure::Links
        | CaptureFailure::Mark
        | CaptureFailure::Netlink
        | CaptureFailure::Notifications => {
            "the node's kernel refused what capture needs; see the agent's log for what it said"
        }
        CaptureFailure::Internal => "the node's agent failed while it worked on it; see its log, and report this",
    };
    format!("{text} (node {node})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_has_a_sentence_that_fits_an_event_and_says_what_to_do() {
        for why in CaptureFailure::ALL {
            let sentence = sentence(*why, "node-a");
            assert!(sentence.len() < 512 && sentence.ends_with("(node node-a)"), "{sentence}");
            assert!(sentence.contains("; "), "{sentence}");
        }
    }
}
