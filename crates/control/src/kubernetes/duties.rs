//! What is looked after all the time: the authority's Secret, and the roots that are published from it.
//!
//! Every replica looks at the Secret; the one that leads writes. What somebody changed or deleted is put right at the next look.
//! A replica goes on with the authority that it began with, whatever becomes of the Secret.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kube::api::{ApiResource, DynamicObject, GroupVersionKind};
use kube::{Api, Client, Resource};
use manifests::k8s_openapi::api::core::v1::ConfigMap;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::info;

use super::secret::{self, PLACE};
use super::{Failure, ask, metadata, parameters, tell};
use crate::ca::Certifier;
use crate::clock::Clock;
use crate::problem::Problem;
use crate::{ROOT_NAMESPACE, labels};

/// How soon a change by somebody else is seen.
const EVERY: Duration = Duration::from_secs(5);
/// The ConfigMap that nodes mount, and its key.
const BUNDLE: &str = "justmtls-trust-bundle";
const BUNDLE_KEY: &str = "bundle.pem";
/// Who signs, as ClusterTrustBundles name it.
const SIGNER: &str = "justmtls.dev/workload";
const CERTIFICATES: &str = "certificates.k8s.io";

/// Looks after them for as long as the process runs, and says what is wrong.
pub(crate) async fn keep(
    client: Client,
    certifier: Arc<Certifier>,
    clock: Clock,
    leads: watch::Receiver<bool>,
    problems: watch::Sender<Vec<Problem>>,
) {
    let mut duties = Duties { client, certifier, clock, has_trust_bundles: true };
    loop {
        let leads = *leads.borrow();
        let found = duties.look(leads).await;
        tell(&problems, found);
        if problems.is_closed() {
            return;
        }
        sleep(EVERY).await;
    }
}

struct Duties {
    client: Client,
    certifier: Arc<Certifier>,
    clock: Clock,
    /// Whether the cluster is thought to serve ClusterTrustBundles.
    has_trust_bundles: bool,
}

impl Duties {
    async fn look(&mut self, leads: bool) -> Vec<Problem> {
        let mut problems: Vec<_> = self.secret(leads).await.into_iter().collect();
        if leads {
            problems.extend(self.config_map().await);
            problems.extend(self.trust_bundle().await);
        }
        problems
    }

    async fn secret(&self, leads: bool) -> Option<Problem> {
        let own = self.certifier.authority();
        match secret::load(&self.client, own.bundle().trust_domain(), self.clock.now()).await {
            Ok(Some(there)) if there.bundle() == own.bundle() => None,
            Ok(Some(_)) => Some(Problem::error(
                PLACE,
                "holds another authority than this control plane uses and nodes trust, and the one before stays in use; put \
                 that one back, or restart every pod of justmtls-system to change over",
            )),
            Ok(None) if leads => match secret::create(&self.client, own).await {
                Ok(()) => {
                    info!("{PLACE} was gone and is there again");
                    None
                }
                Err(error) => Some(Problem::error(PLACE, format!("was deleted and cannot be put back: {error}"))),
            },
            Ok(None) => Some(Problem::error(PLACE, "was deleted; the replica that leads puts it back")),
            // That the API server is away is said by those who follow it.
            Err(secret::SecretError::Failure(Failure::Away(_))) => None,
            Err(error) => Some(Problem::error(PLACE, format!("{error}; the one before stays in use"))),
        }
    }

    async fn config_map(&self) -> Option<Problem> {
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), ROOT_NAMESPACE);
        let data = Some(BTreeMap::from([(BUNDLE_KEY.to_owned(), self.certifier.authority().bundle().to_pem())]));
        let right = ConfigMap { metadata: metadata(BUNDLE), data, ..ConfigMap::default() };
        let is_right = |there: &ConfigMap| there.data == right.data;
        let written = ensure(&api, BUNDLE, &right, is_right).await;
        problem(format!("ConfigMap {ROOT_NAMESPACE}/{BUNDLE}"), written)
    }

    async fn trust_bundle(&mut self) -> Option<Problem> {
        let bundle = self.certifier.authority().bundle();
        let name = format!("{}:{}", SIGNER.replace('/', ":"), bundle.trust_domain());
        let mut written = Err(Failure::Absent);
        for version in ["v1", "v1beta1"] {
            let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(CERTIFICATES, version, "ClusterTrustBundle"));
            let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
            let mut right = DynamicObject::new(&name, &resource);
            right.metadata.labels = Some(labels());
            right.data = json!({ "spec": { "signerName": SIGNER, "trustBundle": bundle.to_pem() } });
            let is_right = |there: &DynamicObject| there.data["spec"] == right.data["spec"];
            written = ensure(&api, &name, &right, is_right).await;
            if written != Err(Failure::Absent) {
                break;
            }
        }
        let has_trust_bundles = written != Err(Failure::Absent);
        if has_trust_bundles != self.has_trust_bundles {
            info!(
                has_trust_bundles,
                "whether the cluster serves ClusterTrustBundles; without, the ConfigMap alone has the roots"
            );
            self.has_trust_bundles = has_trust_bundles;
        }
        problem(format!("ClusterTrustBundle {name}"), written)
    }
}

