//! Privilege for a test: network namespaces of its own, as root or as an ordinary user.

use std::process::Command;

use linux::netns::NetNs;
use nix::sched::{CloneFlags, unshare};

/// Runs `work` where it may make and change network namespaces, starting in an empty one.
///
/// Root gets a thread in a new namespace. Another user gets the test run again, in a new process that is
/// root of a user namespace: a process with threads cannot enter one. `test` is the test's own function,
/// for its name.
pub(crate) fn with_privilege<F: Fn()>(_test: F, work: impl FnOnce() + Send) {
    if nix::unistd::geteuid().is_root() {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).expect("root may make network namespaces");
                work();
            });
        });
        return;
    }
    let name = std::any::type_name::<F>();
    let name = name.split_once("::").map_or(name, |(_crate, name)| name);
    let again = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "--mount"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .status()
        .expect("unshare (util-linux) can be run");
    assert!(again.success(), "the test failed in its user namespace");
}

/// A new, empty network namespace that lives as long as the value.
pub(crate) fn new_namespace() -> NetNs {
    std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace can be made");
        NetNs::current().unwrap()
    })
    .join()
    .unwrap()
}
