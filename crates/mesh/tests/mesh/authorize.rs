//! Incoming connections: modes, identities and addresses.

use mesh::{
    Action, Denied, Incoming, Mode, PlaintextReason as Plain, PodUid, Policy, RefuseReason as No, Resource, Scope,
    Security, Uncaptured, View, authorize,
};

use crate::peers::peer;
use crate::world::{at, id, ip, pod, policy_name, uncaptured, view, with_modes};

/// Plaintext to the server `server` at 10.0.0.1.
fn plaintext(view: &View, port: u16, source: &str, because: Plain) -> Result<(), Denied> {
    let connection = Incoming {
        pod: &PodUid::from("server"),
        destination: at(&format!("10.0.0.1:{port}")),
        source: ip(source),
        security: Security::Plaintext(because),
    };
    let allowed = authorize(view, connection)?;
    assert_eq!(allowed.pod(), &PodUid::from("server"));
    assert_eq!(allowed.destination(), at(&format!("10.0.0.1:{port}")));
    assert_eq!(allowed.source(), ip(source));
    assert_eq!(allowed.client(), Err(because));
    Ok(())
}

/// A tunnel to the server, of the client with that service account in `shop`.
fn tunnel(view: &View, account: &str, source: &str) -> Result<(), Denied> {
    let verified = peer(&id("shop", account));
    let connection = Incoming {
        pod: &PodUid::from("server"),
        destination: at("10.0.0.1:80"),
        source: ip(source),
        security: Security::Mtls(&verified),
    };
    let allowed = authorize(view, connection)?;
    assert_eq!(allowed.client(), Ok(&id("shop", account)));
    Ok(())
}

fn denied(because: No) -> Result<(), Denied> {
    Err(because.into())
}

#[test]
fn plaintext_is_let_through_by_a_permissive_port_alone() {
    let view = view([with_modes(pod("server", 1), Mode::Strict, 9090)], []);
    assert_eq!(plaintext(&view, 9090, "203.0.113.9", Plain::Outside), Ok(()));
    assert_eq!(plaintext(&view, 80, "203.0.113.9", Plain::Outside), denied(No::Strict));
    for because in Plain::ALL.iter().filter(|because| **because != Plain::Bypass) {
        assert_eq!(plaintext(&view, 80, "10.0.0.7", *because), denied(No::Strict), "{because}");
    }
}

#[test]
fn plaintext_of_a_captured_pod_is_a_bypass_and_named_so() {
    let world = |mode| view([with_modes(pod("server", 1), mode, 1), pod("client", 2)], []);
    assert_eq!(plaintext(&world(Mode::Strict), 80, "10.0.0.2", Plain::Bypass), denied(No::StrictBypass));
    assert_eq!(plaintext(&world(Mode::Permissive), 80, "10.0.0.2", Plain::Bypass), Ok(()));
}

#[test]
fn a_tunnel_passes_a_strict_port() {
    let view = view([with_modes(pod("server", 1), Mode::Strict, 1), pod("client", 2)], []);
    assert_eq!(tunnel(&view, "client", "10.0.0.2"), Ok(()));
}

#[test]
fn a_certificate_and_an_address_that_contradict_each_other_are_refused() {
    let mut external = uncaptured(pod("external", 8), Uncaptured::NotAPod);
    external.pod_uid = PodUid::from("");
    let host = uncaptured(pod("host", 4), Uncaptured::HostNetwork);
    let view = view([pod("server", 1), pod("client", 2), host, external], []);
    let cases = [
        ("client", "10.0.0.2", Ok(())),
        ("client", "fd00::2", Ok(())),
        ("impostor", "10.0.0.2", denied(No::IdentityAddressMismatch)),
        // An address that nobody is known to have, and those that belong to no single identity, contradict nothing.
        ("client", "10.0.0.99", Ok(())),
        ("client", "10.0.0.4", Ok(())),
        ("client", "10.0.0.8", Ok(())),
    ];
    for (account, source, expected) in cases {
        assert_eq!(tunnel(&view, account, source), expected, "{account} from {source}");
    }
}

#[test]
fn a_pod_is_reached_at_its_own_addresses_and_only_while_it_is_known() {
    let mut view = view([pod("server", 1), pod("other", 2)], []);
    let incoming = |view: &View, to: &str| {
        let pod = PodUid::from("server");
        let security = Security::Plaintext(Plain::Outside);
        authorize(view, Incoming { pod: &pod, destination: at(to), source: ip("203.0.113.9"), security }).map(drop)
    };
    assert_eq!(incoming(&view, "10.0.0.1:80"), Ok(()));
    assert_eq!(incoming(&view, "[fd00::1]:80"), Ok(()));
    assert_eq!(incoming(&view, "10.0.0.2:80"), denied(No::NoSuchPod));
    let uid = pod("server", 1).uid;
    view.remove(&mesh::ResourceKey::Workload(uid));
    assert_eq!(incoming(&view, "10.0.0.1:80"), denied(No::NoSuchPod));
}

#[test]
fn strict_beats_an_allow_policy() {
    let mut view = view([with_modes(pod("server", 1), Mode::Strict, 1)], []);
    view.apply(Resource::Policy(Policy {
        name: policy_name("shop/everybody"),
        scope: Scope::Namespace,
        action: Action::Allow,
        rules: vec![mesh::Rule::default()],
    }));
    assert_eq!(plaintext(&view, 80, "203.0.113.9", Plain::Outside), denied(No::Strict));
}

#[test]
fn a_refusal_names_its_policy() {
    let because = Denied { because: No::PolicyDeny, policy: Some(policy_name("shop/no-web")) };
    assert_eq!(because.to_string(), "policy-deny (shop/no-web)");
    assert_eq!(Denied::from(No::Strict).to_string(), "strict");
}

#[test]
fn every_reason_has_one_name() {
    for reason in No::ALL {
        assert_eq!(No::from_name(reason.as_str()), Some(*reason));
    }
    for reason in Plain::ALL {
        assert_eq!(Plain::from_name(reason.as_str()), Some(*reason));
    }
    let mut names: Vec<_> = No::ALL.iter().map(|r| r.as_str()).chain(Plain::ALL.iter().map(|r| r.as_str())).collect();
    assert!(names.iter().all(|name| name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-')));
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), No::ALL.len() + Plain::ALL.len());
    assert_eq!(No::from_name("nonsense"), None);
}
