//! The first process of a node. It makes the node what a node is (file systems, network), starts its programs, and
//! starts again those that end. When it dies the kernel ends all others with it: that is a power cut.

use super::cgroups;
use super::components::{CONTAINERD_SOCKET, Component, PROGRAMS, components, runtime};
use super::layout::{Cluster, Node};
use super::life::wait_until;
use super::network::batch;
use crate::process::succeeds;
use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::sys::wait::wait;
use nix::unistd::{Pid, sethostname, setsid};
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// In the node's folder of logs: what this process says, and which programs ended.
pub(super) const LOG: &str = "init.log";
pub(super) const ENDED: &str = "ended";

/// In the node, where its folder of logs is.
const LOGS: &str = "/var/log/kubernetes";

/// How long each step of a start may take before the node gives up.
const STEP: Duration = Duration::from_secs(60);

/// A program that ends is not started again at once, lest a broken one takes the processor for itself.
const RESTART_AFTER: Duration = Duration::from_millis(500);

/// Settings that kubelet makes for the whole machine when they differ. It is shown that they are as it wants them, and
/// this machine is left as it is.
const KUBELET_SETTINGS: &[(&str, &str)] = &[
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// Runs the node until its power is cut.
pub(super) fn run(cluster: &Cluster, node: Node, programs: &Path) -> Result<()> {
    setsid().context("cannot leave the session")?;
    file_systems(cluster, node, programs).context("the node has no file systems")?;
    network(cluster, node).context("the node has no network")?;
    let mut running = BTreeMap::new();
    start(runtime(), &mut running)?;
    import_images()?;
    for component in components(cluster, node) {
        start(component, &mut running)?;
    }
    loop {
        // Also what the containers' shims leave behind comes here.
        let ended = wait().context("the node has no processes left")?;
        let Some(component) = ended.pid().and_then(|pid| running.remove(&pid)) else {
            continue;
        };
        let mut log = OpenOptions::new().create(true).append(true).open(Path::new(LOGS).join(ENDED))?;
        writeln!(log, "{} {ended:?}", component.name)?;
        std::thread::sleep(RESTART_AFTER);
        start(component, &mut running)?;
    }
}

/// The node sees this machine's files, but has `/etc`, `/opt`, `/run`, `/var`, `/proc` and `/sys` of its own.
fn file_systems(cluster: &Cluster, node: Node, programs: &Path) -> Result<()> {
    let disk = cluster.disk(node);
    let propagate = |how| mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | how, None::<&str>);
    // Nothing that is mounted here is to be seen outside.
    propagate(MsFlags::MS_PRIVATE)?;
    sethostname(node.name())?;
    bind(&programs.join("kubernetes"), &disk.join("opt/kubernetes/bin/kubernetes"))?;
    for folder in ["etc", "opt"] {
        bind(&disk.join(folder), &Path::new("/").join(folder))?;
    }
    // Sources may be below /var, or below /run.
    let groups = Path::new("/run/cgroup");
    let hierarchies = cgroups::hierarchies()?;
    bind(&disk.join("var"), Path::new("/var"))?;
    file_system("tmpfs", "/run", "mode=0755")?;
    for folder in ["/run/netns", "/run/lock", "/run/settings", "/run/cgroup"] {
        std::fs::create_dir(folder)?;
    }
    for hierarchy in &hierarchies {
        let kept = groups.join(hierarchy.strip_prefix(cgroups::ROOT)?);
        std::fs::create_dir_all(&kept)?;
        bind(&hierarchy.join(cluster.group(node)), &kept)?;
    }
    let links = links(Path::new(cgroups::ROOT))?;
    file_system("proc", "/proc", "")?;
    file_system("sysfs", "/sys", "")?;
    if hierarchies.iter().any(|hierarchy| hierarchy != Path::new(cgroups::ROOT)) {
        file_system("tmpfs", cgroups::ROOT, "mode=0755")?;
    }
    for hierarchy in &hierarchies {
        std::fs::create_dir_all(hierarchy)?;
        let kept = groups.join(hierarchy.strip_prefix(cgroups::ROOT)?);
        mount(Some(&kept), hierarchy, None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .with_context(|| format!("cannot move {}", hierarchy.display()))?;
    }
    for (name, target) in links {
        std::os::unix::fs::symlink(target, Path::new(cgroups::ROOT).join(name))?;
    }
    cgroups::delegate()?;
    if Path::new("/sys/fs/bpf").is_dir() {
        file_system("bpf", "/sys/fs/bpf", "mode=0700")?;
    }
    // Each start of a node is one, also where the kernel below it goes on.
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    for (name, value) in KUBELET_SETTINGS.iter().copied().chain([("kernel/random/boot_id", boot_id.trim())]) {
        let shown = Path::new("/run/settings").join(name.replace('/', "."));
        std::fs::write(&shown, format!("{value}\n"))?;
        bind(&shown, &Path::new("/proc/sys").join(name))?;
    }
    // What a pod mounts into a hostPath, and what the node mounts for a pod, is to pass as on any node.
    propagate(MsFlags::MS_SHARED)?;
    Ok(())
}

fn bind(from: &Path, to: &Path) -> Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .with_context(|| format!("cannot mount {} on {}", from.display(), to.display()))
}

