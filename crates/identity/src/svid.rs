//! The SVID: a workload's identity, chain and key as one value (X509-SVID; SPIFFE Verifiable Identity Document).

use std::fmt;
use std::sync::Arc;

use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, UnixTime};
use thiserror::Error;

use crate::bundle::TrustBundle;
use crate::certificate;
use crate::chain::Chain;
use crate::key::{KeyError, PrivateKey};
use crate::spiffe::SpiffeId;
use crate::validity::Validity;
use crate::verify::{Role, VerifyError, verify};

/// What a workload shows in handshakes: an identity, the chain that proves it, and the key of its leaf.
///
/// A value, never changed: renewal makes another one and swaps it whole, and where that fails the old one stays. A clone
/// costs a reference count.
#[derive(Clone)]
pub struct Svid(Arc<Parts>);

struct Parts {
    id: SpiffeId,
    validity: Validity,
    certified_key: Arc<CertifiedKey>,
    /// For the next process, and for nothing else.
    key: PrivateKey,
}

impl Svid {
    /// Puts an SVID together, if a peer with this bundle would accept it now, on either side of a handshake, as
    /// `expected`. Roots at the end of the chain are left out.
    ///
    /// # Errors
    /// The first thing that does not fit. The caller keeps the SVID that it has.
    pub fn assemble(
        key: PrivateKey,
        chain: Chain,
        bundle: &TrustBundle,
        expected: &SpiffeId,
        now: UnixTime,
    ) -> Result<Self, SvidError> {
        let chain = chain.without_roots(bundle);
        for role in [Role::Client, Role::Server] {
            let found = verify(bundle, chain.leaf(), &chain.certificates()[1..], role, now)?;
            if found != *expected {
                return Err(VerifyError::WrongIdentity { expected: expected.clone(), found }.into());
            }
        }
        let leaf = certificate::read(chain.leaf()).ok_or(VerifyError::BadEncoding)?;
        if leaf.public_key_info != key.public_key_info() {
            return Err(SvidError::KeyMismatch);
        }
        let validity = certificate::validity_of(chain.certificates()).ok_or(VerifyError::BadEncoding)?;
        let certified_key = Arc::new(CertifiedKey::new(chain.certificates().to_vec(), key.to_rustls()?));
        Ok(Svid(Arc::new(Parts { id: expected.clone(), validity, certified_key, key })))
    }

    /// Whose it is.
    pub fn id(&self) -> &SpiffeId {
        &self.0.id
    }

    /// When all of its certificates are valid.
    pub fn validity(&self) -> &Validity {
        &self.0.validity
    }

    /// The first second in which all of its certificates are valid.
    pub fn not_before(&self) -> UnixTime {
        self.0.validity.not_before()
    }

    /// The last second in which all of its certificates are valid.
    pub fn not_after(&self) -> UnixTime {
        self.0.validity.not_after()
    }

    /// The chain in DER, the leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.0.certified_key.cert
    }

    /// The key of the leaf.
    pub(crate) fn key(&self) -> &PrivateKey {
        &self.0.key
    }

    /// Chain and key as rustls takes them.
    pub(crate) fn certified_key(&self) -> Arc<CertifiedKey> {
        self.0.certified_key.clone()
    }
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Svid({}, valid {:?}, key redacted)", self.id(), self.validity())
    }
}

/// Why key and certificates are not an SVID.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SvidError {
    /// A peer would not accept the chain as the identity that it should prove.
    #[error("the new certificate would not be accepted: {0}")]
    Verify(#[from] VerifyError),
    /// The leaf is about another key.
    #[error("the new certificate is for another key than the one that asked for it")]
    KeyMismatch,
    /// The key cannot be used.
    #[error(transparent)]
    Key(#[from] KeyError),
}
