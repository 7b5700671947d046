//! Which pods nodes have said to be captured, kept over a restart.
//!
//! A control plane that has just started has heard no agent yet. Without this record it would publish every pod as not
//! captured: peers that know better would keep to what they know (T47), but whoever asks anew would speak to it in clear,
//! and every node would be told of every pod twice.
//!
//! The record grows line by line, and is on disk before anybody is told; it is written anew where a pod is captured no
//! longer, and the next start leaves out what is gone.

use std::collections::{BTreeSet, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use mesh::PodUid;

use crate::problem::Problem;

/// The name of the file in the authority's folder.
const CAPTURED: &str = "captured";
/// The largest record that is read: 500,000 pods and their nodes.
const MAX_RECORD: u64 = 128 * 1024 * 1024;

/// The record, open for more.
#[derive(Debug)]
pub(crate) struct Captures {
    path: PathBuf,
    file: File,
    known: HashSet<(String, PodUid)>,
    problem: Option<String>,
}

/// Why there is no record. The operator's to mend.
#[derive(Debug, thiserror::Error)]
#[error("cannot use the record of captured pods {}: {error}; mend it, or remove it and restart every pod", path.display())]
pub(crate) struct CapturesError {
    path: PathBuf,
    error: io::Error,
}

impl Captures {
    /// Reads the record in a folder, and begins one where there is none. A last line that was not written wholly is left out:
    /// nobody was told of it.
    pub(crate) fn open(directory: &Path) -> Result<Self, CapturesError> {
        let path = directory.join(CAPTURED);
        let failed = |error| CapturesError { path: path.clone(), error };
        let mut file =
            OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(&path).map_err(failed)?;
        let mut text = String::new();
        let length = (&mut file).take(MAX_RECORD + 1).read_to_string(&mut text).map_err(failed)?;
        if length as u64 > MAX_RECORD {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidData, "it is too large")));
        }
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        file.set_len(whole as u64).map_err(failed)?;
        let known = text[..whole].lines().filter_map(|line| line.split_once(' '));
        let known = known.map(|(node, uid)| (node.to_owned(), PodUid::from(uid))).collect();
        Ok(Self { file, known, problem: None, path })
    }

    /// Everything in it.
    pub(crate) fn all(&self) -> impl Iterator<Item = (String, PodUid)> + use<'_> {
        self.known.iter().cloned()
    }

    /// Leaves out what does not hold any more.
    pub(crate) fn retain(&mut self, holds: impl Fn(&(String, PodUid)) -> bool) -> Result<(), CapturesError> {
        let before = self.known.len();
        self.known.retain(holds);
        if self.known.len() == before {
            return Ok(());
        }
        let failed = |error| CapturesError { path: self.path.clone(), error };
        let next = self.path.with_extension("next");
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&next).map_err(failed)?;
        file.write_all(lines(&self.known).as_bytes()).and_then(|()| file.sync_all()).map_err(failed)?;
        std::fs::rename(&next, &self.path).map_err(failed)?;
        self.file = OpenOptions::new().append(true).open(&self.path).map_err(failed)?;
        Ok(())
    }

    /// Adds pods, on disk when this returns. What cannot be written is a problem, and is tried again with the next.
    pub(crate) fn add(&mut self, captured: impl IntoIterator<Item = (String, PodUid)>) {
        // A name with white space is none of a node's or pod's: it would be read as another.
        let is_plain = |text: &str| !text.is_empty() && !text.contains(char::is_whitespace);
        let new = captured.into_iter().filter(|(node, uid)| is_plain(node) && is_plain(uid.as_str()));
        let new: Vec<_> = new.filter(|pair| !self.known.contains(pair)).collect();
        if new.is_empty() {
            return;
        }
        match self.file.write_all(lines(&new).as_bytes()).and_then(|()| self.file.sync_data()) {
            Ok(()) => {
                self.known.extend(new);
                self.problem = None;
            }
            Err(error) => {
                self.problem = Some(format!(
                    "captured pods cannot be recorded: {error}; after a restart of the control plane they would count as \
                     not captured until their agents report again"
                ));
            }
        }
    }

    /// Leaves out pods that peers are to speak TLS with no longer, on disk when this returns. `false`: that could not be written,
    /// which is a problem, and to be tried again.
    pub(crate) fn forget(&mut self, pods: &BTreeSet<(String, PodUid)>) -> bool {
        if !pods.iter().any(|pair| self.known.contains(pair)) {
            return true;
        }
        match self.retain(|pair| !pods.contains(pair)) {
            Ok(()) => {
                self.problem = None;
                true
            }
            Err(error) => {
                self.known.extend(pods.iter().cloned());
                self.problem = Some(format!("pods that are not to be captured any more stay so, because {error}"));
                false
            }
        }
    }

    /// That it cannot be written, while that is so.
    pub(crate) fn problem(&self) -> Option<Problem> {
        self.problem.as_ref().map(|problem| Problem::error(self.path.display(), problem.clone()))
    }
}

