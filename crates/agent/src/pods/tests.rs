mod failing;
mod inherited;
mod leaving;

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use wire::pods::CniAdd;
use wire::report::CaptureFailure;

use super::*;

fn uid(text: &str) -> PodUid {
    PodUid::from(text)
}

fn known(text: &str) -> NodePod {
    NodePod {
        pod: uid(text),
        namespace: "shop".into(),
        name: text.into(),
        identity: "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap(),
        addresses: vec!["10.88.16.5".parse().unwrap()],
        capture: Ok(()),
        release: false,
        excluded_ports: Vec::new(),
        probes: mesh::Probes::default(),
    }
}

fn cni(text: &str) -> CniAdd {
    CniAdd {
        pod: uid(text),
        namespace: "shop".into(),
        name: text.into(),
        netns: "/run/netns/x".into(),
        container: String::new(),
        addresses: Vec::new(),
    }
}

fn failure() -> Failure {
    Failure::Capture { name: CaptureFailure::NotItsAddress, sentence: "the network namespace does not have it".into() }
}

fn prepare(pod: NodePod, namespace: u64, attempt: u64) -> Action {
    Action::Prepare { pod, namespace, attempt }
}

fn begin(text: &str, attempt: u64) -> Action {
    Action::Begin { pod: uid(text), attempt }
}

fn answer(request: Request, actions: &[Action]) -> &CniResult {
    let answers = actions.iter().filter_map(|action| match action {
        Action::Answer(number, answer) if *number == request => Some(answer),
        _ => None,
    });
    let answers: Vec<_> = answers.collect();
    assert_eq!(answers.len(), 1, "one answer for {request} in {actions:?}");
    answers[0]
}

#[track_caller]
fn is_failed(request: Request, actions: &[Action], because: &str) {
    match answer(request, actions) {
        CniResult::Failed(sentence) => assert!(sentence.contains(because), "{sentence}"),
        other => panic!("{other:?}"),
    }
}

/// A node with a control plane and a proxy.
fn node() -> Pods {
    let mut pods = Pods::default();
    pods.control_plane(true);
    pods.proxy_connected();
    pods
}

/// A captured pod in the namespace 7, captured by the attempts 1 and 2.
fn captured(text: &str) -> Pods {
    let mut pods = node();
    pods.know(known(text));
    pods.add(1, &cni(text), 7);
    assert!(pods.prepared(&uid(text), 1, Ok(Prepared::Bare)).0);
    pods.ready(&uid(text));
    let actions = pods.begun(&uid(text), 2, Ok(()));
    assert_eq!(actions, [Action::Answer(1, CniResult::Captured)]);
    assert_eq!(pods.captured(), [uid(text)].into());
    pods
}

#[test]
fn rules_come_last_whatever_comes_first() {
    for control_plane_first in [true, false] {
        let mut pods = node();
        let mut actions = Vec::new();
        if control_plane_first {
            actions.extend(pods.know(known("a")));
            actions.extend(pods.add(1, &cni("a"), 7));
        } else {
            actions.extend(pods.add(1, &cni("a"), 7));
            actions.extend(pods.know(known("a")));
        }
        assert_eq!(actions, [prepare(known("a"), 7, 1)]);
        assert!(pods.ready(&uid("a")).is_empty(), "nothing was offered yet");
        assert_eq!(pods.prepared(&uid("a"), 1, Ok(Prepared::Bare)), (true, vec![Action::Offer(known("a"))]));
        assert_eq!(pods.ready(&uid("a")), [begin("a", 2)]);
        assert!(pods.ready(&uid("a")).is_empty(), "once is enough");
        assert!(pods.captured().is_empty(), "not before the rules were read back");
        assert_eq!(pods.begun(&uid("a"), 2, Ok(())), [Action::Answer(1, CniResult::Captured)]);
        assert_eq!(pods.captured(), [uid("a")].into());
    }
}

