//! Which two nodes of a cluster the tests put their pods on.

use serde_json::Value;

const CONTROL_PLANE: &str = "node-role.kubernetes.io/control-plane";

/// Two nodes that take pods, those without taints first. The first of the two may have taints, as a control plane has: pods that
/// are put there tolerate them.
pub(super) fn chosen(nodes: &Value) -> Option<[String; 2]> {
    let mut all: Vec<_> = nodes["items"].as_array()?.iter().filter(|node| takes_pods(node)).collect();
    all.sort_by_key(|node| is_tainted(node));
    let mut two = [*all.first()?, *all.get(1)?];
    two.sort_by_key(|node| (!is_tainted(node), node["metadata"]["labels"].get(CONTROL_PLANE).is_none()));
    (!is_tainted(two[1])).then(|| two.map(|node| node["metadata"]["name"].as_str().unwrap_or_default().to_owned()))
}

/// Linux, ready, and not cordoned.
fn takes_pods(node: &Value) -> bool {
    let mut conditions = node["status"]["conditions"].as_array().into_iter().flatten();
    node["metadata"]["labels"]["kubernetes.io/os"] == "linux"
        && node["spec"]["unschedulable"] != true
        && conditions.any(|it| it["type"] == "Ready" && it["status"] == "True")
}

/// Whether ordinary pods stay away from it.
fn is_tainted(node: &Value) -> bool {
    let mut taints = node["spec"]["taints"].as_array().into_iter().flatten();
    taints.any(|taint| taint["effect"] != "PreferNoSchedule")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Of words: `control-plane`, `tainted`, `cordoned`, `away`.
    fn node(name: &str, is: &[&str]) -> Value {
        let is = |word: &str| is.contains(&word);
        let mut labels = json!({ "kubernetes.io/os": "linux" });
        if is("control-plane") {
            labels[CONTROL_PLANE] = "".into();
        }
        let taints = if is("tainted") { json!([{ "key": "some", "effect": "NoSchedule" }]) } else { Value::Null };
        let ready = if is("away") { "Unknown" } else { "True" };
        json!({
            "metadata": { "name": name, "labels": labels },
            "spec": { "taints": taints, "unschedulable": is("cordoned") },
            "status": { "conditions": [{ "type": "Ready", "status": ready }] },
        })
    }

    fn of(nodes: &[Value]) -> Option<[String; 2]> {
        chosen(&json!({ "items": nodes }))
    }

    #[test]
    fn two_nodes_are_chosen_by_what_they_take_and_the_control_plane_comes_first() {
        let two = |first: &str, worker: &str| Some([first.to_owned(), worker.to_owned()]);
        let (worker, control) = (node("b", &[]), node("a", &["control-plane"]));
        assert_eq!(of(&[worker.clone(), control]), two("a", "b"));
        let tainted = node("a", &["control-plane", "tainted"]);
        assert_eq!(of(&[worker.clone(), tainted.clone()]), two("a", "b"));
        assert_eq!(of(&[tainted.clone(), worker.clone(), node("c", &[])]), two("b", "c"), "where nobody minds");
        assert_eq!(
            of(&[worker.clone(), node("c", &["cordoned"]), node("d", &["away"]), node("e", &[])]),
            two("b", "e")
        );
        assert_eq!(of(&[node("a", &["control-plane"]), node("b", &["tainted"])]), two("b", "a"));
    }

    #[test]
    fn where_there_are_too_few_none_is_chosen() {
        let tainted = |name| node(name, &["tainted"]);
        assert_eq!(of(&[node("a", &[]), node("b", &["away"])]), None);
        assert_eq!(of(&[tainted("a"), tainted("b")]), None, "the worker's pods tolerate nothing");
        assert_eq!(of(&[]), None);
    }
}
