//! What a wiretap on the links sees. The tap is the judge of the product, so each test first shows that the tap can see.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;

use e2e::{Cluster, Family, Running, Shared, Wiretap, needs};

static BOX: Shared = Shared::new(include_str!("../manifests/mesh.yaml"));

/// A word that nobody says by chance.
fn marker(name: &str) -> String {
    format!("marker-{name}-{}-{:?}", std::process::id(), std::time::SystemTime::now())
}

/// A server that sends back what it gets, on `port` of the server's pod.
fn echo(cluster: &Cluster, port: &str) -> Running {
    cluster.serve("app/server", &["echo", port])
}

/// Says `text` to the server from `pod` over a family, and hears it.
fn say(cluster: &Cluster, pod: &str, family: Family, port: &str, text: &str) {
    let server = cluster.address("app/server", family).to_string();
    let said = cluster.tcp(pod, &["ask", &server, port, text]).run().ok();
    assert!(said.starts_with(&format!("said {text} ")), "{pod}: {said}");
}

#[test]
fn only_tls_passes_between_captured_pods_and_the_opted_out_twin_shows_the_tap_works() {
    needs!("root", "dumpcap", "tshark");
    let cluster = BOX.get();
    let _server = echo(&cluster, "7000");
    let secret = marker("nodes");
    for family in Family::BOTH {
        let mut before = Wiretap::start(&cluster, "node-a", &format!("twin-{family:?}"));
        say(&cluster, "legacy/outsider", family, "7000", &secret);
        before.stop();
        assert!(before.saw(&secret), "{family:?}: the tap does not see plaintext");

        let mut tap = Wiretap::start(&cluster, "node-a", &format!("captured-{family:?}"));
        say(&cluster, "app/client", family, "7000", &secret);
        // More than fits in one record, both ways.
        let large = secret.repeat(1000);
        say(&cluster, "app/client", family, "7000", &large);
        tap.stop();
        assert!(!tap.saw(&secret), "{family:?}: the marker passed in clear");
        let streams = tap.streams(7000);
        streams.assert_all_tls();
        assert!(streams.total() > 2 * large.len(), "{family:?}: only {} bytes passed the tap", streams.total());
    }
}

#[test]
fn two_pods_of_one_node_are_no_exception() {
    needs!("root", "dumpcap", "tshark");
    let cluster = BOX.get();
    let _server = echo(&cluster, "7010");
    let secret = marker("same-node");
    for family in Family::BOTH {
        let mut before = Wiretap::of_pod(&cluster, "app/server", &format!("same-twin-{family:?}"));
        say(&cluster, "legacy/outsider", family, "7010", &secret);
        before.stop();
        assert!(before.saw(&secret), "{family:?}: the tap does not see plaintext");

        let mut tap = Wiretap::of_pod(&cluster, "app/server", &format!("same-{family:?}"));
        say(&cluster, "app/near", family, "7010", &secret);
        tap.stop();
        assert!(!tap.saw(&secret), "{family:?}: the marker passed in clear");
        tap.streams(7010).assert_all_tls();
    }
}

#[test]
fn every_handshake_is_tls_1_3_with_the_hybrid_group() {
    needs!("root", "dumpcap", "tshark");
    let cluster = BOX.get();
    let _server = echo(&cluster, "7020");
    let mut tap = Wiretap::start(&cluster, "node-b", "handshakes");
    for family in Family::BOTH {
        (0..5).for_each(|_| say(&cluster, "app/client", family, "7020", "hello"));
    }
    tap.stop();
    // ServerHello; 4588 is X25519MLKEM768 and 0x0304 is TLS 1.3.
    let fields = ["tls.handshake.extensions_key_share_group", "tls.handshake.extensions.supported_version"];
    let hellos = tap.fields(7020, "tls.handshake.type == 2", &fields);
    // One for each family at least; connections that follow may go through the same tunnel.
    assert!((2..=10).contains(&hellos.len()), "{hellos:?}");
    assert!(hellos.iter().all(|hello| hello[0] == "4588" && hello[1] == "0x0304"), "{hellos:?}");
    let offers = tap.fields(7020, "tls.handshake.type == 1", &["tls.handshake.extensions_alpn_str"]);
    assert!(!offers.is_empty() && offers.iter().all(|offer| offer[0] == "justmtls/1"), "{offers:?}");
}

#[test]
fn the_wire_shows_the_applications_own_addresses_and_port() {
    needs!("root", "dumpcap", "tshark");
    let cluster = BOX.get();
    let _server = echo(&cluster, "7030");
    let mut tap = Wiretap::start(&cluster, "node-a", "addresses");
    Family::BOTH.iter().for_each(|family| say(&cluster, "app/client", *family, "7030", "hello"));
    tap.stop();
    let opening = "tcp.flags.syn == 1 && tcp.flags.ack == 0";
    let fields = ["ip.src", "ipv6.src", "ip.dst", "ipv6.dst", "tcp.dstport"];
    let clients = Family::BOTH.map(|family| cluster.address("app/client", family).to_string());
    let servers = Family::BOTH.map(|family| cluster.address("app/server", family).to_string());
    // The other tests of this file dial in the same box at the same time, each its own port.
    let from_client = |line: &Vec<String>| {
        (clients.contains(&line[0]) || clients.contains(&line[1])) && !["7000", "7010", "7020"].contains(&&*line[4])
    };
    let opened: BTreeSet<_> = tap.fields(7030, opening, &fields).into_iter().filter(from_client).collect();
    let expected = [
        vec![clients[0].clone(), String::new(), servers[0].clone(), String::new(), "7030".to_owned()],
        vec![String::new(), clients[1].clone(), String::new(), servers[1].clone(), "7030".to_owned()],
    ];
    assert_eq!(opened, BTreeSet::from(expected), "what the client's pod opened on the wire");
}
