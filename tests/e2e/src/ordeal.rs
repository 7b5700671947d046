//! Something that happens to a box under load: what users see of it, and that nothing of theirs passes in clear meanwhile.

use std::time::Duration;

use crate::cluster::Cluster;
use crate::load::{Loaded, Report, Server};
use crate::view::Family;
use crate::wiretap::Wiretap;

/// Where `app/server` is served.
pub const PORT: u16 = 8080;

/// Answers after which an outage would have been seen.
pub const ENOUGH: u64 = 500;

/// Clients that make short connections at the same time.
const SHORT: u64 = 8;

/// Connections that are open all the time.
const LONG: u64 = 10;
const EVERY: Duration = Duration::from_millis(50);

/// Bytes of a transfer of bulk.
const TRANSFER: u64 = 256 << 10;

/// Does something while `load` runs, and for as long afterwards as an outage would need to be seen.
#[track_caller]
pub fn meanwhile(mut load: Loaded, what: impl FnOnce(&Loaded)) -> Report {
    load.event();
    what(&load);
    load.over();
    load.wait_for_more(2 * ENOUGH);
    let report = load.finish();
    println!("{report}");
    report.assert_spans_the_event();
    report
}

/// Does something to a box while `app/client` asks `app/server`, by short connections and long ones and, where that is
/// wanted, with transfers beside them.
#[track_caller]
pub fn under_load(cluster: &Cluster, name: &str, bulk: bool, what: impl FnOnce(&Loaded)) -> Report {
    let server = Server::start(cluster, "app/server", PORT);
    let marker = format!("marker-{}-{}", name.replace('@', "-"), std::process::id());
    let mut tap = Wiretap::start(cluster, "node-a", &name.replace('@', "-"));
    let load = server.load("app/client", Family::V4).marker(&marker).short(SHORT).long(LONG, EVERY);
    let load = if bulk { load.bulk(1, TRANSFER) } else { load }.start();
    load.wait_for_more(ENOUGH);
    // The twin: the same words of a pod that speaks in clear are seen (D26).
    let twin = marker.replace("marker", "twin");
    let url = format!("http://{}/{twin}", server.address(Family::V4));
    cluster.exec("legacy/outsider", &["curl", "-sS", "--max-time", "10", &url]).run().ok();
    println!("{name}");
    let report = meanwhile(load, what);
    tap.stop();
    assert!(tap.saw(&twin), "the tap sees nothing, so it proves nothing");
    assert!(!tap.saw(&marker), "a request passed in clear");
    let [one, other] = ["app/client", "app/server"].map(|pod| cluster.address(pod, Family::V4));
    tap.streams(PORT).between(one, other).assert_all_tls();
    report
}

/// So many proxies died. They had the keys of what was open, and that ended by an error; nobody was refused, and nothing that
/// began afterwards failed.
#[track_caller]
pub fn assert_only_what_was_open_broke(report: &Report, deaths: u64) {
    assert_eq!(report.long(), (LONG, LONG, 0), "{report}");
    for kind in ["refused", "early-end", "wrong-bytes", "timeout", "other"] {
        report.assert_never(kind);
    }
    // Of the short ones no more than were open, and none that began later: those waited for the new proxy.
    assert!(report.of_work("short").failed <= SHORT * deaths, "{report}");
    for work in ["short", "bulk"] {
        assert_eq!(report.of_phase("after", work).failed, 0, "{report}");
    }
    assert!(report.of_phase("after", "short").ok >= ENOUGH, "{report}");
}
