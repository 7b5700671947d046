//! A box: a process tree with its own process ids, mounts, network, host name and IPC objects, that
//! goes with its init.
//!
//! Everything that is made inside is held by namespaces of the box alone, so the death of init is the
//! whole clean-up: the kernel ends every process of the pid namespace, then the mounts and interfaces
//! have no holder left. Nothing is ever mounted, linked or configured outside.

#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::SigSet;
use nix::unistd::{ForkResult, Gid, Uid, fork, pipe2, setsid};

use crate::privileges::{self, Capabilities, User};

/// Where a box keeps what must vanish with it: a tmpfs that exists in the box's mount namespace only.
pub const RUN: &str = "/run/justmtls";

/// By which right the box is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Authority {
    /// The starter administers the machine (CAP_SYS_ADMIN and CAP_NET_ADMIN).
    Root,
    /// The starter is an ordinary user: the box has a user namespace in which only that user exists,
    /// as uid 0.
    UserNamespace,
}

/// Why no box could be made. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A user namespace needs a process without threads, and so does fork.
    #[error("a box cannot be made by a process that has threads already (it has {0})")]
    Threads(usize),
    /// The kernel or its administrator does not let this user make user namespaces.
    #[error("an ordinary user may not make a box here: {reason}; {remedy}, or run as root")]
    UserNamespaces {
        /// What stands in the way, as far as the kernel lets one see.
        reason: String,
        /// The setting that would allow it.
        remedy: &'static str,
    },
    /// A step failed.
    #[error("cannot make the box: {step} failed: {source}{hint}")]
    Step {
        /// Which one.
        step: Step,
        /// What the kernel answered.
        source: io::Error,
        /// What probably helps; may be empty.
        hint: &'static str,
    },
}

/// The steps in which a box is made, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// The new pid namespace and its first process.
    ProcessNamespace,
    /// Mount, network, host name and IPC namespaces.
    Namespaces,
    /// Cutting the mounts off from the machine's.
    Propagation,
    /// A fresh `/proc`, which shows the box's processes.
    Proc,
    /// Memory-only `/run` and `/dev/shm`.
    Memory,
}

impl Step {
    const ALL: [Step; 5] = [Step::ProcessNamespace, Step::Namespaces, Step::Propagation, Step::Proc, Step::Memory];

    fn hint(self) -> &'static str {
        match self {
            Step::Proc => " (in a container: /proc is partly hidden there; run the container privileged)",
            Step::Namespaces => {
                " (AppArmor or another security module may restrict user namespaces: \
                 on Ubuntu set kernel.apparmor_restrict_unprivileged_userns=0, or run as root)"
            }
            Step::ProcessNamespace | Step::Propagation | Step::Memory => "",
        }
    }
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Step::ProcessNamespace => "making a process namespace",
            Step::Namespaces => "making mount, network and host name namespaces",
            Step::Propagation => "separating the mounts",
            Step::Proc => "mounting a fresh /proc",
            Step::Memory => "mounting memory on /run",
        })
    }
}

/// The starter's side of a box: its init as a child process.
#[derive(Debug)]
pub struct Init {
    /// Init's process id as the starter sees it.
    pub pid: u32,
    /// A handle that cannot mean another process later; readable when init has ended.
    pub handle: OwnedFd,
}

/// Makes a box and runs `body` as its init (pid 1), whose result is the exit status. Returns in the
/// starter when the box stands, or says which step failed.
///
/// The caller must be without threads. As an ordinary user the caller itself moves into the box's user
/// namespace, for good, which takes nothing away from it.
pub fn start(body: impl FnOnce(Authority) -> i32) -> Result<Init, SandboxError> {
    let threads = fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads != 1 {
        return Err(SandboxError::Threads(threads));
    }
    let authority = authority();
    if authority == Authority::UserNamespace {
        enter_new_user_namespace()?;
    }
    let failed = |errno: Errno| step_failed(Step::ProcessNamespace, errno);
    unshare(CloneFlags::CLONE_NEWPID).map_err(failed)?;
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).map_err(failed)?;
    // SAFETY: there is one thread, so the child may do what any program may.
    match unsafe { fork() }.map_err(failed)? {
        ForkResult::Child => {
            drop(reader);
            std::process::exit(run_init(authority, writer, body));
        }
        ForkResult::Parent { child } => {
            drop(writer);
            let handle = process_handle(child.as_raw() as u32)
                .map_err(|error| step_failed(Step::ProcessNamespace, errno_of(&error)))?;
            read_verdict(reader)?;
            Ok(Init { pid: child.as_raw() as u32, handle })
        }
    }
}

