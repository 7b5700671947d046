//! The listeners of a pod, which live in its network namespace.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

use linux::sockets::{self, Listen, SocketError};

use crate::rules::{CapturePlan, INBOUND_PORT, OUTBOUND_PORT};

/// Connections that wait while no proxy accepts: they are served by the next one (P8).
const BACKLOG: u32 = 4096;
/// For the hops inside the pod; the host's own choice between nodes (DESIGN 4).
pub(crate) const INSIDE: Option<&str> = Some("cubic");

/// The pod's listeners: one for each direction and family (D5).
#[derive(Debug)]
pub struct Listeners {
    /// For what the pod's programs dial.
    pub out_v4: TcpListener,
    /// The same, IPv6; `None` where the pod has none.
    pub out_v6: Option<TcpListener>,
    /// For what others dial in the pod.
    pub in_v4: TcpListener,
    /// The same, IPv6; `None` where the pod has none.
    pub in_v6: Option<TcpListener>,
}

impl Listeners {
    /// Makes them; to be called inside the pod's namespace. `owner` becomes their owner, a uid that no pod has.
    pub(crate) fn open(plan: &CapturePlan, owner: Option<u32>) -> Result<Listeners, SocketError> {
        let out = |address: IpAddr| {
            sockets::listener(Listen {
                address: SocketAddr::new(address, OUTBOUND_PORT),
                backlog: BACKLOG,
                mark: None,
                owner,
                congestion: INSIDE,
            })
        };
        // With the mark that exempts the proxy's connections to the wire: what an inbound listener
        // accepts is one, seen from the other side (D5).
        let inward = |address: IpAddr| {
            sockets::listener(Listen {
                address: SocketAddr::new(address, INBOUND_PORT),
                backlog: BACKLOG,
                mark: Some(plan.marks.outer),
                owner,
                congestion: None,
            })
        };
        let both_v6 = || Ok((out(Ipv6Addr::LOCALHOST.into())?, inward(Ipv6Addr::UNSPECIFIED.into())?));
        let needs_v6 = plan.addresses.iter().any(IpAddr::is_ipv6);
        let v6 = match both_v6() {
            Ok(both) => Some(both),
            // Where the pod has no IPv6 the rules still redirect it, to where nobody listens: refused.
            Err(error) if !needs_v6 && SocketError::is_family_missing(&error) => None,
            Err(error) => return Err(error),
        };
        let (out_v6, in_v6) = v6.unzip();
        Ok(Listeners {
            out_v4: out(Ipv4Addr::LOCALHOST.into())?,
            out_v6,
            in_v4: inward(Ipv4Addr::UNSPECIFIED.into())?,
            in_v6,
        })
    }

    /// The address of one that does not listen any more: somebody who had it shut it down.
    pub(crate) fn closed(&self) -> Option<SocketAddr> {
        let closed = self.all().find(|(_, listener)| !sockets::is_listening(listener));
        closed.map(|(address, _)| address)
    }

    /// Lets those listen that do not any more.
    pub(crate) fn listen_again(&self) -> Result<(), SocketError> {
        self.all().try_for_each(|(address, listener)| sockets::listen_again(listener, address, BACKLOG))
    }

    /// Each with the address that it was made for.
    fn all(&self) -> impl Iterator<Item = (SocketAddr, &TcpListener)> {
        let out = |address: IpAddr| SocketAddr::new(address, OUTBOUND_PORT);
        let inward = |address: IpAddr| SocketAddr::new(address, INBOUND_PORT);
        let all = [
            (out(Ipv4Addr::LOCALHOST.into()), Some(&self.out_v4)),
            (out(Ipv6Addr::LOCALHOST.into()), self.out_v6.as_ref()),
            (inward(Ipv4Addr::UNSPECIFIED.into()), Some(&self.in_v4)),
            (inward(Ipv6Addr::UNSPECIFIED.into()), self.in_v6.as_ref()),
        ];
        all.into_iter().filter_map(|(address, listener)| Some((address, listener?)))
    }
}
