//! How far the changes of an API server are known, kind by kind: what a replica of the control plane says with all that it tells,
//! and a node to the next replica, so that one whose watches lag does not take back what another has told (T10).

use std::collections::BTreeMap;
use std::fmt;

/// The most kinds that a text may name, and the longest name of one, in bytes.
const MOST_KINDS: usize = 64;
const LONGEST_KIND: usize = 64;

/// By kind of object, the version of a change (`metadata.resourceVersion`, which grows with every change of the cluster). A
/// kind that is not named is not known of.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Position(BTreeMap<String, u64>);

impl Position {
    /// Takes in that a kind is known up to this version. What was known before stays, where it is more. Whether that is news.
    pub fn advance(&mut self, kind: &str, version: u64) -> bool {
        match self.0.get_mut(kind) {
            Some(known) if *known >= version => return false,
            Some(known) => *known = version,
            None => drop(self.0.insert(kind.to_owned(), version)),
        }
        true
    }

    /// A kind is not followed any more. Whether that is news.
    pub fn forget(&mut self, kind: &str) -> bool {
        self.0.remove(kind).is_some()
    }

    /// Takes in all of another one.
    pub fn merge(&mut self, other: &Self) {
        for (kind, version) in &other.0 {
            self.advance(kind, *version);
        }
    }

    /// The first kind of which this has a later change than `reached` covers, with both versions: what was reached may lack it.
    /// Kinds that one of the two does not know of say nothing.
    pub fn ahead_of(&self, reached: &Self) -> Option<(&str, u64, u64)> {
        let both = self.0.iter().filter_map(|(kind, version)| Some((kind.as_str(), *version, *reached.0.get(kind)?)));
        both.into_iter().find(|(_, version, reached)| version > reached)
    }

    /// As it is written: `Pod=12,Service=4`.
    ///
    /// `None` where a text is not of that form, or too long to be somebody's position.
    pub fn parse(text: &str) -> Option<Self> {
        let mut position = Self::default();
        for part in text.split(',').filter(|_| !text.is_empty()) {
            let (kind, version) = part.split_once('=')?;
            let fits =
                (1..=LONGEST_KIND).contains(&kind.len()) && kind.bytes().all(|byte| byte.is_ascii_alphanumeric());
            if !fits || position.0.len() == MOST_KINDS || position.0.contains_key(kind) {
                return None;
            }
            position.0.insert(kind.to_owned(), version.parse().ok()?);
        }
        Some(position)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, (kind, version)) in self.0.iter().enumerate() {
            write!(f, "{}{kind}={version}", if number == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn position(text: &str) -> Position {
        Position::parse(text).unwrap()
    }

    #[test]
    fn who_has_a_later_change_of_a_kind_that_both_know_is_ahead() {
        let reached = position("Pod=10,Service=20");
        for (node, expected) in [
            ("", None),
            ("Pod=10,Service=20", None),
            ("Pod=11", Some(("Pod", 11, 10))),
            ("Pod=9,Service=21", Some(("Service", 21, 20))),
            ("Node=99", None),
        ] {
            assert_eq!(position(node).ahead_of(&reached), expected, "{node}");
        }
        let mut node = position("Pod=5,Node=1");
        node.merge(&position("Pod=4,Service=2"));
        assert_eq!(node.to_string(), "Node=1,Pod=5,Service=2");
        node.forget("Pod");
        assert_eq!(node.to_string(), "Node=1,Service=2");
    }

    #[test]
    fn what_is_no_position_is_none() {
        let long = format!("{}=1", "k".repeat(LONGEST_KIND + 1));
        let many: Vec<_> = (0..=MOST_KINDS).map(|number| format!("k{number}=1")).collect();
        for text in
            ["Pod", "Pod=", "=1", "Pod=-1", "Pod=1,", "Pod=1,Pod=2", "P od=1", "partial", &long, &many.join(",")]
        {
            assert_eq!(Position::parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics_and_what_is_taken_is_written_alike(text in "[A-Za-z0-9=,]{0,64}") {
            if let Some(position) = Position::parse(&text) {
                prop_assert_eq!(Position::parse(&position.to_string()), Some(position));
            }
        }
    }
}
