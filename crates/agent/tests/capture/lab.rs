//! A node and two pods, each a network namespace; pods are routed as the ptp CNI plugin does it.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use agent::capture::Capture;
use agent::rules::{CapturePlan, Marks};
use ipnet::IpNet;
use linux::links::Links;
use linux::netns::NetNs;
use nix::sched::{CloneFlags, unshare};
use socket2::{Domain, Socket, Type};

pub(crate) const GATEWAY: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 8, 0, 1)), IpAddr::V6(Ipv6Addr::new(0xfd08, 0, 0, 0, 0, 0, 0, 1))];
pub(crate) const A: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 8, 1, 5)), IpAddr::V6(Ipv6Addr::new(0xfd08, 1, 0, 0, 0, 0, 0, 5))];
pub(crate) const B: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 8, 2, 5)), IpAddr::V6(Ipv6Addr::new(0xfd08, 2, 0, 0, 0, 0, 0, 5))];
/// Indexes into the pairs above.
pub(crate) const FAMILIES: [usize; 2] = [0, 1];

/// How long something may take that takes microseconds.
const SOON: Duration = Duration::from_secs(5);

/// Runs `work` where it may make network namespaces: root in a thread, another user in a new
/// process that is root of a user namespace. `test` is the test's own function, for its name.
pub(crate) fn with_privilege<F: Fn()>(_test: F, work: impl FnOnce() + Send) {
    if nix::unistd::geteuid().is_root() {
        std::thread::scope(|scope| {
            scope.spawn(work);
        });
        return;
    }
    let name = std::any::type_name::<F>();
    let name = name.split_once("::").map_or(name, |(_crate, name)| name);
    let again = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "--mount"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .status()
        .expect("unshare (util-linux) can be run");
    assert!(again.success(), "the test failed in its user namespace");
}

pub(crate) struct Lab {
    pub(crate) node: NetNs,
    pub(crate) a: NetNs,
    pub(crate) b: NetNs,
}

impl Lab {
    pub(crate) fn new() -> Lab {
        let [node, a, b] = [(); 3].map(|()| new_namespace());
        let mut links = Links::of(&node).unwrap();
        links.set("net/ipv4/ip_forward", "1").unwrap();
        links.set("net/ipv6/conf/all/forwarding", "1").unwrap();
        for (name, pod, addresses) in [("a", &a, A), ("b", &b, B)] {
            links.add_veth(name, "eth0", pod).unwrap();
            for gateway in GATEWAY {
                links.add_address(name, IpNet::from(gateway)).unwrap();
            }
            links.up(name).unwrap();
            let mut inside = Links::of(pod).unwrap();
            for address in addresses {
                inside.add_address("eth0", IpNet::from(address)).unwrap();
            }
            inside.up("eth0").unwrap();
            // The strictest reverse path filter, to show that nothing here needs it off.
            for interface in ["all", "eth0", "lo"] {
                inside.set(&format!("net/ipv4/conf/{interface}/rp_filter"), "1").unwrap();
            }
            for (address, everywhere) in addresses.into_iter().zip(["0.0.0.0/0", "::/0"]) {
                links.add_route(IpNet::from(address), None, name).unwrap();
                let gateway = GATEWAY[usize::from(address.is_ipv6())];
                inside.add_route(IpNet::from(gateway), None, "eth0").unwrap();
                inside.add_route(everywhere.parse().unwrap(), Some(gateway), "eth0").unwrap();
            }
            links.wait_operational(name).unwrap();
            inside.wait_operational("eth0").unwrap();
            wait_for_neighbours(&node, GATEWAY[1]);
            wait_for_neighbours(pod, addresses[1]);
        }
        Lab { node, a, b }
    }
}

/// Waits until an IPv6 address of the namespace can be found by its neighbours. The kernel joins the address's
/// group (RFC 4291, 2.7.1) some time after the interface is up; a packet before that costs a second.
fn wait_for_neighbours(namespace: &NetNs, address: IpAddr) {
    let IpAddr::V6(address) = address else { unreachable!("an IPv6 address") };
    let [.., x, y, z] = address.octets();
    let group = format!("ff0200000000000000000001ff{x:02x}{y:02x}{z:02x}");
    eventually("the interface joins its group", || {
        let groups = namespace.enter(|| std::fs::read_to_string("/proc/thread-self/net/igmp6"));
        groups.unwrap().unwrap().contains(&group)
    });
}

fn new_namespace() -> NetNs {
    std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace can be made");
        let made = NetNs::current().unwrap();
        Links::of(&made).unwrap().up("lo").unwrap();
        made
    })
    .join()
    .unwrap()
}

/// The plan of a pod from which nothing is excluded.
pub(crate) fn plan(addresses: [IpAddr; 2]) -> CapturePlan {
    CapturePlan {
        marks: Marks::random().unwrap(),
        addresses: addresses.into(),
        excluded_in: [].into(),
        excluded_out: [].into(),
    }
}

