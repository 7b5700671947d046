//! A load between pods that counts for itself, and what must be true of its counts.
//!
//! Server and client are the box's own programs (`justmtls demo-app`), which know nothing of TLS. What happens is said to
//! the client, so that it keeps apart what came before, during and after.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;

use crate::cluster::Cluster;
use crate::program::{Finished, Program, Running};
use crate::view::{Family, text};
use crate::wait::{PATIENCE, wait_until};

/// The product's binary, as every pod has it.
const BINARY: &str = "/run/justmtls/bin/justmtls";
/// Fewer requests than this around an event prove nothing (D26).
const SPAN: u64 = 1_000;
/// What a connection may take to be opened, on a machine that is busy with others.
const EACH: Duration = Duration::from_millis(10);
/// What has begun when the end is asked for may run into this.
const END: Duration = Duration::from_secs(60);

/// A web server in a pod.
#[derive(Debug)]
pub struct Server<'a> {
    cluster: &'a Cluster,
    pod: String,
    port: u16,
    _program: Running,
}

impl Server<'_> {
    /// Starts one, listening on both families.
    #[track_caller]
    pub fn start<'a>(cluster: &'a Cluster, pod: &str, port: u16) -> Server<'a> {
        let program = cluster.exec(pod, &[BINARY, "demo-app", "serve", "--port", &port.to_string()]).spawn();
        cluster.wait_listening(pod, port);
        Server { cluster, pod: pod.to_owned(), port, _program: program }
    }

    /// Where it is.
    #[must_use]
    pub fn address(&self, family: Family) -> SocketAddr {
        self.cluster.socket(&self.pod, family, self.port)
    }

    /// How many connections have brought it requests, and how many requests.
    #[track_caller]
    pub fn counts(&self) -> (u64, u64) {
        let url = format!("http://localhost:{}/counts", self.port);
        let answer = self.cluster.exec(&self.pod, &["curl", "-sS", &url]).run().ok();
        let counts: Value = serde_json::from_str(&answer).expect("counts are JSON");
        let of = |field: &str| counts[field].as_u64().expect("a count");
        (of("connections"), of("requests"))
    }

    /// A load on it from a pod, of nothing yet.
    pub fn load(&self, from: &str, family: Family) -> Load {
        Load::of(self.cluster.exec(from, &[BINARY, "demo-app", "load"]), &self.address(family).to_string())
    }
}

/// A load that has not begun.
#[derive(Debug)]
#[must_use]
pub struct Load {
    program: Program,
    arguments: Vec<String>,
    short: u64,
    long: u64,
    bulk: u64,
}

impl Load {
    /// A load of nothing yet: the client (`justmtls demo-app load` somewhere), and whom it asks.
    pub fn of(program: Program, to: &str) -> Load {
        Load { program, arguments: vec!["--to".to_owned(), to.to_owned()], short: 0, long: 0, bulk: 0 }
    }

    fn with(mut self, option: &str, value: impl fmt::Display) -> Self {
        self.arguments.extend([option.to_owned(), value.to_string()]);
        self
    }

    /// So many ask at the same time as often as they can, each request on a connection of its own.
    pub fn short(self, workers: u64) -> Self {
        self.short_at(workers, 0)
    }

    /// The same, so many requests a second of all together.
    pub fn short_at(mut self, workers: u64, rate: u32) -> Self {
        self.short = workers;
        self.with("--short", workers).with("--rate", rate)
    }

    /// Short connections altogether.
    pub fn count(self, connections: u64) -> Self {
        self.with("--count", connections)
    }

    /// Connections that are opened at the start and never again; each asks every `every`.
    pub fn long(mut self, connections: u64, every: Duration) -> Self {
        self.long = connections;
        self.with("--long", connections).with("--every", every.as_millis())
    }

    /// Connections that carry so many bytes each, down and up in turn.
    pub fn bulk(mut self, connections: u64, bytes: u64) -> Self {
        self.bulk = connections;
        self.with("--bulk", connections).with("--bulk-bytes", bytes)
    }

    /// How long a connect or an answer may take.
    pub fn patience(self, patience: Duration) -> Self {
        self.with("--patience", patience.as_millis())
    }

    /// A word in each request and each answer.
    pub fn marker(self, marker: &str) -> Self {
        self.with("--marker", marker)
    }

    /// Starts it, and waits until each part of it has had an answer.
    #[track_caller]
    pub fn start(self) -> Loaded {
        let loaded = Loaded { running: self.program.args(["--controlled"]).args(&self.arguments).spawn() };
        let (short, long, bulk) = (self.short, self.long, self.bulk);
        // A long connection that asks once a second says little; a bulk transfer is one count.
        let wanted = if short > 0 { 10 * short } else { 0 } + long + bulk.min(1);
        loaded.wait("its first answers", PATIENCE + EACH * u32::try_from(long).unwrap_or(u32::MAX), |line| {
            line["ok"].as_u64() >= Some(wanted) && line["long"]["opened"].as_u64() >= Some(long)
        });
        loaded
    }

