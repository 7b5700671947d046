//! What a wiretap on the link between the nodes can tell about the pods' connections.
//!
//! Pure: packets in, counts out. It follows each direction of each connection from its SYN on, so that TLS records are
//! recognised by their place in the stream and not by their looks. What it cannot follow it counts as such, and never as
//! encrypted.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};

use etherparse::{NetSlice, SlicedPacket, TransportSlice};

/// The most directions of connections that are followed at once; packets of others count as not followed.
const MOST_FLOWS: usize = 20_000;
/// Bytes of a sample.
const SAMPLE: usize = 48;
/// The header of a TLS record: type, version, length (RFC 8446, section 5.1).
const RECORD_HEADER: usize = 5;
/// The longest record: 2^14 bytes and 256 of expansion (RFC 8446, section 5.2).
const LONGEST_RECORD: usize = 16_384 + 256;
/// How much of a ServerHello is looked at; a hybrid key share makes it some 1,200 bytes long.
const HELLO: usize = 4096;

/// What was seen so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Bytes that applications, or their proxies, sent.
    pub(crate) payload: u64,
    /// Of these, in clear.
    pub(crate) clear: u64,
    /// Of these, inside TLS records.
    pub(crate) tls: u64,
    /// Of these, in connections that were open before the wiretap was, or that lost a packet.
    pub(crate) not_followed: u64,
    /// TLS records.
    pub(crate) records: u64,
    /// The key exchange of each finished ServerHello, as its number in the IANA registry.
    pub(crate) groups: Vec<u16>,
    /// How often the marker passed by in clear.
    pub(crate) markers: u64,
    /// The first bytes of the first connection.
    pub(crate) sample: Vec<u8>,
    /// The ports that connections were made to.
    pub(crate) ports: BTreeSet<u16>,
}

/// One direction of a connection.
struct Flow {
    /// The sequence number of the next byte.
    next: u32,
    state: State,
    /// The handshake message that is being gathered, while it may be a ServerHello.
    hello: Option<Vec<u8>>,
}

enum State {
    /// No byte yet.
    Fresh,
    /// In clear, for good.
    Clear,
    /// Within TLS: what is gathered of the next header, then bytes that are left of the record and its type.
    Tls { header: Vec<u8>, left: usize, kind: u8 },
    /// Lost.
    Lost,
}

/// The analysis of a link.
pub(crate) struct Analysis {
    /// Only connections between two of these count.
    pods: BTreeSet<IpAddr>,
    marker: Vec<u8>,
    flows: HashMap<(SocketAddr, SocketAddr), Flow>,
    seen: Seen,
}

impl Analysis {
    pub(crate) fn new(pods: BTreeSet<IpAddr>, marker: &str) -> Analysis {
        Analysis { pods, marker: marker.as_bytes().to_vec(), flows: HashMap::new(), seen: Seen::default() }
    }

    pub(crate) fn seen(&self) -> &Seen {
        &self.seen
    }

    /// Takes an Ethernet frame. What is not TCP between two of the pods is ignored.
    pub(crate) fn packet(&mut self, frame: &[u8]) {
        let Ok(sliced) = SlicedPacket::from_ethernet(frame) else { return };
        let Some(TransportSlice::Tcp(tcp)) = &sliced.transport else { return };
        let (source, destination): (IpAddr, IpAddr) = match &sliced.net {
            Some(NetSlice::Ipv4(ip)) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
            Some(NetSlice::Ipv6(ip)) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
            _ => return,
        };
        if !self.pods.contains(&source) || !self.pods.contains(&destination) {
            return;
        }
        let from = SocketAddr::new(source, tcp.source_port());
        let to = SocketAddr::new(destination, tcp.destination_port());
        if tcp.syn() {
            if !tcp.ack() {
                self.seen.ports.insert(to.port());
            }
            if self.flows.len() < MOST_FLOWS {
                let next = tcp.sequence_number().wrapping_add(1);
                self.flows.insert((from, to), Flow { next, state: State::Fresh, hello: None });
            }
            return;
        }
        self.payload((from, to), tcp.sequence_number(), tcp.payload());
        if tcp.rst() {
            self.flows.remove(&(from, to));
            self.flows.remove(&(to, from));
        }
    }

