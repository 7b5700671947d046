//! Frames: byte by byte, against a reference decoder that has all of the input at once.

use proptest::prelude::*;
use wire::tunnel::{
    Claim, Control, Decoder, FrameKind, HEADER, MAX_CONTROL, MAX_CONTROL_FRAME, MAX_DATA, MAX_SERVICE, Piece, Reason,
    Sender, Violation, header_for_data,
};

/// What a direction said.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Said {
    Control(Control),
    Data(Vec<u8>),
}

fn claim(service: Option<&str>) -> Claim {
    Claim {
        source: "10.88.16.2".parse().unwrap(),
        destination: "[fd88:17::5]:8080".parse().unwrap(),
        service: service.map(ToOwned::to_owned),
    }
}

fn open(lease: u64) -> Control {
    Control::Open { lease, claim: claim(Some("shop/web.shop.svc.cluster.local")) }
}

fn encode(said: &[Said]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for one in said {
        match one {
            Said::Control(control) => bytes.extend(control.encode(&mut [0; MAX_CONTROL_FRAME])),
            Said::Data(data) => {
                bytes.extend(header_for_data(data.len()));
                bytes.extend(data);
            }
        }
    }
    bytes
}

/// Decodes pieces of the input; neighbouring data is one.
fn decode<'a>(sender: Sender, parts: impl IntoIterator<Item = &'a [u8]>) -> (Vec<Said>, Result<bool, Violation>) {
    let mut decoder = Decoder::new(sender);
    let mut said: Vec<Said> = Vec::new();
    for mut part in parts {
        loop {
            match decoder.next(&mut part) {
                Ok(None) => break,
                Ok(Some(Piece::Control(control))) => said.push(Said::Control(control)),
                Ok(Some(Piece::Data(data))) => match said.last_mut() {
                    Some(Said::Data(before)) => before.extend(data),
                    _ => said.push(Said::Data(data.to_vec())),
                },
                Err(violation) => {
                    assert_eq!(decoder.next(&mut part), Err(violation), "a violation is final");
                    assert!(!decoder.may_end());
                    return (said, Err(violation));
                }
            }
        }
        assert!(part.is_empty(), "what is not decided is kept");
    }
    (said, Ok(decoder.may_end()))
}

fn one_by_one(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.chunks(1)
}

fn whole(sender: Sender, bytes: &[u8]) -> (Vec<Said>, Result<bool, Violation>) {
    decode(sender, [bytes])
}

fn a_clients() -> Vec<Said> {
    vec![
        Said::Control(open(1)),
        Said::Data(vec![7; 300]),
        Said::Control(Control::Fin { lease: 1 }),
        Said::Control(open(2)),
        Said::Data(vec![9; MAX_DATA]),
        Said::Control(Control::Reset { lease: 2 }),
    ]
}

fn a_servers() -> Vec<Said> {
    vec![
        Said::Control(Control::Opened { lease: 1 }),
        Said::Data(vec![1; 5]),
        Said::Control(Control::Fin { lease: 1 }),
        Said::Control(Control::Closed { lease: 1 }),
        Said::Control(Control::Refused { lease: 2, reason: mesh::RefuseReason::PolicyDeny.into() }),
    ]
}

#[test]
fn what_is_said_is_heard_wherever_it_is_split() {
    for (sender, said) in [(Sender::Client, a_clients()), (Sender::Server, a_servers())] {
        let bytes = encode(&said);
        assert_eq!(whole(sender, &bytes), (said.clone(), Ok(true)));
        assert_eq!(decode(sender, one_by_one(&bytes)), (said.clone(), Ok(true)));
        for middle in 0..bytes.len().min(1_000) {
            let (first, second) = bytes.split_at(middle);
            assert_eq!(decode(sender, [first, second]), (said.clone(), Ok(true)), "split at {middle}");
        }
    }
}

