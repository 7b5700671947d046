//! Whether strangers crowd each other out now: what a person should know while a flood goes on.
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

/// The strangers that were ended because there were so many.
#[derive(Debug, Default)]
pub(crate) struct Crowd(Mutex<VecDeque<Part>>);

#[derive(Debug)]
struct Part {
    began: Instant,
    all: u64,
    by_address: HashMap<IpAddr, u64>,
}

impl Crowd {
    /// One was ended because there were so many.
    pub(crate) fn ended(&self, address: IpAddr, now: Instant) {
        let mut parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if parts.back().is_none_or(|part| now.saturating_duration_since(part.began) >= PART) {
            parts.retain(|part| is_recent(part, now));
            parts.push_back(Part { began: now, all: 0, by_address: HashMap::new() });
        }
        let Some(part) = parts.back_mut() else { return };
        part.all += 1;
        let address = address.to_canonical();
        if part.by_address.len() < MOST_ADDRESSES || part.by_address.contains_key(&address) {
            *part.by_address.entry(address).or_default() += 1;
        }
    }

    /// What there is to say about the last minute. Its number is round, so that it is not another problem at each look.
    pub(crate) fn problem(&self, now: Instant) -> Option<Problem> {
        let parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let recent = || parts.iter().filter(|part| is_recent(part, now));
        let all: u64 = recent().map(|part| part.all).sum();
        let mut by_address: HashMap<IpAddr, u64> = HashMap::new();
        for (address, count) in recent().flat_map(|part| &part.by_address) {
            *by_address.entry(*address).or_default() += count;
        }
        let (most, _) = by_address.into_iter().max_by_key(|(address, count)| (*count, *address))?;
        (all > FEW).then(|| {
            let message = format!(
                "connections of strangers are being ended, more than {} in the last minute, most from {most}: find out what \
                 runs there, and keep it from this port by a NetworkPolicy",
                10_u64.pow((all - 1).ilog10())
            );
            Problem::warning("the control plane", message)
        })
    }
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

    #[test]
    fn a_flood_is_a_problem_for_as_long_as_it_goes_on() {
        let (crowd, start) = (Crowd::default(), Instant::now());
        (0..FEW).for_each(|_| crowd.ended(address(1), start));
        assert_eq!(crowd.problem(start), None, "nodes that come at once");
        (0..1000).for_each(|_| crowd.ended(address(2), start + PART));
        let problem = crowd.problem(start + PART).unwrap().to_string();
        assert!(problem.contains("more than 1000 in the last minute, most from 10.0.0.2:"), "{problem}");
        assert_eq!(crowd.problem(start + MINUTE).unwrap().to_string().replace("100 in", "1000 in"), problem);
        assert_eq!(crowd.problem(start + MINUTE + PART), None);
    }

    #[test]
    fn a_flood_from_everywhere_is_counted_without_its_addresses() {
        let (crowd, start) = (Crowd::default(), Instant::now());
        (0..100_000).for_each(|number| crowd.ended(address(number), start + PART * (number / 10_000)));
        let parts = crowd.0.lock().unwrap();
        assert!(parts.iter().all(|part| part.by_address.len() == MOST_ADDRESSES));
        assert_eq!(parts.iter().map(|part| part.all).sum::<u64>(), 100_000);
    }
}
