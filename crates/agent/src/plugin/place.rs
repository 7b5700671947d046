//! The plugin's place on the node: its binary in the runtime's folder of plugins, and our conflist in the folder of
//! configurations. It is put back when somebody takes it away, and follows the primary's changes.
//!
//! What is written survives a power cut: file and folder are on the disk before they count (D21). When it was first in
//! place is the modification time of the binary, which nothing but us writes.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::NAME;
use super::conflist::{self, Entry, FILE};

/// Where the plugin belongs.
#[derive(Debug, Clone)]
pub(crate) struct Folders {
    /// Of the runtime's plugins.
    pub(crate) binaries: PathBuf,
    /// Of its configurations.
    pub(crate) configurations: PathBuf,
    /// What is copied: this program.
    pub(crate) program: PathBuf,
}

/// How it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Runtimes take it, with this file's chain.
    InPlace {
        /// The primary's file.
        primary: String,
    },
    /// It is in place with a chain whose own file is gone: nobody said that it is not to be used any more.
    Orphan,
    /// There is no primary to put it behind.
    NoPrimary,
    /// Why it could not be put in place.
    Failed(String),
}

impl Standing {
    /// The name in dumps.
    pub(crate) fn as_str(&self) -> &'static str {
        match self {
            Self::InPlace { .. } => "in-place",
            Self::Orphan => "orphan",
            Self::NoPrimary => "no-primary",
            Self::Failed(_) => "failed",
        }
    }

    /// Whether runtimes take it.
    pub(crate) fn is_installed(&self) -> bool {
        matches!(self, Self::InPlace { .. } | Self::Orphan)
    }

    /// The primary's file.
    pub(crate) fn primary(&self) -> Option<&str> {
        match self {
            Self::InPlace { primary } => Some(primary),
            Self::Orphan | Self::NoPrimary | Self::Failed(_) => None,
        }
    }

    /// What went wrong.
    pub(crate) fn error(&self) -> Option<&str> {
        match self {
            Self::Failed(sentence) => Some(sentence),
            Self::InPlace { .. } | Self::Orphan | Self::NoPrimary => None,
        }
    }
}

/// What was done to make it so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Done {
    /// Nothing.
    Nothing,
    /// It was put in place for the first time.
    Installed,
    /// The primary changed, or our own entry did.
    Followed,
    /// Somebody had removed or changed it.
    Restored,
}

/// Puts it in place and keeps it there.
#[derive(Debug)]
pub(crate) struct Place {
    folders: Folders,
    entry: Entry,
    /// Our conflist as it was last written or found right.
    written: Option<Vec<u8>>,
    /// The binary was compared with this program.
    compared: bool,
}

impl Place {
    /// Nothing is written yet.
    pub(crate) fn new(folders: Folders, entry: Entry) -> Self {
        Self { folders, entry, written: None, compared: false }
    }

    /// Whether our conflist is there, from an agent before this one.
    pub(crate) fn is_there(&self) -> bool {
        self.conflist().exists()
    }

    /// Since when every sandbox should have come to us; `None` where it never was in place.
    pub(crate) fn since(&self) -> Option<SystemTime> {
        let modified = fs::metadata(self.binary()).ok()?.modified().ok()?;
        (modified != SystemTime::UNIX_EPOCH).then_some(modified)
    }

    /// Looks, and makes it right.
    pub(crate) fn keep(&mut self) -> (Standing, Done) {
        self.try_keep().unwrap_or_else(|sentence| (Standing::Failed(sentence), Done::Nothing))
    }

