//! A blocking netlink socket: one request and its acknowledgement, one dump, or one batch.
//!
//! A socket belongs to the network namespace in which it was opened and stays there, so open it
//! inside [`NetNs::enter`](crate::netns::NetNs::enter) and use it from anywhere.
//!
//! Every wait ends: an answer that does not come is [`Error::Timeout`], an answer that is too long
//! is [`Error::TooLong`], an answer that cannot be read is an error and never half a result.

use std::io;
use std::time::Duration;

use netlink_packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable, NlasIterator,
};
use netlink_sys::{SocketAddr, protocols};
use nix::sys::socket::sockopt::{ReceiveTimeout, SndBuf, SndBufForce};
use nix::sys::socket::{getsockopt, setsockopt};
use nix::sys::time::TimeVal;

/// How long the kernel may take for one answer. It answers within microseconds; seconds mean that
/// something holds a lock for good, and a caller that waits for ever would hide that.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The largest datagram taken. The kernel fills dumps up to 32 KiB, and answers single requests with
/// less than a page.
const LARGEST_DATAGRAM: usize = 64 * 1024;
/// The most bytes that one dump may have: 10,000 rules of ours are a tenth of it.
const LARGEST_DUMP: usize = 32 * 1024 * 1024;
/// How often a dump that a concurrent change made inconsistent is asked for again.
const DUMP_ATTEMPTS: usize = 8;

/// Flags of a netlink header that the library has no name for (`linux/netlink.h`).
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
/// The text of an extended acknowledgement.
const NLMSGERR_ATTR_MSG: u16 = 1;
const NETLINK_HEADER: usize = 16;

/// Why a netlink request had no result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No socket: the kernel lacks the protocol, or this process has no descriptor left.
    #[error("cannot open a netlink socket: {0}")]
    Open(io::Error),
    /// The kernel said no.
    #[error("the kernel refused to {what}: {source}{detail}")]
    Refused {
        /// The request, as in "add the rule".
        what: String,
        /// The error number.
        source: io::Error,
        /// The kernel's own explanation with a separator before it; empty when it gave none.
        detail: String,
    },
    /// Sending or receiving failed on this side.
    #[error("cannot {what} over netlink: {source}")]
    Io {
        /// The request.
        what: String,
        /// What went wrong.
        source: io::Error,
    },
    /// No answer in time.
    #[error("the kernel did not answer within {} s the request to {what}", TIMEOUT.as_secs())]
    Timeout {
        /// The request.
        what: String,
    },
    /// An answer beyond the bounds of this module.
    #[error("the kernel's answer to the request to {what} is too long")]
    TooLong {
        /// The request.
        what: String,
    },
    /// Bytes that are not an answer.
    #[error("cannot read the kernel's answer to the request to {what}: {detail}")]
    Malformed {
        /// The request.
        what: String,
        /// Where reading stopped.
        detail: String,
    },
    /// Others change what is being read, faster than it can be read.
    #[error("cannot {what}: it changed each of {DUMP_ATTEMPTS} times while it was read")]
    Unstable {
        /// The request.
        what: String,
    },
}

impl Error {
    /// Whether the kernel refused something because an interface is down.
    pub fn is_down(&self) -> bool {
        self.errno() == Some(libc::ENETDOWN)
    }

