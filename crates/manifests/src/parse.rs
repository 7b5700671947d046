//! Text to objects.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::{Value, json};

use crate::documents::{Document, documents};
use crate::explain::explain;
use crate::object::{DEFAULT_NAMESPACE, Kind, Object, ObjectKey};
use crate::path::{Path, Step};
use crate::problem::{Location, Problem, Severity, quoted};
use crate::tree::{Allowance, Content, Node, Unreadable, read};
use crate::validate::{Finding, findings};

/// Larger texts are refused unread.
pub const MAX_FILE_BYTES: usize = 4 << 20;

/// A text with more documents, members of Lists counted, is read up to this one.
pub const MAX_DOCUMENTS: usize = 10_000;

/// What a text holds.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Parsed {
    /// The label of the text.
    pub file: String,
    /// The valid objects in the order of the text, no key twice, each with the line it begins at.
    pub objects: Vec<(Object, Location)>,
    /// All that is wrong, in the order of the text.
    pub problems: Vec<Problem>,
    /// Objects that the text has, but not in a form that can be taken: they are there, only their state is not known.
    pub unreadable: Vec<ObjectKey>,
    /// Whether a part of the text is not known to be any particular object: then the absence of an object says nothing.
    pub unidentified: bool,
}

/// Reads Kubernetes objects from YAML (JSON is a part of it) with any number of documents; a `kind: List` stands for its items.
///
/// `file` is a label for messages, usually the file's name; nothing is opened. What cannot be taken becomes a problem and
/// stops nothing else. A problem of severity [`Severity::Warning`] concerns an object that is taken.
/// Bounded: [`MAX_FILE_BYTES`], [`MAX_DOCUMENTS`], nesting of 64, and a million values in all after aliases are unfolded.
pub fn parse(file: &str, text: impl AsRef<[u8]>) -> Parsed {
    let mut parsing = Parsing::new(file);
    parsing.text(text.as_ref());
    parsing.parsed
}

/// Reads one of Istio's objects as an API server has it: as [`parse`] reads a file, so that the same words mean the same from
/// both. `place` is the label for messages.
pub fn parse_policy(place: &str, kind: Kind, mut metadata: ObjectMeta, spec: &Value) -> Parsed {
    metadata.managed_fields = None;
    let text = json!({
        "apiVersion": kind.api_versions()[0],
        "kind": kind.as_str(),
        "metadata": metadata,
        "spec": spec,
    });
    parse(place, text.to_string())
}

struct Parsing {
    file: Arc<str>,
    parsed: Parsed,
    allowance: Allowance,
    /// Documents and items of Lists so far.
    count: usize,
    lines: BTreeMap<ObjectKey, usize>,
}

impl Parsing {
    fn new(file: &str) -> Parsing {
        let parsed = Parsed { file: file.to_owned(), ..Parsed::default() };
        Parsing { file: file.into(), parsed, allowance: Allowance::default(), count: 0, lines: BTreeMap::new() }
    }

    fn text(&mut self, text: &[u8]) {
        if text.len() > MAX_FILE_BYTES {
            return self.whole(
                None,
                format!("the file has {} bytes, the most is {MAX_FILE_BYTES}", text.len()),
                "split it",
            );
        }
        let text = match std::str::from_utf8(text) {
            Ok(text) => text.strip_prefix('\u{feff}').unwrap_or(text),
            Err(error) => {
                let line = 1 + text[..error.valid_up_to()].iter().filter(|byte| **byte == b'\n').count();
                return self.whole(Some(line), "the file is not UTF-8 text".to_owned(), "save it as UTF-8");
            }
        };
        for document in documents(text) {
            if !self.may_go_on(document.first_line + 1) {
                return;
            }
            match read(&document, &mut self.allowance) {
                Ok(tree) => self.document(&document, &tree),
                Err(Unreadable { line, message, remedy }) => self.whole(Some(line), message, remedy),
            }
        }
    }

    /// Counts a document or an item.
    fn may_go_on(&mut self, line: usize) -> bool {
        self.count += 1;
        if self.count == MAX_DOCUMENTS + 1 {
            self.whole(
                Some(line),
                format!("the file has more than {MAX_DOCUMENTS} objects, the rest is not read"),
                "split it",
            );
        }
        self.count <= MAX_DOCUMENTS
    }

