use proptest::prelude::*;

use super::*;

fn id() -> SpiffeId {
    "spiffe://cluster.local/ns/shop/sa/web".parse().expect("a SPIFFE ID")
}

#[test]
fn every_message_survives_the_wire() {
    let pod = PodUid::from("0d2b");
    let requests = [
        CniRequest::Add(CniAdd {
            pod: pod.clone(),
            namespace: "shop".into(),
            name: "web".into(),
            netns: "/run/netns/web".into(),
            container: "3f".into(),
            addresses: vec!["10.88.16.5".parse().unwrap(), "fd88:16::5".parse().unwrap()],
        }),
        CniRequest::Del { pod: pod.clone(), container: "3f".into() },
        CniRequest::Check { pod: pod.clone() },
        CniRequest::HandOver { version: VERSION },
        CniRequest::Taken,
    ];
    for request in requests {
        assert_eq!(CniRequest::decode(&request.encode()), Ok(request));
    }
    let answers = [
        CniResult::Captured,
        CniResult::NotCaptured("opted-out".into()),
        CniResult::Deleted,
        CniResult::Failed("no".into()),
    ];
    for answer in answers {
        assert_eq!(CniResult::decode(&answer.encode()), Ok(answer));
    }
    let added = PodAdded {
        pod: pod.clone(),
        name: "web".into(),
        identity: id(),
        addresses: vec!["10.0.0.1".parse().expect("v4"), "fd00::1".parse().expect("v6")],
        listeners: vec![Listener::OutboundV4, Listener::OutboundV6, Listener::InboundV4, Listener::InboundV6],
        excluded_ports: vec![9100],
        probes: crate::probe::tests::probes(),
        gateways: vec!["10.0.0.254".parse().expect("v4"), "fe80::1".parse().expect("v6")],
    };
    let kept = vec![Kept::View, Kept::Credentials];
    let mut down = vec![FromAgent::Hello { version: VERSION, kept }, FromAgent::PodAdded(added.clone())];
    down.extend([FromAgent::PodRemoved { pod: pod.clone() }, FromAgent::Refused("no".into())]);
    down.extend([FromAgent::Drain, FromAgent::Needed]);
    let mut up = vec![
        ToAgent::Hello { version: VERSION, started: std::time::Duration::from_millis(71), leaving: true },
        ToAgent::PodReady { pod: pod.clone() },
    ];
    let connections = vec![
        Ends { own: "10.0.0.1:80".parse().unwrap(), peer: "10.0.0.2:40000".parse().unwrap() },
        Ends { own: "[fd00::1]:80".parse().unwrap(), peer: "[fd00::2]:1".parse().unwrap() },
    ];
    let end = ToAgent::End { pod: pod.clone(), connections: connections.clone() };
    up.extend([ToAgent::Held(added), ToAgent::HeldAll, ToAgent::Leaving, end]);
    down.push(FromAgent::FromBefore { pod: pod.clone(), connections });
    up.extend([ToAgent::Keep(Kept::View), ToAgent::Keep(Kept::Credentials)]);
    for kind in SocketKind::ALL {
        down.push(FromAgent::Sockets { pod: pod.clone(), kind, error: String::new() });
        up.push(ToAgent::WantSockets { pod: pod.clone(), kind, count: MAX_SOCKETS });
    }
    for message in down {
        assert_eq!(FromAgent::decode(&message.encode()), Ok(message));
    }
    for message in up {
        assert_eq!(ToAgent::decode(&message.encode()), Ok(message));
    }
}

#[test]
fn what_a_newer_version_adds_is_passed_over() {
    // Field 1000 of either message, a string.
    let newer = [0xc2, 0x3e, 0x03, b'n', b'e', b'w'];
    assert_eq!(FromAgent::decode(&newer), Ok(FromAgent::Unknown));
    assert_eq!(ToAgent::decode(&newer), Ok(ToAgent::Unknown));
    let hello = [
        ToAgent::Hello { version: VERSION, started: std::time::Duration::ZERO, leaving: false }.encode(),
        newer.to_vec(),
    ]
    .concat();
    assert_eq!(
        ToAgent::decode(&hello),
        Ok(ToAgent::Hello { version: VERSION, started: std::time::Duration::ZERO, leaving: false })
    );
    // The runtime gets no answer to what is not understood, and a pod that is not captured does not start.
    assert!(CniRequest::decode(&newer).is_err() && CniResult::decode(&newer).is_err());
}

#[test]
fn a_count_out_of_bounds_and_an_empty_answer_are_refused() {
    for count in [0, MAX_SOCKETS + 1] {
        let message = ToAgent::WantSockets { pod: PodUid::from("a"), kind: SocketKind::OuterV4, count };
        assert_eq!(ToAgent::decode(&message.encode()), Err(BadMessage::Field("count")));
    }
    assert_eq!(CniResult::decode(&[]), Err(BadMessage::Field("result")));
    assert_eq!(FromAgent::decode(&vec![0; MAX_MESSAGE + 1]), Err(BadMessage::TooLong(MAX_MESSAGE + 1)));
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        let _ = CniRequest::decode(&bytes);
        let _ = CniResult::decode(&bytes);
        let _ = FromAgent::decode(&bytes);
        let _ = ToAgent::decode(&bytes);
    }
}
