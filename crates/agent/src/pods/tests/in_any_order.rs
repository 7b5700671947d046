//! Any order of what is said and done.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

/// What the control plane wants of a pod.
#[derive(Clone, Copy, Debug)]
enum Will {
    Capture,
    Exempt,
    Release,
}

#[derive(Clone, Debug)]
enum Step {
    Know(u8, Will, bool),
    Forget(u8),
    Add(u8, u8),
    Delete(u8),
    Overdue(u8),
    Looked(u8, Option<bool>),
    Prepared(u8, bool),
    Begun(u8, bool),
    Left(u8, Option<bool>),
    Ready(u8),
    Proxy(bool),
    Retry,
}

fn step() -> impl Strategy<Value = Step> {
    let pod = 0..3_u8;
    let will = prop_oneof![3 => Just(Will::Capture), 1 => Just(Will::Exempt), 2 => Just(Will::Release)];
    prop_oneof![
        4 => (pod.clone(), will, any::<bool>()).prop_map(|(pod, will, ips)| Step::Know(pod, will, ips)),
        1 => pod.clone().prop_map(Step::Forget),
        4 => (pod.clone(), 0..4_u8).prop_map(|(pod, namespace)| Step::Add(pod, namespace)),
        1 => pod.clone().prop_map(Step::Delete),
        2 => any::<u8>().prop_map(Step::Overdue),
        6 => (any::<u8>(), any::<Option<bool>>()).prop_map(|(which, stands)| Step::Looked(which, stands)),
        6 => (any::<u8>(), any::<bool>()).prop_map(|(which, good)| Step::Prepared(which, good)),
        6 => (any::<u8>(), any::<bool>()).prop_map(|(which, good)| Step::Begun(which, good)),
        4 => (any::<u8>(), any::<Option<bool>>()).prop_map(|(which, outcome)| Step::Left(which, outcome)),
        6 => pod.prop_map(Step::Ready),
        2 => any::<bool>().prop_map(Step::Proxy),
        1 => Just(Step::Retry),
    ]
}

/// What a shell that does as it is told would have.
#[derive(Default)]
struct Shell {
    pods: Pods,
    looking: Vec<(PodUid, u64)>,
    /// Of these rules were found once.
    found: BTreeSet<PodUid>,
    preparing: Vec<(PodUid, u64)>,
    beginning: Vec<(PodUid, u64)>,
    leaving: Vec<(PodUid, u64)>,
    /// The namespaces of those that leave, by their attempts, while they are held.
    looks: BTreeMap<u64, u64>,
    namespaces: BTreeSet<u64>,
    /// Captures that are there, and whether their proxy was told.
    captures: BTreeMap<PodUid, bool>,
    ready: BTreeSet<PodUid>,
    unanswered: BTreeSet<Request>,
}

impl Shell {
    fn is_busy(&self) -> bool {
        let all = [&self.looking, &self.preparing, &self.beginning, &self.leaving];
        all.iter().any(|list| !list.is_empty())
    }

    fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Prepare { pod, namespace, attempt } => {
                    assert!(pod.capture.is_ok() || self.found.contains(&pod.pod), "only what stands in it is a reason");
                    assert!(!pod.addresses.is_empty());
                    assert!(self.namespaces.contains(&namespace), "it is held");
                    assert!(!self.captures.contains_key(&pod.pod), "nothing is made twice");
                    self.preparing.push((pod.pod, attempt));
                }
                Action::Look { pod, namespace, attempt } => {
                    assert!(self.namespaces.contains(&namespace), "it is held");
                    assert!(!self.captures.contains_key(&pod), "what was made is known");
                    self.looking.push((pod, attempt));
                }
                Action::Offer(pod) => *self.captures.get_mut(&pod.pod).expect("it is made") = true,
                Action::Begin { pod, attempt } => {
                    assert!(self.captures[&pod] && self.ready.contains(&pod), "the proxy has the listeners");
                    self.beginning.push((pod, attempt));
                }
                Action::Leave { pod, attempt } => {
                    assert!(self.captures.contains_key(&pod), "it was captured");
                    assert!(!self.pods.captured().contains(&pod), "it is not reported");
                    let namespace = self.pods.namespace_of(&pod).expect("it has a sandbox");
                    let under_way =
                        |(other, attempt): &(PodUid, u64)| *other == pod && self.looks.contains_key(attempt);
                    assert!(!self.leaving.iter().any(under_way), "one look at a time, but for an earlier sandbox's");
                    self.looks.insert(attempt, namespace);
                    self.leaving.push((pod, attempt));
                }
                Action::Exclude(pod, _) => assert!(self.captures.contains_key(&pod)),
                Action::Withdraw(pod) => {
                    self.captures.remove(&pod).expect("it was made");
                    self.ready.remove(&pod);
                }
                Action::Close(namespace) => {
                    assert!(self.namespaces.remove(&namespace), "it was held");
                    self.looks.retain(|_, other| *other != namespace);
                }
                Action::Answer(request, _) => assert!(self.unanswered.remove(&request), "one answer for each"),
                Action::Report(..) => {}
            }
        }
        assert!(self.pods.captured().iter().all(|pod| self.captures.contains_key(pod)));
    }

    fn step(&mut self, number: u64, step: Step) {
        let name = |pod: u8| pod.to_string();
        let taken = |list: &mut Vec<(PodUid, u64)>, which: u8| {
            let index = usize::from(which).checked_rem(list.len())?;
            Some(list.swap_remove(index))
        };
        let actions = match step {
            Step::Know(pod, will, ips) => {
                let mut pod = known(&name(pod));
                (pod.capture, pod.release) = match will {
                    Will::Capture => (Ok(()), false),
                    Will::Exempt => (Err(Uncaptured::OptedOut), false),
                    Will::Release => (Err(Uncaptured::OptedOut), true),
                };
                pod.addresses.truncate(usize::from(ips));
                self.pods.know(pod)
            }
            Step::Forget(pod) => self.pods.forget(&uid(&name(pod))),
            Step::Add(pod, namespace) => {
                self.unanswered.insert(number);
                let actions = self.pods.add(number, &cni(&name(pod)), namespace.into());
                if self.pods.holds(namespace.into()) || actions.contains(&Action::Close(namespace.into())) {
                    self.namespaces.insert(namespace.into());
                }
                actions
            }
            Step::Delete(pod) => {
                self.unanswered.insert(number);
                self.pods.delete(number, &uid(&name(pod)), "")
            }
            Step::Overdue(which) => {
                let index = usize::from(which).checked_rem(self.unanswered.len());
                match index.and_then(|index| self.unanswered.iter().nth(index).copied()) {
                    Some(request) => self.pods.overdue(request),
                    None => Vec::new(),
                }
            }
            Step::Looked(which, stands) => match taken(&mut self.looking, which) {
                Some((pod, attempt)) => {
                    if stands == Some(true) {
                        self.found.insert(pod.clone());
                    }
                    self.pods.looked(&pod, attempt, stands.ok_or_else(failure))
                }
                None => Vec::new(),
            },
            Step::Prepared(which, good) => match taken(&mut self.preparing, which) {
                Some((pod, attempt)) => {
                    let (keep, actions) =
                        self.pods.prepared(&pod, attempt, if good { Ok(Prepared::Bare) } else { Err(failure()) });
                    if keep {
                        assert!(good);
                        self.captures.insert(pod, false);
                    }
                    actions
                }
                None => Vec::new(),
            },
            Step::Begun(which, good) => match taken(&mut self.beginning, which) {
                Some((pod, attempt)) => self.pods.begun(&pod, attempt, if good { Ok(()) } else { Err(failure()) }),
                None => Vec::new(),
            },
            Step::Left(which, outcome) => match taken(&mut self.leaving, which) {
                Some((pod, attempt)) => self.pods.left(&pod, attempt, outcome.ok_or_else(failure)),
                None => Vec::new(),
            },
            Step::Ready(pod) => {
                let pod = uid(&name(pod));
                if self.captures.get(&pod) == Some(&true) {
                    self.ready.insert(pod.clone());
                }
                self.pods.ready(&pod)
            }
            Step::Proxy(true) => self.pods.proxy_connected(),
            Step::Proxy(false) => {
                self.pods.proxy_gone();
                Vec::new()
            }
            Step::Retry => self.pods.retry(),
        };
        self.act(actions);
    }
}

proptest! {
    #[test]
    fn in_any_order_rules_come_last_every_request_has_one_answer_and_nothing_stays(
        steps in proptest::collection::vec(step(), 0..80)
    ) {
        let mut shell = Shell::default();
        let mut number = 0;
        let mut next = |shell: &mut Shell, step| {
            number += 1;
            shell.step(number, step);
        };
        for step in steps {
            next(&mut shell, step);
        }
        while shell.is_busy() {
            next(&mut shell, Step::Looked(0, Some(false)));
            next(&mut shell, Step::Prepared(0, true));
            next(&mut shell, Step::Begun(0, true));
            next(&mut shell, Step::Left(0, Some(true)));
        }
        while !shell.unanswered.is_empty() {
            let before = shell.unanswered.len();
            next(&mut shell, Step::Overdue(0));
            while shell.is_busy() {
                next(&mut shell, Step::Looked(0, Some(false)));
                next(&mut shell, Step::Prepared(0, true));
                next(&mut shell, Step::Begun(0, true));
                next(&mut shell, Step::Left(0, Some(true)));
            }
            prop_assert!(shell.unanswered.len() < before, "an overdue request has its answer");
        }
        for pod in 0..3 {
            next(&mut shell, Step::Delete(pod));
            next(&mut shell, Step::Forget(pod));
        }
        prop_assert!(shell.namespaces.is_empty() && shell.captures.is_empty() && shell.pods.shown().is_empty());
    }
}
