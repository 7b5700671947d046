//! Names: trust domains and SPIFFE IDs.
//!
//! The parser is strict and byte-exact: a text is an identity in exactly one spelling, so that two identities are equal
//! if and only if their texts are. It knows no percent-decoding, no case folding and no trimming, each of which would
//! let two peers read one certificate differently.
//!
//! Source: the SPIFFE-ID standard, section 2 (<https://spiffe.io/docs/latest/spiffe-specs/spiffe-id/>), narrowed to the
//! path that Kubernetes meshes share: `/ns/<namespace>/sa/<service account>`.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

/// The longest SPIFFE ID, in bytes (SPIFFE-ID, section 2.3).
pub const MAX_ID_LENGTH: usize = 2048;

/// The longest trust domain name, in bytes (SPIFFE-ID, section 2.3).
pub const MAX_TRUST_DOMAIN_LENGTH: usize = 255;

const SCHEME: &str = "spiffe://";

/// The name of a trust domain: one or more of `a-z`, `0-9`, `.`, `-`, `_` (SPIFFE-ID, section 2.1).
///
/// No port, user or upper case. A clone costs a reference count.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// The name, without scheme or slash.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The trust domain's own SPIFFE ID, `spiffe://<name>`, which its signing certificates carry (X509-SVID, section 3.2).
    pub fn to_uri(&self) -> String {
        format!("{SCHEME}{}", self.0)
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeIdError;

    /// Takes the bare name (`cluster.local`), never a URI.
    fn from_str(name: &str) -> Result<Self, SpiffeIdError> {
        if name.is_empty() {
            return Err(SpiffeIdError::EmptyTrustDomain);
        }
        if name.len() > MAX_TRUST_DOMAIN_LENGTH {
            return Err(SpiffeIdError::TrustDomainTooLong);
        }
        let allowed = |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
        if !name.bytes().all(allowed) {
            return Err(SpiffeIdError::TrustDomainCharacter);
        }
        Ok(TrustDomain(name.into()))
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The identity of a workload: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
///
/// Compared, ordered and hashed by its text. A clone costs a reference count.
#[derive(Clone)]
pub struct SpiffeId(Arc<Parts>);

struct Parts {
    uri: Box<str>,
    trust_domain: TrustDomain,
    namespace: Box<str>,
    service_account: Box<str>,
}

impl SpiffeId {
    /// Composes an identity from its parts.
    ///
    /// # Errors
    /// Where a part is not one path segment of allowed characters, or the whole is too long.
    pub fn new(trust_domain: &TrustDomain, namespace: &str, service_account: &str) -> Result<Self, SpiffeIdError> {
        check_segment(namespace)?;
        check_segment(service_account)?;
        let uri = format!("{SCHEME}{trust_domain}/ns/{namespace}/sa/{service_account}");
        if uri.len() > MAX_ID_LENGTH {
            return Err(SpiffeIdError::TooLong);
        }
        Ok(SpiffeId(Arc::new(Parts {
            uri: uri.into(),
            trust_domain: trust_domain.clone(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        })))
    }

    /// The whole identity as text.
    pub fn as_str(&self) -> &str {
        &self.0.uri
    }

    /// The trust domain, which says whose roots vouch for this identity.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.0.trust_domain
    }

    /// The Kubernetes namespace.
    pub fn namespace(&self) -> &str {
        &self.0.namespace
    }

    /// The Kubernetes service account within the namespace.
    pub fn service_account(&self) -> &str {
        &self.0.service_account
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeIdError;

    fn from_str(uri: &str) -> Result<Self, SpiffeIdError> {
        // The length comes first: everything behind it is then bounded work.
        if uri.len() > MAX_ID_LENGTH {
            return Err(SpiffeIdError::TooLong);
        }
        let rest = uri.strip_prefix(SCHEME).ok_or(SpiffeIdError::Scheme)?;
        let (trust_domain, path) = rest.split_once('/').ok_or(SpiffeIdError::Path)?;
        let trust_domain = trust_domain.parse()?;
        let mut segments = path.split('/');
        let (Some("ns"), Some(namespace), Some("sa"), Some(service_account), None) =
            (segments.next(), segments.next(), segments.next(), segments.next(), segments.next())
        else {
            return Err(SpiffeIdError::Path);
        };
        SpiffeId::new(&trust_domain, namespace, service_account)
    }
}

/// A path segment: not empty, not relative, of `A-Z`, `a-z`, `0-9`, `.`, `-`, `_` (SPIFFE-ID, section 2.2).
fn check_segment(segment: &str) -> Result<(), SpiffeIdError> {
    if segment.is_empty() {
        return Err(SpiffeIdError::EmptySegment);
    }
    if segment == "." || segment == ".." {
        return Err(SpiffeIdError::DotSegment);
    }
    if !segment.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_')) {
        return Err(SpiffeIdError::PathCharacter);
    }
    Ok(())
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.uri)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.uri)
    }
}

