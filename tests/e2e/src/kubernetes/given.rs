//! A cluster that somebody gives to the tests: it is theirs. A test begins where nothing of what it makes is there, and takes it
//! away at its end.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::thread;

use tempfile::TempDir;

use super::{Kubernetes, SOON, image_of_this_version};

/// Names the image on a given cluster, where that cannot pull the one of a release.
const IMAGE: &str = "JUSTMTLS_TEST_IMAGE";
/// The namespaces of the tests' manifests. What else these make for the whole cluster (a webhook, an aggregated API) is in parts
/// that need a test's own cluster.
const NAMESPACES: [&str; 3] = ["shop", "outside", "strict"];

/// The cluster that somebody wants the tests to run on.
pub(super) fn kubeconfig() -> Option<PathBuf> {
    std::env::var_os("KUBECONFIG").filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// Whether the tests run on somebody's cluster.
pub(crate) fn is_given() -> bool {
    kubeconfig().is_some()
}

impl Kubernetes {
    /// The given cluster, in which nothing is changed yet.
    #[track_caller]
    pub(super) fn given(kubeconfig: PathBuf, folder: TempDir) -> Kubernetes {
        let image = std::env::var(IMAGE).unwrap_or_else(|_| image_of_this_version());
        // What is found there is not the test's, and must survive a refusal.
        let mut cluster = Kubernetes { name: None, kubeconfig, image, folder, nodes: OnceLock::new(), is_ours: false };
        cluster.assert_untouched();
        // Too few nodes are said here, before anything is made.
        let _ = cluster.nodes();
        cluster.is_ours = true;
        cluster
    }

    #[track_caller]
    fn assert_untouched(&self) {
        let installed = self.justmtls(&["uninstall", "--dry-run"]).run().ok();
        assert!(
            installed.contains("nothing of justmtls is installed"),
            "justmtls is on the cluster of KUBECONFIG already, and a test would take it away at its end: name another cluster, or \
             run `justmtls uninstall` first"
        );
        let get = self.kubectl(&["get", "namespaces", "--ignore-not-found", "-o", "name"]).args(NAMESPACES);
        let there = get.run().ok();
        assert!(
            there.trim().is_empty(),
            "the cluster of KUBECONFIG has namespaces that a test would make, and delete at its end: name another cluster, or delete {}",
            there.split_whitespace().collect::<Vec<_>>().join(", ")
        );
    }

    /// Takes away what the test made, also where it failed.
    pub(super) fn give_back(&self) {
        // Policies first: what is used keeps its definition.
        let steps = [
            self.kubectl(&["delete", "namespace", "--ignore-not-found"]).args(NAMESPACES).within(SOON * 2),
            self.justmtls(&["uninstall", "--force"]).within(SOON * 5),
        ];
        // Each on a thread of its own: where one takes too long, its panic must neither end the process, in which the test may
        // be failing already, nor keep the next one from its turn.
        let all_ended = steps.map(|step| thread::spawn(move || step.run().ok()).join().is_ok());
        if all_ended == [true; 2] {
            return;
        }
        let left = format!(
            "something of the test is left on the cluster of KUBECONFIG: delete the namespaces {}, and run `justmtls uninstall --force`",
            NAMESPACES.join(", ")
        );
        // A second panic would hide the first.
        assert!(thread::panicking(), "{left}");
        eprintln!("{left}");
    }
}
