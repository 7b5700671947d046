//! The product's processes in the box: killed, held down, started again, upgraded.

use nix::unistd::Pid;
use serde_json::Value;

use crate::cluster::Cluster;
use crate::program::Finished;
use crate::view::text;
use crate::wait::{PATIENCE, wait_until};

/// A process that has taken another's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replaced {
    /// The one that was there.
    pub old: Pid,
    /// The one that is there now; never the same.
    pub new: Pid,
}

impl Cluster {
    /// The status' entries for a process of the product, by the name that `admin` takes.
    #[track_caller]
    pub fn process_entries(&self, name: &str) -> Vec<Value> {
        let status = self.status();
        let of_nodes = status["nodes"].as_array().into_iter().flatten();
        let lists = of_nodes.chain([&status["control"]]).filter_map(|place| place["processes"].as_array());
        lists.flatten().filter(|process| text(process, "name") == name).cloned().collect()
    }

    /// Kills a process with SIGKILL and waits until the box has started another. When this returns the old one is gone.
    #[track_caller]
    pub fn kill(&self, name: &str) -> Replaced {
        let old = self.process(name);
        self.verb(&["kill", name]).run().ok();
        self.replaced(name, old)
    }

    /// Kills a process with SIGKILL; nobody starts another until [`Cluster::resume`]. Gives the one that was.
    #[track_caller]
    pub fn hold(&self, name: &str) -> Pid {
        let old = self.process(name);
        self.verb(&["kill", name, "--hold"]).run().ok();
        assert!(is_gone(old), "process {old} of {name} lives on");
        old
    }

    /// Starts a process that is held down.
    #[track_caller]
    pub fn resume(&self, name: &str) -> Pid {
        self.verb(&["resume", name]).run().ok();
        self.process(name)
    }

    /// Puts a new process in the place of one that runs, by hand-over. The old one drains when this returns, or has ended.
    #[track_caller]
    pub fn upgrade(&self, name: &str) -> Replaced {
        let old = self.process(name);
        self.try_upgrade(name, &[]).ok();
        let new = self.process(name);
        assert_ne!(old, new, "{name} is the process that it was");
        Replaced { old, new }
    }

    /// Tries that, with options of the verb.
    #[track_caller]
    pub fn try_upgrade(&self, name: &str, options: &[&str]) -> Finished {
        self.verb(&["upgrade", name]).args(options).within(2 * PATIENCE).run()
    }

    /// Waits until another process than `old` plays its role.
    #[track_caller]
    pub fn replaced(&self, name: &str, old: Pid) -> Replaced {
        let new = wait_until(&format!("another process than {old} as {name}"), PATIENCE, || {
            Some(self.process(name)).filter(|new| *new != old).ok_or_else(|| "it is there still".to_owned())
        });
        assert!(is_gone(old), "process {old} of {name} lives on");
        Replaced { old, new }
    }
}

/// Whether a process has ended. A number is not given out again within a test.
#[must_use]
pub fn is_gone(pid: Pid) -> bool {
    !std::path::Path::new(&format!("/proc/{pid}")).exists()
}
