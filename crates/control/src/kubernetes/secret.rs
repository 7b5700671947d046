//! The certificate authority in a Secret, which all replicas share.
//!
//! The Lease's holder makes it where there is none, and never writes over one: of two that both think to hold the Lease, the
//! API server takes one, and the other one reads that. The root's key is not in it (see `ca::authority`).

use std::collections::BTreeMap;

use identity::{TrustDomain, UnixTime};
use kube::api::GetParams;
use kube::{Client, Resource, core};
use manifests::k8s_openapi::ByteString;
use manifests::k8s_openapi::api::core::v1::Secret;
use zeroize::Zeroizing;

use super::{Failure, ask_in_silence, metadata, parameters};
use crate::ROOT_NAMESPACE;
use crate::ca::authority::{Authority, AuthorityError, INTERMEDIATE, INTERMEDIATE_KEY, Pem, ROOT};

/// The Secret's name.
const NAME: &str = "justmtls-ca";
/// How problems name it.
pub(crate) const PLACE: &str = "Secret justmtls-system/justmtls-ca";
/// What to do about one that is at its end or no good.
const NEW_SECRET: &str = "put back the one that nodes trust, or delete it while no control plane runs, for a new authority, which \
                          each node trusts when its kubelet has the new roots";

/// Why there is no authority yet.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SecretError {
    #[error("{PLACE}: {0}")]
    Failure(#[from] Failure),
    #[error("{PLACE} has no {0}; {NEW_SECRET}")]
    Incomplete(&'static str),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
}

/// Reads the Secret; `None` where there is none.
pub(crate) async fn load(
    client: &Client,
    trust_domain: &TrustDomain,
    now: UnixTime,
) -> Result<Option<Authority>, SecretError> {
    let request = core::Request::new(Secret::url_path(&(), Some(ROOT_NAMESPACE))).get(NAME, &GetParams::default());
    let secret: Secret = match ask_in_silence(client, request).await {
        Ok(secret) => secret,
        Err(Failure::Absent) => return Ok(None),
        Err(failure) => return Err(failure.into()),
    };
    let pem = pem(secret)?;
    Ok(Some(Authority::from_pem(PLACE, NEW_SECRET, &pem, trust_domain, now)?))
}

fn pem(secret: Secret) -> Result<Pem, SecretError> {
    let mut data = secret.data.unwrap_or_default();
    let mut take = |key| {
        let bytes = Zeroizing::new(data.remove(key).ok_or(SecretError::Incomplete(key))?.0);
        let text = std::str::from_utf8(&bytes).map_err(|_| SecretError::Incomplete(key))?;
        Ok::<_, SecretError>(Zeroizing::new(text.to_owned()))
    };
    Ok(Pem {
        key: take(INTERMEDIATE_KEY)?,
        root: take(ROOT)?.to_string(),
        intermediate: take(INTERMEDIATE)?.to_string(),
    })
}

/// Makes an authority and its Secret; where another replica was first, that one's counts.
pub(crate) async fn make(client: &Client, trust_domain: &TrustDomain, now: UnixTime) -> Result<Authority, SecretError> {
    let authority = Authority::generate(PLACE, NEW_SECRET, trust_domain, now)?;
    match create(client, &authority).await {
        Ok(()) => Ok(authority),
        Err(SecretError::Failure(Failure::Conflict)) => {
            // It was there a moment ago.
            load(client, trust_domain, now).await?.ok_or(SecretError::Failure(Failure::Absent))
        }
        Err(error) => Err(error),
    }
}

/// Writes the Secret of an authority, where there is none.
pub(crate) async fn create(client: &Client, authority: &Authority) -> Result<(), SecretError> {
    let pem = authority.to_pem()?;
    let bytes = |text: &str| ByteString(text.as_bytes().to_vec());
    let secret = Secret {
        metadata: metadata(NAME),
        type_: Some("Opaque".to_owned()),
        data: Some(BTreeMap::from([
            (ROOT.to_owned(), bytes(&pem.root)),
            (INTERMEDIATE.to_owned(), bytes(&pem.intermediate)),
            (INTERMEDIATE_KEY.to_owned(), bytes(&pem.key)),
        ])),
        ..Secret::default()
    };
    let body = serde_json::to_vec(&secret).map_err(|error| Failure::Refused(error.to_string()))?;
    let request = core::Request::new(Secret::url_path(&(), Some(ROOT_NAMESPACE))).create(&parameters(), body);
    let _: Secret = ask_in_silence(client, request).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::fake::Fake;
    use super::*;
    use crate::clock::Clock;

    fn trust_domain() -> TrustDomain {
        "cluster.local".parse().unwrap()
    }

    #[tokio::test]
    async fn two_replicas_that_start_at_once_have_one_authority() {
        let fake = Fake::default();
        let now = Clock::default().now();
        assert!(load(&fake.client(), &trust_domain(), now).await.unwrap().is_none());
        let (one, two, domain) = (fake.client(), fake.client(), trust_domain());
        let (one, two) = tokio::join!(make(&one, &domain, now), make(&two, &domain, now));
        let later = load(&fake.client(), &trust_domain(), now).await.unwrap().unwrap();
        assert_eq!(one.unwrap().bundle(), later.bundle());
        assert_eq!(two.unwrap().bundle(), later.bundle());
        assert_eq!(fake.writes(), 1);
    }

    #[tokio::test]
    async fn a_secret_that_is_no_authority_is_named_and_never_written_over() {
        let fake = Fake::default();
        let now = Clock::default().now();
        make(&fake.client(), &trust_domain(), now).await.unwrap();
        fake.change(&format!("/api/v1/namespaces/{ROOT_NAMESPACE}/secrets/{NAME}"), |secret| {
            secret["data"][INTERMEDIATE_KEY] = "bm90aGluZw==".into();
        });
        let error = load(&fake.client(), &trust_domain(), now).await.err().unwrap().to_string();
        assert!(error.contains(PLACE) && error.contains("nodes trust") && !error.contains("nothing"), "{error}");
        fake.change(&format!("/api/v1/namespaces/{ROOT_NAMESPACE}/secrets/{NAME}"), |secret| {
            secret["data"].as_object_mut().unwrap().remove(ROOT);
        });
        let error = make(&fake.client(), &trust_domain(), now).await.err().unwrap().to_string();
        assert!(error.contains("has no root.pem"), "{error}");
    }
}