#[test]
fn data_is_given_out_where_it_lies_and_before_its_frame_is_whole() {
    let mut bytes = encode(&[Said::Control(open(1))]);
    bytes.extend(header_for_data(1000));
    bytes.extend([5; 10]);
    let mut decoder = Decoder::new(Sender::Client);
    let mut input = bytes.as_slice();
    assert!(matches!(decoder.next(&mut input), Ok(Some(Piece::Control(_)))));
    let Ok(Some(Piece::Data(data))) = decoder.next(&mut input) else { panic!("data") };
    assert_eq!(data.as_ptr(), bytes[bytes.len() - 10..].as_ptr());
    assert_eq!(decoder.next(&mut input), Ok(None));
    assert!(!decoder.may_end(), "within a frame");
}

#[test]
fn a_stream_may_end_only_where_no_lease_is_open() {
    let fin = Control::Fin { lease: 1 };
    let cases: [(Sender, Vec<Control>, bool); 8] = [
        (Sender::Client, vec![], true),
        (Sender::Client, vec![open(1)], false),
        (Sender::Client, vec![open(1), fin.clone()], true),
        (Sender::Client, vec![open(1), Control::Reset { lease: 1 }], true),
        (Sender::Server, vec![Control::Opened { lease: 1 }], false),
        // The server's last word on a lease is `Closed`.
        (Sender::Server, vec![Control::Opened { lease: 1 }, fin.clone()], false),
        (Sender::Server, vec![Control::Opened { lease: 1 }, fin, Control::Closed { lease: 1 }], true),
        (Sender::Server, vec![Control::Reset { lease: 1 }], true),
    ];
    for (sender, controls, may_end) in cases {
        let said: Vec<_> = controls.into_iter().map(Said::Control).collect();
        let bytes = encode(&said);
        assert_eq!(whole(sender, &bytes), (said.clone(), Ok(may_end)), "{said:?}");
        if let Some((_, all_but_last)) = bytes.split_last() {
            assert_eq!(whole(sender, all_but_last).1, Ok(false), "within a frame");
        }
    }
}

#[test]
fn what_may_not_follow_is_named() {
    let fin = Said::Control(Control::Fin { lease: 1 });
    let opened = Said::Control(Control::Opened { lease: 1 });
    let reset = Said::Control(Control::Reset { lease: 1 });
    let closed = Said::Control(Control::Closed { lease: 1 });
    let refused = Said::Control(Control::Refused { lease: 1, reason: Reason::new("strict").unwrap() });
    let open = |lease| Said::Control(open(lease));
    let data = Said::Data(vec![1]);
    use Violation::{OutOfOrder, WrongLease};
    let cases: [(Sender, Vec<Said>, Violation); 17] = [
        (Sender::Client, vec![data.clone()], OutOfOrder),
        (Sender::Client, vec![fin.clone()], OutOfOrder),
        (Sender::Client, vec![reset.clone()], OutOfOrder),
        (Sender::Client, vec![open(2)], WrongLease),
        (Sender::Client, vec![open(1), open(2)], OutOfOrder),
        (Sender::Client, vec![open(1), fin.clone(), data.clone()], OutOfOrder),
        (Sender::Client, vec![open(1), fin.clone(), fin.clone()], OutOfOrder),
        (Sender::Client, vec![open(1), fin.clone(), open(1)], WrongLease),
        (Sender::Client, vec![open(1), reset.clone(), open(2)], OutOfOrder),
        (Sender::Client, vec![open(1), Said::Control(Control::Fin { lease: 2 })], WrongLease),
        (Sender::Client, vec![opened.clone()], OutOfOrder),
        (Sender::Server, vec![open(1)], OutOfOrder),
        (Sender::Server, vec![data.clone()], OutOfOrder),
        (Sender::Server, vec![opened.clone(), closed.clone()], OutOfOrder),
        (Sender::Server, vec![opened.clone(), opened.clone()], OutOfOrder),
        (Sender::Server, vec![refused, data], OutOfOrder),
        (Sender::Server, vec![opened, fin, closed, reset], WrongLease),
    ];
    for (sender, said, violation) in cases {
        let (heard, end) = whole(sender, &encode(&said));
        assert_eq!(end, Err(violation), "{said:?}");
        assert_eq!(heard, said[..said.len() - 1], "what came before counts");
    }
}

#[test]
fn a_late_reset_never_hits_the_next_lease() {
    let said = [Control::Reset { lease: 1 }].map(Said::Control);
    let begun = [open(1), Control::Fin { lease: 1 }, open(2)].map(Said::Control);
    let bytes = [encode(&begun), encode(&said)].concat();
    assert_eq!(whole(Sender::Client, &bytes), (begun.to_vec(), Err(Violation::WrongLease)));
}

