mod failing;
mod in_any_order;
mod inherited;
mod leaving;
mod looking;

use mesh::Uncaptured;
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

fn look(text: &str, namespace: u64, attempt: u64) -> Action {
    Action::Look { pod: uid(text), namespace, attempt }
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
    assert_eq!(pods.add(1, &cni("a"), 7), [look("a", 7, 1)]);
    let answer = Action::Answer(1, CniResult::NotCaptured("opted-out".into()));
    assert_eq!(pods.looked(&uid("a"), 1, Ok(false)), [answer]);
    assert!(pods.holds(7), "it may be captured later, without a restart");
    assert_eq!(pods.know(known("a")), [prepare(known("a"), 7, 2)]);
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
    pods.looked(&uid("a"), 1, Ok(false));
    pods.know(known("a"));
    let report = Action::Report(uid("a"), failure());
    assert_eq!(pods.prepared(&uid("a"), 2, Err(failure())), (false, vec![report]));
    assert_eq!(pods.retry(), [prepare(known("a"), 7, 3)]);
    assert_eq!(pods.prepared(&uid("a"), 3, Err(failure())), (false, vec![]), "said once");
    assert_eq!(pods.retry(), [prepare(known("a"), 7, 4)]);
    pods.prepared(&uid("a"), 4, Ok(Prepared::Bare));
    pods.ready(&uid("a"));
    let other = Failure::Capture { name: CaptureFailure::DoesNotStand, sentence: "somebody changes it".into() };
    assert_eq!(pods.begun(&uid("a"), 5, Err(other.clone())), [Action::Report(uid("a"), other)]);
    assert_eq!(pods.retry(), [begin("a", 6)]);
    pods.begun(&uid("a"), 6, Ok(()));
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
    assert_eq!(pods.prepared(&uid("a"), 1, Ok(Prepared::Bare)), (false, vec![look("a", 7, 2)]));
    assert_eq!(pods.looked(&uid("a"), 2, Ok(false)), [not_captured(1)]);

    pods.know(known("a"));
    pods.prepared(&uid("a"), 3, Ok(Prepared::Bare));
    pods.add(2, &cni("a"), 7);
    assert_eq!(pods.know(opted_out), [Action::Withdraw(uid("a")), not_captured(2)], "it was looked at once");
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
