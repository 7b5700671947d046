//! The product's own processes: one control plane, and an agent and a proxy for each node.
//!
//! They are started as Kubernetes would start them: the agent with the capabilities that it needs, the proxy as a user of
//! its own without any, each with a token that says which node it is. Nobody but their owner can read what they are given.
//! When and how often is [`crate::supervisor`]'s business.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::Context;
use linux::netns::NetNs;
use linux::privileges::{Capabilities, User};
use linux::sandbox::{self, Authority, Place, RUN};
use nix::mount::{MsFlags, mount};

use crate::ProcessArgument;
use crate::boot::random_uuid;
use crate::children::{Child, Children};
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

    /// Whether it is the one that somebody means: by its name, or as `proxy@NODE`, too.
    pub(crate) fn is_called(&self, name: &str) -> bool {
        self.name() == name || matches!(self, Self::Proxy(node) if name.strip_prefix("proxy@") == Some(node))
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
pub(crate) struct Started {
    /// Its process id inside the box, and its end.
    pub(crate) child: Child,
    /// Its socket for dumps.
    pub(crate) admin: PathBuf,
    /// Where it shows its metrics, inside its node.
    pub(crate) metrics: Option<SocketAddr>,
}

/// Where the agent of a node listens for the container runtime.
pub(crate) fn cni_socket(node: &str) -> PathBuf {
    node_directory(node).join("agent/cni.sock")
}

fn node_directory(node: &str) -> PathBuf {
    Path::new(RUN).join("nodes").join(node)
}

/// How each process is started, any number of times.
#[derive(Debug)]
pub(crate) struct Recipes {
    authority: Authority,
    network: Arc<Network>,
    children: Arc<Children>,
    objects: PathBuf,
    logs: PathBuf,
    arguments: Vec<ProcessArgument>,
}

impl Recipes {
    /// Makes what the processes find when they start: folders of their own, and tokens.
    pub(crate) fn new(
        authority: Authority,
        network: Arc<Network>,
        children: Arc<Children>,
        objects: PathBuf,
        arguments: Vec<ProcessArgument>,
    ) -> anyhow::Result<Self> {
        let logs = Path::new(RUN).join("logs");
        let recipes = Self { authority, network, children, objects, logs, arguments };
        let mut tokens = String::new();
        for (plan, _) in recipes.network.nodes() {
            recipes.furnish_node(plan, &mut tokens)?;
        }
        private_directory(&control_directory())?;
        fs::write(control_directory().join("tokens"), tokens)?;
        fs::create_dir_all(bundle().parent().unwrap_or(Path::new(RUN)))?;
        Ok(recipes)
    }

    /// All processes of a box: the control plane first, so that the bundle is there when nodes look for it.
    pub(crate) fn roles(&self) -> Vec<Role> {
        let nodes = self.network.nodes().map(|(plan, _)| plan.name.clone());
        let of_nodes = nodes.flat_map(|node| [Role::Agent(node.clone()), Role::Proxy(node)]);
        std::iter::once(Role::Control).chain(of_nodes).collect()
    }

    /// Starts a process. Those of one role that live at the same time have different places, numbered from 1.
    pub(crate) fn start(&self, role: &Role, place: u8, binary: &Path) -> anyhow::Result<Started> {
        let started = match role {
            Role::Control => self.control(binary),
            Role::Agent(node) => self.agent(node, place, binary),
            Role::Proxy(node) => self.proxy(node, place, binary),
        };
        started.with_context(|| format!("cannot start {}", role.name()))
    }

    /// Nobody but root where there is another user.
    fn proxy_user(&self) -> User {
        match self.authority {
            Authority::Root => PROXY,
            Authority::UserNamespace => User { uid: 0, gid: 0 },
        }
    }

    /// Folders for a node's processes, with a token in each.
    fn furnish_node(&self, plan: &NodePlan, tokens: &mut String) -> anyhow::Result<()> {
        for role in ["agent", "proxy"] {
            let directory = node_directory(&plan.name).join(role);
            private_directory(&directory)?;
            let token = format!("{}{}", random_uuid(), random_uuid());
            fs::write(directory.join("token"), &token)?;
            tokens.push_str(&format!("{token},{role},{}\n", plan.name));
        }
        let (user, directory) = (self.proxy_user(), node_directory(&plan.name).join("proxy"));
        for path in [directory.clone(), directory.join("token")] {
            chown(path, Some(user.uid), Some(user.gid))?;
        }
        Ok(())
    }

    fn control(&self, binary: &Path) -> anyhow::Result<Started> {
        let (role, directory) = (Role::Control, control_directory());
        let admin = directory.join("admin.sock");
        let mut command = self.command(&role, binary)?;
        command.arg("--objects").arg(&self.objects);
        command.arg("--listen").arg(format!("{}:{CONTROL_PORT}", control_address().v4));
        command.arg("--tokens").arg(directory.join("tokens")).arg("--ca").arg(directory.join("ca"));
        command.arg("--publish-bundle").arg(bundle()).arg("--admin").arg(&admin);
        let child = self.spawn(&role, command, self.network.control(), None, Capabilities::NONE)?;
        Ok(Started { child, admin, metrics: None })
    }

    fn agent(&self, node: &str, place: u8, binary: &Path) -> anyhow::Result<Started> {
        let (role, directory) = (Role::Agent(node.to_owned()), node_directory(node).join("agent"));
        let admin = admin_socket(&directory, place);
        let mut command = self.command(&role, binary)?;
        of_node(&mut command, node, &directory);
        command.arg("--proxy-socket").arg(proxy_socket(node));
        command.arg("--proxy-uid").arg(self.proxy_user().uid.to_string());
        command.arg("--cni-socket").arg(cni_socket(node)).arg("--admin").arg(&admin);
        if self.authority == Authority::Root {
            command.arg("--listener-owner").arg(LISTENER_OWNER.to_string());
        }
        let child = self.spawn(&role, command, self.namespace(node)?, None, Capabilities::ALL)?;
        Ok(Started { child, admin, metrics: None })
    }

    fn proxy(&self, node: &str, place: u8, binary: &Path) -> anyhow::Result<Started> {
        let (role, directory) = (Role::Proxy(node.to_owned()), node_directory(node).join("proxy"));
        let admin = admin_socket(&directory, place);
        // On Kubernetes each has an address of its own; here they share a node.
        let metrics = SocketAddr::new(Ipv4Addr::new(127, 0, 0, place).into(), METRICS_PORT);
        let mut command = self.command(&role, binary)?;
        of_node(&mut command, node, &directory);
        command.arg("--agent-socket").arg(proxy_socket(node)).arg("--admin").arg(&admin);
        command.arg("--metrics").arg(metrics.to_string());
        let addresses =
            self.network.nodes().filter(|(plan, _)| plan.name == node).flat_map(|(plan, _)| plan.fabric.both());
        for address in addresses {
            command.arg("--node-addresses").arg(address.to_string());
        }
        command.arg("--access-log-file").arg(directory.join("access.log"));
        let child = self.spawn(&role, command, self.namespace(node)?, Some(self.proxy_user()), Capabilities::NONE)?;
        Ok(Started { child, admin, metrics: Some(metrics) })
    }

    fn namespace(&self, node: &str) -> anyhow::Result<&NetNs> {
        self.network.place(node).with_context(|| format!("there is no node {node}"))
    }

    fn command(&self, role: &Role, binary: &Path) -> io::Result<Command> {
        let mut command = Command::new(binary);
        command.arg("--log-format").arg("text").arg(role.subcommand()).env_clear();
        let output = programs::output(self.log(role))?;
        command.stdin(Stdio::null()).stderr(output.try_clone()?).stdout(output);
        Ok(command)
    }

    fn spawn(
        &self,
        role: &Role,
        mut command: Command,
        namespace: &NetNs,
        user: Option<User>,
        capabilities: Capabilities,
    ) -> anyhow::Result<Child> {
        let own = self.arguments.iter().filter(|argument| argument.process == role.subcommand());
        command.args(own.map(|argument| &argument.argument));
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
        Ok(self.children.spawn(&mut command)?)
    }

    /// What the processes of a role wrote.
    pub(crate) fn log(&self, role: &Role) -> PathBuf {
        self.logs.join(format!("{}.log", role.name()))
    }

    /// The last error in that, or its last line.
    pub(crate) fn last_words(&self, role: &Role) -> String {
        let output = programs::recent_output(&self.log(role));
        // A process that was started again may be in the middle of its own.
        let error = output.lines().rfind(|line| line.starts_with("error: ") && line.trim_end() != "error:");
        error.or_else(|| output.lines().last()).unwrap_or("it said nothing").to_owned()
    }
}

fn of_node(command: &mut Command, node: &str, directory: &Path) {
    command.arg("--node").arg(node);
    command.arg("--control").arg(format!("{}:{CONTROL_PORT}", control_address().v4));
    command.arg("--bundle").arg(bundle()).arg("--token").arg(directory.join("token"));
}

/// The binary that runs, where every user and every pod can reach it.
pub(crate) fn own_binary() -> PathBuf {
    Path::new(RUN).join("bin/justmtls")
}

/// Makes [`own_binary`], even when the file that it was started from lies where only its owner can go.
pub(crate) fn offer_own_binary() -> anyhow::Result<()> {
    const OWN: &str = "/proc/self/exe";
    let file = own_binary();
    fs::create_dir(file.parent().unwrap_or(Path::new(RUN)))?;
    // By its path: the magic link leads to a mount of the machine, which cannot be bound in here.
    let path = fs::read_link(OWN)?;
    let identity = |path: &Path| fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
    if identity(&path) == identity(Path::new(OWN)) {
        offer(&path, &file)
    } else {
        // Replaced or removed since this process was started.
        fs::copy(OWN, &file)?;
        Ok(())
    }
}

/// Another binary, where every user can reach it. `number` is not to be used twice.
pub(crate) fn offer_binary(path: &Path, number: u64) -> anyhow::Result<PathBuf> {
    let file = Path::new(RUN).join(format!("bin/justmtls-{number}"));
    offer(path, &file)?;
    Ok(file)
}

fn offer(path: &Path, file: &Path) -> anyhow::Result<()> {
    fs::File::create_new(file)?;
    mount(Some(path), file, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    Ok(())
}

fn control_directory() -> PathBuf {
    Path::new(RUN).join("control")
}

/// The socket for dumps of the process with this place.
fn admin_socket(directory: &Path, place: u8) -> PathBuf {
    directory.join(if place == 1 { "admin.sock".to_owned() } else { format!("admin-{place}.sock") })
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
