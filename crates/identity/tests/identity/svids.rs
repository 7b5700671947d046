//! What may go live as an SVID, and what may not.

use identity::svid::SvidError;
use identity::{Chain, PrivateKey, Svid, TrustBundle, VerifyError};

use crate::mesh::{DAY, HOUR, Mesh, NOW, at, database, web};

#[test]
fn key_and_chain_that_fit_are_an_svid() {
    let mesh = Mesh::new();
    let (key, chain) = mesh.certify(&web(), NOW, DAY);
    let svid = Svid::assemble(key, chain, &mesh.bundle, &web(), at(NOW)).unwrap();
    assert_eq!(svid.id(), &web());
    assert_eq!((svid.not_before(), svid.not_after()), (at(NOW - 60), at(NOW + DAY)));
    assert_eq!(svid.chain().len(), 2);
    assert!(format!("{svid:?}").ends_with("key redacted)"));
}

#[test]
fn a_root_at_the_end_of_the_chain_is_left_out() {
    let mesh = Mesh::new();
    let (key, chain) = mesh.certify(&web(), NOW, DAY);
    let with_root = Chain::from_pem(&(chain.to_pem() + &mesh.bundle.to_pem())).unwrap();
    assert_eq!(with_root.certificates().len(), 3);
    let svid = Svid::assemble(key, with_root, &mesh.bundle, &web(), at(NOW)).unwrap();
    assert_eq!(svid.chain(), chain.certificates());
}

#[test]
fn the_certificate_of_another_key_is_refused() {
    let mesh = Mesh::new();
    let (_, chain) = mesh.certify(&web(), NOW, DAY);
    let other = PrivateKey::generate().unwrap();
    assert_eq!(Svid::assemble(other, chain, &mesh.bundle, &web(), at(NOW)).unwrap_err(), SvidError::KeyMismatch);
}

#[test]
fn the_certificate_of_another_workload_is_refused() {
    let mesh = Mesh::new();
    let (key, chain) = mesh.certify(&web(), NOW, DAY);
    let wrong = VerifyError::WrongIdentity { expected: database(), found: web() };
    assert_eq!(Svid::assemble(key, chain, &mesh.bundle, &database(), at(NOW)).unwrap_err(), SvidError::Verify(wrong));
}

#[test]
fn a_certificate_that_no_peer_would_accept_is_refused() {
    let (mesh, elsewhere) = (Mesh::new(), Mesh::new());
    let reason = |bundle: &TrustBundle, now: u64| {
        let (key, chain) = mesh.certify(&web(), NOW, DAY);
        match Svid::assemble(key, chain, bundle, &web(), at(now)).unwrap_err() {
            SvidError::Verify(error) => error.as_str(),
            other => panic!("{other}"),
        }
    };
    assert_eq!(reason(&elsewhere.bundle, NOW), "unknown-issuer");
    assert_eq!(reason(&mesh.bundle, NOW + 2 * DAY), "expired");
    assert_eq!(reason(&mesh.bundle, NOW - HOUR), "not-yet-valid");
}

#[test]
fn a_chain_without_its_intermediate_is_refused() {
    let mesh = Mesh::new();
    let (key, chain) = mesh.certify(&web(), NOW, DAY);
    let leaf = Chain::from_der(vec![chain.leaf().clone()]).unwrap();
    let error = Svid::assemble(key, leaf, &mesh.bundle, &web(), at(NOW)).unwrap_err();
    assert_eq!(error, SvidError::Verify(VerifyError::UnknownIssuer));
}