    /// Runs it until its count of short connections is reached.
    #[track_caller]
    pub fn run(self, within: Duration) -> Report {
        Report::of(&self.program.args(&self.arguments).within(within).run())
    }
}

/// A load that runs.
#[derive(Debug)]
pub struct Loaded {
    running: Running,
}

impl Loaded {
    /// The last line that it said.
    fn last(&self) -> Option<Value> {
        last_line(&self.running.stdout())
    }

    #[track_caller]
    fn wait(&self, what: &str, within: Duration, holds: impl Fn(&Value) -> bool) {
        wait_until(&format!("a load: {what}"), within, || match self.last() {
            Some(line) if holds(&line) => Ok(()),
            line => Err(format!("{line:?} {}", self.running.stderr())),
        })
    }

    /// Says that it happens now. Returns when the client has heard it.
    #[track_caller]
    pub fn event(&mut self) {
        self.say("event", "during");
    }

    /// Says that it has happened.
    #[track_caller]
    pub fn over(&mut self) {
        self.say("over", "after");
    }

    #[track_caller]
    fn say(&mut self, word: &str, phase: &str) {
        self.running.write(format!("{word}\n"));
        let heard = format!("\"phase\":\"{phase}\"");
        wait_until(&format!("a load to hear {word:?}"), PATIENCE, || {
            let said = self.running.stdout();
            if said.contains(&heard) { Ok(()) } else { Err(format!("{:?}", last_line(&said))) }
        });
    }

    /// So many successes so far.
    #[must_use]
    pub fn ok(&self) -> u64 {
        self.last().and_then(|line| line["ok"].as_u64()).unwrap_or(0)
    }

    /// Long connections that have broken so far.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.last().and_then(|line| line["long"]["lost"].as_u64()).unwrap_or(0)
    }

    /// Waits for so many more successes.
    #[track_caller]
    pub fn wait_for_more(&self, more: u64) {
        let wanted = self.ok() + more;
        self.wait(&format!("{more} more answers"), 2 * PATIENCE, |line| line["ok"].as_u64() >= Some(wanted));
    }

    /// Waits until so many long connections have broken.
    #[track_caller]
    pub fn wait_for_lost(&self, lost: u64) {
        self.wait(&format!("{lost} broken connections"), PATIENCE, |line| line["long"]["lost"].as_u64() >= Some(lost));
    }

    /// Its last report, after everything was closed in order.
    #[track_caller]
    pub fn finish(mut self) -> Report {
        self.running.write("end\n");
        Report::of(&self.running.finish(END))
    }
}

/// A line of the client is JSON; the last one may be half there.
fn last_line(said: &str) -> Option<Value> {
    said.lines().rev().find_map(|line| serde_json::from_str(line).ok())
}

/// What a load counted.
#[derive(Clone, Debug)]
pub struct Report {
    last: Value,
    /// When it was said that something happens, from the load's start.
    event: Option<Duration>,
}

/// Counts of one kind of work, of one phase or of all.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    /// Requests, or transfers, that were answered rightly.
    pub ok: u64,
    /// Those that were not.
    pub failed: u64,
    /// Bytes that arrived and were right.
    pub bytes: u64,
    /// The slowest of all.
    pub slowest: Duration,
    /// The longest time between two successes.
    pub gap: Duration,
    /// What half of the successes took at most; of one phase only.
    pub median: Duration,
    /// What ninety-nine of a hundred took at most; of one phase only.
    pub p99: Duration,
}

impl Report {
    #[track_caller]
    pub(crate) fn of(ended: &Finished) -> Report {
        let last = last_line(&ended.stdout).filter(|line| line["counts"].is_object());
        let report = last.unwrap_or_else(|| panic!("a load ended without a report: {ended}"));
        let lines = ended.stdout.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let event = lines.filter(|line| line["phase"] == "during").find_map(|line| line["seconds"].as_f64());
        Report { last: report, event: event.map(Duration::from_secs_f64) }
    }

    /// The time from the event to the last failure that was told.
    #[must_use]
    pub fn last_failure_after_event(&self) -> Option<Duration> {
        let all = self.last["failures"].as_array().into_iter().flatten();
        let last = all.filter_map(|failure| failure["at_ms"].as_f64()).reduce(f64::max);
        Duration::from_secs_f64(last? / 1e3).checked_sub(self.event?)
    }

