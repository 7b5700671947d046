//! The network between the nodes: a bridge in a network namespace of its own, which one waiting process holds. It is
//! also the nodes' router, and knows no way to anywhere else.

use super::layout::{Cluster, Node};
use super::life::{Life, wait_until};
use crate::process::{output, succeeds_with_input};
use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

const BRIDGE: &str = "nodes";

/// How long the kernel may take to make or clear away a namespace.
const KERNEL: Duration = Duration::from_secs(10);

/// The process that holds the cluster's network, started if it does not run, with its link to this namespace.
pub(super) fn up(cluster: &Cluster) -> Result<Life> {
    let link = cluster.link();
    if let Some(life) = Life::read(&cluster.network_file()) {
        // The link to here is made last: without it this was interrupted, and is begun again.
        if has_link(&std::fs::read_to_string("/proc/net/dev")?, &link) {
            return Ok(life);
        }
        life.kill()?;
    }
    let child = Command::new(std::env::current_exe()?)
        .args(["cluster", "--name", &cluster.name, "hold-network"])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let life = Life::of(child.id())?;
    life.write(&cluster.network_file())?;
    let own = std::fs::read_link("/proc/self/ns/net")?;
    let namespace = PathBuf::from(format!("/proc/{}/ns/net", life.pid));
    let moved = wait_until(KERNEL, || Ok(std::fs::read_link(&namespace).is_ok_and(|theirs| theirs != own)))?;
    ensure!(moved, "no network namespace was made: this needs root, with CAP_SYS_ADMIN");
    batch_inside(
        life,
        &format!(
            "link set lo up\n\
         link add name {BRIDGE} type bridge\n\
         address add {router}/24 dev {BRIDGE}\n\
         address add {router_v6}/64 dev {BRIDGE} nodad\n\
         link set dev {BRIDGE} up\n",
            router = cluster.router(),
            router_v6 = cluster.router_v6(),
        ),
    )?;
    output(inside(life, "sysctl").args(["-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"]))?;
    let mut commands = String::new();
    // The way back to pods, so that who sends to nowhere hears of it at once.
    for node in Node::ALL {
        let [pods, pods_v6] = node.pods();
        commands.push_str(&format!("route add {pods} via {}\n", cluster.node(node)));
        commands.push_str(&format!("route add {pods_v6} via {}\n", cluster.node_v6(node)));
    }
    batch_inside(life, &commands)?;
    // One that a killed holder left is about to go, and in the way.
    drop_link(&link)?;
    let (address, new) = (cluster.outside(), format!("new-{}", cluster.number));
    drop_link(&new)?;
    batch(&mut Command::new("ip"), &format!("link add name {new} type veth peer name outside netns {}\n", life.pid))?;
    batch_inside(life, &format!("link set outside master {BRIDGE}\nlink set outside up\n"))?;
    batch(
        &mut Command::new("ip"),
        &format!("address add {address}/24 dev {new}\nlink set dev {new} name {link}\nlink set dev {link} up\n"),
    )?;
    Ok(life)
}

/// Connects the namespace of a node's first process; the other end is the node's `eth0`.
pub(super) fn connect(network: Life, node: Node, init: Life) -> Result<()> {
    let (name, pid) = (node.name(), init.pid);
    // Made from here, because process ids mean nothing inside.
    let line = format!("link add name {name} netns {} type veth peer name eth0 netns {pid}\n", network.pid);
    batch(&mut Command::new("ip"), &line)?;
    batch_inside(network, &format!("link set dev {name} master {BRIDGE}\nlink set dev {name} up\n"))
}

/// Cuts a node off, silently, as a node without power is: its kernel would say goodbye for each of its connections.
/// What it still has to say goes nowhere, and its namespace with it.
pub(super) fn disconnect(cluster: &Cluster, node: Node) -> Result<()> {
    let Some(network) = Life::read(&cluster.network_file()) else {
        return Ok(());
    };
    let name = node.name();
    let gone = wait_until(KERNEL, || {
        let there = has_link(&std::fs::read_to_string(format!("/proc/{}/net/dev", network.pid))?, name);
        if there {
            batch_inside(network, &format!("link delete dev {name}\n"))?;
        }
        Ok(!there)
    })?;
    ensure!(gone, "the link to node {name} cannot be removed");
    Ok(())
}

/// Takes the network away, and the link to it.
pub(super) fn down(cluster: &Cluster) -> Result<()> {
    if let Some(life) = Life::read(&cluster.network_file()) {
        life.kill()?;
    }
    drop_link(&cluster.link())
}

fn drop_link(link: &str) -> Result<()> {
    let gone = wait_until(KERNEL, || {
        let there = has_link(&std::fs::read_to_string("/proc/net/dev")?, link);
        if there {
            // It may go by itself just now; that it is gone is what counts.
            let _ = Command::new("ip").args(["link", "delete", link]).stderr(Stdio::null()).status();
        }
        Ok(!there)
    })?;
    ensure!(gone, "the link {link} cannot be removed");
    Ok(())
}

/// Whether a link is among those of a `/proc/net/dev`.
fn has_link(devices: &str, link: &str) -> bool {
    devices.lines().any(|line| line.trim_start().strip_prefix(link).is_some_and(|rest| rest.starts_with(':')))
}

/// What the holder does: it is there.
pub(super) fn hold() -> Result<()> {
    nix::unistd::setsid().context("cannot leave the session")?;
    unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
    loop {
        std::thread::park();
    }
}

/// Gives commands to `ip` in the network of the cluster.
fn batch_inside(network: Life, commands: &str) -> Result<()> {
    batch(&mut inside(network, "ip"), commands)
}

/// A program in the network of the cluster.
fn inside(network: Life, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command.args(["--target", &network.pid.to_string(), "--net", "--", program]);
    command
}

/// Gives commands to `ip`, which stops at the first that fails.
pub(super) fn batch(ip: &mut Command, commands: &str) -> Result<()> {
    let taken = succeeds_with_input(ip.args(["-batch", "-"]), commands)?;
    ensure!(taken, "ip refused one of these commands: {}", commands.trim().replace('\n', "; "));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_found_by_its_whole_name() {
        let devices = "Inter-|   Receive\n face |bytes\n    lo:  10 0\nkube-12: 0 0\n";
        assert!(has_link(devices, "kube-12") && has_link(devices, "lo"));
        assert!(!has_link(devices, "kube-1") && !has_link(devices, "kube"));
    }
}
