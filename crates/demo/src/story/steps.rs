//! The steps of the story.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::Facts;
use super::scene::{Counts, Load, Scene};
use crate::boot::random_uuid;
use crate::wiretap::Seen;

/// X25519MLKEM768 in the registry of TLS groups.
const HYBRID: u16 = 4588;
/// How many requests a picture of the wire is made of.
const PICTURE: u64 = 100;
/// The part of the bytes, one in so many, that connections from before the wiretap may have sent.
const UNKNOWN: u64 = 20;
/// Requests of the load that spans the switch to strict, at least; half of them after it.
pub(super) const SPAN: u64 = 1_000;
/// How soon a new mode must count for what is open already.
const SOON: Duration = Duration::from_secs(1);
/// For what takes as long as it takes, within reason.
pub(super) const PATIENCE: Duration = Duration::from_secs(15);
/// How long the wire of a cluster of the user's own is listened to.
const LISTEN: Duration = Duration::from_secs(3);

pub(super) const CLIENT: &str = "shop/client";
const NEIGHBOUR: &str = "shop/neighbour";
const WEB: &str = "shop/web";
pub(super) const OUTSIDER: &str = "legacy/outsider";
/// Where the shop's web server listens.
const WEB_PORT: u16 = 8080;

const IN_THE_MESH: &str = "{apiVersion: v1, kind: Namespace, metadata: {name: shop}}";
pub(super) const STRICT: &str = "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, \
                                 metadata: {name: default, namespace: shop}, spec: {mtls: {mode: STRICT}}}";

/// Nodes, processes and pods, and how long they took.
pub(super) async fn the_box(scene: &Scene, facts: &mut Facts) -> anyhow::Result<()> {
    let status = scene.status().await?;
    let pods = status["pods"].as_array().map_or(0, Vec::len);
    let unready: Vec<_> = each(&status["pods"]).filter(|pod| pod["ready"] != true).map(name_of).collect();
    let mut ended = Vec::new();
    let places = each(&status["nodes"]).map(|node| (text(&node["name"]), &node["processes"]));
    for (place, processes) in std::iter::once(("control plane", &status["control"]["processes"])).chain(places) {
        let states: Vec<_> =
            each(processes).map(|it| format!("{} {}", text(&it["role"]), text(&it["state"]))).collect();
        facts.say(place, json!(states), format!("{place}: {}", states.join(", ")));
        ensure!(!states.is_empty(), "{place} has no process");
        ended.extend(each(processes).filter(|it| it["state"] != "running").map(|it| text(&it["name"])));
    }
    let took = scene.begun.elapsed().as_millis() as u64;
    facts.say("pods", pods, format!("{pods} pods in network namespaces of their own"));
    facts.say("up_after_ms", took, format!("up after {took} ms"));
    ensure!(ended.is_empty(), "a process has ended: {}", ended.join(", "));
    ensure!(pods > 0, "the box has no pods");
    ensure!(unready.is_empty(), "a pod is not ready: {}", unready.join(", "));
    Ok(())
}

/// Every pod of a cluster of the user's own, and whether it is captured.
pub(super) async fn pods(scene: &Scene, facts: &mut Facts) -> anyhow::Result<()> {
    let status = scene.status().await?;
    for pod in each(&status["pods"]) {
        let addresses: Vec<_> = each(&pod["addresses"]).map(text).collect();
        let (capture, line) = if pod["captured"] == true {
            ("captured", "captured".to_owned())
        } else {
            let because = text(&pod["uncaptured"]);
            (because, format!("not captured: {}", if because.is_empty() { "not yet" } else { because }))
        };
        let name = name_of(pod);
        let line = format!("{name} on {}, {}: {line}", text(&pod["node"]), addresses.join(" "));
        facts.say(&name, json!({ "node": pod["node"], "addresses": addresses, "capture": capture }), line);
    }
    Ok(())
}

/// The shop before it joins the mesh. Gives a client that keeps one connection open.
pub(super) async fn before(scene: &Scene, facts: &mut Facts) -> anyhow::Result<Load> {
    let seen = picture(scene, facts).await?;
    ensure!(seen.markers > 0, "the secret word was not found on the wire, so finding none later would prove nothing");
    ensure!(seen.tls == 0, "there is TLS on the wire before there should be any");
    let mut kept = scene.load(CLIENT, &["--to", "web:80", "--long", "1", "--every", "10"]).await?;
    scene.until("a connection that stays open", PATIENCE, async || Ok((kept.counts().ok > 0).then_some(()))).await?;
    facts.say("kept", true, "one client now keeps a connection open and goes on asking");
    Ok(kept)
}

