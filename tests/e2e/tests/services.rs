//! Services: the proxy chooses the endpoint, and a client notices nothing of it.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use e2e::{Cluster, Family, needs, wait_until};

fn start() -> Cluster {
    Cluster::start(&manifest())
}

fn manifest() -> String {
    include_str!("../manifests/services.yaml").replace("TCP_PY", &e2e::script("tcp.py"))
}

/// The manifest's object that begins so, with one part replaced.
fn changed(beginning: &str, from: &str, to: &str) -> String {
    let manifest = manifest();
    let object = manifest.split("---\n").find(|object| object.contains(beginning)).expect("an object of the manifest");
    assert!(object.contains(from));
    object.replace(from, to)
}

/// How often each answer came, in `count` connections.
fn answers(cluster: &Cluster, pod: &str, count: u32, host: &str, port: &str) -> BTreeMap<String, u32> {
    let said = cluster.tcp(pod, &["look-often", &count.to_string(), host, port]).run().ok();
    let pairs = said.split_whitespace().filter_map(|pair| pair.split_once('='));
    pairs.map(|(answer, count)| (answer.to_owned(), count.parse().expect("a count"))).collect()
}

fn only(answer: &str, count: u32) -> BTreeMap<String, u32> {
    BTreeMap::from([(answer.to_owned(), count)])
}

fn is_spread(answers: &BTreeMap<String, u32>, count: u32) -> bool {
    answers.keys().eq(["one", "two"])
        && answers.values().sum::<u32>() == count
        && answers.values().all(|each| *each >= count / 8)
}

#[test]
fn a_service_is_reached_by_both_addresses_and_by_its_names_and_spreads() {
    needs!("root");
    let cluster = start();
    let addresses = Family::BOTH.map(|family| cluster.service("app", "web", family).to_string());
    let names = ["web", "web.app", "web.app.svc", "web.app.svc.cluster.local"].map(str::to_owned);
    for host in addresses.iter().chain(&names) {
        let answers = answers(&cluster, "app/client", 40, host, "80");
        assert!(is_spread(&answers, 40), "{host}: {answers:?}");
    }
    cluster.wait_edge("node-a", ["outbound", "app/client", "app/two", "8081", "mtls", ""]);
    cluster.wait_edge("node-b", ["inbound", "app/client", "app/two", "8081", "mtls", ""]);
    // Who is not captured has what kube-proxy would do.
    for host in &addresses {
        let answers = answers(&cluster, "legacy/outsider", 40, host, "80");
        assert!(is_spread(&answers, 40), "{host} from outside the mesh: {answers:?}");
    }
}

#[test]
fn a_service_without_an_endpoint_and_a_port_that_it_has_not_are_refused_at_once() {
    needs!("root");
    let cluster = start();
    let empty = cluster.service("app", "empty", Family::V4).to_string();
    let web = cluster.service("app", "web", Family::V4).to_string();
    for (address, port, reason) in [(&empty, "80", "no-endpoint"), (&web, "81", "no-such-port")] {
        let before = Instant::now();
        assert_eq!(answers(&cluster, "app/client", 10, address, port), only("reset", 10), "{address} {port}");
        // Somebody who waited for an answer about the address would have waited for longer ten times.
        assert!(before.elapsed() < Duration::from_millis(2500), "ten refusals took {:?}", before.elapsed());
        cluster.wait_edge("node-a", ["outbound", "app/client", address, port, "none", reason]);
    }
    assert_eq!(answers(&cluster, "legacy/outsider", 10, &empty, "80"), only("refused", 10));
}

#[test]
fn a_change_of_endpoints_applies_at_once_and_what_is_open_goes_on() {
    needs!("root");
    let cluster = start();
    let service = cluster.service("app", "web", Family::V4).to_string();
    let _echo = cluster.serve("app/two", &["echo", "7000"]);
    let two = cluster.address("app/two", Family::V4).to_string();
    let mut open = cluster.tcp("app/client", &["hold", &two, "7000"]).spawn();
    open.wait_for("open");
    assert!(is_spread(&answers(&cluster, "app/client", 40, &service, "80"), 40));

    let started = Instant::now();
    cluster.apply(&changed("name: two", "app: web", "app: retired"));
    wait_until("new connections to go to the other endpoint alone", Duration::from_secs(2), || {
        let answers = answers(&cluster, "app/client", 20, &service, "80");
        if answers == only("one", 20) { Ok(()) } else { Err(format!("{answers:?}")) }
    });
    println!("the endpoint was gone after {:.0?}", started.elapsed());
    open.write("still here\n");
    open.wait_for("back still here");

    cluster.apply(&changed("name: two", "app: web", "app: web"));
    wait_until("the endpoint to be back", Duration::from_secs(2), || {
        let answers = answers(&cluster, "app/client", 40, &service, "80");
        if is_spread(&answers, 40) { Ok(()) } else { Err(format!("{answers:?}")) }
    });
    cluster.delete(&changed("name: one", "app: web", "app: web"));
    wait_until("the deleted pod to be no endpoint", Duration::from_secs(5), || {
        let answers = answers(&cluster, "app/client", 20, &service, "80");
        if answers == only("two", 20) { Ok(()) } else { Err(format!("{answers:?}")) }
    });
}

#[test]
fn a_headless_service_names_its_pods() {
    needs!("root");
    let cluster = start();
    let resolve = "import socket; print(*sorted({a[4][0] for a in socket.getaddrinfo('headless', None)}))";
    let found = cluster.exec("app/client", &["/usr/bin/python3", "-c", resolve]).run().ok();
    let mut expected: Vec<_> = ["app/one", "app/two"]
        .iter()
        .flat_map(|pod| Family::BOTH.map(|family| cluster.address(pod, family).to_string()))
        .collect();
    expected.sort();
    assert_eq!(found.split_whitespace().collect::<Vec<_>>(), expected);
    let one = cluster.address("app/one", Family::V6).to_string();
    assert_eq!(answers(&cluster, "app/client", 3, &one, "8080"), only("one", 3));
}

#[test]
fn session_affinity_keeps_a_client_at_its_endpoint() {
    needs!("root");
    let cluster = start();
    let service = cluster.service("app", "faithful", Family::V4).to_string();
    let answers = answers(&cluster, "app/client", 30, &service, "80");
    assert!(answers == only("one", 30) || answers == only("two", 30), "{answers:?}");
}
