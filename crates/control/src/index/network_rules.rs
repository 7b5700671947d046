//! What a NetworkPolicy can go by, as a number that differs where that differs (T20). Who enforces them decides about new
//! connections on the wire, and a tunnel at rest is none: it must go when this changes.

use std::collections::BTreeMap;

use manifests::k8s_openapi::api::networking::v1::NetworkPolicy;
use sha2::{Digest, Sha256};

/// Labels of a pod or of a namespace.
type Labels = BTreeMap<String, String>;

/// What a policy says, as a number.
pub(super) fn digest_of_policy(policy: &NetworkPolicy) -> u64 {
    // Objects are maps of strings to values, which JSON can always say.
    number(Sha256::new_with_prefix(serde_json::to_vec(&policy.spec).unwrap_or_default()))
}

/// The number of a pod: from its labels, those of its namespace, and the policies there in the order of their names. The same
/// in each replica and after each restart.
pub(super) fn digest(pod: &Labels, namespace: &Labels, policies: impl Iterator<Item = u64>) -> u64 {
    let mut hash = Sha256::new();
    for labels in [pod, namespace] {
        hash.update((labels.len() as u64).to_be_bytes());
        for text in labels.iter().flat_map(|(name, value)| [name, value]) {
            hash.update((text.len() as u64).to_be_bytes());
            hash.update(text);
        }
    }
    policies.for_each(|policy| hash.update(policy.to_be_bytes()));
    number(hash)
}

fn number(hash: Sha256) -> u64 {
    hash.finalize().iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
}
