//! A box that a test made, and what one does with it: the verbs of `justmtls demo`.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::program::{Finished, Program, Running};
use crate::requirements::as_ordinary_user;
use crate::script;
use crate::view::{Family, text};
use crate::wait::{PATIENCE, pause, wait_until};

/// The place outside the cluster that answers, as `exec --node outside` reaches it.
pub const OUTSIDE: [&str; 2] = ["203.0.113.1", "2001:db8::1"];

/// How long a box may take to come up on a busy machine, its certificates included.
const START: Duration = Duration::from_secs(40);

/// The product's binary: what xtask names, or what cargo built beside the tests.
#[must_use]
pub fn binary() -> PathBuf {
    if let Some(named) = std::env::var_os("JUSTMTLS_BIN") {
        return named.into();
    }
    let test = std::env::current_exe().expect("a test has a path");
    let beside = test.ancestors().nth(2).map(|folder| folder.join("justmtls"));
    let found = beside.filter(|path| path.is_file());
    found.expect("build the binary first: `cargo xtask test` does, and so does `cargo build --release`")
}

/// Whose box it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The user that runs the test.
    Caller,
    /// An ordinary user; root becomes one for it.
    Ordinary,
}

/// A running box. Dropping it stops it and checks that nothing of it is left.
#[derive(Debug)]
pub struct Cluster {
    folder: TempDir,
    binary: PathBuf,
    owner: Owner,
    traces: Traces,
}

/// What would show that a box is still there.
#[derive(Debug)]
struct Traces {
    starter: u32,
    /// The name of its pid namespace, as in `pid:[4026532201]`.
    namespace: PathBuf,
}

impl Cluster {
    /// Makes a box with these objects and waits until all its pods are ready.
    #[track_caller]
    pub fn start(manifest: &str) -> Cluster {
        Cluster::start_as(Owner::Caller, manifest)
    }

    /// The same, with options of `demo start`.
    #[track_caller]
    pub fn start_with(options: &[&str], manifest: &str) -> Cluster {
        Cluster::make(Owner::Caller, options, manifest)
    }

    /// The same, for somebody.
    #[track_caller]
    pub fn start_as(owner: Owner, manifest: &str) -> Cluster {
        Cluster::make(owner, &[], manifest)
    }

    #[track_caller]
    fn make(owner: Owner, options: &[&str], manifest: &str) -> Cluster {
        let folder = tempfile::Builder::new().prefix("justmtls-e2e-").tempdir().expect("a folder for the test");
        // Programs that run as other users in pods have their data below.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).expect("our own folder");
        fs::create_dir(folder.path().join("manifests")).expect("our own folder");
        fs::write(folder.path().join("manifests/all.yaml"), manifest).expect("our own folder");
        let binary = Cluster::binary_for(owner, folder.path());
        let (state, manifests) = (folder.path().join("state"), folder.path().join("manifests"));
        let start = ["start", "--manifests", manifests.to_str().expect("a path of ours")];
        verb(owner, &binary, &state, &start).args(options).within(START).run().ok();
        let traces = Traces::of(&state);
        let cluster = Cluster { folder, binary, owner, traces };
        let status = cluster.status();
        assert!(status["ready"].as_bool() == Some(true), "the box is not ready: {status:#}");
        cluster
    }

    /// Cargo's folder may lie where only its owner can go.
    fn binary_for(owner: Owner, folder: &Path) -> PathBuf {
        if owner == Owner::Caller {
            return binary();
        }
        let copy = folder.join("justmtls");
        fs::copy(binary(), &copy).expect("a copy of the binary");
        copy
    }

