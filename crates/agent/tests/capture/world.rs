//! The agent's process on a node with two pods, and those that it talks to.

use std::io::{Read, Write};
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use agent::{Args, ClusterArgs};
use linux::channel::{Channel, LARGEST_MESSAGE};
use linux::netns::NetNs;
use mesh::PodUid;
use socket2::SockRef;
use tempfile::TempDir;
use wire::discovery::NodePod;
use wire::pods::{CniAdd, CniRequest, CniResult, FromAgent, PodAdded, ToAgent, VERSION};

use crate::control::Control;
use crate::lab::{Lab, eventually};

/// How long an answer may take that takes milliseconds.
const SOON: Duration = Duration::from_secs(10);

/// A node with its agent.
pub(crate) struct World {
    pub(crate) lab: Lab,
    pub(crate) control: Arc<Control>,
    /// Thread id of the agent.
    pub(crate) agent: i32,
    files: TempDir,
    /// Where the agent's sockets are.
    place: PathBuf,
}

impl World {
    /// Starts everything; `change` has the agent's arguments before it starts.
    pub(crate) fn new(change: impl FnOnce(&mut Args)) -> World {
        let lab = Lab::new();
        let files = tempfile::tempdir().unwrap();
        // Threads are born in the namespace that they are started from.
        let control = lab.node.enter(|| Control::start(files.path())).unwrap();
        let mut args = arguments(files.path(), &control);
        change(&mut args);
        let (agent, _) = start(&lab, args);
        let world = World { lab, control, agent, place: files.path().to_owned(), files };
        eventually("the agent listens", || world.path("admin").exists());
        world
    }

    /// Starts another agent of the same node. It ends with the test's process, or when it hands over.
    pub(crate) fn another_agent(&self) -> JoinHandle<()> {
        start(&self.lab, self.arguments()).1
    }

    /// What an agent of this node is started with.
    pub(crate) fn arguments(&self) -> Args {
        arguments(&self.place, &self.control)
    }

