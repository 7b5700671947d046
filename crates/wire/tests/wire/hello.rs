//! The classifier of first bytes, against hellos that rustls really sends and against anything at all.

use std::sync::Arc;

use identity::tls;
use proptest::prelude::*;
use rustls::{ClientConfig, ClientConnection};
use wire::hello::{Classifier, MAX_HELLO, Verdict};

use crate::pki::{Authority, clock};

/// The first flight of a client.
fn first_flight(config: Arc<ClientConfig>) -> Vec<u8> {
    let mut client = ClientConnection::new(config, tls::unnamed()).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

fn ours() -> Vec<u8> {
    let authority = Authority::new("cluster.local");
    let svid = authority.svid("spiffe://cluster.local/ns/shop/sa/web");
    first_flight(tls::client_config(&svid, &authority.bundle, svid.id(), clock()))
}

/// A client of an application: rustls with its own defaults, a server name and these protocols.
fn an_applications(protocols: &[&[u8]]) -> Vec<u8> {
    let authority = Authority::new("cluster.local");
    let svid = authority.svid("spiffe://cluster.local/ns/shop/sa/web");
    let mut config = (*tls::control_client_config(&authority.bundle, svid.id(), clock())).clone();
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    config.enable_sni = true;
    let mut client = ClientConnection::new(Arc::new(config), "shop.example".try_into().unwrap()).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

/// The number of the byte at which the verdict fell, and the verdict.
fn decided_at(bytes: &[u8]) -> (usize, Verdict) {
    let mut classifier = Classifier::new();
    for (index, byte) in bytes.iter().enumerate() {
        match classifier.push(&[*byte]) {
            Verdict::NeedMore => {}
            verdict => return (index + 1, verdict),
        }
    }
    (bytes.len(), Verdict::NeedMore)
}

/// The same handshake message in records of at most `size` bytes.
fn in_records(hello: &[u8], size: usize) -> Vec<u8> {
    let records = hello[5..].chunks(size).flat_map(|fragment| {
        let mut record = vec![22, 3, 3];
        record.extend((fragment.len() as u16).to_be_bytes());
        record.extend(fragment);
        record
    });
    records.collect()
}

#[test]
fn our_hello_is_ours_at_its_last_byte_and_spans_more_than_one_segment() {
    let hello = ours();
    // 1500 bytes less the headers of IPv6 and of TCP with time stamps.
    assert!(hello.len() > 1_428, "a hybrid hello exceeds a segment: {} bytes", hello.len());
    assert_eq!(decided_at(&hello), (hello.len(), Verdict::JustMtls));
}

#[test]
fn our_hello_is_ours_wherever_it_is_split() {
    let hello = ours();
    for middle in 0..hello.len() {
        let mut classifier = Classifier::new();
        assert_eq!(classifier.push(&hello[..middle]), Verdict::NeedMore, "at {middle}");
        assert_eq!(classifier.push(&hello[middle..]), Verdict::JustMtls, "at {middle}");
    }
}

#[test]
fn our_hello_is_ours_in_records_of_any_size_within_the_bound() {
    let hello = ours();
    for size in [1, 2, 3, 7, 100, 1000, 16_384] {
        let bytes = in_records(&hello, size);
        let expected = if bytes.len() <= MAX_HELLO { Verdict::JustMtls } else { Verdict::Other };
        assert_eq!(decided_at(&bytes).1, expected, "records of {size}");
    }
}

#[test]
fn what_follows_the_hello_changes_nothing() {
    let mut bytes = ours();
    bytes.extend([0xff; 100]);
    assert_eq!(Classifier::new().push(&bytes), Verdict::JustMtls);
}

#[test]
fn an_applications_own_tls_is_not_ours() {
    let offers: [&[&[u8]]; 6] =
        [&[], &[b"h2"], &[b"h2", b"http/1.1"], &[b"justmtls/2"], &[b"justmtls/1x"], &[b"justmtls/"]];
    for protocols in offers {
        let bytes = an_applications(protocols);
        assert_eq!(decided_at(&bytes).1, Verdict::Other, "{protocols:?}");
    }
}

#[test]
fn an_offer_of_several_protocols_is_ours_where_ours_is_among_them() {
    let offers: [&[&[u8]]; 3] =
        [&[b"h2", b"justmtls/1"], &[b"justmtls/1", b"h2"], &[b"justmtls/0", b"justmtls/1", b"x"]];
    for protocols in offers {
        assert_eq!(decided_at(&an_applications(protocols)).1, Verdict::JustMtls, "{protocols:?}");
    }
}

#[test]
fn other_protocols_are_known_by_their_first_bytes() {
    let cases: [(&[u8], usize); 7] = [
        (b"GET / HTTP/1.1\r\n", 1),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 1),
        (b"SSH-2.0-OpenSSH_9.6\r\n", 1),
        // PostgreSQL's SSLRequest: length 8, code 80877103.
        (&[0, 0, 0, 8, 4, 210, 22, 47], 1),
        // Redis.
        (b"*1\r\n$4\r\nPING\r\n", 1),
        // A TLS alert, and a handshake record that is no ClientHello.
        (&[21, 3, 3, 0, 2, 2, 40], 1),
        (&[22, 3, 3, 0, 64, 2, 0, 0, 60], 6),
    ];
    for (bytes, at) in cases {
        assert_eq!(decided_at(bytes), (at, Verdict::Other), "{bytes:?}");
    }
}

#[test]
fn lengths_that_cannot_hold_our_offer_are_refused_where_they_stand() {
    let cases: [(&[u8], usize); 6] = [
        // A record without content, and one that is longer than TLS allows.
        (&[22, 3, 1, 0, 0], 5),
        (&[22, 3, 1, 0x41], 4),
        // A handshake message beyond the bound: by its first byte, and by its second.
        (&[22, 3, 1, 2, 0, 1, 1], 7),
        (&[22, 3, 1, 2, 0, 1, 0, 0x40], 8),
        // One that is shorter than any hello with our offer.
        (&[22, 3, 1, 2, 0, 1, 0, 0, 59], 9),
        // SSL 2 and other versions of the record layer.
        (&[22, 2, 0], 2),
    ];
    for (bytes, at) in cases {
        assert_eq!(decided_at(bytes), (at, Verdict::Other), "{bytes:?}");
    }
}

#[test]
fn a_verdict_is_final() {
    let mut classifier = Classifier::new();
    assert_eq!(classifier.push(b"G"), Verdict::Other);
    assert_eq!(classifier.push(&ours()), Verdict::Other);
    assert_eq!(classifier.verdict(), Verdict::Other);
}

/// Goes on with any byte that is not refused until there is a verdict; `None` where every byte is refused.
fn complete(mut classifier: Classifier, mut choose: impl FnMut() -> u8) -> Option<usize> {
    for count in 1.. {
        let first = choose();
        let next = (0..=u8::MAX).map(|offset| first.wrapping_add(offset)).find_map(|byte| {
            let mut next = classifier;
            (next.push(&[byte]) != Verdict::Other).then_some(next)
        });
        classifier = next?;
        if classifier.verdict() == Verdict::JustMtls {
            return Some(count);
        }
    }
    None
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// "Other at the earliest byte": as long as the answer is "need more", some continuation is ours.
    #[test]
    fn there_is_no_dead_end(cut in 0usize..1700, flips in prop::collection::vec((any::<u16>(), any::<u8>()), 0..4),
                            seed in any::<u64>()) {
        let mut bytes = ours();
        for (at, value) in flips {
            let at = usize::from(at) % bytes.len();
            bytes[at] = value;
        }
        let mut classifier = Classifier::new();
        if classifier.push(&bytes[..cut.min(bytes.len())]) == Verdict::NeedMore {
            let mut state = seed | 1;
            let random = || {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 32) as u8
            };
            let more = complete(classifier, random);
            prop_assert!(more.is_some(), "nothing can follow, and yet more was wanted");
            prop_assert!(cut + more.unwrap() <= MAX_HELLO);
        }
    }

    #[test]
    fn how_bytes_are_cut_changes_nothing(bytes in prop::collection::vec(any::<u8>(), 0..200), ours_first in any::<bool>(),
                                         cuts in prop::collection::vec(0usize..4000, 0..8)) {
        let mut bytes = if ours_first { ours().into_iter().chain(bytes).collect() } else { bytes };
        if !ours_first {
            bytes.splice(0..0, [22, 3, 1]);
        }
        let whole = Classifier::new().push(&bytes);
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
        cuts.sort_unstable();
        let mut classifier = Classifier::new();
        let mut from = 0;
        for cut in cuts.into_iter().chain([bytes.len()]) {
            classifier.push(&bytes[from..cut]);
            from = cut;
        }
        prop_assert_eq!(classifier.verdict(), whole);
    }

    #[test]
    fn no_more_than_the_bound_is_ever_looked_at(seed in any::<[u8; 32]>()) {
        // Well-formed one-byte records of a hello without end.
        let bytes = (0..MAX_HELLO).flat_map(|index| [22, 3, 3, 0, 1, seed[index % 32]]);
        let mut classifier = Classifier::new();
        let looked = bytes.take_while(|byte| classifier.push(&[*byte]) == Verdict::NeedMore).count();
        prop_assert!(looked < MAX_HELLO);
    }
}
