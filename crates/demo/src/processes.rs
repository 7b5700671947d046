//! The product's own processes: one control plane, and an agent and a proxy for each node.
//!
//! They are started as Kubernetes would start them: the agent with the capabilities that it needs, the proxy as a user of
//! its own without any, each with a token that says which node it is. Nobody but their owner can read what they are given.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use linux::netns::NetNs;
use linux::privileges::{Capabilities, User};
use linux::sandbox::{self, Authority, Place, RUN};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use crate::boot::{Event, random_uuid};
use crate::children::{self, Child, Children};
use crate::network::{Network, NodePlan, control_address};
use crate::programs;

/// The port that the control plane serves nodes on, as Istio's does.
const CONTROL_PORT: u16 = 15012;
/// Where a proxy shows its metrics, inside its node.
const METRICS_PORT: u16 = 15020;
/// Whom a proxy runs as in a box of root: a user that no pod has.
const PROXY: User = User { uid: 2147, gid: 2147 };
/// Who owns the listeners in pods in a box of root: a user that nothing runs as, so that no process can join them (T23).
const LISTENER_OWNER: u32 = 2148;
/// How long the control plane may take to list its objects.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often its socket is looked for meanwhile.
const LOOK: Duration = Duration::from_millis(5);

/// What a process is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Role {
    /// The control plane.
    Control,
    /// The agent of a node.
    Agent(String),
    /// The proxy of a node.
    Proxy(String),
}

impl Role {
    /// The name that `demo admin` takes.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Control => "control".to_owned(),
            Self::Agent(node) => format!("agent@{node}"),
            Self::Proxy(node) => node.clone(),
        }
    }

    /// The subcommand that it is.
    pub(crate) fn subcommand(&self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Agent(_) => "agent",
            Self::Proxy(_) => "proxy",
        }
    }

    /// The node that it is of.
    pub(crate) fn node(&self) -> Option<&str> {
        match self {
            Self::Control => None,
            Self::Agent(node) | Self::Proxy(node) => Some(node),
        }
    }
}

/// A process that was started.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) role: Role,
    /// Inside the box.
    pub(crate) pid: u32,
    /// Its socket for dumps.
    pub(crate) admin: PathBuf,
    /// What it wrote.
    pub(crate) log: PathBuf,
    /// How it ended, once it has.
    pub(crate) ended: Option<String>,
}

/// Where the agent of a node listens for the container runtime.
pub(crate) fn cni_socket(node: &str) -> PathBuf {
    node_directory(node).join("agent/cni.sock")
}

fn node_directory(node: &str) -> PathBuf {
    Path::new(RUN).join("nodes").join(node)
}

/// Starts all of them: the control plane first, so that the bundle is there when nodes look for it.
pub(crate) async fn start(
    authority: Authority,
    network: &Network,
    objects: &Path,
    leaf_lifetime: Option<Duration>,
    children: &Arc<Children>,
    events: &mpsc::UnboundedSender<Event>,
) -> anyhow::Result<Vec<Process>> {
    let starter = Starter { authority, objects, leaf_lifetime, children, events, logs: Path::new(RUN).join("logs") };
    let mut tokens = String::new();
    let mut nodes = Vec::new();
    for (plan, namespace) in network.nodes() {
        nodes.push((starter.furnish_node(plan, &mut tokens)?, namespace));
    }
    let mut processes = vec![starter.control(network.control(), &tokens).await?];
    for (node, namespace) in nodes {
        processes.push(starter.agent(&node, namespace)?);
        processes.push(starter.proxy(&node, namespace)?);
    }
    Ok(processes)
}

struct Starter<'a> {
    authority: Authority,
    objects: &'a Path,
    leaf_lifetime: Option<Duration>,
    children: &'a Arc<Children>,
    events: &'a mpsc::UnboundedSender<Event>,
    logs: PathBuf,
}

/// A node's folders, with a token for each of its processes.
struct Furnished {
    name: String,
    agent: PathBuf,
    proxy: PathBuf,
}

