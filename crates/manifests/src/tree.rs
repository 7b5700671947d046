//! A document as a tree that still knows its lines.
//!
//! Typed objects are made from it, and problems look up in it where a field was written.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fmt;
use std::rc::Rc;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use serde_saphyr::Spanned;

use crate::documents::Document;
use crate::path::{Path, Step};
use crate::problem::quoted;

/// More than this deep no Kubernetes object is; deeper nesting is refused before it costs stack.
const MAX_DEPTH: usize = 64;

/// A value and where it stands.
pub(crate) struct Node {
    /// Line in the file, from 1; 0 where it is not known.
    pub(crate) line: usize,
    /// The bytes of a scalar in its document.
    written: (usize, usize),
    pub(crate) content: Content,
}

pub(crate) enum Content {
    Null,
    Bool(bool),
    Number(Number),
    String(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// A member of a mapping.
pub(crate) struct Entry {
    /// Line of the key, from 1.
    line: usize,
    key: String,
    value: Node,
}

/// What the documents of one file may still cost together, aliases counted as often as they are used: a small text must
/// not unfold into a large tree, neither in one document nor in many.
pub(crate) struct Allowance {
    nodes: usize,
    bytes: usize,
}

impl Default for Allowance {
    fn default() -> Allowance {
        Allowance { nodes: 1_000_000, bytes: 4 * crate::parse::MAX_FILE_BYTES }
    }
}

/// Why a document could not be read at all.
pub(crate) struct Unreadable {
    /// Line in the file, from 1.
    pub(crate) line: usize,
    pub(crate) message: String,
    pub(crate) remedy: &'static str,
}

/// Reads a document.
pub(crate) fn read(document: &Document<'_>, allowance: &mut Allowance) -> Result<Node, Unreadable> {
    let spent = Rc::new(Cell::new((0, 0)));
    let report = spent.clone();
    let options = serde_saphyr::options! {
        with_snippet: false,
        emit_comments: false,
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH,
            flow_nesting_limit: MAX_DEPTH,
            max_documents: 1,
            max_nodes: allowance.nodes,
            max_events: allowance.nodes.saturating_mul(2),
            max_total_scalar_bytes: allowance.bytes,
            max_recorded_anchor_bytes: allowance.bytes,
        },
    }
    .with_budget_report(move |budget| report.set((budget.nodes, budget.total_scalar_bytes)));
    let tree = serde_saphyr::from_str_with_options::<Node>(document.text, options);
    let (nodes, bytes) = spent.get();
    allowance.nodes = allowance.nodes.saturating_sub(nodes);
    allowance.bytes = allowance.bytes.saturating_sub(bytes);
    let mut tree = tree.map_err(|error| unreadable(document, &error))?;
    tree.move_down(document.first_line);
    match tree.repeated_key() {
        Some(entry) => Err(Unreadable {
            line: entry.line,
            message: format!("key {} is there twice", quoted(&entry.key)),
            remedy: REPEATED,
        }),
        None => Ok(tree),
    }
}

const REPEATED: &str = "remove one of the two";

fn unreadable(document: &Document<'_>, error: &serde_saphyr::Error) -> Unreadable {
    use serde_saphyr::Error;
    let line = error.location().map_or(1, |location| location.line().max(1) as usize);
    let (message, remedy) = match error.without_snippet() {
        error if is_too_large(error) => {
            ("the document is nested too deep or unfolds too large".to_owned(), "split it, and use fewer aliases")
        }
        Error::DuplicateMappingKey { key, .. } => {
            let key = key.as_deref().map_or("a key".to_owned(), |key| format!("key {}", quoted(key)));
            (format!("{key} is there twice"), REPEATED)
        }
        Error::UnknownAnchor { .. } => {
            ("an alias names an anchor that is not in this document".to_owned(), "write the value out")
        }
        Error::RecursiveReferencesRequireWeakTypes { .. } => {
            ("an alias holds itself".to_owned(), "write the value out")
        }
        Error::NonFiniteFloat { .. } => ("a number is not finite".to_owned(), "put it in quotes if it is text"),
        Error::NullIntoString { .. } | Error::Unexpected { .. } => ("a key is not text".to_owned(), "put it in quotes"),
        Error::InvalidBinaryBase64 { .. } | Error::BinaryNotUtf8 { .. } => {
            ("what is marked !!binary is not text in base64".to_owned(), "remove the mark, or write the text itself")
        }
        other => {
            let message = other.to_string();
            let message = message.split(" at line ").next().unwrap_or_default();
            (format!("not YAML: {}", quoted(message)), "mend the syntax there or just above")
        }
    };
    Unreadable { line: document.first_line + line, message, remedy }
}

fn is_too_large(error: &serde_saphyr::Error) -> bool {
    use serde_saphyr::Error;
    match error {
        Error::Budget { .. }
        | Error::AliasReplayLimitExceeded { .. }
        | Error::AliasExpansionLimitExceeded { .. }
        | Error::AliasReplayStackDepthExceeded { .. } => true,
        // The scanner's own limits have no variant, and what an alias breaks comes wrapped.
        error => ["limit exceeded", "budget breached"].iter().any(|limit| error.to_string().contains(limit)),
    }
}

impl Node {
    fn move_down(&mut self, lines: usize) {
        if self.line != 0 {
            self.line += lines;
        }
        match &mut self.content {
            Content::List(list) => list.iter_mut().for_each(|node| node.move_down(lines)),
            Content::Map(entries) => entries.iter_mut().for_each(|entry| {
                entry.line += lines;
                entry.value.move_down(lines);
            }),
            _ => {}
        }
    }

