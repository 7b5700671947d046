//! What is not as somebody wants it to be, for a person.

use std::fmt;

use serde::Serialize;

/// How much a problem matters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Severity {
    /// What was asked for holds, but probably not as its author thinks.
    Warning,
    /// Something was not taken, or something refuses because of it.
    Error,
}

/// One problem as one sentence: which object, what is wrong, and what to do.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct Problem {
    /// How much it matters.
    pub(crate) severity: Severity,
    /// Where: an object (`Pod shop/web`), or a file and line.
    pub(crate) subject: String,
    /// What is wrong, and what to do about it.
    pub(crate) message: String,
}

impl Problem {
    /// Something that does not hold, or refuses.
    pub(crate) fn error(subject: impl fmt::Display, message: impl Into<String>) -> Self {
        Self { severity: Severity::Error, subject: subject.to_string(), message: message.into() }
    }

    /// Something that holds otherwise than its author probably thinks.
    pub(crate) fn warning(subject: impl fmt::Display, message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, subject: subject.to_string(), message: message.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject, self.message)
    }
}

/// A stranger's text as it may stand in a sentence: short, on one line, without control characters.
pub(crate) fn quoted(text: &str) -> String {
    const MOST: usize = 80;
    let mut shown: String = text.chars().take(MOST).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if text.chars().nth(MOST).is_some() {
        shown.push('…');
    }
    shown
}
