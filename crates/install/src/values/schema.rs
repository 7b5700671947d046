//! The form of each key as a JSON schema, by which Helm refuses what `--set` of this program refuses (`values.schema.json`).
//!
//! It is as strict as a pattern can be: whether a range of addresses is one, only this program and the product's processes say.

use serde_json::{Map, Value, json};

use super::{Form, Key, insert};

/// The schema of the chart's values: its keys and no others, but for those that Helm gives to charts within charts.
pub(crate) fn schema() -> Value {
    let mut root = Map::new();
    for key in Key::ALL {
        let parts: Vec<_> = key.as_str().split('.').collect();
        insert(&mut root, &parts, of(*key));
    }
    let mut whole = object(root);
    whole["$schema"] = json!("http://json-schema.org/draft-07/schema#");
    whole["$comment"] = json!("Made by `justmtls render`, from the same source as `justmtls install`.");
    whole["properties"]["global"] = json!({ "type": "object" });
    whole
}

/// An object of these properties alone. A property that is none of a key's is an object within.
fn object(properties: Map<String, Value>) -> Value {
    let is_key = |it: &Value| it.get("description").is_some();
    let each = properties.into_iter().map(|(name, it)| match it {
        Value::Object(inner) if !is_key(&Value::Object(inner.clone())) => (name, object(inner)),
        it => (name, it),
    });
    json!({ "type": "object", "additionalProperties": false, "properties": each.collect::<Map<_, _>>() })
}

fn of(key: Key) -> Value {
    // The decimals of `100m`, `1.5` and `64Mi`, of which 0 is none.
    const QUANTITY: &str = r"^(0*[1-9][0-9]*(\.[0-9]+)?|0+\.0*[1-9][0-9]*)(m|k|M|G|Ki|Mi|Gi)?$";
    let text = |pattern: &str| json!({ "type": "string", "pattern": pattern });
    let mut schema = match key.form() {
        Form::Image => text("^[A-Za-z0-9][A-Za-z0-9._/:@-]{0,511}$"),
        Form::Word(words) if words.contains(&"true") => json!({ "type": "boolean" }),
        Form::Word(words) => json!({ "enum": words }),
        Form::TrustDomain => text("^[a-z0-9._-]{1,255}$"),
        Form::Ranges => text(r"^( *([0-9a-fA-F:.]+/[0-9]{1,3})? *(,|$))*$"),
        Form::Addresses => text(r"^( *([0-9a-fA-F:.]+(/[0-9]{1,3})?)? *(,|$))*$"),
        Form::Ports => text(r"^( *(0*[1-9][0-9]{0,4})? *(,|$))*$"),
        Form::Number(from, to) => json!({ "type": "integer", "minimum": from, "maximum": to }),
        Form::Time(..) => text("^[0-9]+[smhd]$"),
        Form::Path => text("^/[A-Za-z0-9._/-]{0,254}[A-Za-z0-9._-]$"),
        Form::Namespaces => text("^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(,[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*$"),
        // Helm makes numbers of what looks like one.
        Form::Quantity => json!({ "type": ["string", "number"], "exclusiveMinimum": 0, "pattern": QUANTITY }),
    };
    schema["description"] = json!(key.about());
    schema
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_has_its_form_and_nothing_else_is_allowed() {
        let schema = schema();
        for key in Key::ALL {
            let path = format!("/properties/{}", key.as_str().replace('.', "/properties/"));
            let of_key = schema.pointer(&path).unwrap_or_else(|| panic!("{}", key.as_str()));
            assert_eq!(of_key["description"], key.about());
            let is = |kind: &str| {
                of_key["type"] == kind || of_key["type"].as_array().is_some_and(|all| all.contains(&json!(kind)))
            };
            let default = key.typed(key.default_value());
            assert!(
                (default.is_u64() && is("integer"))
                    || (default.is_boolean() && is("boolean"))
                    || (default.is_string() && (is("string") || of_key["enum"].is_array())),
                "{}: {of_key}",
                key.as_str()
            );
        }
        for object in ["", "/properties/cni", "/properties/cri", "/properties/resources/properties/proxy"] {
            assert_eq!(schema.pointer(&format!("{object}/additionalProperties")), Some(&json!(false)), "{object}");
        }
    }
}