#[test]
fn a_second_request_for_a_captured_pod_is_answered_at_once() {
    let mut pods = captured("a");
    assert_eq!(pods.add(2, &cni("a"), 7), [Action::Answer(2, CniResult::Captured)]);
}

#[test]
fn a_pod_that_is_not_to_be_captured_is_answered_with_its_reason() {
    let mut pods = node();
    let pod = NodePod { capture: Err(Uncaptured::OptedOut), ..known("a") };
    pods.know(pod);
    assert_eq!(pods.add(1, &cni("a"), 7), [Action::Answer(1, CniResult::NotCaptured("opted-out".into()))]);
    assert!(pods.holds(7), "it may be captured later, without a restart");
    assert_eq!(pods.know(known("a")), [prepare(known("a"), 7, 1)]);
}

#[test]
fn what_is_missing_is_said_when_the_time_is_up() {
    let mut pods = Pods::default();
    pods.add(1, &cni("a"), 7);
    is_failed(1, &pods.overdue(1), "no connection to the control plane");
    assert!(!pods.holds(7), "no namespace is held for a pod that nobody knows");

    pods.control_plane(true);
    pods.add(2, &cni("a"), 7);
    is_failed(2, &pods.overdue(2), "does not name this pod on this node");

    pods.know(NodePod { addresses: Vec::new(), ..known("a") });
    pods.add(3, &cni("a"), 7);
    is_failed(3, &pods.overdue(3), "no status.podIPs yet");

    pods.know(known("a"));
    pods.add(4, &cni("a"), 7);
    pods.prepared(&uid("a"), 1, Ok(Prepared::Bare));
    is_failed(4, &pods.overdue(4), "no proxy of this node");

    pods.proxy_connected();
    pods.add(5, &cni("a"), 7);
    is_failed(5, &pods.overdue(5), "no certificate");
    assert!(pods.overdue(5).is_empty(), "it has its answer");
    // What was made is not made again.
    pods.add(6, &cni("a"), 7);
    assert_eq!(pods.ready(&uid("a")), [begin("a", 2)]);
}

#[test]
fn work_that_is_under_way_when_the_time_is_up_gives_the_answer() {
    let mut pods = node();
    pods.know(known("a"));
    pods.add(1, &cni("a"), 7);
    assert!(pods.overdue(1).is_empty());
    let (keep, actions) = pods.prepared(&uid("a"), 1, Ok(Prepared::Bare));
    assert!(keep);
    is_failed(1, &actions, "no certificate");
}

#[test]
fn a_namespace_that_is_not_the_pods_is_refused_and_let_go() {
    let mut pods = node();
    pods.know(known("a"));
    pods.add(1, &cni("a"), 7);
    let (keep, actions) = pods.prepared(&uid("a"), 1, Err(failure()));
    assert!(!keep);
    is_failed(1, &actions, "pod shop/a is not captured: the network namespace does not have it");
    assert!(actions.contains(&Action::Report(uid("a"), failure())) && actions.contains(&Action::Close(7)));
    // The right one is still welcome.
    assert_eq!(pods.add(2, &cni("a"), 8), [prepare(known("a"), 8, 2)]);
}

#[test]
fn one_namespace_is_not_two_pods() {
    let mut pods = captured("a");
    pods.know(known("b"));
    is_failed(2, &pods.add(2, &cni("b"), 7), "held for pod a already");
    assert_eq!(pods.captured(), [uid("a")].into(), "who was there first stays");
    // The twin.
    assert_eq!(pods.add(3, &cni("b"), 8), [prepare(known("b"), 8, 3)]);
}

#[test]
fn a_pod_under_another_name_is_refused() {
    let mut pods = node();
    pods.know(known("a"));
    let other = CniAdd { name: "b".into(), ..cni("a") };
    is_failed(1, &pods.add(1, &other, 7), "the runtime calls the pod of this UID shop/b, and the control plane shop/a");
    assert!(!pods.holds(7));
}