/// On which side of a fork one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The process that was there before.
    Parent,
    /// The new one, in a session of its own, with nothing to read and nowhere to write.
    Background,
}

/// Splits off a process that outlives the caller's terminal. The caller must be without threads.
pub fn fork_to_background() -> io::Result<Side> {
    // SAFETY: without threads the child may do what any program may.
    match unsafe { fork() }? {
        ForkResult::Parent { .. } => Ok(Side::Parent),
        ForkResult::Child => {
            setsid()?;
            let null = File::options().read(true).write(true).open("/dev/null")?;
            for standard in 0..=2 {
                // SAFETY: both descriptors are open; standard input, output and error have no owner
                // in Rust that could mind being pointed elsewhere.
                Errno::result(unsafe { libc::dup2(null.as_raw_fd(), standard) })?;
            }
            Ok(Side::Background)
        }
    }
}

/// Ends this process here and now, whatever its other threads hold: for an init that must go.
pub fn end_now(status: i32) -> ! {
    // SAFETY: the call does not return; the kernel releases everything.
    unsafe { libc::_exit(status) }
}

/// By which right this process would make a box.
pub fn authority() -> Authority {
    let may = privileges::describe()
        .is_ok_and(|held| held.effective.has(privileges::SYS_ADMIN) && held.effective.has(privileges::NET_ADMIN));
    if may { Authority::Root } else { Authority::UserNamespace }
}

/// A handle on a process (`pidfd_open`, Linux 5.3): it never comes to mean another one, becomes
/// readable at the end, and keeps its meaning when it is sent into another pid namespace.
pub fn process_handle(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers; the result is a new descriptor that nobody else owns.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: as above; descriptors fit an int.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// The process id behind a handle, in the caller's own numbering; `None` when it has ended or is not
/// visible from here.
pub fn process_id(handle: BorrowedFd<'_>) -> Option<u32> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", handle.as_raw_fd())).ok()?;
    let pid = info.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse().ok()?;
    (pid > 0).then_some(pid)
}

/// Makes a mount namespace that starts as a copy of the caller's, lets `furnish` change it, and
/// returns it. The caller's own mounts stay as they are.
pub fn mount_namespace(furnish: impl FnOnce() -> io::Result<()> + Send) -> io::Result<OwnedFd> {
    // A thread of its own: unsharing moves a thread for good.
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS)?;
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)?;
            furnish()?;
            Ok(File::open("/proc/thread-self/ns/mnt")?.into())
        });
        worker.join().unwrap_or_else(|_| Err(io::Error::other("furnishing a mount namespace panicked")))
    })
}

/// Where and as whom a program is to run.
#[derive(Debug)]
pub struct Place {
    /// The mount namespace, if another than the caller's.
    pub mount: Option<OwnedFd>,
    /// The network namespace, if another than the caller's.
    pub net: Option<OwnedFd>,
    /// Host name and IPC namespaces, if others than the caller's.
    pub others: Vec<OwnedFd>,
    /// The working directory inside; `/` where it does not exist.
    pub directory: PathBuf,
    /// Whom to become; `None` stays who the caller is.
    pub user: Option<User>,
    /// What to keep at most.
    pub capabilities: Capabilities,
    /// Whether the program is killed when the thread that started it ends.
    pub dies_with_caller: bool,
}

