//! Where the leaves of objects come from: values, or, for the chart, expressions that Helm evaluates to the same.

use serde_json::{Value, json};

use crate::values::{Key, Values};

/// What leaves are made of.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Source<'a> {
    /// The values themselves.
    Values(&'a Values),
    /// Marks, for which [`Expression::in_place_of_marks`] puts expressions.
    Chart,
}

/// A leaf that depends on a key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Expression {
    /// The value.
    Plain(Key),
    /// The value as text, behind other text.
    After(&'static str, Key),
    /// A number and so many more.
    Plus(Key, u64),
    /// The folder of a path.
    Folder(Key),
    /// The last part of a path, behind other text.
    File(&'static str, Key),
    /// All values as one text, see [`Values::record`].
    Record,
}

impl Source<'_> {
    /// The leaf that an expression gives.
    pub(crate) fn leaf(&self, expression: Expression) -> Value {
        match self {
            Self::Values(values) => expression.value(values),
            Self::Chart => Value::String(expression.mark()),
        }
    }

    /// The value of a key.
    pub(crate) fn plain(&self, key: Key) -> Value {
        self.leaf(Expression::Plain(key))
    }

    /// The value of a key as text, behind other text.
    pub(crate) fn after(&self, before: &'static str, key: Key) -> Value {
        self.leaf(Expression::After(before, key))
    }
}

impl Expression {
    fn value(self, values: &Values) -> Value {
        match self {
            Self::Plain(key) => key.typed(values.get(key)),
            Self::After(before, key) => json!(format!("{before}{}", values.get(key))),
            Self::Plus(key, more) => json!(values.get(key).parse::<u64>().unwrap_or(0) + more),
            Self::Folder(key) => json!(folder(values.get(key))),
            Self::File(before, key) => {
                let path = values.get(key);
                json!(format!("{before}{}", path.rsplit_once('/').map_or(path, |(_, file)| file)))
            }
            Self::Record => json!(values.record()),
        }
    }

    /// What stands in for it until all is text: a plain scalar of YAML that is nothing else, and short, as long ones are quoted.
    fn mark(self) -> String {
        match USED.iter().position(|used| *used == self) {
            Some(number) => format!("helm-{number}-end"),
            None => "helm-unknown-end".to_owned(),
        }
    }

    /// In Helm's language. Everything ends as JSON, which is YAML whatever is in it.
    fn helm(self) -> String {
        let of = |key: Key| format!(".Values.{}", key.as_str());
        match self {
            Self::Plain(key) if key.is_number() => format!("{{{{ {} | int64 }}}}", of(key)),
            Self::Plain(key) => format!("{{{{ {} | toJson }}}}", of(key)),
            Self::After(before, key) if key.is_number() => {
                format!("{{{{ printf \"{before}%d\" (int64 {}) | toJson }}}}", of(key))
            }
            Self::After(before, key) => format!("{{{{ printf \"{before}%s\" {} | toJson }}}}", of(key)),
            Self::Plus(key, more) => format!("{{{{ add {} {more} }}}}", of(key)),
            // Named one by one: Helm puts values of its own beside ours.
            Self::Record => {
                let mut roots: Vec<_> = Key::ALL.iter().filter_map(|key| key.as_str().split('.').next()).collect();
                roots.dedup();
                let roots: Vec<_> = roots.into_iter().map(|root| format!("\"{root}\"")).collect();
                format!("{{{{ pick .Values {} | toJson | toJson }}}}", roots.join(" "))
            }
            Self::Folder(key) => format!("{{{{ dir {} | toJson }}}}", of(key)),
            Self::File(before, key) => format!("{{{{ printf \"{before}%s\" (base {}) | toJson }}}}", of(key)),
        }
    }

    /// Puts expressions in the place of marks.
    pub(crate) fn in_place_of_marks(text: &str) -> String {
        USED.iter().fold(text.to_owned(), |text, expression| text.replace(&expression.mark(), &expression.helm()))
    }
}

/// The folder of an absolute path without `..`, in the spelling that Helm's `dir` gives it: `/` for what is in the root, and no
/// part that says nothing.
fn folder(path: &str) -> String {
    let above = path.rsplit_once('/').map_or("", |(above, _)| above);
    let parts: Vec<_> = above.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    format!("/{}", parts.join("/"))
}

/// Every expression that objects use; a mark of another one would be left over, which a test sees.
pub(crate) const USED: &[Expression] = {
    use Expression::{After, File, Folder, Plain, Plus, Record};
    &[
        Plain(Key::Image),
        Plain(Key::ImagePullPolicy),
        Plain(Key::TrustDomain),
        Plain(Key::InsideRanges),
        Plain(Key::MixedRanges),
        Plain(Key::ServiceRanges),
        Plain(Key::ExcludedPorts),
        Plain(Key::ApiServerAddresses),
        Plain(Key::ViewLifetime),
        After("", Key::WholeMeshUpTo),
        After("", Key::Drain),
        Plain(Key::Replicas),
        Plain(Key::CniBinDir),
        Plain(Key::CniConfDir),
        Plain(Key::ControlCpu),
        Plain(Key::ControlMemory),
        Plain(Key::AgentCpu),
        Plain(Key::AgentMemory),
        Plain(Key::ProxyCpu),
        Plain(Key::ProxyMemory),
        After("--leaf-validity=", Key::LeafValidity),
        After("--drain=", Key::Drain),
        After("--cni-exempt=", Key::CniExempt),
        After("justmtls.dev:workload:", Key::TrustDomain),
        Plus(Key::Drain, 30),
        Folder(Key::CriSocket),
        File("--cri-socket=/host/run-cri/", Key::CriSocket),
        Record,
    ]
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_and_values_say_the_same() {
        let mut values = Values::default();
        values.set(Key::Drain, "60").unwrap();
        values.set(Key::CriSocket, "/run/x/y.sock").unwrap();
        let source = Source::Values(&values);
        let cases = [
            (Expression::Plain(Key::Replicas), json!(2), "{{ .Values.replicas | int64 }}"),
            (
                Expression::After("--drain=", Key::Drain),
                json!("--drain=60"),
                "{{ printf \"--drain=%d\" (int64 .Values.drain) | toJson }}",
            ),
            (Expression::Plus(Key::Drain, 30), json!(90), "{{ add .Values.drain 30 }}"),
            (Expression::Folder(Key::CriSocket), json!("/run/x"), "{{ dir .Values.cri.socket | toJson }}"),
            (
                Expression::File("--cri-socket=/host/run-cri/", Key::CriSocket),
                json!("--cri-socket=/host/run-cri/y.sock"),
                "{{ printf \"--cri-socket=/host/run-cri/%s\" (base .Values.cri.socket) | toJson }}",
            ),
            (Expression::Plain(Key::CniBinDir), json!("/opt/cni/bin"), "{{ .Values.cni.binDir | toJson }}"),
        ];
        for (expression, value, helm) in cases {
            assert_eq!(source.leaf(expression), value);
            let mark = Source::Chart.leaf(expression);
            assert_eq!(Expression::in_place_of_marks(mark.as_str().unwrap()), helm);
        }
    }

    #[test]
    fn a_folder_is_spelled_as_helm_spells_it() {
        for (path, wanted) in [("/run/x/y.sock", "/run/x"), ("/y.sock", "/"), ("/run/.//x/y.sock", "/run/x")] {
            assert_eq!(folder(path), wanted);
        }
    }
}
