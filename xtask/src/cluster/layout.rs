//! Where a cluster is: its folder, its number, and the addresses that follow from the number.

use anyhow::{Context, Result, ensure};
use std::fs::{DirBuilder, File};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

const FOLDER_VARIABLE: &str = "KUBERNETES_CLUSTERS";
const FOLDER: &str = "/var/lib/kubernetes-clusters";

/// The addresses of pods and Services: the same in each cluster, because no route outside leads to them.
pub(super) const PODS: &str = "10.244.0.0/16,fd00:10:244::/48";
pub(super) const SERVICES: &str = "10.96.0.0/16,fd00:10:96::/112";
pub(super) const API_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
pub(super) const DNS: [&str; 2] = ["10.96.0.10", "fd00:10:96::a"];

/// The folder that holds all clusters.
pub(super) fn clusters() -> PathBuf {
    std::env::var_os(FOLDER_VARIABLE).map_or_else(|| PathBuf::from(FOLDER), PathBuf::from)
}

/// One of the two nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Node {
    /// The control plane runs here; the `bridge` plugin connects its pods.
    A,
    /// The `ptp` plugin connects its pods: each is reached by a route of its own.
    B,
}

impl Node {
    pub(super) const ALL: [Self; 2] = [Self::A, Self::B];

    /// What it is called: as a host, as a Kubernetes node and on the command line.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }

    pub(super) const fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// The ranges of its pods: IPv4 and IPv6.
    pub(super) fn pods(self) -> [String; 2] {
        [format!("10.244.{}.0/24", self.index()), format!("fd00:10:244:{}::/64", self.index())]
    }

    const fn index(self) -> u8 {
        match self {
            Self::A => 1,
            Self::B => 2,
        }
    }
}

impl FromStr for Node {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|node| node.name() == name).with_context(|| {
            format!("there is no node `{name}`; the nodes are `a`, which has the control plane, and `b`")
        })
    }
}

/// A cluster by its name and its number, which no other cluster of this machine has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cluster {
    pub(super) name: String,
    pub(super) number: u8,
    pub(super) folder: PathBuf,
}

impl Cluster {
    pub(super) fn kubeconfig(&self) -> PathBuf {
        self.folder.join("kubeconfig")
    }

    /// The folder that is to be in `PATH`: it has `kubectl`.
    pub(super) fn programs(&self) -> PathBuf {
        self.folder.join("bin")
    }

    /// What a node keeps when its power is cut: `etc`, `opt` and `var`.
    pub(super) fn disk(&self, node: Node) -> PathBuf {
        self.folder.join("nodes").join(node.name()).join("disk")
    }

    pub(super) fn logs(&self, node: Node) -> PathBuf {
        self.disk(node).join("var/log/kubernetes")
    }

    /// The file that says which process is the node's first.
    pub(super) fn init_file(&self, node: Node) -> PathBuf {
        self.folder.join("nodes").join(node.name()).join("init")
    }

    /// The file that says which process holds the network between the nodes.
    pub(super) fn network_file(&self) -> PathBuf {
        self.folder.join("network")
    }

    /// The end of the link to the cluster in the namespace of whoever starts it: short, for names of links are.
    pub(super) fn link(&self) -> String {
        format!("kube-{}", self.number)
    }

    /// The group of a node's processes in each hierarchy of cgroups.
    pub(super) fn group(&self, node: Node) -> String {
        format!("kubernetes-{}-{}", self.name, node.name())
    }

    /// The address of whoever started the cluster, and of nothing else.
    pub(super) fn outside(&self) -> Ipv4Addr {
        self.address(1)
    }

    pub(super) fn node(&self, node: Node) -> Ipv4Addr {
        self.address(1 + node.index())
    }

    pub(super) fn node_v6(&self, node: Node) -> Ipv6Addr {
        self.address_v6(1 + u16::from(node.index()))
    }

    /// Where the nodes send what is for none of them. No way leads on from there: it answers that it has no route.
    pub(super) fn router(&self) -> Ipv4Addr {
        self.address(254)
    }

    pub(super) fn router_v6(&self) -> Ipv6Addr {
        self.address_v6(254)
    }

    const fn address(&self, last: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 123, self.number, last)
    }

    const fn address_v6(&self, last: u16) -> Ipv6Addr {
        // An `as` because a constant function has no other way; nothing is lost.
        Ipv6Addr::new(0xfd00, 0x10, 0x123, self.number as u16, 0, 0, 0, last)
    }
}

/// Refuses a name that would be no folder, no cgroup or no word.
pub(super) fn check_name(name: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    ensure!(
        (1..=40).contains(&name.len()) && name.chars().all(good) && !name.starts_with('-'),
        "`{name}` is no name for a cluster: 1 to 40 lower-case letters, digits and `-`, the first one no `-`"
    );
    Ok(())
}

/// The cluster of this name, locked; `None` if there is none. One caller at a time acts on a cluster.
pub(super) fn find(name: &str) -> Result<Option<(Cluster, File)>> {
    check_name(name)?;
    let folder = clusters().join(name);
    let Some(lock) = lock(&folder)? else {
        return Ok(None);
    };
    let number = read_number(&folder)?;
    Ok(Some((Cluster { name: name.to_owned(), number, folder }, lock)))
}

