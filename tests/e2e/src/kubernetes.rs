//! A real Kubernetes: one that a test made with `cargo xtask cluster`, or the one that `KUBECONFIG` names; the product
//! installed on it, and pods that talk.

mod given;
mod nodes;
mod pods;
mod power;
mod product;
mod tap;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::cluster::binary;
use crate::program::Program;
use crate::wait::wait_until;

pub(crate) use given::is_given;
pub use pods::{SHOP, SHOP_IS_STRICT};

/// The cluster's program is built at the first call on a machine, which takes minutes.
const UP: Duration = Duration::from_secs(20 * 60);
/// A node has two processors at best, and starts some twenty programs.
pub(crate) const SOON: Duration = Duration::from_secs(120);

/// A running Kubernetes. Dropping it takes down what the test made: its own cluster, or what it put into a given one.
#[derive(Debug)]
pub struct Kubernetes {
    /// `None`: it is somebody's.
    name: Option<String>,
    kubeconfig: PathBuf,
    /// The image of the product, as nodes have it.
    pub image: String,
    /// For the test's files, which nodes of a test's own cluster see, too.
    folder: TempDir,
    /// Where pods are put; the same for the whole test, whatever becomes of the nodes meanwhile.
    nodes: OnceLock<[String; 2]>,
    /// Whether what is there is the test's, to be taken down.
    is_ours: bool,
}