    /// A key that its mapping has already. (The YAML reader sees those that are the same to YAML; 1 and "1" are not, but become
    /// the same in an object.)
    fn repeated_key(&self) -> Option<&Entry> {
        match &self.content {
            Content::List(list) => list.iter().find_map(Node::repeated_key),
            Content::Map(entries) => {
                let mut seen = BTreeSet::new();
                let repeated = entries.iter().find(|entry| !seen.insert(&entry.key));
                repeated.or_else(|| entries.iter().find_map(|entry| entry.value.repeated_key()))
            }
            _ => None,
        }
    }

    /// The member of a mapping.
    pub(crate) fn get(&self, key: &str) -> Option<&Node> {
        match &self.content {
            Content::Map(entries) => entries.iter().find(|entry| entry.key == key).map(|entry| &entry.value),
            _ => None,
        }
    }

    /// The text of a member that is a string.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        match &self.get(key)?.content {
            Content::String(text) => Some(text),
            _ => None,
        }
    }

    /// The node at the end of a path, if the path leads to one.
    pub(crate) fn find(&self, path: &Path) -> Option<&Node> {
        path.0.iter().try_fold(self, |node, step| match (step, &node.content) {
            (Step::Key(key), _) => node.get(key),
            (Step::Index(index), Content::List(list)) => list.get(*index),
            _ => None,
        })
    }

    /// The line of a field, from 1: that of its key; of the nearest enclosing field where it is not written.
    pub(crate) fn line_of(&self, path: &Path) -> usize {
        let (mut node, mut line) = (self, self.line);
        for step in &path.0 {
            let (below, at) = match (step, &node.content) {
                (Step::Key(key), Content::Map(entries)) => match entries.iter().find(|entry| entry.key == *key) {
                    Some(entry) => (&entry.value, entry.line),
                    None => break,
                },
                (Step::Index(index), Content::List(list)) => match list.get(*index) {
                    Some(below) => (below, below.line),
                    None => break,
                },
                _ => break,
            };
            node = below;
            line = if at == 0 { line } else { at };
        }
        line
    }

    /// A scalar as it is written in the document.
    pub(crate) fn written<'a>(&self, document: &Document<'a>) -> Option<&'a str> {
        let (start, length) = self.written;
        document.text.get(start..start.checked_add(length)?).filter(|text| !text.is_empty() && !text.contains('\n'))
    }

    pub(crate) fn to_json(&self) -> Value {
        match &self.content {
            Content::Null => Value::Null,
            Content::Bool(value) => Value::Bool(*value),
            Content::Number(value) => Value::Number(value.clone()),
            Content::String(value) => Value::String(value.clone()),
            Content::List(list) => list.iter().map(Node::to_json).collect(),
            Content::Map(entries) => Value::Object(
                entries.iter().map(|entry| (entry.key.clone(), entry.value.to_json())).collect::<Map<_, _>>(),
            ),
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Node, D::Error> {
        let spanned = Spanned::<Content>::deserialize(deserializer)?;
        let at = spanned.referenced;
        let bytes = at.span();
        let written = (bytes.byte_offset().unwrap_or(0) as usize, bytes.byte_len().unwrap_or(0) as usize);
        Ok(Node { line: at.line() as usize, written, content: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Content, D::Error> {
        deserializer.deserialize_any(ContentVisitor)
    }
}

struct ContentVisitor;

impl<'de> Visitor<'de> for ContentVisitor {
    type Value = Content;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Content, E> {
        Ok(Content::Null)
    }

    fn visit_none<E>(self) -> Result<Content, E> {
        Ok(Content::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Content, D::Error> {
        Content::deserialize(deserializer)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Content, E> {
        Ok(Content::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Content, E> {
        Ok(Content::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Content, E> {
        Ok(Content::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Content, E> {
        Number::from_f64(value).map(Content::Number).ok_or_else(|| E::custom("a number is not finite"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Content, E> {
        Ok(Content::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Content, E> {
        Ok(Content::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Content, A::Error> {
        let mut list = Vec::new();
        while let Some(node) = access.next_element()? {
            list.push(node);
        }
        Ok(Content::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Content, A::Error> {
        let mut entries: Vec<Entry> = Vec::new();
        while let Some(key) = access.next_key::<Spanned<String>>()? {
            let (line, key) = (key.referenced.line() as usize, key.value);
            entries.push(Entry { line, key, value: access.next_value()? });
        }
        Ok(Content::Map(entries))
    }
}
