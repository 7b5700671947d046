//! What differs between an object as it is and as it would be.

use std::fmt;

use serde_json::Value;

/// A field that differs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Difference {
    /// As in `spec.template.spec.containers[agent].image`.
    pub(crate) field: String,
    from: Option<String>,
    to: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { field, from, to } = self;
        match (from, to) {
            (Some(from), Some(to)) => write!(f, "{field}: {from} → {to}"),
            (None, Some(to)) => write!(f, "{field}: none → {to}"),
            (Some(from), None) => write!(f, "{field}: {from} → none"),
            (None, None) => f.write_str(field),
        }
    }
}

/// What the API server writes by itself.
const BOOKKEEPING: &[&str] =
    &["managedFields", "resourceVersion", "generation", "uid", "creationTimestamp", "selfLink"];

/// What controllers write by themselves.
const COUNTERS: &[&str] = &["deprecated.daemonset.template.generation", "deployment.kubernetes.io/revision"];

/// The longest value that is shown.
const LONGEST: usize = 80;

/// What differs, but for the API server's own bookkeeping and the status.
pub(crate) fn differences(is: &Value, wanted: &Value) -> Vec<Difference> {
    let mut found = Vec::new();
    compare(&cleaned(is), &cleaned(wanted), "", &mut found);
    found
}

fn cleaned(object: &Value) -> Value {
    let mut object = object.clone();
    if let Value::Object(map) = &mut object {
        map.remove("status");
        if let Some(Value::Object(metadata)) = map.get_mut("metadata") {
            metadata.retain(|name, _| !BOOKKEEPING.contains(&name.as_str()));
            if let Some(Value::Object(annotations)) = metadata.get_mut("annotations") {
                annotations.retain(|name, _| !COUNTERS.contains(&name.as_str()));
            }
            // No annotation and none that counts are the same.
            if metadata.get("annotations").and_then(Value::as_object).is_some_and(serde_json::Map::is_empty) {
                metadata.remove("annotations");
            }
        }
    }
    object
}

