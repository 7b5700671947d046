//! The form of each key as a JSON schema, by which Helm refuses what `--set` of this program refuses (`values.schema.json`).
//!
//! A pattern says all of a form but whether an address is one: that say this program and the product's processes.

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
    whole["properties"]["enabled"] = json!({ "type": "boolean" });
    whole
}

/// An object of these properties and no others. Each has a default, so that one is missing only where somebody took it away, by
/// `null`. A property that is none of a key's is an object within.
fn object(properties: Map<String, Value>) -> Value {
    let names: Vec<_> = properties.keys().cloned().collect();
    let each = properties.into_iter().map(|(name, it)| match it {
        Value::Object(inner) if !inner.contains_key("description") => (name, object(inner)),
        it => (name, it),
    });
    let properties: Map<_, _> = each.collect();
    json!({ "type": "object", "additionalProperties": false, "required": names, "properties": properties })
}

fn of(key: Key) -> Value {
    let mut schema = match key.form() {
        Form::Word(words) if words.contains(&"true") => json!({ "type": "boolean" }),
        Form::Word(words) => json!({ "enum": words }),
        Form::Number(from, to) => json!({ "type": "integer", "minimum": from, "maximum": to }),
        // Helm makes a number of what looks like one.
        Form::Quantity => {
            json!({ "type": ["string", "number"], "exclusiveMinimum": 0, "pattern": pattern(key.form()) })
        }
        Form::Path => json!({ "type": "string", "pattern": pattern(key.form()), "not": { "pattern": UPWARDS } }),
        form => json!({ "type": "string", "pattern": pattern(form) }),
    };
    schema["description"] = json!(key.about());
    schema
}

/// A part of a path that leads out of it.
const UPWARDS: &str = r"(^|/)\.\.(/|$)";

/// Of the forms that are texts.
fn pattern(form: Form) -> String {
    const ADDRESS: &str = "[0-9a-fA-F:.]+";
    const NAMESPACE: &str = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?";
    let length = format!("/({})", whole(0, 128));
    match form {
        Form::Image => "^[A-Za-z0-9][A-Za-z0-9._/:@-]{0,511}$".to_owned(),
        Form::TrustDomain => "^[a-z0-9._-]{1,255}$".to_owned(),
        Form::Ranges => list(&format!("{ADDRESS}{length}")),
        Form::Addresses => list(&format!("{ADDRESS}({length})?")),
        Form::Ports => list(&format!("0*({})", whole(1, 65_535))),
        Form::Time(from, to) => {
            let units = [("s", 1), ("m", 60), ("h", 3600), ("d", 86_400)];
            let of_unit = |(unit, seconds): (&str, u64)| {
                let numbers = whole(from.div_ceil(seconds), to / seconds);
                (!numbers.is_empty()).then(|| format!("0*({numbers}){unit}"))
            };
            format!("^({})$", units.into_iter().filter_map(of_unit).collect::<Vec<_>>().join("|"))
        }
        Form::Path => "^/[A-Za-z0-9._/-]{0,254}[A-Za-z0-9._-]$".to_owned(),
        Form::Namespaces => format!("^{NAMESPACE}(,{NAMESPACE})*$"),
        Form::Quantity => r"^(0*[1-9][0-9]*(\.[0-9]+)?|0+\.0*[1-9][0-9]*)(m|k|M|G|Ki|Mi|Gi)?$".to_owned(),
        Form::Word(words) => format!("^({})$", words.join("|")),
        Form::Number(from, to) => format!("^0*({})$", whole(from, to)),
    }
}

/// Entries with commas between them; an empty one is passed over.
fn list(entry: &str) -> String {
    format!(r"^\s*({entry})?\s*(,\s*({entry})?\s*)*$")
}

/// The whole numbers from one to another, without zeros before them; empty where there are none.
fn whole(from: u64, to: u64) -> String {
    if from > to {
        return String::new();
    }
    let digits = from.to_string().len() as u32;
    // First what has as many digits as the smallest.
    let last = 10_u64.pow(digits) - 1;
    if last < to {
        return format!("{}|{}", whole(from, last), whole(last + 1, to));
    }
    let (from, to) = (from.to_string(), to.to_string());
    same_length(&from, &to).join("|")
}

