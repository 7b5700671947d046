//! TCP payload as it passed a wire, and whether it is TLS to the last byte.
//!
//! The judge is our own, of a few lines, and no dissector: a dissector that sees a strange byte guesses, this one says no.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

/// One direction of one connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Direction {
    /// Who sent it.
    pub from: SocketAddr,
    /// Who received it.
    pub to: SocketAddr,
    /// Its bytes, in order.
    pub bytes: Vec<u8>,
}

/// All connections of a recording to one port.
#[derive(Clone, Debug, Default)]
pub struct Streams {
    /// Both directions of each; those without payload are left out.
    pub directions: Vec<Direction>,
    port: u16,
}

impl Streams {
    /// From lines of tshark: stream, source (v4, v6), port, destination (v4, v6), port, relative sequence number, payload.
    #[track_caller]
    pub(crate) fn from_segments(port: u16, lines: &[Vec<String>]) -> Streams {
        let mut segments: BTreeMap<(u64, SocketAddr, SocketAddr), BTreeMap<i64, Vec<u8>>> = BTreeMap::new();
        for line in lines {
            let [stream, from4, from6, from_port, to4, to6, to_port, sequence, payload] = &line[..] else {
                panic!("tshark printed something else: {line:?}");
            };
            if payload.is_empty() {
                continue;
            }
            let key = (number(stream), socket(from4, from6, from_port), socket(to4, to6, to_port));
            let bytes = from_hex(payload);
            let kept = segments.entry(key).or_default().entry(place(number(sequence))).or_default();
            // A segment that was sent again may have grown.
            if bytes.len() > kept.len() {
                *kept = bytes;
            }
        }
        let directions = segments.into_iter().map(|((_, from, to), parts)| Direction { from, to, bytes: join(parts) });
        Streams { directions: directions.collect(), port }
    }

    /// The clients' halves.
    pub fn from_clients(&self) -> impl Iterator<Item = &Direction> {
        self.directions.iter().filter(|direction| direction.to.port() == self.port)
    }

    /// All payload together.
    #[must_use]
    pub fn total(&self) -> usize {
        self.directions.iter().map(|direction| direction.bytes.len()).sum()
    }

    /// The same, of connections between two addresses only.
    #[must_use]
    pub fn between(&self, one: IpAddr, other: IpAddr) -> Streams {
        let ends =
            |it: &&Direction| [it.from.ip(), it.to.ip()] == [one, other] || [it.from.ip(), it.to.ip()] == [other, one];
        Streams { directions: self.directions.iter().filter(ends).cloned().collect(), port: self.port }
    }

    /// Panics unless there is payload and every byte of it belongs to a TLS record.
    #[track_caller]
    pub fn assert_all_tls(&self) {
        assert!(self.total() > 0, "nothing passed, so nothing is proven");
        for direction in &self.directions {
            let shown = format!("{} -> {}", direction.from, direction.to);
            if let Err(problem) = tls_records(&direction.bytes) {
                panic!(
                    "{shown}: {problem}; it begins {:?}",
                    String::from_utf8_lossy(&direction.bytes[..direction.bytes.len().min(64)])
                );
            }
        }
    }
}

/// How many TLS records (RFC 8446, 5.1) make up exactly these bytes. The first must be a handshake's, or application data of a
/// connection that is older than the tap; a record that the end cuts off counts, as connections may be cut.
///
/// # Errors
/// Where the first byte is that belongs to no record.
pub fn tls_records(bytes: &[u8]) -> Result<usize, String> {
    const LONGEST: usize = (1 << 14) + 256;
    let (mut at, mut count) = (0, 0);
    while at < bytes.len() {
        let header = &bytes[at..bytes.len().min(at + 5)];
        let fits = |index: usize, allowed: &dyn Fn(u8) -> bool| header.get(index).is_none_or(|byte| allowed(*byte));
        let kinds: &[u8] = if count == 0 { &[22, 23] } else { &[20, 21, 22, 23] };
        if !(fits(0, &|byte| kinds.contains(&byte)) && fits(1, &|byte| byte == 3) && fits(2, &|byte| byte <= 3)) {
            return Err(format!("byte {at} of {} begins no TLS record ({header:02x?})", bytes.len()));
        }
        count += 1;
        let [_, _, _, high, low] = header else { break };
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        // Sealed, even nothing has a type and a tag.
        let least = if header[0] == 23 { 17 } else { 1 };
        if !(least..=LONGEST).contains(&length) {
            return Err(format!("the record at byte {at} claims {length} bytes"));
        }
        at += 5 + length;
    }
    Ok(count)
}

