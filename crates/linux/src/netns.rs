//! Network namespaces: make one, find one, do something inside one.
//!
//! A [`NetNs`] is a file descriptor and nothing else: as long as it is open the namespace lives, with
//! its interfaces, rules and sockets, even when every process in it is gone. Drop it to let go (T42).

#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

/// Why a network namespace could not be made, found or entered.
#[derive(Debug, thiserror::Error)]
pub enum NetNsError {
    /// The kernel refused a new namespace: no privilege, or a limit such as `user.max_net_namespaces`.
    #[error("cannot make a network namespace at {path}: {source}")]
    Create {
        /// Where the namespace should have been bound.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
    /// There is nothing at the path, or it may not be opened.
    #[error("cannot open the network namespace {path}: {source}")]
    Open {
        /// The path that was given.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
    /// Something is there, but it is not a network namespace.
    #[error("{what} is not a network namespace")]
    NotANetworkNamespace {
        /// The path or descriptor that was given.
        what: String,
    },
    /// `setns` failed: no CAP_SYS_ADMIN over the namespace's owner.
    #[error("cannot enter network namespace {inode}: {source}")]
    Enter {
        /// The namespace's inode, as `lsns` and `/proc/PID/ns/net` show it.
        inode: u64,
        /// What the kernel answered.
        source: io::Error,
    },
}

/// A network namespace, held open.
#[derive(Debug)]
pub struct NetNs {
    fd: OwnedFd,
    inode: u64,
}

impl NetNs {
    /// Makes a new, empty network namespace and binds it to `path`, which is created as an empty file.
    /// Only `lo` is in it, and down. The caller's thread stays where it is.
    pub fn create_at(path: &Path) -> Result<NetNs, NetNsError> {
        let failed = |source: io::Error| NetNsError::Create { path: path.to_owned(), source };
        File::options().write(true).create_new(true).open(path).map_err(failed)?;
        // `unshare` moves the calling thread for good, so a thread that ends afterwards makes the
        // namespace: the caller's own threads can never be left in the wrong one.
        let made = std::thread::scope(|scope| {
            scope
                .spawn(|| bind_new_namespace(path))
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the thread that makes the namespace panicked")))
        });
        if let Err(source) = made {
            let _ = fs::remove_file(path);
            return Err(failed(source));
        }
        NetNs::open(path)
    }

    /// Opens the namespace bound at `path`, or that of a process (`/proc/PID/ns/net`).
    pub fn open(path: &Path) -> Result<NetNs, NetNsError> {
        let file = File::open(path).map_err(|source| NetNsError::Open { path: path.to_owned(), source })?;
        NetNs::checked(file.into(), || path.display().to_string())
    }

    /// The namespace that the calling thread is in.
    pub fn current() -> Result<NetNs, NetNsError> {
        NetNs::open(Path::new(OWN))
    }

    /// Takes a descriptor that somebody else opened, such as one that came over a socket.
    pub fn from_fd(fd: OwnedFd) -> Result<NetNs, NetNsError> {
        let number = fd.as_raw_fd();
        NetNs::checked(fd, || format!("descriptor {number}"))
    }

    fn checked(fd: OwnedFd, what: impl Fn() -> String) -> Result<NetNs, NetNsError> {
        // Any file can be opened; only here is it known to be what its path promised.
        if namespace_type(fd.as_fd()) != Some(libc::CLONE_NEWNET) {
            return Err(NetNsError::NotANetworkNamespace { what: what() });
        }
        let file = File::from(fd);
        let inode = file.metadata().map_err(|source| NetNsError::Open { path: what().into(), source })?.ino();
        Ok(NetNs { fd: file.into(), inode })
    }

    /// The kernel's number for this namespace: equal inodes are the same namespace, as long as one
    /// of the two is held open.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Runs `work` with the calling thread inside this namespace, and brings the thread back, also
    /// when `work` panics. Sockets that `work` makes stay in this namespace for ever.
    ///
    /// Threads that `work` starts are born inside and stay there. If the way back fails the process
    /// aborts: a thread that goes on in a stranger's namespace would speak in that pod's name.
    pub fn enter<T>(&self, work: impl FnOnce() -> T) -> Result<T, NetNsError> {
        let home = NetNs::current()?;
        self.move_thread()?;
        let _way_back = WayBack { home };
        Ok(work())
    }

    /// Moves the calling thread into this namespace, for good.
    pub fn move_thread(&self) -> Result<(), NetNsError> {
        setns(&self.fd, CloneFlags::CLONE_NEWNET)
            .map_err(|errno| NetNsError::Enter { inode: self.inode, source: errno.into() })
    }

    /// Another handle on the same namespace.
    pub fn try_clone(&self) -> io::Result<NetNs> {
        Ok(NetNs { fd: self.fd.try_clone()?, inode: self.inode })
    }

    /// Undoes [`NetNs::create_at`]: the name goes; the namespace itself goes with its last holder.
    /// A path that is not there is fine.
    pub fn remove_at(path: &Path) -> io::Result<()> {
        // MNT_DETACH: an open descriptor of somebody else must not make the name immortal.
        match umount2(path, MntFlags::MNT_DETACH) {
            Ok(()) | Err(nix::errno::Errno::EINVAL) => {}
            Err(nix::errno::Errno::ENOENT) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<NetNs> for OwnedFd {
    fn from(namespace: NetNs) -> OwnedFd {
        namespace.fd
    }
}

impl PartialEq for NetNs {
    fn eq(&self, other: &NetNs) -> bool {
        self.inode == other.inode
    }
}

impl Eq for NetNs {}

/// `thread-self`, not `self`: the latter is the main thread's namespace, whatever this thread did.
const OWN: &str = "/proc/thread-self/ns/net";

struct WayBack {
    home: NetNs,
}

impl Drop for WayBack {
    fn drop(&mut self) {
        if self.home.move_thread().is_err() {
            std::process::abort();
        }
    }
}

fn bind_new_namespace(path: &Path) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    mount(Some(OWN), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    Ok(())
}

/// Opens the network namespace that a socket belongs to.
pub(crate) fn of_socket(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    /// `linux/sockios.h`.
    const SIOCGSKNS: libc::Ioctl = 0x894c;
    // SAFETY: the request has no argument; the descriptor is open for the length of the call.
    let fd = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSKNS) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel returned a new descriptor, which nobody else has; it is close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Which kind of namespace the descriptor is (`CLONE_NEW…`), `None` when it is none at all.
fn namespace_type(fd: BorrowedFd<'_>) -> Option<libc::c_int> {
    /// `_IO(0xb7, 0x3)` of `linux/nsfs.h`.
    const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
    // SAFETY: the request has no argument; the descriptor is open for the length of the call.
    let kind = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) };
    (kind > 0).then_some(kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_current_namespace_has_the_inode_that_proc_shows() {
        let here = NetNs::current().unwrap();
        assert_eq!(here.inode(), fs::metadata(OWN).unwrap().ino());
        assert_eq!(here, here.try_clone().unwrap());
    }

    #[test]
    fn another_kind_of_namespace_or_file_is_refused_by_name() {
        for path in ["/proc/thread-self/ns/mnt", "/proc/thread-self/status"] {
            let error = NetNs::open(Path::new(path)).unwrap_err();
            assert_eq!(error.to_string(), format!("{path} is not a network namespace"));
        }
    }

    #[test]
    fn a_path_without_anything_is_named() {
        let error = NetNs::open(Path::new("/nonexistent/ns")).unwrap_err();
        assert!(error.to_string().starts_with("cannot open the network namespace /nonexistent/ns"));
    }
}
