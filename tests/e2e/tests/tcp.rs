//! What an application can see of TCP: with a proxy on each side it is what plain TCP would show.

#![forbid(unsafe_code)]

use std::fs;
use std::time::{Duration, Instant};

use e2e::{Cluster, Family, OUTSIDE, Program, Running, Shared, eventually, needs, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const MESH: &str = include_str!("../manifests/mesh.yaml");
static BOX: Shared = Shared::new(MESH);

/// One on another node than the server, and one on the same.
const CLIENTS: [&str; 2] = ["app/client", "app/near"];
/// What "at once" may take on a busy machine. A wait of the data path would be 50 ms at least, and most are 300 and more.
const AT_ONCE: f64 = 45.0;

fn server(cluster: &Cluster, family: Family) -> String {
    cluster.address("app/server", family).to_string()
}

/// The outcome that a verb of `tcp.py` prints, and its milliseconds.
fn outcome(program: Program) -> (String, f64) {
    let said = program.run().ok();
    let (outcome, milliseconds) = said.trim().rsplit_once(' ').expect("an outcome and its time");
    (outcome.to_owned(), milliseconds.parse().expect("milliseconds"))
}

/// The same of several attempts, which must agree, with the shortest time: the machine has other things to do, too.
fn outcomes(program: impl Fn() -> Program) -> (String, f64) {
    let all: Vec<_> = (0..5).map(|_| outcome(program())).collect();
    assert!(all.iter().all(|(outcome, _)| *outcome == all[0].0), "{all:?}");
    (all[0].0.clone(), all.iter().map(|(_, time)| *time).fold(f64::MAX, f64::min))
}

#[test]
fn a_half_closed_connection_gets_its_answer_after_65_seconds() {
    needs!("root", "nc");
    // Connection tracking, as it is by default, forgets such a connection after 60.
    const IDLE: Duration = Duration::from_secs(65);
    let cluster = BOX.get();
    let mut pairs: Vec<_> = Family::BOTH
        .into_iter()
        .zip(["7900", "7901"])
        .map(|(family, port)| {
            let mut end = cluster.serve("app/server", &["answer-after-end", port]);
            let mut client = cluster.exec("app/client", &["nc", "-N", &server(&cluster, family), port]).spawn();
            client.write("a question\n");
            client.close_input();
            end.wait_for("end 11");
            (end, client)
        })
        .collect();
    let half_closed = Instant::now();
    eventually("65 seconds to pass", IDLE * 2, || half_closed.elapsed() >= IDLE);
    pairs.iter_mut().for_each(|(end, _)| end.write("a late answer\n"));
    for (_end, client) in pairs {
        assert_eq!(client.finish(Duration::from_secs(10)).ok(), "a late answer\n");
    }
}

#[test]
fn the_server_sees_the_clients_own_address() {
    needs!("root");
    let cluster = BOX.get();
    let _server = cluster.serve("app/server", &["greet", "7000"]);
    for (client, family) in CLIENTS.iter().flat_map(|client| Family::BOTH.map(|family| (client, family))) {
        let (said, _) = outcome(cluster.tcp(client, &["look", &server(&cluster, family), "7000"]));
        let expected = format!("said you are {} ", cluster.address(client, family));
        assert!(said.starts_with(&expected), "{client} {family:?}: {said}");
    }
}

#[test]
fn a_reset_by_either_end_is_a_reset_for_the_other() {
    needs!("root");
    let cluster = BOX.get();
    let _hangs_up = cluster.serve("app/server", &["hang-up", "7010"]);
    for (number, (client, family)) in
        CLIENTS.iter().flat_map(|client| Family::BOTH.map(|family| (client, family))).enumerate()
    {
        let address = server(&cluster, family);
        let (said, _) = outcome(cluster.tcp(client, &["provoke-reset", &address, "7010"]));
        assert_eq!(said, "reset", "{client} {family:?}, by the server");

        let port = format!("{}", 7011 + number);
        let mut observer = cluster.serve("app/server", &["observe", &port]);
        let mut resetting = cluster.tcp(client, &["send-and-reset", &address, &port]).spawn();
        observer.wait_for("got 1000");
        resetting.write("now\n");
        let seen = observer.finish(Duration::from_secs(10)).ok();
        assert!(seen.trim_end().ends_with("reset 1000"), "{client} {family:?}, by the client: {seen}");
    }
}

#[test]
fn a_closed_port_stays_closed() {
    needs!("root", "nc");
    let cluster = BOX.get();
    // On the loopback interface only: closed for everybody else.
    let _loopback = cluster.exec("app/server", &["nc", "-k", "-l", "127.0.0.1", "7021"]).spawn();
    cluster.wait_listening("app/server", 7021);
    for (family, port) in [(Family::V4, "7020"), (Family::V6, "7020"), (Family::V4, "7021")] {
        let address = server(&cluster, family);
        for node in ["node-a", "node-b", "outside"] {
            let (said, time) = outcomes(|| cluster.tcp_on(node, &["look", &address, port]));
            assert!(
                said == "refused" && time < AT_ONCE,
                "a probe from {node} to {address} {port}: {said} after {time} ms"
            );
        }
        let (said, time) = outcomes(|| cluster.tcp("legacy/outsider", &["look", &address, port]));
        assert!(
            said == "refused" && time < AT_ONCE,
            "from outside the mesh to {address} {port}: {said} after {time} ms"
        );
        for client in CLIENTS {
            let (said, time) = outcomes(|| cluster.tcp(client, &["look", &address, port]));
            assert!(said == "reset" && time < AT_ONCE, "{client} to {address} {port}: {said} after {time} ms");
        }
    }
}

#[test]
fn a_server_that_speaks_first_is_heard_at_once() {
    needs!("root");
    let cluster = BOX.get();
    let _server = cluster.serve("app/server", &["greet", "7030"]);
    for (client, family) in CLIENTS.iter().flat_map(|client| Family::BOTH.map(|family| (client, family))) {
        let address = server(&cluster, family);
        let times = (0..5).map(|_| outcome(cluster.tcp(client, &["look", &address, "7030"])));
        let times: Vec<_> = times.inspect(|(said, _)| assert!(said.starts_with("said you are"), "{said}")).collect();
        let best = times.iter().map(|(_, time)| *time).fold(f64::MAX, f64::min);
        assert!(best < AT_ONCE, "{client} {family:?}: {times:?}");
    }
}

#[test]
fn an_applications_own_tls_passes_untouched() {
    needs!("root", "openssl");
    let cluster = BOX.get();
    let folder = cluster.data("own-tls");
    let file = |name: &str| folder.join(name).display().to_string();
    let (key, certificate) = (file("key.pem"), file("certificate.pem"));
    let make = [
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-subj",
        "/CN=the-application",
    ];
    Program::new("openssl").args(make).args(["-keyout", &key, "-out", &certificate]).run().ok();
    let serve = ["openssl", "s_server", "-accept", "7040", "-key", &key, "-cert", &certificate, "-alpn", "h2", "-www"];
    let _server = cluster.exec("app/server", &serve).spawn();
    cluster.wait_listening("app/server", 7040);
    for (client, family) in
        CLIENTS.iter().chain(&["legacy/outsider"]).flat_map(|client| Family::BOTH.map(|family| (client, family)))
    {
        let target = cluster.socket("app/server", family, 7040).to_string();
        for version in ["-tls1_3", "-tls1_2"] {
            let dial = ["openssl", "s_client", "-connect", &target, "-alpn", "h2", "-CAfile", &certificate, version];
            let said = cluster.exec(client, &dial).input("GET / HTTP/1.0\r\n\r\n").run().ok();
            for expected in ["Verification: OK", "subject=CN = the-application", "ALPN protocol: h2"] {
                assert!(said.contains(expected), "{client} {target} {version}, no {expected:?}: {said}");
            }
        }
    }
}

/// Resident memory of a process, in bytes.
fn resident(pid: Pid) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process lives");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a resident size");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

