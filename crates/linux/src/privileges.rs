//! What a process may do, and how it gives that up for good.
//!
//! Capabilities belong to a thread, not to a process: everything here acts on the calling thread, and
//! threads that start afterwards inherit. So [`give_up_all`] belongs before the first thread.

#![allow(unsafe_code)]

use std::fs;
use std::io;

use nix::errno::Errno;

/// A user and a group by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// User ID.
    pub uid: u32,
    /// Group ID; supplementary groups are dropped, so it is the only one.
    pub gid: u32,
}

/// A set of capabilities by their kernel numbers (`linux/capability.h`), as one bit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities(pub u64);

impl Capabilities {
    /// None.
    pub const NONE: Capabilities = Capabilities(0);

    /// Whatever the thread holds already.
    pub const ALL: Capabilities = Capabilities(u64::MAX);

    /// What container runtimes leave to a container that asks for nothing (containerd's default set):
    /// enough to become another user, own files and bind low ports, not to touch rules or links.
    pub const OF_A_CONTAINER: Capabilities = Capabilities(
        1 << 0 // CHOWN
            | 1 << 1 // DAC_OVERRIDE
            | 1 << 3 // FOWNER
            | 1 << 4 // FSETID
            | 1 << 5 // KILL
            | 1 << 6 // SETGID
            | 1 << 7 // SETUID
            | 1 << 8 // SETPCAP
            | 1 << NET_BIND_SERVICE
            | 1 << NET_RAW
            | 1 << 18 // SYS_CHROOT
            | 1 << 27 // MKNOD
            | 1 << 29 // AUDIT_WRITE
            | 1 << 31, // SETFCAP
    );

    /// Whether capability `number` is in the set.
    pub fn has(self, number: u32) -> bool {
        number < 64 && self.0 & (1 << number) != 0
    }
}

/// CAP_NET_BIND_SERVICE: ports below 1024.
pub const NET_BIND_SERVICE: u32 = 10;
/// CAP_NET_ADMIN: links, addresses, routes, nftables, marks.
pub const NET_ADMIN: u32 = 12;
/// CAP_NET_RAW: packet and raw sockets.
pub const NET_RAW: u32 = 13;
/// CAP_SYS_ADMIN: namespaces and mounts.
pub const SYS_ADMIN: u32 = 21;

/// Gives up everything that can be given up, without a way back: all capabilities in every set, the
/// bounding set included, new ones through exec (`no_new_privs`), core dumps and being traced or read
/// through `/proc` by others of the same user.
pub fn give_up_all() -> io::Result<()> {
    keep_only(Capabilities::NONE)?;
    no_new_privileges()?;
    hide_memory()
}

/// Becomes `user`, with no other group, and keeps `capabilities` at most: the order matters, as each
/// step needs what the next one takes. Safe to call between fork and exec: it allocates nothing.
///
/// Where only one user exists (a user namespace with a single mapping) becoming that one is fine and
/// every other is `EINVAL`.
pub fn become_user(user: User, capabilities: Capabilities) -> io::Result<()> {
    // While still privileged: dropping from the bounding set needs CAP_SETPCAP, which the change of
    // user takes away.
    limit_bounding_set(capabilities)?;
    // SAFETY: a count of zero reads nothing behind the pointer.
    match Errno::result(unsafe { libc::setgroups(0, std::ptr::null()) }) {
        Ok(_) => {}
        // `setgroups` is denied in a user namespace of an ordinary user, who holds none of its groups'
        // powers over others there. Anybody else who may not drop groups must not go on with them.
        Err(Errno::EPERM) if is_already(user) => {}
        Err(errno) => return Err(errno.into()),
    }
    // SAFETY: plain numbers.
    Errno::result(unsafe { libc::setresgid(user.gid, user.gid, user.gid) })?;
    // SAFETY: plain numbers.
    Errno::result(unsafe { libc::setresuid(user.uid, user.uid, user.uid) })?;
    // Leaving uid 0 empties the sets by itself, but somebody who was never uid 0 may hold some, too.
    limit_sets(if user.uid == 0 { capabilities } else { Capabilities::NONE })
}

/// Drops every capability that is not in `capabilities`, from all five sets of this thread.
pub fn keep_only(capabilities: Capabilities) -> io::Result<()> {
    limit_bounding_set(capabilities)?;
    limit_sets(capabilities)
}

/// All sets but the bounding set, which alone needs CAP_SETPCAP to shrink.
fn limit_sets(capabilities: Capabilities) -> io::Result<()> {
    // SAFETY: plain numbers.
    Errno::result(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) })?;
    let mut sets = [CapabilityWords::default(); 2];
    let header = CapabilityHeader { version: CAPABILITY_VERSION_3, pid: 0 };
    // SAFETY: version 3 reads and writes exactly two elements; both outlive the call.
    Errno::result(unsafe { libc::syscall(libc::SYS_capget, &header, sets.as_mut_ptr()) })?;
    for (index, set) in sets.iter_mut().enumerate() {
        let keep = (capabilities.0 >> (32 * index)) as u32;
        set.effective &= keep;
        set.permitted &= keep;
        set.inheritable = 0;
    }
    // SAFETY: as above.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &header, sets.as_ptr()) })?;
    Ok(())
}

/// From here on exec gives no privilege: set-user-ID bits and file capabilities are without effect.
pub fn no_new_privileges() -> io::Result<()> {
    // SAFETY: plain numbers.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    Ok(())
}

