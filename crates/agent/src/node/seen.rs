//! What is seen of the node: which pods the container runtime has, and how captures stand.

use std::collections::BTreeSet;

use linux::netns::NetNs;
use mesh::PodUid;
use tokio::sync::watch;
use tokio::time::Instant;
use wire::pods::{Ends, FromAgent};

use super::{Node, lock};
use crate::pods::{Action, Running};
use crate::process::Event;
use crate::running::Seen;
use crate::verify::Found;

impl Node {
    /// The pods of whose sandboxes nobody has told.
    pub(crate) fn wanted(&self) -> watch::Receiver<BTreeSet<PodUid>> {
        self.wanted.subscribe()
    }

    /// Whether pods that start are captured.
    pub(crate) fn answers(&self) -> watch::Receiver<bool> {
        self.answers.subscribe()
    }

    /// The container runtime says something.
    pub(crate) fn seen(&mut self, seen: Seen) {
        let actions = match seen {
            Seen::Runtime(Ok(name)) => {
                self.shown.metrics.runtime.set(1);
                self.shown.journal.change("runtime-connected", "", &name);
                return;
            }
            Seen::Runtime(Err(why)) => {
                self.shown.metrics.runtime.set(0);
                self.shown.journal.problem("runtime-unreachable", "", &why);
                self.shown.runtime_fails(Some(why));
                return;
            }
            Seen::Found { running, namespace, missed } => self.find(&running, namespace, missed),
            Seen::Unfound(pod, why) => self.pods.unfound(&pod, why),
            Seen::All(all) => {
                // Not when it is connected: by now it has said which pods run.
                self.shown.runtime_fails(None);
                self.pods.listed(&all);
                let gone = self.missing.gone(&self.pods.present(), &all, Instant::now());
                gone.iter().flat_map(|pod| self.pods.vanished(pod)).collect()
            }
        };
        self.act(actions);
    }

    fn find(&mut self, running: &Running, namespace: NetNs, missed: bool) -> Vec<Action> {
        // Asked for when nobody had told of it; somebody may have since.
        if !self.pods.wants(&running.pod) {
            return Vec::new();
        }
        let inode = namespace.inode();
        let actions = self.pods.find(running, inode);
        if self.pods.holds(inode) {
            self.namespaces.entry(inode).or_insert(namespace);
            if missed && self.pods.is_to_be_captured(&running.pod) && self.late.insert(running.pod.clone()) {
                self.shown.metrics.missed.inc();
                let sentence = format!(
                    "the runtime started {} without asking the plugin, which was in place; its open connections are ended",
                    running.name
                );
                self.shown.journal.problem("missed-add", running.pod.as_str(), &sentence);
            }
        }
        actions
    }

    /// Tells the reporter of pods that run and cannot be captured. Not of each step: what is only late is over when this comes
    /// again, and need not be said.
    pub(super) fn report_failed(&self) {
        let failed = self.pods.failing();
        self.reported.send_if_modified(|before| {
            let changed = before.failed != failed;
            before.failed = failed;
            changed
        });
    }

    /// Ends what a pod has open from before its capture, where there should have been nothing.
    pub(super) fn end_from_before(&self, pod: &PodUid) {
        let Some(capture) = self.captures.get(pod).map(|captured| captured.capture.clone()) else { return };
        let pod = pod.clone();
        self.blocking(move || {
            // All of it: it should have been captured before it had any.
            let found = match lock(&capture).end_from_before(|_| true) {
                Ok(connections) => Found::Ended(connections),
                Err(error) => {
                    Found::Failed { sentence: format!("its connections from before capture cannot be ended: {error}") }
                }
            };
            Event::Found(vec![(pod, found)])
        });
    }

    /// What was opened to a pod before its capture, for those who know what is refused. Told again and again while there is
    /// some: what they say to it may be lost.
    fn open_from_before(&mut self, pod: &PodUid, open: Vec<Ends>) {
        let Some(captured) = self.captures.get_mut(pod) else { return };
        if !(open.is_empty() && captured.from_before.is_empty()) {
            captured.from_before = open;
            self.tell_from_before(pod, None);
        }
    }

