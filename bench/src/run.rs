//! The run: rounds of short slices, each contender once a round, forwards and backwards in turn.
//!
//! What disturbs the machine for seconds disturbs all slices of a round alike, so ratios are taken within a round and
//! never between two. A round in which other programs took too much is done again, and counted.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cluster::Cluster;
use crate::contender::{Contender, Kind, manifest};
use crate::load::Work;
use crate::plan::{COLD, Layout, MEASURES, Measure, Numbers, Used, WARM_PORT, numbers};
use crate::processor::{self, pin, time, time_of_all};
use crate::results::{Results, Round};

/// How it is to be run.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// Rounds of each measure.
    pub(crate) rounds: usize,
    /// The length of a slice.
    pub(crate) slice: Duration,
    /// The most that others may use in a round, in processors.
    pub(crate) foreign: f64,
    /// Only measures whose name contains this.
    pub(crate) only: String,
    /// The layouts.
    pub(crate) layouts: Vec<Layout>,
}

/// Rounds that may be done again, for each one that counts.
const AGAIN: usize = 3;

/// The first of the ports that are used once. The last is below the kernel's own choice of ports.
const COLD_PORT: u16 = 8000;
const COLD_PORTS: u16 = 4000;

/// Measures everything but memory.
pub(crate) fn run(cluster: &Cluster, processors: [usize; 2], settings: &Settings, results: &mut Results) -> Result<()> {
    let ports = (WARM_PORT, COLD_PORT - WARM_PORT + COLD_PORTS);
    let start = |kind: &Kind| Contender::start(*kind, cluster, ports);
    let mut contenders = Kind::ALL.iter().map(start).collect::<Result<Vec<_>>>()?;
    let mut bench = Bench { settings, others: others(cluster), next_cold: COLD_PORT };
    for layout in &settings.layouts {
        place(*layout, processors, cluster, &contenders)?;
        for measure in MEASURES.iter().filter(|measure| measure.name.contains(&settings.only)) {
            eprintln!("{} {}", layout.name(), measure.name);
            if let Err(error) = bench.measure(*layout, *measure, &mut contenders, results) {
                // The others may still be worth knowing.
                eprintln!("  failed: {error:#}");
                results.failed.push(format!("{} {}: {error:#}", layout.name(), measure.name));
            }
        }
    }
    Ok(())
}

/// The objects of the box in which it runs.
pub(crate) fn objects() -> String {
    manifest(&Kind::ALL)
}

fn place(layout: Layout, [first, second]: [usize; 2], cluster: &Cluster, contenders: &[Contender]) -> Result<()> {
    let programs = match layout {
        Layout::One => second,
        Layout::Two => first,
    };
    for contender in contenders {
        for pid in contender.proxies() {
            pin(pid, second)?;
        }
        for pid in [contender.client.pid, contender.server.pid] {
            pin(pid, programs)?;
        }
    }
    pin(cluster.init(), second)
}

/// What is ours and no contender's: this program, what plays the cluster, and the kernel's work for packets.
fn others(cluster: &Cluster) -> Vec<u32> {
    let mut all = processor::packet_threads();
    all.extend([std::process::id(), cluster.init()]);
    all
}

struct Bench<'a> {
    settings: &'a Settings,
    others: Vec<u32>,
    next_cold: u16,
}

impl Bench<'_> {
    fn measure(
        &mut self,
        layout: Layout,
        measure: Measure,
        contenders: &mut [Contender],
        results: &mut Results,
    ) -> Result<()> {
        let (mut done, mut tries) = (0, 0);
        while done < self.settings.rounds && tries < self.settings.rounds * (1 + AGAIN) {
            tries += 1;
            // A B C, C B A, and so on: what only grows or shrinks with time weighs equally on each.
            let mut order: Vec<usize> = (0..contenders.len()).collect();
            if tries % 2 == 0 {
                order.reverse();
            }
            let round = self.round(layout, measure, contenders, &order)?;
            if round.foreign <= self.settings.foreign {
                done += 1;
                results.rounds.push(round);
            } else {
                eprintln!("  again: others used {:.2} processors meanwhile", round.foreign);
                results.discarded.push(round);
            }
        }
        Ok(())
    }

    fn round(
        &mut self,
        layout: Layout,
        measure: Measure,
        contenders: &mut [Contender],
        order: &[usize],
    ) -> Result<Round> {
        let port = match measure.work {
            Work::ConnectCold { .. } => self.cold_port()?,
            _ => WARM_PORT,
        };
        let mut ours: Vec<u32> = contenders.iter().flat_map(Contender::all).chain(self.others.clone()).collect();
        ours.sort_unstable();
        ours.dedup();
        let (start, machine, own) = (std::time::Instant::now(), processor::machine()?, time_of_all(&ours));
        let mut round = Round::new(layout, measure);
        for number in order {
            let contender = &mut contenders[*number];
            let name = contender.kind.name();
            let numbers = self.slice(measure, contender, port).with_context(|| name.to_owned())?;
            round.numbers.insert(name.to_owned(), numbers);
        }
        let (wall, after) = (start.elapsed().as_secs_f64(), processor::machine()?);
        let foreign = (after.busy - machine.busy).saturating_sub(time_of_all(&ours) - own);
        round.foreign = foreign.as_secs_f64() / wall;
        round.stolen = (after.stolen - machine.stolen).as_secs_f64() / wall;
        Ok(round)
    }

    fn slice(&self, measure: Measure, contender: &mut Contender, port: u16) -> Result<Numbers> {
        let (to, proxies) = (contender.to, contender.proxies());
        contender.client.prepare(measure.work, to, port, self.settings.slice)?;
        let programs = [contender.client.pid, contender.server.pid];
        let ends = || programs.map(time).iter().sum::<Duration>();
        let before = (time_of_all(&proxies), ends(), processor::machine()?);
        let answer = contender.client.go()?;
        let after = (time_of_all(&proxies), ends(), processor::machine()?);
        let between = (after.0 - before.0).as_secs_f64();
        let used = Used {
            proxies: between,
            path: between + (after.1 - before.1).as_secs_f64(),
            machine: (after.2.busy - before.2.busy).as_secs_f64(),
        };
        Ok(numbers(measure, &answer, used))
    }

    fn cold_port(&mut self) -> Result<u16> {
        let port = self.next_cold;
        if port + COLD > COLD_PORT + COLD_PORTS {
            bail!("all ports for cold connections are used up: ask for fewer rounds");
        }
        self.next_cold += COLD;
        Ok(port)
    }
}