impl PartialEq for SpiffeId {
    fn eq(&self, other: &Self) -> bool {
        self.0.uri == other.0.uri
    }
}

impl Eq for SpiffeId {}

impl Hash for SpiffeId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.uri.hash(state);
    }
}

impl PartialOrd for SpiffeId {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for SpiffeId {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.uri.cmp(&other.0.uri)
    }
}

/// Why a text is not an identity.
///
/// The messages do not repeat the text: it came from a stranger, and whoever logs it has to bound and escape it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SpiffeIdError {
    /// It does not begin with `spiffe://`.
    #[error("a SPIFFE ID begins with `spiffe://`, in lower case")]
    Scheme,
    /// It has more than [`MAX_ID_LENGTH`] bytes.
    #[error("a SPIFFE ID has at most {MAX_ID_LENGTH} bytes")]
    TooLong,
    /// Nothing stands where the trust domain should.
    #[error("a trust domain is not empty")]
    EmptyTrustDomain,
    /// The trust domain has more than [`MAX_TRUST_DOMAIN_LENGTH`] bytes.
    #[error("a trust domain has at most {MAX_TRUST_DOMAIN_LENGTH} bytes")]
    TrustDomainTooLong,
    /// The trust domain has a character that it must not have: a port, a user, an upper-case letter, `%`.
    #[error("a trust domain has only a-z, 0-9, `.`, `-` and `_`")]
    TrustDomainCharacter,
    /// The path is not of the one form known here.
    #[error("the path of a workload's SPIFFE ID is /ns/<namespace>/sa/<service account>")]
    Path,
    /// A path segment is empty.
    #[error("a namespace or service account in a SPIFFE ID is not empty")]
    EmptySegment,
    /// A path segment is `.` or `..`.
    #[error("a namespace or service account in a SPIFFE ID is neither `.` nor `..`")]
    DotSegment,
    /// A path segment has a character that it must not have: `/`, `%`, `?`, `#`, a space.
    #[error("a namespace or service account in a SPIFFE ID has only A-Z, a-z, 0-9, `.`, `-` and `_`")]
    PathCharacter,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn error(uri: &str) -> SpiffeIdError {
        uri.parse::<SpiffeId>().expect_err(uri)
    }

    #[test]
    fn a_workloads_identity_has_three_parts() {
        let id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
        assert_eq!(id.trust_domain().as_str(), "cluster.local");
        assert_eq!((id.namespace(), id.service_account()), ("shop", "web"));
        assert_eq!(id, SpiffeId::new(&"cluster.local".parse().unwrap(), "shop", "web").unwrap());
        assert_eq!(id.trust_domain().to_uri(), "spiffe://cluster.local");
    }

    #[test]
    fn the_scheme_is_exact() {
        for uri in ["", "spiffe", "spiffe:/a", "SPIFFE://a/ns/b/sa/c", " spiffe://a/ns/b/sa/c", "https://a/ns/b/sa/c"] {
            assert_eq!(error(uri), SpiffeIdError::Scheme);
        }
    }

    #[test]
    fn the_trust_domain_is_a_bare_lower_case_name() {
        for authority in ["A", "a:80", "user@a", "user:secret@a", "a%2eb", "[::1]", "é", "a b", "a\0"] {
            assert_eq!(error(&format!("spiffe://{authority}/ns/b/sa/c")), SpiffeIdError::TrustDomainCharacter);
        }
        assert_eq!(error("spiffe:///ns/b/sa/c"), SpiffeIdError::EmptyTrustDomain);
        let name = "a".repeat(MAX_TRUST_DOMAIN_LENGTH);
        assert!(format!("spiffe://{name}/ns/b/sa/c").parse::<SpiffeId>().is_ok());
        assert_eq!(error(&format!("spiffe://{name}a/ns/b/sa/c")), SpiffeIdError::TrustDomainTooLong);
        assert_eq!("spiffe://a".parse::<TrustDomain>(), Err(SpiffeIdError::TrustDomainCharacter));
    }

    #[test]
    fn the_path_has_one_form() {
        for path in ["", "/", "/ns/b/sa", "/ns/b/sa/c/", "/ns/b/sa/c/d", "//ns/b/sa/c", "/sa/c/ns/b", "/NS/b/sa/c"] {
            assert_eq!(error(&format!("spiffe://a{path}")), SpiffeIdError::Path, "{path}");
        }
    }

    #[test]
    fn segments_are_plain() {
        for segment in ["a%20b", "a?b", "a#b", "a b", "a\0", "a\\b", "ü", "a:b", "a@b", "a+b", "a~b", "\u{202e}"] {
            assert_eq!(error(&format!("spiffe://a/ns/{segment}/sa/c")), SpiffeIdError::PathCharacter, "{segment}");
            assert_eq!(error(&format!("spiffe://a/ns/b/sa/{segment}")), SpiffeIdError::PathCharacter, "{segment}");
        }
        assert_eq!(error("spiffe://a/ns//sa/c"), SpiffeIdError::EmptySegment);
        assert_eq!(error("spiffe://a/ns/b/sa/"), SpiffeIdError::EmptySegment);
        assert_eq!(error("spiffe://a/ns/../sa/c"), SpiffeIdError::DotSegment);
        assert_eq!(error("spiffe://a/ns/b/sa/."), SpiffeIdError::DotSegment);
        assert!("spiffe://a/ns/.../sa/_.-".parse::<SpiffeId>().is_ok());
    }

    #[test]
    fn a_slash_cannot_come_in_by_a_part() {
        let domain: TrustDomain = "a".parse().unwrap();
        assert_eq!(SpiffeId::new(&domain, "b/sa/root", "c"), Err(SpiffeIdError::PathCharacter));
    }

    #[test]
    fn the_length_is_bounded_to_the_byte() {
        let fixed = "spiffe://a/ns/b/sa/".len();
        let longest = format!("spiffe://a/ns/b/sa/{}", "c".repeat(MAX_ID_LENGTH - fixed));
        assert!(longest.parse::<SpiffeId>().is_ok());
        assert_eq!(error(&format!("{longest}c")), SpiffeIdError::TooLong);
        let account = "c".repeat(MAX_ID_LENGTH);
        assert_eq!(SpiffeId::new(&"a".parse().unwrap(), "b", &account), Err(SpiffeIdError::TooLong));
    }

    proptest! {
        #[test]
        fn every_identity_is_its_text_and_its_parts(
            domain in "[a-z0-9._-]{1,255}",
            namespace in "[A-Za-z0-9_-][A-Za-z0-9._-]{0,62}",
            account in "[A-Za-z0-9_-][A-Za-z0-9._-]{0,252}",
        ) {
            let id = SpiffeId::new(&domain.parse().unwrap(), &namespace, &account).unwrap();
            prop_assert_eq!((id.trust_domain().as_str(), id.namespace()), (&*domain, &*namespace));
            prop_assert_eq!(id.service_account(), account);
            prop_assert_eq!(id.to_string().parse::<SpiffeId>().unwrap(), id);
        }

        #[test]
        fn a_text_that_parses_is_the_identitys_only_spelling(
            text in "(?i:spiffe)://[a-zA-Z.:@%-]{0,4}(/(ns|sa|[a-zA-Z0-9.%?# _-]{0,3})){0,6}"
        ) {
            if let Ok(id) = text.parse::<SpiffeId>() {
                prop_assert_eq!(id.as_str(), text);
            }
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in any::<String>()) {
            prop_assert!(text.parse::<SpiffeId>().is_err());
            let _ = text.parse::<TrustDomain>();
        }
    }
}
