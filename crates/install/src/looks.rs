//! What is waited for is looked at again and again, and a look may fail: while the API server is made anew, as its own roll-outs
//! do, nobody answers for some seconds.

use std::time::{Duration, Instant};

use crate::cluster::is_refusal;

/// For how long the API server may fail while something is waited for: it is made anew, or changes its place, within that.
const FAILING: Duration = Duration::from_secs(30);

/// Looks of a wait, of which some may fail.
#[derive(Default)]
pub(crate) struct Looks {
    /// Since when each failed.
    failing: Option<Instant>,
}

impl Looks {
    /// What a look gave; nothing where it failed and the next one may do better.
    ///
    /// # Errors
    /// Each has failed for long enough, or the API server refuses it for want of a permission.
    pub(crate) fn heard<T>(&mut self, look: anyhow::Result<T>) -> anyhow::Result<Option<T>> {
        self.heard_at(look, Instant::now())
    }

    fn heard_at<T>(&mut self, look: anyhow::Result<T>, now: Instant) -> anyhow::Result<Option<T>> {
        let error = match look {
            Ok(found) => {
                self.failing = None;
                return Ok(Some(found));
            }
            Err(error) => error,
        };
        let since = self.failing.unwrap_or(now);
        if is_refusal(&format!("{error:#}")) || now >= since + FAILING {
            return Err(error);
        }
        if self.failing.replace(since).is_none() {
            anstream::eprintln!("{error:#}; it is asked again for {} s", FAILING.as_secs());
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn a_wait_outlives_looks_that_fail_and_ends_when_each_has_for_half_a_minute() {
        let (mut looks, begun) = (Looks::default(), Instant::now());
        let mut fails = |after: u64| looks.heard_at(Err::<(), _>(anyhow!("500")), begun + Duration::from_secs(after));
        assert!([0, 1, 29].into_iter().all(|after| matches!(fails(after), Ok(None))));
        assert!(fails(30).is_err());
        assert!(matches!(looks.heard_at(Ok(7), begun + Duration::from_secs(40)), Ok(Some(7))));
        let fails = looks.heard_at(Err::<(), _>(anyhow!("500")), begun + Duration::from_secs(41));
        assert!(matches!(fails, Ok(None)), "one that is answered begins it anew");
        let refused = anyhow!("listing x: {}", crate::cluster::of_status(403, "forbidden"));
        assert!(looks.heard_at(Err::<(), _>(refused), begun + Duration::from_secs(42)).is_err());
    }
}
