//! The steps in which something breaks or is replaced while pods talk.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;

use super::Facts;
use super::scene::{Load, Scene};
use super::steps::{CLIENT, PATIENCE, SPAN, each, text};

/// Clients that make one short connection after the other.
const SHORT: u64 = 4;
/// Connections that are open all the time.
const LONG: u64 = 4;
/// Answers after which an outage would have been seen.
const AFTERWARDS: u64 = 300;
/// A certificate lives that long in the story's box: it is renewed from half of it on.
pub(crate) const LEAF_LIFE: &str = "16s";
/// So long a certificate that was just renewed may be waited for.
const ROTATION: Duration = Duration::from_secs(20);

/// Every certificate of both nodes is replaced.
pub(super) async fn rotation(scene: &Scene, facts: &mut Facts) -> anyhow::Result<()> {
    facts.hint(format!("certificates of this box live {LEAF_LIFE}, so that they rotate while you watch"));
    let mut load = begin(scene).await?;
    let before = expiries(scene).await?;
    ensure!(!before.is_empty(), "no node holds a certificate");
    let began = Instant::now();
    load.say("event")?;
    scene
        .until("every certificate is replaced", ROTATION, async || {
            let now = expiries(scene).await?;
            Ok(before.iter().all(|(whose, end)| now.get(whose) > Some(end)).then_some(()))
        })
        .await?;
    let took = began.elapsed().as_millis() as u64;
    facts.say("certificates", before.len(), format!("{} certificates were replaced within {took} ms", before.len()));
    load.say("over")?;
    let seen = finish(scene, load, facts).await?;
    ensure!(seen.failed == 0 && seen.lost == 0, "a connection noticed the rotation: {}", seen.last_error);
    Ok(())
}

/// A process of the product is killed. Whether what is open on it goes on says what it is.
pub(super) async fn kill(scene: &Scene, process: &str, open_go_on: bool, facts: &mut Facts) -> anyhow::Result<()> {
    let old = restarts(scene, process).await?;
    let mut load = begin(scene).await?;
    load.say("event")?;
    let sentence = scene.kill(process).await?;
    load.say("over")?;
    let new = restarts(scene, process).await?;
    facts.say("restarts", new, sentence);
    ensure!(new > old, "{process} was not started again");
    let seen = finish(scene, load, facts).await?;
    ensure!(seen.failed_after == 0, "a connection that began after the kill failed: {}", seen.last_error);
    if open_go_on {
        ensure!(seen.failed == 0 && seen.lost == 0, "a connection noticed: {}", seen.last_error);
        return Ok(());
    }
    let line =
        format!("open at that moment, and ended by an error: {} long connections, {} short", seen.lost, seen.failed);
    facts.say("open_ended", seen.lost + seen.failed, line);
    ensure!(seen.lost == LONG, "of {LONG} open connections {} ended", seen.lost);
    ensure!(seen.failed <= SHORT, "more short connections failed than were open: {}", seen.last_error);
    ensure!(
        seen.kinds.iter().all(|kind| kind == "reset"),
        "a connection ended by something else than a reset: {:?}",
        seen.kinds
    );
    Ok(())
}

/// A load of short and long connections that has had its first answers.
async fn begin(scene: &Scene) -> anyhow::Result<Load> {
    let (short, long) = (SHORT.to_string(), LONG.to_string());
    let arguments =
        ["--to", "web:80", "--short", &short, "--rate", "0", "--long", &long, "--every", "20", "--controlled"];
    let mut load = scene.load(CLIENT, &arguments).await?;
    scene
        .until("the load runs", PATIENCE, async || {
            let report = load.report();
            Ok((report["long"]["opened"] == LONG && report["ok"].as_u64() > Some(2 * LONG)).then_some(()))
        })
        .await?;
    Ok(load)
}

/// What clients saw.
struct Seen {
    /// Short connections that failed.
    failed: u64,
    /// Those of them that began after it was over.
    failed_after: u64,
    /// Long connections that broke.
    lost: u64,
    kinds: Vec<String>,
    last_error: String,
}

/// Lets the load go on for long enough, ends it, and says what it counted.
async fn finish(scene: &Scene, mut load: Load, facts: &mut Facts) -> anyhow::Result<Seen> {
    let from = load.counts().ok;
    scene
        .until("the load goes on", PATIENCE, async || {
            let counts = load.counts();
            Ok((counts.ok >= from + AFTERWARDS && counts.ok >= SPAN).then_some(()))
        })
        .await?;
    load.say("end")?;
    let report = load.end_with_report().await?;
    let short = |phase: &str, what: &str| report["counts"][phase]["short"][what].as_u64().unwrap_or(0);
    let sum = |what: &str| ["before", "during", "after"].iter().map(|phase| short(phase, what)).sum::<u64>();
    let (ok, failed, failed_after) = (sum("ok"), sum("failed"), short("after", "failed"));
    let line =
        format!("short connections: {ok} answered, {} of them begun afterwards, {failed} failed", short("after", "ok"));
    facts.say("short_ok", ok, line);
    facts.values.insert("short_failed".to_owned(), failed.into());
    facts.values.insert("short_failed_after".to_owned(), failed_after.into());
    ensure!(short("before", "ok") > 0 && short("after", "ok") > 0, "the load did not span what happened");
    let kinds = each(&report["failures"]).map(|failure| text(&failure["kind"]).to_owned()).collect();
    let lost = report["long"]["lost"].as_u64().context("a report without long connections")?;
    Ok(Seen { failed, failed_after, lost, kinds, last_error: text(&report["last_error"]).to_owned() })
}

/// When each certificate of each node ends.
async fn expiries(scene: &Scene) -> anyhow::Result<BTreeMap<(&'static str, String), u64>> {
    let mut all = BTreeMap::new();
    for node in ["node-a", "node-b"] {
        let certificates = scene.admin(node, "/certificates").await?;
        for svid in each(&certificates["svids"]) {
            let end = svid["not_after"].as_u64().context("a certificate without an end")?;
            all.insert((node, text(&svid["identity"]).to_owned()), end);
        }
    }
    Ok(all)
}

/// How often the box has started a process again.
async fn restarts(scene: &Scene, name: &str) -> anyhow::Result<u64> {
    let status = scene.status().await?;
    let nodes = each(&status["nodes"]).flat_map(|node| each(&node["processes"]));
    let mut all = nodes.chain(each(&status["control"]["processes"]));
    let process: Option<&Value> = all.find(|process| process["name"] == name && process["state"] == "running");
    process.and_then(|process| process["restarts"].as_u64()).with_context(|| format!("{name} does not run"))
}
