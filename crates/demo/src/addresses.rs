//! Handing out addresses, in turn: one that was given back is not given out again while others are free,
//! so that a late packet to a pod that is gone does not reach the next one.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use crate::network::{Addresses, NodePlan};

/// A range of pairs, numbered; the two addresses of a pair have the same number.
#[derive(Debug)]
pub(crate) struct Range {
    v4: u32,
    v6: u128,
    first: u32,
    last: u32,
    next: u32,
    taken: BTreeSet<u32>,
}

impl Range {
    /// A node's pods. `.0` and `.1` are the network and the gateway, `.255` is nobody's.
    pub(crate) fn of_pods(node: &NodePlan) -> Range {
        Range::new(node.pods_v4.network(), node.pods_v6.network(), 2, 254)
    }

    /// Service addresses: 10.96.0.0/16 and fd96::/108.
    pub(crate) fn of_services() -> Range {
        let v6 = Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 0);
        // Up to 10.96.0.9 left for those who want a certain one.
        Range::new(Ipv4Addr::new(10, 96, 0, 0), v6, 10, 0xfffe)
    }

    fn new(v4: Ipv4Addr, v6: Ipv6Addr, first: u32, last: u32) -> Range {
        Range { v4: v4.to_bits(), v6: v6.to_bits(), first, last, next: first, taken: BTreeSet::new() }
    }

    /// The next free pair, or `None` when all are taken.
    pub(crate) fn take(&mut self) -> Option<Addresses> {
        let count = self.last - self.first + 1;
        let number = (0..count)
            .map(|step| self.first + (self.next - self.first + step) % count)
            .find(|number| !self.taken.contains(number))?;
        self.next = if number == self.last { self.first } else { number + 1 };
        self.taken.insert(number);
        Some(self.pair(number))
    }

    /// A certain pair, by its IPv4 address. `None` when it is taken or not of this range.
    pub(crate) fn take_this(&mut self, v4: Ipv4Addr) -> Option<Addresses> {
        let number = v4.to_bits().checked_sub(self.v4).filter(|n| (1..=self.last).contains(n))?;
        self.taken.insert(number).then(|| self.pair(number))
    }

    /// Gives a pair back.
    pub(crate) fn give_back(&mut self, pair: Addresses) {
        self.taken.remove(&pair.v4.to_bits().wrapping_sub(self.v4));
    }

    fn pair(&self, number: u32) -> Addresses {
        Addresses { v4: Ipv4Addr::from_bits(self.v4 + number), v6: Ipv6Addr::from_bits(self.v6 + u128::from(number)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::node_plan;

    #[test]
    fn an_address_that_was_given_back_waits_for_its_turn() {
        let mut range = Range::of_pods(&node_plan(0));
        let first = range.take().unwrap();
        assert_eq!(first.both().map(|ip| ip.to_string()), ["10.88.16.2", "fd88:16::2"]);
        range.give_back(first);
        assert_ne!(range.take(), Some(first));
    }

    #[test]
    fn a_full_range_gives_none_and_no_address_twice() {
        let mut range = Range::of_pods(&node_plan(0));
        let mut all: Vec<_> = std::iter::from_fn(|| range.take()).collect();
        assert_eq!(all.len(), 253);
        all.dedup();
        assert_eq!(all.len(), 253);
        range.give_back(all[7]);
        assert_eq!(range.take(), Some(all[7]));
    }

    #[test]
    fn a_certain_address_can_be_had_once_and_only_from_the_range() {
        let mut range = Range::of_services();
        assert!(range.take_this(Ipv4Addr::new(10, 96, 0, 1)).is_some());
        assert_eq!(range.take_this(Ipv4Addr::new(10, 96, 0, 1)), None);
        assert_eq!(range.take_this(Ipv4Addr::new(10, 88, 0, 1)), None);
        assert_eq!(range.take_this(Ipv4Addr::new(10, 97, 0, 1)), None);
    }
}
