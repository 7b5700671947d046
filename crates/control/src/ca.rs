//! Certificates by request: who asks, whether they may, and what they get.
//!
//! A proxy asks on behalf of a pod of its own node. Its token says which node that is; the index says whether a pod of that
//! identity that may have a certificate runs there; subject and validity are decided here, and from the request only the
//! public key is taken.

pub(crate) mod authority;
mod rate;
pub(crate) mod token;

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use identity::csr::{PublicKeyOfRequest, RequestError};
use identity::issuer::{IssueError, WorkloadToCertify};
use identity::{SpiffeId, TrustDomain};

use self::authority::Authority;
use self::rate::Rates;
use self::token::{Caller, Role};
use crate::clock::Clock;

/// A request that has passed every check but the one that needs the index.
#[derive(Debug)]
pub(crate) struct Application {
    /// The caller's node.
    pub(crate) node: String,
    /// Whom the certificate will name.
    pub(crate) id: SpiffeId,
    key: PublicKeyOfRequest,
    lifetime: Duration,
}

/// Why there is no certificate.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    /// The token is not a proxy's.
    #[error("a certificate is given to proxies only, and this token is of the {} of {node}", role.as_str())]
    WrongRole { role: Role, node: String },
    /// The node asks too often.
    #[error("node {node} asks for too many certificates; it may go on at {} a second", rate::PER_SECOND)]
    TooMany { node: String },
    /// The identity asked for is none.
    #[error("the identity asked for in ImpersonatedIdentity is none: {0}")]
    NotAnIdentity(identity::spiffe::SpiffeIdError),
    /// The identity is not of this mesh.
    #[error("the identity {id} is of another trust domain than {trust_domain}")]
    ForeignTrustDomain { id: SpiffeId, trust_domain: TrustDomain },
    /// No such pod is there.
    #[error("no pod that is to be captured runs as {id} on node {node}")]
    NotOnThisNode { id: SpiffeId, node: String },
    /// The request itself is no good.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The authority cannot sign.
    #[error(transparent)]
    Issue(#[from] IssueError),
}

impl Refused {
    /// The name in logs and metrics.
    pub(crate) fn as_str(&self) -> &'static str {
        match self {
            Self::WrongRole { .. } => "wrong-role",
            Self::TooMany { .. } => "too-many-requests",
            Self::NotAnIdentity(_) => "not-an-identity",
            Self::ForeignTrustDomain { .. } => "foreign-trust-domain",
            Self::NotOnThisNode { .. } => "not-on-this-node",
            Self::Request(_) => "bad-request",
            Self::Issue(_) => "cannot-sign",
        }
    }
}

/// The authority, and the rules by which it signs.
pub(crate) struct Certifier {
    authority: Authority,
    /// The longest life of a leaf.
    leaf_validity: Duration,
    rates: Mutex<Rates>,
    clock: Clock,
}

impl Certifier {
    pub(crate) fn new(authority: Authority, leaf_validity: Duration, clock: Clock) -> Self {
        Self { authority, leaf_validity, rates: Mutex::default(), clock }
    }

    pub(crate) fn authority(&self) -> &Authority {
        &self.authority
    }

    /// Checks all that can be checked without knowing the pods. `seconds` is the validity that was asked for; zero or less
    /// asks for the longest.
    pub(crate) fn examine(&self, caller: &Caller, id: &str, csr: &str, seconds: i64) -> Result<Application, Refused> {
        let node = caller.node.clone();
        if caller.role != Role::Proxy {
            return Err(Refused::WrongRole { role: caller.role, node });
        }
        // A node that asks too often must not cost signatures, so that comes before all that does.
        if !self.rates.lock().unwrap_or_else(PoisonError::into_inner).admit(&node, self.clock.monotonic()) {
            return Err(Refused::TooMany { node });
        }
        let id: SpiffeId = id.parse().map_err(Refused::NotAnIdentity)?;
        let trust_domain = self.authority.bundle().trust_domain();
        if id.trust_domain() != trust_domain {
            return Err(Refused::ForeignTrustDomain { id, trust_domain: trust_domain.clone() });
        }
        let asked = u64::try_from(seconds).ok().filter(|seconds| *seconds > 0).map(Duration::from_secs);
        let lifetime = asked.map_or(self.leaf_validity, |asked| asked.min(self.leaf_validity));
        Ok(Application { node, id, key: PublicKeyOfRequest::from_pem(csr)?, lifetime })
    }

    /// Signs, if such a pod runs there. In PEM: the leaf, the intermediate, and last the roots.
    pub(crate) fn certify(&self, application: &Application, runs_there: bool) -> Result<Vec<String>, Refused> {
        let Application { node, id, key, lifetime } = application;
        if !runs_there {
            return Err(Refused::NotOnThisNode { id: id.clone(), node: node.clone() });
        }
        let workload = WorkloadToCertify::assertion(id.clone());
        let chain = self.authority.intermediate().sign(&workload, key, self.clock.now(), *lifetime)?;
        let mut texts = chain.to_pem_texts();
        texts.push(self.authority.bundle().to_pem());
        Ok(texts)
    }
}

