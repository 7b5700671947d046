//! The marks: what was set out to be reached, and whether it is.

use std::fmt;

use crate::memory::Memory;
use crate::plan::Layout;
use crate::results::Results;

/// How far a check lets a number miss its mark: runs on busy machines differ by about so much.
const SLACK: f64 = 0.15;

/// A kilobyte and a megabyte, as in the marks.
const KB: f64 = 1000.0;
const MB: f64 = 1e6;

/// One mark.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Mark {
    what: &'static str,
    unit: &'static str,
    limit: Limit,
    /// What was measured, if it was.
    value: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Limit {
    AtMost(f64),
    AtLeast(f64),
}

impl Limit {
    fn holds(self, value: f64, slack: f64) -> bool {
        match self {
            Limit::AtMost(limit) => value <= limit * (1.0 + slack),
            Limit::AtLeast(limit) => value >= limit * (1.0 - slack),
        }
    }
}

/// All of them, against a run. Ratios are to the plaintext double proxy, everything on one processor.
pub(crate) fn marks(results: &Results) -> Vec<Mark> {
    let ratio = |measure, number| results.row(Layout::One.name(), measure, number).ratio.map(|ratio| ratio.median);
    let memory = |of: &dyn Fn(&Memory) -> f64| results.memory.as_ref().map(of);
    let idle = |memory: &Memory| memory.per_connection_client.max(memory.per_connection_server) / KB;
    let resident = |memory: &Memory| memory.together as f64 / MB;
    let mark = |what, unit, limit, value| Mark { what, unit, limit, value };
    let (most, least) = (Limit::AtMost, Limit::AtLeast);
    vec![
        mark("processor time of a byte", "x double", most(1.6), ratio("bulk-1", "proxies_cpu_s_per_gb")),
        mark("round trip", "x double", most(1.25), ratio("ping", "p50_us")),
        mark("connections, one by one", "x double", least(0.9), ratio("connect-1", "per_second")),
        mark("connections, 32 at once", "x double", least(0.9), ratio("connect-32", "per_second")),
        mark("memory of an idle connection", "KB", most(6.0), memory(&idle)),
        mark("agent and proxy, resident", "MB", most(14.0), memory(&resident)),
    ]
}

impl Mark {
    /// Whether it is missed by more than a check lets pass. What was not measured is missed.
    pub(crate) fn is_missed(&self) -> bool {
        !self.value.is_some_and(|value| self.limit.holds(value, SLACK))
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, limit) = match self.limit {
            Limit::AtMost(limit) => ("at most", limit),
            Limit::AtLeast(limit) => ("at least", limit),
        };
        write!(f, "{:30} {word:8} {limit:5.2} {:8}  ", self.what, self.unit)?;
        match self.value {
            None => write!(f, "not measured"),
            Some(value) if self.limit.holds(value, 0.0) => write!(f, "{value:6.2}  reached"),
            Some(value) if self.limit.holds(value, SLACK) => write!(f, "{value:6.2}  missed, within the slack"),
            Some(value) => write!(f, "{value:6.2}  MISSED"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(limit: Limit, value: Option<f64>) -> Mark {
        Mark { what: "x", unit: "y", limit, value }
    }

    #[test]
    fn a_mark_is_missed_beyond_the_slack_and_when_nothing_was_measured() {
        assert!(!of(Limit::AtMost(2.0), Some(2.2)).is_missed());
        assert!(of(Limit::AtMost(2.0), Some(2.4)).is_missed());
        assert!(!of(Limit::AtLeast(2.0), Some(1.8)).is_missed());
        assert!(of(Limit::AtLeast(2.0), Some(1.6)).is_missed());
        assert!(of(Limit::AtLeast(2.0), None).is_missed());
        assert!(marks(&Results::default()).iter().all(Mark::is_missed));
    }

    #[test]
    fn a_line_says_how_it_stands() {
        let line = |value| of(Limit::AtMost(2.0), Some(value)).to_string();
        assert!(line(1.9).ends_with("reached"));
        assert!(line(2.1).ends_with("within the slack"));
        assert!(line(9.0).ends_with("MISSED"));
    }
}
