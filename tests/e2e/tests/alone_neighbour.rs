//! A quiet pod beside a hostile one of its node (T18): what the hostile one does costs the node's proxies much, and the quiet
//! one little. It takes the whole machine, so it runs alone.

#![forbid(unsafe_code)]

use std::time::Duration;

use e2e::{Cluster, Family, Load, Loaded, PORT, Running, Server, needs};

const MESH: &str = include_str!("../manifests/mesh.yaml");
/// Beside the client and the server of the quiet ones, on the same two nodes.
const HOSTILE: &str = "
apiVersion: v1
kind: Pod
metadata: { name: hostile, namespace: app }
spec: { nodeName: node-a, serviceAccountName: hostile, containers: [{ name: idle, command: [sleep, infinity] }] }
";
/// Requests of the quiet pod, alone and besieged each.
const ENOUGH: u64 = 1_000;
/// How many times its time alone a request may take.
const MOST: f64 = 2.0;
/// And how much longer besides: processors that have nothing else to do wake sooner at one time than at another.
const WAKING: Duration = Duration::from_micros(500);

/// What the hostile pod does.
enum Siege {
    /// Short connections, as many as it can.
    Connections,
    /// Connections of another port each: no tunnel is there for them.
    Handshakes,
    /// From outside the mesh: hellos that begin and stop.
    Hellos,
    /// Eight streams, as fast as they go.
    Bulk,
}

/// A siege that goes on for as long as it is held.
struct Besieged<'a> {
    load: Option<Loaded>,
    flood: Option<Running>,
    _target: Server<'a>,
}

impl Siege {
    fn start(self, cluster: &Cluster) -> Besieged<'_> {
        let target = Server::start(cluster, "app/near", PORT);
        let load = || Some(target.load("app/hostile", Family::V4));
        let near = cluster.address("app/near", Family::V4).to_string();
        let flood = |pod: &str, verb: &[&str]| {
            let mut flood = cluster.tcp(pod, verb).spawn();
            flood.wait_for("flooding");
            Some(flood)
        };
        let (load, flood) = match self {
            Siege::Connections => (load().map(|load| load.short(64)), None),
            Siege::Bulk => (load().map(|load| load.bulk(8, 1 << 24)), None),
            Siege::Handshakes => (None, flood("app/hostile", &["flood-ports", &near, "32"])),
            Siege::Hellos => (None, flood("legacy/outsider", &["flood-hellos", &near, "8080", "4"])),
        };
        Besieged { load: load.map(Load::start), flood, _target: target }
    }
}

impl Besieged<'_> {
    /// How many connections, or transfers, it has made.
    fn attacks(&self) -> u64 {
        let of_load = self.load.as_ref().map_or(0, Loaded::ok);
        let said = self.flood.as_ref().map(Running::stdout).unwrap_or_default();
        let of_flood = said.lines().filter_map(|line| line.strip_prefix("made ")?.parse().ok()).max();
        of_load + of_flood.unwrap_or(0)
    }
}

/// A quiet pod asks alone, and then besieged.
fn a_quiet_pod_beside(siege: Siege) {
    let cluster = Cluster::start(&format!("{MESH}---{HOSTILE}"));
    let server = Server::start(&cluster, "app/server", PORT);
    let load = server.load("app/client", Family::V4).short_at(1, 100).long(2, Duration::from_millis(10));
    let mut load = load.start();
    load.wait_for_more(ENOUGH);
    load.event();
    let besieged = siege.start(&cluster);
    load.wait_for_more(ENOUGH / 2);
    load.over();
    load.wait_for_more(ENOUGH);
    let attacks = besieged.attacks();
    println!("{attacks} attacks");
    drop(besieged);
    let report = load.finish();
    println!("{report}");
    report.assert_nothing_failed();
    assert!(attacks >= 50, "a siege of {attacks} attacks is none");
    for work in ["short", "long"] {
        let [alone, beside] = ["before", "after"].map(|phase| report.of_phase(phase, work));
        println!(
            "{work}: alone {:.1?}, p99 {:.1?}; besieged {:.1?}, p99 {:.1?}",
            alone.median, alone.p99, beside.median, beside.p99
        );
        assert!(beside.median <= alone.median.mul_f64(MOST) + WAKING, "{work}: {report}");
    }
}

#[test]
fn a_neighbour_that_opens_connections_as_fast_as_it_can_is_hardly_noticed() {
    needs!("root");
    a_quiet_pod_beside(Siege::Connections);
}

#[test]
fn a_neighbour_whose_every_connection_is_a_handshake_is_hardly_noticed() {
    needs!("root");
    a_quiet_pod_beside(Siege::Handshakes);
}

#[test]
fn strangers_that_begin_hellos_and_stop_are_hardly_noticed() {
    needs!("root");
    a_quiet_pod_beside(Siege::Hellos);
}

#[test]
fn a_neighbour_that_sends_as_much_as_it_can_is_hardly_noticed() {
    needs!("root");
    a_quiet_pod_beside(Siege::Bulk);
}
