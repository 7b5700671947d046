//! A quiet pod beside a hostile one of its node (T18): what the hostile one does costs the node's proxies much, and the quiet
//! one little. It takes the whole machine, so it runs alone.

#![forbid(unsafe_code)]

use std::time::Duration;

use e2e::{Cluster, Family, Load, Loaded, PORT, Running, Server, needs};

const MESH: &str = include_str!("../manifests/mesh.yaml");
/// Beside the client and the server of the quiet ones, on the same two nodes; and two that are as quiet and opted out.
const OTHERS: &str = "
apiVersion: v1
kind: Pod
metadata: { name: hostile, namespace: app }
spec: { nodeName: node-a, serviceAccountName: hostile, containers: [{ name: idle, command: [sleep, infinity] }] }
---
apiVersion: v1
kind: Pod
metadata: { name: client, namespace: legacy, labels: { justmtls.dev/mode: \"off\" } }
spec: { nodeName: node-a, containers: [{ name: idle, command: [sleep, infinity] }] }
---
apiVersion: v1
kind: Pod
metadata: { name: server, namespace: legacy, labels: { justmtls.dev/mode: \"off\" } }
spec: { nodeName: node-b, containers: [{ name: idle, command: [sleep, infinity] }] }
";
/// Requests of a quiet pair in a round, alone and besieged each: half on a connection each, half on two that stay open.
const ENOUGH: u64 = 600;
/// What those are called in a load's report.
const WORKS: [&str; 2] = ["short", "long"];
/// How many times its time alone a request may take, times what the siege makes of one outside of the mesh: that one waits
/// for the machine's processors, too, and for no proxy.
const MOST: f64 = 2.0;
/// And no more than so many times of that is put down to the machine.
const MACHINE: f64 = 3.0;
/// It is not so where rounds in which it is not are so many more than those in which it is: what else happens on the machine comes
/// and goes.
const MORE: i32 = 3;

/// What the hostile pod does.
#[derive(Clone, Copy)]
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

/// What half of the requests of one kind took at most.
#[derive(Clone, Copy, Debug)]
struct Median {
    alone: Duration,
    besieged: Duration,
}

impl Median {
    fn times(self) -> f64 {
        self.besieged.as_secs_f64() / self.alone.as_secs_f64()
    }
}

/// A quiet pod asks alone and besieged, round after round, until it is clear whether the siege costs it little.
fn a_quiet_pod_beside(siege: Siege) {
    let cluster = Cluster::start(&format!("{MESH}---{OTHERS}"));
    let servers = ["app", "legacy"].map(|namespace| Server::start(&cluster, &format!("{namespace}/server"), PORT));
    let mut lead = 0;
    while lead < 1 {
        let [meshed, outside] = a_round(&cluster, &servers, siege);
        println!("{WORKS:?}, meshed {meshed:.1?}, outside {outside:.1?}");
        let is_little =
            |(meshed, outside): (&Median, Median)| meshed.times() <= MOST * outside.times().clamp(1.0, MACHINE);
        lead += if meshed.iter().zip(outside).all(is_little) { 1 } else { -1 };
        assert!(lead > -MORE, "besieged it takes too long");
    }
}

fn a_round(cluster: &Cluster, servers: &[Server<'_>; 2], siege: Siege) -> [[Median; 2]; 2] {
    let pairs = [(&servers[0], "app/client"), (&servers[1], "legacy/client")];
    let quiet = |load: Load| load.short_at(1, 200).long(2, Duration::from_millis(10)).start();
    let mut loads = pairs.map(|(server, client)| quiet(server.load(client, Family::V4)));
    let more = |loads: &[Loaded; 2], requests| loads.iter().for_each(|load| load.wait_for_more(requests));
    more(&loads, ENOUGH);
    loads.iter_mut().for_each(Loaded::event);
    let besieged = siege.start(cluster);
    more(&loads, ENOUGH / 4);
    loads.iter_mut().for_each(Loaded::over);
    more(&loads, ENOUGH);
    let attacks = besieged.attacks();
    drop(besieged);
    assert!(attacks >= 50, "a siege of {attacks} attacks is none");
    loads.map(|load| {
        let report = load.finish();
        report.assert_nothing_failed();
        WORKS.map(|work| {
            let [alone, besieged] = ["before", "after"].map(|phase| report.of_phase(phase, work).median);
            Median { alone, besieged }
        })
    })
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
