//! What passes a node's link to the other nodes of a test's own cluster.

use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;

use super::Kubernetes;
use crate::program::Running;
use crate::wait::{PATIENCE, eventually};

/// Nobody listens there.
const DISCARD: u16 = 9;

/// A recording of all TCP of a node's link.
#[derive(Debug)]
pub struct LinkTap<'a> {
    cluster: &'a Kubernetes,
    node: String,
    /// An address beyond the link.
    beyond: String,
    folder: TempDir,
    recorder: Running,
}

impl LinkTap<'_> {
    /// Starts to record. When this returns, packets are being recorded.
    #[track_caller]
    pub fn start<'a>(cluster: &'a Kubernetes, node: &str, other: &str) -> LinkTap<'a> {
        let folder = tempfile::Builder::new().prefix("justmtls-e2e-").tempdir_in("/dev/shm").expect("a folder");
        let path = folder.path().join("link.pcapng").display().to_string();
        let filter = format!("tcp or udp port {DISCARD}");
        // Signals do not reach a node, and the end of the input does.
        let command = ["bash", "-c", "dumpcap \"$@\" & read -r _; kill -TERM $!; wait $!", "bash"];
        let options = ["-q", "-i", "eth0", "-B", "64", "-f", &filter, "-w", &path];
        let mut recorder = cluster.on_node(node, &command).args(options).spawn();
        recorder.wait_for("File:");
        let beyond = cluster.node_address(other);
        let tap = LinkTap { cluster, node: node.to_owned(), beyond, folder, recorder };
        tap.wait_for_a_word("begin");
        tap
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("link.pcapng")
    }

    /// Sends a datagram through the link and waits until it is in the recording: what passed before is in there, too.
    #[track_caller]
    fn wait_for_a_word(&self, word: &str) {
        let word = format!("{word}-of-{}", self.folder.path().display());
        let send = format!("echo {word} >/dev/udp/{}/{DISCARD}", self.beyond);
        eventually("the recording to reach now", PATIENCE, || {
            self.cluster.on_node(&self.node, &["bash", "-c", &send]).run().ok();
            self.saw(&word)
        });
    }

    /// Whether these bytes have passed in clear, in one piece.
    #[track_caller]
    pub fn saw(&self, marker: &str) -> bool {
        let bytes = fs::read(self.file()).expect("the recording is there");
        bytes.windows(marker.len()).any(|window| window == marker.as_bytes())
    }

    /// Ends the recording; every packet so far is in it, and none was lost. What may and what must be in it is for `judge`.
    #[track_caller]
    pub fn end(self, judge: impl FnOnce(&dyn Fn(&str) -> bool)) {
        self.wait_for_a_word("end");
        let end = self.recorder.finish(PATIENCE);
        let counted = end.stderr.lines().find(|line| line.contains("received/dropped")).unwrap_or_default();
        assert!(counted.contains("/0 ("), "the wiretap lost packets, so it proves nothing: {}", end.stderr);
        let bytes = fs::read(self.folder.path().join("link.pcapng")).expect("the recording is there");
        judge(&|marker: &str| bytes.windows(marker.len()).any(|window| window == marker.as_bytes()));
    }
}
