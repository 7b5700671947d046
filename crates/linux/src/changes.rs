//! What changes in a network namespace, told by the kernel as it happens: rules of nftables, routes, policy rules, addresses,
//! interfaces and filters.
//!
//! Only that something changed is taken from it. What is there now is read from the kernel by who wants to know, so that a
//! notification that was lost, or that somebody made up, does no harm.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

/// Groups of rtnetlink (`enum rtnetlink_groups`): links, traffic control, and addresses, routes and rules of both families.
const ROUTE_GROUPS: [u32; 8] = [1, 4, 5, 7, 8, 9, 11, 19];
/// Group of nfnetlink (`NFNLGRP_NFTABLES`).
const NFTABLES_GROUPS: [u32; 1] = [7];
/// Notifications that are taken at once; who makes more does not keep the reader for longer.
const AT_ONCE: usize = 1024;

/// What is told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// Interfaces, addresses, routes, policy rules, and filters on interfaces.
    Network,
    /// Tables of nftables and all that is in them.
    Nftables,
}

/// What was there to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// All of it; whether there was something.
    All(bool),
    /// Much, and there may be more.
    Some,
}

/// Notifications of one network namespace. Non-blocking: it is readable when there is something.
#[derive(Debug)]
pub struct Changes {
    socket: Socket,
}

impl Changes {
    /// Listens from now on, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel has no such notifications, or there is no descriptor left.
    pub fn of(subject: Subject) -> io::Result<Changes> {
        let (protocol, groups) = match subject {
            Subject::Network => (NETLINK_ROUTE, &ROUTE_GROUPS[..]),
            Subject::Nftables => (NETLINK_NETFILTER, &NFTABLES_GROUPS[..]),
        };
        let mut socket = Socket::new(protocol)?;
        socket.set_non_blocking(true)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        for group in groups {
            socket.add_membership(*group)?;
        }
        Ok(Changes { socket })
    }

    /// Takes what is there. What the kernel had to leave out, because it was more than is kept, counts as something.
    ///
    /// # Errors
    /// The socket cannot be read.
    pub fn take(&self) -> io::Result<Taken> {
        let mut any = false;
        for _ in 0..AT_ONCE {
            match recv(self.socket.as_raw_fd(), &mut [0; 1], MsgFlags::MSG_DONTWAIT) {
                Ok(_) | Err(Errno::ENOBUFS) => any = true,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(Taken::All(any)),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(Taken::Some)
    }
}

impl AsRawFd for Changes {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