fn file_system(kind: &str, on: &str, data: &str) -> Result<()> {
    mount(Some(kind), on, Some(kind), MsFlags::empty(), Some(data)).with_context(|| format!("cannot mount {on}"))
}

/// The links in a folder: version 1 of cgroups has some for controllers that share a hierarchy.
fn links(folder: &Path) -> Result<Vec<(std::ffi::OsString, std::path::PathBuf)>> {
    let mut links = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_symlink() {
            links.push((entry.file_name(), std::fs::read_link(entry.path())?));
        }
    }
    Ok(links)
}

/// Waits for the link to the other node, and gives it addresses and routes.
fn network(cluster: &Cluster, node: Node) -> Result<()> {
    let there = wait_until(STEP, || Ok(Path::new("/sys/class/net/eth0").exists()))?;
    ensure!(there, "no link came within {} s", STEP.as_secs());
    let mut settings = vec![
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        // Nobody else has these addresses; to look for a second would be lost.
        ("ipv6/conf/default/accept_dad", "0"),
        ("ipv6/conf/eth0/accept_dad", "0"),
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/all/send_redirects", "0"),
        ("ipv4/conf/default/send_redirects", "0"),
    ];
    if node == Node::A {
        // Answers between two pods of one bridge pass the node's rules, which translate a Service's address back.
        settings.extend([("bridge/bridge-nf-call-iptables", "1"), ("bridge/bridge-nf-call-ip6tables", "1")]);
    }
    for (name, value) in settings {
        let file = Path::new("/proc/sys/net").join(name);
        std::fs::write(&file, value).with_context(|| {
            let missing = if name.starts_with("bridge") { ": the kernel lacks br_netfilter" } else { "" };
            format!("cannot set {}{missing}", file.display())
        })?;
    }
    let mut commands = format!(
        "link set lo up\n\
         address add {}/24 dev eth0\n\
         address add {}/64 dev eth0 nodad\n\
         link set eth0 up\n\
         route add default via {}\n\
         route add default via {}\n",
        cluster.node(node),
        cluster.node_v6(node),
        cluster.router(),
        cluster.router_v6(),
    );
    let [pods, pods_v6] = node.other().pods();
    commands.push_str(&format!("route add {pods} via {}\n", cluster.node(node.other())));
    commands.push_str(&format!("route add {pods_v6} via {}\n", cluster.node_v6(node.other())));
    batch(&mut Command::new("ip"), &commands)
}

fn start(component: Component, running: &mut BTreeMap<Pid, Component>) -> Result<()> {
    let path = Path::new(LOGS).join(component.name).with_extension("log");
    let log = OpenOptions::new().create(true).append(true).open(&path)?;
    let child = Command::new(&component.program)
        .args(&component.arguments)
        .current_dir("/")
        .env_clear()
        .env("HOME", "/root")
        .env("PATH", format!("/usr/sbin:/usr/bin:/sbin:/bin:{PROGRAMS}"))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start {}", component.program))?;
    running.insert(Pid::from_raw(child.id().try_into()?), component);
    Ok(())
}

/// Waits for the runtime, and gives it the images that are on the disk.
fn import_images() -> Result<()> {
    let answers = wait_until(STEP, || Ok(std::os::unix::net::UnixStream::connect(CONTAINERD_SOCKET).is_ok()))?;
    ensure!(answers, "containerd does not answer; its log is {LOGS}/containerd.log");
    for entry in std::fs::read_dir("/opt/kubernetes/images")? {
        let archive = entry?.path();
        let taken = succeeds(Command::new("ctr").args(IMPORT).arg(&archive).stdout(Stdio::null()))?;
        ensure!(taken, "containerd does not take {}", archive.display());
    }
    Ok(())
}

/// How `ctr` imports an archive where pods look for images: the archive is its last argument.
pub(super) const IMPORT: [&str; 4] = ["--namespace", "k8s.io", "images", "import"];