#[test]
fn a_pod_that_runs_is_captured_later_and_tried_again_without_the_runtime() {
    let mut pods = node();
    pods.know(NodePod { capture: Err(Uncaptured::OptedOut), ..known("a") });
    pods.add(1, &cni("a"), 7);
    pods.know(known("a"));
    let report = Action::Report(uid("a"), failure());
    assert_eq!(pods.prepared(&uid("a"), 1, Err(failure())), (false, vec![report]));
    assert_eq!(pods.retry(), [prepare(known("a"), 7, 2)]);
    assert_eq!(pods.prepared(&uid("a"), 2, Err(failure())), (false, vec![]), "said once");
    assert_eq!(pods.retry(), [prepare(known("a"), 7, 3)]);
    pods.prepared(&uid("a"), 3, Ok(Prepared::Bare));
    pods.ready(&uid("a"));
    let other = Failure::Capture { name: CaptureFailure::DoesNotStand, sentence: "somebody changes it".into() };
    assert_eq!(pods.begun(&uid("a"), 4, Err(other.clone())), [Action::Report(uid("a"), other)]);
    assert_eq!(pods.retry(), [begin("a", 5)]);
    pods.begun(&uid("a"), 5, Ok(()));
    assert_eq!(pods.captured(), [uid("a")].into());
    assert!(pods.retry().is_empty());
}

#[test]
fn a_new_proxy_gets_all_pods_and_confirms_those_that_are_not_captured_yet() {
    let mut pods = captured("a");
    pods.know(known("b"));
    pods.add(2, &cni("b"), 8);
    pods.prepared(&uid("b"), 3, Ok(Prepared::Bare));
    pods.proxy_gone();
    assert_eq!(pods.captured(), [uid("a")].into(), "what is captured stays so (T47)");
    assert_eq!(pods.proxy_connected(), [Action::Offer(known("a")), Action::Offer(known("b"))]);
    assert!(pods.ready(&uid("a")).is_empty(), "its rules stand");
    assert_eq!(pods.ready(&uid("b")), [begin("b", 4)]);
}

#[test]
fn deletion_closes_everything_and_always_succeeds() {
    let mut pods = captured("a");
    let deleted = |request| Action::Answer(request, CniResult::Deleted);
    assert_eq!(pods.delete(2, &uid("a"), ""), [Action::Withdraw(uid("a")), Action::Close(7), deleted(2)]);
    assert!(pods.captured().is_empty() && !pods.holds(7));
    assert_eq!(pods.delete(3, &uid("a"), ""), [deleted(3)]);
    assert_eq!(pods.delete(4, &uid("never heard of"), ""), [deleted(4)]);
    assert!(pods.forget(&uid("a")).is_empty());
    assert!(pods.shown().is_empty());
}

#[test]
fn an_old_sandbox_that_goes_takes_nothing_of_the_new_one() {
    let mut pods = node();
    pods.know(known("a"));
    let sandbox = |name: &str| CniAdd { container: name.into(), ..cni("a") };
    pods.add(1, &sandbox("new"), 7);
    let deleted = |request| Action::Answer(request, CniResult::Deleted);
    assert_eq!(pods.delete(2, &uid("a"), "old"), [deleted(2)]);
    assert!(pods.holds(7));
    is_failed(1, &pods.delete(3, &uid("a"), "new"), "deleted or replaced");
    assert!(!pods.holds(7));
}

#[test]
fn a_pod_that_runs_is_captured_where_nobody_has_told_of_it() {
    let mut pods = node();
    let running = |name: &str| Running { pod: uid(name), name: format!("shop/{name}"), container: "s".into() };
    assert!(pods.find(&running("a"), 7).is_empty() && !pods.holds(7), "the control plane does not name it");
    pods.know(known("a"));
    pods.know(NodePod { capture: Err(Uncaptured::OptedOut), ..known("b") });
    assert_eq!(pods.wanted(), [uid("a")].into());
    assert_eq!(pods.find(&running("a"), 7), [prepare(known("a"), 7, 1)]);
    assert!(pods.wanted().is_empty() && pods.holds(7));
    assert!(pods.find(&running("a"), 8).is_empty() && !pods.holds(8), "it has one");
    pods.know(known("c"));
    assert!(matches!(pods.find(&running("c"), 7)[..], [Action::Report(_, Failure::Ambiguous { .. })]));
    assert_eq!(pods.present(), [uid("a")].into());
    assert_eq!(pods.vanished(&uid("a")), [Action::Close(7)]);
    assert_eq!(pods.wanted(), [uid("a"), uid("c")].into());
}

