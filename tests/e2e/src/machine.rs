//! What is outside of every box, to be compared before and after.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

/// What the machine has that a box could leave behind.
#[derive(Debug, PartialEq, Eq)]
pub struct Machine {
    links: BTreeSet<String>,
    mounts: BTreeSet<String>,
    files: BTreeSet<PathBuf>,
}

impl Machine {
    /// As it is now.
    #[must_use]
    pub fn now() -> Machine {
        let names = |folder: &str| fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("/proc");
        // Mounts and files of other programs come and go.
        let ours = |text: &str| text.contains("justmtls") && !text.contains("justmtls-e2e-");
        let files = ["/run", "/run/netns", "/tmp", "/var/tmp", "/var/lib", "/dev/shm"].into_iter().flat_map(names);
        Machine {
            links: names("/sys/class/net").map(|path| path.display().to_string()).collect(),
            mounts: mounts.lines().filter(|line| ours(line)).map(str::to_owned).collect(),
            files: files.filter(|path| ours(&path.display().to_string())).collect(),
        }
    }
}