/// The pods join while they run; the connection from before goes on.
pub(super) async fn capture(scene: &Scene, mut kept: Load, facts: &mut Facts) -> anyhow::Result<()> {
    let before = kept.counts();
    let started = Instant::now();
    scene.apply(IN_THE_MESH).await?;
    scene
        .until("the shop's pods are captured", PATIENCE, async || {
            let status = scene.status().await?;
            let mut shop = each(&status["pods"]).filter(|pod| pod["namespace"] == "shop");
            Ok(shop.all(|pod| pod["captured"] == true).then_some(()))
        })
        .await?;
    let took = started.elapsed().as_millis() as u64;
    facts.say(
        "captured_after_ms",
        took,
        format!("the label is gone, and the pods are captured after {took} ms; none was restarted"),
    );
    let after = scene
        .until("the connection from before goes on", PATIENCE, async || {
            let counts = kept.counts();
            Ok((counts.ok >= before.ok + PICTURE).then_some(counts))
        })
        .await?;
    let line =
        format!("the connection from before went on: {} answers more, {} failures", after.ok - before.ok, after.failed);
    facts.say("kept_failures", after.failed, line);
    ensure!(after.failed == 0, "the connection from before was broken: {}", after.last_error);
    Ok(())
}

/// The same picture, now of TLS; and who is who.
pub(super) async fn after(scene: &Scene, facts: &mut Facts) -> anyhow::Result<()> {
    let seen = picture(scene, facts).await?;
    ensure!(seen.markers == 0, "the secret word was found on the wire");
    ensure!(seen.clear == 0, "{} bytes went in clear", seen.clear);
    ensure!(seen.records > 0 && !seen.groups.is_empty(), "there was no TLS handshake to be seen");
    ensure!(
        seen.groups.keys().all(|group| *group == HYBRID),
        "a handshake used another key exchange: {:?}",
        seen.groups
    );
    ensure!(
        seen.not_followed <= seen.payload / UNKNOWN,
        "{} of {} bytes went in connections that could not be followed",
        seen.not_followed,
        seen.payload
    );
    ensure!(seen.ports == [WEB_PORT].into(), "connections were made to other ports: {:?}", seen.ports);
    // What passes within a node is on no wire between them: its proxy has to say.
    for (pod, fact) in [(CLIENT, "identities"), (NEIGHBOUR, "identities_one_node")] {
        let (client, server) = identities(scene, pod).await?;
        let line = format!("{pod} proved {}, and {WEB} {}", text(&client), text(&server));
        facts.say(fact, json!({ "client": client, "server": server }), line);
        ensure!(client == "spiffe://cluster.local/ns/shop/sa/client", "another client than expected: {client}");
        ensure!(server == "spiffe://cluster.local/ns/shop/sa/web", "another server than expected: {server}");
    }
    Ok(())
}

/// Whom both ends of a tunnel from a pod to the web server have proved to be, as the server's node lists it.
async fn identities(scene: &Scene, pod: &str) -> anyhow::Result<(Value, Value)> {
    let _open = scene.load(pod, &["--to", "web:80", "--long", "1", "--every", "10"]).await?;
    scene
        .until("a tunnel is listed", PATIENCE, async || {
            let connections = scene.admin("node-b", "/connections").await?;
            let tunnel = each(&connections).find(|it| {
                it["direction"] == "inbound" && it["security"] == "mtls" && it["other"] == pod && it["pod"] == WEB
            });
            Ok(tunnel.map(|it| (it["peer"].clone(), it["identity"].clone())))
        })
        .await
}

/// The pod that nobody encrypts for.
pub(super) async fn outsider(scene: &Scene, facts: &mut Facts) -> anyhow::Result<()> {
    let counts = scene.load_to_the_end(OUTSIDER, &["--to", "web.shop:80", "--rate", "0", "--count", "50"]).await?;
    facts.say("requests", counts.ok, format!("{OUTSIDER} asked {WEB} {} times, {} failed", counts.ok, counts.failed));
    ensure!(counts.failed == 0, "permissive mode refused it: {}", counts.last_error);
    let edge = edge_of(scene, "plaintext").await?;
    let reason = edge["edge"]["reason"].clone();
    let line = format!(
        "in clear, and named so: {} → {WEB}:{WEB_PORT}, reason {}, {} connections",
        OUTSIDER,
        text(&reason),
        edge["counts"]["connections"]
    );
    facts.say("reason", reason.clone(), line);
    ensure!(reason == "opted-out", "another reason than expected");
    Ok(())
}

