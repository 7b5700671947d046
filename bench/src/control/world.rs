//! The cluster that is simulated: which nodes, Services and pods there are, and how pods come and go.
//!
//! A Service has fifty pods behind it, a namespace ten Services, and each Service an account of its own. What changes is
//! rollouts: ten pods of a Service are replaced at a time, as a Deployment does it. An old pod is first told to end, and out of its
//! EndpointSlice; the new one is placed on a node. A second later the new one is ready and in the slice, and the old one gone.

use std::net::Ipv4Addr;

use anyhow::{Result, ensure};

use super::objects;
use super::store::{Kind, Store};

/// Pods of a Service.
pub(super) const PODS: usize = 50;
/// Services of a namespace.
const SERVICES: usize = 10;
/// Pods that a rollout replaces at once.
const AT_ONCE: usize = 10;
/// Pods that a node may have: its range has 254 addresses, and chance makes some nodes fuller than others.
const MOST_ON_NODE: usize = 150;

/// A Service that is simulated, and its pods.
pub(super) struct Service {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) address: Ipv4Addr,
    pub(super) pods: Vec<Pod>,
    /// Those that are told to end.
    ending: Vec<Pod>,
    /// Those that are placed and not ready.
    beginning: Vec<Pod>,
}

/// One pod.
#[derive(Clone)]
pub(super) struct Pod {
    pub(super) name: String,
    pub(super) uid: String,
    pub(super) node: usize,
    pub(super) address: Ipv4Addr,
}

/// A node.
struct Node {
    /// Which of the 254 addresses of its range are taken.
    taken: [bool; 255],
    next: u8,
}

/// All of it.
pub(super) struct World {
    pub(super) services: Vec<Service>,
    nodes: Vec<Node>,
    /// How many pods there ever were: no two have one name.
    made: u64,
    chance: u64,
    /// Whose turn it is to be rolled out.
    turn: usize,
}

/// The rollouts of one step.
#[derive(Default)]
pub(super) struct Step(Vec<usize>);

/// The name of a node.
pub(super) fn node_name(node: usize) -> String {
    format!("node-{node:04}")
}

/// A node's own address.
pub(super) fn node_address(node: usize) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 16, 0, 1)) + node as u32)
}

/// The first address of the range of a node's pods, which has 256.
fn node_range(node: usize) -> u32 {
    u32::from(Ipv4Addr::new(10, 128, 0, 0)) + ((node as u32) << 8)
}

impl Service {
    /// Its name on the discovery stream.
    pub(super) fn stream_name(&self) -> String {
        format!("{}/{}.{}.svc.cluster.local", self.namespace, self.name, self.namespace)
    }

    fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// The name of a pod's workload on the discovery stream.
    pub(super) fn workload(&self, pod: &Pod) -> String {
        format!("Kubernetes//Pod/{}/{}", self.namespace, pod.name)
    }
}

