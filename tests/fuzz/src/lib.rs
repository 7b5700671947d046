//! Every parser that faces a stranger, as functions that take any bytes and check what must hold whatever they are.
//!
//! libFuzzer calls them (`fuzz/`), and so do ordinary tests: with the kept corpora, and with thousands of changes to them.

#![forbid(unsafe_code)]

pub mod mutate;

use identity::csr::PublicKeyOfRequest;
use manifests::{MAX_DOCUMENTS, Set};
use wire::hello::{Classifier, MAX_HELLO, Verdict};
use wire::pods::{CniRequest, CniResult, FromAgent, ToAgent};
use wire::tunnel::{Control, Decoder, HEADER, MAX_CONTROL_FRAME, MAX_DATA, Piece, Sender, Violation, header_for_data};

/// A parser that faces a stranger.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// The name of its corpus, and of its libFuzzer target.
    pub name: &'static str,
    /// Takes any bytes, and panics where something does not hold that must.
    pub check: fn(&[u8]),
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "hello", check: hello },
    Target { name: "frames", check: frames },
    Target { name: "discovery_client", check: wire::hostile::discovery_response },
    Target { name: "discovery_server", check: wire::hostile::discovery_request },
    Target { name: "pods", check: pods },
    Target { name: "probe", check: wire::hostile::first_words },
    Target { name: "csr", check: csr },
    Target { name: "manifests", check: yaml },
];

/// Runs the target of that name.
///
/// # Panics
/// Where something does not hold that must, or there is no such target.
pub fn check(name: &str, bytes: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name);
    (target.expect("a target's name").check)(bytes);
}

/// The classifier of first bytes: the verdict does not depend on how they are split, is final, and comes in time.
pub fn hello(bytes: &[u8]) {
    let mut whole = Classifier::new();
    let verdict = whole.push(bytes);
    let mut single = Classifier::new();
    let mut decided_after = None;
    for (index, byte) in bytes.iter().enumerate() {
        let before = single.verdict();
        let after = single.push(&[*byte]);
        assert!(before == Verdict::NeedMore || after == before, "a verdict was taken back");
        if before == Verdict::NeedMore && after != Verdict::NeedMore {
            decided_after = Some(index + 1);
        }
    }
    assert_eq!(single.verdict(), verdict, "the split decides");
    assert!(decided_after.is_none_or(|length| length <= MAX_HELLO + 1));
    assert!(bytes.len() <= MAX_HELLO || verdict != Verdict::NeedMore, "more bytes are wanted than are ever looked at");
    // Whose first byte is not a TLS handshake's is not waited for.
    assert!(bytes.first().is_none_or(|first| *first == 22) || verdict == Verdict::Other);
    // What is ours has our name in it.
    let name = wire::tunnel::ALPN;
    assert!(verdict != Verdict::JustMtls || without_record_headers(bytes).windows(name.len()).any(|part| part == name));
}

/// The handshake's bytes, of which our name may lie in two records.
fn without_record_headers(mut bytes: &[u8]) -> Vec<u8> {
    let mut handshake = Vec::new();
    while let [_, _, _, high, low, rest @ ..] = bytes {
        let (fragment, after) = rest.split_at(usize::from(u16::from_be_bytes([*high, *low])).min(rest.len()));
        handshake.extend_from_slice(fragment);
        bytes = after;
    }
    handshake
}

/// What came out of a decoder, with data joined.
#[derive(PartialEq, Debug)]
enum Event {
    Control(Control),
    Data(Vec<u8>),
}

fn decode(sender: Sender, chunks: impl Iterator<Item = Vec<u8>>) -> (Vec<Event>, Option<Violation>, bool) {
    let mut decoder = Decoder::new(sender);
    let mut events: Vec<Event> = Vec::new();
    for chunk in chunks {
        let mut input = &chunk[..];
        loop {
            match decoder.next(&mut input) {
                Ok(Some(Piece::Control(control))) => events.push(Event::Control(control)),
                Ok(Some(Piece::Data(data))) => {
                    assert!(!data.is_empty() && data.len() <= MAX_DATA);
                    match events.last_mut() {
                        Some(Event::Data(all)) => all.extend_from_slice(data),
                        _ => events.push(Event::Data(data.to_vec())),
                    }
                }
                Ok(None) => {
                    assert!(input.is_empty(), "bytes were left");
                    break;
                }
                Err(violation) => {
                    assert_eq!(decoder.next(&mut &b"\x04"[..]), Err(violation), "a violation was forgiven");
                    return (events, Some(violation), decoder.may_end());
                }
            }
        }
    }
    let may_end = decoder.may_end();
    (events, None, may_end)
}

