//! Whether connections crowd each other out now: what a person should know while a flood goes on.
//!
//! An address is named only of those that were ended, as theirs had most: who is refused for what others hold is no culprit.
//!
//! Minutes are counted in parts, and addresses up to a bound: a flood decides how much there is to count.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::problem::Problem;

/// How far back is looked.
const MINUTE: Duration = Duration::from_secs(60);
/// What is counted together.
const PART: Duration = Duration::from_secs(5);
/// Addresses that each part counts by themselves.
const MOST_ADDRESSES: usize = 1024;
/// As many in a minute are no flood: so many nodes of a large cluster may come at once after an outage.
const FEW: u64 = 100;

/// What went because there was so much.
#[derive(Debug, Default)]
pub(crate) struct Crowd(Mutex<VecDeque<Part>>);

#[derive(Debug)]
struct Part {
    began: Instant,
    ended: u64,
    ended_by_address: HashMap<IpAddr, u64>,
    newcomers_refused: u64,
    nodes_refused: u64,
}

impl Crowd {
    /// A stranger was ended, because its address had most.
    pub(crate) fn ended(&self, address: IpAddr, now: Instant) {
        self.count(now, |part| {
            part.ended += 1;
            let address = address.to_canonical();
            if part.ended_by_address.len() < MOST_ADDRESSES || part.ended_by_address.contains_key(&address) {
                *part.ended_by_address.entry(address).or_default() += 1;
            }
        });
    }

    /// A newcomer was refused, because strangers had all places.
    pub(crate) fn newcomer_refused(&self, now: Instant) {
        self.count(now, |part| part.newcomers_refused += 1);
    }

    /// A node was refused, because nodes had all places.
    pub(crate) fn node_refused(&self, now: Instant) {
        self.count(now, |part| part.nodes_refused += 1);
    }

    fn count(&self, now: Instant, count: impl FnOnce(&mut Part)) {
        let mut parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if parts.back().is_none_or(|part| now.saturating_duration_since(part.began) >= PART) {
            parts.retain(|part| is_recent(part, now));
            let ended_by_address = HashMap::new();
            parts.push_back(Part { began: now, ended: 0, ended_by_address, newcomers_refused: 0, nodes_refused: 0 });
        }
        if let Some(part) = parts.back_mut() {
            count(part);
        }
    }

    /// What there is to say about the last minute. Numbers are round, so that it is not another problem at each look.
    pub(crate) fn problems(&self, now: Instant) -> Vec<Problem> {
        let parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let recent = || parts.iter().filter(|part| is_recent(part, now));
        let mut problems = Vec::new();
        let mut by_address: HashMap<IpAddr, u64> = HashMap::new();
        for (address, count) in recent().flat_map(|part| &part.ended_by_address) {
            *by_address.entry(*address).or_default() += count;
        }
        let most = by_address.into_iter().max_by_key(|(address, count)| (*count, *address));
        if let (Some(more), Some((most, _))) = (round(recent().map(|part| part.ended).sum()), most) {
            problems.push(format!(
                "connections of strangers are being ended, more than {more} in the last minute, most from {most}: find out what \
                 runs there, and keep it from this port by a NetworkPolicy"
            ));
        }
        if let Some(more) = round(recent().map(|part| part.newcomers_refused).sum()) {
            problems.push(format!(
                "connections are being refused, more than {more} in the last minute, nodes' perhaps among them, because strangers \
                 of very many addresses hold all places: let only nodes reach this port, by a NetworkPolicy"
            ));
        }
        if recent().any(|part| part.nodes_refused > 0) {
            problems.push(
                "nodes are being refused, because there are as many connections of nodes as this process may have: raise its \
                 limit of open files, or run more replicas"
                    .to_owned(),
            );
        }
        problems.into_iter().map(|message| Problem::warning("the control plane", message)).collect()
    }
}

/// The power of ten that a number is more than, if it is more than a few.
fn round(all: u64) -> Option<u64> {
    (all > FEW).then(|| 10_u64.pow((all - 1).ilog10()))
}

fn is_recent(part: &Part, now: Instant) -> bool {
    now.saturating_duration_since(part.began) < MINUTE
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(number: u32) -> IpAddr {
        std::net::Ipv4Addr::from(0x0a00_0000 + number).into()
    }

    /// The one thing that there is to say.
    fn said(crowd: &Crowd, now: Instant) -> String {
        let problems = crowd.problems(now);
        assert_eq!(problems.len(), 1, "{problems:?}");
        problems[0].to_string()
    }

    #[test]
    fn a_flood_is_a_problem_for_as_long_as_it_goes_on() {
        let (crowd, start) = (Crowd::default(), Instant::now());
        (0..FEW).for_each(|_| crowd.ended(address(1), start));
        assert_eq!(crowd.problems(start), [], "nodes that come at once");
        (0..1000).for_each(|_| crowd.ended(address(2), start + PART));
        let problem = said(&crowd, start + PART);
        assert!(problem.contains("more than 1000 in the last minute, most from 10.0.0.2:"), "{problem}");
        assert_eq!(said(&crowd, start + MINUTE).replace("100 in", "1000 in"), problem);
        assert_eq!(crowd.problems(start + MINUTE + PART), []);
    }

    #[test]
    fn whoever_is_refused_for_what_others_hold_is_not_named() {
        let (crowd, start) = (Crowd::default(), Instant::now());
        (0..200).for_each(|_| crowd.newcomer_refused(start));
        let problem = said(&crowd, start);
        assert!(problem.contains("refused, more than 100") && !problem.contains("most from"), "{problem}");
        let crowd = Crowd::default();
        crowd.node_refused(start);
        assert!(said(&crowd, start).contains("limit of open files"));
        assert_eq!(crowd.problems(start + MINUTE), []);
    }

    #[test]
    fn a_flood_from_everywhere_is_counted_without_its_addresses() {
        let (crowd, start) = (Crowd::default(), Instant::now());
        (0..100_000).for_each(|number| crowd.ended(address(number), start + PART * (number / 10_000)));
        let parts = crowd.0.lock().unwrap();
        assert!(parts.iter().all(|part| part.ended_by_address.len() == MOST_ADDRESSES));
        assert_eq!(parts.iter().map(|part| part.ended).sum::<u64>(), 100_000);
    }
}