impl World {
    /// Makes the cluster and puts its objects into the store.
    ///
    /// # Errors
    /// Its nodes have no room for so many pods.
    pub(super) fn new(nodes: usize, pods: usize, store: &Store) -> Result<World> {
        ensure!((1..=8000).contains(&nodes), "--nodes is {nodes}; give 1 to 8000");
        ensure!(pods >= PODS && pods.is_multiple_of(PODS), "--pods is {pods}; give a multiple of {PODS}");
        ensure!(pods <= nodes * MOST_ON_NODE, "{nodes} nodes have room for {} pods", nodes * MOST_ON_NODE);
        let empty = || Node { taken: [false; 255], next: 1 };
        let mut world = World {
            services: Vec::new(),
            nodes: std::iter::repeat_with(empty).take(nodes).collect(),
            made: 0,
            chance: 0x9e37_79b9_7f4a_7c15,
            turn: 0,
        };
        for node in 0..nodes {
            world.write_node(node, store);
        }
        for number in 0..pods / PODS {
            let namespace = format!("team-{:03}", number / SERVICES);
            if number % SERVICES == 0 {
                store.put(Kind::Namespaces, &namespace, &objects::namespace(&namespace));
            }
            let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 0, 10)) + number as u32);
            let name = format!("service-{}", number % SERVICES);
            let service = Service { namespace, name, address, pods: vec![], ending: vec![], beginning: vec![] };
            store.put(
                Kind::Services,
                &service.key(),
                &objects::service(&service.namespace, &service.name, service.address),
            );
            world.services.push(service);
            for _ in 0..PODS {
                let pod = world.make(number);
                world.write_ready(number, &pod, store);
                world.services[number].pods.push(pod);
            }
            world.write_slice(number, store);
        }
        Ok(world)
    }

    /// How many nodes there are.
    pub(super) fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// A node says that it is well, as each does every five minutes.
    pub(super) fn write_node(&mut self, node: usize, store: &Store) {
        self.made += 1;
        let range = Ipv4Addr::from(node_range(node));
        let name = node_name(node);
        store.put(Kind::Nodes, &name, &objects::node(&name, range, node_address(node), self.made));
    }

    /// Begins to replace so many pods, a few of each Service in turn. Calls `placed` with the UID of each that gets a node.
    pub(super) fn begin(&mut self, count: usize, store: &Store, mut placed: impl FnMut(String)) -> Step {
        let mut step = Step::default();
        let mut left = count;
        while left > 0 {
            let number = self.turn;
            self.turn = (self.turn + 1) % self.services.len();
            let now = left.min(AT_ONCE).min(self.services[number].pods.len());
            left -= now;
            let ending: Vec<Pod> = self.services[number].pods.drain(..now).collect();
            let beginning: Vec<Pod> = (0..now).map(|_| self.make(number)).collect();
            for pod in &ending {
                self.put_pod(number, pod, objects::Stage::Ending, store);
            }
            for pod in &beginning {
                self.put_pod(number, pod, objects::Stage::Unplaced, store);
                placed(pod.uid.clone());
                self.put_pod(number, pod, objects::Stage::Placed, store);
            }
            let service = &mut self.services[number];
            service.ending.extend(ending);
            service.beginning.extend(beginning);
            self.write_slice(number, store);
            step.0.push(number);
        }
        step
    }

    /// The end of a step: its new pods are ready, and the old ones gone. Calls `ready` and `gone` with the names of their workloads
    /// when the store has each.
    pub(super) fn end(
        &mut self,
        step: Step,
        store: &Store,
        mut ready: impl FnMut(String),
        mut gone: impl FnMut(String),
    ) {
        for number in step.0 {
            let service = &mut self.services[number];
            let (ending, beginning) = (std::mem::take(&mut service.ending), std::mem::take(&mut service.beginning));
            let namespace = service.namespace.clone();
            for pod in &beginning {
                ready(self.services[number].workload(pod));
                self.write_ready(number, pod, store);
            }
            self.services[number].pods.extend(beginning);
            self.write_slice(number, store);
            for pod in &ending {
                gone(self.services[number].workload(pod));
                store.remove(Kind::Pods, &format!("{namespace}/{}", pod.name));
                let host = u32::from(pod.address) - node_range(pod.node);
                self.nodes[pod.node].taken[host as usize] = false;
            }
        }
    }

    /// The pods of each node, with the numbers of their Services.
    pub(super) fn by_node(&self) -> Vec<Vec<(usize, &Pod)>> {
        let mut nodes = vec![Vec::new(); self.nodes.len()];
        for (number, service) in self.services.iter().enumerate() {
            service.pods.iter().for_each(|pod| nodes[pod.node].push((number, pod)));
        }
        nodes
    }

    /// A number below `bound`, of a sequence that is the same in each run (xorshift64).
    pub(super) fn chance(&mut self, bound: usize) -> usize {
        self.chance ^= self.chance << 13;
        self.chance ^= self.chance >> 7;
        self.chance ^= self.chance << 17;
        (self.chance >> 16) as usize % bound
    }

    /// A new pod, somewhere.
    fn make(&mut self, service: usize) -> Pod {
        self.made += 1;
        // Where there is room: not all nodes are full, which was asked at the start.
        let (node, host) = loop {
            let node = self.chance(self.nodes.len());
            if let Some(host) = self.nodes[node].take() {
                break (node, host);
            }
        };
        Pod {
            name: format!("{}-5d4f7c9b8-{:08}", self.services[service].name, self.made),
            uid: format!("7c9e6679-7425-40de-944b-{:012x}", self.made),
            node,
            address: Ipv4Addr::from(node_range(node) + u32::from(host)),
        }
    }

    fn write_ready(&self, service: usize, pod: &Pod, store: &Store) {
        self.put_pod(service, pod, objects::Stage::Ready, store);
    }

    fn put_pod(&self, service: usize, pod: &Pod, stage: objects::Stage, store: &Store) {
        let service = &self.services[service];
        let object = objects::pod(&service.namespace, &service.name, pod, stage);
        store.put(Kind::Pods, &format!("{}/{}", service.namespace, pod.name), &object);
    }

    fn write_slice(&self, number: usize, store: &Store) {
        let service = &self.services[number];
        let object = objects::slice(&service.namespace, &service.name, &service.pods, &service.ending);
        store.put(Kind::EndpointSlices, &format!("{}-x7k2p", service.key()), &object);
    }
}

impl Node {
    /// An address that no pod has; the one that was given back last comes last.
    fn take(&mut self) -> Option<u8> {
        for _ in 0..254 {
            let host = self.next;
            self.next = if host == 254 { 1 } else { host + 1 };
            if !std::mem::replace(&mut self.taken[usize::from(host)], true) {
                return Some(host);
            }
        }
        None
    }
}
