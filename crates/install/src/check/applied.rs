//! What was applied: the namespace, whether somebody takes it all away, each object, and the definitions.

use serde_json::Value;

use super::finding::{Finding, all_or, failed, ok, warning};
use super::ids::Id;
use crate::apply::{self, Outcome};
use crate::cluster::{Cluster, is_refusal, path};
use crate::install::recorded;
use crate::leaving::{self, Stage};
use crate::objects::{NAMESPACE, SETTINGS, definitions, objects};
use crate::table::some;
use crate::uninstall::is_going;
use crate::values::Values;

/// Whether there is an installation, and it is there to stay. Without any there is nothing to be looked at.
pub(super) async fn findings(cluster: &Cluster) -> (bool, Vec<Finding>) {
    let namespace = match cluster.get(&format!("/api/v1/namespaces/{NAMESPACE}")).await {
        Ok(Some(namespace)) => namespace,
        Ok(None) => return (false, vec![failed(Id::Installed, format!("there is no namespace {NAMESPACE}"))]),
        Err(error) => return (false, vec![failed(Id::Installed, format!("{error:#}"))]),
    };
    let values = match recorded(&namespace) {
        Ok(values) => values,
        Err(error) => return (false, vec![failed(Id::Installed, format!("{error:#}"))]),
    };
    let mut findings = vec![installed(&namespace)];
    match cluster.get(&leaving::place()).await {
        Ok(settings) => findings.extend(settings.as_ref().map(not_leaving)),
        Err(error) => findings.push(failed(Id::NotLeaving, format!("{error:#}"))),
    }
    // What goes with its namespace is as it was until it is gone.
    if !is_going(&namespace) {
        findings.extend(objects_as_rendered(cluster, &values).await);
    }
    findings.extend(definitions_present(cluster).await);
    (true, findings)
}

fn installed(namespace: &Value) -> Finding {
    if is_going(namespace) {
        return failed(Id::Installed, format!("the namespace {NAMESPACE} is being deleted")).advised(
            "wait until it is gone, and run `justmtls install`; after that `justmtls uninstall` takes it off in order",
        );
    }
    ok(Id::Installed, format!("the namespace {NAMESPACE} is there"))
}

fn not_leaving(settings: &Value) -> Finding {
    match Stage::of(settings).sentence() {
        Some(sentence) => failed(Id::NotLeaving, sentence),
        None => ok(Id::NotLeaving, "nobody is uninstalling the mesh"),
    }
}

async fn objects_as_rendered(cluster: &Cluster, values: &Values) -> Vec<Finding> {
    let wanted = objects(values);
    let mut outcomes = Vec::new();
    for object in &wanted {
        let outcome = apply::plan(cluster, object, true).await.map_err(|error| format!("{error:#}"));
        outcomes.push((object.title(), outcome));
    }
    compared(outcomes)
}

/// What comparing each object came to.
fn compared(outcomes: Vec<(String, Result<Outcome, String>)>) -> Vec<Finding> {
    let id = Id::ObjectsAsRendered;
    let (all, mut refused, mut wrong) = (outcomes.len(), 0, Vec::new());
    for (title, outcome) in outcomes {
        match outcome {
            Ok(Outcome::Unchanged) => {}
            Ok(Outcome::Created) => wrong.push(failed(id, format!("{title} is missing"))),
            Ok(Outcome::Changed(differences)) => {
                // An uninstallation is no difference, and has failed by its own name.
                let of_leaving = |field: &str| title == format!("ConfigMap {SETTINGS}") && field == leaving::FIELD;
                let fields: Vec<_> =
                    differences.iter().filter(|it| !of_leaving(&it.field)).map(ToString::to_string).collect();
                if !fields.is_empty() {
                    wrong.push(warning(id, format!("{title} differs: {}", some(&fields))));
                }
            }
            Err(why) if is_refusal(&why) => refused += 1,
            Err(why) => wrong.push(warning(id, format!("{title} cannot be compared: {why}"))),
        }
    }
    if refused > 0 {
        let message = format!("{refused} objects cannot be compared: who checks may not patch them (as a dry run)");
        wrong.push(warning(id, message).of_permission());
    }
    all_or(id, wrong, format!("{all} objects are as `justmtls render` has them"))
}

async fn definitions_present(cluster: &Cluster) -> Vec<Finding> {
    let id = Id::DefinitionsPresent;
    let mut wrong = Vec::new();
    for definition in definitions() {
        match cluster.get(&path(&definition)).await {
            Ok(Some(_)) => {}
            Ok(None) => wrong.push(failed(id, format!("{} is missing", definition.title()))),
            Err(error) => wrong.push(failed(id, format!("{error:#}"))),
        }
    }
    all_or(id, wrong, "PeerAuthentication and AuthorizationPolicy can be made")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::finding::State;
    use super::*;
    use crate::cluster::of_status;
    use crate::drift::differences;

    #[test]
    fn a_namespace_that_is_being_deleted_is_no_installation() {
        let namespace = |deleted: Value| json!({ "metadata": { "deletionTimestamp": deleted } });
        assert_eq!(installed(&namespace(Value::Null)).state, State::Ok);
        let going = installed(&namespace(json!("2026-12-01T00:00:00Z")));
        assert_eq!((going.state, &*going.message), (State::Failed, "the namespace justmtls-system is being deleted"));
    }

    #[test]
    fn a_mesh_that_is_being_uninstalled_has_failed_and_is_no_mere_difference() {
        let settings = |leaving: &str| json!({ "data": { "leaving": leaving, "drain": "1800" } });
        assert_eq!(["announced", "begun"].map(|word| not_leaving(&settings(word)).state), [State::Failed; 2]);
        let wanted = json!({ "data": { "drain": "1800" } });
        assert_eq!(not_leaving(&wanted).state, State::Ok);
        let compared = |title: &str, is: &Value| {
            compared(vec![(title.to_owned(), Ok(Outcome::Changed(differences(is, &wanted))))])
        };
        assert_eq!(compared("ConfigMap justmtls", &settings("begun"))[0].state, State::Ok);
        assert_eq!(compared("ConfigMap other", &settings("begun"))[0].state, State::Warning);
        let more = compared("ConfigMap justmtls", &json!({ "data": { "leaving": "begun", "drain": "5" } }));
        assert_eq!((more.len(), &*more[0].message), (1, "ConfigMap justmtls differs: data.drain: 5 → 1800"));
    }

    #[test]
    fn what_whoever_checks_may_not_compare_is_one_warning() {
        let refused = || Err(of_status(403, "services is forbidden: User \"a\" cannot patch"));
        let found = compared(vec![
            ("Service a".to_owned(), refused()),
            ("Role b".to_owned(), refused()),
            ("Role c".to_owned(), Ok(Outcome::Unchanged)),
        ]);
        let [one] = &found[..] else { panic!("{found:?}") };
        assert_eq!(one.state, State::Warning);
        assert!(
            one.message.starts_with("2 objects cannot be compared: who checks may not patch them"),
            "{}",
            one.message
        );
    }
}