fn problem(subject: String, written: Result<(), Failure>) -> Option<Problem> {
    match written {
        Ok(()) | Err(Failure::Absent | Failure::Conflict | Failure::Away(_)) => None,
        Err(failure) => Some(Problem::error(subject, format!("cannot be published: {failure}"))),
    }
}

/// Makes an object what it is to be. Metadata that others wrote stay.
async fn ensure<K>(api: &Api<K>, name: &str, right: &K, is_right: impl Fn(&K) -> bool) -> Result<(), Failure>
where
    K: Resource + Clone + Serialize + DeserializeOwned + std::fmt::Debug,
{
    match ask(api.get_opt(name)).await? {
        Some(there) if is_right(&there) => Ok(()),
        Some(there) => {
            let mut next = right.clone();
            *next.meta_mut() = there.meta().clone();
            next.meta_mut().labels.get_or_insert_default().extend(labels());
            info!(name, "what is published was changed by somebody and is put right");
            ask(api.replace(name, &parameters(), &next)).await.map(drop)
        }
        None => ask(api.create(&parameters(), right)).await.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::Fake;
    use super::*;

    const CONFIG_MAP: &str = "/api/v1/namespaces/justmtls-system/configmaps/justmtls-trust-bundle";
    const TRUST_BUNDLE: &str = "/apis/certificates.k8s.io/v1/clustertrustbundles/justmtls.dev:workload:cluster.local";

    async fn duties(fake: &Fake) -> Duties {
        let clock = Clock::default();
        let authority = secret::make(&fake.client(), &"cluster.local".parse().unwrap(), clock.now()).await.unwrap();
        let certifier = Certifier::new(authority, Duration::from_secs(3600), clock.clone());
        Duties { client: fake.client(), certifier: Arc::new(certifier), clock, has_trust_bundles: true }
    }

    #[tokio::test]
    async fn the_leader_publishes_the_roots_and_puts_right_what_somebody_changed() {
        let fake = Fake::default();
        let mut duties = duties(&fake).await;
        assert_eq!(duties.look(false).await, []);
        assert_eq!(fake.get(CONFIG_MAP), None, "who does not lead writes nothing");
        assert_eq!(duties.look(true).await, []);
        let roots = duties.certifier.authority().bundle().to_pem();
        let published = |fake: &Fake| {
            [
                fake.get(CONFIG_MAP).unwrap()["data"][BUNDLE_KEY].clone(),
                fake.get(TRUST_BUNDLE).unwrap()["spec"]["trustBundle"].clone(),
            ]
        };
        assert_eq!(published(&fake), [json!(roots), json!(roots)]);
        let writes = fake.writes();
        duties.look(true).await;
        assert_eq!(fake.writes(), writes);
        fake.change(CONFIG_MAP, |config| config["data"] = json!({ "bundle.pem": "another root" }));
        fake.change(TRUST_BUNDLE, |bundle| bundle["spec"]["trustBundle"] = json!("another root"));
        duties.look(true).await;
        assert_eq!(published(&fake), [json!(roots), json!(roots)]);
    }

    #[tokio::test]
    async fn a_cluster_without_trust_bundles_is_no_problem() {
        let fake = Fake::default();
        fake.without("clustertrustbundles");
        let mut duties = duties(&fake).await;
        assert_eq!(duties.look(true).await, []);
        assert!(!duties.has_trust_bundles && fake.get(CONFIG_MAP).is_some());
    }

    #[tokio::test]
    async fn a_secret_that_is_deleted_is_put_back_and_another_one_is_named() {
        let fake = Fake::default();
        let mut duties = duties(&fake).await;
        let path = "/api/v1/namespaces/justmtls-system/secrets/justmtls-ca";
        let before = fake.get(path).unwrap()["data"].clone();
        fake.remove(path);
        assert!(duties.look(false).await[0].message.contains("was deleted"));
        assert_eq!(duties.look(true).await, []);
        assert_eq!(fake.get(path).unwrap()["data"], before);
        fake.remove(path);
        secret::make(&fake.client(), &"cluster.local".parse().unwrap(), Clock::default().now()).await.unwrap();
        assert!(duties.look(true).await[0].message.contains("another authority"));
        fake.fail_with(Some(503));
        assert_eq!(duties.look(true).await, []);
    }
}
