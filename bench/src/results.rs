//! What came out: rounds as they were, rows that sum them up, and the table of rows.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;

use serde::{Deserialize, Serialize};

use crate::contender::Kind;
use crate::memory::Memory;
use crate::plan::{Layout, Measure, Numbers};

/// All of one run, as it is written to a file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Results {
    pub(crate) machine: Machine,
    /// Rounds that count, in their order.
    pub(crate) rounds: Vec<Round>,
    /// Rounds in which other programs used too much.
    pub(crate) discarded: Vec<Round>,
    /// Measures that were given up because something failed, and why.
    #[serde(default)]
    pub(crate) failed: Vec<String>,
    pub(crate) memory: Option<Memory>,
}

/// What it ran on: a class of machine, not which one.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) processor: String,
    pub(crate) processors: usize,
    pub(crate) kernel: String,
}

impl Machine {
    /// This one.
    pub(crate) fn here() -> Machine {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let models = read("/proc/cpuinfo");
        let model = models.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        Machine {
            processor: model.map_or("unknown", |(_, name)| name.trim()).to_owned(),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: read("/proc/sys/kernel/osrelease").trim().split('-').next().unwrap_or_default().to_owned(),
        }
    }
}

/// One slice of each contender, one right after the other.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Round {
    pub(crate) layout: String,
    pub(crate) measure: String,
    /// What others used meanwhile, in processors.
    pub(crate) foreign: f64,
    /// What the hypervisor gave to others, in processors.
    pub(crate) stolen: f64,
    /// By contender.
    pub(crate) numbers: BTreeMap<String, Numbers>,
}

impl Round {
    pub(crate) fn new(layout: Layout, measure: Measure) -> Round {
        Round { layout: layout.name().to_owned(), measure: measure.name.to_owned(), ..Round::default() }
    }
}

/// The middle and the ends of some numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Spread {
    /// `None` of nothing.
    pub(crate) fn of(numbers: impl IntoIterator<Item = f64>) -> Option<Spread> {
        let mut all: Vec<f64> = numbers.into_iter().collect();
        all.sort_by(f64::total_cmp);
        let (least, most) = (*all.first()?, *all.last()?);
        let (below, above) = (all.get((all.len() - 1) / 2)?, all.get(all.len() / 2)?);
        Some(Spread { median: (below + above) / 2.0, least, most })
    }
}

/// One number of one measure, over all rounds.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Row {
    pub(crate) layout: String,
    pub(crate) measure: String,
    pub(crate) number: String,
    /// By contender.
    pub(crate) values: BTreeMap<String, Spread>,
    /// The product's by the double proxy's, taken within each round.
    pub(crate) ratio: Option<Spread>,
}

impl Results {
    /// The rows, in the order in which they were measured.
    pub(crate) fn rows(&self) -> Vec<Row> {
        let mut keys: Vec<(&str, &str, &str)> = Vec::new();
        for round in &self.rounds {
            for name in round.numbers.values().flat_map(BTreeMap::keys) {
                let key = (round.layout.as_str(), round.measure.as_str(), name.as_str());
                if !keys.contains(&key) {
                    keys.push(key);
                }
            }
        }
        keys.into_iter().map(|(layout, measure, number)| self.row(layout, measure, number)).collect()
    }

    /// One of them; empty if it was not measured.
    pub(crate) fn row(&self, layout: &str, measure: &str, number: &str) -> Row {
        let rounds = || self.rounds.iter().filter(|round| round.layout == layout && round.measure == measure);
        let of = |round: &Round, kind: Kind| round.numbers.get(kind.name())?.get(number).copied();
        let spread = |kind: Kind| Some((kind.name().to_owned(), Spread::of(rounds().filter_map(|it| of(it, kind)))?));
        let ratio = |round: &Round| {
            let ratio = of(round, Kind::Justmtls)? / of(round, Kind::Double)?;
            ratio.is_finite().then_some(ratio)
        };
        Row {
            layout: layout.to_owned(),
            measure: measure.to_owned(),
            number: number.to_owned(),
            values: Kind::ALL.into_iter().filter_map(spread).collect(),
            ratio: Spread::of(rounds().filter_map(ratio)),
        }
    }

