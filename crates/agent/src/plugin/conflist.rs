//! Our entry in the node's CNI chain, as a pure function: a conflist of our own that holds the primary's chain, with the
//! plugin at its end. Runtimes take the file that sorts first, so the primary may rewrite its own as it likes.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::NAME;

/// The name of our file: it sorts before those of the primaries that there are.
pub(crate) const FILE: &str = "00-justmtls.conflist";
/// The largest configuration that is taken in, in bytes.
pub(crate) const LARGEST: usize = 1024 * 1024;

/// What runtimes take for a configuration (libcni).
const ENDINGS: [&str; 3] = [".conf", ".conflist", ".json"];
/// Before 0.3.1 there is no chain.
const TOO_OLD: [&str; 5] = ["", "0.1.0", "0.2.0", "0.3.0", "0.0.0"];

/// What our entry says to the plugin.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// The agent's socket.
    pub(crate) socket: std::path::PathBuf,
    /// Namespaces whose pods start without the agent.
    pub(crate) exempt: Vec<String>,
}

/// The primary's file among those of a folder: what a runtime would take if ours were not there.
pub(crate) fn primary(names: impl IntoIterator<Item = String>) -> Option<String> {
    let counts = |name: &String| name != FILE && ENDINGS.iter().any(|ending| name.ends_with(ending));
    names.into_iter().filter(counts).min()
}

/// Our conflist for a primary's file.
///
/// # Errors
/// The file is none that a chain could be made of; one sentence.
pub(crate) fn embed(name: &str, text: &[u8], entry: &Entry) -> Result<Vec<u8>, String> {
    if name < FILE {
        return Err(format!(
            "{name} sorts before {FILE}, so runtimes would take it and not ours; give it a name after that"
        ));
    }
    let mut list = list(name, text)?;
    let version = list.get("cniVersion").and_then(Value::as_str).unwrap_or_default();
    if TOO_OLD.contains(&version) {
        return Err(format!("{name} says cniVersion {version:?}; a chain needs 0.3.1 or later"));
    }
    let Some(Value::Array(plugins)) = list.get_mut("plugins") else {
        return Err(format!("{name} has no list of plugins"));
    };
    plugins.retain(|plugin| plugin.get("type").and_then(Value::as_str) != Some(NAME));
    if plugins.is_empty() {
        return Err(format!("{name} has no plugin that makes a network"));
    }
    plugins.push(entry.to_json());
    let mut text = serde_json::to_vec_pretty(&list).map_err(|error| format!("{name}: {error}"))?;
    text.push(b'\n');
    Ok(text)
}

/// The plugins that a primary's file names, but ours.
///
/// # Errors
/// As for [`embed`].
pub(crate) fn plugins(name: &str, text: &[u8]) -> Result<Vec<String>, String> {
    let list = list(name, text)?;
    let all = list.get("plugins").and_then(Value::as_array).into_iter().flatten();
    let names = all.filter_map(|plugin| plugin.get("type")?.as_str()).filter(|plugin| *plugin != NAME);
    Ok(names.map(ToOwned::to_owned).collect())
}

/// The list that a file is, or stands for.
fn list(name: &str, text: &[u8]) -> Result<Map<String, Value>, String> {
    if text.len() > LARGEST {
        return Err(format!("{name} has {} bytes, and more than {LARGEST} are no CNI configuration", text.len()));
    }
    let parsed: Value = serde_json::from_slice(text).map_err(|error| format!("{name} is not JSON: {error}"))?;
    let Value::Object(mut primary) = parsed else { return Err(format!("{name} is JSON, and no object")) };
    if name.ends_with(".conflist") { Ok(primary) } else { list_of_one(name, &mut primary) }
}

/// A file with one plugin is a list with that one: the runtime makes the same of it.
fn list_of_one(name: &str, plugin: &mut Map<String, Value>) -> Result<Map<String, Value>, String> {
    if plugin.get("type").and_then(Value::as_str).is_none_or(str::is_empty) {
        return Err(format!("{name} names no plugin (type)"));
    }
    let mut list = Map::new();
    for key in ["cniVersion", "name"] {
        if let Some(value) = plugin.get(key) {
            list.insert(key.into(), value.clone());
        }
    }
    list.insert("plugins".into(), Value::Array(vec![Value::Object(std::mem::take(plugin))]));
    Ok(list)
}

