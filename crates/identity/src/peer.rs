//! The proof that a handshake was checked.
//!
//! This file stands alone so that privacy does the work: outside of it nobody can name the fields of [`VerifiedPeer`],
//! and so nobody can make one without a finished handshake.
//!
//! What a finished connection does not show is which verifier judged it. That is why [`crate::tls`] is the only place
//! that gives rustls a verifier; a configuration made elsewhere would make this proof worthless.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use aws_lc_rs::digest;

use rustls::{CipherSuite, CommonState, NamedGroup, ProtocolVersion};
use rustls_pki_types::{CertificateDer, UnixTime};

use crate::bundle::{Digest, TrustBundle};
use crate::certificate;
use crate::refusal::Refusal;
use crate::spiffe::SpiffeId;
use crate::validity::Validity;
use crate::verify::{self, Role, VerifyError, verify};

/// The other side of a finished, mutually checked TLS 1.3 handshake.
///
/// It says who the peer is, never what it may: that is the next decision, made of this value.
#[derive(Clone, Debug)]
pub struct VerifiedPeer {
    id: SpiffeId,
    validity: Validity,
    handshake: Handshake,
    kept: Arc<Kept>,
}

/// What the peer showed, for the day on which the trust bundle changes. Shared by all connections on which it is shown: one
/// pod may have thousands.
#[derive(Debug)]
struct Kept {
    chain: Vec<CertificateDer<'static>>,
    /// The last bundle that the chain was found good under by [`VerifiedPeer::still_valid`], the role, and until when that
    /// finding holds.
    good: Mutex<Option<(Digest, Role, UnixTime)>>,
}

/// The chains that are kept now, by their SHA-256.
static SHARED: LazyLock<Mutex<HashMap<[u8; 32], Weak<Kept>>>> = LazyLock::new(Mutex::default);

/// The most chains that are shared; those beyond are kept by each connection for itself.
const MOST_SHARED: usize = 8192;

impl Kept {
    fn of(chain: &[CertificateDer<'_>]) -> Arc<Self> {
        // DER says its own length, so that no two different chains are the same concatenation.
        let mut hash = digest::Context::new(&digest::SHA256);
        chain.iter().for_each(|certificate| hash.update(certificate));
        let mut key = [0; 32];
        key.copy_from_slice(hash.finish().as_ref());

        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = shared.get(&key).and_then(Weak::upgrade) {
            return kept;
        }
        let chain = chain.iter().map(|certificate| certificate.clone().into_owned()).collect();
        let kept = Arc::new(Kept { chain, good: Mutex::new(None) });
        if shared.len() >= MOST_SHARED {
            shared.retain(|_, kept| kept.strong_count() > 0);
        }
        if shared.len() < MOST_SHARED {
            shared.insert(key, Arc::downgrade(&kept));
        }
        kept
    }
}

impl VerifiedPeer {
    /// Takes the proof from a connection that [`crate::tls`] configured, once its handshake is over.
    ///
    /// `protocol` is the one that must have been negotiated inside TLS, [`crate::tls::JUSTMTLS_1`] or
    /// [`crate::tls::H2`]. A peer that negotiated none at all is refused like one that negotiated another.
    ///
    /// # Errors
    /// The named reason: unfinished, not TLS 1.3, another protocol, no certificate.
    pub fn from_handshake(connection: &CommonState, protocol: &[u8]) -> Result<Self, Refusal> {
        let handshake = Handshake::of(connection)?;
        if handshake.version != ProtocolVersion::TLSv1_3 {
            return Err(Refusal::TlsVersion);
        }
        if connection.alpn_protocol() != Some(protocol) {
            return Err(Refusal::Alpn);
        }
        let Some(chain @ [leaf, ..]) = connection.peer_certificates() else {
            return Err(Refusal::NoClientCertificate);
        };
        let facts = certificate::read(leaf).ok_or(VerifyError::BadEncoding)?;
        let id = verify::identity_of(&facts)?;
        let validity = certificate::validity_of(chain).ok_or(VerifyError::BadEncoding)?;
        let kept = Kept::of(chain);
        Ok(VerifiedPeer { id, validity, handshake, kept })
    }