    fn try_keep(&mut self) -> Result<(Standing, Done), String> {
        let ours = self.conflist();
        let names = names(&self.folders.configurations)?;
        let Some(primary) = conflist::primary(names) else {
            // A chain without its file stays: were it taken away, a primary that comes back would be without us for a while.
            return Ok((if ours.exists() { Standing::Orphan } else { Standing::NoPrimary }, Done::Nothing));
        };
        let path = self.folders.configurations.join(&primary);
        let (text, mode) = read(&path, conflist::LARGEST)?;
        let wanted = conflist::embed(&primary, &text, &self.entry)?;
        self.is_the_runtimes(&primary, &text)?;
        self.keep_binary()?;
        let found = match read(&ours, 2 * conflist::LARGEST) {
            Ok((found, _)) => Some(found),
            Err(_) if !ours.exists() => None,
            Err(sentence) => return Err(sentence),
        };
        let done = match (&found, &self.written) {
            (Some(found), _) if *found == wanted => Done::Nothing,
            (found, Some(written)) if found.as_ref() != Some(written) => Done::Restored,
            (None, None) if self.since().is_some() => Done::Restored,
            (None, None) => Done::Installed,
            (Some(_), _) => Done::Followed,
            (None, Some(_)) => Done::Restored,
        };
        if done != Done::Nothing {
            replace(&ours, |file| file.write_all(&wanted), mode).map_err(|error| cannot("write", &ours, &error))?;
            if self.since().is_none() {
                let now = File::options()
                    .append(true)
                    .open(self.binary())
                    .and_then(|file| file.set_modified(SystemTime::now()));
                now.map_err(|error| cannot("write", &self.binary(), &error))?;
            }
        }
        self.written = Some(wanted);
        Ok((Standing::InPlace { primary }, done))
    }

    /// Whether the folder of plugins is one that the runtime looks into: it has one of the primary's own. In any other ours would
    /// not be found, and no pod of the node could start, or end.
    fn is_the_runtimes(&self, primary: &str, text: &[u8]) -> Result<(), String> {
        let plugins = conflist::plugins(primary, text)?;
        // Also as a link, whose end is not seen from here.
        if plugins.iter().any(|plugin| self.folders.binaries.join(plugin).symlink_metadata().is_ok()) {
            return Ok(());
        }
        Err(format!(
            "{} has no plugin {}, which {primary} names: it is not the runtime's folder of plugins; set cni.binDir",
            self.folders.binaries.display(),
            plugins.join(" or "),
        ))
    }

    /// The program itself, compared byte for byte once, as an upgrade may change it.
    fn keep_binary(&mut self) -> Result<(), String> {
        let (binary, program) = (self.binary(), &self.folders.program);
        if binary.exists() && (self.compared || same(&binary, program)) {
            self.compared = true;
            return Ok(());
        }
        let since = self.since().unwrap_or(SystemTime::UNIX_EPOCH);
        let mut source = File::open(program).map_err(|error| cannot("read", program, &error))?;
        let write = |file: &mut File| {
            io::copy(&mut source, file)?;
            file.set_modified(since)
        };
        replace(&binary, write, 0o755).map_err(|error| cannot("write", &binary, &error))?;
        self.compared = true;
        Ok(())
    }

    /// Takes it out: first what leads to it, so that no runtime looks for a plugin that is gone.
    ///
    /// # Errors
    /// One sentence: what could not be removed.
    pub(crate) fn remove(&self) -> Result<(), String> {
        for path in [self.conflist(), self.binary()] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(cannot("remove", &path, &error)),
                _ => {}
            }
            sync_folder(&path).map_err(|error| cannot("remove", &path, &error))?;
        }
        Ok(())
    }

    fn conflist(&self) -> PathBuf {
        self.folders.configurations.join(FILE)
    }

    fn binary(&self) -> PathBuf {
        self.folders.binaries.join(NAME)
    }
}

fn names(folder: &Path) -> Result<Vec<String>, String> {
    let entries = fs::read_dir(folder).map_err(|error| cannot("read", folder, &error))?;
    // A name that is no text is none that a runtime takes.
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
}

fn read(path: &Path, largest: usize) -> Result<(Vec<u8>, u32), String> {
    let whole = || {
        let file = File::open(path)?;
        let mode = file.metadata()?.permissions().mode() & 0o777;
        let mut text = Vec::new();
        file.take(largest as u64 + 1).read_to_end(&mut text)?;
        Ok((text, mode))
    };
    whole().map_err(|error: io::Error| cannot("read", path, &error))
}

