//! What an agent before had, in whichever order it is heard of.

use super::*;

#[test]
fn what_was_inherited_and_is_not_named_is_released() {
    let mut pods = node();
    assert_eq!(pods.inherit(known("a"), 7), [prepare(known("a"), 7, 1)]);
    assert!(pods.inheriting());
    assert_eq!(pods.prepared(&uid("a"), 1, Ok(Prepared::Captured)), (true, vec![Action::Offer(known("a"))]));
    assert!(!pods.inheriting() && pods.captured() == [uid("a")].into());
    assert_eq!(pods.add(1, &cni("a"), 7), [Action::Answer(1, CniResult::Captured)], "asked again, it is known");
    assert_eq!(pods.inherit(known("b"), 8), [prepare(known("b"), 8, 2)]);
    assert!(matches!(pods.inherit(known("c"), 8)[..], [Action::Report(..)]), "a namespace has one pod");
    pods.know(known("a"));
    assert_eq!(pods.complete(), [Action::Withdraw(uid("b")), Action::Close(8)]);
    assert_eq!(pods.inherit(known("d"), 9), [Action::Withdraw(uid("d"))], "it went while nobody looked");
    assert_eq!(pods.captured(), [uid("a")].into());
}

#[test]
fn what_the_runtime_names_first_is_inherited_none_the_less() {
    // The control plane is away: who it is says the one before alone.
    let mut pods = Pods::default();
    pods.proxy_connected();
    assert_eq!(pods.add(1, &cni("a"), 7), []);
    assert_eq!(pods.inherit(known("a"), 7), [prepare(known("a"), 7, 1)]);
    assert!(pods.inheriting());
    let (kept, actions) = pods.prepared(&uid("a"), 1, Ok(Prepared::Captured));
    assert!(kept);
    assert_eq!(actions, [Action::Offer(known("a")), Action::Answer(1, CniResult::Captured)]);
    assert_eq!(pods.captured(), [uid("a")].into());
    assert_eq!(pods.inherit(known("a"), 7), [], "it is made");
}

#[test]
fn what_failed_before_it_was_handed_over_is_inherited_then() {
    let mut pods = node();
    pods.know(known("a"));
    assert_eq!(pods.add(1, &cni("a"), 7), [prepare(known("a"), 7, 1)]);
    // Its ports are those of the listeners that come.
    pods.prepared(&uid("a"), 1, Err(failure()));
    assert_eq!(pods.inherit(known("a"), 7), [prepare(known("a"), 7, 2)]);
    assert!(pods.inheriting());
}
