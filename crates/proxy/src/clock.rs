//! Wall and monotonic time, through one seam (D11).
//!
//! Whoever asks "is it valid?" asks this clock, so that a test can stand at any moment without touching the machine's.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use identity::UnixTime;
use tokio::time::Instant;

/// The clock of the process. A clone tells the same time.
#[derive(Clone, Default, Debug)]
pub(crate) struct Clock {
    /// Seconds that wall time is shifted by: 0 but in tests.
    shift: Arc<AtomicI64>,
}

impl Clock {
    /// Wall time, which certificates are judged by.
    pub(crate) fn wall(&self) -> UnixTime {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let shifted = now.as_secs().saturating_add_signed(self.shift.load(Ordering::Relaxed));
        UnixTime::since_unix_epoch(Duration::from_secs(shifted))
    }

    /// Monotonic time, which durations are measured by.
    pub(crate) fn monotonic(&self) -> Instant {
        Instant::now()
    }

    /// Moves wall time, as seen from here, by so many seconds.
    #[cfg(test)]
    pub(crate) fn shift(&self, seconds: i64) {
        self.shift.fetch_add(seconds, Ordering::Relaxed);
    }
}

impl rustls::time_provider::TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(self.wall())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shift_moves_wall_time_for_every_clone() {
        let clock = Clock::default();
        let before = clock.wall().as_secs();
        clock.clone().shift(86_400);
        assert!(clock.wall().as_secs() >= before + 86_400);
    }
}