    /// The error number, where the kernel gave one: `EEXIST`, `ENOENT`, `EPERM`…
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::Open(source) | Error::Refused { source, .. } | Error::Io { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

/// The kernel's subsystem that a socket speaks to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Links, addresses, routes, policy rules (rtnetlink).
    Route,
    /// nftables and conntrack (nfnetlink).
    Netfilter,
    /// Sockets (sock_diag).
    SocketDiagnosis,
}

/// A netlink socket.
#[derive(Debug)]
pub struct Socket {
    socket: netlink_sys::Socket,
    sequence: u32,
}

impl Socket {
    /// Opens a socket in the network namespace of the calling thread.
    pub fn open(protocol: Protocol) -> Result<Socket, Error> {
        let number = match protocol {
            Protocol::Route => protocols::NETLINK_ROUTE,
            Protocol::Netfilter => protocols::NETLINK_NETFILTER,
            Protocol::SocketDiagnosis => protocols::NETLINK_SOCK_DIAG,
        };
        let mut socket = netlink_sys::Socket::new(number).map_err(Error::Open)?;
        socket.bind_auto().map_err(Error::Open)?;
        // Connected to the kernel (port 0): a datagram of another process of this machine, which may
        // send to any netlink port, is not taken for an answer.
        socket.connect(&SocketAddr::new(0, 0)).map_err(Error::Open)?;
        // Without these two an error is a bare number; kernels before 4.12 do without.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        let timeout = TimeVal::new(TIMEOUT.as_secs() as i64, 0);
        setsockopt(&socket, ReceiveTimeout, &timeout).map_err(|errno| Error::Open(errno.into()))?;
        Ok(Socket { socket, sequence: 0 })
    }

    /// One change, and the kernel's word that it is done. `flags` are added to request and
    /// acknowledgement (`NLM_F_CREATE`, `NLM_F_EXCL`, `NLM_F_REPLACE`…); `what` completes the sentence "the kernel
    /// refused to …".
    pub fn request<M>(&mut self, what: &str, message: M, flags: u16) -> Result<(), Error>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        self.batch(what, vec![(message, flags)])
    }

