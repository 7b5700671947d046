//! A pod that is not to be captured, and in which rules of an agent may stand that is gone.

use super::*;

fn out(text: &str) -> NodePod {
    NodePod { capture: Err(Uncaptured::OptedOut), ..known(text) }
}

#[test]
fn what_an_agent_that_died_has_left_in_a_pod_is_taken_over_and_let_go() {
    let mut pods = node();
    pods.know(out("a"));
    assert_eq!(pods.wanted(), [uid("a")].into(), "the runtime is asked for it, too");
    let running = Running { pod: uid("a"), name: "shop/a".into(), container: "c".into() };
    assert_eq!(pods.find(&running, 7), [look("a", 7, 1)]);
    assert!(pods.looked(&uid("a"), 0, Ok(true)).is_empty(), "of another look");
    assert_eq!(pods.looked(&uid("a"), 1, Ok(true)), [prepare(out("a"), 7, 2)]);
    assert_eq!(pods.prepared(&uid("a"), 2, Ok(Prepared::Bare)), (true, vec![Action::Offer(out("a"))]));
    assert_eq!(pods.captured(), [uid("a")].into(), "its peers are to hear that it is not");
    let shown = |pods: &Pods| serde_json::to_value(pods.shown()).unwrap()[0].clone();
    assert_eq!((&shown(&pods)["state"], &shown(&pods)["stands"]), (&"found".into(), &true.into()));
    assert!(pods.ready(&uid("a")).is_empty(), "nothing is captured anew, whether or not its proxy can prove who it is");
    let released = NodePod { release: true, ..out("a") };
    assert_eq!(pods.know(released), [Action::Leave { pod: uid("a"), attempt: 3 }]);
    assert_eq!(pods.left(&uid("a"), 3, Ok(true)), [Action::Withdraw(uid("a"))]);
    assert!(pods.captured().is_empty() && pods.retry().is_empty(), "it is not looked at for ever");
    assert_eq!((&shown(&pods)["state"], &shown(&pods)["stands"]), (&"not-captured".into(), &false.into()));
}

#[test]
fn what_was_found_is_captured_where_it_is_to_be_again() {
    let mut pods = node();
    pods.know(out("a"));
    pods.add(1, &cni("a"), 7);
    pods.looked(&uid("a"), 1, Ok(true));
    pods.prepared(&uid("a"), 2, Ok(Prepared::Bare));
    assert_eq!(pods.know(known("a")), [Action::Offer(known("a"))], "its rules are another's: they are loaded anew");
    assert!(pods.captured().is_empty());
    assert_eq!(pods.ready(&uid("a")), [begin("a", 3)]);
    pods.begun(&uid("a"), 3, Ok(()));
    assert_eq!(pods.captured(), [uid("a")].into());
}

#[test]
fn a_look_that_fails_says_nothing_and_is_made_again() {
    let mut pods = node();
    pods.know(out("a"));
    let running = Running { pod: uid("a"), name: "shop/a".into(), container: "c".into() };
    pods.find(&running, 7);
    assert_eq!(pods.looked(&uid("a"), 1, Err(failure())), [Action::Report(uid("a"), failure())]);
    assert_ne!(pods.shown()[0].state, "not-captured");
    assert_eq!(pods.retry(), [look("a", 7, 2)]);
    assert!(pods.looked(&uid("a"), 2, Err(failure())).is_empty(), "said once");
    assert_eq!(pods.retry(), [look("a", 7, 3)]);
    assert!(pods.looked(&uid("a"), 3, Ok(false)).is_empty());
    assert_eq!(pods.shown()[0].state, "not-captured");
    // In a pod that is being made there is nobody's.
    pods.know(out("b"));
    pods.add(1, &cni("b"), 8);
    let answer = Action::Answer(1, CniResult::NotCaptured("opted-out".into()));
    assert_eq!(pods.looked(&uid("b"), 4, Err(failure())), [answer]);
}

#[test]
fn a_pod_that_is_withdrawn_with_its_rules_is_looked_into_again() {
    let mut pods = node();
    pods.know(out("a"));
    pods.add(1, &cni("a"), 7);
    pods.looked(&uid("a"), 1, Ok(false));
    pods.know(known("a"));
    pods.prepared(&uid("a"), 2, Ok(Prepared::Bare));
    pods.ready(&uid("a"));
    pods.begun(&uid("a"), 3, Ok(()));
    let moved = NodePod { addresses: vec!["10.88.16.6".parse().unwrap()], ..out("a") };
    assert_eq!(pods.know(moved), [Action::Withdraw(uid("a")), look("a", 7, 4)]);
}

#[test]
fn a_pod_is_left_alone_only_after_a_look_and_one_of_the_nodes_network_without() {
    let mut pods = node();
    pods.know(out("a"));
    let host = NodePod { capture: Err(Uncaptured::HostNetwork), ..known("b") };
    pods.know(host);
    assert_eq!(pods.wanted(), [uid("a")].into());
    let running = Running { pod: uid("a"), name: "shop/a".into(), container: "c".into() };
    pods.find(&running, 7);
    let state = |pods: &Pods| pods.shown().into_iter().find(|it| it.name == "shop/a").unwrap().state;
    assert_eq!(state(&pods), "looking");
    assert!(pods.looked(&uid("a"), 1, Ok(false)).is_empty());
    assert_eq!(state(&pods), "not-captured");
    assert!(pods.wanted().is_empty() && pods.captured().is_empty());
}

#[test]
fn a_pod_that_is_to_be_captured_when_the_look_is_over_is() {
    let mut pods = node();
    pods.know(out("a"));
    assert_eq!(pods.add(1, &cni("a"), 7), [look("a", 7, 1)]);
    assert!(pods.know(known("a")).is_empty(), "one thing after the other in a namespace");
    assert!(pods.overdue(1).is_empty(), "the look gives the answer");
    assert_eq!(pods.looked(&uid("a"), 1, Ok(false)), [prepare(known("a"), 7, 2)]);
    // One that is gone by then.
    pods.know(out("b"));
    pods.add(2, &cni("b"), 8);
    pods.delete(3, &uid("b"), "");
    assert!(pods.looked(&uid("b"), 3, Ok(true)).is_empty() && !pods.holds(8));
}