/// Frames of a tunnel, from either side: what comes out does not depend on how they are split, and says the same when it is
/// written again.
pub fn frames(bytes: &[u8]) {
    for sender in [Sender::Client, Sender::Server] {
        let whole = decode(sender, std::iter::once(bytes.to_vec()));
        assert_eq!(whole, decode(sender, bytes.iter().map(|byte| vec![*byte])), "the split decides");
        let (events, violation, may_end) = whole;
        assert!(violation.is_none() || !may_end, "a peer that broke the protocol did not end in order");
        let mut again = Vec::new();
        for event in &events {
            match event {
                Event::Control(control) => {
                    let mut buffer = [0; MAX_CONTROL_FRAME];
                    let frame = control.encode(&mut buffer);
                    assert!(frame.len() > HEADER && !format!("{control:?}").is_empty());
                    again.extend_from_slice(frame);
                }
                Event::Data(data) => data.chunks(MAX_DATA).for_each(|part| {
                    again.extend_from_slice(&header_for_data(part.len()));
                    again.extend_from_slice(part);
                }),
            }
        }
        let (same, violation, _) = decode(sender, std::iter::once(again));
        assert_eq!((same, violation), (events, None), "what was said once cannot be said again");
    }
}

/// Messages between runtime, agent and proxy: what is understood is the same when it is written and read again.
pub fn pods(bytes: &[u8]) {
    macro_rules! round {
        ($message:ty) => {
            if let Ok(message) = <$message>::decode(bytes) {
                let again = <$message>::decode(&message.encode());
                assert_eq!(again.as_ref(), Ok(&message), "what was said once cannot be said again");
            }
        };
    }
    round!(CniRequest);
    round!(CniResult);
    round!(FromAgent);
    round!(ToAgent);
}

/// A certificate request, as PEM or as the DER in it: nothing that is changed is accepted.
pub fn csr(bytes: &[u8]) {
    let accepted = |text: &str| PublicKeyOfRequest::from_pem(text).is_ok();
    if let Ok(text) = std::str::from_utf8(bytes) {
        accepted(text);
    }
    let pem = |der: &[u8]| {
        format!("-----BEGIN CERTIFICATE REQUEST-----\n{}\n-----END CERTIFICATE REQUEST-----\n", base64(der))
    };
    if accepted(&pem(bytes)) {
        // Whatever is signed, changing any of a few of its bytes breaks it: there is one text for one request.
        for place in (0..bytes.len()).step_by(bytes.len().div_ceil(16).max(1)) {
            let mut changed = bytes.to_vec();
            changed[place] ^= 1;
            assert!(!accepted(&pem(&changed)), "byte {place} does not matter");
        }
        let mut longer = bytes.to_vec();
        longer.push(0);
        assert!(!accepted(&pem(&longer)), "what follows does not matter");
    }
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let group = |part: &[u8]| {
        let number = part.iter().chain(&[0, 0]).take(3).fold(0_usize, |number, byte| number << 8 | usize::from(*byte));
        let digit =
            |place: usize| if place <= part.len() { DIGITS[number >> (18 - 6 * place) & 63] as char } else { '=' };
        [digit(0), digit(1), digit(2), digit(3)]
    };
    bytes.chunks(3).flat_map(group).collect()
}

/// Kubernetes manifests: nothing vanishes without a problem, what is read is the same when it is written and read again,
/// and a file that cannot be read takes nothing away.
pub fn yaml(bytes: &[u8]) {
    let parsed = manifests::parse("fuzz.yaml", bytes);
    assert!(parsed.objects.len() <= MAX_DOCUMENTS);
    assert!(!parsed.unidentified || !parsed.problems.is_empty(), "a part is nothing, and nobody is told");
    assert!(
        parsed.unreadable.is_empty() || !parsed.problems.is_empty(),
        "an object cannot be read, and nobody is told"
    );
    for (object, _) in &parsed.objects {
        let text = object.to_yaml();
        let again = manifests::parse("again.yaml", &text);
        assert!(again.objects.iter().any(|(same, _)| same == object), "{text}\n{:?}", again.problems);
    }
    let mut set = Set::default();
    set.reload("fuzz.yaml", bytes);
    let before = set.len();
    set.reload("fuzz.yaml", b"kind: [");
    assert_eq!(set.len(), before, "a file that cannot be read took an object away");
    set.forget("fuzz.yaml");
    assert!(set.is_empty());
}