impl Kubernetes {
    /// The cluster that `KUBECONFIG` names, which must have nothing of what a test makes; where none is named, a new one with two
    /// nodes and the product's image on both.
    #[track_caller]
    pub fn up(prefix: &str) -> Kubernetes {
        // What lies elsewhere may be a node's own.
        let folder = tempfile::Builder::new().prefix("justmtls-e2e-").tempdir_in("/dev/shm").expect("a folder");
        if let Some(kubeconfig) = given::kubeconfig() {
            return Kubernetes::given(kubeconfig, folder);
        }
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        // Short: names of links on a machine are.
        let name = format!("{prefix}{:x}{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let kubeconfig = clusters().join(&name).join("kubeconfig");
        let (image, nodes) = (image_of_this_version(), OnceLock::new());
        let cluster = Kubernetes { name: Some(name), kubeconfig, image, folder, nodes, is_ours: true };
        cluster.verb(&["up"]).within(UP).run().ok();
        cluster.load_image();
        cluster
    }

    /// Puts the product's image onto both nodes.
    #[track_caller]
    fn load_image(&self) {
        let archive = self.folder.path().join("image.tar");
        xtask().args(["image", "--output"]).args([&archive]).within(UP).run().ok();
        self.verb(&["load"]).args([&archive]).within(SOON).run().ok();
        // The folder is memory, and the nodes have it now.
        std::fs::remove_file(&archive).expect("it was written");
    }

    /// A verb of `cargo xtask cluster` on it.
    #[must_use]
    pub fn verb(&self, arguments: &[&str]) -> Program {
        let name = self.name.as_deref().expect("only a test's own cluster has nodes that it may touch");
        xtask().args(["cluster", "--name", name]).args(arguments)
    }

    /// `kubectl` on it.
    #[must_use]
    pub fn kubectl(&self, arguments: &[&str]) -> Program {
        let own = self.kubeconfig.with_file_name("bin").join("kubectl");
        let program = if self.name.is_some() { own } else { PathBuf::from("kubectl") };
        Program::new(program).args(["--kubeconfig"]).args([&self.kubeconfig]).args(arguments).within(SOON)
    }

    /// `justmtls` on it.
    #[must_use]
    pub fn justmtls(&self, arguments: &[&str]) -> Program {
        Program::new(binary()).args(arguments).args(["--kubeconfig"]).args([&self.kubeconfig]).within(SOON)
    }

    /// What `kubectl get … -o json` says.
    #[track_caller]
    pub fn get(&self, what: &[&str]) -> Value {
        let said = self.kubectl(&["get", "-o", "json"]).args(what).run().ok();
        serde_json::from_str(&said).expect("kubectl prints JSON")
    }

    /// Makes or changes objects. `IMAGE` in them is the product's; `FIRST-NODE` and `WORKER-NODE` are [`Self::nodes`].
    #[track_caller]
    pub fn apply(&self, manifest: &str) {
        let manifest = self.filled(manifest);
        self.kubectl(&["apply", "-f", "-"]).input(manifest).run().ok();
    }

    /// Deletes objects, and waits until they are gone.
    #[track_caller]
    pub fn delete(&self, manifest: &str) {
        let manifest = self.filled(manifest);
        self.kubectl(&["delete", "--ignore-not-found", "-f", "-"]).input(manifest).run().ok();
    }

    #[track_caller]
    fn filled(&self, manifest: &str) -> String {
        let [first, worker] = self.nodes();
        manifest.replace("IMAGE", &self.image).replace("FIRST-NODE", &first).replace("WORKER-NODE", &worker)
    }

    /// Two nodes: in a test's own cluster the one with the control plane, and the worker; else two that take pods.
    #[track_caller]
    #[must_use]
    pub fn nodes(&self) -> [String; 2] {
        let choose = || {
            let two = nodes::chosen(&self.get(&["nodes"]));
            two.expect("the tests need two Linux nodes that are ready and not cordoned, one of them without a taint")
        };
        self.nodes.get_or_init(choose).clone()
    }

    /// The address of a node, as others reach it.
    #[track_caller]
    #[must_use]
    pub fn node_address(&self, node: &str) -> String {
        let node = self.get(&["node", node]);
        let all = node["status"]["addresses"].as_array().into_iter().flatten();
        let mut own = all.filter(|it| it["type"] == "InternalIP").filter_map(|it| it["address"].as_str());
        own.find(|address| address.contains('.')).expect("an address of IPv4").to_owned()
    }

    /// Waits until a rollout is over.
    #[track_caller]
    pub fn rolled_out(&self, namespace: &str, what: &str) {
        let limit = format!("--timeout={}s", SOON.as_secs());
        self.kubectl(&["-n", namespace, "rollout", "status", what, &limit]).within(SOON * 2).run().ok();
    }

    /// Waits until something that `kubectl get` shows is so.
    #[track_caller]
    pub fn wait_for(&self, what: &str, get: &[&str], holds: impl Fn(&Value) -> bool) {
        wait_until(what, SOON, || {
            let seen = self.kubectl(&["get", "-o", "json"]).args(get).run();
            let value: Value = serde_json::from_str(&seen.stdout).unwrap_or_default();
            if holds(&value) { Ok(()) } else { Err(format!("{seen}")) }
        });
    }
}

impl Drop for Kubernetes {
    fn drop(&mut self) {
        if !self.is_ours {
            return;
        }
        if self.name.is_none() {
            return self.give_back();
        }
        let down = self.verb(&["down"]).within(SOON).run();
        // A second panic would hide the first.
        if !std::thread::panicking() {
            down.ok();
            assert!(!self.kubeconfig.exists(), "{} is left", self.kubeconfig.display());
        }
    }
}

/// Where `cargo xtask cluster` keeps clusters.
fn clusters() -> PathBuf {
    std::env::var_os("KUBERNETES_CLUSTERS").map_or_else(|| PathBuf::from("/var/lib/kubernetes-clusters"), PathBuf::from)
}

fn image_of_this_version() -> String {
    format!("ghcr.io/justmtls/justmtls:{}", env!("CARGO_PKG_VERSION"))
}

/// The repository's own hand, which was built beside the product.
#[must_use]
pub fn xtask() -> Program {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("the workspace").join("xtask");
    Program::new(binary().with_file_name("xtask")).env("CARGO_MANIFEST_DIR", root)
}
