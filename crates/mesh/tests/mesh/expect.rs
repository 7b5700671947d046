//! What an incoming connection is taken for before its first byte (T17).

use std::time::Duration;

use mesh::{Expectation, Mode, PlaintextReason as Plain, Uncaptured, View, expect};

use crate::world::{ip, pod, uncaptured, view, with_modes};

fn world() -> View {
    view(
        [
            pod("web", 2),
            uncaptured(pod("opted-out", 3), Uncaptured::OptedOut),
            uncaptured(pod("host", 4), Uncaptured::HostNetwork),
            uncaptured(pod("system", 5), Uncaptured::SystemNamespace),
            uncaptured(pod("pending", 6), Uncaptured::Pending),
            uncaptured(pod("external", 8), Uncaptured::NotAPod),
        ],
        [],
    )
}

const SOURCES: [(&str, u64, Plain); 12] = [
    ("10.0.0.2", 3_000, Plain::Bypass),
    ("fd00::2", 3_000, Plain::Bypass),
    ("10.0.0.3", 50, Plain::OptedOut),
    ("10.0.0.5", 50, Plain::SystemNamespace),
    ("10.0.0.4", 0, Plain::HostNetwork),
    ("10.0.0.8", 0, Plain::NotAPod),
    ("10.0.0.6", 300, Plain::CapturePending),
    ("10.0.0.99", 300, Plain::UnknownSource),
    ("172.16.0.1", 300, Plain::UnknownSource),
    ("192.0.2.10", 0, Plain::Node),
    ("10.0.255.1", 0, Plain::Node),
    ("203.0.113.9", 0, Plain::Outside),
];

#[test]
fn a_permissive_port_waits_by_what_its_client_may_be() {
    let view = world();
    let server = pod("server", 1);
    for (source, millis, plaintext) in SOURCES {
        let expected = Expectation { wait: Duration::from_millis(millis), plaintext, mode: Mode::Permissive };
        assert_eq!(expect(&view, &server, 80, ip(source)), expected, "{source}");
    }
}

#[test]
fn who_dials_a_pod_that_leaves_or_joins_in_clear_is_called_by_that_pods_reason_and_its_hello_is_waited_for() {
    let view = world();
    let seen = |why: Uncaptured, source: &str| {
        let expected = expect(&view, &uncaptured(pod("server", 1), why), 80, ip(source));
        (expected.wait.as_millis(), expected.plaintext)
    };
    assert_eq!(seen(Uncaptured::OptedOut, "10.0.0.2"), (300, Plain::OptedOut));
    assert_eq!(seen(Uncaptured::SystemNamespace, "10.0.0.2"), (300, Plain::SystemNamespace));
    assert_eq!(seen(Uncaptured::Pending, "fd00::2"), (300, Plain::CapturePending));
    // Who is not in the mesh itself is what it always is.
    assert_eq!(seen(Uncaptured::OptedOut, "10.0.0.5"), (50, Plain::SystemNamespace));
    assert_eq!(seen(Uncaptured::OptedOut, "203.0.113.9"), (0, Plain::Outside));
}

#[test]
fn a_strict_port_waits_for_everybodys_hello_and_keeps_the_name() {
    let view = world();
    let server = with_modes(pod("server", 1), Mode::Permissive, 443);
    for (source, _, plaintext) in SOURCES {
        let expected = Expectation { wait: Duration::from_secs(3), plaintext, mode: Mode::Strict };
        assert_eq!(expect(&view, &server, 443, ip(source)), expected, "{source}");
    }
}

#[test]
fn a_source_that_is_nobodys_is_outside_where_others_live_beside_pods_for_as_long_as_the_view_is_fresh() {
    let mut view = world();
    ["172.16.0.1", "10.0.0.99"].iter().for_each(|address| view.set_nobodys(ip(address)));
    let seen = |view: &View, source: &str| {
        let expected = expect(view, &pod("server", 1), 80, ip(source));
        (expected.wait.as_millis(), expected.plaintext)
    };
    assert_eq!(seen(&view, "172.16.0.1"), (0, Plain::Outside));
    assert_eq!(seen(&view, "172.16.0.2"), (300, Plain::UnknownSource));
    assert_eq!(seen(&view, "10.0.0.99"), (300, Plain::UnknownSource));
    view.set_stale(true);
    assert_eq!(seen(&view, "172.16.0.1"), (300, Plain::StaleView));
}

#[test]
fn without_settings_nobody_is_taken_for_outside() {
    let view = View::default();
    let expectation = expect(&view, &pod("server", 1), 80, ip("203.0.113.9"));
    assert_eq!((expectation.wait, expectation.plaintext), (Duration::from_millis(300), Plain::UnknownSource));
}

#[test]
fn a_stale_view_waits_for_the_hello_of_whoever_is_inside_and_calls_the_plaintext_stale() {
    let mut view = world();
    view.set_stale(true);
    let server = with_modes(pod("server", 1), Mode::Permissive, 443);
    // Who is known to be captured is no less so, and what is not a pod's address does not rest on the view's age.
    let names_that_stay = [Plain::Bypass, Plain::HostNetwork, Plain::Node, Plain::Outside];
    for (source, millis, plaintext) in SOURCES {
        let (millis, plaintext) = match names_that_stay.contains(&plaintext) {
            true => (millis, plaintext),
            false => (300, Plain::StaleView),
        };
        let expected = Expectation { wait: Duration::from_millis(millis), plaintext, mode: Mode::Permissive };
        assert_eq!(expect(&view, &server, 80, ip(source)), expected, "{source}");
        let strict = expect(&view, &server, 443, ip(source));
        assert_eq!((strict.wait, strict.mode), (Duration::from_secs(3), Mode::Strict), "{source}");
    }
}
