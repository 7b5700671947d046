//! Who is at the other end: proven on both sides, and whoever cannot prove it is refused by name.
//!
//! Certificates that a stranger could make up are tried one by one in `crates/identity/tests`; here the whole product meets a few.

#![forbid(unsafe_code)]

use std::path::Path;

use e2e::{Cluster, Family, PATIENCE, Program, Shared, needs, text, wait_until};
use serde_json::Value;

static BOX: Shared = Shared::new(include_str!("../manifests/mesh.yaml"));

const CLIENT: &str = "spiffe://cluster.local/ns/app/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/app/sa/server";

fn connections(cluster: &Cluster, node: &str, port: u16) -> Vec<Value> {
    let all = cluster.admin(node, "/connections");
    let to_port = |one: &&Value| text(one, "dialled").ends_with(&format!(":{port}"));
    all.as_array().into_iter().flatten().filter(to_port).cloned().collect()
}

#[test]
fn both_ends_know_each_other_by_identity() {
    needs!("root");
    let cluster = BOX.get();
    let _server = cluster.serve("app/server", &["echo", "7000"]);
    let server = cluster.address("app/server", Family::V4).to_string();
    let mut client = cluster.tcp("app/client", &["hold", &server, "7000"]).spawn();
    client.wait_for("open");
    client.write("hello\n");
    client.wait_for("back hello");
    for (node, direction, own, peer) in [("node-a", "outbound", CLIENT, SERVER), ("node-b", "inbound", SERVER, CLIENT)]
    {
        let found = connections(&cluster, node, 7000);
        let [connection] = &found[..] else { panic!("{node}: {found:#?}") };
        let shown = ["direction", "security", "identity", "peer", "tls", "group"].map(|field| text(connection, field));
        assert_eq!(shown, [direction, "mtls", own, peer, "TLSv1_3", "X25519MLKEM768"], "{node}");
    }
}

#[test]
fn each_node_holds_certificates_of_its_own_pods_alone() {
    needs!("root");
    let cluster = BOX.get();
    for (node, expected) in [("node-a", &[CLIENT][..]), ("node-b", &["spiffe://cluster.local/ns/app/sa/near", SERVER])]
    {
        wait_until(&format!("the certificates of {node}"), PATIENCE, || {
            let shown = cluster.admin(node, "/certificates");
            let svids = shown["svids"].as_array().into_iter().flatten();
            let valid: Vec<_> = svids.filter(|svid| svid["valid"] == true).map(|svid| text(svid, "identity")).collect();
            if valid == expected { Ok(()) } else { Err(format!("{shown:#}")) }
        });
    }
}

#[test]
fn a_certificate_lives_as_long_as_the_administrator_says_also_longer_than_a_day() {
    needs!("root");
    const WEEK: u64 = 7 * 86_400;
    let cluster = Cluster::start_with(&["--leaf-lifetime", "7d"], include_str!("../manifests/mesh.yaml"));
    let left = wait_until("a certificate", PATIENCE, || {
        let shown = cluster.admin("node-a", "/certificates");
        shown["svids"][0]["left"].as_u64().ok_or_else(|| format!("{shown:#}"))
    });
    assert!((WEEK - 600..=WEEK).contains(&left), "{left} s");
}

/// A TLS client of the outsider that claims to speak our protocol, with its further options.
fn stranger(cluster: &Cluster, options: &[&str]) -> Program {
    let target = cluster.socket("app/server", Family::V4, 7010).to_string();
    let dial = ["openssl", "s_client", "-connect", &target, "-alpn", "justmtls/1", "-ign_eof"];
    cluster.exec("legacy/outsider", &dial).args(options).input("hello\n")
}

/// What the server's node counts of one way to fail a handshake.
fn failures(cluster: &Cluster, reason: &str) -> u64 {
    let metrics = cluster.page("node-b", "/metrics");
    let is_it = |line: &&str| {
        line.contains("direction=\"inbound\"")
            && line.contains(&format!("outcome=\"{reason}\""))
            && line.contains("handshake")
    };
    let values = metrics.lines().filter(is_it).filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok());
    values.sum()
}

/// Runs a stranger and waits until its failure is counted under this name; the application never heard of it.
fn is_refused(cluster: &Cluster, reason: &str, options: &[&str]) {
    let before = failures(cluster, reason);
    let said = stranger(cluster, options).run();
    assert!(!said.stdout.contains("you are"), "a stranger was let in: {said}");
    wait_until(&format!("{reason} to be counted"), PATIENCE, || {
        if failures(cluster, reason) > before {
            Ok(())
        } else {
            Err(format!("{said}{}", cluster.page("node-b", "/metrics")))
        }
    });
}

#[test]
fn a_client_that_proves_nothing_or_speaks_an_old_tls_is_refused_by_name() {
    needs!("root", "openssl");
    let cluster = BOX.get();
    let _server = cluster.serve("app/server", &["greet", "7010"]);
    // The twin: the same program without our protocol's name is a plain client of the application.
    let server = cluster.address("app/server", Family::V4).to_string();
    assert!(cluster.tcp("legacy/outsider", &["look", &server, "7010"]).run().ok().starts_with("said you are"));

    is_refused(&cluster, "no-client-certificate", &["-tls1_3"]);
    is_refused(&cluster, "tls-version", &["-tls1_2"]);
    let certificate = Impostor::of(&cluster.data("stranger"), CLIENT);
    is_refused(&cluster, "unknown-issuer", &["-tls1_3", "-cert", &certificate.chain, "-key", &certificate.key]);
}

/// A certificate with everything right but who signed it.
struct Impostor {
    chain: String,
    key: String,
}

impl Impostor {
    fn of(folder: &Path, identity: &str) -> Impostor {
        let file = |name: &str| folder.join(name).display().to_string();
        let make = |name: &str, extensions: &[&str], signed_by: &[&str]| {
            let new = [
                "req",
                "-config",
                "/dev/null",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
            ];
            let extensions = extensions.iter().flat_map(|extension| ["-addext", extension]);
            let files =
                ["-keyout".to_owned(), file(&format!("{name}.key")), "-out".to_owned(), file(&format!("{name}.pem"))];
            let program = Program::new("openssl").args(new).args(["-subj", &format!("/O={name}")]).args(extensions);
            program.args(signed_by).args(files).run().ok();
        };
        make("authority", &["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign"], &[]);
        let name = format!("subjectAltName=critical,URI:{identity}");
        let usage = [
            "basicConstraints=critical,CA:FALSE",
            "keyUsage=critical,digitalSignature",
            "extendedKeyUsage=clientAuth,serverAuth",
        ];
        let signed_by = ["-CA".to_owned(), file("authority.pem"), "-CAkey".to_owned(), file("authority.key")];
        make("leaf", &[usage[0], usage[1], usage[2], &name], &signed_by.each_ref().map(String::as_str));
        Impostor { chain: file("leaf.pem"), key: file("leaf.key") }
    }
}