    /// The time from the event to the first failure of this work (`short`, `long` or `bulk`) after it.
    #[must_use]
    pub fn first_failure_after_event(&self, work: &str) -> Option<Duration> {
        let all = self.last["failures"].as_array().into_iter().flatten().filter(|failure| failure["work"] == work);
        let times = all.filter_map(|failure| Some(Duration::from_secs_f64(failure["at_ms"].as_f64()? / 1e3)));
        times.filter_map(|time| time.checked_sub(self.event?)).min()
    }

    /// Of `short`, `long` or `bulk`, in `before`, `during` or `after`.
    #[must_use]
    pub fn of_phase(&self, phase: &str, work: &str) -> Counts {
        let counts = &self.last["counts"][phase][work];
        let milliseconds = |field: &str| Duration::from_secs_f64(counts[field].as_f64().unwrap_or(0.0) / 1e3);
        Counts {
            ok: counts["ok"].as_u64().unwrap_or(0),
            failed: counts["failed"].as_u64().unwrap_or(0),
            bytes: counts["bytes"].as_u64().unwrap_or(0),
            slowest: milliseconds("slowest_ms"),
            gap: milliseconds("gap_ms"),
            median: milliseconds("median_ms"),
            p99: milliseconds("p99_ms"),
        }
    }

    /// Of `short`, `long` or `bulk`, all phases together.
    #[must_use]
    pub fn of_work(&self, work: &str) -> Counts {
        ["before", "during", "after"].iter().map(|phase| self.of_phase(phase, work)).fold(
            Counts::default(),
            |sum, counts| Counts {
                ok: sum.ok + counts.ok,
                failed: sum.failed + counts.failed,
                bytes: sum.bytes + counts.bytes,
                slowest: sum.slowest.max(counts.slowest),
                gap: sum.gap.max(counts.gap),
                ..sum
            },
        )
    }

    /// Of everything.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.last["ok"].as_u64().unwrap_or(0)
    }

    /// Long connections that were opened, that broke, and that ended in order.
    #[must_use]
    pub fn long(&self) -> (u64, u64, u64) {
        let of = |field: &str| self.last["long"][field].as_u64().unwrap_or(0);
        (of("opened"), of("lost"), of("closed"))
    }

    /// What users saw: for each failure that was told its work, and its kind (`refused`, `reset`, `early-end`, `wrong-bytes`,
    /// `timeout`, `other`).
    #[must_use]
    pub fn failures(&self) -> Vec<(String, String)> {
        let all = self.last["failures"].as_array().into_iter().flatten();
        all.map(|failure| (text(failure, "work").to_owned(), text(failure, "kind").to_owned())).collect()
    }

    /// Nothing failed, and every long connection that was opened was closed in order.
    #[track_caller]
    pub fn assert_nothing_failed(&self) {
        assert!(self.last["failed"] == 0, "{self}");
        let (opened, lost, closed) = self.long();
        assert!(lost == 0 && opened == closed, "{self}");
    }

    /// No short connection failed.
    #[track_caller]
    pub fn assert_no_short_failed(&self) {
        assert_eq!(self.of_work("short").failed, 0, "{self}");
    }

    /// No failure of this kind.
    #[track_caller]
    pub fn assert_never(&self, kind: &str) {
        assert!(self.failures().iter().all(|(_, seen)| seen != kind), "{self}");
    }

    /// Enough requests on both sides of the event, and around it.
    #[track_caller]
    pub fn assert_spans_the_event(&self) {
        let of = |phase| ["short", "long", "bulk"].iter().map(|work| self.of_phase(phase, work).ok).sum::<u64>();
        let (before, during, after) = (of("before"), of("during"), of("after"));
        assert!(before > 0 && after > 0, "nothing was asked on one side of the event: {self}");
        assert!(before + during + after >= SPAN, "fewer than {SPAN} requests around the event: {self}");
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for work in ["short", "long", "bulk"] {
            let all = self.of_work(work);
            if all.ok + all.failed == 0 {
                continue;
            }
            write!(
                f,
                "\n  {work}: {} ok, {} failed, slowest {:.0?}, gap {:.0?};",
                all.ok, all.failed, all.slowest, all.gap
            )?;
            for phase in ["before", "during", "after"] {
                let counts = self.of_phase(phase, work);
                write!(f, " {phase} {}/{}", counts.ok, counts.failed)?;
            }
        }
        let (opened, lost, closed) = self.long();
        if opened > 0 {
            write!(f, "\n  long connections: {opened} opened, {lost} broken, {closed} closed")?;
        }
        // The short ones first: of long connections all end at once, and would hide them.
        let mut failures: Vec<_> = self.last["failures"].as_array().into_iter().flatten().collect();
        failures.sort_by_key(|failure| failure["work"] != "short");
        for failure in failures.into_iter().take(10) {
            write!(f, "\n  {failure}")?;
        }
        Ok(())
    }
}
