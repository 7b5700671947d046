//! What the authority signs, and what it does not.

use std::collections::HashSet;
use std::time::Duration;

use identity::csr::{CertificateRequest, PublicKeyOfRequest};
use identity::issuer::{Intermediate, IntermediateError, IssueError, Root, WorkloadToCertify};
use identity::{Chain, PrivateKey, UnixTime, VerifyError};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::authority::{Authority, workload};
use crate::mesh::{DAY, HOUR, Mesh, NOW, at, id, lasting, trust_domain, web};

fn public_key() -> PublicKeyOfRequest {
    let request = CertificateRequest::new(&PrivateKey::generate().unwrap()).unwrap();
    PublicKeyOfRequest::from_pem(request.as_pem()).unwrap()
}

fn issue(intermediate: &Intermediate, now: UnixTime, lifetime: Duration) -> Result<Chain, IssueError> {
    intermediate.sign(&WorkloadToCertify::assertion(web()), &public_key(), now, lifetime)
}

/// First and last second of a chain's leaf.
fn span(chain: &Chain) -> (u64, u64) {
    let (_, leaf) = X509Certificate::from_der(chain.leaf()).unwrap();
    (leaf.validity().not_before.timestamp() as u64, leaf.validity().not_after.timestamp() as u64)
}

#[test]
fn a_leaf_has_the_profile_of_an_x509_svid() {
    let chain = issue(&Mesh::new().intermediate, at(NOW), lasting(DAY)).unwrap();
    let (_, leaf) = X509Certificate::from_der(chain.leaf()).unwrap();
    assert_eq!(leaf.subject().iter().count(), 0);
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(names.critical);
    let [GeneralName::URI(uri)] = names.value.general_names[..] else { panic!("not exactly one URI") };
    assert_eq!(uri, web().as_str());
    let usage = leaf.key_usage().unwrap().unwrap();
    assert!(usage.critical && usage.value.digital_signature() && !usage.value.key_cert_sign());
    assert_eq!(usage.value.flags, 1);
    let purposes = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(purposes.client_auth && purposes.server_auth && !purposes.any && purposes.other.is_empty());
    assert!(!leaf.is_ca());
    assert!(leaf.raw_serial().len() <= 17);
}

#[test]
fn authorities_have_the_profile_of_signing_certificates() {
    let mesh = Mesh::new();
    let chain = issue(&mesh.intermediate, at(NOW), lasting(DAY)).unwrap();
    let below = [(&chain.certificates()[1], 0), (mesh.bundle.roots().next().unwrap(), 1)];
    for (der, authorities_below) in below {
        let (_, authority) = X509Certificate::from_der(der).unwrap();
        let constraints = authority.basic_constraints().unwrap().unwrap();
        assert!(constraints.critical && constraints.value.ca);
        assert_eq!(constraints.value.path_len_constraint, Some(authorities_below));
        let usage = authority.key_usage().unwrap().unwrap();
        assert!(usage.critical && usage.value.key_cert_sign() && !usage.value.digital_signature());
        let names = authority.subject_alternative_name().unwrap().unwrap();
        assert_eq!(names.value.general_names, [GeneralName::URI("spiffe://cluster.local")]);
        assert_ne!(authority.subject().iter().count(), 0);
    }
}

#[test]
fn serial_numbers_and_the_names_of_authorities_do_not_repeat() {
    let mesh = Mesh::new();
    let mut serials = HashSet::new();
    for _ in 0..20 {
        let chain = issue(&mesh.intermediate, at(NOW), lasting(DAY)).unwrap();
        let (_, leaf) = X509Certificate::from_der(chain.leaf()).unwrap();
        assert!(serials.insert(leaf.raw_serial().to_vec()));
    }
    let name = |mesh: &Mesh| {
        let (_, root) = X509Certificate::from_der(mesh.bundle.roots().next().unwrap()).unwrap();
        root.subject().to_string()
    };
    assert_ne!(name(&mesh), name(&Mesh::new()));
}

#[test]
fn a_leaf_is_backdated_by_a_minute_and_a_short_one_by_a_tenth_of_its_life() {
    let mesh = Mesh::of("cluster.local");
    let later = NOW + HOUR;
    let span_of = |lifetime| span(&issue(&mesh.intermediate, at(later), lasting(lifetime)).unwrap());
    assert_eq!(span_of(DAY), (later - 60, later + DAY));
    assert_eq!(span_of(20), (later - 2, later + 20));
    assert_eq!(span_of(1), (later, later + 1));
}

