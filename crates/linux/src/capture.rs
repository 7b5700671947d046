//! A wiretap: the packets that pass an interface, as `tcpdump` would see them. It reads only.
//!
//! The kernel's queue is bounded and so is every packet's copy; what did not fit is counted, so that
//! "seen nothing" can be told from "was too slow" ([`Wiretap::dropped`]).

#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::errno::Errno;
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, SockFilter, Socket, Type};

/// The longest packet that is kept whole. Segmentation offload on veth makes packets of up to 64 KiB
/// of payload; with headers they stay below this.
pub const SNAP_LENGTH: usize = 68 * 1024;

/// Bytes that the kernel may keep for us between two reads.
const QUEUE: usize = 8 * 1024 * 1024;

/// What the wiretap is to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Every packet.
    Everything,
    /// TCP over IPv4 and IPv6 (without extension headers); the rest is dropped in the kernel.
    Tcp,
}

/// Which way a packet went, from the interface's point of view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// It came in.
    In,
    /// The host sent it.
    Out,
}

/// A packet that was read into the caller's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// How many bytes of the buffer are the packet, from its Ethernet header on.
    pub captured: usize,
    /// How long the packet was on the wire; more than `captured` when the buffer was too short.
    pub on_the_wire: usize,
    /// Which way it went.
    pub direction: Direction,
}

/// A packet socket on one interface of the network namespace in which it was opened.
#[derive(Debug)]
pub struct Wiretap {
    socket: Socket,
}

impl Wiretap {
    /// Opens a wiretap on `interface`, in the namespace of the calling thread; needs CAP_NET_RAW over it.
    /// It does not block: see [`Wiretap::next`].
    pub fn open(interface: &str, interest: Interest) -> io::Result<Wiretap> {
        let index = interface_index(interface)?;
        // Protocol 0: nothing arrives until `bind`. Otherwise packets of all interfaces, unfiltered,
        // would be queued in between.
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))?;
        socket.set_nonblocking(true)?;
        if interest == Interest::Tcp {
            socket.attach_filter(&TCP_ONLY)?;
        }
        // The forced variant goes beyond `rmem_max`, and is not for ordinary users' namespaces.
        if set_receive_buffer(&socket, libc::SO_RCVBUFFORCE).is_err() {
            set_receive_buffer(&socket, libc::SO_RCVBUF)?;
        }
        socket.bind(&link_address(index))?;
        Ok(Wiretap { socket })
    }

    /// The next packet into `buffer` (of [`SNAP_LENGTH`] bytes, best), or `None` when there is none now.
    pub fn next(&self, buffer: &mut [u8]) -> io::Result<Option<Packet>> {
        let mut from = SockAddrStorage::zeroed();
        let mut length = from.size_of();
        // SAFETY: buffer and address are valid for the lengths given, and outlive the call.
        let result = Errno::result(unsafe {
            libc::recvfrom(
                self.socket.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                // The true length even when the buffer is shorter.
                libc::MSG_TRUNC | libc::MSG_DONTWAIT,
                (&raw mut from).cast(),
                &mut length,
            )
        });
        let on_the_wire = match result {
            Ok(length) => length as usize,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        // SAFETY: the kernel fills a sockaddr_ll for packet sockets, and the storage was zeroed before.
        let from = unsafe { from.view_as::<libc::sockaddr_ll>() };
        let direction = match from.sll_pkttype {
            libc::PACKET_OUTGOING => Direction::Out,
            _ => Direction::In,
        };
        Ok(Some(Packet { captured: on_the_wire.min(buffer.len()), on_the_wire, direction }))
    }

    /// How many packets were lost because the queue was full, since the last time this was asked.
    pub fn dropped(&self) -> io::Result<u32> {
        #[repr(C)]
        #[derive(Default)]
        struct Statistics {
            packets: u32,
            drops: u32,
        }
        let mut statistics = Statistics::default();
        let mut length = mem::size_of::<Statistics>() as libc::socklen_t;
        // SAFETY: the struct is `tpacket_stats`, and its length is given.
        Errno::result(unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut statistics).cast(),
                &mut length,
            )
        })?;
        Ok(statistics.drops)
    }
}

impl AsFd for Wiretap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Wiretap {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.socket.as_raw_fd()
    }
}

/// Classic BPF over an Ethernet frame: `(ip proto 6) or (ip6 next-header 6)`, whole packets.
const TCP_ONLY: [SockFilter; 9] = [
    SockFilter::new(LOAD_HALF, 0, 0, 12),              // 0: the ethertype
    SockFilter::new(JUMP_IF_EQUAL, 0, 2, 0x0800),      // 1: IPv4? on to 2, else 4
    SockFilter::new(LOAD_BYTE, 0, 0, 14 + 9),          // 2: its protocol
    SockFilter::new(JUMP_IF_EQUAL, 3, 4, TCP),         // 3: 7 or 8
    SockFilter::new(JUMP_IF_EQUAL, 0, 3, 0x86dd),      // 4: IPv6? on to 5, else 8
    SockFilter::new(LOAD_BYTE, 0, 0, 14 + 6),          // 5: its next header
    SockFilter::new(JUMP_IF_EQUAL, 0, 1, TCP),         // 6: 7 or 8
    SockFilter::new(RETURN, 0, 0, SNAP_LENGTH as u32), // 7: keep
    SockFilter::new(RETURN, 0, 0, 0),                  // 8: drop
];

// Operation codes of `linux/bpf_common.h`, put together.
const LOAD_HALF: u16 = 0x28;
const LOAD_BYTE: u16 = 0x30;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
const TCP: u32 = 6;

fn interface_index(name: &str) -> io::Result<libc::c_int> {
    let c_name = CString::new(name).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: a terminated string that outlives the call.
    match unsafe { libc::if_nametoindex(c_name.as_ptr()) } {
        0 => Err(io::Error::new(io::ErrorKind::NotFound, format!("there is no interface {name}"))),
        index => Ok(index as libc::c_int),
    }
}

fn link_address(index: libc::c_int) -> SockAddr {
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: sockaddr_ll is plain data that fits the storage, and all zeroes are valid.
    let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = index;
    // SAFETY: the storage holds the sockaddr_ll written above, of exactly this length.
    unsafe { SockAddr::new(storage, mem::size_of::<libc::sockaddr_ll>() as libc::socklen_t) }
}

fn set_receive_buffer(socket: &Socket, option: libc::c_int) -> io::Result<()> {
    let bytes = QUEUE as libc::c_int;
    // SAFETY: an int of its own length.
    Errno::result(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const bytes).cast(),
            mem::size_of_val(&bytes) as libc::socklen_t,
        )
    })?;
    Ok(())
}
