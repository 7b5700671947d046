//! The span in which a certificate is valid (RFC 5280, section 4.1.2.5).

use std::fmt;
use std::time::Duration;

use rustls_pki_types::UnixTime;

/// The last second that a certificate can name: 9999-12-31T23:59:59Z (RFC 5280, section 4.1.2.5).
const LAST_SECOND: u64 = 253_402_300_799;

/// Not before, not after: both ends belong to the span.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Validity {
    not_before: UnixTime,
    not_after: UnixTime,
}

impl Validity {
    /// The span from `not_before` to `not_after`; one that ends before it begins holds no moment.
    pub fn new(not_before: UnixTime, not_after: UnixTime) -> Self {
        Validity { not_before, not_after }
    }

    /// The first second in which the certificate is valid.
    pub fn not_before(&self) -> UnixTime {
        self.not_before
    }

    /// The last second in which the certificate is valid.
    pub fn not_after(&self) -> UnixTime {
        self.not_after
    }

    /// Whether `now` is within the span.
    pub fn contains(&self, now: UnixTime) -> bool {
        self.not_before <= now && now <= self.not_after
    }

    /// The moments that are in both spans.
    pub fn intersection(&self, other: &Validity) -> Validity {
        Validity::new(self.not_before.max(other.not_before), self.not_after.min(other.not_after))
    }
}

impl fmt::Debug for Validity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..={}", self.not_before.as_secs(), self.not_after.as_secs())
    }
}

/// `span` after `time`, at most the last moment that a certificate can name.
pub(crate) fn later(time: UnixTime, span: Duration) -> UnixTime {
    let seconds = time.as_secs().saturating_add(span.as_secs()).min(LAST_SECOND);
    UnixTime::since_unix_epoch(Duration::from_secs(seconds))
}

/// `span` before `time`, at least the epoch.
pub(crate) fn earlier(time: UnixTime, span: Duration) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(time.as_secs().saturating_sub(span.as_secs())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> UnixTime {
        UnixTime::since_unix_epoch(Duration::from_secs(seconds))
    }

    #[test]
    fn both_ends_belong_to_the_span() {
        let validity = Validity::new(at(10), at(20));
        assert!(!validity.contains(at(9)) && validity.contains(at(10)));
        assert!(validity.contains(at(20)) && !validity.contains(at(21)));
    }

    #[test]
    fn the_intersection_of_disjoint_spans_holds_no_moment() {
        let never = Validity::new(at(10), at(20)).intersection(&Validity::new(at(30), at(40)));
        assert!((0..50).all(|second| !never.contains(at(second))));
    }

    #[test]
    fn time_does_not_leave_what_a_certificate_can_name() {
        assert_eq!(later(at(5), Duration::MAX).as_secs(), LAST_SECOND);
        assert_eq!(earlier(at(5), Duration::from_secs(6)).as_secs(), 0);
    }
}