#[test]
fn no_certificate_is_valid_before_or_beyond_its_issuer() {
    let root = Root::generate(&trust_domain("cluster.local"), at(NOW), lasting(DAY)).unwrap();
    let intermediate = root.issue_intermediate(at(NOW), lasting(30 * DAY)).unwrap();
    assert_eq!(intermediate.validity().not_after(), at(NOW + DAY));
    assert_eq!(span(&issue(&intermediate, at(NOW), lasting(100 * DAY)).unwrap()), (NOW - 60, NOW + DAY));
    assert_eq!(span(&issue(&intermediate, at(NOW - 30), lasting(DAY)).unwrap()).0, NOW - 60);
    // The longest of lifetimes is not a mistake: it means "as long as may be".
    assert_eq!(span(&issue(&intermediate, at(NOW), Duration::MAX).unwrap()).1, NOW + DAY);
}

#[test]
fn an_authority_outside_of_its_own_time_signs_nothing() {
    let mesh = Mesh::new();
    for now in [NOW - HOUR, NOW + 31 * DAY] {
        let error = issue(&mesh.intermediate, at(now), lasting(DAY)).unwrap_err();
        assert!(matches!(error, IssueError::IssuerNotValid { .. }));
    }
    let error = mesh.root.issue_intermediate(at(NOW + 4000 * DAY), lasting(DAY)).unwrap_err();
    assert!(matches!(error, IssueError::IssuerNotValid { .. }));
}

#[test]
fn a_workload_of_another_trust_domain_is_not_certified() {
    let foreign = id("spiffe://elsewhere.example/ns/shop/sa/web");
    let workload = WorkloadToCertify::assertion(foreign.clone());
    let error = Mesh::new().intermediate.sign(&workload, &public_key(), at(NOW), lasting(DAY)).unwrap_err();
    assert_eq!(error, IssueError::ForeignWorkload { id: foreign, trust_domain: trust_domain("cluster.local") });
}

#[test]
fn a_lifetime_of_nothing_is_refused() {
    let error = issue(&Mesh::new().intermediate, at(NOW), Duration::from_millis(999)).unwrap_err();
    assert_eq!(error, IssueError::NoLifetime);
}

#[test]
fn an_intermediate_survives_the_way_through_pem() {
    let mesh = Mesh::new();
    let pem = mesh.intermediate.to_pem().unwrap();
    let again = Intermediate::from_pem(&pem.chain, &pem.key, &mesh.bundle, at(NOW)).unwrap();
    assert_eq!(again.validity(), mesh.intermediate.validity());
    let chain = issue(&again, at(NOW), lasting(DAY)).unwrap();
    assert!(
        identity::verify::verify(
            &mesh.bundle,
            chain.leaf(),
            &chain.certificates()[1..],
            identity::verify::Role::Server,
            at(NOW)
        )
        .is_ok()
    );
    assert!(format!("{again:?}").ends_with("key redacted)"));
}

#[test]
fn the_key_of_another_intermediate_is_refused() {
    let mesh = Mesh::new();
    let pem = mesh.intermediate.to_pem().unwrap();
    let other = mesh.root.issue_intermediate(at(NOW), lasting(DAY)).unwrap().to_pem().unwrap();
    let error = Intermediate::from_pem(&pem.chain, &other.key, &mesh.bundle, at(NOW)).unwrap_err();
    assert_eq!(error, IntermediateError::KeyMismatch);
}

#[test]
fn an_intermediate_of_another_root_is_refused() {
    let pem = Mesh::new().intermediate.to_pem().unwrap();
    let error = Intermediate::from_pem(&pem.chain, &pem.key, &Mesh::new().bundle, at(NOW)).unwrap_err();
    assert_eq!(error, IntermediateError::Verify(VerifyError::UnknownIssuer));
}

#[test]
fn an_intermediate_outside_of_its_time_is_refused() {
    let mesh = Mesh::new();
    let pem = mesh.intermediate.to_pem().unwrap();
    let reason = |now| match Intermediate::from_pem(&pem.chain, &pem.key, &mesh.bundle, at(now)).unwrap_err() {
        IntermediateError::Verify(error) => error.as_str(),
        other => panic!("{other}"),
    };
    assert_eq!(reason(NOW + 31 * DAY), "expired");
    assert_eq!(reason(NOW - HOUR), "not-yet-valid");
}

#[test]
fn a_workload_is_not_an_intermediate() {
    let mesh = Mesh::new();
    let forged = Authority::thief_of(&mesh.intermediate).sign(&workload(&[web().as_str()]));
    let chain = Chain::from_der(forged.chain).unwrap().to_pem();
    let error = Intermediate::from_pem(&chain, &forged.key.serialize_pem(), &mesh.bundle, at(NOW)).unwrap_err();
    assert_eq!(error, IntermediateError::NotAnAuthority);
}

#[test]
fn what_is_not_pem_is_refused_in_one_sentence_that_names_the_part() {
    let mesh = Mesh::new();
    let pem = mesh.intermediate.to_pem().unwrap();
    let load =
        |chain: &str, key: &str| Intermediate::from_pem(chain, key, &mesh.bundle, at(NOW)).unwrap_err().to_string();
    assert!(load("", &pem.key).contains("certificate chain is empty"));
    assert!(load(&pem.chain, "").contains("private key is not"));
}