/// The switch.
pub(super) async fn strict(scene: &Scene, facts: &mut Facts) -> anyhow::Result<()> {
    let mut open = scene.load(OUTSIDER, &["--to", "web.shop:80", "--long", "1", "--every", "10"]).await?;
    scene.until("a plaintext connection is open", PATIENCE, async || Ok((open.counts().ok > 0).then_some(()))).await?;
    let mut mesh = scene.load(CLIENT, &["--to", "web:80", "--rate", "0"]).await?;
    let mut neighbour = scene.load(NEIGHBOUR, &["--to", "web:80", "--rate", "0"]).await?;
    scene
        .until(
            "the load runs",
            PATIENCE,
            async || Ok((mesh.counts().ok > 0 && neighbour.counts().ok > 0).then_some(())),
        )
        .await?;

    let switched = Instant::now();
    scene.apply(STRICT).await?;
    let before = (mesh.counts(), neighbour.counts());
    scene.until("what is open in clear has ended", SOON, async || Ok((open.counts().failed > 0).then_some(()))).await?;
    let took = switched.elapsed().as_millis() as u64;
    facts.say("open_ended_after_ms", took, format!("its open connection was ended {took} ms after the switch"));
    let new = scene.load_to_the_end(OUTSIDER, &["--to", "web.shop:80", "--rate", "0", "--count", "20"]).await?;
    facts.say(
        "refused",
        new.failed,
        format!("of {} new connections of {OUTSIDER}, {} were refused", new.ok + new.failed, new.failed),
    );
    ensure!(new.ok == 0, "the pod outside still got through");
    let reason = edge_of(scene, "none").await?["edge"]["reason"].clone();
    facts.say("reason", reason.clone(), format!("reason: {}", text(&reason)));
    ensure!(reason == "strict", "another reason than expected");

    // A report is as old as the time between two: what the next one holds may still be from before the switch.
    let mut counts = async |what, enough: &dyn Fn(&Counts, &Counts) -> bool| {
        let question = async || {
            let (one, two) = (mesh.counts(), neighbour.counts());
            Ok((enough(&one, &two) || one.failed + two.failed > 0).then_some((one, two)))
        };
        scene.until(what, PATIENCE, question).await
    };
    let (one, two) = counts("the load goes on", &|one, two| one.ok > before.0.ok && two.ok > before.1.ok).await?;
    let from = (one.ok, two.ok);
    let spans = |one: &Counts, two: &Counts| {
        let since = (one.ok - from.0, two.ok - from.1);
        one.ok + two.ok >= SPAN && since.0 + since.1 >= SPAN / 2 && since.0 > 0 && since.1 > 0
    };
    let (one, two) = counts("a load that spans the switch", &spans).await?;
    let (ok, failed) = (one.ok + two.ok, one.failed + two.failed);
    let (earlier, later) = (before.0.ok + before.1.ok, ok - from.0 - from.1);
    let line = format!("{CLIENT} and {NEIGHBOUR} asked {} times meanwhile, {failed} failed", ok + failed);
    facts.say("mesh_requests", ok, line);
    facts.say("mesh_requests_before", earlier, format!("of these at least {earlier} before the switch"));
    facts.say("mesh_requests_after", later, format!("and {later} after it"));
    facts.values.insert("mesh_failures".to_owned(), failed.into());
    ensure!(failed == 0, "a pod of the mesh noticed the switch: {}{}", one.last_error, two.last_error);
    Ok(())
}

/// What passes between the nodes, whoever sends it.
pub(super) async fn wire(scene: &Scene, facts: &mut Facts) -> anyhow::Result<()> {
    let listening = scene.listen(scene.addresses(&[]).await?, "")?;
    tokio::time::sleep(LISTEN).await;
    tell_wire(&listening.end().await?, facts);
    Ok(())
}

/// Every edge that the proxies have counted.
pub(super) async fn edges(scene: &Scene, facts: &mut Facts) -> anyhow::Result<()> {
    let status = scene.status().await?;
    let mut all = Vec::new();
    for node in each(&status["nodes"]) {
        let coverage = scene.admin(text(&node["name"]), "/coverage").await?;
        all.extend(coverage.as_array().cloned().unwrap_or_default());
    }
    let inbound = all.iter().filter(|it| it["edge"]["direction"] == "inbound");
    if inbound.clone().next().is_none() {
        facts.say("edges", 0, "nobody has talked to anybody yet");
    }
    for (number, it) in inbound.enumerate() {
        let edge = &it["edge"];
        let reason = if edge["reason"] == "" { String::new() } else { format!(" ({})", text(&edge["reason"])) };
        let line = format!(
            "{} → {}:{}  {}{reason}",
            text(&edge["source"]),
            text(&edge["destination"]),
            edge["port"],
            text(&edge["security"])
        );
        facts.say(&format!("edge_{number}"), edge.clone(), line);
    }
    Ok(())
}