#[test]
fn a_pod_that_the_control_plane_forgets_is_let_go() {
    let mut pods = captured("a");
    assert_eq!(pods.forget(&uid("a")), [Action::Withdraw(uid("a")), Action::Close(7)]);
    assert!(pods.captured().is_empty() && pods.shown().is_empty());
}

#[test]
fn a_result_for_a_sandbox_that_is_gone_is_thrown_away() {
    let mut pods = node();
    pods.know(known("a"));
    pods.add(1, &cni("a"), 7);
    is_failed(1, &pods.delete(2, &uid("a"), ""), "deleted or replaced");
    pods.add(3, &cni("a"), 8);
    assert_eq!(pods.prepared(&uid("a"), 1, Ok(Prepared::Bare)), (false, vec![]));
    assert!(pods.prepared(&uid("a"), 2, Ok(Prepared::Bare)).0);
}

#[test]
fn a_new_sandbox_of_a_pod_takes_the_old_ones_place() {
    let mut pods = captured("a");
    let actions = pods.add(2, &cni("a"), 8);
    assert_eq!(actions, [Action::Withdraw(uid("a")), Action::Close(7), prepare(known("a"), 8, 3)]);
}

#[test]
fn a_pod_stays_captured_when_it_is_not_to_be_any_more() {
    let mut pods = captured("a");
    assert!(pods.know(NodePod { capture: Err(Uncaptured::OptedOut), ..known("a") }).is_empty());
    assert_eq!(pods.captured(), [uid("a")].into());
}

#[test]
fn a_change_of_mind_during_capture_takes_back_what_was_made() {
    let opted_out = NodePod { capture: Err(Uncaptured::OptedOut), ..known("a") };
    let mut pods = node();
    pods.know(known("a"));
    pods.add(1, &cni("a"), 7);
    assert!(pods.know(opted_out.clone()).is_empty(), "its listeners are being made");
    let not_captured = |request| Action::Answer(request, CniResult::NotCaptured("opted-out".into()));
    assert_eq!(pods.prepared(&uid("a"), 1, Ok(Prepared::Bare)), (false, vec![not_captured(1)]));

    pods.know(known("a"));
    pods.prepared(&uid("a"), 2, Ok(Prepared::Bare));
    pods.add(2, &cni("a"), 7);
    assert_eq!(pods.know(opted_out), [Action::Withdraw(uid("a")), not_captured(2)]);
}

#[test]
fn excluded_ports_change_without_a_new_capture() {
    let mut pods = captured("a");
    let changed = NodePod { excluded_ports: vec![22], ..known("a") };
    assert_eq!(pods.know(changed.clone()), [Action::Exclude(uid("a"), vec![22])]);
    assert!(pods.know(changed.clone()).is_empty());
    // The proxies are told of probes by the same way: a control plane that knows of them may be newer than the pod.
    let probes = mesh::Probes::new([mesh::Probe { port: 80, check: mesh::Check::Tcp }]).unwrap();
    assert_eq!(pods.know(NodePod { probes, ..changed }), [Action::Exclude(uid("a"), vec![22])]);
    assert_eq!(pods.captured(), [uid("a")].into());
}

