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
    pods.prepared(&uid("a"), 2, Err(failure()));
    assert_eq!(failing(&pods), is(CaptureFailure::NotItsAddress));
    pods.forget(&uid("a"));
    assert_eq!(failing(&pods), []);
}