    /// A part of the text cannot be said to be any object.
    fn whole(&mut self, line: Option<usize>, message: String, remedy: &str) {
        self.parsed.unidentified = true;
        let location = Location { file: self.file.clone(), line };
        let remedy = remedy.to_owned();
        self.parsed.problems.push(Problem {
            location,
            severity: Severity::Error,
            object: None,
            field: None,
            message,
            remedy,
        });
    }

    fn document(&mut self, document: &Document<'_>, tree: &Node) {
        if tree.text("kind") != Some("List") {
            return self.object(document, tree);
        }
        let items = match tree.get("items").map(|items| &items.content) {
            _ if tree.text("apiVersion") != Some("v1") => None,
            Some(Content::List(items)) => Some(items),
            _ => None,
        };
        let Some(items) = items else {
            let message = "a List has apiVersion v1 and a list of items".to_owned();
            return self.whole(Some(tree.line), message, "write `apiVersion: v1`, `kind: List`, `items:`");
        };
        for item in items {
            if !self.may_go_on(item.line) {
                return;
            }
            self.object(document, item);
        }
    }

    /// A document or an item of a List that should be an object.
    fn object(&mut self, document: &Document<'_>, tree: &Node) {
        let (kind, key) = match identify(document, tree) {
            Ok(identified) => identified,
            Err(refusal) => {
                self.parsed.unidentified |= refusal.could_be_known;
                return self.problem(tree, refusal.object, refusal.finding);
            }
        };
        match self.typed(document, tree, kind, &key) {
            Some(object) => self.take(tree, object),
            None => self.parsed.unreadable.push(key),
        }
    }

    fn take(&mut self, tree: &Node, object: Object) {
        let key = object.key();
        match self.lines.get(&key) {
            Some(line) => {
                let message = format!("the object is there twice, first at line {line}, which counts");
                self.problem(
                    tree,
                    Some(key.to_string()),
                    Finding::error(Path::default(), message, "remove one or rename it"),
                );
            }
            None => {
                self.lines.insert(key, tree.line);
                self.parsed.objects.push((object, Location { file: self.file.clone(), line: Some(tree.line) }));
            }
        }
    }

    /// The typed and valid object, or none and a problem.
    fn typed(&mut self, document: &Document<'_>, tree: &Node, kind: Kind, key: &ObjectKey) -> Option<Object> {
        let mut json = tree.to_json();
        if kind.is_istio()
            && let Some(map) = json.as_object_mut()
        {
            map.remove("apiVersion");
            map.remove("kind");
        }
        let mut object = match Object::from_json(kind, json.clone()) {
            Ok(object) => object,
            Err(error) => {
                let path = Path::from(error.path());
                let written = tree.find(&path).and_then(|node| node.written(document));
                let explained = explain(error.inner(), written);
                self.problem(tree, Some(key.to_string()), Finding::error(path, explained.message, explained.remedy));
                return None;
            }
        };
        let mut found = Vec::new();
        let said = object.to_json();
        if kind.is_istio() {
            // The rest of theirs is typed by us and refuses what it does not know.
            let path = Path(vec![Step::Key("metadata".to_owned())]);
            unknown_fields(&json["metadata"], &said["metadata"], path, &mut found);
        } else {
            unknown_fields(&json, &said, Path::default(), &mut found);
        }
        found.extend(findings(&object, Some(tree)));
        let refused = found.iter().any(|finding| finding.severity == Severity::Error);
        for finding in found {
            self.problem(tree, Some(key.to_string()), finding);
        }
        object.default_namespace();
        (!refused).then_some(object)
    }

    fn problem(&mut self, tree: &Node, object: Option<String>, finding: Finding) {
        let location = Location { file: self.file.clone(), line: Some(tree.line_of(&finding.path)) };
        let Finding { severity, path, message, remedy } = finding;
        self.parsed.problems.push(Problem { location, severity, object, field: path.to_field(), message, remedy });
    }
}

struct Refusal {
    /// As much of the object's key as is written.
    object: Option<String>,
    finding: Finding,
    /// Whether it may be meant as an object of a known kind.
    could_be_known: bool,
}

