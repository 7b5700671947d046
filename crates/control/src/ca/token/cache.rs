//! What the API server said of tokens, by their hashes: bounded, and never beyond a token's own end.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::{Caller, Unknown};

/// How long an answer counts without asking again.
const FRESH: Duration = Duration::from_secs(60);
/// How long a refusal counts.
const REFUSED: Duration = Duration::from_secs(10);
/// Answers that are kept: two for each of 5,000 nodes, and as many again while kubelets rotate them.
const MOST: usize = 20_000;
/// Refusals that are kept.
const MOST_REFUSED: usize = 4096;

/// Reviews that one address may cause each second, on and on, and at once: a node has two tokens, and new ones each hour.
const PER_SECOND: f64 = 5.0;
const AT_ONCE: f64 = 20.0;
/// Addresses that are kept count of. More come only where somebody has a whole network of them.
const MOST_SOURCES: usize = 20_000;

/// How often, at most, all of them are looked at.
const CLEAR: Duration = Duration::from_secs(1);

/// A token's hash.
pub(super) type Hash = [u8; 32];

#[derive(Debug)]
struct Known {
    caller: Caller,
    reviewed: Instant,
    /// The token's own end, in seconds since 1970.
    ends: u64,
}

/// What is known without asking.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It counts.
    Fresh(Caller),
    /// It was so, and counts only where nobody can be asked.
    Stale(Caller),
    Refused(Unknown),
    Nothing,
}

/// The answers.
#[derive(Debug, Default)]
pub(super) struct Cache {
    known: HashMap<Hash, Known>,
    refused: HashMap<Hash, (Unknown, Instant)>,
    sources: HashMap<IpAddr, (f64, Instant)>,
    /// When those were last taken out that are quiet: to look at all of them costs, and strangers decide how often.
    cleared: Option<Instant>,
}

impl Cache {
    pub(super) fn get(&self, hash: &Hash, now: Instant, seconds: u64) -> Answer {
        if let Some(known) = self.known.get(hash).filter(|known| known.ends > seconds) {
            let caller = known.caller.clone();
            let fresh = now.saturating_duration_since(known.reviewed) < FRESH;
            return if fresh { Answer::Fresh(caller) } else { Answer::Stale(caller) };
        }
        match self.refused.get(hash) {
            Some((why, since)) if now.saturating_duration_since(*since) < REFUSED => Answer::Refused(why.clone()),
            _ => Answer::Nothing,
        }
    }

    pub(super) fn vouched(&mut self, hash: Hash, caller: Caller, ends: u64, now: Instant, seconds: u64) {
        self.refused.remove(&hash);
        if self.known.len() >= MOST && !self.known.contains_key(&hash) {
            self.known.retain(|_, known| known.ends > seconds);
        }
        if self.known.len() >= MOST && !self.known.contains_key(&hash) {
            let oldest = self.known.iter().min_by_key(|(_, known)| known.reviewed).map(|(hash, _)| *hash);
            oldest.map(|oldest| self.known.remove(&oldest));
        }
        self.known.insert(hash, Known { caller, reviewed: now, ends });
    }

    /// Whatever was known before: it does not hold any more.
    pub(super) fn refused(&mut self, hash: Hash, why: Unknown, now: Instant) {
        self.known.remove(&hash);
        // Each came of a review, of which a source has few: to look at all of them costs less.
        if self.refused.len() >= MOST_REFUSED {
            self.refused.retain(|_, (_, since)| now.saturating_duration_since(*since) < REFUSED);
        }
        // With more than that, each costs what it costs.
        if self.refused.len() < MOST_REFUSED {
            self.refused.insert(hash, (why, now));
        }
    }

    /// Whether an address may cause one more review.
    pub(super) fn admit(&mut self, from: IpAddr, now: Instant) -> bool {
        let refill = |(left, since): (f64, Instant)| {
            (left + now.saturating_duration_since(since).as_secs_f64() * PER_SECOND).min(AT_ONCE)
        };
        let full = self.sources.len() >= MOST_SOURCES && !self.sources.contains_key(&from);
        if full && self.cleared.is_none_or(|cleared| now.saturating_duration_since(cleared) >= CLEAR) {
            self.cleared = Some(now);
            self.sources.retain(|_, bucket| refill(*bucket) < AT_ONCE);
        }
        if self.sources.len() >= MOST_SOURCES && !self.sources.contains_key(&from) {
            return false;
        }
        let left = self.sources.get(&from).map_or(AT_ONCE, |bucket| refill(*bucket));
        let admitted = left >= 1.0;
        self.sources.insert(from, (if admitted { left - 1.0 } else { left }, now));
        admitted
    }
}

#[cfg(test)]
mod tests {
    use super::super::Role;
    use super::*;

    fn caller(node: &str) -> Caller {
        Caller { role: Role::Proxy, node: node.to_owned() }
    }

    #[test]
    fn an_answer_counts_for_a_minute_and_is_remembered_until_the_tokens_end() {
        let mut cache = Cache::default();
        let now = Instant::now();
        cache.vouched([1; 32], caller("a"), 1000, now, 100);
        assert_eq!(cache.get(&[1; 32], now, 100), Answer::Fresh(caller("a")));
        assert_eq!(cache.get(&[1; 32], now + FRESH, 100), Answer::Stale(caller("a")));
        assert_eq!(cache.get(&[1; 32], now, 1000), Answer::Nothing);
        cache.refused([1; 32], Unknown::NotVouchedFor, now);
        assert_eq!(cache.get(&[1; 32], now, 100), Answer::Refused(Unknown::NotVouchedFor));
        assert_eq!(cache.get(&[1; 32], now + REFUSED, 100), Answer::Nothing);
    }

    #[test]
    fn whatever_strangers_send_the_cache_is_bounded_and_forgets_the_oldest_first() {
        let mut cache = Cache::default();
        let now = Instant::now();
        let hash = |number: usize| {
            let mut hash = [0; 32];
            hash[..8].copy_from_slice(&number.to_be_bytes());
            hash
        };
        for number in 0..=MOST {
            cache.vouched(hash(number), caller("a"), 1000, now + Duration::from_nanos(number as u64), 100);
            cache.refused(hash(number + 1_000_000), Unknown::NotVouchedFor, now);
        }
        assert_eq!((cache.known.len(), cache.refused.len()), (MOST, MOST_REFUSED));
        assert_eq!(cache.get(&hash(0), now, 100), Answer::Nothing);
        assert_eq!(cache.get(&hash(1), now, 100), Answer::Fresh(caller("a")));
    }

    #[test]
    fn an_address_that_causes_too_many_reviews_is_refused_and_another_one_is_not() {
        let mut cache = Cache::default();
        let now = Instant::now();
        let [one, two] = [1, 2].map(|last| IpAddr::from([10, 0, 0, last]));
        let admitted = (0..1000).filter(|_| cache.admit(one, now)).count();
        assert_eq!(admitted, AT_ONCE as usize);
        assert!(cache.admit(two, now));
        assert!(cache.admit(one, now + Duration::from_secs(1)));
        for number in 0..u32::try_from(MOST_SOURCES + 1000).unwrap() {
            cache.admit(IpAddr::from(number.to_be_bytes()), now);
        }
        assert!(cache.sources.len() <= MOST_SOURCES);
        let later = now + Duration::from_secs(60);
        assert!(cache.admit(IpAddr::from([192, 0, 2, 1]), later), "those that are quiet make room");
    }
}