/// The same for two numbers of one length.
fn same_length(from: &str, to: &str) -> Vec<String> {
    let any = |count: usize| match count {
        0 => String::new(),
        count => format!("[0-9]{{{count}}}"),
    };
    let one = |from: u8, to: u8| match from == to {
        true => char::from(from).to_string(),
        false => format!("[{}-{}]", char::from(from), char::from(to)),
    };
    let (Some((low, low_rest)), Some((high, high_rest))) = (from.split_at_checked(1), to.split_at_checked(1)) else {
        return vec![String::new()];
    };
    let (low, high) = (low.as_bytes()[0], high.as_bytes()[0]);
    let (nought, nines) = ("0".repeat(low_rest.len()), "9".repeat(low_rest.len()));
    if low_rest == nought && high_rest == nines {
        return vec![format!("{}{}", one(low, high), any(low_rest.len()))];
    }
    let with = |digit: u8, rest: Vec<String>| rest.into_iter().map(move |rest| format!("{}{rest}", char::from(digit)));
    if low == high {
        return with(low, same_length(low_rest, high_rest)).collect();
    }
    let mut all: Vec<String> = Vec::new();
    let (mut first, mut last) = (low, high);
    if low_rest != nought {
        all.extend(with(low, same_length(low_rest, &nines)));
        first += 1;
    }
    let mut end = Vec::new();
    if high_rest != nines {
        end.extend(with(high, same_length(&nought, high_rest)));
        last -= 1;
    }
    if first <= last {
        all.push(format!("{}{}", one(first, last), any(low_rest.len())));
    }
    all.extend(end);
    all
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use regex::Regex;

    use super::*;
    use crate::values::check;

    #[test]
    fn each_key_has_its_form_and_nothing_else_is_allowed() {
        let schema = schema();
        for key in Key::ALL {
            let path = format!("/properties/{}", key.as_str().replace('.', "/properties/"));
            let of_key = schema.pointer(&path).unwrap_or_else(|| panic!("{}", key.as_str()));
            assert_eq!(of_key["description"], key.about());
            let types = of_key["type"].as_array().cloned().unwrap_or_else(|| vec![of_key["type"].clone()]);
            let default = key.typed(key.default_value());
            let kind = if default.is_u64() {
                "integer"
            } else if default.is_boolean() {
                "boolean"
            } else {
                "string"
            };
            assert!(types.contains(&json!(kind)) || of_key["enum"].is_array(), "{}: {of_key}", key.as_str());
        }
        for object in ["", "/properties/cni", "/properties/cri", "/properties/resources/properties/proxy"] {
            assert_eq!(schema.pointer(&format!("{object}/additionalProperties")), Some(&json!(false)), "{object}");
        }
        assert_eq!(schema["properties"]["cni"]["required"], json!(["binDir", "confDir", "exempt"]));
    }

    #[test]
    fn numbers_from_one_to_another_are_those_and_no_others() {
        for (from, to) in [(0, 128), (1, 65_535), (1, 300), (60, 2_592_000), (7, 7), (99, 100), (190, 210), (5, 4)] {
            let pattern = Regex::new(&format!("^({})$", whole(from, to))).unwrap();
            let edges = [from, to].into_iter().flat_map(|edge| edge.saturating_sub(1100)..edge + 1100);
            for number in edges {
                let is_one = from <= to && (from..=to).contains(&number);
                assert_eq!(pattern.is_match(&number.to_string()), is_one, "{number} of {from}..{to}");
            }
        }
    }

    /// Whether the schema takes a text.
    fn takes(form: Form, text: &str) -> bool {
        let upwards = matches!(form, Form::Path) && Regex::new(UPWARDS).unwrap().is_match(text);
        Regex::new(&pattern(form)).unwrap().is_match(text) && !upwards
    }

    proptest! {
        #[test]
        fn the_schema_takes_what_set_takes_and_no_more_but_for_addresses(
            text in "[0-9]{1,8}[smhd]?|[0-9]{1,3}(\\.[0-9]{1,3})?(m|Ki|Mi|e3)?|(/|\\.|a|-){0,9}|[a-z0-9,-]{0,12}|[A-Za-z0-9._/:@, -]{0,12}|[0-9.:/, \\n]{0,24}",
            key in 0..Key::ALL.len(),
        ) {
            let form = Key::ALL[key].form();
            // `--set` takes no white space around a value.
            prop_assume!(text.trim() == text);
            let (by_set, by_helm) = (check(form, &text).is_ok(), takes(form, &text));
            if matches!(form, Form::Ranges | Form::Addresses) {
                prop_assert!(by_helm || !by_set, "{form:?} {text:?}");
            } else {
                prop_assert_eq!(by_set, by_helm, "{:?} {:?}", form, text);
            }
        }
    }
}
