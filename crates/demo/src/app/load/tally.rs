//! What a load has counted.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::work::Broken;

/// Failures that are told one by one; all are counted.
const MOST_TOLD: usize = 100;

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    Short,
    Long,
    Bulk,
}

/// When it began: before, during or after what the load is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Before,
    During,
    After,
}

const WORKS: [(Work, &str); 3] = [(Work::Short, "short"), (Work::Long, "long"), (Work::Bulk, "bulk")];
const PHASES: [(Phase, &str); 3] = [(Phase::Before, "before"), (Phase::During, "during"), (Phase::After, "after")];

/// The beginning of a request or a transfer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Begun {
    at: Instant,
    phase: Phase,
}

#[derive(Clone, Debug, Default)]
struct Counts {
    ok: u64,
    failed: u64,
    bytes: u64,
    slowest: Duration,
    /// The longest time without a success.
    gap: Duration,
    took: Times,
}

/// What successes took, to within a sixteenth, in no more memory however many they are.
#[derive(Clone, Debug, Default)]
struct Times(BTreeMap<u64, u64>);

impl Times {
    /// Bits of a number of microseconds that are kept.
    const KEPT: u32 = 5;

    fn count(&mut self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let dropped = (u64::BITS - micros.leading_zeros()).saturating_sub(Self::KEPT);
        *self.0.entry(micros >> dropped << dropped).or_default() += 1;
    }

    /// What this share of them took at most.
    fn quantile(&self, share: f64) -> Duration {
        let all: u64 = self.0.values().sum();
        let mut seen = 0;
        let found = self.0.iter().find(|(_, count)| {
            seen += **count;
            seen as f64 >= all as f64 * share
        });
        Duration::from_micros(found.map_or(0, |(micros, _)| *micros))
    }
}

struct Failure {
    at: Duration,
    phase: &'static str,
    work: &'static str,
    broken: Broken,
}

/// All counts.
pub(super) struct Tally {
    start: Instant,
    phase: Phase,
    counts: [[Counts; 3]; 3],
    last_ok: [Option<Instant>; 3],
    failures: Vec<Failure>,
    last_error: Option<String>,
    slowest_since_report: Duration,
    long: Long,
}

/// Long connections.
#[derive(Clone, Copy, Debug, Default)]
struct Long {
    opened: u64,
    lost: u64,
    closed: u64,
}

impl Tally {
    pub(super) fn new(start: Instant) -> Self {
        Self {
            start,
            phase: Phase::Before,
            counts: Default::default(),
            last_ok: Default::default(),
            failures: Vec::new(),
            last_error: None,
            slowest_since_report: Duration::ZERO,
            long: Long::default(),
        }
    }

    pub(super) fn enter(&mut self, phase: Phase) {
        self.note_gaps(Instant::now());
        self.phase = phase;
    }

    /// The time since the last success counts as a gap, although it goes on.
    fn note_gaps(&mut self, now: Instant) {
        for (last, counts) in self.last_ok.iter().zip(&mut self.counts[self.phase as usize]) {
            if let Some(last) = last {
                counts.gap = counts.gap.max(now - *last);
            }
        }
    }

    /// Something begins.
    pub(super) fn begin(&self) -> Begun {
        Begun { at: Instant::now(), phase: self.phase }
    }

    /// It has ended. It counts for the phase in which it began, and a gap for the one in which it ends.
    pub(super) fn count(&mut self, work: Work, begun: Begun, outcome: &Result<u64, Broken>) {
        let now = Instant::now();
        let took = now - begun.at;
        let last = self.last_ok[work as usize];
        if outcome.is_ok() {
            let counts = &mut self.counts[self.phase as usize][work as usize];
            counts.gap = counts.gap.max(last.map_or(Duration::ZERO, |last| now - last));
            self.last_ok[work as usize] = Some(now);
        }
        let counts = &mut self.counts[begun.phase as usize][work as usize];
        counts.slowest = counts.slowest.max(took);
        self.slowest_since_report = self.slowest_since_report.max(took);
        match outcome {
            Ok(bytes) => {
                counts.ok += 1;
                counts.bytes += bytes;
                counts.took.count(took);
            }
            Err(broken) => {
                counts.failed += 1;
                let (work, phase) = (WORKS[work as usize].1, PHASES[begun.phase as usize].1);
                self.last_error = Some(format!("{work}, {}: {} ({})", broken.stage, broken.kind.as_str(), broken.text));
                if self.failures.len() < MOST_TOLD {
                    self.failures.push(Failure { at: now - self.start, phase, work, broken: broken.clone() });
                }
            }
        }
    }

    pub(super) fn long_opened(&mut self) {
        self.long.opened += 1;
    }

    pub(super) fn long_lost(&mut self) {
        self.long.lost += 1;
    }

    pub(super) fn long_closed(&mut self) {
        self.long.closed += 1;
    }

    /// Sums, and the slowest since the last of these.
    pub(super) fn brief(&mut self) -> Value {
        let all = || self.counts.iter().flatten();
        let line = json!({
            "seconds": self.start.elapsed().as_secs_f64(),
            "ok": all().map(|counts| counts.ok).sum::<u64>(),
            "failed": all().map(|counts| counts.failed).sum::<u64>(),
            "slowest_ms": milliseconds(self.slowest_since_report),
            "last_error": self.last_error,
            "long": { "opened": self.long.opened, "lost": self.long.lost, "closed": self.long.closed },
        });
        self.slowest_since_report = Duration::ZERO;
        line
    }

    /// Everything.
    pub(super) fn full(&mut self) -> Value {
        self.note_gaps(Instant::now());
        let mut line = self.brief();
        line["phase"] = PHASES[self.phase as usize].1.into();
        for (phase, phase_name) in PHASES {
            for (work, work_name) in WORKS {
                let counts = &self.counts[phase as usize][work as usize];
                line["counts"][phase_name][work_name] = json!({
                    "ok": counts.ok,
                    "failed": counts.failed,
                    "bytes": counts.bytes,
                    "slowest_ms": milliseconds(counts.slowest),
                    "gap_ms": milliseconds(counts.gap),
                    "median_ms": milliseconds(counts.took.quantile(0.5)),
                    "p99_ms": milliseconds(counts.took.quantile(0.99)),
                });
            }
        }
        line["failures"] = self.failures.iter().map(Failure::shown).collect();
        line
    }
}

impl Failure {
    fn shown(&self) -> Value {
        json!({
            "at_ms": milliseconds(self.at),
            "phase": self.phase,
            "work": self.work,
            "stage": self.broken.stage,
            "kind": self.broken.kind.as_str(),
            "text": self.broken.text,
        })
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn quantiles_are_those_of_a_sorted_list_to_within_a_sixteenth(
            micros in prop::collection::vec(0_u64..10_000_000, 1..200),
            share in 0.01_f64..1.0,
        ) {
            let mut times = Times::default();
            micros.iter().for_each(|micros| times.count(Duration::from_micros(*micros)));
            let mut sorted = micros;
            sorted.sort_unstable();
            let exact = sorted[(sorted.len() as f64 * share).ceil() as usize - 1];
            let told = times.quantile(share).as_micros() as u64;
            prop_assert!(told <= exact && exact - told <= exact / 16, "{told} of {exact}");
        }
    }

    #[test]
    fn what_never_happened_took_no_time() {
        assert_eq!(Times::default().quantile(0.5), Duration::ZERO);
    }
}