    fn payload(&mut self, key: (SocketAddr, SocketAddr), sequence: u32, payload: &[u8]) {
        if payload.is_empty() {
            return;
        }
        let seen = &mut self.seen;
        let Some(flow) = self.flows.get_mut(&key) else {
            seen.payload += payload.len() as u64;
            seen.not_followed += payload.len() as u64;
            return;
        };
        // What was seen already is sent again now and then.
        let behind = flow.next.wrapping_sub(sequence);
        let fresh = match payload.get(behind as usize..) {
            Some(fresh) => fresh,
            None if behind < u32::MAX / 2 => return,
            None => {
                flow.state = State::Lost;
                payload
            }
        };
        flow.next = flow.next.wrapping_add(fresh.len() as u32);
        seen.payload += fresh.len() as u64;
        if seen.sample.is_empty() {
            seen.sample = fresh[..fresh.len().min(SAMPLE)].to_vec();
        }
        if !self.marker.is_empty() {
            seen.markers += fresh.windows(self.marker.len()).filter(|window| *window == self.marker).count() as u64;
        }
        flow.take(fresh, seen);
    }
}

impl Flow {
    fn take(&mut self, bytes: &[u8], seen: &mut Seen) {
        if matches!(self.state, State::Fresh) {
            // A connection that is TLS begins with a handshake record.
            let tls = bytes[0] == 22 && bytes.get(1).is_none_or(|major| *major == 3);
            self.state = if tls { State::Tls { header: Vec::new(), left: 0, kind: 0 } } else { State::Clear };
        }
        match &mut self.state {
            State::Fresh | State::Clear => seen.clear += bytes.len() as u64,
            State::Lost => seen.not_followed += bytes.len() as u64,
            State::Tls { .. } => self.records(bytes, seen),
        }
    }

    fn records(&mut self, mut bytes: &[u8], seen: &mut Seen) {
        while !bytes.is_empty() {
            let State::Tls { header, left, kind } = &mut self.state else { return };
            if *left == 0 {
                let part = bytes.len().min(RECORD_HEADER - header.len());
                header.extend_from_slice(&bytes[..part]);
                bytes = &bytes[part..];
                if let &[record, major, _, high, low] = header.as_slice() {
                    let length = usize::from(high) << 8 | usize::from(low);
                    if !(20..=23).contains(&record) || major != 3 || length == 0 || length > LONGEST_RECORD {
                        // It was none after all: everything from here on is as good as clear.
                        seen.clear += (RECORD_HEADER + bytes.len()) as u64;
                        self.state = State::Clear;
                        return;
                    }
                    seen.records += 1;
                    seen.tls += RECORD_HEADER as u64;
                    (*left, *kind) = (length, record);
                    header.clear();
                    self.hello = (record == 22).then(Vec::new);
                }
                continue;
            }
            let part = bytes.len().min(*left);
            seen.tls += part as u64;
            *left -= part;
            let ended = *left == 0;
            if let Some(hello) = &mut self.hello
                && hello.len() + part <= HELLO
            {
                hello.extend_from_slice(&bytes[..part]);
                if ended {
                    seen.groups.extend(server_hello_group(hello));
                }
            }
            bytes = &bytes[part..];
        }
    }
}