#[test]
fn a_reader_that_stops_stops_its_writer_and_nothing_in_between_grows() {
    needs!("root");
    // What ten streams may leave in the proxies' memory. Their sockets' own buffers are the kernel's and have its bounds.
    const GROWTH: u64 = 16 << 20;
    let cluster = BOX.get();
    let proxies = ["node-a", "node-b"].map(|node| cluster.process(node));
    let before = proxies.map(resident);
    let mut pairs: Vec<_> = (7050..7060)
        .map(|port| {
            let port = port.to_string();
            let stalled = cluster.serve("app/server", &["stall", &port]);
            let writer = cluster.tcp("app/client", &["fill", &server(&cluster, Family::V4), &port]).spawn();
            (stalled, writer)
        })
        .collect();
    let blocked =
        |writer: &Running| writer.stdout().lines().find_map(|line| line.strip_prefix("blocked ")?.parse::<u64>().ok());
    for (_, writer) in &pairs {
        let taken = wait_until("the writer to block", Duration::from_secs(20), || {
            blocked(writer).ok_or_else(|| writer.stdout())
        });
        assert!(taken < 64 << 20, "{taken} bytes were taken from a writer whose reader reads nothing");
    }
    let grown: Vec<_> =
        proxies.map(resident).iter().zip(before).map(|(now, before)| now.saturating_sub(before)).collect();
    assert!(grown.iter().all(|grown| *grown < GROWTH), "the proxies grew by {grown:?} bytes");
    for (stalled, writer) in &mut pairs {
        stalled.write("go on\n");
        writer.write("end\n");
        let taken = blocked(writer).expect("it was blocked");
        stalled.wait_for(&format!("end {taken}"));
    }
}

