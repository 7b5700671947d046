//! The one place that reads a clock (D11): the time of day for certificates, a monotonic one for rates.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use identity::UnixTime;
use rustls::time_provider::TimeProvider;

/// The machine's clocks. Tests run the time of day ahead; the machine's own is never touched.
#[derive(Clone, Debug, Default)]
pub(crate) struct Clock {
    ahead_seconds: Arc<AtomicU64>,
}

impl Clock {
    /// The time of day.
    pub(crate) fn now(&self) -> UnixTime {
        let ahead = Duration::from_secs(self.ahead_seconds.load(Ordering::Relaxed));
        UnixTime::since_unix_epoch(Duration::from_secs(UnixTime::now().as_secs()) + ahead)
    }

    /// A time that only goes forward.
    pub(crate) fn monotonic(&self) -> Instant {
        Instant::now() + Duration::from_secs(self.ahead_seconds.load(Ordering::Relaxed))
    }

    #[cfg(test)]
    pub(crate) fn advance(&self, by: Duration) {
        self.ahead_seconds.fetch_add(by.as_secs(), Ordering::Relaxed);
    }
}

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(self.now())
    }
}
