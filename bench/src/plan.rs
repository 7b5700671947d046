//! What is measured: layouts, kinds of work, and the numbers that come out of each.

use std::collections::BTreeMap;

use crate::load::{Answer, Work};

/// Numbers by name.
pub(crate) type Numbers = BTreeMap<String, f64>;

/// The port of the server that is used again and again.
pub(crate) const WARM_PORT: u16 = 7000;
/// How many new ports one slice of cold connections takes.
pub(crate) const COLD: u16 = 20;

/// Which processor does what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Everything on one: what it costs. Nothing waits for another processor to wake up.
    One,
    /// Client and server on one, all proxies on the other: how fast it is.
    Two,
}

impl Layout {
    pub(crate) const ALL: [Layout; 2] = [Layout::One, Layout::Two];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Layout::One => "one-cpu",
            Layout::Two => "two-cpus",
        }
    }
}

/// A kind of work by its name, and what it yields.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Measure {
    pub(crate) name: &'static str,
    pub(crate) work: Work,
}

/// All of them.
pub(crate) const MEASURES: [Measure; 7] = [
    Measure { name: "bulk-1", work: Work::Bulk { streams: 1 } },
    Measure { name: "bulk-8", work: Work::Bulk { streams: 8 } },
    Measure { name: "ping", work: Work::Ping { size: 100, beside: 0 } },
    Measure { name: "ping-beside-bulk", work: Work::Ping { size: 100, beside: 1 } },
    Measure { name: "connect-1", work: Work::Connect { at_once: 1 } },
    Measure { name: "connect-32", work: Work::Connect { at_once: 32 } },
    Measure { name: "connect-cold", work: Work::ConnectCold { ports: COLD } },
];

/// Processor time of one slice, in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Used {
    /// Of what runs between client and server.
    pub(crate) proxies: f64,
    /// Of these and of client and server.
    pub(crate) path: f64,
    /// Of the whole machine.
    pub(crate) machine: f64,
}

/// The numbers of one slice, by name. The name says the unit.
pub(crate) fn numbers(measure: Measure, answer: &Answer, used: Used) -> Numbers {
    let gigabytes = answer.bytes as f64 / 1e9;
    let each = |seconds: f64| seconds * 1e6 / answer.count as f64;
    let times = [("p50_us", answer.p50_us), ("p99_us", answer.p99_us)];
    let all: Vec<(&str, f64)> = match measure.work {
        Work::Bulk { .. } => vec![
            ("gbit_per_s", gigabytes * 8.0 / answer.seconds),
            ("proxies_cpu_s_per_gb", used.proxies / gigabytes),
            ("path_cpu_s_per_gb", used.path / gigabytes),
            ("machine_cpu_s_per_gb", used.machine / gigabytes),
        ],
        Work::Ping { beside: 0, .. } => [&times[..], &[("proxies_cpu_us_each", each(used.proxies))]].concat(),
        Work::Ping { .. } => [&times[..], &[("gbit_per_s", gigabytes * 8.0 / answer.seconds)]].concat(),
        Work::Connect { .. } | Work::ConnectCold { .. } => [
            &[("per_second", answer.count as f64 / answer.seconds)],
            &times[..],
            &[("proxies_cpu_us_each", each(used.proxies))],
        ]
        .concat(),
        Work::Hold { .. } => Vec::new(),
    };
    all.into_iter().map(|(name, number)| (name.to_owned(), number)).collect()
}