    /// A folder for the test's files that every user may use; it goes with the box.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A new folder below, for one program's data, that every user may write to.
    #[track_caller]
    pub fn data(&self, name: &str) -> PathBuf {
        let path = self.folder().join(name);
        fs::create_dir(&path).expect("a name that no other test uses");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).expect("our own folder");
        path
    }

    /// The state directory.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.folder().join("state")
    }

    /// Any verb of `justmtls demo` on this box.
    #[must_use]
    pub fn verb(&self, arguments: &[&str]) -> Program {
        verb(self.owner, &self.binary, &self.state(), arguments)
    }

    /// A program in a pod (`NAMESPACE/POD`).
    #[must_use]
    pub fn exec(&self, pod: &str, command: &[&str]) -> Program {
        self.verb(&["exec", pod, "--"]).args(command)
    }

    /// A program in a pod with options of `exec`.
    #[must_use]
    pub fn exec_with(&self, options: &[&str], pod: &str, command: &[&str]) -> Program {
        self.verb(&["exec"]).args(options).args([pod, "--"]).args(command)
    }

    /// A program on a node, or at `outside` or `control`.
    #[must_use]
    pub fn on_node(&self, node: &str, command: &[&str]) -> Program {
        self.verb(&["exec", "--node", node, "--"]).args(command)
    }

    /// A verb of `programs/tcp.py` in a pod.
    #[must_use]
    pub fn tcp(&self, pod: &str, arguments: &[&str]) -> Program {
        self.exec(pod, &["/usr/bin/python3", &script("tcp.py")]).args(arguments)
    }

    /// The same on a node, or at `outside`.
    #[must_use]
    pub fn tcp_on(&self, node: &str, arguments: &[&str]) -> Program {
        self.on_node(node, &["/usr/bin/python3", &script("tcp.py")]).args(arguments)
    }

    /// A server of `programs/tcp.py` in a pod, listening.
    #[track_caller]
    pub fn serve(&self, pod: &str, arguments: &[&str]) -> Running {
        let mut server = self.tcp(pod, arguments).spawn();
        server.wait_for("ready");
        server
    }

    /// Creates or changes objects.
    #[track_caller]
    pub fn apply(&self, manifest: &str) {
        self.try_apply(manifest).ok();
    }

    /// Tries to create or change objects.
    #[track_caller]
    pub fn try_apply(&self, manifest: &str) -> Finished {
        self.verb(&["apply", "-f", "-"]).input(manifest).run()
    }

    /// Removes objects.
    #[track_caller]
    pub fn delete(&self, manifest: &str) {
        self.verb(&["delete", "-f", "-"]).input(manifest).run().ok();
    }

    /// The box's own account of itself.
    #[track_caller]
    pub fn status(&self) -> Value {
        let status = self.verb(&["status", "--json"]).run().ok();
        serde_json::from_str(&status).expect("status --json prints JSON")
    }

    /// A pod's entry in the status.
    #[track_caller]
    pub fn pod(&self, pod: &str) -> Value {
        self.find_pod(pod).unwrap_or_else(|| panic!("there is no pod {pod}"))
    }

    /// The same, if it is there.
    #[track_caller]
    pub fn find_pod(&self, pod: &str) -> Option<Value> {
        let status = self.status();
        let mut all = status["pods"].as_array().into_iter().flatten();
        let is_it = |one: &&Value| format!("{}/{}", text(one, "namespace"), text(one, "name")) == pod;
        all.rfind(is_it).cloned()
    }

    /// A pod's address.
    #[track_caller]
    pub fn address(&self, pod: &str, family: Family) -> IpAddr {
        family.of(&self.pod(pod)["addresses"])
    }

    /// A port of a pod.
    #[track_caller]
    pub fn socket(&self, pod: &str, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.address(pod, family), port)
    }

    /// A Service's cluster IP.
    #[track_caller]
    pub fn service(&self, namespace: &str, name: &str, family: Family) -> IpAddr {
        let status = self.status();
        let mut all = status["services"].as_array().into_iter().flatten();
        let found = all.find(|one| text(one, "namespace") == namespace && text(one, "name") == name);
        family.of(&found.unwrap_or_else(|| panic!("there is no Service {namespace}/{name}"))["addresses"])
    }

    /// A page of a process' admin socket: `node-a`, `agent@node-a`, `control`.
    #[track_caller]
    pub fn page(&self, process: &str, path: &str) -> String {
        self.verb(&["admin", process, path]).run().ok()
    }

    /// A number of a process' metrics that has no labels, by its whole name.
    #[track_caller]
    pub fn metric(&self, process: &str, name: &str) -> i64 {
        let page = self.page(process, "/metrics");
        let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let value = value.unwrap_or_else(|| panic!("{process} has no {name}:\n{page}"));
        value.trim().parse().unwrap_or_else(|error| panic!("{process} {name} {value}: {error}"))
    }

    /// The same, as JSON.
    #[track_caller]
    pub fn admin(&self, process: &str, path: &str) -> Value {
        let page = self.page(process, path);
        serde_json::from_str(&page).unwrap_or_else(|error| panic!("{process} {path}: {error} in {page}"))
    }

    /// Waits until `node`'s proxy lists an edge with this direction, source, destination, port, security and reason. Edges are
    /// listed once their connections have ended.
    #[track_caller]
    pub fn wait_edge(&self, node: &str, wanted: [&str; 6]) {
        wait_until(&format!("{node} to list {wanted:?}"), PATIENCE, || {
            let all = self.edges(node);
            if all.iter().any(|edge| edge == &wanted) { Ok(()) } else { Err(format!("{all:#?}")) }
        });
    }

    /// All edges that `node`'s proxy lists, each as for [`Cluster::wait_edge`].
    #[track_caller]
    pub fn edges(&self, node: &str) -> Vec<[String; 6]> {
        let coverage = self.admin(node, "/coverage");
        let all = coverage.as_array().into_iter().flatten().map(|entry| &entry["edge"]);
        let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        all.map(|edge| {
            ["direction", "source", "destination", "port", "security", "reason"].map(|field| plain(&edge[field]))
        })
        .collect()
    }

    /// The process id of a running process of the product, by the name that `admin` takes: `node-a` is that node's proxy.
    #[track_caller]
    pub fn process(&self, name: &str) -> Pid {
        wait_until(&format!("the process {name}"), PATIENCE, || {
            let status = self.status();
            let of_nodes = status["nodes"].as_array().into_iter().flatten();
            let lists = of_nodes.chain([&status["control"]]).filter_map(|place| place["processes"].as_array());
            let found =
                lists.flatten().find(|process| text(process, "name") == name && text(process, "state") == "running");
            let pid = found.and_then(|process| i32::try_from(process["pid"].as_i64()?).ok());
            pid.map(Pid::from_raw).ok_or_else(|| format!("{:#} {:#}", status["nodes"], status["control"]))
        })
    }

    /// Waits until all pods are ready.
    #[track_caller]
    pub fn wait_ready(&self) {
        wait_until("all pods to be ready", PATIENCE, || {
            let status = self.status();
            if status["ready"].as_bool() == Some(true) { Ok(()) } else { Err(format!("{:#}", status["pods"])) }
        });
    }

    /// Waits until something in the pod listens on a TCP port.
    #[track_caller]
    pub fn wait_listening(&self, pod: &str, port: u16) {
        let local = format!(":{port:04X} ");
        wait_until(&format!("a listener on port {port} of {pod}"), PATIENCE, || {
            let tables = self.exec(pod, &["cat", "/proc/net/tcp", "/proc/net/tcp6"]).run().ok();
            let listens = |line: &str| line.contains(&local) && line.split_whitespace().nth(3) == Some("0A");
            if tables.lines().any(listens) { Ok(()) } else { Err("nobody listens".to_owned()) }
        });
    }

    /// The process ids, as the test sees them, of all processes of the box.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        self.traces.processes()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let stopped = self.verb(&["stop"]).within(START).run();
        // The starter's last act is to end; who stopped the box need not have seen that.
        let deadline = Instant::now() + Duration::from_secs(2);
        while is_alive(self.traces.starter) && Instant::now() < deadline {
            pause();
        }
        let state = self.state();
        let left = [
            (!stopped.success()).then(|| format!("stop failed: {stopped}")),
            state.exists().then(|| format!("{} is still there", state.display())),
            Some(self.traces.processes()).filter(|all| !all.is_empty()).map(|all| format!("processes {all:?} live")),
            is_alive(self.traces.starter).then(|| "its starter lives".to_owned()),
        ];
        let left: Vec<_> = left.into_iter().flatten().collect();
        if std::thread::panicking() {
            left.iter().for_each(|one| eprintln!("after the failure: {one}"));
        } else {
            assert!(left.is_empty(), "a stopped box left something behind: {left:?}");
        }
    }
}