    /// One question that has exactly one answer.
    pub fn ask<M>(&mut self, what: &str, message: M, flags: u16) -> Result<M, Error>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        let sequence = self.send(what, vec![(message, flags)])?;
        loop {
            for reply in self.receive::<M>(what)? {
                if reply.header.sequence_number != sequence {
                    continue;
                }
                match reply.payload {
                    NetlinkPayload::InnerMessage(answer) => return Ok(answer),
                    NetlinkPayload::Error(error) => {
                        return Err(refused(what, &error, reply.header.flags));
                    }
                    _ => return Err(malformed(what, "neither an answer nor an error")),
                }
            }
        }
    }

    /// All objects that match `message`.
    pub fn dump<M>(&mut self, what: &str, message: M) -> Result<Vec<M>, Error>
    where
        M: NetlinkSerializable + NetlinkDeserializable + Clone,
    {
        for _ in 0..DUMP_ATTEMPTS {
            if let Some(all) = self.dump_once(what, message.clone())? {
                return Ok(all);
            }
        }
        Err(Error::Unstable { what: what.to_owned() })
    }

    /// As [`Socket::dump`], where the kernel leaves out what does not match the attributes of `message`.
    /// Kernels before 4.20 leave nothing out, so the caller looks again.
    pub(crate) fn dump_filtered<M>(&mut self, what: &str, message: M) -> Result<Vec<M>, Error>
    where
        M: NetlinkSerializable + NetlinkDeserializable + Clone,
    {
        let strict = self.socket.set_netlink_get_strict_chk(true).is_ok();
        let all = self.dump(what, message);
        if strict {
            let _ = self.socket.set_netlink_get_strict_chk(false);
        }
        all
    }

    /// `None` when something changed in the middle.
    fn dump_once<M>(&mut self, what: &str, message: M) -> Result<Option<Vec<M>>, Error>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        let sequence = self.send(what, vec![(message, NLM_F_DUMP)])?;
        let (mut all, mut bytes, mut interrupted) = (Vec::new(), 0, false);
        loop {
            for reply in self.receive::<M>(what)? {
                if reply.header.sequence_number != sequence {
                    continue;
                }
                bytes += reply.header.length as usize;
                if bytes > LARGEST_DUMP {
                    return Err(Error::TooLong { what: what.to_owned() });
                }
                interrupted |= reply.header.flags & NLM_F_DUMP_INTR != 0;
                match reply.payload {
                    NetlinkPayload::InnerMessage(answer) => all.push(answer),
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        let source = io::Error::from_raw_os_error(-done.code);
                        let detail = explanation(&done.extended_ack);
                        return Err(Error::Refused { what: what.to_owned(), source, detail });
                    }
                    NetlinkPayload::Done(_) => return Ok((!interrupted).then_some(all)),
                    NetlinkPayload::Error(error) => {
                        return Err(refused(what, &error, reply.header.flags));
                    }
                    _ => return Err(malformed(what, "neither an object, an error nor the end")),
                }
            }
        }
    }

    /// Several messages in one datagram, in order. For nftables, between the two marks of a batch,
    /// that is one transaction: all of it, or nothing and an error.
    ///
    /// Only the last message asks for an acknowledgement, as hundreds would not fit the receive
    /// buffer; a message that fails is reported without being asked.
    pub fn batch<M>(&mut self, what: &str, messages: Vec<(M, u16)>) -> Result<(), Error>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        self.batch_until(what, messages, 0)
    }

    /// As [`Socket::batch`], where the last `trailing` messages are marks that get no answer.
    pub(crate) fn batch_until<M>(
        &mut self,
        what: &str,
        mut messages: Vec<(M, u16)>,
        trailing: usize,
    ) -> Result<(), Error>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        let count = messages.len() as u32;
        let last_answered = messages.len() - 1 - trailing;
        messages[last_answered].1 |= NLM_F_ACK;
        let first = self.sequence.wrapping_add(1);
        self.send(what, messages)?;
        let last = first.wrapping_add(last_answered as u32);
        let mut first_error = None;
        loop {
            for reply in self.receive::<M>(what)? {
                let sequence = reply.header.sequence_number;
                if sequence.wrapping_sub(first) >= count {
                    continue; // of an earlier request that timed out
                }
                let NetlinkPayload::Error(answer) = reply.payload else { continue };
                let failed = answer.code.is_some();
                if failed && first_error.is_none() {
                    first_error = Some(refused(what, &answer, reply.header.flags));
                }
                // An error at the batch's opening mark ends all of it: nothing else will come.
                if sequence == last || (failed && sequence == first) {
                    return first_error.map_or(Ok(()), Err);
                }
            }
        }
    }

    /// Sends and returns the sequence number of the last message.
    fn send<M>(&mut self, what: &str, messages: Vec<(M, u16)>) -> Result<u32, Error>
    where
        M: NetlinkSerializable,
    {
        let mut datagram = Vec::new();
        for (inner, flags) in messages {
            self.sequence = self.sequence.wrapping_add(1);
            let mut message = NetlinkMessage::new(Default::default(), NetlinkPayload::InnerMessage(inner));
            message.header.flags = NLM_F_REQUEST | flags;
            message.header.sequence_number = self.sequence;
            message.finalize();
            let start = datagram.len();
            datagram.resize(start + message.buffer_len(), 0);
            message.serialize(&mut datagram[start..]);
            datagram.resize(datagram.len().next_multiple_of(4), 0);
        }
        self.make_room(datagram.len());
        let sent = self.socket.send(&datagram, 0).map_err(|source| io_error(what, source))?;
        if sent != datagram.len() {
            return Err(io_error(what, io::ErrorKind::WriteZero.into()));
        }
        Ok(self.sequence)
    }

    /// A batch is one datagram, and the kernel takes none that is longer than the send buffer.
    fn make_room(&self, length: usize) {
        let wanted = 2 * length;
        if getsockopt(&self.socket, SndBuf).is_ok_and(|room| room < wanted) {
            // The second stops at net.core.wmem_max; where that is too little, sending says so.
            let _ =
                setsockopt(&self.socket, SndBufForce, &wanted).or_else(|_| setsockopt(&self.socket, SndBuf, &wanted));
        }
    }

    /// The messages of one datagram.
    fn receive<M>(&self, what: &str) -> Result<Vec<NetlinkMessage<M>>, Error>
    where
        M: NetlinkDeserializable,
    {
        // Not kept between calls: an agent has two sockets for each pod of its node.
        let mut buffer = vec![0; LARGEST_DATAGRAM];
        let length = loop {
            let mut space = &mut buffer[..];
            match self.socket.recv(&mut space, libc::MSG_TRUNC) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(Error::Timeout { what: what.to_owned() });
                }
                Err(source) => return Err(io_error(what, source)),
                Ok(length) => break length,
            }
        };
        if length > buffer.len() {
            return Err(Error::TooLong { what: what.to_owned() });
        }
        let mut rest = &buffer[..length];
        let mut messages = Vec::new();
        while !rest.is_empty() {
            let message =
                NetlinkMessage::<M>::deserialize(rest).map_err(|error| malformed(what, &error.to_string()))?;
            let used = (message.header.length as usize).next_multiple_of(4);
            if used < NETLINK_HEADER {
                return Err(malformed(what, "a message without a length"));
            }
            rest = rest.get(used..).unwrap_or_default();
            messages.push(message);
        }
        Ok(messages)
    }
}

