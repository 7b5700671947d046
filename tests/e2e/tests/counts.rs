//! What the product counts is what the programs counted themselves: connections and bytes, on both sides, in numbers, dumps and log.

#![forbid(unsafe_code)]

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use e2e::{Cluster, Family, PATIENCE, Shared, needs, text, wait_until};
use serde_json::Value;

static BOX: Shared = Shared::new(include_str!("../manifests/mesh.yaml"));

const LONG: Duration = Duration::from_secs(120);

/// Connections, and payload in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Counts {
    opened: u64,
    closed: u64,
    to_server: u64,
    to_client: u64,
}

impl Counts {
    /// So many connections, which have ended.
    fn of(connections: u64, to_server: u64, to_client: u64) -> Counts {
        Counts { opened: connections, closed: connections, to_server, to_client }
    }

    fn since(self, before: Counts) -> Counts {
        Counts {
            opened: self.opened - before.opened,
            closed: self.closed - before.closed,
            to_server: self.to_server - before.to_server,
            to_client: self.to_client - before.to_client,
        }
    }
}

/// What Istio's metrics of a node's proxy say for all series with these labels.
fn metrics(cluster: &Cluster, node: &str, labels: &[String]) -> Counts {
    let page = cluster.page(node, "/metrics");
    let of = |name: &str| {
        let lines = page.lines().filter(|line| line.starts_with(&format!("{name}{{")));
        let lines = lines.filter(|line| labels.iter().all(|label| line.contains(label)));
        lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok()).sum()
    };
    Counts {
        opened: of("istio_tcp_connections_opened_total"),
        closed: of("istio_tcp_connections_closed_total"),
        to_server: of("istio_tcp_received_bytes_total"),
        to_client: of("istio_tcp_sent_bytes_total"),
    }
}

fn labels(reporter: &str, source: &str, destination: &str, policy: &str) -> Vec<String> {
    vec![
        format!("reporter=\"{reporter}\""),
        format!("source_workload=\"{source}\""),
        format!("destination_workload=\"{destination}\""),
        format!("connection_security_policy=\"{policy}\""),
    ]
}

/// The lines of a node's access log about connections to a port.
fn log(cluster: &Cluster, node: &str, port: u16) -> Vec<Value> {
    let path = format!("/proc/{}/root/run/justmtls/nodes/{node}/proxy/access.log", cluster.process(node));
    let log = fs::read_to_string(PathBuf::from(path)).expect("the proxy's access log");
    // The last line may be half written.
    let lines = log.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    let lines = lines.map(|line| serde_json::from_str(line).expect("each line is JSON"));
    lines.filter(|line: &Value| text(line, "to").ends_with(&format!(":{port}"))).collect()
}

fn sum(lines: &[Value]) -> Counts {
    let of = |field: &str| lines.iter().filter_map(|line| line[field].as_u64()).sum();
    Counts::of(lines.len() as u64, of("sent"), of("received"))
}

/// Waits until a node has this in its numbers and its log, and nothing of it among its open connections.
fn shows(cluster: &Cluster, node: &str, labels: &[String], before: Counts, port: u16, expected: Counts) {
    wait_until(&format!("{node} to have counted {expected:?}"), PATIENCE, || {
        let counted = metrics(cluster, node, labels).since(before);
        let logged = sum(&log(cluster, node, port));
        if (counted, logged) == (expected, expected) { Ok(()) } else { Err(format!("{counted:?}, logged {logged:?}")) }
    });
    assert!(open(cluster, node, port).is_empty());
}

fn open(cluster: &Cluster, node: &str, port: u16) -> Vec<Value> {
    let all = cluster.admin(node, "/connections");
    let to_port = |one: &&Value| text(one, "dialled").ends_with(&format!(":{port}"));
    all.as_array().into_iter().flatten().filter(to_port).cloned().collect()
}

