//! Paths of fields in an object.

use std::fmt;

/// One step from a node of an object to a node below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    Key(String),
    Index(usize),
}

/// The way from an object's root to a field. Displays as `spec.ports[0].port`; keys that hold dots stand in brackets, so that
/// `metadata.labels["app.kubernetes.io/name"]` is not read as five steps.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Path(pub(crate) Vec<Step>);

impl Path {
    pub(crate) fn child(&self, step: Step) -> Path {
        let mut steps = self.0.clone();
        steps.push(step);
        Path(steps)
    }

    /// Displayed, or nothing for the root.
    pub(crate) fn to_field(&self) -> Option<String> {
        (!self.0.is_empty()).then(|| self.to_string())
    }
}

impl From<&serde_path_to_error::Path> for Path {
    /// Steps that serde cannot name (enums, unknown keys) end the path: what stands before them is still right.
    fn from(path: &serde_path_to_error::Path) -> Path {
        use serde_path_to_error::Segment;
        let steps = path.iter().map_while(|segment| match segment {
            Segment::Map { key } => Some(Step::Key(key.clone())),
            Segment::Seq { index } => Some(Step::Index(*index)),
            Segment::Enum { .. } | Segment::Unknown => None,
        });
        Path(steps.collect())
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, step) in self.0.iter().enumerate() {
            match step {
                Step::Index(index) => write!(f, "[{index}]")?,
                Step::Key(key)
                    if key.is_empty() || !key.chars().all(|c| c.is_ascii_alphanumeric() || "-_/".contains(c)) =>
                {
                    write!(f, "[\"{}\"]", crate::problem::quoted(key))?;
                }
                Step::Key(key) if position == 0 => f.write_str(key)?,
                Step::Key(key) => write!(f, ".{}", crate::problem::quoted(key))?,
            }
        }
        Ok(())
    }
}