/// Which object a document is.
fn identify(document: &Document<'_>, tree: &Node) -> Result<(Kind, ObjectKey), Refusal> {
    let written = tree.text("kind").map(|kind| match (tree.get("metadata"), kind) {
        (Some(metadata), kind) => {
            let namespace = metadata.text("namespace").map(|namespace| format!("{namespace}/")).unwrap_or_default();
            quoted(&format!("{kind} {namespace}{}", metadata.text("name").unwrap_or_default())).trim_end().to_owned()
        }
        (None, kind) => quoted(kind),
    });
    let refuse = |key: &[&str], message: String, remedy: String, could_be_known: bool| {
        let path = Path(key.iter().map(|key| Step::Key((*key).to_owned())).collect());
        Err(Refusal { object: written.clone(), finding: Finding::error(path, message, remedy), could_be_known })
    };
    if !matches!(tree.content, Content::Map(_)) {
        return refuse(
            &[],
            "not an object".to_owned(),
            "write `apiVersion:`, `kind:` and `metadata:`".to_owned(),
            true,
        );
    }
    let Some(kind) = tree.text("kind") else {
        let kinds = Kind::ALL.iter().map(|kind| kind.as_str()).collect::<Vec<_>>().join(", ");
        return refuse(&["kind"], "is missing".to_owned(), format!("write one of {kinds}"), true);
    };
    let Some(kind) = Kind::from_name(kind) else {
        let (message, remedy) = unknown_kind(kind);
        return refuse(&["kind"], message, remedy, false);
    };
    let version = kind.api_versions()[0];
    match tree.text("apiVersion") {
        Some(written) if kind.api_versions().contains(&written) => {}
        Some(written) => {
            return refuse(
                &["apiVersion"],
                format!("{} is not a version of {kind}", quoted(written)),
                format!("write {version}"),
                true,
            );
        }
        None => return refuse(&["apiVersion"], "is missing".to_owned(), format!("write {version}"), true),
    }
    let metadata = tree.get("metadata");
    let name = match metadata.and_then(|metadata| metadata.get("name")).map(|name| (name, &name.content)) {
        Some((_, Content::String(name))) if !name.is_empty() => name,
        Some((name, Content::Bool(_) | Content::Number(_))) => {
            // YAML reads an unquoted n or 1 as something else than text.
            let written = quoted(name.written(document).unwrap_or_default());
            let message = format!("{written} is not text to YAML");
            return refuse(&["metadata", "name"], message, format!("put it in quotes: \"{written}\""), true);
        }
        _ => {
            let remedy = match metadata.and_then(|metadata| metadata.get("generateName")) {
                Some(_) => "write a name: generateName is the API server's",
                None => "write a name",
            };
            return refuse(&["metadata", "name"], "is missing".to_owned(), remedy.to_owned(), true);
        }
    };
    let namespace = metadata.and_then(|metadata| metadata.text("namespace")).unwrap_or(DEFAULT_NAMESPACE);
    let namespace = kind.is_namespaced().then(|| namespace.to_owned());
    Ok((kind, ObjectKey { kind, namespace, name: name.to_owned() }))
}

fn unknown_kind(kind: &str) -> (String, String) {
    match kind {
        "StatefulSet" | "DaemonSet" | "ReplicaSet" | "Job" | "CronJob" | "ReplicationController" => {
            (format!("a {kind} is not expanded into Pods"), "write Pods, or a Deployment".to_owned())
        }
        "Endpoints" => ("Endpoints are not read".to_owned(), "write an EndpointSlice".to_owned()),
        "List" => ("a List within a List is not read".to_owned(), "move its items up".to_owned()),
        other => {
            let kinds = Kind::ALL.iter().map(|kind| kind.as_str()).collect::<Vec<_>>().join(", ");
            (
                format!("{} is not a kind that is read here", quoted(other)),
                format!("remove it, or write one of {kinds}"),
            )
        }
    }
}

/// Fields that are written but did not become part of the object: those that the object, said again, does not say.
/// Kubernetes' types ignore what they do not know, and a typo must not be silent.
fn unknown_fields(written: &Value, said: &Value, path: Path, found: &mut Vec<Finding>) {
    match (written, said) {
        (Value::Object(written), Value::Object(said)) => {
            for (key, value) in written {
                let path = path.child(Step::Key(key.clone()));
                match said.get(key) {
                    Some(said) => unknown_fields(value, said, path, found),
                    // Absent and null are the same.
                    None if value.is_null() => {}
                    None => found.push(Finding::warning(
                        path,
                        "is not a known field and is ignored",
                        "check its spelling and indentation",
                    )),
                }
            }
        }
        (Value::Array(written), Value::Array(said)) => {
            for (index, (written, said)) in written.iter().zip(said).enumerate() {
                unknown_fields(written, said, path.child(Step::Index(index)), found);
            }
        }
        _ => {}
    }
}
