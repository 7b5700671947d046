//! What a process leaves to the next one.

use identity::estate::{bequeath, inherit};

use crate::mesh::{DAY, HOUR, Mesh, NOW, at, database, web};

#[test]
fn svids_are_read_again_with_keys_that_fit() {
    let mesh = Mesh::new();
    let left = [mesh.svid(&web()), mesh.svid(&database())];
    let bytes = bequeath(&left).unwrap();
    let inherited = inherit(&bytes, &mesh.bundle, at(NOW));
    assert_eq!(inherited.len(), 2);
    for (svid, before) in inherited.iter().zip(&left) {
        // That it could be put together says that its key is that of its leaf.
        assert_eq!((svid.id(), svid.chain()), (before.id(), before.chain()));
    }
    assert!(inherit(&bequeath([]).unwrap(), &mesh.bundle, at(NOW)).is_empty());
}

#[test]
fn what_no_peer_would_accept_or_was_cut_off_is_left_out() {
    let (mesh, elsewhere) = (Mesh::new(), Mesh::new());
    let bytes = bequeath(&[mesh.svid(&web()), mesh.svid(&database())]).unwrap();
    assert!(inherit(&bytes, &elsewhere.bundle, at(NOW)).is_empty(), "another trust");
    assert!(inherit(&bytes, &mesh.bundle, at(NOW + DAY + HOUR)).is_empty(), "expired");
    for length in 0..bytes.len() {
        let whole = inherit(&bytes[..length], &mesh.bundle, at(NOW));
        assert!(whole.len() < 2 && whole.iter().all(|svid| *svid.id() == web()));
    }
    let mut wrong = bytes.to_vec();
    wrong[..4].fill(0xff);
    assert!(inherit(&wrong, &mesh.bundle, at(NOW)).is_empty(), "a length that no text has");
}