impl Starter<'_> {
    /// Nobody but root where there is another user.
    fn proxy_user(&self) -> User {
        match self.authority {
            Authority::Root => PROXY,
            Authority::UserNamespace => User { uid: 0, gid: 0 },
        }
    }

    fn furnish_node(&self, plan: &NodePlan, tokens: &mut String) -> anyhow::Result<Furnished> {
        let directory = node_directory(&plan.name);
        let furnished =
            Furnished { name: plan.name.clone(), agent: directory.join("agent"), proxy: directory.join("proxy") };
        for (role, place) in [("agent", &furnished.agent), ("proxy", &furnished.proxy)] {
            private_directory(place)?;
            let token = format!("{}{}", random_uuid(), random_uuid());
            fs::write(place.join("token"), &token)?;
            tokens.push_str(&format!("{token},{role},{}\n", plan.name));
        }
        let user = self.proxy_user();
        for path in [furnished.proxy.clone(), furnished.proxy.join("token")] {
            chown(path, Some(user.uid), Some(user.gid))?;
        }
        Ok(furnished)
    }

    async fn control(&self, namespace: &NetNs, tokens: &str) -> anyhow::Result<Process> {
        let directory = Path::new(RUN).join("control");
        private_directory(&directory)?;
        fs::write(directory.join("tokens"), tokens)?;
        fs::create_dir_all(bundle().parent().unwrap_or(Path::new(RUN)))?;
        let admin = directory.join("admin.sock");
        let mut command = self.command(&Role::Control)?;
        command.arg("--objects").arg(self.objects);
        command.arg("--listen").arg(format!("{}:{CONTROL_PORT}", control_address().v4));
        command.arg("--tokens").arg(directory.join("tokens")).arg("--ca").arg(directory.join("ca"));
        command.arg("--publish-bundle").arg(bundle()).arg("--admin").arg(&admin);
        if let Some(lifetime) = self.leaf_lifetime {
            command.arg("--leaf-validity").arg(format!("{}s", lifetime.as_secs()));
        }
        let process = self.spawn(Role::Control, command, namespace, None, Capabilities::NONE, admin.clone())?;
        // Its socket is there once it has listed every object.
        let deadline = Instant::now() + PATIENCE;
        while !admin.exists() {
            if Instant::now() > deadline || !Path::new(&format!("/proc/{}", process.pid)).exists() {
                bail!("the control plane did not start: {}", self.last_words(&Role::Control));
            }
            sleep(LOOK).await;
        }
        Ok(process)
    }

    fn agent(&self, node: &Furnished, namespace: &NetNs) -> anyhow::Result<Process> {
        let role = Role::Agent(node.name.clone());
        let admin = node.agent.join("admin.sock");
        let mut command = self.command(&role)?;
        self.of_node(&mut command, node, &node.agent);
        command.arg("--proxy-socket").arg(proxy_socket(&node.name));
        command.arg("--proxy-uid").arg(self.proxy_user().uid.to_string());
        command.arg("--cni-socket").arg(cni_socket(&node.name)).arg("--admin").arg(&admin);
        if self.authority == Authority::Root {
            command.arg("--listener-owner").arg(LISTENER_OWNER.to_string());
        }
        self.spawn(role, command, namespace, None, Capabilities::ALL, admin)
    }

    fn proxy(&self, node: &Furnished, namespace: &NetNs) -> anyhow::Result<Process> {
        let role = Role::Proxy(node.name.clone());
        let admin = node.proxy.join("admin.sock");
        let mut command = self.command(&role)?;
        self.of_node(&mut command, node, &node.proxy);
        command.arg("--agent-socket").arg(proxy_socket(&node.name)).arg("--admin").arg(&admin);
        command.arg("--metrics").arg(format!("127.0.0.1:{METRICS_PORT}"));
        self.spawn(role, command, namespace, Some(self.proxy_user()), Capabilities::NONE, admin)
    }

    fn command(&self, role: &Role) -> io::Result<Command> {
        let mut command = Command::new(Path::new(RUN).join("bin/justmtls"));
        command.arg("--log-format").arg("text").arg(role.subcommand()).env_clear();
        let output = programs::output(self.log(role))?;
        command.stdin(Stdio::null()).stderr(output.try_clone()?).stdout(output);
        Ok(command)
    }

    fn of_node(&self, command: &mut Command, node: &Furnished, place: &Path) {
        command.arg("--node").arg(&node.name);
        command.arg("--control").arg(format!("{}:{CONTROL_PORT}", control_address().v4));
        command.arg("--bundle").arg(bundle()).arg("--token").arg(place.join("token"));
    }

    fn spawn(
        &self,
        role: Role,
        mut command: Command,
        namespace: &NetNs,
        user: Option<User>,
        capabilities: Capabilities,
        admin: PathBuf,
    ) -> anyhow::Result<Process> {
        let place = Place {
            mount: None,
            net: Some(namespace.try_clone()?.into()),
            others: Vec::new(),
            directory: PathBuf::from("/"),
            user,
            capabilities,
            dies_with_caller: false,
        };
        sandbox::run_in(&mut command, place);
        let started = self.children.spawn(&mut command);
        let Child { pid, ended } = started.with_context(|| format!("cannot start {}", role.name()))?;
        let (events, of) = (self.events.clone(), role.clone());
        tokio::spawn(async move {
            let how = ended.await.map_or_else(|_| "lost".to_owned(), children::describe);
            // Who does not listen any more has ended the box.
            let _ = events.send(Event::ProcessEnded { role: of, how });
        });
        let log = self.log(&role);
        Ok(Process { role, pid, admin, log, ended: None })
    }

    fn log(&self, role: &Role) -> PathBuf {
        self.logs.join(format!("{}.log", role.name()))
    }

    fn last_words(&self, role: &Role) -> String {
        programs::recent_output(&self.log(role)).lines().last().unwrap_or("it said nothing").to_owned()
    }
}

/// The roots, for everybody to read.
fn bundle() -> PathBuf {
    Path::new(RUN).join("bundle/roots.pem")
}

/// Where a node's proxy finds its agent.
fn proxy_socket(node: &str) -> PathBuf {
    node_directory(node).join("agent.sock")
}

/// A folder that only its owner can enter.
fn private_directory(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::DirBuilder::new().mode(0o700).create(path)
}