#[cfg(test)]
mod tests {
    use identity::csr::{CertificateRequest, MAX_REQUEST_SIZE};
    use identity::{PrivateKey, Svid};

    use super::*;

    const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

    struct Fixture {
        certifier: Certifier,
        key: PrivateKey,
        clock: Clock,
        _directory: tempfile::TempDir,
    }

    fn fixture() -> Fixture {
        let directory = tempfile::tempdir().unwrap();
        let clock = Clock::default();
        let authority =
            Authority::open(&directory.path().join("ca"), &"cluster.local".parse().unwrap(), clock.now()).unwrap();
        let certifier = Certifier::new(authority, Duration::from_secs(3600), clock.clone());
        Fixture { certifier, key: PrivateKey::generate().unwrap(), clock, _directory: directory }
    }

    fn proxy() -> Caller {
        Caller { role: Role::Proxy, node: "node-a".to_owned() }
    }

    impl Fixture {
        fn request(&self) -> String {
            CertificateRequest::new(&self.key).unwrap().as_pem().to_owned()
        }

        fn refusal(&self, caller: &Caller, id: &str, csr: &str) -> Refused {
            self.certifier.examine(caller, id, csr, 0).unwrap_err()
        }
    }

    #[test]
    fn a_proxy_gets_a_chain_for_a_pod_of_its_node_with_the_roots_last() {
        let Fixture { certifier, key, clock, _directory } = fixture();
        let csr = CertificateRequest::new(&key).unwrap();
        let application = certifier.examine(&proxy(), WEB, csr.as_pem(), 0).unwrap();
        let texts = certifier.certify(&application, true).unwrap();
        assert_eq!(texts.len(), 3);
        assert_eq!(texts[2], certifier.authority().bundle().to_pem());
        let chain = identity::chain::Chain::from_pem(&texts.concat()).unwrap();
        let svid =
            Svid::assemble(key, chain, certifier.authority().bundle(), &WEB.parse().unwrap(), clock.now()).unwrap();
        let life = svid.not_after().as_secs() - clock.now().as_secs();
        assert!((3590..=3600).contains(&life), "{life}");
    }

    #[test]
    fn the_life_of_a_certificate_is_what_was_asked_for_within_the_limit() {
        let fixture = fixture();
        for (asked, expected) in [(600, 600), (0, 3600), (-5, 3600), (i64::MAX, 3600), (86_400, 3600)] {
            let application = fixture.certifier.examine(&proxy(), WEB, &fixture.request(), asked).unwrap();
            assert_eq!(application.lifetime, Duration::from_secs(expected), "{asked}");
        }
    }

    #[test]
    fn each_refusal_has_its_name() {
        let fixture = fixture();
        let csr = fixture.request();
        let agent = Caller { role: Role::Agent, node: "node-a".to_owned() };
        assert_eq!(fixture.refusal(&agent, WEB, &csr).as_str(), "wrong-role");
        assert_eq!(fixture.refusal(&proxy(), "web", &csr).as_str(), "not-an-identity");
        let foreign = WEB.replace("cluster.local", "example.org");
        assert_eq!(fixture.refusal(&proxy(), &foreign, &csr).as_str(), "foreign-trust-domain");
        let large = csr.clone() + &"\n".repeat(MAX_REQUEST_SIZE);
        assert_eq!(fixture.refusal(&proxy(), WEB, &large), Refused::Request(RequestError::TooLarge));
        assert_eq!(fixture.refusal(&proxy(), WEB, "nothing"), Refused::Request(RequestError::Malformed));
        let application = fixture.certifier.examine(&proxy(), WEB, &csr, 0).unwrap();
        assert_eq!(fixture.certifier.certify(&application, false).unwrap_err().as_str(), "not-on-this-node");
        fixture.clock.advance(Duration::from_secs(4_000 * 24 * 3600));
        assert_eq!(fixture.certifier.certify(&application, true).unwrap_err().as_str(), "cannot-sign");
    }

    #[test]
    fn a_node_that_asks_too_often_is_refused_and_another_is_not() {
        let fixture = fixture();
        let csr = fixture.request();
        let refused = (0..10_000).find_map(|_| fixture.certifier.examine(&proxy(), WEB, &csr, 0).err()).unwrap();
        assert_eq!(refused.as_str(), "too-many-requests");
        let other = Caller { role: Role::Proxy, node: "node-b".to_owned() };
        assert!(fixture.certifier.examine(&other, WEB, &csr, 0).is_ok());
        fixture.clock.advance(Duration::from_secs(60));
        assert!(fixture.certifier.examine(&proxy(), WEB, &csr, 0).is_ok());
    }
}