#[test]
fn headers_alone_refuse_what_is_too_long_too_short_or_unknown() {
    let header = |kind: u8, length: u32| [kind, (length >> 16) as u8, (length >> 8) as u8, length as u8];
    let (max_control, max_data) = (MAX_CONTROL as u32, MAX_DATA as u32);
    let cases = [
        (header(0, 8), Violation::UnknownFrame),
        (header(9, 8), Violation::UnknownFrame),
        (header(255, 0), Violation::UnknownFrame),
        (header(1, max_control + 1), Violation::FrameTooLong),
        (header(1, 7), Violation::FrameTooShort),
        (header(2, 9), Violation::FrameTooLong),
        (header(3, 8), Violation::FrameTooShort),
        (header(3, 73), Violation::FrameTooLong),
        (header(4, 0), Violation::EmptyData),
        (header(4, max_data + 1), Violation::FrameTooLong),
        (header(5, 0xff_ffff), Violation::FrameTooLong),
    ];
    for (bytes, violation) in cases {
        assert_eq!(whole(Sender::Client, &bytes).1, Err(violation), "{bytes:?}");
    }
}

#[test]
fn an_open_with_a_broken_claim_is_refused() {
    // protobuf: field 1 source, 2 destination, 3 port, 4 service.
    let good: &[u8] = &[10, 4, 10, 0, 0, 1, 18, 4, 10, 0, 0, 2, 24, 80];
    let cases: [(&[u8], Option<Violation>); 8] = [
        (good, None),
        (&[10, 3, 10, 0, 0, 18, 4, 10, 0, 0, 2, 24, 80], Some(Violation::BadOpen)),
        (&[18, 4, 10, 0, 0, 2, 24, 80], Some(Violation::BadOpen)),
        (&[10, 4, 10, 0, 0, 1, 18, 4, 10, 0, 0, 2], Some(Violation::BadOpen)),
        // Port 65536.
        (&[10, 4, 10, 0, 0, 1, 18, 4, 10, 0, 0, 2, 24, 0x80, 0x80, 4], Some(Violation::BadOpen)),
        // A service with a line feed.
        (&[10, 4, 10, 0, 0, 1, 18, 4, 10, 0, 0, 2, 24, 80, 34, 1, 10], Some(Violation::BadOpen)),
        (&[255, 255], Some(Violation::BadOpen)),
        (&[10, 200, 1], Some(Violation::BadOpen)),
    ];
    for (claim, violation) in cases {
        let length = (8 + claim.len()) as u8;
        let bytes = [&[1, 0, 0, length][..], &1u64.to_be_bytes(), claim].concat();
        assert_eq!(whole(Sender::Client, &bytes).1.err(), violation, "{claim:?}");
    }
}

#[test]
fn a_service_that_is_too_long_or_not_printable_is_left_out() {
    for (service, sent) in
        [("s".repeat(MAX_SERVICE), true), ("s".repeat(MAX_SERVICE + 1), false), ("a\nb".into(), false)]
    {
        let frame = Control::Open { lease: 1, claim: claim(Some(&service)) };
        let mut buffer = [0; MAX_CONTROL_FRAME];
        let (heard, _) = whole(Sender::Client, frame.encode(&mut buffer));
        let expected = claim(sent.then_some(service.as_str()));
        assert_eq!(heard, [Said::Control(Control::Open { lease: 1, claim: expected })]);
    }
}

#[test]
fn a_reason_is_a_word() {
    for good in ["a", "no-such-pod", "x1"] {
        assert_eq!(Reason::new(good).unwrap().as_str(), good);
    }
    for bad in ["", "A", "a b", "a\n", "ä", &"a".repeat(65)] {
        assert_eq!(Reason::new(bad), None, "{bad:?}");
    }
    for reason in mesh::RefuseReason::ALL {
        assert_eq!(Reason::new(reason.as_str()), Some(Reason::from(*reason)));
    }
    let frame = [&[3, 0, 0, 9][..], &1u64.to_be_bytes(), b"!"].concat();
    assert_eq!(whole(Sender::Server, &frame).1, Err(Violation::BadReason));
}