/// A command line about the box at `state`.
fn verb(owner: Owner, binary: &Path, state: &Path, arguments: &[&str]) -> Program {
    let program = match owner {
        Owner::Caller => Program::new(binary),
        Owner::Ordinary => as_ordinary_user(binary),
    };
    program.args(["demo", "--state"]).args([state]).args(arguments)
}

impl Traces {
    #[track_caller]
    fn of(state: &Path) -> Traces {
        let lock = fs::read_to_string(state.join("lock")).expect("a box holds its lock");
        let starter =
            lock.split_whitespace().next().and_then(|pid| pid.parse().ok()).expect("the lock names the starter");
        let children = fs::read_to_string(format!("/proc/{starter}/task/{starter}/children")).unwrap_or_default();
        let init = children.split_whitespace().next().expect("the starter has one child, init").to_owned();
        let namespace = fs::read_link(format!("/proc/{init}/ns/pid")).expect("init lives");
        Traces { starter, namespace }
    }

    fn processes(&self) -> Vec<u32> {
        let all = fs::read_dir("/proc").expect("/proc").flatten();
        let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        pids.filter(|pid| fs::read_link(format!("/proc/{pid}/ns/pid")).is_ok_and(|link| link == self.namespace))
            .collect()
    }
}

fn is_alive(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    // A dead child that nobody has waited for yet holds nothing.
    status.lines().any(|line| line.starts_with("State:") && !line.contains("Z (zombie)"))
}
