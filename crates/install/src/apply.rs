//! What applying an object would change, and applying it: server-side, as the field manager `justmtls`.

use anyhow::bail;
use kube::Error;
use serde_json::Value;

use crate::cluster::{Cluster, path};
use crate::drift::{Difference, differences};
use crate::objects::{Object, PART_OF};

/// What applying an object comes to.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Outcome {
    /// It was not there.
    Created,
    /// It is as it was.
    Unchanged,
    /// Fields were changed.
    Changed(Vec<Difference>),
}

/// Somebody else's fields, as the API server names them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Conflict {
    field: String,
    owner: String,
}

/// What applying it would change.
///
/// # Errors
/// The API server refuses the object; or fields are somebody else's, and `force` is not said.
pub(crate) async fn plan(cluster: &Cluster, object: &Object, force: bool) -> anyhow::Result<Outcome> {
    let Some(is) = cluster.get(&path(object)).await? else {
        if let Some(namespace) = object.namespace() {
            // Nothing can be tried in a namespace that is still to come.
            if cluster.get(&format!("/api/v1/namespaces/{namespace}")).await?.is_none() {
                return Ok(Outcome::Created);
            }
        }
        apply(cluster, object, true, force).await?;
        return Ok(Outcome::Created);
    };
    let wanted = apply(cluster, object, true, force).await?;
    let differences = differences(&is, &wanted);
    Ok(if differences.is_empty() { Outcome::Unchanged } else { Outcome::Changed(differences) })
}

/// Applies it where that changes something.
///
/// # Errors
/// As for [`plan`].
pub(crate) async fn make(cluster: &Cluster, object: &Object, force: bool) -> anyhow::Result<Outcome> {
    let outcome = plan(cluster, object, force).await?;
    if outcome != Outcome::Unchanged {
        apply(cluster, object, false, force).await?;
    }
    Ok(outcome)
}

async fn apply(cluster: &Cluster, object: &Object, dry_run: bool, force: bool) -> anyhow::Result<Value> {
    match cluster.apply(object, dry_run, force).await {
        Ok(value) => Ok(value),
        Err(Error::Api(status)) if status.code == 409 && !force => {
            let causes = status.details.as_ref().map(|details| details.causes.as_slice()).unwrap_or_default();
            let conflicts: Vec<_> = causes.iter().map(|cause| Conflict::read(&cause.field, &cause.message)).collect();
            bail!("{}", sentence(&object.title(), &conflicts, &status.message))
        }
        Err(error) => Err(cluster.explain(error, &format!("applying {}", object.title()))),
    }
}

impl Conflict {
    /// From a cause: its field, and `conflict with "manager" using version`.
    fn read(field: &str, message: &str) -> Self {
        let owner = message.split('"').nth(1).unwrap_or(message);
        Self { field: field.trim_start_matches('.').to_owned(), owner: owner.to_owned() }
    }
}

fn sentence(title: &str, conflicts: &[Conflict], message: &str) -> String {
    let mut fields: Vec<_> =
        conflicts.iter().map(|conflict| format!("{} is {}'s", conflict.field, conflict.owner)).collect();
    fields.sort();
    let what = if fields.is_empty() { message.to_owned() } else { fields.join(", ") };
    format!(
        "{title} has fields that somebody else set: {what}; set them by --set instead, or let `justmtls upgrade` take them over"
    )
}

/// Objects that an earlier version, or other values, made and that are no longer wanted: their titles and paths.
///
/// The namespace stays, and what the control plane itself writes is no such object: ConfigMaps, Secrets and Leases are left out.
pub(crate) async fn leftovers(
    cluster: &Cluster,
    all: &[Object],
    wanted: &[Object],
) -> anyhow::Result<Vec<(String, String)>> {
    let mut collections: Vec<_> = all
        .iter()
        .filter(|object| !["Namespace", "ConfigMap"].contains(&object.kind()))
        .map(|object| (crate::cluster::collection(object), object.kind()))
        .collect();
    collections.sort_unstable();
    collections.dedup();
    let selector = format!("labelSelector={PART_OF}%3Djustmtls");
    let mut found = Vec::new();
    for (collection, kind) in collections {
        for object in cluster.list::<Value>(&collection, &selector).await? {
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            let place = format!("{collection}/{name}");
            if !name.is_empty() && !wanted.iter().any(|object| path(object) == place) {
                found.push((format!("{kind} {name}"), place));
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conflict_names_field_and_owner_and_what_to_do() {
        let conflict = Conflict::read(".spec.replicas", "conflict with \"kubectl-edit\" using apps/v1");
        let text = sentence("Deployment justmtls-control", &[conflict], "");
        assert!(text.starts_with(
            "Deployment justmtls-control has fields that somebody else set: spec.replicas is kubectl-edit's;"
        ));
        assert!(sentence("a", &[], "conflict").contains("conflict"));
    }
}
