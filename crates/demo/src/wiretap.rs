//! What a wiretap on the link between the nodes can tell about the pods' connections.
//!
//! Pure: packets in, counts out. It follows each direction of each connection from its SYN on, so that TLS records are
//! recognised by their place in the stream and not by their looks. A connection that is older than the wiretap is followed
//! from a segment on that begins with a record; where that was chance, the next record is none, and all from there on counts
//! as clear. What it cannot follow it counts as such, and never as encrypted.

use std::collections::{BTreeMap, BTreeSet, HashMap};
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
    /// How many handshakes agreed on which key exchange, by its number in the IANA registry, as each ServerHello says.
    pub(crate) groups: BTreeMap<u16, u64>,
    /// How often the marker passed by in clear, in whatever connection.
    pub(crate) markers: u64,
    /// The first bytes of the first connection.
    pub(crate) sample: Vec<u8>,
    /// The ports that connections were made to.
    pub(crate) ports: BTreeSet<u16>,
}

/// One direction of a connection.
struct Flow {
    /// The sequence number of its SYN.
    first: u32,
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
            let first = tcp.sequence_number();
            // A SYN that is sent again must not set back a connection whose bytes are followed already.
            let again = self.flows.get(&(from, to)).is_some_and(|flow| flow.first == first);
            if !again && self.flows.len() < MOST_FLOWS {
                let flow = Flow { first, next: first.wrapping_add(1), state: State::Fresh, hello: None };
                self.flows.insert((from, to), flow);
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
        if self.flows.len() < MOST_FLOWS && begins_with_a_record(payload) {
            self.flows.entry(key).or_insert_with(|| Flow {
                first: sequence.wrapping_sub(1),
                next: sequence,
                state: State::Tls { header: Vec::new(), left: 0, kind: 0 },
                hello: None,
            });
        }
        let seen = &mut self.seen;
        let Some(flow) = self.flows.get_mut(&key) else {
            seen.payload += payload.len() as u64;
            seen.not_followed += payload.len() as u64;
            seen.markers += occurrences(&self.marker, payload);
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
        seen.markers += occurrences(&self.marker, fresh);
        flow.take(fresh, seen);
    }
}

/// Whether these bytes are application data of TLS from their first on.
fn begins_with_a_record(bytes: &[u8]) -> bool {
    let Some(&[23, 3, 3, high, low]) = bytes.first_chunk::<RECORD_HEADER>() else { return false };
    (17..=LONGEST_RECORD).contains(&(usize::from(high) << 8 | usize::from(low)))
}

/// How often the marker is in these bytes; an empty one is nowhere.
fn occurrences(marker: &[u8], bytes: &[u8]) -> u64 {
    if marker.is_empty() {
        return 0;
    }
    bytes.windows(marker.len()).filter(|window| *window == marker).count() as u64
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
                if ended && let Some(group) = server_hello_group(hello) {
                    *seen.groups.entry(group).or_default() += 1;
                }
            }
            bytes = &bytes[part..];
        }
    }
}

/// What a HelloRetryRequest has in the place of its random (RFC 8446, section 4.1.3).
const RETRY: [u8; 32] = [
    0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11, 0xbe, 0x1d, 0x8c, 0x02, 0x1e, 0x65, 0xb8, 0x91, 0xc2, 0xa2, 0x11,
    0x16, 0x7a, 0xbb, 0x8c, 0x5e, 0x07, 0x9e, 0x09, 0xe2, 0xc8, 0xa8, 0x33, 0x9c,
];

