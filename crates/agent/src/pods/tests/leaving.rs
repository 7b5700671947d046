//! A pod that is let go while it runs (T4, T47).

use super::*;

fn released(text: &str) -> NodePod {
    NodePod { capture: Err(Uncaptured::OptedOut), release: true, ..known(text) }
}

fn leave(text: &str, attempt: u64) -> Action {
    Action::Leave { pod: uid(text), attempt }
}

#[test]
fn a_released_pod_is_not_reported_and_goes_when_nothing_of_it_is_left() {
    let mut pods = captured("a");
    assert_eq!(pods.know(released("a")), [leave("a", 3)]);
    assert!(pods.captured().is_empty() && pods.is_leaving(&uid("a")));
    assert_eq!(pods.served(), [released("a")], "its proxy has what is open");
    assert!(pods.retry().is_empty(), "it is being looked at");
    assert!(pods.left(&uid("a"), 3, Ok(false)).is_empty());
    assert_eq!(pods.retry(), [leave("a", 4)]);
    assert_eq!(pods.left(&uid("a"), 4, Err(failure())), [Action::Report(uid("a"), failure())]);
    assert_eq!(pods.retry(), [leave("a", 5)]);
    assert!(pods.left(&uid("a"), 4, Ok(true)).is_empty(), "of an earlier look");
    assert_eq!(pods.left(&uid("a"), 5, Ok(true)), [Action::Withdraw(uid("a"))]);
    assert!(pods.holds(7), "it may be captured again, without a restart");
    assert!(pods.retry().is_empty() && pods.served().is_empty());
    assert_eq!(pods.know(known("a")), [prepare(known("a"), 7, 6)]);
}

#[test]
fn a_pod_that_comes_back_while_it_leaves_is_captured_when_its_proxy_is_ready_again() {
    let mut pods = captured("a");
    pods.know(released("a"));
    assert_eq!(pods.know(known("a")), [Action::Offer(known("a"))]);
    assert!(pods.ready(&uid("a")).is_empty(), "it is still being looked at");
    assert_eq!(pods.left(&uid("a"), 3, Ok(false)), [begin("a", 4)]);
    assert!(pods.captured().is_empty());
    let report = Action::Report(uid("a"), failure());
    assert_eq!(pods.begun(&uid("a"), 4, Err(failure())), [report], "what stands is what lets it go");
    assert_eq!(pods.retry(), [begin("a", 5)]);
    pods.begun(&uid("a"), 5, Ok(()));
    assert_eq!(pods.captured(), [uid("a")].into());
    // And where everything is gone already it is made anew.
    pods.know(released("a"));
    pods.know(known("a"));
    assert_eq!(pods.left(&uid("a"), 6, Ok(true)), [Action::Withdraw(uid("a")), prepare(known("a"), 7, 7)]);
}

#[test]
fn a_pod_that_is_withdrawn_while_it_leaves_is_not_served_until_it_is_made_anew() {
    for (then, back) in [(released("a"), false), (known("a"), true)] {
        let mut pods = captured("a");
        pods.know(released("a"));
        pods.know(then.clone());
        assert_eq!(pods.served(), std::slice::from_ref(&then), "its proxy has what is open");
        let moved = NodePod { addresses: vec!["10.88.16.6".parse().unwrap()], ..then };
        assert_eq!(pods.know(moved.clone()), [Action::Withdraw(uid("a"))]);
        assert!(pods.served().is_empty(), "there are no listeners that a proxy could be given");
        assert!(pods.proxy_connected().is_empty());
        let anew = pods.left(&uid("a"), 3, Ok(false));
        assert_eq!(anew, if back { vec![prepare(moved.clone(), 7, 4)] } else { vec![look("a", 7, 4)] });
        if back {
            pods.prepared(&uid("a"), 4, Ok(Prepared::Bare));
            assert_eq!(pods.served(), [moved]);
        }
    }
}

#[test]
fn a_pod_that_leaves_stays_so_from_agent_to_agent() {
    let mut pods = node();
    assert_eq!(pods.inherit(known("a"), 7), [prepare(known("a"), 7, 1)]);
    let (keep, actions) = pods.prepared(&uid("a"), 1, Ok(Prepared::Leaving));
    assert!(keep);
    assert_eq!(actions, [Action::Offer(known("a"))]);
    assert!(pods.ready(&uid("a")).is_empty() && pods.retry().is_empty(), "nobody has said yet what it is to be");
    assert!(pods.captured().is_empty());
    let exempt = NodePod { capture: Err(Uncaptured::OptedOut), ..known("a") };
    assert_eq!(pods.know(exempt), [leave("a", 2)], "a control plane that is new does not know that it had released it");
    // The twin: it is to be captured.
    let mut pods = node();
    pods.inherit(known("a"), 7);
    pods.prepared(&uid("a"), 1, Ok(Prepared::Leaving));
    assert_eq!(pods.know(known("a")), [Action::Offer(known("a"))]);
    assert_eq!(pods.ready(&uid("a")), [begin("a", 2)]);
}

#[test]
fn what_left_while_no_agent_was_there_is_not_captured_again() {
    let mut pods = node();
    pods.inherit(known("a"), 7);
    pods.know(released("a"));
    let (_, actions) = pods.prepared(&uid("a"), 1, Ok(Prepared::Bare));
    assert_eq!(actions, [Action::Offer(released("a")), leave("a", 2)]);
    assert_eq!(pods.left(&uid("a"), 2, Ok(true)), [Action::Withdraw(uid("a"))]);
    assert!(pods.retry().is_empty());
}

#[test]
fn a_pod_that_opts_out_while_its_rules_are_loaded_is_captured_until_it_is_released() {
    let mut pods = node();
    pods.know(known("a"));
    pods.add(1, &cni("a"), 7);
    pods.prepared(&uid("a"), 1, Ok(Prepared::Bare));
    pods.ready(&uid("a"));
    assert!(pods.know(NodePod { capture: Err(Uncaptured::OptedOut), ..known("a") }).is_empty());
    assert_eq!(pods.begun(&uid("a"), 2, Ok(())), [Action::Answer(1, CniResult::Captured)]);
    assert_eq!(pods.captured(), [uid("a")].into());
    assert_eq!(pods.know(released("a")), [leave("a", 3)]);
    assert_eq!(pods.add(2, &cni("a"), 7), [Action::Answer(2, CniResult::NotCaptured("opted-out".into()))]);
}
