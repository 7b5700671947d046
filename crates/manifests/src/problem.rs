//! A problem of a manifest, as one sentence.

use std::fmt;
use std::sync::Arc;

/// Where something was written: a label of a text, usually a file's name, and a line in it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Location {
    /// The label that was given to [`crate::parse()`].
    pub file: Arc<str>,
    /// Counted from 1; none where the text as a whole is meant.
    pub line: Option<usize>,
}

impl Location {
    /// A line (counted from 1) of a text.
    pub fn line(file: &str, line: usize) -> Location {
        Location { file: file.into(), line: Some(line) }
    }

    /// A text as a whole.
    pub fn file(file: &str) -> Location {
        Location { file: file.into(), line: None }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}", self.file),
            None => f.write_str(&self.file),
        }
    }
}

/// Whether an object is taken in spite of its problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// The object is taken; something in it, or missing around it, is probably not what its author wants.
    Warning,
    /// The object (or the text that should have become one) is not taken.
    Error,
}

/// What is wrong with a manifest, for a person. `Display` is one sentence: where, which object, which field, what, and
/// what to do, such as `shop.yaml:12: Service shop/web: field spec.ports[0].port: 70000 is not a port; use a number from 1 to 65535`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Problem {
    /// The line of the field where it is known, else of the object, else the file.
    pub location: Location,
    /// Whether the object is taken in spite of it.
    pub severity: Severity,
    /// The object as [`crate::ObjectKey`] displays it, or as much of it as could be read.
    pub object: Option<String>,
    /// Path of the field from the object's root, such as `spec.ports[0].port`.
    pub field: Option<String>,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
}

impl Problem {
    /// Whether the object was refused because of it.
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }

    /// What is wrong with the object, without where that is: the field, the message and the remedy.
    pub fn finding(&self) -> String {
        let field = self.field.as_ref().map(|field| format!("field {field}: ")).unwrap_or_default();
        format!("{field}{}; {}", self.message, self.remedy)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.location)?;
        if let Some(object) = &self.object {
            write!(f, "{object}: ")?;
        }
        f.write_str(&self.finding())
    }
}

/// Text from a manifest as it may stand in a sentence: on one line, without control characters, and short.
pub(crate) fn quoted(text: &str) -> String {
    const MOST: usize = 80;
    let mut shown: String = text
        .chars()
        .take(MOST)
        .flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] })
        .collect();
    if text.chars().nth(MOST).is_some() {
        shown.push('…');
    }
    shown
}
