//! The state directory: the one thing of a box that the outside sees.
//!
//! It holds a lock and a socket. The lock is a `flock` shared by starter and init, so a directory is in
//! use exactly as long as one of the two lives, whatever its files say; what both left behind when they
//! were killed together is cleaned by whoever comes next.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use linux::channel::Channel;

const LOCK: &str = "lock";
const SOCKET: &str = "socket";
/// Everything that a state directory may hold.
const OURS: [&str; 2] = [LOCK, SOCKET];

/// Why a state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A box lives in it.
    #[error(
        "the state directory {path} is in use by process {pid}: \
         stop that box with `justmtls demo stop --state {path}`, or name another directory with --state"
    )]
    InUse {
        /// The directory.
        path: PathBuf,
        /// The starter of the box that is there.
        pid: String,
    },
    /// It is somebody else's, or something else.
    #[error("cannot use {path} as the state directory: {why}; name another one with --state")]
    Unsuitable {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The file system refused.
    #[error("cannot {what} {path}")]
    Io {
        /// The deed.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
}

/// What is at a path.
#[derive(Debug)]
pub enum Found {
    /// A box that lives.
    Running,
    /// What a killed box left.
    Stale,
    /// Nothing of ours.
    Nothing,
}

/// A state directory that is ours.
#[derive(Debug)]
pub struct StateDirectory {
    path: PathBuf,
    handle: File,
    /// Held, not read: the lock goes when starter and init have both closed it.
    _lock: File,
    /// Whether the directory was made for the box, and so goes with it.
    made: bool,
}

impl StateDirectory {
    /// The user's own: `/run/justmtls` for root, else below the user's runtime directory, else in the folder for temporary files.
    pub fn default_path() -> PathBuf {
        let uid = nix::unistd::geteuid();
        if uid.is_root() && Path::new("/run").is_dir() {
            return "/run/justmtls-demo".into();
        }
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        match runtime.filter(|path| fs::metadata(path).is_ok_and(|found| found.uid() == uid.as_raw())) {
            Some(runtime) => runtime.join("justmtls-demo"),
            None => std::env::temp_dir().join(format!("justmtls-demo-{uid}")),
        }
    }

    /// Takes a directory for a new box: makes it, or takes over an empty or stale one.
    pub fn claim(path: &Path) -> Result<StateDirectory, StateError> {
        let path =
            std::path::absolute(path).map_err(|source| StateError::Io { what: "find", path: path.into(), source })?;
        // A box that ends removes its directory, perhaps between our opening and locking: then again.
        loop {
            if let Some(claimed) = StateDirectory::try_claim(&path)? {
                return Ok(claimed);
            }
        }
    }

    fn try_claim(path: &Path) -> Result<Option<StateDirectory>, StateError> {
        let io = |what: &'static str, path: &Path| {
            let path = path.to_owned();
            move |source| StateError::Io { what, path, source }
        };
        let mut made = match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(io("make the state directory", path)(error)),
        };
        check_ownership(path)?;
        let handle = File::open(path).map_err(io("open", path))?;
        let lock_path = path.join(LOCK);
        let mut lock = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path)
            .map_err(io("open", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let pid = Claim::read(&mut lock).pid;
                return Err(StateError::InUse { path: path.to_owned(), pid });
            }
            Err(TryLockError::Error(source)) => return Err(io("lock", &lock_path)(source)),
        }
        let same = fs::metadata(&lock_path).is_ok_and(|found| {
            lock.metadata().is_ok_and(|held| (held.dev(), held.ino()) == (found.dev(), found.ino()))
        });
        if !same {
            return Ok(None);
        }
        // What was made for the box that was killed here is removed with the next one.
        made |= Claim::read(&mut lock).made;
        match fs::remove_file(path.join(SOCKET)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io("remove", &path.join(SOCKET))(error));
            }
            _ => {}
        }
        Claim { pid: std::process::id().to_string(), made }.write(&mut lock).map_err(io("write", &lock_path))?;
        Ok(Some(StateDirectory { path: path.to_owned(), handle, _lock: lock, made }))
    }

    /// What is at `path` now.
    pub fn look(path: &Path) -> Found {
        let Ok(mut lock) = File::options().read(true).write(true).open(path.join(LOCK)) else {
            return Found::Nothing;
        };
        match lock.try_lock() {
            // A file called lock with something else in it is not ours to clean.
            Ok(()) if !Claim::read(&mut lock).pid.is_empty() => Found::Stale,
            Ok(()) | Err(TryLockError::Error(_)) => Found::Nothing,
            Err(TryLockError::WouldBlock) => Found::Running,
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The socket, by a name that is short enough for a socket's address however long the path is.
    pub fn socket(&self) -> PathBuf {
        format!("/proc/self/fd/{}/{SOCKET}", self.handle.as_raw_fd()).into()
    }

    /// Removes the files, and the directory if it was made for the box. To be called by the last of
    /// starter and init; a second time does nothing.
    pub fn remove(&self) {
        // Nothing is left to tell whom: who could not remove a file leaves it to the next start.
        let _ = fs::remove_file(self.path.join(SOCKET));
        let _ = fs::remove_file(self.path.join(LOCK));
        if self.made {
            let _ = fs::remove_dir(&self.path);
        }
    }
}

/// Connects to the box at `path`.
pub(crate) fn connect(path: &Path) -> io::Result<Channel> {
    let handle = File::open(path)?;
    let short = format!("/proc/self/fd/{}/{SOCKET}", handle.as_raw_fd());
    Channel::connect(Path::new(&short))
}

fn check_ownership(path: &Path) -> Result<(), StateError> {
    let unsuitable = |why: &str| StateError::Unsuitable { path: path.to_owned(), why: why.to_owned() };
    let io = |source| StateError::Io { what: "look at", path: path.to_owned(), source };
    // Not following a link: in /tmp anybody could have put one there.
    let found = fs::symlink_metadata(path).map_err(io)?;
    if !found.is_dir() {
        return Err(unsuitable("it is not a directory"));
    }
    if found.uid() != nix::unistd::geteuid().as_raw() {
        return Err(unsuitable("it belongs to another user"));
    }
    if found.mode() & 0o022 != 0 {
        return Err(unsuitable("others may write to it"));
    }
    for entry in fs::read_dir(path).map_err(io)? {
        let name = entry.map_err(io)?.file_name();
        if !OURS.iter().any(|ours| name == *ours) {
            return Err(unsuitable(&format!("it holds something else ({})", name.display())));
        }
    }
    Ok(())
}

/// What the lock file says about its holder; only for messages and for cleaning.
struct Claim {
    pid: String,
    made: bool,
}

impl Claim {
    fn read(file: &mut File) -> Claim {
        let mut text = String::new();
        let _ = file.seek(SeekFrom::Start(0));
        let _ = file.take(64).read_to_string(&mut text);
        let mut words = text.split_whitespace();
        let pid = words.next().filter(|pid| pid.parse::<u32>().is_ok()).unwrap_or_default();
        Claim { pid: pid.to_owned(), made: words.next() == Some("made") }
    }

    fn write(&self, file: &mut File) -> io::Result<()> {
        file.set_len(0)?;
        file.seek(SeekFrom::Start(0))?;
        let made = if self.made { "made" } else { "found" };
        file.write_all(format!("{} {made}\n", self.pid).as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_in_use_is_refused_with_its_process_and_free_again_afterwards() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("box");
        let first = StateDirectory::claim(&path).unwrap();
        assert!(matches!(StateDirectory::look(&path), Found::Running));
        let refusal = StateDirectory::claim(&path).unwrap_err().to_string();
        assert!(refusal.contains(&format!("in use by process {}", std::process::id())), "{refusal}");
        first.remove();
        assert!(!path.exists());
        drop(first);
        StateDirectory::claim(&path).unwrap().remove();
    }

    #[test]
    fn what_a_killed_box_left_is_taken_over_and_removed() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("box");
        let killed = StateDirectory::claim(&path).unwrap();
        File::create(path.join(SOCKET)).unwrap();
        drop(killed);
        assert!(matches!(StateDirectory::look(&path), Found::Stale));
        let next = StateDirectory::claim(&path).unwrap();
        assert!(!path.join(SOCKET).exists());
        next.remove();
        assert!(!path.exists());
    }

    #[test]
    fn a_directory_that_was_there_before_stays() {
        let place = tempfile::tempdir().unwrap();
        StateDirectory::claim(place.path()).unwrap().remove();
        assert!(place.path().exists());
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_with_other_files_a_file_or_a_link_is_refused() {
        let place = tempfile::tempdir().unwrap();
        fs::write(place.path().join("thesis.txt"), "").unwrap();
        let refusal = StateDirectory::claim(place.path()).unwrap_err().to_string();
        assert!(refusal.contains("thesis.txt"), "{refusal}");
        let refusal = StateDirectory::claim(&place.path().join("thesis.txt")).unwrap_err();
        assert!(refusal.to_string().contains("not a directory"));
        let link = place.path().join("link");
        std::os::unix::fs::symlink("/", &link).unwrap();
        assert!(StateDirectory::claim(&link).unwrap_err().to_string().contains("not a directory"));
    }
}
