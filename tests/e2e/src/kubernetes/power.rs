//! Nodes of a test's own cluster: what runs on them, and their power.

use std::fs;

use super::{Kubernetes, SOON};
use crate::program::Program;
use crate::wait::wait_until;

impl Kubernetes {
    /// A program of the machine on a node.
    #[must_use]
    pub fn on_node(&self, node: &str, command: &[&str]) -> Program {
        self.verb(&["exec", node, "--"]).args(command)
    }

    /// Process ids, as the node counts them, of the product's process of a kind (`agent`, `proxy` or `control`).
    #[track_caller]
    pub fn processes(&self, node: &str, kind: &str) -> Vec<u32> {
        let script =
            "for p in /proc/[0-9]*; do printf '%s ' \"${p#/proc/}\"; tr '\\0' ' ' <$p/cmdline; echo; done 2>/dev/null";
        let all = self.on_node(node, &["sh", "-c", script]).run().ok();
        let command = format!("/justmtls {kind} ");
        all.lines()
            .filter_map(|line| line.split_once(' '))
            .filter(|(_, line)| line.trim_start().starts_with(&command))
            .filter_map(|(pid, _)| pid.parse().ok())
            .collect()
    }

    /// Sends a signal to the product's processes of a kind on a node; how many there were.
    #[track_caller]
    pub fn signal(&self, node: &str, kind: &str, signal: &str) -> usize {
        let all = self.processes(node, kind);
        for pid in &all {
            self.on_node(node, &["kill", signal, &pid.to_string()]).run().ok();
        }
        all.len()
    }

    /// Stops the API server on a node, so that it answers nobody, or lets it go on.
    #[track_caller]
    pub fn stop_api_server(&self, node: &str, stop: bool) {
        self.on_node(node, &["pkill", if stop { "-STOP" } else { "-CONT" }, "-x", "kube-apiserver"]).run().ok();
    }

    /// Kills a process of the product, and waits until another one runs in its place.
    #[track_caller]
    pub fn kill(&self, node: &str, kind: &str) {
        let before = self.processes(node, kind);
        assert_eq!(before.len(), 1, "{before:?}");
        self.on_node(node, &["kill", "-KILL", &before[0].to_string()]).run().ok();
        wait_until(&format!("another {kind} on {node}"), SOON, || match &self.processes(node, kind)[..] {
            [pid] if *pid != before[0] => Ok(()),
            other => Err(format!("{other:?}")),
        });
    }

    /// A node loses its power: nothing of it survives but its disks.
    #[track_caller]
    pub fn crash(&self, node: &str) {
        self.verb(&["crash", node]).within(SOON).run().ok();
    }

    /// What CNIs do that own their folder, while the node has no power: the primary's configuration is written anew, and every
    /// other one is removed (T9).
    #[track_caller]
    pub fn rewrite_primary(&self, node: &str) {
        let folder = self.kubeconfig.with_file_name("nodes").join(node).join("disk/etc/cni/net.d");
        let mut rewritten = 0;
        for entry in fs::read_dir(&folder).expect("the node's disk").map(Result::unwrap) {
            let own = entry.file_name().to_string_lossy().contains("justmtls");
            let text = fs::read_to_string(entry.path()).expect("a configuration");
            fs::remove_file(entry.path()).expect("the node is off");
            if !own {
                fs::write(entry.path(), format!("{text}\n")).expect("the node's disk");
                rewritten += 1;
            }
        }
        assert!(rewritten > 0, "no primary in {}", folder.display());
    }

    /// A node gets its power back.
    #[track_caller]
    pub fn boot(&self, node: &str) {
        self.verb(&["boot", node]).within(SOON).run().ok();
    }
}