#[test]
fn what_the_runtime_says_of_addresses_goes_before_what_is_said_of_the_sandbox_before() {
    let [new, old] = ["10.88.16.9", "10.88.16.5"].map(|text| vec![text.parse().unwrap()]);
    let mut pods = Pods::default();
    pods.proxy_connected();
    pods.know(NodePod { addresses: Vec::new(), ..known("a") });
    let actions = pods.add(1, &CniAdd { addresses: new.clone(), ..cni("a") }, 7);
    let [Action::Prepare { pod, attempt, .. }] = &actions[..] else { panic!("{actions:?}") };
    assert_eq!(pod.addresses, new);
    let (keep, _) = pods.prepared(&PodUid::from("a"), *attempt, Ok(Prepared::Bare));
    assert!(keep);
    // A status of the sandbox before, then that of this one: nothing is taken back.
    for said in [old.clone(), new.clone(), Vec::new()] {
        let actions = pods.know(NodePod { addresses: said, ..known("a") });
        assert!(actions.iter().all(|it| !matches!(it, Action::Withdraw(_) | Action::Prepare { .. })), "{actions:?}");
    }
    assert_eq!(pods.served()[0].addresses, new);
    // The next sandbox has its own.
    let actions = pods.add(2, &CniAdd { addresses: old.clone(), ..cni("a") }, 8);
    assert!(actions.contains(&Action::Withdraw(PodUid::from("a"))), "{actions:?}");
    let prepared = actions.iter().find_map(|it| match it {
        Action::Prepare { pod, .. } => Some(pod.addresses.clone()),
        _ => None,
    });
    assert_eq!(prepared, Some(old));
}

#[test]
fn other_addresses_are_another_capture() {
    let mut pods = captured("a");
    let changed = NodePod { addresses: vec!["10.88.16.6".parse().unwrap()], ..known("a") };
    assert_eq!(pods.know(changed.clone()), [Action::Withdraw(uid("a")), prepare(changed, 7, 3)]);
    assert!(pods.captured().is_empty());
}

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
    preparing: Vec<(PodUid, u64)>,
    beginning: Vec<(PodUid, u64)>,
    leaving: Vec<(PodUid, u64)>,
    namespaces: BTreeSet<u64>,
    /// Captures that are there, and whether their proxy was told.
    captures: BTreeMap<PodUid, bool>,
    ready: BTreeSet<PodUid>,
    unanswered: BTreeSet<Request>,
}

impl Shell {
    fn is_busy(&self) -> bool {
        !(self.preparing.is_empty() && self.beginning.is_empty() && self.leaving.is_empty())
    }

    fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Prepare { pod, namespace, attempt } => {
                    assert!(pod.capture.is_ok() && !pod.addresses.is_empty());
                    assert!(self.namespaces.contains(&namespace), "it is held");
                    assert!(!self.captures.contains_key(&pod.pod), "nothing is made twice");
                    self.preparing.push((pod.pod, attempt));
                }
                Action::Offer(pod) => *self.captures.get_mut(&pod.pod).expect("it is made") = true,
                Action::Begin { pod, attempt } => {
                    assert!(self.captures[&pod] && self.ready.contains(&pod), "the proxy has the listeners");
                    self.beginning.push((pod, attempt));
                }
                Action::Leave { pod, attempt } => {
                    assert!(self.captures.contains_key(&pod), "it was captured");
                    let busy = |list: &[(PodUid, u64)]| list.iter().any(|(other, _)| *other == pod);
                    assert!(!self.pods.captured().contains(&pod), "it is not reported");
                    assert!(
                        !busy(&self.leaving) || busy(&self.preparing),
                        "one look at a time, but for an earlier sandbox's"
                    );
                    self.leaving.push((pod, attempt));
                }
                Action::Exclude(pod, _) => assert!(self.captures.contains_key(&pod)),
                Action::Withdraw(pod) => {
                    self.captures.remove(&pod).expect("it was made");
                    self.ready.remove(&pod);
                }
                Action::Close(namespace) => assert!(self.namespaces.remove(&namespace), "it was held"),
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
            next(&mut shell, Step::Prepared(0, true));
            next(&mut shell, Step::Begun(0, true));
            next(&mut shell, Step::Left(0, Some(true)));
        }
        while !shell.unanswered.is_empty() {
            let before = shell.unanswered.len();
            next(&mut shell, Step::Overdue(0));
            while shell.is_busy() {
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
