//! A small trust domain.

use std::sync::Arc;
use std::time::Duration;

use identity::csr::{CertificateRequest, PublicKeyOfRequest};
use identity::issuer::{Intermediate, Root, WorkloadToCertify};
use identity::{PrivateKey, SpiffeId, Svid, TrustBundle, UnixTime};
use rustls::time_provider::TimeProvider;

const DAY: Duration = Duration::from_secs(86_400);

/// A clock that stands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct At(u64);

impl TimeProvider for At {
    fn current_time(&self) -> Option<UnixTime> {
        Some(self.now())
    }
}

impl At {
    pub(crate) fn now(self) -> UnixTime {
        UnixTime::since_unix_epoch(Duration::from_secs(self.0))
    }
}

pub(crate) const NOW: At = At(1_800_000_000);

pub(crate) fn clock() -> Arc<dyn TimeProvider> {
    Arc::new(NOW)
}

pub(crate) struct Authority {
    pub(crate) bundle: TrustBundle,
    pub(crate) intermediate: Intermediate,
}

impl Authority {
    pub(crate) fn new(trust_domain: &str) -> Self {
        let root = Root::generate(&trust_domain.parse().unwrap(), NOW.now(), 30 * DAY).unwrap();
        Self { bundle: root.bundle().unwrap(), intermediate: root.issue_intermediate(NOW.now(), 10 * DAY).unwrap() }
    }

    pub(crate) fn svid(&self, id: &str) -> Svid {
        let id: SpiffeId = id.parse().unwrap();
        let key = PrivateKey::generate().unwrap();
        let request = CertificateRequest::new(&key).unwrap();
        let public = PublicKeyOfRequest::from_pem(request.as_pem()).unwrap();
        let workload = WorkloadToCertify::assertion(id.clone());
        let chain = self.intermediate.sign(&workload, &public, NOW.now(), DAY).unwrap();
        Svid::assemble(key, chain, &self.bundle, &id, NOW.now()).unwrap()
    }
}