fn lines<'a>(captured: impl IntoIterator<Item = &'a (String, PodUid)>) -> String {
    captured.into_iter().map(|(node, uid)| format!("{node} {uid}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(uid: &str) -> (String, PodUid) {
        ("node-a".to_owned(), PodUid::from(uid))
    }

    fn sorted(captures: &Captures) -> Vec<String> {
        let mut all: Vec<_> = captures.all().map(|(node, uid)| format!("{node}/{uid}")).collect();
        all.sort();
        all
    }

    #[test]
    fn what_was_added_is_there_after_a_restart_and_half_a_line_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let mut captures = Captures::open(directory.path()).unwrap();
        captures.add([pair("one"), pair("two"), pair("one")]);
        captures.add([pair("two"), pair("three words never")]);
        drop(captures);
        let mut file = OpenOptions::new().append(true).open(directory.path().join(CAPTURED)).unwrap();
        file.write_all(b"node-a hal").unwrap();
        let mut captures = Captures::open(directory.path()).unwrap();
        assert_eq!(sorted(&captures), ["node-a/one", "node-a/two"]);
        captures.add([pair("three")]);
        assert_eq!(sorted(&Captures::open(directory.path()).unwrap()), ["node-a/one", "node-a/three", "node-a/two"]);
    }

    #[test]
    fn what_is_gone_is_left_out_and_more_can_be_added() {
        let directory = tempfile::tempdir().unwrap();
        let mut captures = Captures::open(directory.path()).unwrap();
        captures.add([pair("one"), pair("two")]);
        captures.retain(|(_, uid)| uid.as_str() != "one").unwrap();
        captures.add([pair("three")]);
        assert!(captures.problem().is_none());
        assert_eq!(sorted(&Captures::open(directory.path()).unwrap()), ["node-a/three", "node-a/two"]);
    }

    #[test]
    fn what_is_captured_no_longer_is_forgotten_for_good_and_can_be_added_again() {
        let directory = tempfile::tempdir().unwrap();
        let mut captures = Captures::open(directory.path()).unwrap();
        captures.add([pair("one"), pair("two")]);
        assert!(captures.forget(&[pair("one"), pair("never")].into()));
        assert_eq!(sorted(&Captures::open(directory.path()).unwrap()), ["node-a/two"]);
        captures.add([pair("one")]);
        assert_eq!(sorted(&Captures::open(directory.path()).unwrap()), ["node-a/one", "node-a/two"]);

        // Where it cannot be written it is not forgotten, and said.
        std::fs::create_dir(directory.path().join("captured.next")).unwrap();
        assert!(!captures.forget(&[pair("two")].into()) && captures.problem().is_some());
        std::fs::remove_dir(directory.path().join("captured.next")).unwrap();
        assert!(captures.forget(&[pair("two")].into()) && captures.problem().is_none());
        assert_eq!(sorted(&Captures::open(directory.path()).unwrap()), ["node-a/one"]);
    }

    #[test]
    fn a_record_that_is_no_text_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(CAPTURED), [0xff, 0xfe, b'\n']).unwrap();
        let error = Captures::open(directory.path()).unwrap_err().to_string();
        assert!(error.contains("captured") && error.contains("restart every pod"), "{error}");
    }
}