    /// From here on this node's sockets are elsewhere: whoever starts there finds no agent.
    pub(crate) fn move_sockets(&mut self) {
        self.place = self.place.join("next");
        std::fs::create_dir(&self.place).unwrap();
        for name in ["bundle.pem", "token"] {
            std::fs::copy(self.files.path().join(name), self.place.join(name)).unwrap();
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.place.join(name)
    }

    /// A proxy of this process' user that has said hello.
    pub(crate) fn proxy(&self) -> FakeProxy {
        let proxy = self.greeted();
        proxy.say(&ToAgent::HeldAll);
        proxy
    }

    /// The same before it has said which pods it serves.
    pub(crate) fn greeted(&self) -> FakeProxy {
        let proxy = FakeProxy::connect(&self.path("proxy"));
        proxy.say(&ToAgent::Hello { version: VERSION, started: std::time::Duration::ZERO, leaving: false });
        let Some((FromAgent::Hello { version: VERSION, .. }, _)) = proxy.hear() else { panic!("a hello") };
        proxy
    }

    /// Asks as the runtime does, and does not wait.
    pub(crate) fn ask(&self, request: CniRequest) -> JoinHandle<CniResult> {
        let channel = Channel::connect(&self.path("cni")).unwrap();
        std::thread::spawn(move || {
            SockRef::from(&channel).set_read_timeout(Some(SOON)).unwrap();
            channel.send(&request.encode(), &[]).unwrap();
            let mut buffer = vec![0; LARGEST_MESSAGE];
            let (length, _) = channel.recv(&mut buffer).unwrap();
            CniResult::decode(&buffer[..length]).unwrap()
        })
    }

    pub(crate) fn add(&self, name: &str, room: &Room) -> JoinHandle<CniResult> {
        let (pod, netns) = (PodUid::from(name), room.path.clone());
        self.ask(CniRequest::Add(CniAdd {
            pod,
            namespace: "shop".into(),
            name: name.into(),
            netns,
            container: String::new(),
            addresses: Vec::new(),
        }))
    }

    pub(crate) fn delete(&self, name: &str) {
        let answer = self.ask(CniRequest::Del { pod: PodUid::from(name), container: String::new() }).join().unwrap();
        assert_eq!(answer, CniResult::Deleted);
    }

    /// Captures a pod to the end, and returns its listeners.
    pub(crate) fn capture(&self, proxy: &FakeProxy, name: &str, room: &Room) -> Vec<OwnedFd> {
        let answer = self.add(name, room);
        let (added, listeners) = proxy.added();
        assert_eq!(added.pod, PodUid::from(name));
        proxy.say(&ToAgent::PodReady { pod: added.pod });
        assert_eq!(answer.join().unwrap(), CniResult::Captured);
        listeners
    }

    /// A page of the admin socket.
    pub(crate) fn page(&self, path: &str) -> String {
        let mut stream = UnixStream::connect(self.path("admin")).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }
}

/// Its thread id, and what ends with it.
fn start(lab: &Lab, args: Args) -> (i32, JoinHandle<()>) {
    let (born, id) = channel();
    let start = || {
        std::thread::spawn(move || {
            born.send(nix::unistd::gettid().as_raw()).unwrap();
            agent::run(args).expect("the agent runs");
        })
    };
    let thread = lab.node.enter(start).unwrap();
    (id.recv().unwrap(), thread)
}

fn arguments(files: &Path, control: &Control) -> Args {
    Args {
        node: "node-a".into(),
        control: control.address,
        bundle: files.join("bundle.pem"),
        token: files.join("token"),
        proxy_socket: files.join("proxy"),
        proxy_uid: nix::unistd::geteuid().as_raw(),
        cni_socket: files.join("cni"),
        admin: files.join("admin"),
        listener_owner: None,
        cni_wait: 20,
        metrics: None,
        cluster: ClusterArgs::default(),
    }
}

/// A pod as the control plane names it.
pub(crate) fn pod(name: &str, addresses: [IpAddr; 2]) -> NodePod {
    NodePod {
        pod: PodUid::from(name),
        namespace: "shop".into(),
        name: name.into(),
        identity: "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap(),
        addresses: addresses.into(),
        capture: Ok(()),
        release: false,
        excluded_ports: Vec::new(),
        probes: mesh::Probes::default(),
    }
}

/// A path to a namespace, as a runtime has one: that of a thread which is in it for as long as this lives.
pub(crate) struct Room {
    pub(crate) path: PathBuf,
    _leave: Sender<()>,
}

impl Room {
    pub(crate) fn of(namespace: &NetNs) -> Room {
        let (leave, stay): (_, Receiver<()>) = channel();
        let (born, id) = channel();
        let live = || {
            std::thread::spawn(move || {
                born.send(nix::unistd::gettid()).unwrap();
                let _ = stay.recv();
            })
        };
        namespace.enter(live).unwrap();
        let path = format!("/proc/{}/task/{}/ns/net", std::process::id(), id.recv().unwrap());
        Room { path: path.into(), _leave: leave }
    }
}

/// The other end of the proxy's socket.
pub(crate) struct FakeProxy(Channel);

impl FakeProxy {
    pub(crate) fn connect(path: &Path) -> FakeProxy {
        let channel = Channel::connect(path).unwrap();
        SockRef::from(&channel).set_read_timeout(Some(SOON)).unwrap();
        FakeProxy(channel)
    }

    pub(crate) fn say(&self, message: &ToAgent) {
        self.0.send(&message.encode(), &[]).unwrap();
    }

    pub(crate) fn hand(&self, message: &ToAgent, descriptors: &[OwnedFd]) {
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        self.0.send(&message.encode(), &descriptors).unwrap();
    }

    pub(crate) fn say_bytes(&self, bytes: &[u8]) {
        self.0.send(bytes, &[]).unwrap();
    }

    /// The next message; `None` at the end.
    pub(crate) fn hear(&self) -> Option<(FromAgent, Vec<OwnedFd>)> {
        let mut buffer = vec![0; LARGEST_MESSAGE];
        match self.0.recv(&mut buffer) {
            Ok((0, _)) => None,
            Ok((length, descriptors)) => Some((FromAgent::decode(&buffer[..length]).unwrap(), descriptors)),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => None,
            Err(error) => panic!("{error}"),
        }
    }

    pub(crate) fn added(&self) -> (PodAdded, Vec<OwnedFd>) {
        match self.hear() {
            Some((FromAgent::PodAdded(pod), listeners)) => (pod, listeners),
            other => panic!("{other:?}"),
        }
    }
}
