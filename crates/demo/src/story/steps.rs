//! The steps of the story.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::Facts;
use super::scene::{Load, Scene};
use crate::boot::random_uuid;
use crate::wiretap::Seen;

/// X25519MLKEM768 in the registry of TLS groups.
const HYBRID: u16 = 4588;
/// How many requests a picture of the wire is made of.
const PICTURE: u64 = 100;
/// Requests of the load that spans the switch to strict, at least.
const SPAN: u64 = 1_000;
/// How soon a new mode must count for what is open already.
const SOON: Duration = Duration::from_secs(1);
/// For what takes as long as it takes, within reason.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long the wire of a cluster of the user's own is listened to.
const LISTEN: Duration = Duration::from_secs(3);

const CLIENT: &str = "shop/client";
const NEIGHBOUR: &str = "shop/neighbour";
const WEB: &str = "shop/web";
const OUTSIDER: &str = "legacy/outsider";
/// Where the shop's web server listens.
const WEB_PORT: u16 = 8080;

const IN_THE_MESH: &str = "{apiVersion: v1, kind: Namespace, metadata: {name: shop}}";
const STRICT: &str = "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, \
                      metadata: {name: default, namespace: shop}, spec: {mtls: {mode: STRICT}}}";

/// Nodes, processes and pods, and how long they took.
pub(super) async fn the_box(scene: &Scene, facts: &mut Facts) -> anyhow::Result<()> {
    let status = scene.status().await?;
    let pods = status["pods"].as_array().map_or(0, Vec::len);
    let unready: Vec<_> = status["pods"].as_array().into_iter().flatten().filter(|pod| pod["ready"] != true).collect();
    for node in status["nodes"].as_array().into_iter().flatten() {
        let processes = node["processes"].as_array().into_iter().flatten();
        let running: Vec<_> = processes
            .map(|it| format!("{} {}", it["role"].as_str().unwrap_or(""), it["state"].as_str().unwrap_or("")))
            .collect();
        let name = node["name"].as_str().unwrap_or("");
        facts.say(name, json!(running), format!("{name}: {}", running.join(", ")));
    }
    let took = scene.begun.elapsed().as_millis() as u64;
    facts.say("pods", pods, format!("control plane, and {pods} pods in network namespaces of their own"));
    facts.say("up_after_ms", took, format!("up after {took} ms"));
    ensure!(pods > 0, "the box has no pods");
    ensure!(unready.is_empty(), "a pod is not ready: {}", unready[0]);
    Ok(())
}

/// The shop before it joins the mesh. Gives a client that keeps one connection open.
pub(super) async fn before(scene: &Scene, facts: &mut Facts) -> anyhow::Result<Load> {
    let seen = picture(scene, facts).await?;
    ensure!(seen.markers > 0, "the secret word was not found on the wire, so finding none later would prove nothing");
    ensure!(seen.tls == 0, "there is TLS on the wire before there should be any");
    let mut kept = scene.load(CLIENT, &["--to", "web:80", "--rate", "100", "--keep"]).await?;
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
            let mut shop = status["pods"].as_array().into_iter().flatten().filter(|pod| pod["namespace"] == "shop");
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
    ensure!(after.failed == 0, "the connection from before was broken");
    Ok(())
}

/// The same picture, now of TLS; and who is who.
pub(super) async fn after(scene: &Scene, facts: &mut Facts) -> anyhow::Result<()> {
    let seen = picture(scene, facts).await?;
    ensure!(seen.markers == 0, "the secret word was found on the wire");
    ensure!(seen.clear == 0, "{} bytes went in clear", seen.clear);
    ensure!(seen.records > 0 && !seen.groups.is_empty(), "there was no TLS handshake to be seen");
    ensure!(
        seen.groups.iter().all(|group| *group == HYBRID),
        "a handshake used another key exchange: {:?}",
        seen.groups
    );
    ensure!(seen.ports == [WEB_PORT].into(), "connections were made to other ports: {:?}", seen.ports);
    let load = scene.load(CLIENT, &["--to", "web:80", "--rate", "100", "--keep"]).await?;
    let (client, server) = scene
        .until("a tunnel is listed", PATIENCE, async || {
            let connections = scene.admin("node-b", "/connections").await?;
            let tunnel = connections.as_array().into_iter().flatten().find(|it| {
                it["direction"] == "inbound" && it["security"] == "mtls" && it["other"] == CLIENT && it["pod"] == WEB
            });
            Ok(tunnel.map(|it| (it["peer"].clone(), it["identity"].clone())))
        })
        .await?;
    drop(load);
    facts.say("client", client.clone(), format!("the server's node saw    {}", text(&client)));
    facts.say("server", server.clone(), format!("and proved that it is    {}", text(&server)));
    ensure!(client == "spiffe://cluster.local/ns/shop/sa/client", "another client than expected: {client}");
    ensure!(server == "spiffe://cluster.local/ns/shop/sa/web", "another server than expected: {server}");
    Ok(())
}