/// Listeners and routes are made, and no rules loaded.
pub(crate) fn prepared(pod: &NetNs, plan: CapturePlan) -> Capture {
    Capture::prepare(pod.try_clone().unwrap(), plan, None).unwrap()
}

/// An application: says the address that it sees, then echoes lines, then says bye. At the line
/// `quit` it ends first.
pub(crate) struct App {
    pub(crate) peers: Arc<Mutex<Vec<SocketAddr>>>,
    listener: TcpListener,
}

impl App {
    pub(crate) fn start(pod: &NetNs, address: IpAddr, port: u16) -> App {
        let listener = pod
            .enter(|| {
                let domain = if address.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
                let socket = Socket::new(domain, Type::STREAM, None).unwrap();
                if address.is_ipv6() {
                    socket.set_only_v6(true).unwrap();
                }
                socket.set_reuse_address(true).unwrap();
                socket.bind(&SocketAddr::new(address, port).into()).unwrap();
                socket.listen(1024).unwrap();
                TcpListener::from(socket)
            })
            .unwrap();
        let app = App { peers: Arc::default(), listener: listener.try_clone().unwrap() };
        let peers = app.peers.clone();
        std::thread::spawn(move || {
            while let Ok((stream, peer)) = listener.accept() {
                peers.lock().unwrap().push(peer);
                std::thread::spawn(move || greet_and_echo(stream, peer));
            }
        });
        app
    }

    /// On all addresses of a family.
    pub(crate) fn anywhere(pod: &NetNs, family: usize, port: u16) -> App {
        let any = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        App::start(pod, any[family], port)
    }
}

impl Drop for App {
    fn drop(&mut self) {
        let _ = socket2::SockRef::from(&self.listener).shutdown(std::net::Shutdown::Both);
    }
}

fn greet_and_echo(stream: TcpStream, peer: SocketAddr) -> io::Result<()> {
    let mut out = stream.try_clone()?;
    writeln!(out, "{} {}", peer.ip(), peer.port())?;
    let mut lines = BufReader::new(stream);
    let mut line = String::new();
    while lines.read_line(&mut line)? > 0 && line != "quit\n" {
        out.write_all(line.as_bytes())?;
        line.clear();
    }
    writeln!(out, "bye")
}

/// A client's connection.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) stream: BufReader<TcpStream>,
}

impl Client {
    /// Connects from `namespace`, with a bound on everything that may hang.
    pub(crate) fn connect(namespace: &NetNs, to: IpAddr, port: u16) -> io::Result<Client> {
        Client::connect_with(namespace, to, port, |_| Ok(()))
    }

    /// As [`Client::connect`], after `prepare` has had the socket.
    pub(crate) fn connect_with(
        namespace: &NetNs,
        to: IpAddr,
        port: u16,
        prepare: impl FnOnce(&Socket) -> io::Result<()>,
    ) -> io::Result<Client> {
        let domain = if to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let socket = namespace.enter(|| Socket::new(domain, Type::STREAM, None)).unwrap()?;
        socket.set_read_timeout(Some(SOON))?;
        prepare(&socket)?;
        socket.connect_timeout(&SocketAddr::new(to, port).into(), SOON)?;
        Ok(Client { stream: BufReader::new(socket.into()) })
    }

    /// The next line, without its end. An orderly end is `UnexpectedEof`.
    pub(crate) fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        match self.stream.read_line(&mut line)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(line.trim_end().to_owned()),
        }
    }

    /// The peer that the application said it saw.
    pub(crate) fn seen(&mut self) -> io::Result<(IpAddr, u16)> {
        let line = self.line()?;
        let (address, port) = line.split_once(' ').unwrap();
        Ok((address.parse().unwrap(), port.parse().unwrap()))
    }

    pub(crate) fn say(&mut self, text: &str) -> io::Result<()> {
        self.stream.get_mut().write_all(text.as_bytes())
    }

    /// Says something and hears it again.
    pub(crate) fn echo(&mut self) -> io::Result<()> {
        self.say("ping\n")?;
        assert_eq!(self.line()?, "ping");
        Ok(())
    }

    pub(crate) fn local_port(&self) -> u16 {
        self.stream.get_ref().local_addr().unwrap().port()
    }

    /// How the connection ended: the error, or `UnexpectedEof` for an orderly end.
    pub(crate) fn end(&mut self) -> io::ErrorKind {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => io::ErrorKind::UnexpectedEof,
            Err(error) => error.kind(),
        }
    }
}

/// Connects to what must refuse, and at once.
pub(crate) fn is_refused(namespace: &NetNs, to: IpAddr, port: u16) {
    let since = Instant::now();
    let error = Client::connect(namespace, to, port).expect_err("nothing must be reached");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{to} port {port}");
    let took = since.elapsed();
    assert!(took < Duration::from_millis(500), "{to} port {port} took {took:?}");
}

/// Waits until `condition` holds.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not come true");
        std::thread::yield_now();
    }
}