    /// Whether the chain that the peer showed still proves who it is, under the bundle of today (T45): a connection that
    /// outlives a change of the roots, or waits for its next use, is judged by what it once showed, and not dialled anew.
    ///
    /// `role` is the peer's in the handshake. Under the bundle of the last call this costs comparisons alone; under another
    /// one, the signatures are verified again.
    ///
    /// # Errors
    /// As [`verify`](fn@verify): what a new handshake with the same certificates would be refused for.
    pub fn still_valid(&self, role: Role, bundle: &TrustBundle, now: UnixTime) -> Result<(), VerifyError> {
        let mut good = self.kept.good.lock().unwrap_or_else(PoisonError::into_inner);
        let known =
            good.is_some_and(|(under, as_whom, until)| (under, as_whom) == (bundle.digest(), role) && now <= until);
        if known && self.validity.contains(now) {
            return Ok(());
        }
        let [leaf, intermediates @ ..] = &self.kept.chain[..] else { return Err(VerifyError::BadEncoding) };
        verify(bundle, leaf, intermediates, role, now)?;
        *good = Some((bundle.digest(), role, bundle.constant_until(now)));
        Ok(())
    }

    /// Who the peer is.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The first second in which all certificates that the peer showed are valid.
    pub fn not_before(&self) -> UnixTime {
        self.validity.not_before()
    }

    /// The last second in which all certificates that the peer showed are valid: what rides on this proof ends then.
    pub fn not_after(&self) -> UnixTime {
        self.validity.not_after()
    }

    /// What was negotiated, for people to see.
    pub fn handshake(&self) -> Handshake {
        self.handshake
    }
}

/// What a handshake negotiated. It is shown, and decides nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handshake {
    version: ProtocolVersion,
    group: NamedGroup,
    cipher: CipherSuite,
}

impl Handshake {
    /// Reads what a connection negotiated.
    ///
    /// # Errors
    /// [`Refusal::Unfinished`] while the handshake goes on.
    pub fn of(connection: &CommonState) -> Result<Self, Refusal> {
        if connection.is_handshaking() {
            return Err(Refusal::Unfinished);
        }
        let (Some(version), Some(group), Some(cipher)) = (
            connection.protocol_version(),
            connection.negotiated_key_exchange_group(),
            connection.negotiated_cipher_suite(),
        ) else {
            return Err(Refusal::Unfinished);
        };
        Ok(Handshake { version, group: group.name(), cipher: cipher.suite() })
    }

    /// The TLS version, such as `TLSv1_3`.
    pub fn version(&self) -> &'static str {
        self.version.as_str().unwrap_or("unknown")
    }

    /// The key exchange, such as `X25519MLKEM768`.
    pub fn group(&self) -> &'static str {
        self.group.as_str().unwrap_or("unknown")
    }

    /// The cipher suite, such as `TLS13_AES_128_GCM_SHA256`.
    pub fn cipher(&self) -> &'static str {
        self.cipher.as_str().unwrap_or("unknown")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_that_is_shown_often_is_kept_once_and_only_while_somebody_has_it() {
        let chain = |last: u8| [CertificateDer::from(vec![0x30, 1, 7]), CertificateDer::from(vec![0x30, 1, last])];
        let first = Kept::of(&chain(1));
        assert!(Arc::ptr_eq(&first, &Kept::of(&chain(1))));
        assert!(!Arc::ptr_eq(&first, &Kept::of(&chain(2))));
        assert_eq!(first.chain, chain(1));
        let gone = Arc::downgrade(&first);
        drop(first);
        assert!(gone.upgrade().is_none());
    }

    #[test]
    fn what_is_shared_is_bounded() {
        let chain = |number: u32| [CertificateDer::from(number.to_be_bytes().to_vec())];
        let held: Vec<_> = (0..MOST_SHARED as u32 + 100).map(|number| Kept::of(&chain(number))).collect();
        assert!(SHARED.lock().unwrap().len() <= MOST_SHARED);
        drop(held);
        // Those that nobody has make room.
        let kept = Kept::of(&chain(u32::MAX));
        assert!(Arc::ptr_eq(&kept, &Kept::of(&chain(u32::MAX))));
    }
}
