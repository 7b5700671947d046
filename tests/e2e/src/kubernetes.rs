//! A real Kubernetes: one that a test made with `cargo xtask cluster`, or the one that `KUBECONFIG` names; the product
//! installed on it, and pods that talk.

mod pods;
mod power;
mod product;
mod tap;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::cluster::binary;
use crate::program::Program;
use crate::wait::wait_until;

pub use pods::{SHOP, SHOP_IS_STRICT};

/// The cluster's program is built at the first call on a machine, which takes minutes.
const UP: Duration = Duration::from_secs(20 * 60);
/// A node has two processors at best, and starts some twenty programs.
pub(crate) const SOON: Duration = Duration::from_secs(120);
/// Names the image on a cluster that a test did not make.
const IMAGE: &str = "JUSTMTLS_TEST_IMAGE";

/// A running Kubernetes. Dropping it takes down what the test made.
#[derive(Debug)]
pub struct Kubernetes {
    /// `None`: it is somebody's.
    name: Option<String>,
    kubeconfig: PathBuf,
    /// The image of the product, as nodes have it.
    pub image: String,
    /// For the test's files, which nodes of a test's own cluster see, too.
    folder: TempDir,
}

impl Kubernetes {
    /// The cluster that `KUBECONFIG` names; else a new one with two nodes and the product's image on both.
    #[track_caller]
    pub fn up(prefix: &str) -> Kubernetes {
        // What lies elsewhere may be a node's own.
        let folder = tempfile::Builder::new().prefix("justmtls-e2e-").tempdir_in("/dev/shm").expect("a folder");
        if let Some(kubeconfig) = given() {
            let image = std::env::var(IMAGE).unwrap_or_else(|_| image_of_this_version());
            return Kubernetes { name: None, kubeconfig, image, folder };
        }
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        // Short: names of links on a machine are.
        let name = format!("{prefix}{:x}{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let kubeconfig = clusters().join(&name).join("kubeconfig");
        let cluster = Kubernetes { name: Some(name), kubeconfig, image: image_of_this_version(), folder };
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

    /// Makes or changes objects. `IMAGE` in them is the product's.
    #[track_caller]
    pub fn apply(&self, manifest: &str) {
        let manifest = manifest.replace("IMAGE", &self.image);
        self.kubectl(&["apply", "-f", "-"]).input(manifest).run().ok();
    }

    /// Deletes objects, and waits until they are gone.
    #[track_caller]
    pub fn delete(&self, manifest: &str) {
        let manifest = manifest.replace("IMAGE", &self.image);
        self.kubectl(&["delete", "--ignore-not-found", "-f", "-"]).input(manifest).run().ok();
    }

    /// The node with the control plane, and the worker.
    #[must_use]
    pub fn nodes(&self) -> [String; 2] {
        let nodes = self.get(&["nodes"]);
        let all = nodes["items"].as_array().expect("nodes").iter();
        let (first, rest): (Vec<_>, Vec<_>) =
            all.partition(|node| node["metadata"]["labels"].get("node-role.kubernetes.io/control-plane").is_some());
        let name =
            |nodes: Vec<&Value>| nodes.first().and_then(|node| node["metadata"]["name"].as_str()).map(str::to_owned);
        [name(first).expect("a control-plane node"), name(rest).expect("a worker")]
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
        if self.name.is_none() {
            return;
        }
        let down = self.verb(&["down"]).within(SOON).run();
        // A second panic would hide the first.
        if !std::thread::panicking() {
            down.ok();
            assert!(!self.kubeconfig.exists(), "{} is left", self.kubeconfig.display());
        }
    }
}

/// The cluster that somebody wants the tests to run on.
fn given() -> Option<PathBuf> {
    std::env::var_os("KUBECONFIG").filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// Where `cargo xtask cluster` keeps clusters.
fn clusters() -> PathBuf {
    std::env::var_os("KUBERNETES_CLUSTERS").map_or_else(|| PathBuf::from("/var/lib/kubernetes-clusters"), PathBuf::from)
}

fn image_of_this_version() -> String {
    format!("ghcr.io/justmtls/justmtls:{}", env!("CARGO_PKG_VERSION"))
}

/// The repository's own hand, which was built beside the product.
fn xtask() -> Program {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("the workspace").join("xtask");
    Program::new(binary().with_file_name("xtask")).env("CARGO_MANIFEST_DIR", root)
}