    /// The table, for people.
    pub(crate) fn table(&self) -> String {
        let mut text = format!(
            "{} x {}, Linux {}\n\n{:9} {:17} {:22}",
            self.machine.processors, self.machine.processor, self.machine.kernel, "layout", "measure", "number"
        );
        for kind in Kind::ALL {
            let _ = write!(text, " {:>10}", kind.name());
        }
        text.push_str("   justmtls / double (least .. most)\n");
        for row in self.rows() {
            let _ = write!(text, "{:9} {:17} {:22}", row.layout, row.measure, row.number);
            for kind in Kind::ALL {
                let value = row.values.get(kind.name()).map(|spread| short(spread.median));
                let _ = write!(text, " {:>10}", value.unwrap_or_default());
            }
            if let Some(ratio) = row.ratio {
                let _ = write!(text, "   {:.2} ({:.2} .. {:.2})", ratio.median, ratio.least, ratio.most);
            }
            text.push('\n');
        }
        if let Some(memory) = &self.memory {
            text.push_str(&memory.table());
        }
        let (all, most) = (self.rounds.len() + self.discarded.len(), |round: &Round| round.foreign);
        let foreign = Spread::of(self.rounds.iter().map(most)).map_or(0.0, |spread| spread.median);
        let stolen = Spread::of(self.rounds.iter().map(|round| round.stolen)).map_or(0.0, |spread| spread.median);
        let _ = writeln!(
            text,
            "\n{} of {all} rounds were discarded because other programs used too much; \
             in the others they used {foreign:.2} processors, and the hypervisor {stolen:.2} (median)",
            self.discarded.len()
        );
        for failure in &self.failed {
            let _ = writeln!(text, "FAILED {failure}");
        }
        text
    }
}

/// A number with about three digits that say something.
pub(crate) fn short(number: f64) -> String {
    match number.abs() {
        size if size >= 100.0 => format!("{number:.0}"),
        size if size >= 10.0 => format!("{number:.1}"),
        _ => format!("{number:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(double: f64, justmtls: f64) -> Round {
        let one = |value: f64| BTreeMap::from([("x".to_owned(), value)]);
        let numbers = BTreeMap::from([("double".to_owned(), one(double)), ("justmtls".to_owned(), one(justmtls))]);
        Round { layout: "one-cpu".into(), measure: "ping".into(), numbers, ..Round::default() }
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        // Both are slower in the second one: the ratio of the medians would say 1.5, and no round says so.
        let rounds = vec![round(1.0, 2.0), round(10.0, 20.0), round(3.0, 6.0)];
        let results = Results { rounds, ..Results::default() };
        let row = results.row("one-cpu", "ping", "x");
        assert_eq!(row.ratio, Some(Spread { median: 2.0, least: 2.0, most: 2.0 }));
        assert_eq!(row.values["double"], Spread { median: 3.0, least: 1.0, most: 10.0 });
        assert_eq!(results.rows(), [row]);
    }

    #[test]
    fn what_was_not_measured_has_no_number() {
        let row = Results::default().row("one-cpu", "ping", "x");
        assert!(row.ratio.is_none() && row.values.is_empty());
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of([4.0, 2.0]).map(|spread| spread.median), Some(3.0));
    }

    #[test]
    fn a_file_holds_all_of_a_run() {
        let results = Results { rounds: vec![round(1.0, 2.0)], ..Results::default() };
        let text = serde_json::to_string(&results).unwrap();
        assert_eq!(serde_json::from_str::<Results>(&text).unwrap(), results);
        assert!(results.table().contains("justmtls"), "{}", results.table());
    }
}