/// Whole or not at all, and on the disk before it is there.
fn replace(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>, mode: u32) -> io::Result<()> {
    // No runtime takes a name with this end.
    let new = path.with_file_name(format!(".{NAME}.tmp"));
    let written = || {
        let mut file = File::create(&new)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        write(&mut file)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        sync_folder(path)
    };
    written().inspect_err(|_| drop(fs::remove_file(&new)))
}

fn sync_folder(of: &Path) -> io::Result<()> {
    of.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

fn same(a: &Path, b: &Path) -> bool {
    let compare = || -> io::Result<bool> {
        let (mut a, mut b) = (File::open(a)?, File::open(b)?);
        if a.metadata()?.len() != b.metadata()?.len() {
            return Ok(false);
        }
        let (mut left, mut right) = (vec![0; 1 << 16], vec![0; 1 << 16]);
        loop {
            let length = a.read(&mut left)?;
            if length == 0 {
                return Ok(true);
            }
            b.read_exact(&mut right[..length])?;
            if left[..length] != right[..length] {
                return Ok(false);
            }
        }
    };
    compare().unwrap_or(false)
}

fn cannot(what: &str, path: &Path, error: &io::Error) -> String {
    format!("cannot {what} {}: {error}", path.display())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tempfile::TempDir;

    use super::*;

    struct Node {
        _files: TempDir,
        folders: Folders,
    }

    impl Node {
        fn new() -> Self {
            let files = tempfile::tempdir().unwrap();
            let [binaries, configurations, program] = ["bin", "conf", "program"].map(|name| files.path().join(name));
            fs::create_dir(&binaries).unwrap();
            fs::create_dir(&configurations).unwrap();
            fs::write(&program, b"version 1").unwrap();
            Self { _files: files, folders: Folders { binaries, configurations, program } }
        }

        fn place(&self) -> Place {
            let entry = Entry { socket: "/run/justmtls/cni.sock".into(), exempt: vec!["kube-system".into()] };
            Place::new(self.folders.clone(), entry)
        }

        fn primary(&self, name: &str, plugin: &str) {
            let path = self.folders.configurations.join(name);
            let text = format!(r#"{{"cniVersion":"1.0.0","name":"net","plugins":[{{"type":"{plugin}"}}]}}"#);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
            fs::write(self.folders.binaries.join(plugin), b"another's").unwrap();
        }

        fn ours(&self) -> PathBuf {
            self.folders.configurations.join(FILE)
        }

        fn chain(&self) -> Vec<String> {
            let list: serde_json::Value = serde_json::from_slice(&fs::read(self.ours()).unwrap()).unwrap();
            list["plugins"].as_array().unwrap().iter().map(|it| it["type"].as_str().unwrap().to_owned()).collect()
        }
    }

    fn in_place(primary: &str) -> Standing {
        Standing::InPlace { primary: primary.into() }
    }

    #[test]
    fn it_waits_for_a_primary_and_stands_from_then_on() {
        let node = Node::new();
        let mut place = node.place();
        assert_eq!(place.keep(), (Standing::NoPrimary, Done::Nothing));
        assert!(!place.is_there() && place.since().is_none());
        node.primary("10-net.conflist", "bridge");
        let before = SystemTime::now() - Duration::from_secs(1);
        assert_eq!(place.keep(), (in_place("10-net.conflist"), Done::Installed));
        assert_eq!(node.chain(), ["bridge", "justmtls"]);
        assert_eq!(fs::metadata(node.ours()).unwrap().permissions().mode() & 0o777, 0o640);
        let binary = node.folders.binaries.join("justmtls");
        assert_eq!(fs::read(&binary).unwrap(), b"version 1");
        assert_eq!(fs::metadata(&binary).unwrap().permissions().mode() & 0o777, 0o755);
        assert!(place.since().unwrap() >= before);
        assert_eq!(place.keep(), (in_place("10-net.conflist"), Done::Nothing));
    }

    #[test]
    fn it_follows_the_primary_and_is_put_back_where_others_take_it_away() {
        let node = Node::new();
        node.primary("10-net.conflist", "bridge");
        let mut place = node.place();
        place.keep();
        let since = place.since();
        node.primary("10-net.conflist", "ptp");
        assert_eq!(place.keep(), (in_place("10-net.conflist"), Done::Followed));
        assert_eq!(node.chain(), ["ptp", "justmtls"]);
        fs::remove_file(node.ours()).unwrap();
        assert_eq!(place.keep(), (in_place("10-net.conflist"), Done::Restored));
        fs::write(node.ours(), b"{}").unwrap();
        assert_eq!(place.keep(), (in_place("10-net.conflist"), Done::Restored));
        fs::remove_file(node.ours()).unwrap();
        // By an agent that was not there when it happened, too.
        assert_eq!(node.place().keep(), (in_place("10-net.conflist"), Done::Restored));
        assert_eq!((node.chain(), place.since()), (vec!["ptp".to_owned(), "justmtls".to_owned()], since));
    }

    #[test]
    fn a_folder_of_plugins_that_the_runtime_does_not_use_is_refused_by_name_and_nothing_is_written() {
        let node = Node::new();
        node.primary("10-net.conflist", "bridge");
        fs::remove_file(node.folders.binaries.join("bridge")).unwrap();
        let (Standing::Failed(sentence), Done::Nothing) = node.place().keep() else { panic!("a failure") };
        assert!(sentence.contains("has no plugin bridge, which 10-net.conflist names"), "{sentence}");
        assert_eq!(names(&node.folders.binaries).unwrap(), Vec::<String>::new());
        assert!(!node.ours().exists());
        std::os::unix::fs::symlink("/nowhere/bin/cni", node.folders.binaries.join("bridge")).unwrap();
        assert_eq!(node.place().keep(), (in_place("10-net.conflist"), Done::Installed));
    }

    #[test]
    fn a_primary_that_goes_takes_no_capture_along_and_one_that_is_broken_is_named() {
        let node = Node::new();
        node.primary("10-net.conflist", "bridge");
        let mut place = node.place();
        place.keep();
        fs::remove_file(node.folders.configurations.join("10-net.conflist")).unwrap();
        assert_eq!(place.keep(), (Standing::Orphan, Done::Nothing));
        assert_eq!(node.chain(), ["bridge", "justmtls"]);
        fs::write(node.folders.configurations.join("20-net.conflist"), b"{").unwrap();
        let (Standing::Failed(sentence), Done::Nothing) = place.keep() else { panic!("a failure") };
        assert!(sentence.contains("20-net.conflist is not JSON"), "{sentence}");
        assert_eq!(node.chain(), ["bridge", "justmtls"]);
    }

    #[test]
    fn another_version_replaces_the_binary_and_not_the_time_since_when_it_is_there() {
        let node = Node::new();
        node.primary("10-net.conflist", "bridge");
        let mut place = node.place();
        place.keep();
        let since = place.since().unwrap();
        fs::write(&node.folders.program, b"version 2").unwrap();
        let mut next = node.place();
        assert!(next.is_there());
        assert_eq!(next.keep(), (in_place("10-net.conflist"), Done::Nothing));
        assert_eq!(fs::read(node.folders.binaries.join("justmtls")).unwrap(), b"version 2");
        assert_eq!(next.since().unwrap(), since);
    }

    #[test]
    fn what_is_taken_out_leaves_nothing() {
        let node = Node::new();
        node.primary("10-net.conflist", "bridge");
        let mut place = node.place();
        place.keep();
        place.remove().unwrap();
        place.remove().unwrap();
        let left = |folder: &Path| names(folder).unwrap();
        assert_eq!(left(&node.folders.binaries), ["bridge"]);
        assert_eq!(left(&node.folders.configurations), ["10-net.conflist"]);
    }
}