/// Traffic with a secret word in it, between the nodes and within one, while a wiretap listens between them.
async fn picture(scene: &Scene, facts: &mut Facts) -> anyhow::Result<Seen> {
    let word = random_uuid();
    let listening = scene.listen(scene.addresses(&[CLIENT, WEB, NEIGHBOUR]).await?, &word)?;
    let count = PICTURE.to_string();
    let arguments = |to| ["--to", to, "--rate", "0", "--count", &count, "--marker", &word];
    // By the pod's own address, which nobody else dials: there is no tunnel yet that was made before the wiretap.
    let web = scene.addresses(&[WEB]).await?.into_iter().find(IpAddr::is_ipv6).context("the web pod has no IPv6")?;
    let web = SocketAddr::new(web, WEB_PORT).to_string();
    let far = scene.load_to_the_end(CLIENT, &arguments(&web)).await?;
    let near = scene.load_to_the_end(NEIGHBOUR, &arguments("web:80")).await?;
    let seen = listening.end().await?;
    for (name, who, counts) in [("two_nodes", "between the nodes", far), ("one_node", "within a node", near)] {
        facts.say(
            name,
            counts.ok,
            format!("{} requests {who} with the secret word {}…, {} failed", counts.ok, &word[..8], counts.failed),
        );
        ensure!(counts.failed == 0 && counts.ok == PICTURE, "requests {who} failed: {}", counts.last_error);
    }
    tell_wire(&seen, facts);
    facts.say("secret_found", seen.markers, format!("the secret word was found {} times", seen.markers));
    Ok(seen)
}

fn tell_wire(seen: &Seen, facts: &mut Facts) {
    facts.say(
        "payload_bytes",
        seen.payload,
        format!("on the wire between the nodes: {} bytes of payload", seen.payload),
    );
    facts.say("clear_bytes", seen.clear, format!("in clear: {} bytes", seen.clear));
    let followed = if seen.not_followed == 0 {
        String::new()
    } else {
        format!(", and {} bytes in connections from before the wiretap", seen.not_followed)
    };
    facts.say(
        "tls_bytes",
        seen.tls,
        format!(
            "in TLS:   {} bytes, {} records, {} handshakes{followed}",
            seen.tls,
            seen.records,
            seen.groups.values().sum::<u64>()
        ),
    );
    facts.values.insert("tls_records".to_owned(), seen.records.into());
    facts.values.insert("not_followed_bytes".to_owned(), seen.not_followed.into());
    if !seen.groups.is_empty() {
        let groups: Vec<_> =
            seen.groups.iter().map(|(group, count)| format!("{} {count}×", group_name(*group))).collect();
        facts.hint(format!("key exchange: {}", groups.join(", ")));
    }
    facts.values.insert("handshakes_by_group".to_owned(), json!(seen.groups));
    if !seen.sample.is_empty() {
        facts.say("sample", hex(&seen.sample), sample(&seen.sample));
    }
}

/// A key exchange as people know it, with its number in the IANA registry.
fn group_name(group: u16) -> String {
    let name = match group {
        HYBRID => "X25519MLKEM768",
        23 => "secp256r1",
        24 => "secp384r1",
        29 => "x25519",
        _ => "group",
    };
    format!("{name} ({group})")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
}

/// As a hex dump has it.
fn sample(bytes: &[u8]) -> String {
    let shown = &bytes[..bytes.len().min(24)];
    let letters: String = shown
        .iter()
        .map(|byte| if byte.is_ascii_graphic() || *byte == b' ' { char::from(*byte) } else { '.' })
        .collect();
    format!("sample: {}  |{letters}|", hex(shown))
}

/// The edge from the pod outside to the web server, as the server's node has counted it.
async fn edge_of(scene: &Scene, security: &str) -> anyhow::Result<Value> {
    let outsider = scene.addresses(&[OUTSIDER]).await?;
    scene
        .until("the edge is listed", PATIENCE, async || {
            let coverage = scene.admin("node-b", "/coverage").await?;
            let Some(edges) = coverage.as_array() else { bail!("the coverage of node-b is not a list") };
            let is_it = |it: &&Value| {
                let edge = &it["edge"];
                let source = edge["source"].as_str().unwrap_or("");
                let from = source == OUTSIDER || source.parse().is_ok_and(|address| outsider.contains(&address));
                from && edge["direction"] == "inbound" && edge["destination"] == WEB && edge["security"] == security
            };
            Ok(edges.iter().find(is_it).cloned())
        })
        .await
        .context("coverage of node-b")
}

/// What is in a list of the status, or nothing.
pub(super) fn each(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

/// `namespace/name` of a pod of the status.
fn name_of(pod: &Value) -> String {
    format!("{}/{}", text(&pod["namespace"]), text(&pod["name"]))
}

pub(super) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("")
}
