//! How often a node may ask.

use std::collections::HashMap;
use std::time::Instant;

/// Certificates that a node may ask for each second, on and on. A node has some dozens of service accounts, each asked for
/// at its start and then twice a day.
pub(super) const PER_SECOND: u32 = 20;
/// Certificates that a node may ask for at once: it has just started, with pods of many service accounts.
const AT_ONCE: u32 = 500;

/// For each node, what it may still ask for. Nodes are those that have tokens, which bounds their number.
#[derive(Default, Debug)]
pub(super) struct Rates(HashMap<String, Bucket>);

#[derive(Debug)]
struct Bucket {
    left: f64,
    filled: Instant,
}

impl Rates {
    /// Whether a node may ask once more.
    pub(super) fn admit(&mut self, node: &str, now: Instant) -> bool {
        let bucket = self.0.entry(node.to_owned()).or_insert(Bucket { left: f64::from(AT_ONCE), filled: now });
        let since = now.saturating_duration_since(bucket.filled).as_secs_f64();
        bucket.left = (bucket.left + since * f64::from(PER_SECOND)).min(f64::from(AT_ONCE));
        bucket.filled = now;
        if bucket.left < 1.0 {
            return false;
        }
        bucket.left -= 1.0;
        true
    }
}
