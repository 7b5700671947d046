//! What serde says of a value of the wrong type, in words for the person who wrote it.

use std::borrow::Cow;

use crate::problem::quoted;

/// A message and a remedy.
pub(crate) struct Explanation {
    pub(crate) message: String,
    pub(crate) remedy: Cow<'static, str>,
}

/// Explains an error of serde_json. `written` is the value as it stands in the text, where it is a scalar: YAML reads an
/// unquoted `off` as false, and whoever wrote `off` would not recognise `false`.
pub(crate) fn explain(error: &serde_json::Error, written: Option<&str>) -> Explanation {
    let text = error.to_string();
    explain_type(&text, written).or_else(|| explain_choice(&text)).or_else(|| explain_missing(&text)).unwrap_or_else(
        || match text.rsplit_once("; ") {
            Some((message, remedy)) => Explanation { message: message.to_owned(), remedy: remedy.to_owned().into() },
            None => {
                Explanation { message: quoted(&text), remedy: "write what Kubernetes documents for this field".into() }
            }
        },
    )
}

/// `invalid type: integer `5`, expected a string` and `invalid value: …`.
fn explain_type(text: &str, written: Option<&str>) -> Option<Explanation> {
    let rest = text.strip_prefix("invalid type: ").or_else(|| text.strip_prefix("invalid value: "))?;
    let (found, expected) = rest.rsplit_once(", expected ")?;
    let is_text = found.starts_with("string ");
    let found = match (found, written) {
        ("map", _) => "a mapping".to_owned(),
        ("sequence", _) => "a list".to_owned(),
        ("null", _) => "nothing (null)".to_owned(),
        (_, Some(written)) => quoted(written),
        (found, None) => quoted(found.split_once(' ').map_or(found, |(_, value)| value).trim_matches('`')),
    };
    let (wanted, remedy): (&str, Cow<'static, str>) = match expected {
        "a string" if found.starts_with("a ") || found.starts_with("nothing") => ("text", "write text there".into()),
        "a string" => ("text to YAML", format!("put it in quotes: \"{found}\"").into()),
        "i32" | "i64" | "u16" | "u32" | "u64" if is_text => ("a number", "write a whole number without quotes".into()),
        "i32" | "i64" | "u16" | "u32" | "u64" => {
            ("a number of the field's range", "write a smaller whole number".into())
        }
        "a boolean" => ("true or false", "write true or false without quotes".into()),
        "a sequence" => ("a list", "begin each item with `- `".into()),
        _ => ("a mapping with the field's own members", "write `name: value` lines below the field".into()),
    };
    Some(Explanation { message: format!("{found} is not {wanted}"), remedy })
}

/// `unknown field `x`, expected one of `a`, `b`` and `unknown variant …`.
fn explain_choice(text: &str) -> Option<Explanation> {
    let (what, rest) = if let Some(rest) = text.strip_prefix("unknown field `") {
        ("a known field", rest)
    } else {
        ("a known value", text.strip_prefix("unknown variant `")?)
    };
    let (found, expected) = rest.split_once("`, ")?;
    let expected = expected.strip_prefix("expected ").unwrap_or(expected);
    let expected = expected.strip_prefix("one of ").unwrap_or(expected).replace('`', "");
    let remedy =
        if expected == "there are no fields" { "remove it".to_owned() } else { format!("known are {expected}") };
    Some(Explanation { message: format!("{} is not {what}", quoted(found)), remedy: remedy.into() })
}

/// `missing field `x``.
fn explain_missing(text: &str) -> Option<Explanation> {
    let name = text.strip_prefix("missing field `")?.strip_suffix('`')?;
    Some(Explanation { message: format!("{name} is missing"), remedy: format!("add {name}").into() })
}