/// The cluster of this name, locked, made if it is not there, with the lowest number that is free.
pub(super) fn find_or_make(name: &str) -> Result<(Cluster, File)> {
    check_name(name)?;
    let all = clusters();
    loop {
        if let Some(found) = find(name)? {
            return Ok(found);
        }
        make_private_folder(&all)?;
        let Some(_all_locked) = lock(&all)? else {
            continue;
        };
        let folder = all.join(name);
        if folder.exists() {
            continue;
        }
        let taken: Vec<u8> = list()?.iter().map(|cluster| cluster.number).collect();
        let routes = std::fs::read_to_string("/proc/net/route").context("cannot read the routes of this machine")?;
        let number = (0..=u8::MAX)
            .find(|number| !taken.contains(number) && !is_routed(&routes, *number))
            .context("all of 10.123.0.0/16 is in use on this machine: take a cluster down")?;
        // The number is there from the first moment on: a folder without it would be nobody's.
        let new = all.join(format!(".{name}"));
        make_private_folder(&new)?;
        std::fs::write(new.join("number"), number.to_string())?;
        std::fs::rename(&new, &folder)?;
    }
}

/// All clusters of this machine, by name.
pub(super) fn list() -> Result<Vec<Cluster>> {
    let mut clusters_found = Vec::new();
    for entry in std::fs::read_dir(clusters()).into_iter().flatten() {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if check_name(&name).is_ok() {
            let number = read_number(&entry.path())?;
            clusters_found.push(Cluster { name, number, folder: entry.path() });
        }
    }
    clusters_found.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(clusters_found)
}

/// Takes a cluster's folder away, and the folder of all clusters if it was the last one.
pub(super) fn remove(cluster: &Cluster) -> Result<()> {
    let all = clusters();
    let _all_locked = lock(&all)?;
    std::fs::remove_dir_all(&cluster.folder).with_context(|| format!("cannot remove {}", cluster.folder.display()))?;
    // Fails, as it should, while another cluster is in it.
    let _ = std::fs::remove_dir(&all);
    Ok(())
}

/// Waits for the lock on a folder; `None` if there is no such folder, or no more when the lock is ours.
fn lock(folder: &Path) -> Result<Option<File>> {
    loop {
        let file = match File::open(folder) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot open {}", folder.display())),
        };
        file.lock().with_context(|| format!("cannot lock {}", folder.display()))?;
        match std::fs::metadata(folder) {
            Ok(now) if now.ino() == file.metadata()?.ino() => return Ok(Some(file)),
            // Removed, or removed and made again, while we waited.
            _ => {}
        }
    }
}

/// Makes a folder, and those above it, that only its owner may enter.
pub(super) fn make_private_folder(folder: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .with_context(|| format!("cannot make {}", folder.display()))
}

fn read_number(folder: &Path) -> Result<u8> {
    let file = folder.join("number");
    let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    text.trim().parse().with_context(|| format!("{} holds no number of a cluster", file.display()))
}

/// Whether a route of `/proc/net/route` leads into the range of the cluster with this number.
fn is_routed(routes: &str, number: u8) -> bool {
    routes.lines().skip(1).any(|line| {
        // Interface, destination, …: addresses in hexadecimal, in the byte order of the machine.
        let destination = line.split_whitespace().nth(1).and_then(|word| u32::from_str_radix(word, 16).ok());
        destination.is_some_and(|destination| destination.to_ne_bytes()[..3] == [10, 123, number])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(number: u8) -> Cluster {
        Cluster { name: "dev".to_owned(), number, folder: PathBuf::from("/clusters/dev") }
    }

    #[test]
    fn each_number_has_addresses_that_no_other_number_has() {
        let of = |number| {
            let it = cluster(number);
            let mut all: Vec<String> =
                vec![it.outside().to_string(), it.router().to_string(), it.router_v6().to_string()];
            for node in Node::ALL {
                all.extend([it.node(node).to_string(), it.node_v6(node).to_string()]);
            }
            all.push(it.link());
            all
        };
        let mut every: Vec<String> = (0..=u8::MAX).flat_map(of).collect();
        let count = every.len();
        every.sort();
        every.dedup();
        assert_eq!(every.len(), count);
        assert_eq!(cluster(7).node(Node::A).to_string(), "10.123.7.2");
        assert_eq!(cluster(255).node_v6(Node::B).to_string(), "fd00:10:123:ff::3");
        assert!(cluster(255).link().len() < 16);
    }

    #[test]
    fn a_range_that_a_route_leads_to_is_not_taken() {
        // 10.123.3.0/24 as an x86 or arm64 machine writes it, and a default route.
        let routes = "Iface\tDestination\tGateway\n\
                      eth0\t00000000\t0101A8C0\n\
                      kube-3\t00037B0A\t00000000\n";
        assert!(is_routed(routes, 3));
        assert!(!is_routed(routes, 0));
        assert!(!is_routed(routes, 4));
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for bad in ["", "-a", "../x", "A", "a/b", ".dev", &"x".repeat(41)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        for good in ["dev", "e2e-12", "0"] {
            check_name(good).unwrap();
        }
    }

    #[test]
    fn nodes_are_known_by_name_and_have_their_own_pods() {
        assert_eq!("b".parse::<Node>().unwrap(), Node::B);
        let error = "c".parse::<Node>().unwrap_err().to_string();
        assert!(error.contains("`c`") && error.contains("`a`"), "{error}");
        assert_ne!(Node::A.pods(), Node::B.pods());
    }
}
