//! A REAL KUBERNETES ON ONE MACHINE, IN SECONDS: `cargo xtask cluster up | down | status | crash | boot | exec | load`.
//!
//! Two nodes, each a set of namespaces with a disk of its own: `a` has the control plane, and both run containerd,
//! kubelet and kube-proxy. Kubernetes is built from source ([`kubernetes`]), the rest is Debian's. Any number of clusters run side
//! by side, each with its name, its number, and the addresses that follow from it ([`layout`]).
//!
//! Invariants, stated as absences: nothing of a cluster is left when it is down; no route leads out of it; no process
//! is killed that this did not start ([`life`]); nothing is downloaded but what the Go modules and Debian's packages are.

mod cgroups;
mod components;
mod credentials;
mod images;
mod init;
mod kubernetes;
mod layout;
mod life;
mod network;
mod node;
mod ready;
mod version;

use crate::process::descendants;
use crate::programs;
use anyhow::{Context, Result, bail, ensure};
use layout::{Cluster, Node};
use std::fs::File;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

const DEFAULT_NAME: &str = "dev";

/// Runs one of the verbs. `start-node`, `run-node` and `hold-network` are what `up` and `boot` start, and of no use alone.
pub(crate) fn run(root: &Path, arguments: &[String]) -> Result<ExitCode> {
    let (name, words) = named(arguments)?;
    match words.as_slice() {
        ["up"] => up(root, name)?,
        ["down"] => down(name)?,
        ["status"] => status(name)?,
        ["crash", node] => node::crash(&existing(name)?.0, node.parse()?)?,
        ["boot", node] => boot(root, name, node.parse()?)?,
        ["exec", node, "--", program, arguments @ ..] => return exec(name, node.parse()?, program, arguments),
        ["load", archive] => load(name, Path::new(archive))?,
        ["hold-network"] => network::hold()?,
        ["start-node", node, number, programs] => {
            node::start(&given(name, number)?, node.parse()?, Path::new(programs))?
        }
        ["run-node", node, number, programs] => init::run(&given(name, number)?, node.parse()?, Path::new(programs))?,
        ["crash" | "boot"] => bail!("`{}` takes the name of a node: `a` or `b`", words[0]),
        ["exec", ..] => bail!("`exec` takes the name of a node, `--`, and a program with its arguments"),
        ["load"] => bail!("`load` takes the file of an image archive"),
        [] => bail!("`cluster` takes a verb: up, down, status, crash, boot, exec or load"),
        _ => bail!(
            "`cluster {}` is not understood; the verbs are up, down, status, crash NODE, boot NODE, exec NODE -- PROGRAM and load ARCHIVE",
            words.join(" ")
        ),
    }
    Ok(ExitCode::SUCCESS)
}

/// The name of the cluster that is meant, and the other words.
fn named(arguments: &[String]) -> Result<(&str, Vec<&str>)> {
    let mut name = DEFAULT_NAME;
    let mut words = Vec::new();
    let mut rest = arguments.iter().map(String::as_str);
    while let Some(word) = rest.next() {
        match (word, word.strip_prefix("--name=")) {
            // What follows is another program's.
            ("--", _) => {
                words.push(word);
                words.extend(rest.by_ref());
            }
            ("--name", _) => name = rest.next().context("`--name` takes the name of a cluster")?,
            (_, Some(given)) => name = given,
            _ => words.push(word),
        }
    }
    layout::check_name(name)?;
    Ok((name, words))
}

fn existing(name: &str) -> Result<(Cluster, File)> {
    layout::find(name)?.with_context(|| unknown(name))
}

fn unknown(name: &str) -> String {
    format!("there is no cluster `{name}`; `cargo xtask cluster --name {name} up` makes it")
}

/// A cluster as its starter described it: its folder is locked, and may be out of sight.
fn given(name: &str, number: &str) -> Result<Cluster> {
    let number = number.parse().context("a cluster's number is one of 0 to 255")?;
    Ok(Cluster { name: name.to_owned(), number, folder: layout::clusters().join(name) })
}

fn up(root: &Path, name: &str) -> Result<()> {
    ensure!(programs::is_root(), "a cluster is made of namespaces, mounts and cgroups: run this as root");
    let missing = programs::provide(programs::OF_A_CLUSTER)?;
    ensure!(missing.is_empty(), "missing here: {}; a cluster's nodes run them: install them first", missing.join(", "));
    let built = kubernetes::programs(root)?;
    let began = Instant::now();
    let (cluster, _locked) = layout::find_or_make(name)?;
    make(&cluster, &built)?;
    let half_up = || {
        format!(
            "the cluster `{name}` did not come up; what is there of it `cargo xtask cluster --name {name} down` removes"
        )
    };
    Node::ALL.into_iter().try_for_each(|node| node::boot(&cluster, node, &built)).with_context(half_up)?;
    ready::wait(&cluster).with_context(half_up)?;
    println!("the cluster `{name}` is up after {:.1} s\n", began.elapsed().as_secs_f32());
    println!("export KUBECONFIG={}", cluster.kubeconfig().display());
    println!("alias kubectl={}", cluster.programs().join("kubectl").display());
    Ok(())
}

