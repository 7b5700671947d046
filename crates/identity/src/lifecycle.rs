//! When to renew a certificate, and how soon to try again.
//!
//! Renewal begins at half of a certificate's life, so that the other half is what an outage of the control plane may
//! last. Jitter spreads the fleet: certificates that were issued together are not renewed together.

use std::time::Duration;

use rustls_pki_types::UnixTime;

use crate::validity::{Validity, later};

/// The share of a life within which renewals begin, behind its half.
const SPREAD: f64 = 0.1;

/// The first pause after a failed renewal.
const FIRST_RETRY: Duration = Duration::from_millis(500);

/// The longest pause between two attempts. Seconds, not minutes: when the control plane is back, so are certificates.
const LONGEST_RETRY: Duration = Duration::from_secs(15);

/// The longest first pause before a lost control plane is dialled again.
const FIRST_RECONNECT: Duration = Duration::from_secs(2);

/// What to do with a certificate now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing, until then.
    Wait {
        /// The moment to ask again.
        until: UnixTime,
    },
    /// Ask for the next one; this one is still valid, and stays in use until the next one is.
    Renew,
    /// Its time is over: nothing may be done with it any more. Ask for the next one.
    Expired,
}

/// Decides what to do with a certificate.
///
/// `jitter` is between 0 and 1, drawn once for each certificate and kept with it: drawn anew for each question, it would
/// favour the earliest moment. A value outside counts as the nearest bound, and NaN as 0.
pub fn next(validity: &Validity, now: UnixTime, jitter: f64) -> Next {
    if now > validity.not_after() {
        return Next::Expired;
    }
    let life = validity.not_after().as_secs().saturating_sub(validity.not_before().as_secs());
    let into = Duration::from_secs(life).mul_f64(0.5 + SPREAD * unit(jitter));
    let renewal = later(validity.not_before(), into);
    if now < renewal { Next::Wait { until: renewal } } else { Next::Renew }
}

/// The pause before the next attempt, after `failures` of them in a row (at least one): doubling, between half and the
/// whole of it by `jitter`, and never longer than 15 s.
pub fn retry_after(failures: u32, jitter: f64) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    let pause = FIRST_RETRY.saturating_mul(1 << doublings).min(LONGEST_RETRY);
    pause.mul_f64(0.5 + 0.5 * unit(jitter))
}

/// The pause before a lost control plane is dialled again, after `failures` attempts in a row (at least one): anywhere
/// between nothing and a bound that doubles from 2 s to 8 s, by `jitter`. All nodes lose it in the same moment; so they
/// do not come back in one.
pub fn reconnect_after(failures: u32, jitter: f64) -> Duration {
    let doublings = failures.saturating_sub(1).min(2);
    (FIRST_RECONNECT * (1 << doublings)).mul_f64(unit(jitter))
}

/// `jitter` as a number from 0 to 1, and NaN as 0.
fn unit(jitter: f64) -> f64 {
    if jitter > 0.0 { jitter.min(1.0) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: u64) -> UnixTime {
        UnixTime::since_unix_epoch(Duration::from_secs(seconds))
    }

    fn life(from: u64, to: u64) -> Validity {
        Validity::new(at(from), at(to))
    }

    #[test]
    fn a_certificate_is_renewed_at_half_of_its_life() {
        assert_eq!(next(&life(1000, 2000), at(1000), 0.0), Next::Wait { until: at(1500) });
        assert_eq!(next(&life(1000, 2000), at(1499), 0.0), Next::Wait { until: at(1500) });
        assert_eq!(next(&life(1000, 2000), at(1500), 0.0), Next::Renew);
        assert_eq!(next(&life(1000, 2000), at(2000), 0.0), Next::Renew);
        assert_eq!(next(&life(1000, 2000), at(2001), 0.0), Next::Expired);
    }

    #[test]
    fn jitter_spreads_renewals_over_a_tenth_of_a_life() {
        assert_eq!(next(&life(1000, 2000), at(1000), 0.5), Next::Wait { until: at(1550) });
        assert_eq!(next(&life(1000, 2000), at(1000), 1.0), Next::Wait { until: at(1600) });
    }

    #[test]
    fn a_certificate_from_the_future_waits() {
        assert_eq!(next(&life(1000, 2000), at(0), 0.0), Next::Wait { until: at(1500) });
    }

    #[test]
    fn a_life_that_ends_before_it_begins_is_expired_or_renewed() {
        assert_eq!(next(&life(2000, 1000), at(1500), 0.0), Next::Expired);
    }

    #[test]
    fn pauses_double_up_to_fifteen_seconds() {
        let pauses: Vec<_> = (1..=8).map(|failures| retry_after(failures, 1.0).as_millis()).collect();
        assert_eq!(pauses, [500, 1000, 2000, 4000, 8000, 15000, 15000, 15000]);
        assert_eq!(retry_after(1, 0.0), Duration::from_millis(250));
        assert_eq!(retry_after(0, 1.0), retry_after(1, 1.0));
    }

    #[test]
    fn reconnects_are_spread_over_seconds_and_not_over_minutes() {
        let longest: Vec<_> = (0..=5).map(|failures| reconnect_after(failures, 1.0).as_millis()).collect();
        assert_eq!(longest, [2000, 2000, 4000, 8000, 8000, 8000]);
        assert_eq!(reconnect_after(3, 0.0), Duration::ZERO);
        assert_eq!(reconnect_after(1, 0.25), Duration::from_millis(500));
    }

    proptest! {
        #[test]
        fn waiting_ends_after_now_and_before_two_thirds_of_the_life(
            from in 0u64..1 << 33, length in 2u64..1 << 30, since in 0u64..1 << 30, jitter in any::<f64>(),
        ) {
            let now = from + since;
            if let Next::Wait { until } = next(&life(from, from + length), at(now), jitter) {
                prop_assert!(until > at(now));
                prop_assert!(until.as_secs() >= from + length / 2);
                prop_assert!(until.as_secs() - from <= length * 2 / 3);
            }
        }

        #[test]
        fn no_pause_is_longer_than_promised_or_nothing(failures in any::<u32>(), jitter in any::<f64>()) {
            let pause = retry_after(failures, jitter);
            prop_assert!(pause >= FIRST_RETRY / 2 && pause <= LONGEST_RETRY);
        }
    }
}