/// The group of the key share in a ServerHello (RFC 8446, sections 4.1.3 and 4.2.8); `None` for every other message, and
/// for one that has no key share, as TLS 1.2.
fn server_hello_group(message: &[u8]) -> Option<u16> {
    const SERVER_HELLO: u8 = 2;
    const KEY_SHARE: u16 = 51;
    let number = |bytes: &[u8]| Some(u16::from_be_bytes(bytes.get(..2)?.try_into().ok()?));
    if *message.first()? != SERVER_HELLO {
        return None;
    }
    // Type and length, version, random; then the session, suite and compression.
    let session = message.get(4 + 2 + 32..)?;
    let rest = session.get(1 + usize::from(*session.first()?) + 2 + 1..)?;
    let mut extensions = rest.get(2..)?;
    while extensions.len() >= 4 {
        let (kind, length) = (number(extensions)?, usize::from(number(&extensions[2..])?));
        let body = extensions.get(4..4 + length)?;
        if kind == KEY_SHARE {
            return number(body);
        }
        extensions = &extensions[4 + length..];
    }
    None
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;

    const CLIENT: [u8; 4] = [10, 88, 16, 2];
    const SERVER: [u8; 4] = [10, 88, 17, 2];

    /// A packet from the client, with its sequence number; `None` is a SYN.
    fn frame(sequence: u32, payload: Option<&[u8]>) -> Vec<u8> {
        let builder = PacketBuilder::ethernet2([0; 6], [1; 6]).ipv4(CLIENT, SERVER, 64);
        let builder = builder.tcp(40_000, 8080, sequence, 1000);
        let mut bytes = Vec::new();
        match payload {
            None => builder.syn().write(&mut bytes, &[]).unwrap(),
            Some(payload) => builder.ack(1).write(&mut bytes, payload).unwrap(),
        }
        bytes
    }

    fn analysis(packets: &[Vec<u8>]) -> Seen {
        let mut analysis = Analysis::new([CLIENT.into(), SERVER.into()].into(), "secret");
        packets.iter().for_each(|packet| analysis.packet(packet));
        analysis.seen().clone()
    }

    fn record(kind: u8, body: &[u8]) -> Vec<u8> {
        [&[kind, 3, 3, (body.len() >> 8) as u8, body.len() as u8], body].concat()
    }

    fn server_hello(group: u16) -> Vec<u8> {
        let share = [&51u16.to_be_bytes()[..], &4u16.to_be_bytes(), &group.to_be_bytes(), &[0, 0]].concat();
        let extensions = [&(share.len() as u16 + 6).to_be_bytes()[..], &[0, 43, 0, 2, 3, 4], &share].concat();
        [&[2, 0, 0, 90, 3, 3][..], &[7; 32], &[0], &[0x13, 1], &[0], &extensions].concat()
    }

    #[test]
    fn a_request_in_clear_is_clear_and_its_marker_is_found() {
        let seen = analysis(&[frame(9, None), frame(10, Some(b"GET /secret HTTP/1.1\r\n"))]);
        assert_eq!((seen.clear, seen.tls, seen.markers, seen.records), (22, 0, 1, 0));
        assert_eq!(seen.sample, b"GET /secret HTTP/1.1\r\n");
        assert_eq!(seen.ports, [8080].into());
    }

    #[test]
    fn tls_is_followed_across_segments_of_any_size_and_its_group_is_read() {
        let stream = [record(22, &server_hello(4588)), record(23, &[9; 700]), record(23, &[8; 3])].concat();
        for size in [1, 2, 3, 5, 7, 100, 5000] {
            let mut packets = vec![frame(9, None)];
            for (number, part) in stream.chunks(size).enumerate() {
                packets.push(frame(10 + (number * size) as u32, Some(part)));
            }
            let seen = analysis(&packets);
            assert_eq!((seen.records, seen.tls, seen.clear), (3, stream.len() as u64, 0), "{size}");
            assert_eq!(seen.groups, [4588], "{size}");
        }
    }

    #[test]
    fn what_follows_tls_and_is_none_counts_as_clear() {
        let seen = analysis(&[frame(9, None), frame(10, Some(&record(23, &[1; 4])))]);
        assert_eq!((seen.tls, seen.clear), (0, 9), "no connection begins with application data");
        let stream = [record(22, &[1; 4]), b"plain text".to_vec()].concat();
        let seen = analysis(&[frame(9, None), frame(10, Some(&stream))]);
        assert_eq!((seen.tls, seen.clear), (9, 10));
    }

    #[test]
    fn a_segment_that_is_sent_again_counts_once_and_a_gap_is_not_followed() {
        let again = analysis(&[frame(9, None), frame(10, Some(b"abcd")), frame(10, Some(b"abcdef"))]);
        assert_eq!((again.payload, again.clear), (6, 6));
        let gap = analysis(&[frame(9, None), frame(10, Some(b"abcd")), frame(20, Some(b"xy"))]);
        assert_eq!((gap.clear, gap.not_followed), (4, 2));
        let unknown = analysis(&[frame(10, Some(b"abcd"))]);
        assert_eq!((unknown.clear, unknown.not_followed), (0, 4));
    }
}