/// The group of the key share in a ServerHello of TLS 1.3 (RFC 8446, sections 4.1.3, 4.2.1 and 4.2.8); `None` for every
/// other message. A HelloRetryRequest agrees on nothing yet: its handshake counts by the ServerHello that follows.
fn server_hello_group(message: &[u8]) -> Option<u16> {
    const SERVER_HELLO: u8 = 2;
    const KEY_SHARE: u16 = 51;
    const SUPPORTED_VERSIONS: u16 = 43;
    const TLS_1_3: u16 = 0x0304;
    let number = |bytes: &[u8]| Some(u16::from_be_bytes(bytes.get(..2)?.try_into().ok()?));
    if *message.first()? != SERVER_HELLO {
        return None;
    }
    // Type and length, version, random; then the session, suite and compression.
    if *message.get(4 + 2..)?.first_chunk::<32>()? == RETRY {
        return None;
    }
    let session = message.get(4 + 2 + 32..)?;
    let rest = session.get(1 + usize::from(*session.first()?) + 2 + 1..)?;
    let mut extensions = rest.get(2..2 + usize::from(number(rest)?))?;
    let (mut group, mut version) = (None, None);
    while extensions.len() >= 4 {
        let (kind, length) = (number(extensions)?, usize::from(number(&extensions[2..])?));
        let body = extensions.get(4..4 + length)?;
        match kind {
            KEY_SHARE => group = number(body),
            SUPPORTED_VERSIONS => version = number(body),
            _ => {}
        }
        extensions = &extensions[4 + length..];
    }
    group.filter(|_| version == Some(TLS_1_3))
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
            assert_eq!(seen.groups, [(4588, 1)].into(), "{size}");
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
        let again = analysis(&[frame(9, None), frame(10, Some(b"abcd")), frame(9, None), frame(10, Some(b"abcdef"))]);
        assert_eq!((again.payload, again.clear, again.not_followed), (6, 6, 0));
        let gap = analysis(&[frame(9, None), frame(10, Some(b"abcd")), frame(20, Some(b"xy"))]);
        assert_eq!((gap.clear, gap.not_followed), (4, 2));
        let older = [record(23, &[1; 40]), record(23, &[2; 17])].concat();
        let joined = analysis(&[frame(10, Some(&older[..50])), frame(60, Some(&older[50..]))]);
        assert_eq!((joined.tls, joined.records, joined.not_followed), (older.len() as u64, 2, 0));
        let chance = analysis(&[frame(10, Some(&record(23, &[1; 40]))), frame(55, Some(b"a secret"))]);
        assert_eq!((chance.tls, chance.clear, chance.markers), (45, 8, 1));
        let unknown = analysis(&[frame(10, Some(b"a secret"))]);
        assert_eq!((unknown.clear, unknown.not_followed, unknown.markers), (0, 8, 1));
    }

    #[test]
    fn only_a_server_hello_of_tls_1_3_that_agrees_counts_as_a_handshake() {
        assert_eq!(server_hello_group(&server_hello(29)), Some(29));
        let mut retry = server_hello(4588);
        retry[6..38].copy_from_slice(&RETRY);
        assert_eq!(server_hello_group(&retry), None);
        let mut older = server_hello(4588);
        let version = older.windows(6).position(|window| window == [0, 43, 0, 2, 3, 4]).unwrap();
        older[version + 5] = 3;
        assert_eq!(server_hello_group(&older), None);
        let hello = server_hello(4588);
        assert!((0..hello.len()).all(|length| server_hello_group(&hello[..length]).is_none()), "cut off");
    }

    #[test]
    fn connections_over_ipv6_count_and_those_of_others_do_not() {
        let (client, server) = ([0xfd; 16], [0xfc; 16]);
        let builder = |syn: bool, to: [u8; 16]| {
            let tcp =
                PacketBuilder::ethernet2([0; 6], [1; 6]).ipv6(client, to, 64).tcp(40_000, 8080, 9 + u32::from(!syn), 9);
            let (tcp, payload) = if syn { (tcp.syn(), &b""[..]) } else { (tcp.ack(1), &b"hello"[..]) };
            let mut bytes = Vec::new();
            tcp.write(&mut bytes, payload).unwrap();
            bytes
        };
        let mut analysis = Analysis::new([client.into(), server.into()].into(), "");
        for to in [server, [0xfb; 16]] {
            analysis.packet(&builder(true, to));
            analysis.packet(&builder(false, to));
        }
        let seen = analysis.seen();
        assert_eq!((seen.payload, seen.clear, seen.markers), (5, 5, 0));
    }
}
