//! Memory of agents and proxies: with nothing to do, with many pods, and with idle connections.
//!
//! This box is not pinned: the processes have as many threads as they have on this machine in use.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::cluster::{Cluster, Process};
use crate::contender::{Contender, Kind, idle_pods, manifest};
use crate::load::Work;
use crate::plan::WARM_PORT;

/// How long memory may take to come to rest.
const SETTLE: Duration = Duration::from_secs(5);
/// How often it is looked at meanwhile, and for how many looks it has to be the same.
const LOOK: Duration = Duration::from_millis(100);
const LOOKS: usize = 5;

/// Memory of one process, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Size {
    /// All that is resident, shared pages included.
    pub(crate) resident: u64,
    /// What is its own: heap and stacks.
    pub(crate) anonymous: u64,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Memory {
    /// Of the fuller node, with one captured pod on each and no connection since the start but one.
    pub(crate) agent: Size,
    /// The same of its proxy.
    pub(crate) proxy: Size,
    /// What the two hold together, in bytes: pages of the program's file that both have are there once.
    pub(crate) together: u64,
    /// How many connections were held.
    pub(crate) connections: usize,
    /// What one idle connection adds to agent and proxy of the client's node, in bytes.
    pub(crate) per_connection_client: f64,
    /// The same on the server's node.
    pub(crate) per_connection_server: f64,
    /// What is left of that when they are closed again, of the node where more is left.
    pub(crate) kept_per_connection: f64,
    /// How many pods were added.
    pub(crate) pods: usize,
    /// What one of them adds to the agent of its node, in bytes.
    pub(crate) per_pod_agent: f64,
    /// The same of its proxy.
    pub(crate) per_pod_proxy: f64,
}

impl Memory {
    /// For people.
    pub(crate) fn table(&self) -> String {
        let megabytes = |bytes: u64| bytes as f64 / 1e6;
        let line = |what: &str, size: Size| {
            let (all, own) = (megabytes(size.resident), megabytes(size.anonymous));
            format!("{what:44} {all:8.2} MB resident, {own:.2} MB of them its own\n")
        };
        let bytes = |what: String, bytes: f64| format!("{what:44} {bytes:8.0} bytes\n");
        let (connections, pods) = (self.connections, self.pods);
        [
            "\n".to_owned(),
            line("agent, one captured pod", self.agent),
            line("proxy, the same", self.proxy),
            format!("{:44} {:8.2} MB resident\n", "both, pages that they share once", megabytes(self.together)),
            bytes(format!("one of {connections} idle connections, client's node"), self.per_connection_client),
            bytes(format!("one of {connections} idle connections, server's node"), self.per_connection_server),
            bytes("of that kept when all are closed".to_owned(), self.kept_per_connection),
            bytes(format!("one of {pods} more pods, agent"), self.per_pod_agent),
            bytes(format!("one of {pods} more pods, proxy"), self.per_pod_proxy),
        ]
        .concat()
    }
}

/// Measures it, in a box of its own.
pub(crate) fn measure(start: impl Fn(&str) -> Result<Cluster>, connections: usize, pods: usize) -> Result<Memory> {
    let cluster = start(&manifest(&[Kind::Justmtls]))?;
    let mut contender = Contender::start(Kind::Justmtls, &cluster, (WARM_PORT, 1))?;
    let mut hold = |connections: usize| {
        let (to, client) = (contender.to, &mut contender.client);
        client.prepare(Work::Hold { connections }, to, WARM_PORT, Duration::ZERO)?;
        ensure!(client.go()?.count == connections as u64, "not all connections could be opened");
        settled(&cluster)
    };
    // The first connection was there to look at: code and tables that all of them need are in use.
    let few = hold(0)?;
    let fuller = usize::from(few.resident(1) > few.resident(0));
    let together = together(&cluster, NODES[fuller])?;
    cluster.apply(&idle_pods(pods), pods)?;
    let idle = settled(&cluster)?;
    let full = hold(connections)?;
    let emptied = hold(0)?;

    let of_connection = |now: &Nodes, node: usize| (now.own(node) - idle.own(node)) / connections as f64;
    let of_pod = |now: [Size; 2], before: [Size; 2]| (own(&now) - own(&before)) / pods as f64;
    Ok(Memory {
        agent: few.agents[fuller],
        proxy: few.proxies[fuller],
        together,
        connections,
        per_connection_client: of_connection(&full, 0),
        per_connection_server: of_connection(&full, 1),
        kept_per_connection: of_connection(&emptied, 0).max(of_connection(&emptied, 1)),
        pods,
        per_pod_agent: of_pod(idle.agents, few.agents),
        per_pod_proxy: of_pod(idle.proxies, few.proxies),
    })
}

fn own(sizes: &[Size]) -> f64 {
    sizes.iter().map(|size| size.anonymous).sum::<u64>() as f64
}

/// Agents and proxies of the two nodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Nodes {
    agents: [Size; 2],
    proxies: [Size; 2],
}

impl Nodes {
    fn own(&self, node: usize) -> f64 {
        own(&[self.agents[node], self.proxies[node]])
    }

    fn resident(&self, node: usize) -> u64 {
        self.agents[node].resident + self.proxies[node].resident
    }

    fn read(cluster: &Cluster) -> Result<Nodes> {
        let both =
            |role| Ok::<_, anyhow::Error>([size(pid(cluster, role, NODES[0])?)?, size(pid(cluster, role, NODES[1])?)?]);
        Ok(Nodes { agents: both("agent")?, proxies: both("proxy")? })
    }
}

