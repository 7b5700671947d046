//! What an agent before this one had, and what a proxy is to serve.

use wire::discovery::NodePod;

use super::{Action, Leaving, Pod, Pods, Sandbox, Stage, Work, same_addresses};
use crate::failure::Failure;

impl Pods {
    /// The control plane has named all pods of the node. What was inherited and is not among them is gone.
    pub(crate) fn complete(&mut self) -> Vec<Action> {
        self.complete = true;
        let gone = |pod: &Pod| pod.known.is_some() && !pod.named;
        let gone: Vec<_> = self.pods.iter().filter(|(_, pod)| gone(pod)).map(|(uid, _)| uid.clone()).collect();
        gone.iter().flat_map(|uid| self.forget(uid)).collect()
    }

    /// A pod that an agent before this one had, by the word of who holds its listeners. Its namespace is to be held open if
    /// [`Pods::holds`] says so afterwards.
    pub(crate) fn inherit(&mut self, known: NodePod, namespace: u64) -> Vec<Action> {
        let mut actions = Vec::new();
        let uid = known.pod.clone();
        if let Some(other) = self.holder(namespace).filter(|other| **other != uid) {
            actions.push(Action::Report(uid, Failure::Ambiguous { inode: namespace, other: other.clone() }));
            return actions;
        }
        let complete = self.complete;
        let pod = self.pods.entry(uid.clone()).or_default();
        // The runtime may have named it before, and it may have failed by that: its ports are taken, by the listeners that come now.
        let is_made = |it: &Sandbox| it.namespace != namespace || !matches!(it.stage, Stage::Bare);
        if pod.sandbox.as_ref().is_some_and(is_made) {
            return actions;
        }
        let same = |named: &NodePod| {
            let as_named = named.addresses.is_empty() || same_addresses(&named.addresses, &known.addresses);
            named.identity == known.identity && as_named
        };
        if !pod.known.as_ref().map_or(!complete, same) {
            // It is gone, or the control plane says otherwise who it is.
            actions.push(Action::Withdraw(uid.clone()));
            if pod.known.is_none() {
                self.pods.remove(&uid);
            }
            return actions;
        }
        let name = format!("{}/{}", known.namespace, known.name);
        let addresses = known.addresses.clone();
        pod.known.get_or_insert(known).addresses.clone_from(&addresses);
        let sandbox = pod.sandbox.get_or_insert_with(|| Sandbox::new(namespace, name));
        (sandbox.addresses, sandbox.inherited, sandbox.stuck) = (addresses, true, false);
        self.advance(&uid, &mut actions);
        actions
    }

    /// Whether something inherited is not captured yet: until then nobody may be told what is captured here.
    pub(crate) fn inheriting(&self) -> bool {
        self.pods
            .values()
            .filter_map(|pod| pod.sandbox.as_ref())
            .any(|sandbox| sandbox.inherited && matches!(sandbox.stage, Stage::Preparing(_) | Stage::Beginning(_)))
    }

    /// The pods that a proxy is to serve.
    pub(crate) fn served(&self) -> Vec<NodePod> {
        let served = |pod: &Pod| match &pod.sandbox.as_ref()?.stage {
            Stage::Bare
            | Stage::Looking(_)
            | Stage::Preparing(_)
            | Stage::Beginning(Work { cancelled: true, .. })
            | Stage::Leaving(Leaving { look: Some(Work { cancelled: true, .. }), .. }) => None,
            Stage::Found | Stage::Offered { .. } | Stage::Beginning(_) | Stage::Captured | Stage::Leaving(_) => {
                pod.known.clone()
            }
        };
        self.pods.values().filter_map(served).collect()
    }
}
