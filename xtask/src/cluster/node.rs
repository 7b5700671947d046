//! A node as seen from outside: its disk, its start, the loss of its power.

use super::components::{self, PROGRAMS};
use super::credentials::Secret;
use super::layout::{Cluster, Node};
use super::life::Life;
use super::{cgroups, init, network};
use crate::process::{output, succeeds};
use crate::programs::NETWORK_PLUGINS;
use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use std::fs::{OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

/// Makes the disk of a node: this machine's `/etc`, what its programs need, and otherwise nothing.
pub(super) fn make_disk(cluster: &Cluster, node: Node, secrets: &[Secret], archives: &[(&str, Vec<u8>)]) -> Result<()> {
    let disk = cluster.disk(node);
    for folder in
        ["etc", "opt/cni/bin", "opt/kubernetes/bin", "opt/kubernetes/images", "var/lib", "var/cache", "var/spool"]
    {
        std::fs::create_dir_all(disk.join(folder))?;
    }
    std::fs::create_dir_all(cluster.logs(node))?;
    std::fs::create_dir_all(disk.join("var/tmp"))?;
    std::fs::set_permissions(disk.join("var/tmp"), Permissions::from_mode(0o1777))?;
    // Both are the same folder, as on any Debian: namespaces are looked up by either name.
    symlink("/run", disk.join("var/run"))?;
    symlink("/run/lock", disk.join("var/lock"))?;
    copy("/etc/.", &disk.join("etc"))?;
    copy(&format!("{NETWORK_PLUGINS}/."), &disk.join("opt/cni/bin"))?;
    for folder in ["etc/kubernetes", "etc/cni/net.d", "etc/containerd"] {
        let _ = std::fs::remove_dir_all(disk.join(folder));
        std::fs::create_dir_all(disk.join(folder))?;
    }
    std::fs::create_dir_all(disk.join("etc/kubernetes/pki"))?;
    for (path, content) in components::files(cluster, node) {
        let file = disk.join(path);
        // It may be a link to what another program of this machine writes.
        let _ = std::fs::remove_file(&file);
        std::fs::write(&file, content).with_context(|| format!("cannot write {}", file.display()))?;
    }
    let id = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?.replace('-', "");
    std::fs::write(disk.join("etc/machine-id"), id)?;
    for secret in secrets.iter().filter(|secret| secret.node == node) {
        write_private(&disk.join("etc/kubernetes").join(&secret.path), &secret.content)?;
    }
    for (name, archive) in archives {
        std::fs::write(disk.join("opt/kubernetes/images").join(name), archive)?;
    }
    let programs = disk.join(PROGRAMS.trim_start_matches('/'));
    // What is mounted here at the start is one program that acts as what it is called by.
    std::fs::write(programs.join("kubernetes"), "")?;
    let mut names: Vec<&str> =
        components::components(cluster, Node::A).iter().map(|component| component.name).collect();
    names.extend(["coredns", "kubectl"]);
    for name in names {
        symlink("kubernetes", programs.join(name))?;
    }
    Ok(())
}

fn copy(from: &str, to: &Path) -> Result<()> {
    let copied = succeeds(Command::new("cp").args(["--archive", from]).arg(to))?;
    ensure!(copied, "{from} cannot be copied to {}", to.display());
    Ok(())
}

/// Writes a file that only its owner may read.
pub(super) fn write_private(file: &Path, content: &str) -> Result<()> {
    let _ = std::fs::remove_file(file);
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file)
        .and_then(|mut open| open.write_all(content.as_bytes()))
        .with_context(|| format!("cannot write {}", file.display()))
}

/// Starts a node, if it does not run; it goes on when this program ends.
pub(super) fn boot(cluster: &Cluster, node: Node, programs: &Path) -> Result<()> {
    if life(cluster, node).is_some() {
        return Ok(());
    }
    // Of a node that ended by itself there may be a rest.
    crash(cluster, node)?;
    let network = network::up(cluster)?;
    // Nothing of what an earlier life said is to be taken for this one's.
    let _ = std::fs::remove_file(cluster.logs(node).join(init::ENDED));
    let printed = output(
        Command::new(std::env::current_exe()?)
            .args(["cluster", "--name", &cluster.name, "start-node", node.name(), &cluster.number.to_string()])
            .arg(programs)
            .current_dir("/"),
    )?;
    let init = Life::of(printed.trim().parse().context("the node's first process has no id")?)?;
    init.write(&cluster.init_file(node))?;
    network::connect(network, node, init)
}

/// What [`boot`] runs: makes the namespaces, starts the first process in them, prints its id and ends. A process of its
/// own, because whoever made a pid namespace can start nothing outside it any more.
pub(super) fn start(cluster: &Cluster, node: Node, programs: &Path) -> Result<()> {
    cgroups::enter(&cluster.group(node))?;
    let log = OpenOptions::new().create(true).append(true).open(cluster.logs(node).join(init::LOG))?;
    unshare(
        CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWCGROUP,
    )
    .context("cannot make the namespaces of a node: this needs root, with CAP_SYS_ADMIN")?;
    let child = Command::new(std::env::current_exe()?)
        .args(["cluster", "--name", &cluster.name, "run-node", node.name(), &cluster.number.to_string()])
        .arg(programs)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("cannot start the first process of a node")?;
    println!("{}", child.id());
    Ok(())
}

/// The first process of a node, if it runs.
pub(super) fn life(cluster: &Cluster, node: Node) -> Option<Life> {
    Life::read(&cluster.init_file(node))
}

/// Cuts the power: all that runs on the node is gone at once, and its disk is as it was.
pub(super) fn crash(cluster: &Cluster, node: Node) -> Result<()> {
    network::disconnect(cluster, node)?;
    if let Some(life) = life(cluster, node) {
        life.kill()?;
    }
    cgroups::remove(&cluster.group(node))
}

/// A command that runs in the namespaces of a node.
pub(super) fn command(life: Life, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command.args(["--target", &life.pid.to_string(), "--all", "--wd=/", "--", program]);
    command
}