#[test]
fn a_large_upload_arrives_as_it_was() {
    needs!("root", "bash", "nc", "openssl");
    let cluster = BOX.get();
    for (family, port) in Family::BOTH.into_iter().zip([7070, 7071]) {
        let listen = format!("nc -{} -l {port} | sha256sum", if family == Family::V4 { 4 } else { 6 });
        let receiver = cluster.exec("app/server", &["bash", "-c", &listen]).spawn();
        cluster.wait_listening("app/server", port);
        let address = cluster.address("app/server", family);
        let send = format!(
            "openssl enc -aes-128-ctr -K {:032x} -iv 0 -in /dev/zero 2>/dev/null | head -c 256M \
             | tee >(sha256sum >&2) | nc -N {address} {port}",
            std::process::id()
        );
        let sent = cluster.exec("app/client", &["bash", "-c", &send]).within(Duration::from_secs(60)).run();
        let received = receiver.finish(Duration::from_secs(60)).ok();
        assert_eq!(received, sent.stderr, "{sent}");
    }
}

#[test]
fn a_pod_reaches_itself_by_address_service_and_loopback() {
    needs!("root");
    let cluster = BOX.get();
    let _server = cluster.serve("app/server", &["greet", "7080"]);
    cluster.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: self, namespace: app}\n\
         spec: {selector: {app: server}, ipFamilyPolicy: RequireDualStack, ports: [{port: 80, targetPort: 7080}]}\n",
    );
    for (family, loopback) in Family::BOTH.into_iter().zip(["127.0.0.1", "::1"]) {
        let service = cluster.service("app", "self", family).to_string();
        for (address, port) in [(loopback, "7080"), (&server(&cluster, family), "7080"), (&service, "80")] {
            let look = || Ok(outcome(cluster.tcp("app/server", &["look", address, port])).0);
            let said = wait_until("the Service to have its endpoint", Duration::from_secs(5), || {
                look().and_then(|said| if said.starts_with("said") { Ok(said) } else { Err(said) })
            });
            assert!(said.starts_with("said you are"), "{address}: {said}");
        }
    }
}

#[test]
fn its_own_node_and_the_world_outside_are_reached_as_ever() {
    needs!("root");
    let cluster = BOX.get();
    let mut servers = ["node-a", "outside"].map(|place| cluster.tcp_on(place, &["greet", "7090"]).spawn());
    servers.iter_mut().for_each(|server| server.wait_for("ready"));
    let status = cluster.status();
    let node = status["nodes"][0]["addresses"].as_array().expect("addresses").iter().filter_map(|it| it.as_str());
    for address in node.chain(OUTSIDE) {
        let (said, _) = outcome(cluster.tcp("app/client", &["look", address, "7090"]));
        let family = if address.contains(':') { Family::V6 } else { Family::V4 };
        assert!(
            said.starts_with(&format!("said you are {} ", cluster.address("app/client", family))),
            "{address}: {said}"
        );
    }
}

#[test]
fn a_killed_proxy_is_an_error_and_never_a_short_success() {
    needs!("root", "nc");
    for node in ["node-b", "node-a"] {
        let cluster = Cluster::start(MESH);
        let receiver = cluster.serve("app/server", &["observe", "7100"]);
        let stream = format!("cat /dev/zero | nc -N {} 7100", server(&cluster, Family::V4));
        let mut sender = cluster.exec("app/client", &["sh", "-c", &stream]).spawn();
        // In the middle: much has arrived, and more is on its way.
        wait_until("a megabyte to arrive", Duration::from_secs(10), || {
            let said = receiver.stdout();
            let count = said.lines().rev().find_map(|line| line.strip_prefix("got ")?.parse::<u64>().ok());
            if count > Some(1 << 20) { Ok(()) } else { Err(said) }
        });
        assert!(sender.is_alive());
        kill(cluster.process(node), Signal::SIGKILL).unwrap();
        let said = receiver.finish(Duration::from_secs(10)).ok();
        let last = said.lines().last().unwrap_or_default();
        assert!(last.starts_with("reset "), "{node}'s proxy was killed, and the receiver saw {last:?}");
        eventually("the sender to notice", Duration::from_secs(10), || !sender.is_alive());
    }
}