/// Puts segments in order; those that were sent again overlap. A gap ends the direction, because what follows cannot be judged.
#[track_caller]
fn join(parts: BTreeMap<i64, Vec<u8>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut next = parts.keys().next().copied().unwrap_or_default();
    for (sequence, part) in parts {
        assert!(sequence <= next, "the recording misses bytes {next} to {sequence} of a connection");
        let known = usize::try_from(next - sequence).expect("a recording fits in memory");
        if let Some(new) = part.get(known..) {
            bytes.extend_from_slice(new);
            next += new.len() as i64;
        }
    }
    bytes
}

/// Where a segment stands, counted from the first packet of the recording. What was lost before that and is sent again after it
/// stands before it.
fn place(sequence: u64) -> i64 {
    const WHOLE: i64 = 1 << 32;
    let sequence = sequence as i64;
    if sequence < WHOLE / 2 { sequence } else { sequence - WHOLE }
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or_else(|_| panic!("not a number: {text:?}"))
}

fn socket(v4: &str, v6: &str, port: &str) -> SocketAddr {
    let address: IpAddr = if v4.is_empty() { v6 } else { v4 }.parse().expect("tshark prints addresses");
    SocketAddr::new(address, port.parse().expect("tshark prints ports"))
}

fn from_hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> =
        text.bytes().filter_map(|digit| char::from(digit).to_digit(16)).map(|digit| digit as u8).collect();
    digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: u8, length: u16) -> Vec<u8> {
        let mut record = vec![kind, 3, 3];
        record.extend(length.to_be_bytes());
        record.resize(5 + usize::from(length), 0xaa);
        record
    }

    #[test]
    fn records_are_counted_and_one_strange_byte_is_found() {
        let mut stream = [record(22, 300), record(23, 16384), record(23, 17)].concat();
        assert_eq!(tls_records(&stream), Ok(3));
        assert_eq!(tls_records(&stream[305..]), Ok(2), "older than the tap");
        assert_eq!(tls_records(&stream[..stream.len() - 3]), Ok(3), "a cut record counts");
        stream.extend(b"GET / HTTP/1.1");
        assert!(tls_records(&stream).unwrap_err().contains("begins no TLS record"));
    }

    #[test]
    fn text_and_records_of_a_wrong_length_are_no_tls() {
        assert!(tls_records(b"GET / HTTP/1.1\r\n").is_err());
        assert!(tls_records(&record(23, 5)).is_err());
        assert!(tls_records(&[22, 3, 1, 0xff, 0xff]).is_err());
    }

    #[test]
    fn segments_are_put_in_order_and_repetitions_left_out() {
        let line = |from: &str, sequence: &str, payload: &str| {
            ["0", "10.0.0.1", "", from, "10.0.0.2", "", "80", sequence, payload].map(str::to_owned).to_vec()
        };
        let lines =
            [line("7", "4", "64656667"), line("7", "1", "616263"), line("7", "4", "6465"), line("7", "6", "66676869")];
        let streams = Streams::from_segments(80, &lines);
        assert_eq!(streams.from_clients().map(|it| it.bytes.clone()).collect::<Vec<_>>(), [b"abcdefghi"]);
        let again = [line("7", "0", "636465"), line("7", "4294967294", "6162")];
        let streams = Streams::from_segments(80, &again);
        assert_eq!(streams.from_clients().map(|it| it.bytes.clone()).collect::<Vec<_>>(), [b"abcde"]);
    }
}
