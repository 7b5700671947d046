//! What passes a node's link to the other nodes of a test's own cluster.

use super::Kubernetes;
use crate::wiretap::{DISCARD, Wiretap};

impl Kubernetes {
    /// Starts to record what passes `node`'s link to the `other` node. When this returns, packets are being recorded.
    #[track_caller]
    pub fn tap(&self, node: &str, other: &str) -> Wiretap<'_> {
        let file = self.folder.path().join(format!("link-of-{node}.pcapng"));
        let (from, beyond) = (node.to_owned(), self.node_address(other));
        let send = move |word: &str| {
            let script = format!("echo \"$1\" >/dev/udp/{beyond}/{DISCARD}");
            self.on_node(&from, &["bash", "-c", &script, "bash", word])
        };
        Wiretap::record(|command| self.on_node(node, command), "eth0", file, send)
    }
}