#[test]
#[should_panic = "a data frame of 0 bytes"]
fn a_data_header_without_data_is_never_made() {
    header_for_data(0);
}

/// The reference: all input at once, no state but a position, the grammar as a list of what was said.
fn reference(sender: Sender, bytes: &[u8]) -> (Vec<Said>, Result<bool, Violation>) {
    let mut said = Vec::new();
    let mut kinds: Vec<FrameKind> = Vec::new();
    let mut rest = bytes;
    loop {
        if rest.len() < HEADER {
            let end = rest.is_empty() && whole_leases(sender, &kinds);
            return (said, Ok(end));
        }
        let length = usize::from(rest[1]) << 16 | usize::from(rest[2]) << 8 | usize::from(rest[3]);
        let kind = match rest[0] {
            1 => FrameKind::Open,
            2 => FrameKind::Opened,
            3 => FrameKind::Refused,
            4 => FrameKind::Data,
            5 => FrameKind::Fin,
            6 => FrameKind::Reset,
            7 => FrameKind::Closed,
            8 => FrameKind::Drain,
            _ => return (said, Err(Violation::UnknownFrame)),
        };
        let (least, most) = match kind {
            FrameKind::Open => (8, 1024),
            FrameKind::Refused => (9, 72),
            FrameKind::Data => (1, 16_380),
            _ => (8, 8),
        };
        if length < least {
            let empty = kind == FrameKind::Data;
            return (said, Err(if empty { Violation::EmptyData } else { Violation::FrameTooShort }));
        }
        if length > most {
            return (said, Err(Violation::FrameTooLong));
        }
        kinds.push(kind);
        if !in_order(sender, &kinds) {
            return (said, Err(Violation::OutOfOrder));
        }
        let payload = &rest[HEADER..rest.len().min(HEADER + length)];
        if kind == FrameKind::Data && !payload.is_empty() {
            match said.last_mut() {
                Some(Said::Data(before)) => before.extend(payload),
                _ => said.push(Said::Data(payload.to_vec())),
            }
        }
        if payload.len() < length {
            return (said, Ok(false));
        }
        rest = &rest[HEADER + length..];
        if kind == FrameKind::Data {
            continue;
        }
        let starts = kinds.iter().filter(|kind| matches!(kind, FrameKind::Open | FrameKind::Closed)).count() as u64;
        let expected = match (sender, kind) {
            (Sender::Client, _) | (Sender::Server, FrameKind::Closed) => starts,
            (Sender::Server, _) => starts + 1,
        };
        let lease = u64::from_be_bytes(payload[..8].try_into().unwrap());
        let control = match kind {
            FrameKind::Opened => Control::Opened { lease },
            FrameKind::Fin => Control::Fin { lease },
            FrameKind::Reset => Control::Reset { lease },
            FrameKind::Closed => Control::Closed { lease },
            FrameKind::Drain => Control::Drain { lease },
            FrameKind::Refused => match std::str::from_utf8(&payload[8..]).ok().and_then(Reason::new) {
                Some(reason) => Control::Refused { lease, reason },
                None => return (said, Err(Violation::BadReason)),
            },
            // Claims have their own tests; here each is the same.
            FrameKind::Open if payload[8..] == open_payload()[8..] => Control::Open { lease, claim: claim(None) },
            FrameKind::Open | FrameKind::Data => return (said, Err(Violation::BadOpen)),
        };
        if lease != expected {
            return (said, Err(Violation::WrongLease));
        }
        said.push(Said::Control(control));
    }
}

fn open_payload() -> Vec<u8> {
    Control::Open { lease: 1, claim: claim(None) }.encode(&mut [0; MAX_CONTROL_FRAME])[HEADER..].to_vec()
}

