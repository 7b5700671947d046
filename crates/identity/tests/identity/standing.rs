//! Whether what a peer once showed still counts, when time has passed and roots have changed.

use identity::tls::{JUSTMTLS_1, client_config, server_config};
use identity::verify::Role;
use identity::{TrustBundle, VerifiedPeer};

use crate::authority::{Authority, authority, valid, workload};
use crate::mesh::{DAY, Mesh, NOW, at, clock, database, trust_domain, web};
use crate::strangers;
use crate::wire::shake;

/// The client, as the server of a finished handshake knows it.
fn client_of(mesh: &Mesh) -> VerifiedPeer {
    let client = client_config(&mesh.svid(&web()), &mesh.bundle, &database(), clock(NOW));
    let server = server_config(&mesh.svid(&database()), &mesh.bundle, clock(NOW));
    shake(client, server).server.unwrap()
}

fn with_a_second_root(mesh: &Mesh, second: &TrustBundle) -> TrustBundle {
    let roots = mesh.bundle.roots().chain(second.roots()).cloned().collect::<Vec<_>>();
    TrustBundle::from_der(trust_domain("cluster.local"), roots).unwrap()
}

#[test]
fn a_root_that_is_added_leaves_what_was_shown_before_and_one_that_is_taken_away_ends_it() {
    let (mesh, next) = (Mesh::new(), Mesh::new());
    let peer = client_of(&mesh);
    // Twice each: the second answer comes from memory.
    for _ in 0..2 {
        peer.still_valid(Role::Client, &mesh.bundle, at(NOW)).unwrap();
        peer.still_valid(Role::Client, &with_a_second_root(&mesh, &next.bundle), at(NOW)).unwrap();
        let refused = peer.still_valid(Role::Client, &next.bundle, at(NOW)).unwrap_err();
        assert_eq!(refused.as_str(), "unknown-issuer");
    }
}

#[test]
fn what_was_shown_counts_while_it_is_valid_and_not_outside_of_that() {
    let mesh = Mesh::new();
    let peer = client_of(&mesh);
    let at_that_time = |now| peer.still_valid(Role::Client, &mesh.bundle, at(now)).map_err(|error| error.as_str());
    assert_eq!(at_that_time(NOW + DAY), Ok(()));
    assert_eq!(at_that_time(NOW + DAY + 1), Err("expired"));
    assert_eq!(at_that_time(NOW - DAY), Err("not-yet-valid"));
    assert_eq!(at_that_time(NOW), Ok(()));
}

#[test]
fn a_root_that_ends_takes_along_what_it_vouched_for_and_one_that_vouched_for_others_does_not() {
    let short = |name| {
        let mut parameters = authority(name);
        valid(&mut parameters, NOW - DAY, NOW + 10);
        Authority::root(parameters)
    };
    let (root, other) = (short("root"), short("other"));
    let bundle = |roots: &[&Authority]| {
        TrustBundle::from_der(trust_domain("cluster.local"), roots.iter().map(|root| root.certificate())).unwrap()
    };
    let mut forged = root.sign(&workload(&[database().as_str()]));
    // The root is not shown, so that its end is not among the peer's own.
    forged.chain.truncate(1);
    let client = client_config(&Mesh::new().svid(&web()), &bundle(&[&root]), &database(), clock(NOW));
    let peer = shake(client, strangers::server(forged, &[JUSTMTLS_1])).client.unwrap();
    assert!(peer.not_after() > at(NOW + 10), "the root ends first");
    peer.still_valid(Role::Server, &bundle(&[&root]), at(NOW + 10)).unwrap();
    assert_eq!(peer.still_valid(Role::Server, &bundle(&[&root]), at(NOW + 11)).unwrap_err().as_str(), "expired");

    let mesh = Mesh::new();
    let peer = client_of(&mesh);
    let both = with_a_second_root(&mesh, &bundle(&[&other]));
    for now in [NOW, NOW + 10, NOW + 11, NOW + 12] {
        peer.still_valid(Role::Client, &both, at(now)).unwrap();
    }
}