/// No core dump, and no reading of this process' memory by others of the same user. For everybody
/// who holds a private key (T27).
pub fn hide_memory() -> io::Result<()> {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a local that outlives the call.
    Errno::result(unsafe { libc::setrlimit(libc::RLIMIT_CORE, &none) })?;
    // SAFETY: plain numbers.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) })?;
    Ok(())
}

/// Raises the number of descriptors that this process may have open to what its starter allows, and returns it.
/// The usual soft limit (1024) is that of programs that use select(2).
pub fn raise_descriptor_limit() -> io::Result<u64> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

/// Lets the calling thread stand behind others for processor time (setpriority(2), whose process is a thread on Linux):
/// `niceness` is from 0 to 19, and what a thread has given away it does not get back.
///
/// # Errors
/// The number is lower than what the thread has.
pub fn be_nice(niceness: i32) -> io::Result<()> {
    // SAFETY: plain numbers.
    Errno::result(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, niceness) })?;
    Ok(())
}

/// What a thread holds, as the kernel tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Effective user ID.
    pub uid: u32,
    /// Effective group ID.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// What counts when the kernel asks.
    pub effective: Capabilities,
    /// What could be made effective.
    pub permitted: Capabilities,
    /// The upper bound of what exec could ever give.
    pub bounding: Capabilities,
    /// What survives exec of an ordinary file.
    pub ambient: Capabilities,
    /// Whether exec may still add privileges.
    pub no_new_privileges: bool,
}

impl Held {
    /// Nothing held and nothing to be had.
    pub fn is_nothing(&self) -> bool {
        let sets = [self.effective, self.permitted, self.bounding, self.ambient];
        self.no_new_privileges && sets.iter().all(|set| *set == Capabilities::NONE)
    }
}

/// What the calling thread holds.
pub fn describe() -> io::Result<Held> {
    parse_status(&fs::read_to_string("/proc/thread-self/status")?)
}

/// What another process holds; its `/proc/PID/status` is readable by everybody.
pub fn describe_process(pid: u32) -> io::Result<Held> {
    parse_status(&fs::read_to_string(format!("/proc/{pid}/status"))?)
}

fn parse_status(status: &str) -> io::Result<Held> {
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .map(str::trim)
            .ok_or_else(|| io::Error::other(format!("/proc status has no {name}")))
    };
    let wrong = |name: &str| io::Error::other(format!("/proc status has a strange {name}"));
    let effective_id =
        |name: &str| field(name)?.split_whitespace().nth(1).and_then(|id| id.parse().ok()).ok_or(wrong(name));
    let set = |name: &str| u64::from_str_radix(field(name)?, 16).map(Capabilities).map_err(|_| wrong(name));
    Ok(Held {
        uid: effective_id("Uid")?,
        gid: effective_id("Gid")?,
        groups: field("Groups")?.split_whitespace().filter_map(|id| id.parse().ok()).collect(),
        effective: set("CapEff")?,
        permitted: set("CapPrm")?,
        bounding: set("CapBnd")?,
        ambient: set("CapAmb")?,
        no_new_privileges: field("NoNewPrivs")? == "1",
    })
}

fn limit_bounding_set(capabilities: Capabilities) -> io::Result<()> {
    for number in 0..64 {
        if capabilities.has(number) {
            continue;
        }
        // Reading first: a process without CAP_SETPCAP may not drop, not even what is gone already.
        // SAFETY: plain numbers.
        match unsafe { libc::prctl(libc::PR_CAPBSET_READ, number, 0, 0, 0) } {
            0 => continue,
            // Beyond the last capability that this kernel knows.
            -1 => break,
            _ => {}
        }
        // SAFETY: plain numbers.
        Errno::result(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) })?;
    }
    Ok(())
}

fn is_already(user: User) -> bool {
    // SAFETY: these two cannot fail.
    unsafe { libc::geteuid() == user.uid && libc::getegid() == user.gid }
}

/// `_LINUX_CAPABILITY_VERSION_3`: two words of 32 bits in each set.
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: libc::c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilityWords {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Capabilities are per thread, so a thread of its own can lose them without harm to other tests.
    fn in_a_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
        std::thread::spawn(work).join().unwrap()
    }

    #[test]
    fn who_gives_up_holds_nothing_afterwards() {
        let before = describe().unwrap();
        let after = in_a_thread(|| {
            // An ordinary user cannot drop from the bounding set; what counts is that it is never
            // reported as done when it is not.
            let result = keep_only(Capabilities::NONE).and_then(|()| no_new_privileges());
            (result.is_ok(), describe().unwrap())
        });
        assert_eq!(after.1.is_nothing(), after.0);
        if before.effective.has(8) {
            assert!(after.0, "with CAP_SETPCAP giving up works");
        }
        assert_eq!(describe().unwrap(), before, "other threads keep what they had");
    }

    #[test]
    fn a_container_keeps_its_set_and_no_network_administration() {
        if !describe().unwrap().effective.has(8) {
            return;
        }
        let held = in_a_thread(|| {
            keep_only(Capabilities::OF_A_CONTAINER).unwrap();
            describe().unwrap()
        });
        assert!(held.effective.has(NET_BIND_SERVICE) && held.effective.has(NET_RAW));
        assert!(!held.effective.has(NET_ADMIN) && !held.bounding.has(SYS_ADMIN));
    }

    #[test]
    fn a_status_that_is_cut_off_is_an_error_not_a_zero() {
        assert!(parse_status("Name:\tx\nUid:\t0\t0\t0\t0\n").is_err());
    }
}
