//! The namespace whose policies speak for the whole mesh, and the one for which it is taken.

use crate::ROOT_NAMESPACE;

/// Istio's own root namespace, which is one like any other here: two of them could say opposite things.
const ISTIO_ROOT: &str = "istio-system";

/// What is to be said of a policy without a selector that speaks for the whole mesh under Istio and not here: who wrote it believes
/// that everybody is held to it.
pub(super) fn elsewhere(namespace: &str) -> Option<String> {
    (namespace == ISTIO_ROOT).then(|| {
        format!(
            "is not in the root namespace of justmtls: without a selector it counts for the pods of {namespace} alone; put \
             it into {ROOT_NAMESPACE} to make it mesh-wide"
        )
    })
}