/// Arranges for `command` to run in `place`, where its program is looked up, too.
pub fn run_in(command: &mut Command, place: Place) {
    use std::os::unix::ffi::OsStrExt;
    let directory = std::ffi::CString::new(place.directory.as_os_str().as_bytes()).unwrap_or_default();
    let enter = move || {
        for namespace in place.others.iter().chain(&place.net).chain(&place.mount) {
            setns(namespace, CloneFlags::empty())?;
        }
        // SAFETY: terminated strings that live in the closure. Allocation would not be safe here, as
        // the child of a program with threads may find the allocator locked.
        if unsafe { libc::chdir(directory.as_ptr()) } != 0 {
            // SAFETY: as above.
            Errno::result(unsafe { libc::chdir(c"/".as_ptr()) })?;
        }
        match place.user {
            Some(user) => privileges::become_user(user, place.capabilities)?,
            None => privileges::keep_only(place.capabilities)?,
        }
        // The library hands the caller's mask on; a program would never see what is blocked in it.
        SigSet::empty().thread_set_mask()?;
        if place.dies_with_caller {
            // Last: a change of user takes it back.
            // SAFETY: plain numbers.
            Errno::result(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })?;
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls and touches memory that it owns; it allocates nothing.
    unsafe { command.pre_exec(enter) };
}

/// Moves the caller into a box from outside: its user namespace (where it has one), and, for the
/// programs that it starts from now on, its pid namespace. The caller must be without threads, and
/// cannot start any afterwards.
pub fn enter_box(user: Option<BorrowedFd<'_>>, pid: BorrowedFd<'_>) -> io::Result<()> {
    if let Some(user) = user {
        setns(user, CloneFlags::CLONE_NEWUSER)?;
    }
    setns(pid, CloneFlags::CLONE_NEWPID)?;
    Ok(())
}

// ---- init's side -------------------------------------------------------------------------------

fn run_init(authority: Authority, verdict: OwnedFd, body: impl FnOnce(Authority) -> i32) -> i32 {
    let mut verdict = File::from(verdict);
    match furnish() {
        Ok(()) => {
            // If nobody reads, the starter is gone; `body` will notice by its own means.
            let _ = verdict.write_all(&[STANDS, 0, 0, 0, 0]);
            drop(verdict);
            body(authority)
        }
        Err((step, errno)) => {
            let [a, b, c, d] = (errno as i32).to_be_bytes();
            let _ = verdict.write_all(&[step as u8, a, b, c, d]);
            1
        }
    }
}

/// The byte that says that all steps are done; greater than every step.
const STANDS: u8 = 0xff;

fn read_verdict(reader: OwnedFd) -> Result<(), SandboxError> {
    let mut verdict = [0; 5];
    let read = File::from(reader).read_exact(&mut verdict);
    let [step, errno @ ..] = verdict;
    if read.is_ok() && step == STANDS {
        return Ok(());
    }
    // Init that died without a word was killed from outside.
    let step = Step::ALL.get(usize::from(step)).copied().filter(|_| read.is_ok());
    let errno = if read.is_ok() { Errno::from_raw(i32::from_be_bytes(errno)) } else { Errno::EINTR };
    Err(step_failed(step.unwrap_or(Step::ProcessNamespace), errno))
}

fn furnish() -> Result<(), (Step, Errno)> {
    // Its own session: Ctrl-C at the starter's terminal reaches the starter, which ends the box in
    // order, instead of killing programs at random.
    setsid().map_err(|errno| (Step::ProcessNamespace, errno))?;
    let all = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC;
    unshare(all).map_err(|errno| (Step::Namespaces, errno))?;
    // A slave: what the machine unmounts goes here as well, so a running box keeps no disk busy, and
    // nothing that is mounted here gets out.
    let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(None::<&str>, "/", None::<&str>, slave, None::<&str>).map_err(|errno| (Step::Propagation, errno))?;
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), plain, None::<&str>).map_err(|errno| (Step::Proc, errno))?;
    private_memory().map_err(|error| (Step::Memory, errno_of(&error)))?;
    let name = "justmtls";
    // SAFETY: pointer and length belong to the same string.
    Errno::result(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) })
        .map(drop)
        .map_err(|errno| (Step::Namespaces, errno))
}