/// What a cluster has on disk, made once: the kubeconfig is last, and says that all of it is there.
fn make(cluster: &Cluster, built: &Path) -> Result<()> {
    // The cache may have moved since.
    let programs = cluster.programs();
    layout::make_private_folder(&programs)?;
    let kubectl = programs.join("kubectl");
    let _ = std::fs::remove_file(&kubectl);
    symlink(built.join("kubernetes"), kubectl)?;
    if cluster.kubeconfig().exists() {
        return Ok(());
    }
    let credentials = credentials::make(cluster)?;
    let archives = images::archives(built)?;
    for node in Node::ALL {
        let _ = std::fs::remove_dir_all(cluster.disk(node));
        node::make_disk(cluster, node, &credentials.secrets, &archives)
            .with_context(|| format!("the disk of node {} was not made", node.name()))?;
    }
    node::write_private(&cluster.kubeconfig(), &credentials.kubeconfig)
}

fn boot(root: &Path, name: &str, node: Node) -> Result<()> {
    let built = kubernetes::programs(root)?;
    let (cluster, _locked) = existing(name)?;
    ensure!(cluster.kubeconfig().exists(), "the cluster `{name}` was never whole: `up` finishes it, `down` removes it");
    node::boot(&cluster, node, &built)
}

fn down(name: &str) -> Result<()> {
    let Some((cluster, _locked)) = layout::find(name)? else {
        println!("there is no cluster `{name}`");
        return Ok(());
    };
    for node in Node::ALL {
        node::crash(&cluster, node)?;
    }
    network::down(&cluster)?;
    layout::remove(&cluster)?;
    println!("the cluster `{name}` is gone");
    Ok(())
}

fn status(name: &str) -> Result<()> {
    // Without its lock: whoever waits for `up` may look what it does.
    let cluster = layout::list()?.into_iter().find(|cluster| cluster.name == name).with_context(|| unknown(name))?;
    println!("cluster {name}, {}", cluster.folder.display());
    println!("kubeconfig {}", cluster.kubeconfig().display());
    match life::Life::read(&cluster.network_file()) {
        Some(life) => println!("network    process {}, here as {}", life.pid, cluster.link()),
        None => println!("network    down"),
    }
    for node in Node::ALL {
        let addresses = format!("{} {}", cluster.node(node), cluster.node_v6(node));
        let Some(life) = node::life(&cluster, node) else {
            println!("node {}     off", node.name());
            continue;
        };
        println!("node {}     process {}, {addresses}", node.name(), life.pid);
        for pid in descendants(life.pid) {
            println!("           {pid:>8} {}", program_of(pid));
        }
    }
    Ok(())
}

/// What a process was started as; empty if it is gone.
fn program_of(pid: u32) -> String {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(line.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

/// Becomes a program of this machine on a node.
fn exec(name: &str, node: Node, program: &str, arguments: &[&str]) -> Result<ExitCode> {
    let (cluster, locked) = existing(name)?;
    let life = running(&cluster, node)?;
    // Others may do what they want with the cluster meanwhile.
    drop(locked);
    Err(node::command(life, program).args(arguments).exec()).context("cannot start nsenter")
}

/// The first process of a node that is on.
fn running(cluster: &Cluster, node: Node) -> Result<life::Life> {
    node::life(cluster, node).with_context(|| {
        let (name, node) = (&cluster.name, node.name());
        format!("node {node} is off: `cargo xtask cluster --name {name} boot {node}` starts it")
    })
}

fn load(name: &str, archive: &Path) -> Result<()> {
    let (cluster, _locked) = existing(name)?;
    for node in Node::ALL {
        // Opened for each: who reads it moves on in it. And here: what is below `/var` is another file in the node.
        let file = File::open(archive).with_context(|| format!("cannot read {}", archive.display()))?;
        let mut ctr = node::command(running(&cluster, node)?, "ctr");
        let status = ctr.args(init::IMPORT).arg("-").stdin(file).status().context("cannot start nsenter")?;
        ensure!(status.success(), "node {} does not take {}", node.name(), archive.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn the_name_is_said_anywhere_and_has_a_default() {
        assert_eq!(named(&words("up")).unwrap(), ("dev", vec!["up"]));
        assert_eq!(named(&words("--name x crash b")).unwrap(), ("x", vec!["crash", "b"]));
        assert_eq!(named(&words("crash b --name=x")).unwrap(), ("x", vec!["crash", "b"]));
        assert!(named(&words("up --name")).is_err());
        assert!(named(&words("up --name ../etc")).is_err());
    }

    #[test]
    fn what_is_not_understood_is_said() {
        for (line, wanted) in [
            ("crash", "the name of a node"),
            ("crash c", "there is no node `c`"),
            ("up again", "`cluster up again` is not understood"),
            ("", "takes a verb"),
        ] {
            let error =
                format!("{:#}", run(Path::new("/"), &words(&format!("--name no-such-cluster {line}"))).unwrap_err());
            assert!(error.contains(wanted) || error.contains("there is no cluster"), "{line}: {error}");
        }
    }
}
