//! Interfaces, addresses and plain routes of one network namespace, over rtnetlink.
//!
//! It makes what a CNI plugin makes: pairs of virtual Ethernet across namespaces, a bridge, addresses
//! of both families, routes. Policy rules and the routing table of the capture are in [`crate::routes`].

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoBridge, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, State,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::netlink::{self, Protocol, Socket};
use crate::netns::{NetNs, NetNsError};

/// How long an interface may take to become operational. The kernel batches such events once a second.
const OPERATIONAL_WITHIN: Duration = Duration::from_secs(10);

/// Between two looks at an interface's state.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// Why an interface, address or route could not be made.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The kernel has no such kind of interface.
    #[error("this kernel has no {kind} interfaces: load the module as root (modprobe {kind})")]
    Unsupported {
        /// `veth` or `bridge`.
        kind: &'static str,
    },
    /// No interface of that name.
    #[error("there is no interface {0}")]
    NoSuchLink(String),
    /// It stays down.
    #[error("interface {name} is not operational after {} s", OPERATIONAL_WITHIN.as_secs())]
    NotOperational {
        /// Its name.
        name: String,
    },
    /// A kernel setting could not be written.
    #[error("cannot set {name} to {value}: {source}")]
    Setting {
        /// As in `net/ipv4/ip_forward`.
        name: String,
        /// What it should have become.
        value: String,
        /// What the kernel answered.
        source: io::Error,
    },
    /// Any other refusal.
    #[error(transparent)]
    Netlink(#[from] netlink::Error),
    /// The namespace cannot be entered.
    #[error(transparent)]
    Namespace(#[from] NetNsError),
}

/// The interfaces of one network namespace.
#[derive(Debug)]
pub struct Links<'a> {
    namespace: &'a NetNs,
    socket: Socket,
}