/// The grammar of [`wire::tunnel::Sequence`], as a regular expression over letters.
fn in_order(sender: Sender, kinds: &[FrameKind]) -> bool {
    let text: String = kinds.iter().map(letter).collect();
    match sender {
        // ( O D* F )* ( O D* ( F R? | R )? )?
        Sender::Client => {
            let mut rest = text.as_str();
            while let Some(lease) = rest.strip_prefix('O') {
                let lease = lease.trim_start_matches('D');
                match lease.strip_prefix('F') {
                    Some(next) => {
                        rest = next.strip_prefix('R').map_or(next, |end| if end.is_empty() { end } else { "!" })
                    }
                    None => return lease.is_empty() || lease == "R",
                }
            }
            rest.is_empty()
        }
        // ( A D* F C )* ( X | R | M X? | A D* ( R | F R? )? )?
        Sender::Server => {
            let mut rest = text.as_str();
            while let Some(lease) = rest.strip_prefix('A') {
                let lease = lease.trim_start_matches('D');
                match lease.strip_prefix("FC") {
                    Some(next) => rest = next,
                    None => return ["", "R", "F", "FR"].contains(&lease),
                }
            }
            ["", "X", "R", "M", "MX"].contains(&rest)
        }
    }
}

fn whole_leases(sender: Sender, kinds: &[FrameKind]) -> bool {
    match kinds.last() {
        None | Some(FrameKind::Reset | FrameKind::Refused | FrameKind::Closed | FrameKind::Drain) => true,
        Some(FrameKind::Fin) => sender == Sender::Client,
        Some(_) => false,
    }
}

fn letter(kind: &FrameKind) -> char {
    match kind {
        FrameKind::Open => 'O',
        FrameKind::Opened => 'A',
        FrameKind::Refused => 'X',
        FrameKind::Data => 'D',
        FrameKind::Fin => 'F',
        FrameKind::Reset => 'R',
        FrameKind::Closed => 'C',
        FrameKind::Drain => 'M',
    }
}

fn any_frame() -> impl Strategy<Value = Said> {
    let lease = 1u64..4;
    prop_oneof![
        3 => lease.clone().prop_map(|lease| Said::Control(Control::Open { lease, claim: claim(None) })),
        3 => lease.clone().prop_map(|lease| Said::Control(Control::Opened { lease })),
        1 => (lease.clone(), "[a-z0-9-]{1,64}")
            .prop_map(|(lease, text)| Said::Control(Control::Refused { lease, reason: Reason::new(&text).unwrap() })),
        3 => prop::collection::vec(any::<u8>(), 1..50).prop_map(Said::Data),
        4 => lease.clone().prop_map(|lease| Said::Control(Control::Fin { lease })),
        1 => lease.clone().prop_map(|lease| Said::Control(Control::Reset { lease })),
        4 => lease.clone().prop_map(|lease| Said::Control(Control::Closed { lease })),
        2 => lease.prop_map(|lease| Said::Control(Control::Drain { lease })),
    ]
}

fn a_sender() -> impl Strategy<Value = Sender> {
    prop_oneof![Just(Sender::Client), Just(Sender::Server)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn the_decoder_and_the_reference_agree(sender in a_sender(), frames in prop::collection::vec(any_frame(), 0..12),
                                           broken in prop::option::of((any::<u16>(), any::<u8>())),
                                           chunk in 1usize..40) {
        let mut bytes = encode(&frames);
        if let (Some((at, value)), false) = (broken, bytes.is_empty()) {
            let at = usize::from(at) % bytes.len();
            bytes[at] = value;
        }
        let (expected, end) = reference(sender, &bytes);
        let (heard, ended) = decode(sender, bytes.chunks(chunk));
        // A claim that was changed and still is one is nothing the reference knows.
        prop_assume!(end != Err(Violation::BadOpen));
        prop_assert_eq!((heard, ended), (expected, end));
    }

    #[test]
    fn arbitrary_bytes_never_panic(sender in a_sender(), bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
        let _ = whole(sender, &bytes);
        let _ = decode(sender, one_by_one(&bytes));
    }

    #[test]
    fn an_arbitrary_claim_never_panics_and_one_that_is_read_is_written_back(
        bytes in prop::collection::vec(any::<u8>(), 0..200)
    ) {
        let length = (8 + bytes.len()) as u16;
        let [high, low] = length.to_be_bytes();
        let frame = [&[1, 0, high, low][..], &1u64.to_be_bytes(), &bytes].concat();
        if let (said, Ok(_)) = whole(Sender::Client, &frame) {
            prop_assert_eq!(whole(Sender::Client, &encode(&said)).0, said);
        }
    }
}
