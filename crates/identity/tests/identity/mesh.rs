//! A trust domain for tests, with every certificate made by the crate's own issuer.

use std::sync::Arc;
use std::time::Duration;

use identity::csr::{CertificateRequest, PublicKeyOfRequest};
use identity::issuer::{Intermediate, Root, WorkloadToCertify};
use identity::{Chain, PrivateKey, SpiffeId, Svid, TrustBundle, TrustDomain, UnixTime};
use rustls::time_provider::TimeProvider;

/// The moment at which every test happens.
pub(crate) const NOW: u64 = 1_800_000_000;
pub(crate) const HOUR: u64 = 3600;
pub(crate) const DAY: u64 = 24 * HOUR;

pub(crate) fn at(seconds: u64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(seconds))
}

pub(crate) fn lasting(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A clock that stands.
#[derive(Debug)]
struct Stopped(u64);

impl TimeProvider for Stopped {
    fn current_time(&self) -> Option<UnixTime> {
        Some(at(self.0))
    }
}

pub(crate) fn clock(seconds: u64) -> Arc<dyn TimeProvider> {
    Arc::new(Stopped(seconds))
}

pub(crate) fn trust_domain(name: &str) -> TrustDomain {
    name.parse().expect("a trust domain")
}

pub(crate) fn id(uri: &str) -> SpiffeId {
    uri.parse().expect("a SPIFFE ID")
}

pub(crate) fn web() -> SpiffeId {
    id("spiffe://cluster.local/ns/shop/sa/web")
}

pub(crate) fn database() -> SpiffeId {
    id("spiffe://cluster.local/ns/shop/sa/database")
}

/// Root, intermediate and bundle of one trust domain.
pub(crate) struct Mesh {
    pub(crate) root: Root,
    pub(crate) bundle: TrustBundle,
    pub(crate) intermediate: Intermediate,
}

impl Mesh {
    pub(crate) fn new() -> Self {
        Mesh::of("cluster.local")
    }

    pub(crate) fn of(name: &str) -> Self {
        let root = Root::generate(&trust_domain(name), at(NOW), lasting(3650 * DAY)).expect("a root");
        let bundle = root.bundle().expect("a bundle");
        let intermediate = root.issue_intermediate(at(NOW), lasting(30 * DAY)).expect("an intermediate");
        Mesh { root, bundle, intermediate }
    }

    /// A key and the chain that certifies it for `id`, issued at `now`.
    pub(crate) fn certify(&self, id: &SpiffeId, now: u64, lifetime: u64) -> (PrivateKey, Chain) {
        let key = PrivateKey::generate().expect("a key");
        let request = CertificateRequest::new(&key).expect("a request");
        let public = PublicKeyOfRequest::from_pem(request.as_pem()).expect("an honest request");
        let workload = WorkloadToCertify::assertion(id.clone());
        let chain = self.intermediate.sign(&workload, &public, at(now), lasting(lifetime)).expect("a chain");
        (key, chain)
    }

    /// A day's SVID, issued now.
    pub(crate) fn svid(&self, id: &SpiffeId) -> Svid {
        let (key, chain) = self.certify(id, NOW, DAY);
        Svid::assemble(key, chain, &self.bundle, id, at(NOW)).expect("an SVID")
    }
}