impl<'a> Links<'a> {
    /// Opens the interfaces of `namespace`.
    pub fn of(namespace: &'a NetNs) -> Result<Links<'a>, LinkError> {
        let socket = namespace.enter(|| Socket::open(Protocol::Route))??;
        Ok(Links { namespace, socket })
    }

    /// Makes a pair of virtual Ethernet interfaces: `name` here, `peer` in `peer_namespace`.
    pub fn add_veth(&mut self, name: &str, peer: &str, peer_namespace: &NetNs) -> Result<(), LinkError> {
        let mut other = LinkMessage::default();
        other.attributes =
            vec![LinkAttribute::IfName(peer.into()), LinkAttribute::NetNsFd(peer_namespace.as_fd().as_raw_fd())];
        let data = InfoData::Veth(InfoVeth::Peer(other));
        self.add(name, "veth", vec![LinkInfo::Kind(InfoKind::Veth), LinkInfo::Data(data)])
    }

    /// Makes a bridge.
    pub fn add_bridge(&mut self, name: &str) -> Result<(), LinkError> {
        // Without snooping: it would drop neighbour solicitations to groups that it has not yet heard of.
        let data = InfoData::Bridge(vec![InfoBridge::MulticastSnooping(false)]);
        self.add(name, "bridge", vec![LinkInfo::Kind(InfoKind::Bridge), LinkInfo::Data(data)])
    }

    fn add(&mut self, name: &str, kind: &'static str, info: Vec<LinkInfo>) -> Result<(), LinkError> {
        let mut link = LinkMessage::default();
        link.attributes = vec![LinkAttribute::IfName(name.into()), LinkAttribute::LinkInfo(info)];
        self.socket
            .request(
                &format!("add the {kind} interface {name}"),
                RouteNetlinkMessage::NewLink(link),
                NLM_F_CREATE | NLM_F_EXCL,
            )
            .map_err(|error| match error.errno() {
                Some(libc::EOPNOTSUPP) => LinkError::Unsupported { kind },
                _ => error.into(),
            })
    }

    /// Makes `name` a port of `bridge`.
    pub fn attach(&mut self, name: &str, bridge: &str) -> Result<(), LinkError> {
        let bridge = self.index(bridge)?;
        let mut link = LinkMessage::default();
        link.header.index = self.index(name)?;
        link.attributes = vec![LinkAttribute::Controller(bridge)];
        let what = format!("attach {name} to a bridge");
        Ok(self.socket.request(&what, RouteNetlinkMessage::SetLink(link), 0)?)
    }

    /// Sets an interface up, without IPv6 addresses of the kernel's own choice being probed first:
    /// duplicate address detection would hold packets back for a second, on a wire that we made.
    pub fn up(&mut self, name: &str) -> Result<(), LinkError> {
        self.set(&format!("net/ipv6/conf/{name}/accept_dad"), "0")?;
        self.set(&format!("net/ipv6/conf/{name}/disable_ipv6"), "0")?;
        let mut link = LinkMessage::default();
        link.header.index = self.index(name)?;
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
        let what = format!("set the interface {name} up");
        Ok(self.socket.request(&what, RouteNetlinkMessage::SetLink(link), 0)?)
    }

    /// Removes an interface, and with it the other end of its pair. One that is not there is fine.
    pub fn remove(&mut self, name: &str) -> Result<(), LinkError> {
        let index = match self.index(name) {
            Err(LinkError::NoSuchLink(_)) => return Ok(()),
            other => other?,
        };
        let mut link = LinkMessage::default();
        link.header.index = index;
        let what = format!("remove the interface {name}");
        Ok(self.socket.request(&what, RouteNetlinkMessage::DelLink(link), 0)?)
    }

    /// Gives `name` an address, usable at once (no duplicate address detection).
    pub fn add_address(&mut self, name: &str, address: IpNet) -> Result<(), LinkError> {
        let mut message = AddressMessage::default();
        message.header.family = family(address.addr());
        message.header.prefix_len = address.prefix_len();
        message.header.index = self.index(name)?;
        if address.addr().is_ipv6() {
            message.header.flags = AddressHeaderFlags::Nodad;
        }
        message.attributes = vec![AddressAttribute::Local(address.addr()), AddressAttribute::Address(address.addr())];
        let what = format!("give {name} the address {address}");
        let message = RouteNetlinkMessage::NewAddress(message);
        Ok(self.socket.request(&what, message, NLM_F_CREATE | NLM_F_REPLACE)?)
    }

    /// Routes `to` out of `name`, through the neighbour `via` or, without one, directly.
    pub fn add_route(&mut self, to: IpNet, via: Option<IpAddr>, name: &str) -> Result<(), LinkError> {
        let mut route = RouteMessage::default();
        route.header = RouteHeader {
            address_family: family(to.addr()),
            destination_prefix_length: to.prefix_len(),
            table: RouteHeader::RT_TABLE_MAIN,
            protocol: RouteProtocol::Static,
            scope: if via.is_some() { RouteScope::Universe } else { RouteScope::Link },
            kind: RouteType::Unicast,
            ..RouteHeader::default()
        };
        route.attributes = vec![RouteAttribute::Oif(self.index(name)?)];
        if to.prefix_len() > 0 {
            route.attributes.push(RouteAttribute::Destination(to.network().into()));
        }
        if let Some(via) = via {
            route.attributes.push(RouteAttribute::Gateway(via.into()));
        }
        let what = format!("route {to} through {name}");
        let message = RouteNetlinkMessage::NewRoute(route);
        Ok(self.socket.request(&what, message, NLM_F_CREATE | NLM_F_REPLACE)?)
    }

    /// Writes a kernel setting of this namespace, named by its path below `/proc/sys`.
    pub fn set(&self, name: &str, value: &str) -> Result<(), LinkError> {
        // The `net` part of /proc/sys shows the namespace of the thread that opens it.
        let written = self.namespace.enter(|| fs::write(format!("/proc/sys/{name}"), value))?;
        written.map_err(|source| LinkError::Setting { name: name.into(), value: value.into(), source })
    }

    /// Waits until packets of both families pass. An interface that was only just set up drops IPv6 until the kernel
    /// has noticed its carrier, and a neighbour's first question for an address until the kernel has joined the group
    /// that it is sent to; the neighbour asks again after a second.
    pub fn wait_operational(&mut self, name: &str) -> Result<(), LinkError> {
        let deadline = Instant::now() + OPERATIONAL_WITHIN;
        while !self.is_operational(name)? {
            if Instant::now() > deadline {
                return Err(LinkError::NotOperational { name: name.into() });
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        Ok(())
    }

    fn is_operational(&mut self, name: &str) -> Result<bool, LinkError> {
        let link = self.find(name)?;
        if !link.attributes.contains(&LinkAttribute::OperState(State::Up)) {
            return Ok(false);
        }
        let addresses = self.listed()?.into_iter().filter(|(index, _)| *index == link.header.index);
        let wanted: Vec<_> = addresses.filter_map(|(_, address)| solicited_node_group(address)).collect();
        let joined = self.namespace.enter(|| std::fs::read_to_string("/proc/thread-self/net/igmp6"))?;
        // Without IPv6 in the kernel there is no such file, and no such address.
        let joined = joined.unwrap_or_default();
        Ok(wanted.iter().all(|group| joined.contains(group)))
    }

    /// All addresses of all interfaces, without those of loopback and link scope.
    pub fn addresses(&mut self) -> Result<Vec<IpAddr>, LinkError> {
        Ok(self.listed()?.into_iter().map(|(_, address)| address).collect())
    }

    /// The same, each with the index of its interface.
    fn listed(&mut self) -> Result<Vec<(u32, IpAddr)>, LinkError> {
        Ok(addresses(&mut self.socket)?)
    }

    fn index(&mut self, name: &str) -> Result<u32, LinkError> {
        Ok(self.find(name)?.header.index)
    }

    fn find(&mut self, name: &str) -> Result<LinkMessage, LinkError> {
        let mut question = LinkMessage::default();
        question.attributes = vec![LinkAttribute::IfName(name.into())];
        let question = RouteNetlinkMessage::GetLink(question);
        match self.socket.ask(&format!("find the interface {name}"), question, 0) {
            Ok(RouteNetlinkMessage::NewLink(link)) => Ok(link),
            Ok(_) => Err(LinkError::NoSuchLink(name.into())),
            Err(error) if error.errno() == Some(libc::ENODEV) => Err(LinkError::NoSuchLink(name.into())),
            Err(error) => Err(error.into()),
        }
    }
}

/// The addresses of all interfaces of a namespace, without those of loopback and link scope, each with the index of its
/// interface. The socket is one of [`Protocol::Route`].
pub fn addresses(socket: &mut Socket) -> Result<Vec<(u32, IpAddr)>, netlink::Error> {
    let question = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let mut all = Vec::new();
    for answer in socket.dump("list addresses", question)? {
        let RouteNetlinkMessage::NewAddress(message) = answer else { continue };
        // IPv4 says `Local`; IPv6 only `Address`, unless the address has a peer.
        let found = |pick: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(pick);
        let address = found(|attribute| match attribute {
            AddressAttribute::Local(address) => Some(*address),
            _ => None,
        })
        .or_else(|| {
            found(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            })
        });
        let Some(address) = address else { continue };
        let is_link_local = match address {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        if !address.is_loopback() && !is_link_local {
            all.push((message.header.index, address));
        }
    }
    Ok(all)
}

/// The gateways of a namespace's default routes in its main table. The socket is one of [`Protocol::Route`].
pub fn gateways(socket: &mut Socket) -> Result<Vec<IpAddr>, netlink::Error> {
    let mut all = Vec::new();
    for address_family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut question = RouteMessage::default();
        question.header = RouteHeader { address_family, ..RouteHeader::default() };
        for answer in socket.dump("list routes", RouteNetlinkMessage::GetRoute(question))? {
            let RouteNetlinkMessage::NewRoute(route) = answer else { continue };
            let is_default = route.header.destination_prefix_length == 0
                && route.header.table == RouteHeader::RT_TABLE_MAIN
                && route.header.kind == RouteType::Unicast;
            let gateways = route.attributes.iter().filter_map(|attribute| match attribute {
                RouteAttribute::Gateway(RouteAddress::Inet(address)) => Some(IpAddr::from(*address)),
                RouteAttribute::Gateway(RouteAddress::Inet6(address)) => Some(IpAddr::from(*address)),
                _ => None,
            });
            all.extend(gateways.filter(|_| is_default));
        }
    }
    all.sort_unstable();
    all.dedup();
    Ok(all)
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}
/// The group that a neighbour asks for an IPv6 address (RFC 4291, section 2.7.1), as `/proc/net/igmp6` writes it.
fn solicited_node_group(address: IpAddr) -> Option<String> {
    let IpAddr::V6(address) = address else { return None };
    let [.., x, y, z] = address.octets();
    Some(format!("ff0200000000000000000001ff{x:02x}{y:02x}{z:02x}"))
}