const NODES: [&str; 2] = ["node-a", "node-b"];

fn pid(cluster: &Cluster, role: &str, node: &str) -> Result<u32> {
    let is_it = |process: &Process| process.role == role && process.node.as_deref() == Some(node);
    let found = cluster.product().into_iter().find(is_it);
    Ok(found.with_context(|| format!("there is no {role} of {node}"))?.pid)
}

fn together(cluster: &Cluster, node: &str) -> Result<u64> {
    let mut pages = BTreeSet::new();
    let mut own = 0;
    for role in ["agent", "proxy"] {
        let pid = pid(cluster, role, node)?;
        own += size(pid)?.anonymous;
        pages.extend(file_pages(pid)?);
    }
    Ok(own + pages.len() as u64 * page_size()?)
}

/// A page of a file: device and inode of the file, and where in it.
type FilePage = (String, u64);

/// The pages of files that a process has in memory and has not changed.
fn file_pages(pid: u32) -> Result<BTreeSet<FilePage>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let entries = File::open(format!("/proc/{pid}/pagemap"))?;
    let size = page_size()?;
    let mut found = BTreeSet::new();
    for mapping in maps.lines().filter_map(Mapping::read) {
        let mut states = vec![0; usize::try_from((mapping.end - mapping.start) / size * ENTRY)?];
        entries.read_exact_at(&mut states, mapping.start / size * ENTRY)?;
        let states = states.chunks_exact(ENTRY as usize).map(|entry| entry.try_into().map_or(0, u64::from_le_bytes));
        let there = states.enumerate().filter(|(_, state)| state & IN_MEMORY != 0 && state & OF_A_FILE != 0);
        found.extend(there.map(|(number, _)| (mapping.file.clone(), mapping.offset + number as u64 * size)));
    }
    Ok(found)
}

/// `/proc/PID/pagemap` has so many bytes for each page, in which these bits say where it is
/// (Documentation/admin-guide/mm/pagemap.rst of the kernel).
const ENTRY: u64 = 8;
const IN_MEMORY: u64 = 1 << 63;
const OF_A_FILE: u64 = 1 << 61;

/// A part of a file in a process' memory.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    offset: u64,
    file: String,
}

impl Mapping {
    /// `559c-559d r-xp 00054000 fe:01 1234 /usr/bin/x`; what is no file's has the inode 0.
    fn read(line: &str) -> Option<Mapping> {
        let mut fields = line.split_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let (offset, device, inode) = (fields.nth(1)?, fields.next()?, fields.next()?);
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let of_a_file = inode != "0";
        of_a_file.then_some(Mapping {
            start: hex(start)?,
            end: hex(end)?,
            offset: hex(offset)?,
            file: format!("{device} {inode}"),
        })
    }
}

fn page_size() -> Result<u64> {
    let text = fs::read_to_string("/proc/self/smaps")?;
    let field = text.lines().find_map(|line| line.strip_prefix("KernelPageSize:"));
    let kilobytes = field.and_then(|field| field.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kilobytes.context("/proc/self/smaps does not say how large a page is")? * 1024)
}

/// Waits until nothing grows or shrinks any more, or for long enough.
fn settled(cluster: &Cluster) -> Result<Nodes> {
    let deadline = Instant::now() + SETTLE;
    let (mut last, mut same) = (Nodes::read(cluster)?, 0);
    while same < LOOKS && Instant::now() < deadline {
        std::thread::sleep(LOOK);
        let now = Nodes::read(cluster)?;
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    Ok(last)
}

/// What is resident of a process, in bytes, without a look at each of its pages.
pub(crate) fn resident(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kilobytes.with_context(|| format!("{path} does not say what is resident"))? * 1024)
}

fn size(pid: u32) -> Result<Size> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    Ok(size_of(&text))
}

fn size_of(rollup: &str) -> Size {
    let field = |name: &str| {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let kilobytes = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        kilobytes.unwrap_or(0) * 1024
    };
    Size { resident: field("Rss"), anonymous: field("Anonymous") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_size_is_read_in_bytes() {
        let text = "00400000-7ffd ---p 00000000 00:00 0 [rollup]\nRss:    12 kB\nPss:  7 kB\nAnonymous:   3 kB\n";
        assert_eq!(size_of(text), Size { resident: 12 * 1024, anonymous: 3 * 1024 });
        assert!(size(std::process::id()).unwrap().resident > 0);
    }

    #[test]
    fn a_mapping_of_a_file_is_read_and_one_of_memory_is_none() {
        let mapping = Mapping::read("1000-3000 r-xp 00054000 fe:01 1234    /usr/bin/x y").unwrap();
        assert_eq!(mapping, Mapping { start: 0x1000, end: 0x3000, offset: 0x54000, file: "fe:01 1234".into() });
        assert_eq!(Mapping::read("1000-3000 rw-p 00000000 00:00 0  [heap]"), None);
    }

    #[test]
    fn pages_of_the_own_program_are_in_memory_and_are_no_more_than_resident() {
        let pages = file_pages(std::process::id()).unwrap().len() as u64 * page_size().unwrap();
        let size = size(std::process::id()).unwrap();
        assert!(pages > 0 && pages <= size.resident, "{pages} of {size:?}");
    }
}