impl Entry {
    fn to_json(&self) -> Value {
        let socket: &Path = &self.socket;
        json!({ "type": NAME, "socket": socket.to_string_lossy(), "exempt": self.exempt })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry() -> Entry {
        Entry { socket: "/run/justmtls/cni.sock".into(), exempt: vec!["kube-system".into()] }
    }

    fn embedded(name: &str, primary: &Value) -> Value {
        serde_json::from_slice(&embed(name, primary.to_string().as_bytes(), &entry()).unwrap()).unwrap()
    }

    #[test]
    fn the_primary_is_the_first_that_a_runtime_would_take_and_is_not_ours() {
        let names = ["README", "99-loopback.conf", "10-flannel.conflist", FILE, "05-x.conflist.bak", ".00-new.tmp"];
        assert_eq!(primary(names.map(String::from)), Some("10-flannel.conflist".into()));
        assert_eq!(primary([FILE.to_owned(), "notes.txt".into()]), None);
    }

    #[test]
    fn one_plugin_becomes_a_list_and_keeps_what_it_says() {
        let bridge =
            json!({ "cniVersion": "0.4.0", "name": "net", "type": "bridge", "capabilities": { "portMappings": true } });
        let list = embedded("10-bridge.conf", &bridge);
        assert_eq!(
            (&list["cniVersion"], &list["name"], &list["plugins"][0]),
            (&json!("0.4.0"), &json!("net"), &bridge)
        );
        assert_eq!(
            list["plugins"][1],
            json!({ "type": "justmtls", "socket": "/run/justmtls/cni.sock", "exempt": ["kube-system"] })
        );
    }

    #[test]
    fn what_no_chain_can_be_made_of_is_refused_by_name() {
        let one =
            |version: &str| json!({ "cniVersion": version, "name": "n", "plugins": [{ "type": "ptp" }] }).to_string();
        for (name, text, because) in [
            ("10-a.conflist", "{".to_owned(), "is not JSON"),
            ("10-a.conflist", "[]".to_owned(), "no object"),
            ("10-a.conflist", r#"{"cniVersion":"1.0.0"}"#.to_owned(), "no list of plugins"),
            (
                "10-a.conflist",
                r#"{"cniVersion":"1.0.0","plugins":[{"type":"justmtls"}]}"#.to_owned(),
                "makes a network",
            ),
            ("10-a.conflist", one("0.2.0"), "needs 0.3.1"),
            ("10-a.conflist", r#"{"name":"n","plugins":[{"type":"ptp"}]}"#.to_owned(), "needs 0.3.1"),
            ("10-a.conf", r#"{"cniVersion":"1.0.0","name":"n"}"#.to_owned(), "names no plugin"),
            ("00-a.conflist", one("1.0.0"), "sorts before"),
            ("10-a.conflist", " ".repeat(LARGEST + 1), "bytes"),
        ] {
            let sentence = embed(name, text.as_bytes(), &entry()).unwrap_err();
            assert!(sentence.contains(because) && sentence.contains(name), "{sentence}");
        }
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "\\PC{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::Array),
                prop::collection::btree_map("[a-zA-Z.]{1,8}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    fn plugin() -> impl Strategy<Value = Value> {
        ("[a-z-]{1,8}", prop::collection::btree_map("[a-zA-Z]{1,8}", value(), 0..4)).prop_map(|(kind, fields)| {
            let mut fields: Map<String, Value> = fields.into_iter().collect();
            fields.insert("type".into(), format!("x{kind}").into());
            Value::Object(fields)
        })
    }

    proptest! {
        #[test]
        fn whatever_the_primary_says_stays_and_we_are_last_and_once(
            extra in prop::collection::btree_map("[a-z]{1,6}Z", value(), 0..4),
            plugins in prop::collection::vec(plugin(), 1..5),
            at in prop::option::of(0_usize..5),
        ) {
            let mut list: Map<String, Value> = extra.into_iter().collect();
            list.insert("cniVersion".into(), "1.0.0".into());
            list.insert("name".into(), "net".into());
            list.insert("disableCheck".into(), true.into());
            let mut chain = plugins.clone();
            if let Some(at) = at {
                chain.insert(at.min(plugins.len()), json!({ "type": "justmtls", "socket": "/old" }));
            }
            list.insert("plugins".into(), chain.into());
            let mut ours = embedded("10-net.conflist", &Value::Object(list.clone()));
            let Some(Value::Array(mut all)) = ours.as_object_mut().unwrap().remove("plugins") else { panic!("{ours}") };
            prop_assert_eq!(all.pop(), Some(entry().to_json()));
            prop_assert_eq!(all, plugins);
            list.remove("plugins");
            prop_assert_eq!(ours, Value::Object(list));
        }

        #[test]
        fn no_bytes_make_it_panic(name in "[0-9a-z]{1,4}\\.(conf|conflist|json)", text in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = embed(&name, &text, &entry());
        }
    }
}