/// The two sides of what `app/client` does with `app/server`, through the tunnel.
fn both_sides() -> [(&'static str, Vec<String>); 2] {
    [("node-a", "source"), ("node-b", "destination")]
        .map(|(node, reporter)| (node, labels(reporter, "client", "server", "mutual_tls")))
}

#[test]
fn numbers_dumps_and_log_say_what_the_programs_counted() {
    needs!("root", "curl", "nginx", "iperf3");
    let cluster = BOX.get();
    many_short_ones(&cluster);
    a_web_server(&cluster);
    one_large_one(&cluster);
    one_that_lives(&cluster);
    in_clear(&cluster);
}

fn many_short_ones(cluster: &Cluster) {
    let before = both_sides().map(|(node, labels)| metrics(cluster, node, &labels));
    let _server = cluster.serve("app/server", &["echo", "7600"]);
    let address = cluster.address("app/server", Family::V4).to_string();
    let count = 1500_u64;
    let said =
        cluster.tcp("app/client", &["flood", &address, "7600", &count.to_string(), "32"]).within(LONG).run().ok();
    assert!(said.starts_with(&format!("good {count} of {count} ")), "{said}");
    // Each sends its number and a line's end, and gets them back.
    let bytes = (0..count).map(|number| number.to_string().len() as u64 + 1).sum();
    for ((node, labels), before) in both_sides().iter().zip(before) {
        shows(cluster, node, labels, before, 7600, Counts::of(count, bytes, bytes));
    }
}

fn a_web_server(cluster: &Cluster) {
    let before = both_sides().map(|(node, labels)| metrics(cluster, node, &labels));
    let folder = cluster.data("counted");
    let shown = folder.display();
    fs::write(folder.join("page.bin"), vec![b'x'; 300_000]).unwrap();
    let configuration = format!(
        "daemon off; pid {shown}/pid; error_log {shown}/error.log; events {{}}\n\
         http {{ log_format counts '$request_length $bytes_sent'; access_log {shown}/counts counts; keepalive_timeout 0;\n\
         client_body_temp_path {shown}/body; server {{ listen 7601; listen [::]:7601; root {shown}; }} }}\n"
    );
    let file = folder.join("nginx.conf");
    fs::write(&file, configuration).unwrap();
    let _nginx = cluster.exec("app/server", &["nginx", "-c", file.to_str().unwrap()]).spawn();
    cluster.wait_listening("app/server", 7601);
    for family in Family::BOTH {
        let url = format!("http://{}/page.bin", cluster.socket("app/server", family, 7601));
        for _ in 0..5 {
            let said = cluster.exec("app/client", &["curl", "--silent", "--fail", "--output", "/dev/null", &url]).run();
            said.ok();
        }
    }
    let counted = wait_until("nginx to have counted", PATIENCE, || {
        let counts = fs::read_to_string(folder.join("counts")).unwrap_or_default();
        if counts.lines().count() == 10 { Ok(counts) } else { Err(counts) }
    });
    let column = |number: usize| {
        let values = counted.lines().filter_map(|line| line.split_whitespace().nth(number)?.parse::<u64>().ok());
        values.sum::<u64>()
    };
    assert!(column(1) > 3_000_000);
    for ((node, labels), before) in both_sides().iter().zip(before) {
        shows(cluster, node, labels, before, 7601, Counts::of(10, column(0), column(1)));
    }
}

fn one_large_one(cluster: &Cluster) {
    let _server = cluster.exec("app/server", &["iperf3", "--server", "--port", "7602"]).spawn();
    cluster.wait_listening("app/server", 7602);
    let address = cluster.address("app/server", Family::V4).to_string();
    let client = ["iperf3", "--client", &address, "--port", "7602", "--bytes", "50000000", "--json"];
    let report = cluster.exec("app/client", &client).within(LONG).run().ok();
    let report: Value = serde_json::from_str(&report).unwrap();
    let of = |side: &str| report["end"][side]["bytes"].as_u64().expect("iperf3 counts bytes");
    // Both of its connections begin with a cookie of this length, which it does not count.
    let cookie = 37;
    // What the client sent last may reach the server after it has stopped to count.
    let (least, most) = (of("sum_received") + cookie, of("sum_sent") + cookie);
    assert!(most > 50_000_000 && least > most / 2, "{least} to {most}");
    for node in ["node-a", "node-b"] {
        let data = wait_until("iperf3's connections to be logged", PATIENCE, || {
            let mut lines = log(cluster, node, 7602);
            lines.sort_by_key(|line| line["sent"].as_u64());
            if lines.len() == 2 { Ok(lines.remove(1)) } else { Err(format!("{lines:#?}")) }
        });
        let sent = data["sent"].as_u64().unwrap();
        assert!((least..=most).contains(&sent), "{node} counted {sent}, iperf3 {least} to {most}");
    }
}

fn one_that_lives(cluster: &Cluster) {
    let before = both_sides().map(|(node, labels)| metrics(cluster, node, &labels));
    let _server = cluster.serve("app/server", &["echo", "7603"]);
    let address = cluster.address("app/server", Family::V4).to_string();
    let mut client = cluster.tcp("app/client", &["hold", &address, "7603"]).spawn();
    client.wait_for("open");
    client.write("12345\n");
    client.wait_for("back 12345");
    for ((node, labels), before) in both_sides().iter().zip(before) {
        let counted = metrics(cluster, node, labels).since(before);
        assert_eq!(counted, Counts { opened: 1, closed: 0, to_server: 6, to_client: 6 }, "{node}, while it lives");
        let all = open(cluster, node, 7603);
        let [connection] = &all[..] else { panic!("{node}: {all:#?}") };
        assert_eq!((&connection["sent"], &connection["received"]), (&6.into(), &6.into()), "{connection}");
        assert!(connection["age_ms"].is_u64() && log(cluster, node, 7603).is_empty());
    }
    client.finish(PATIENCE).ok();
    for ((node, labels), before) in both_sides().iter().zip(before) {
        shows(cluster, node, labels, before, 7603, Counts::of(1, 6, 6));
    }
}

/// One side of it has no proxy.
fn in_clear(cluster: &Cluster) {
    let cases = [
        ("legacy/outsider", "app/server", "node-b", labels("destination", "outsider", "server", "unknown"), 7604),
        ("app/client", "legacy/outsider", "node-a", labels("source", "client", "outsider", "unknown"), 7605),
    ];
    for (from, to, node, labels, port) in cases {
        let before = metrics(cluster, node, &labels);
        let shown = port.to_string();
        let _server = cluster.serve(to, &["echo", &shown]);
        let address = cluster.address(to, Family::V6).to_string();
        let said = cluster.tcp(from, &["flood", &address, &shown, "200", "8"]).within(LONG).run().ok();
        assert!(said.starts_with("good 200 of 200 "), "{from} to {to}: {said}");
        let bytes = (0..200).map(|number: u64| number.to_string().len() as u64 + 1).sum();
        shows(cluster, node, &labels, before, port, Counts::of(200, bytes, bytes));
        for line in log(cluster, node, port) {
            assert_eq!((text(&line, "security"), text(&line, "reason")), ("plaintext", "opted-out"), "{line}");
        }
    }
}
