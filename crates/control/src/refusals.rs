//! Refusals in the log. Anybody who reaches the port can cause them, so each reason has a line a second at most, and that line says
//! how many had none.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// The time from one line to the next of the same reason, at least.
const PAUSE: Duration = Duration::from_secs(1);

/// When what was said last, and how often not since.
#[derive(Debug, Default)]
pub(crate) struct Refusals(Mutex<HashMap<&'static str, (Instant, u64)>>);

impl Refusals {
    /// One more for this reason, of which there are few. Where it is to be said: how many before it were not.
    pub(crate) fn one_more(&self, reason: &'static str) -> Option<u64> {
        let now = Instant::now();
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match all.get_mut(reason) {
            Some((last, unsaid)) if now < *last + PAUSE => {
                *unsaid += 1;
                None
            }
            _ => Some(all.insert(reason, (now, 0)).map_or(0, |(_, unsaid)| unsaid)),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_reason_has_a_line_a_second_that_says_how_many_had_none() {
        let refusals = Refusals::default();
        assert_eq!([refusals.one_more("a"), refusals.one_more("a"), refusals.one_more("a")], [Some(0), None, None]);
        assert_eq!(refusals.one_more("b"), Some(0), "another reason");
        advance(PAUSE - Duration::from_millis(1)).await;
        assert_eq!(refusals.one_more("a"), None);
        advance(Duration::from_millis(1)).await;
        assert_eq!(refusals.one_more("a"), Some(3));
        advance(PAUSE).await;
        assert_eq!(refusals.one_more("a"), Some(0));
    }
}
