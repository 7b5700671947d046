//! What a process leaves to its successor on the same node: SVIDs with their keys, as bytes in memory.
//!
//! The one way out for a workload's private key, and narrow: all SVIDs at once, into a buffer that is wiped, in a form that
//! nothing else here reads. What comes back is put together like an SVID that an authority has just issued, with the same
//! checks: nothing is believed because it was left by somebody.

use rustls_pki_types::UnixTime;
use zeroize::Zeroizing;

use crate::bundle::TrustBundle;
use crate::chain::Chain;
use crate::key::PrivateKey;
use crate::spiffe::SpiffeId;
use crate::svid::Svid;

/// The largest estate, in bytes: a node with thousands of identities stays below.
pub const MAX_ESTATE: u64 = 16 * 1024 * 1024;

/// Writes SVIDs. The buffer is wiped when dropped.
///
/// # Errors
/// A key cannot be encoded, which the cryptographic library alone can bring about.
pub fn bequeath<'a>(svids: impl IntoIterator<Item = &'a Svid>) -> Result<Zeroizing<Vec<u8>>, crate::key::KeyError> {
    let mut parts = Vec::new();
    for svid in svids {
        let chain = crate::pem::encode_certificates(svid.chain());
        parts.push((svid.id().to_string(), svid.key().to_pem()?, chain));
    }
    // One buffer in its final size: one that grows leaves copies behind.
    let length = parts.iter().map(|(id, key, chain)| 3 * LENGTH + id.len() + key.len() + chain.len()).sum();
    let mut bytes = Zeroizing::new(Vec::with_capacity(length));
    for (id, key, chain) in &parts {
        for part in [id.as_str(), key.as_str(), chain.as_str()] {
            bytes.extend_from_slice(&(part.len() as u32).to_be_bytes());
            bytes.extend_from_slice(part.as_bytes());
        }
    }
    Ok(bytes)
}

/// Reads SVIDs: those that a peer with this bundle would accept now. The others, and what does not parse, are left out:
/// their owner asks for new ones.
pub fn inherit(mut bytes: &[u8], bundle: &TrustBundle, now: UnixTime) -> Vec<Svid> {
    let mut svids = Vec::new();
    while let (Some(id), Some(key), Some(chain)) = (part(&mut bytes), part(&mut bytes), part(&mut bytes)) {
        svids.extend(one(id, key, chain, bundle, now));
    }
    svids
}

/// Bytes of a length.
const LENGTH: usize = size_of::<u32>();

fn part<'a>(bytes: &mut &'a [u8]) -> Option<&'a str> {
    let (length, rest) = bytes.split_first_chunk::<LENGTH>()?;
    let (part, rest) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
    *bytes = rest;
    std::str::from_utf8(part).ok()
}

fn one(id: &str, key: &str, chain: &str, bundle: &TrustBundle, now: UnixTime) -> Option<Svid> {
    let id: SpiffeId = id.parse().ok()?;
    Svid::assemble(PrivateKey::from_pem(key).ok()?, Chain::from_pem(chain).ok()?, bundle, &id, now).ok()
}