/// `/run` becomes memory of the box, with what the machine has there carried over; programs that leave
/// their pid files there leave them in the box. `/dev/shm` likewise, but empty.
fn private_memory() -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    if Path::new("/dev/shm").is_dir() {
        mount(Some("tmpfs"), "/dev/shm", Some("tmpfs"), flags, Some("mode=1777"))?;
    }
    let old = File::open("/run")?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), flags, Some("mode=0755"))?;
    // The directory that is now covered is still reachable by its descriptor.
    let old = PathBuf::from(format!("/proc/self/fd/{}", old.as_fd().as_raw_fd()));
    for entry in fs::read_dir(&old)?.flatten() {
        // An entry that cannot be carried over is missing in the box, which is no reason for no box.
        let _ = carry_over(&old.join(entry.file_name()), &Path::new("/run").join(entry.file_name()));
    }
    fs::create_dir(RUN)
}

fn carry_over(from: &Path, to: &Path) -> io::Result<()> {
    let kind = fs::symlink_metadata(from)?.file_type();
    if kind.is_symlink() {
        return symlink(fs::read_link(from)?, to);
    }
    if kind.is_dir() {
        fs::create_dir(to)?;
    } else {
        File::create_new(to)?;
    }
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)?;
    Ok(())
}

// ---- an ordinary user --------------------------------------------------------------------------

fn enter_new_user_namespace() -> Result<(), SandboxError> {
    let (uid, gid) = (Uid::effective(), Gid::effective());
    unshare(CloneFlags::CLONE_NEWUSER).map_err(why_no_user_namespace)?;
    // `setgroups` must be given up before a group may be mapped without privilege (user_namespaces(7)).
    let maps = fs::write("/proc/self/setgroups", "deny")
        .and_then(|()| fs::write("/proc/self/uid_map", format!("0 {uid} 1")))
        .and_then(|()| fs::write("/proc/self/gid_map", format!("0 {gid} 1")));
    maps.map_err(|error| SandboxError::UserNamespaces {
        reason: format!("the user could not be mapped ({error})"),
        remedy: "check the policy of this machine's security module",
    })
}

fn why_no_user_namespace(errno: Errno) -> SandboxError {
    let setting = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned()).ok();
    let off = |path: &str| setting(path).as_deref() == Some("0");
    if errno == Errno::EINVAL {
        return SandboxError::UserNamespaces {
            reason: "this kernel has no user namespaces".into(),
            remedy: "use a kernel with CONFIG_USER_NS",
        };
    }
    if off("/proc/sys/kernel/unprivileged_userns_clone") {
        return SandboxError::UserNamespaces {
            reason: "user namespaces are for root only (kernel.unprivileged_userns_clone=0)".into(),
            remedy: "set kernel.unprivileged_userns_clone=1",
        };
    }
    if errno == Errno::ENOSPC || off("/proc/sys/user/max_user_namespaces") {
        let limit = setting("/proc/sys/user/max_user_namespaces").unwrap_or_else(|| "unknown".into());
        return SandboxError::UserNamespaces {
            reason: format!("no further user namespace is allowed (user.max_user_namespaces={limit})"),
            remedy: "raise user.max_user_namespaces",
        };
    }
    SandboxError::UserNamespaces {
        reason: format!("the kernel refused a user namespace ({errno})"),
        remedy: "inside a container allow the unshare system call",
    }
}

fn step_failed(step: Step, errno: Errno) -> SandboxError {
    let hint = if matches!(errno, Errno::EPERM | Errno::EACCES) { step.hint() } else { "" };
    SandboxError::Step { step, source: errno.into(), hint }
}

fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
