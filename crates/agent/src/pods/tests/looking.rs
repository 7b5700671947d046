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
    assert!(pods.looked(&uid("a"), 0, true).is_empty(), "of another look");
    assert_eq!(pods.looked(&uid("a"), 1, true), [prepare(out("a"), 7, 2)]);
    pods.prepared(&uid("a"), 2, Ok(Prepared::Bare));
    assert_eq!(pods.ready(&uid("a")), [begin("a", 3)]);
    pods.begun(&uid("a"), 3, Ok(()));
    assert_eq!(pods.captured(), [uid("a")].into(), "its peers are to hear that it is not");
    let released = NodePod { release: true, ..out("a") };
    assert_eq!(pods.know(released), [Action::Leave { pod: uid("a"), attempt: 4 }]);
    assert_eq!(pods.left(&uid("a"), 4, Ok(true)), [Action::Withdraw(uid("a"))]);
    assert!(pods.captured().is_empty() && pods.retry().is_empty(), "it is not looked at for ever");
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
    assert!(pods.looked(&uid("a"), 1, false).is_empty());
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
    assert_eq!(pods.looked(&uid("a"), 1, false), [prepare(known("a"), 7, 2)]);
    // One that is gone by then.
    pods.know(out("b"));
    pods.add(2, &cni("b"), 8);
    pods.delete(3, &uid("b"), "");
    assert!(pods.looked(&uid("b"), 3, true).is_empty() && !pods.holds(8));
}