fn io_error(what: &str, source: io::Error) -> Error {
    Error::Io { what: what.to_owned(), source }
}

fn malformed(what: &str, detail: &str) -> Error {
    Error::Malformed { what: what.to_owned(), detail: detail.to_owned() }
}

fn refused(what: &str, error: &ErrorMessage, flags: u16) -> Error {
    // After the error number: the header of the request, its body unless capped, then attributes.
    let attributes = (flags & NLM_F_ACK_TLVS != 0).then(|| {
        let request = match error.header.get(..4) {
            Some(length) if flags & NLM_F_CAPPED == 0 => {
                u32::from_ne_bytes([length[0], length[1], length[2], length[3]]) as usize
            }
            _ => NETLINK_HEADER,
        };
        error.header.get(request.next_multiple_of(4)..).unwrap_or_default()
    });
    Error::Refused {
        what: what.to_owned(),
        source: error.to_io(),
        detail: attributes.map(explanation).unwrap_or_default(),
    }
}

/// The text of an extended acknowledgement with a separator before it, or nothing.
fn explanation(attributes: &[u8]) -> String {
    NlasIterator::new(attributes)
        .map_while(Result::ok)
        .find(|attribute| attribute.kind() == NLMSGERR_ATTR_MSG)
        .map(|attribute| {
            let text = attribute.value().split(|byte| *byte == 0).next().unwrap_or_default();
            format!(" ({})", String::from_utf8_lossy(text))
        })
        .unwrap_or_default()
}

/// A message that is not taken apart: what is in it may be of a kind that nobody here knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Raw {
    /// Its type.
    pub(crate) kind: u16,
    /// All after the netlink header.
    pub(crate) body: Vec<u8>,
}

impl Raw {
    /// A message of the library's as one.
    pub(crate) fn of(message: &impl NetlinkSerializable) -> Raw {
        let mut body = vec![0; message.buffer_len()];
        message.serialize(&mut body);
        Raw { kind: message.message_type(), body }
    }
}

impl NetlinkSerializable for Raw {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.body.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer[..self.body.len()].copy_from_slice(&self.body);
    }
}

impl NetlinkDeserializable for Raw {
    type Error = std::convert::Infallible;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Raw, Self::Error> {
        Ok(Raw { kind: header.message_type, body: payload.to_vec() })
    }
}

/// The attributes in `bytes`, each as (type, value). The order is kept; flags of the type are dropped.
pub(crate) fn attributes(bytes: &[u8]) -> Result<Vec<(u16, Vec<u8>)>, String> {
    NlasIterator::new(bytes)
        .map(|attribute| {
            let attribute = attribute.map_err(|error| error.to_string())?;
            Ok((attribute.kind(), attribute.value().to_vec()))
        })
        .collect()
}
