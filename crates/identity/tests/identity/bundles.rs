//! What is a trust bundle, and what is not.

use identity::TrustBundle;
use identity::bundle::{BundleError, MAX_PEM_SIZE, MAX_ROOT_SIZE, MAX_ROOTS};
use rustls_pki_types::CertificateDer;

use crate::authority::{Authority, authority, workload};
use crate::mesh::{Mesh, trust_domain};

fn root(name: &str) -> CertificateDer<'static> {
    Authority::root(authority(name)).certificate()
}

fn bundle(roots: Vec<CertificateDer<'static>>) -> Result<TrustBundle, BundleError> {
    TrustBundle::from_der(trust_domain("cluster.local"), roots)
}

#[test]
fn a_bundle_survives_the_way_through_pem() {
    let mesh = Mesh::new();
    let again = TrustBundle::from_pem(trust_domain("cluster.local"), &mesh.bundle.to_pem()).unwrap();
    assert_eq!(again, mesh.bundle);
    assert_eq!(again.digest().to_string().len(), 64);
}

#[test]
fn text_around_the_certificates_is_commentary() {
    let text = format!("# the roots of the mesh\n{}\nthe end\n", Mesh::new().bundle.to_pem());
    assert!(TrustBundle::from_pem(trust_domain("cluster.local"), &text).is_ok());
}

#[test]
fn the_digest_knows_neither_order_nor_repetition_but_each_root() {
    let (a, b) = (root("a"), root("b"));
    let both = bundle(vec![a.clone(), b.clone()]).unwrap();
    assert_eq!(both.digest(), bundle(vec![b.clone(), a.clone(), b.clone()]).unwrap().digest());
    assert_eq!(both.roots().count(), 2);
    assert_ne!(both.digest(), bundle(vec![a.clone()]).unwrap().digest());
    assert_ne!(bundle(vec![b]).unwrap().digest(), bundle(vec![a]).unwrap().digest());
}

#[test]
fn the_same_roots_for_another_trust_domain_are_another_bundle() {
    let root = root("a");
    let other = TrustBundle::from_der(trust_domain("elsewhere.example"), [root.clone()]).unwrap();
    assert_ne!(other, bundle(vec![root]).unwrap());
}

#[test]
fn a_bundle_without_roots_is_refused() {
    assert_eq!(bundle(vec![]).unwrap_err(), BundleError::Empty);
    assert_eq!(TrustBundle::from_pem(trust_domain("cluster.local"), "").unwrap_err(), BundleError::Empty);
}

#[test]
fn what_is_not_an_authority_is_not_a_root() {
    let leaf = Authority::root(workload(&["spiffe://cluster.local/ns/shop/sa/web"])).certificate();
    assert_eq!(bundle(vec![root("a"), leaf]).unwrap_err(), BundleError::NotAnAuthority);
    let mut cannot_sign = authority("b");
    cannot_sign.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
    assert_eq!(bundle(vec![Authority::root(cannot_sign).certificate()]).unwrap_err(), BundleError::NotAnAuthority);
}

#[test]
fn what_does_not_parse_is_not_a_root() {
    assert_eq!(bundle(vec![CertificateDer::from(vec![1, 2, 3])]).unwrap_err(), BundleError::BadEncoding);
    let mut longer = root("a").to_vec();
    longer.push(0);
    assert_eq!(bundle(vec![longer.into()]).unwrap_err(), BundleError::BadEncoding);
    let broken = "-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----\n";
    assert_eq!(TrustBundle::from_pem(trust_domain("cluster.local"), broken).unwrap_err(), BundleError::BadPem);
}

#[test]
fn count_and_sizes_are_bounded() {
    let one = root("a");
    assert_eq!(bundle(vec![one; MAX_ROOTS + 1]).unwrap_err(), BundleError::TooMany);
    let huge = CertificateDer::from(vec![0x30; MAX_ROOT_SIZE + 1]);
    assert_eq!(bundle(vec![huge]).unwrap_err(), BundleError::RootTooLarge);
    let text = " ".repeat(MAX_PEM_SIZE + 1);
    assert_eq!(TrustBundle::from_pem(trust_domain("cluster.local"), &text).unwrap_err(), BundleError::TooLarge);
}