    /// Tells one proxy of it, or all that are to serve the pod.
    pub(super) fn tell_from_before(&self, pod: &PodUid, to: Option<u64>) {
        let Some(captured) = self.captures.get(pod) else { return };
        let message = FromAgent::FromBefore { pod: pod.clone(), connections: captured.from_before.clone() };
        for (_, link) in self.proxies.all().filter(|(number, _)| to.is_none_or(|only| only == *number)) {
            // One that does not read is given up where it is told of pods.
            link.send(&message, Vec::new());
        }
    }

    /// Ends what is refused by now of what was open before a pod's capture, and looks what is left. Once at a time: what is said
    /// meanwhile is said again when that is told.
    pub(super) fn end_refused(&mut self, pod: PodUid, these: Vec<Ends>) {
        let Some(captured) = self.captures.get_mut(&pod).filter(|captured| !captured.is_ending) else { return };
        captured.is_ending = true;
        let capture = captured.capture.clone();
        self.blocking(move || {
            let capture = lock(&capture);
            let ended = capture
                .end_from_before(|ends| these.contains(ends))
                .and_then(|ended| Ok((ended, capture.opened_before()?)));
            let found = match ended {
                Ok((ended, left)) => vec![Found::EndedAsRefused(ended), Found::OpenFromBefore(left)],
                Err(error) => {
                    let sentence = format!("its connections from before capture cannot be ended: {error}");
                    vec![Found::EndedAsRefused(0), Found::Failed { sentence }]
                }
            };
            Event::Found(found.into_iter().map(|found| (pod.clone(), found)).collect())
        });
    }

    /// Something was found when captures were looked at.
    pub(crate) fn found(&mut self, found: Vec<(PodUid, Found)>) {
        let mut is_news = false;
        for (pod, found) in found {
            match found {
                Found::Repaired { broken } => {
                    self.shown.metrics.repairs.inc();
                    self.shown.journal.problem("repaired", pod.as_str(), &broken);
                }
                Found::Strengthened => {
                    let detail = "connections from before its capture have ended";
                    self.shown.journal.change("guard-complete", pod.as_str(), detail);
                }
                Found::Ended(connections) => {
                    self.shown.metrics.missed_connections.inc_by(connections as u64);
                    let detail = format!("{connections} connections from before its late capture were ended");
                    self.shown.journal.change("ended-from-before", pod.as_str(), &detail);
                }
                Found::OpenFromBefore(open) => self.open_from_before(&pod, open),
                Found::EndedAsRefused(connections) => {
                    if let Some(captured) = self.captures.get_mut(&pod) {
                        captured.is_ending = false;
                    }
                    if connections == 0 {
                        continue;
                    }
                    self.shown.metrics.refused_connections.inc_by(connections as u64);
                    let detail =
                        format!("{connections} connections from before its capture were ended: plaintext is refused");
                    self.shown.journal.change("ended-from-before", pod.as_str(), &detail);
                }
                Found::Forgotten(flows) => {
                    let detail =
                        format!("{flows} flows that no socket has any more, or that began while rules were gone");
                    self.shown.journal.change("forgotten", pod.as_str(), &detail);
                }
                Found::Dropped(packets) => {
                    self.shown.metrics.guard_drops.inc_by(packets);
                }
                // It has gone while it was looked at.
                Found::Failed { .. } | Found::Damaged(_) if !self.captures.contains_key(&pod) => {}
                Found::Damaged(failure) => {
                    self.shown.metrics.repair_failures.inc();
                    self.shown.journal.problem("repair-failed", pod.as_str(), &failure.to_string());
                    is_news |= self.pods.damaged(&pod, Some(failure));
                }
                Found::Stands => is_news |= self.pods.damaged(&pod, None),
                Found::Failed { sentence } => {
                    self.shown.metrics.repair_failures.inc();
                    self.shown.journal.problem("repair-failed", pod.as_str(), &sentence);
                }
            }
        }
        if is_news {
            self.publish();
        }
    }
}