fn compare(is: &Value, wanted: &Value, at: &str, found: &mut Vec<Difference>) {
    match (is, wanted) {
        (Value::Object(is), Value::Object(wanted)) => {
            let names: std::collections::BTreeSet<_> = is.keys().chain(wanted.keys()).collect();
            for name in names {
                let field = if at.is_empty() { name.clone() } else { format!("{at}.{name}") };
                inner(is.get(name), wanted.get(name), field, found);
            }
        }
        (Value::Array(is), Value::Array(wanted)) => match (named(is), named(wanted)) {
            (Some(is_named), Some(wanted_named)) => {
                let names: std::collections::BTreeSet<_> =
                    is_named.iter().chain(&wanted_named).map(|(name, _)| *name).collect();
                let one = |all: &[(&str, &'_ Value)], name: &str| {
                    all.iter().find(|(other, _)| *other == name).map(|(_, value)| (*value).clone())
                };
                for name in names {
                    inner(
                        one(&is_named, name).as_ref(),
                        one(&wanted_named, name).as_ref(),
                        format!("{at}[{name}]"),
                        found,
                    );
                }
            }
            _ => {
                for number in 0..is.len().max(wanted.len()) {
                    inner(is.get(number), wanted.get(number), format!("{at}[{number}]"), found);
                }
            }
        },
        _ if is != wanted => inner(Some(is), Some(wanted), at.to_owned(), found),
        _ => {}
    }
}

fn inner(is: Option<&Value>, wanted: Option<&Value>, field: String, found: &mut Vec<Difference>) {
    match (is, wanted) {
        (Some(is), Some(wanted)) if is == wanted => {}
        (Some(is), Some(wanted)) if is.is_object() && wanted.is_object() || is.is_array() && wanted.is_array() => {
            compare(is, wanted, &field, found);
        }
        _ => {
            let (from, to) = (is.map(text), wanted.map(text));
            let skipped = common(from.as_deref().unwrap_or_default(), to.as_deref().unwrap_or_default());
            let shown = |text: String| shown(&text, skipped);
            found.push(Difference { field, from: from.map(shown), to: to.map(shown) });
        }
    }
}

/// Items that all have a name of their own are compared by it.
fn named(items: &[Value]) -> Option<Vec<(&str, &Value)>> {
    let named: Option<Vec<_>> = items.iter().map(|item| Some((item.get("name")?.as_str()?, item))).collect();
    let named = named.filter(|named| !named.is_empty())?;
    let different: std::collections::BTreeSet<_> = named.iter().map(|(name, _)| name).collect();
    (different.len() == named.len()).then_some(named)
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// How much of two long texts need not be shown, because it is the same.
fn common(from: &str, to: &str) -> usize {
    /// What is shown before the place where they part.
    const CONTEXT: usize = 16;
    if from.chars().count() <= LONGEST && to.chars().count() <= LONGEST {
        return 0;
    }
    let same = from.chars().zip(to.chars()).take_while(|(from, to)| from == to).count();
    same.saturating_sub(CONTEXT)
}

fn shown(text: &str, skipped: usize) -> String {
    let part: String = text.chars().skip(skipped).take(LONGEST).collect();
    let before = if skipped > 0 { "…" } else { "" };
    let after = if text.chars().count() > skipped + LONGEST { "…" } else { "" };
    format!("{before}{part}{after}")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_are_named_as_people_name_them() {
        let is = json!({
            "metadata": { "name": "a", "resourceVersion": "1", "labels": { "a": "b" } },
            "spec": { "containers": [{ "name": "agent", "image": "x:1" }, { "name": "proxy", "image": "x:1" }], "args": ["1", "2"] },
            "status": { "ready": 1 },
        });
        let wanted = json!({
            "metadata": { "name": "a", "resourceVersion": "2", "labels": {} },
            "spec": { "containers": [{ "name": "proxy", "image": "x:1" }, { "name": "agent", "image": "x:2" }], "args": ["1", "3", "4"] },
            "status": { "ready": 2 },
        });
        let found: Vec<_> = differences(&is, &wanted).iter().map(ToString::to_string).collect();
        let expected = [
            "metadata.labels.a: b → none",
            "spec.args[1]: 2 → 3",
            "spec.args[2]: none → 4",
            "spec.containers[agent].image: x:1 → x:2",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn of_long_values_the_place_is_shown_where_they_part() {
        let long = |word: &str| json!({ "data": { "a": format!("{}{word}{}", "x".repeat(200), "y".repeat(200)) } });
        let [one] = &differences(&long("60"), &long("70"))[..] else { panic!("one") };
        let text = one.to_string();
        assert!(
            text.starts_with("data.a: …xxxxxxxxxxxxxxxx60yyy") && text.contains("→ …xxxxxxxxxxxxxxxx70yyy"),
            "{text}"
        );
        assert!(text.chars().count() < 3 * LONGEST);
    }

    #[test]
    fn what_controllers_count_is_no_difference() {
        let with = |metadata: Value| json!({ "metadata": metadata });
        let counted = with(json!({ "annotations": { "deployment.kubernetes.io/revision": "2" }, "generation": 4 }));
        assert_eq!(differences(&counted, &with(json!({}))), []);
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<u8>().prop_map(Value::from),
            "[a-c]{0,2}".prop_map(Value::from)
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("(name|[a-c])", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn an_object_differs_from_itself_in_nothing_and_from_another_in_something(a in json_value(), b in json_value()) {
            let (a, b) = (json!({ "spec": a }), json!({ "spec": b }));
            prop_assert!(differences(&a, &a).is_empty());
            let same = differences(&a, &b).is_empty();
            // Items with names are the same in any order.
            prop_assert_eq!(same, differences(&b, &a).is_empty());
            if a == b { prop_assert!(same); }
        }
    }
}
