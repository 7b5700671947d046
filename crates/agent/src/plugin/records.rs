//! Which sandboxes the plugin was asked about: an empty file for each, beside the agent's socket. They go with the node's
//! memory at a crash, as the sandboxes do. By them the agent knows a sandbox that a runtime made without the plugin (T9).

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// The longest id, in bytes: those of runtimes have 64.
const LONGEST: usize = 128;

/// The folder.
#[derive(Debug, Clone)]
pub(crate) struct Records(PathBuf);

impl Records {
    /// Those of the agent that listens at `socket`.
    pub(crate) fn beside(socket: &Path) -> Self {
        Self(socket.with_file_name("sandboxes"))
    }

    /// Notes a sandbox.
    ///
    /// # Errors
    /// The file cannot be made, or the id could not be one's.
    pub(crate) fn add(&self, sandbox: &str) -> io::Result<()> {
        let file = self.of(sandbox)?;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.0)?;
        File::create(file).map(drop)
    }

    /// Whether a sandbox was noted.
    pub(crate) fn has(&self, sandbox: &str) -> bool {
        self.of(sandbox).is_ok_and(|file| file.exists())
    }

    /// Forgets one.
    ///
    /// # Errors
    /// It cannot be removed.
    pub(crate) fn remove(&self, sandbox: &str) -> io::Result<()> {
        match fs::remove_file(self.of(sandbox)?) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Forgets all but these.
    ///
    /// # Errors
    /// The folder cannot be read, or one not be removed.
    pub(crate) fn keep_only(&self, sandboxes: &[&str]) -> io::Result<()> {
        for entry in fs::read_dir(&self.0)? {
            let entry = entry?;
            if !entry.file_name().to_str().is_some_and(|name| sandboxes.contains(&name)) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Forgets all, and the folder.
    pub(crate) fn clear(&self) {
        let _ = fs::remove_dir_all(&self.0);
    }

    /// An id becomes a name of a file in the folder, and of no other.
    fn of(&self, sandbox: &str) -> io::Result<PathBuf> {
        let fits = |it: char| it.is_ascii_alphanumeric() || ['-', '_', '.'].contains(&it);
        let good = !sandbox.is_empty() && sandbox.len() <= LONGEST && !sandbox.starts_with('.');
        if !good || !sandbox.chars().all(fits) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{sandbox:?} is no id of a sandbox")));
        }
        Ok(self.0.join(sandbox))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_is_known_until_it_is_forgotten() {
        let place = tempfile::tempdir().unwrap();
        let records = Records::beside(&place.path().join("cni.sock"));
        for sandbox in ["a1", "b2", "c3"] {
            assert!(!records.has(sandbox));
            records.add(sandbox).unwrap();
            assert!(records.has(sandbox));
        }
        records.remove("a1").unwrap();
        records.remove("a1").unwrap();
        records.keep_only(&["c3"]).unwrap();
        assert_eq!([records.has("a1"), records.has("b2"), records.has("c3")], [false, false, true]);
        records.clear();
        records.clear();
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_id_leads_nowhere_else() {
        let place = tempfile::tempdir().unwrap();
        let records = Records::beside(&place.path().join("cni.sock"));
        for sandbox in ["", ".", "..", "../x", "a/b", "a\0", &"a".repeat(129)] {
            assert!(records.add(sandbox).is_err() && !records.has(sandbox), "{sandbox:?}");
        }
    }
}
