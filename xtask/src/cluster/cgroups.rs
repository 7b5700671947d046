//! A cgroup per node, in each hierarchy that the machine has, so that what the node's containers leave behind can be
//! found and taken away.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where Linux shows its cgroups.
pub(super) const ROOT: &str = "/sys/fs/cgroup";

/// The mount points of all hierarchies: one with version 2, one for each controller with version 1, or both.
pub(super) fn hierarchies() -> Result<Vec<PathBuf>> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").context("cannot read the mounts of this machine")?;
    Ok(parse(&mounts))
}

fn parse(mounts: &str) -> Vec<PathBuf> {
    let below_root = |line: &str| {
        let (mount, kind) = line.split_once(" - ")?;
        let point = mount.split_whitespace().nth(4)?;
        let is_ours = kind.starts_with("cgroup ") || kind.starts_with("cgroup2 ");
        (is_ours && Path::new(point).starts_with(ROOT)).then(|| PathBuf::from(point))
    };
    mounts.lines().filter_map(below_root).collect()
}

/// Makes the group in each hierarchy and puts this process into it.
pub(super) fn enter(group: &str) -> Result<()> {
    for hierarchy in hierarchies()? {
        let own = hierarchy.join(group);
        if !own.is_dir() {
            std::fs::create_dir(&own).with_context(|| format!("cannot make the cgroup {}", own.display()))?;
        }
        // In version 1 a new group has no processor and no memory until it is told which.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if let Ok(all) = std::fs::read_to_string(hierarchy.join(file)) {
                let _ = std::fs::write(own.join(file), all);
            }
        }
        std::fs::write(own.join("cgroup.procs"), std::process::id().to_string())
            .with_context(|| format!("cannot enter the cgroup {}", own.display()))?;
    }
    Ok(())
}

/// In a unified hierarchy a group with processes of its own can give its children no controllers: this process, which is
/// the first of the node, moves on into a child.
pub(super) fn delegate() -> Result<()> {
    let root = Path::new(ROOT);
    let Ok(controllers) = std::fs::read_to_string(root.join("cgroup.controllers")) else {
        return Ok(());
    };
    let first = root.join("init");
    std::fs::create_dir_all(&first)?;
    std::fs::write(first.join("cgroup.procs"), std::process::id().to_string())?;
    for controller in controllers.split_whitespace() {
        std::fs::write(root.join("cgroup.subtree_control"), format!("+{controller}"))
            .with_context(|| format!("cannot give the controller {controller} to the node's containers"))?;
    }
    Ok(())
}

/// Takes the group and all below it away, from each hierarchy. No process may be in it any more.
pub(super) fn remove(group: &str) -> Result<()> {
    for hierarchy in hierarchies()? {
        let own = hierarchy.join(group);
        // The last processes leave their groups a moment after they ended.
        let gone = super::life::wait_until(Duration::from_secs(10), || Ok(remove_tree(&own)))?;
        anyhow::ensure!(gone, "the cgroup {} cannot be removed: something still runs in it", own.display());
    }
    Ok(())
}

/// Whether the group is gone now.
fn remove_tree(group: &Path) -> bool {
    for entry in std::fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    let _ = std::fs::remove_dir(group);
    !group.exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_of_both_versions_are_found() {
        let mounts = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:4 - cgroup2 cgroup2 rw\n\
                      42 31 0:39 / /other rw - cgroup2 cgroup2 rw\n";
        assert_eq!(parse(mounts), [Path::new("/sys/fs/cgroup/cpu"), Path::new("/sys/fs/cgroup/unified")]);
        assert_eq!(parse("30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"), [Path::new(ROOT)]);
    }
}