/// The pod that nobody encrypts for.
pub(super) async fn outsider(scene: &Scene, facts: &mut Facts) -> anyhow::Result<()> {
    let counts = scene.load_to_the_end(OUTSIDER, &["--to", "web.shop:80", "--rate", "0", "--count", "50"]).await?;
    facts.say("requests", counts.ok, format!("{OUTSIDER} asked {WEB} {} times, {} failed", counts.ok, counts.failed));
    ensure!(counts.failed == 0, "permissive mode refused it");
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
    let mut open = scene.load(OUTSIDER, &["--to", "web.shop:80", "--rate", "100", "--keep"]).await?;
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

    let both = scene
        .until("a load that spans the switch", PATIENCE, async || {
            let (one, two) = (mesh.counts(), neighbour.counts());
            Ok((one.ok + two.ok >= SPAN || one.failed + two.failed > 0).then_some((one, two)))
        })
        .await?;
    let (ok, failed) = (both.0.ok + both.1.ok, both.0.failed + both.1.failed);
    facts.say(
        "mesh_requests",
        ok,
        format!("the pods of the mesh asked {} times meanwhile, {failed} failed", ok + failed),
    );
    facts.say(
        "mesh_failures",
        failed,
        "to undo: justmtls demo delete -f FILE, with PeerAuthentication shop/default in it",
    );
    ensure!(failed == 0, "a pod of the mesh noticed the switch");
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
    for node in status["nodes"].as_array().into_iter().flatten() {
        let coverage = scene.admin(text(&node["name"]), "/coverage").await?;
        all.extend(coverage.as_array().cloned().unwrap_or_default());
    }
    let inbound = all.iter().filter(|it| it["edge"]["direction"] == "inbound");
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
    if facts.lines.is_empty() {
        facts.say("edges", 0, "nobody has talked to anybody yet");
    }
    Ok(())
}

/// Traffic with a secret word in it, between the nodes and within one, while a wiretap listens between them.
async fn picture(scene: &Scene, facts: &mut Facts) -> anyhow::Result<Seen> {
    let word = random_uuid();
    let listening = scene.listen(scene.addresses(&[CLIENT, WEB, NEIGHBOUR]).await?, &word)?;
    let count = PICTURE.to_string();
    let arguments = ["--to", "web:80", "--rate", "0", "--count", &count, "--marker", &word];
    let far = scene.load_to_the_end(CLIENT, &arguments).await?;
    let near = scene.load_to_the_end(NEIGHBOUR, &arguments).await?;
    let seen = listening.end().await?;
    for (name, who, counts) in [("two_nodes", "between the nodes", far), ("one_node", "within a node", near)] {
        facts.say(
            name,
            counts.ok,
            format!("{} requests {who} with the secret word {}…, {} failed", counts.ok, &word[..8], counts.failed),
        );
        ensure!(counts.failed == 0 && counts.ok == PICTURE, "requests {who} failed");
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
        format!("in TLS:   {} bytes, {} records, {} handshakes{followed}", seen.tls, seen.records, seen.groups.len()),
    );
    facts.say("tls_records", seen.records, sample(&seen.sample));
    let mut groups = std::collections::BTreeMap::<u16, u64>::new();
    seen.groups.iter().for_each(|group| *groups.entry(*group).or_default() += 1);
    facts.values.insert("handshakes_by_group".to_owned(), json!(groups));
}

/// As a hex dump has it.
fn sample(bytes: &[u8]) -> String {
    let shown = &bytes[..bytes.len().min(24)];
    let hex: Vec<_> = shown.iter().map(|byte| format!("{byte:02x}")).collect();
    let letters: String = shown
        .iter()
        .map(|byte| if byte.is_ascii_graphic() || *byte == b' ' { char::from(*byte) } else { '.' })
        .collect();
    format!("sample: {}  |{letters}|", hex.join(" "))
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

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("")
}
