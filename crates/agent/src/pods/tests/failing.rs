//! What is told of pods that run and cannot be captured.

use super::*;

fn running(text: &str) -> Running {
    Running { pod: uid(text), name: format!("shop/{text}"), container: "c".into() }
}

fn failing(pods: &Pods) -> Vec<(String, CaptureFailure)> {
    pods.failing().into_iter().map(|(uid, why)| (uid.to_string(), why)).collect()
}

fn is(why: CaptureFailure) -> Vec<(String, CaptureFailure)> {
    vec![("a".to_owned(), why)]
}

#[test]
fn a_running_pod_that_cannot_be_captured_is_told_until_it_can() {
    let mut pods = node();
    pods.know(known("a"));
    assert_eq!(failing(&pods), [], "nobody has said that it runs");
    pods.unfound(&uid("a"), "no such file".into());
    assert_eq!(failing(&pods), is(CaptureFailure::NoNamespace));
    pods.find(&running("a"), 7);
    pods.prepared(&uid("a"), 1, Err(failure()));
    assert_eq!(failing(&pods), is(CaptureFailure::NotItsAddress));
    pods.retry();
    assert_eq!(failing(&pods), is(CaptureFailure::NotItsAddress), "also while it is tried again");
    pods.prepared(&uid("a"), 2, Ok(Prepared::Bare));
    assert_eq!(failing(&pods), is(CaptureFailure::ProxyNotReady));
    pods.proxy_gone();
    assert_eq!(failing(&pods), is(CaptureFailure::NoProxy));
    pods.proxy_connected();
    pods.ready(&uid("a"));
    pods.begun(&uid("a"), 3, Ok(()));
    assert_eq!((failing(&pods), pods.captured()), (vec![], [uid("a")].into()), "it is over");
}

#[test]
fn a_pod_that_starts_or_is_not_to_be_captured_or_is_gone_is_not_told() {
    // Its runtime waits, and is told.
    let mut pods = node();
    pods.know(known("a"));
    pods.add(1, &cni("a"), 7);
    assert_eq!(failing(&pods), []);
    let (_, actions) = pods.prepared(&uid("a"), 1, Err(failure()));
    is_failed(1, &actions, "does not have it");
    assert_eq!(failing(&pods), [], "it does not run");

    let mut pods = node();
    pods.know(known("a"));
    pods.find(&running("a"), 7);
    pods.prepared(&uid("a"), 1, Err(failure()));
    assert_eq!(failing(&pods), is(CaptureFailure::NotItsAddress));
    pods.know(NodePod { capture: Err(Uncaptured::OptedOut), ..known("a") });
    assert_eq!(failing(&pods), []);
    pods.know(known("a"));
    pods.looked(&uid("a"), 2, Ok(false));
    pods.prepared(&uid("a"), 3, Err(failure()));
    assert_eq!(failing(&pods), is(CaptureFailure::NotItsAddress));
    pods.forget(&uid("a"));
    assert_eq!(failing(&pods), []);
}

#[test]
fn a_pod_that_could_not_start_is_not_told_until_it_runs() {
    // Its runtime was told that it is late, or that its rules could not be loaded, and has not deleted it yet.
    for late in [true, false] {
        let mut pods = node();
        pods.know(known("a"));
        pods.add(1, &cni("a"), 7);
        pods.prepared(&uid("a"), 1, Ok(Prepared::Bare));
        if late {
            is_failed(1, &pods.overdue(1), "no certificate");
            pods.ready(&uid("a"));
        } else {
            pods.ready(&uid("a"));
            is_failed(1, &pods.begun(&uid("a"), 2, Err(failure())), "does not have it");
            pods.retry();
        }
        assert!(pods.holds(7) && pods.present().contains(&uid("a")), "nobody waits");
        assert_eq!(failing(&pods), []);
        pods.proxy_gone();
        assert_eq!(failing(&pods), []);
        pods.proxy_connected();
        pods.delete(2, &uid("a"), "");
        assert_eq!(failing(&pods), []);
    }
    // The twins: who is captured or is let start uncaptured runs from then on.
    let out = NodePod { capture: Err(Uncaptured::OptedOut), ..known("a") };
    let released = NodePod { release: true, ..out.clone() };
    let mut pods = captured("a");
    pods.know(released);
    pods.know(known("a"));
    pods.left(&uid("a"), 3, Ok(true));
    pods.prepared(&uid("a"), 4, Err(failure()));
    assert_eq!(failing(&pods), is(CaptureFailure::NotItsAddress));
    let mut pods = node();
    pods.know(out);
    pods.add(1, &cni("a"), 7);
    assert_eq!(pods.looked(&uid("a"), 1, Ok(false)), [Action::Answer(1, CniResult::NotCaptured("opted-out".into()))]);
    pods.know(known("a"));
    pods.prepared(&uid("a"), 2, Err(failure()));
    assert_eq!(failing(&pods), is(CaptureFailure::NotItsAddress));
}

#[test]
fn a_pod_without_a_namespace_is_told_for_as_long_as_the_runtime_has_it() {
    let mut pods = node();
    let unfound = |pods: &mut Pods| {
        pods.unfound(&uid("a"), "no such file".into());
        pods.listed(&[uid("a")].into());
        assert_eq!(failing(pods), is(CaptureFailure::NoNamespace));
    };
    pods.know(known("a"));
    unfound(&mut pods);
    pods.listed(&BTreeSet::new());
    assert_eq!(failing(&pods), [], "it is gone from the list");
    unfound(&mut pods);
    pods.delete(1, &uid("a"), "");
    assert_eq!(failing(&pods), [], "the runtime has deleted it");
    // What it was told before its sandbox was found is not what is wrong when that one goes.
    unfound(&mut pods);
    pods.find(&running("a"), 7);
    pods.vanished(&uid("a"));
    assert_eq!(failing(&pods), []);
    // Of another pod's namespace it is the same.
    let mut pods = captured("b");
    pods.know(known("a"));
    pods.find(&running("a"), 7);
    assert_eq!(failing(&pods), is(CaptureFailure::AmbiguousNamespace));
    pods.listed(&[uid("b")].into());
    assert_eq!((failing(&pods), pods.captured()), (vec![], [uid("b")].into()));
}
