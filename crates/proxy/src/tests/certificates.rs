//! Certificates come, are renewed before they expire, and stay when renewal fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use identity::SpiffeId;
use identity::chain::Chain;
use identity::csr::CertificateRequest;
use tokio::sync::Notify;
use tokio::time::timeout;

use super::world::{self, id};
use crate::certs::{Authority, Certificates};
use crate::clock::Clock;
use crate::metrics::Metrics;
use crate::reasons::EndedEarly;

const LIFE: Duration = Duration::from_secs(3600);

/// An authority that can be out of order.
struct Flaky {
    authority: world::Authority,
    clock: Clock,
    works: AtomicBool,
    asked: AtomicUsize,
    back: Notify,
}

impl Authority for Flaky {
    async fn restored(&self) {
        self.back.notified().await;
    }

    async fn certify(&self, id: &SpiffeId, request: &CertificateRequest) -> Result<Chain, String> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if !self.works.load(Ordering::SeqCst) {
            return Err("out of order".into());
        }
        Ok(self.authority.chain(id, request, &self.clock, LIFE))
    }
}

struct Setting {
    clock: Clock,
    certificates: Arc<Certificates>,
    authority: Arc<Flaky>,
    metrics: Arc<Metrics>,
}

fn setting() -> Setting {
    let clock = Clock::default();
    let authority = world::Authority::new(&clock);
    let certificates = Arc::new(Certificates::new(clock.clone()));
    certificates.set_bundle(authority.bundle.clone());
    let (works, asked, back) = (AtomicBool::new(true), AtomicUsize::new(0), Notify::new());
    let flaky = Flaky { authority, clock: clock.clone(), works, asked, back };
    Setting {
        clock,
        certificates,
        authority: Arc::new(flaky),
        metrics: Arc::new(Metrics::new(tokio::time::Instant::now())),
    }
}

impl Setting {
    fn hold(&self) {
        self.certificates.hold(&id("a/sa/client"), &self.authority, &self.metrics);
    }

    fn not_after(&self) -> u64 {
        self.certificates.all()[0].not_after().as_secs()
    }

    /// Whether nothing changes for so long. Time is the test's own, and goes on when everybody waits.
    async fn stays_as_it_is(&self, time: Duration) -> bool {
        timeout(time, self.next_change()).await.is_err()
    }

    async fn next_change(&self) {
        self.certificates.changes().changed().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_waits_for_the_certificate_and_gets_it() {
    let setting = setting();
    setting.hold();
    setting.certificates.client(&id("a/sa/client"), &id("b/sa/server")).await.unwrap();
    setting.certificates.server(&id("a/sa/client")).await.unwrap();
    assert!(setting.certificates.has(&id("a/sa/client")));
}

#[tokio::test(start_paused = true)]
async fn a_connection_without_a_certificate_is_refused_by_name_in_the_end() {
    let setting = setting();
    setting.authority.works.store(false, Ordering::SeqCst);
    setting.hold();
    let started = tokio::time::Instant::now();
    let refused = setting.certificates.client(&id("a/sa/client"), &id("b/sa/server")).await;
    assert_eq!(refused.unwrap_err(), EndedEarly::NoCertificate);
    assert_eq!(started.elapsed(), Duration::from_secs(5));
    assert!(setting.authority.asked.load(Ordering::SeqCst) >= 3, "it is tried again within seconds");
}

#[tokio::test(start_paused = true)]
async fn a_certificate_is_renewed_in_its_second_half_by_wall_time() {
    let setting = setting();
    setting.hold();
    setting.next_change().await;
    let first = setting.not_after();
    // Monotonic time alone, however long, renews nothing.
    assert!(setting.stays_as_it_is(LIFE).await);
    assert_eq!(setting.not_after(), first);
    setting.clock.shift(LIFE.as_secs() as i64 * 7 / 10);
    setting.next_change().await;
    assert!(setting.not_after() > first);
}

#[tokio::test(start_paused = true)]
async fn a_failed_renewal_keeps_the_valid_one_until_it_expires() {
    let setting = setting();
    setting.hold();
    setting.next_change().await;
    let first = setting.not_after();
    setting.authority.works.store(false, Ordering::SeqCst);
    setting.clock.shift(LIFE.as_secs() as i64 * 7 / 10);
    assert!(setting.stays_as_it_is(Duration::from_secs(120)).await);
    assert!(setting.authority.asked.load(Ordering::SeqCst) > 5);
    assert_eq!(setting.not_after(), first);
    setting.certificates.client(&id("a/sa/client"), &id("b/sa/server")).await.unwrap();
    setting.clock.shift(LIFE.as_secs() as i64);
    let refused = setting.certificates.server(&id("a/sa/client")).await;
    assert_eq!(refused.unwrap_err(), EndedEarly::NoCertificate, "at expiry it is refused, never used");
    setting.authority.works.store(true, Ordering::SeqCst);
    setting.next_change().await;
    setting.certificates.server(&id("a/sa/client")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_expired_while_the_authority_was_away_is_there_again_at_once_when_it_is_back() {
    let setting = setting();
    setting.hold();
    setting.next_change().await;
    setting.authority.works.store(false, Ordering::SeqCst);
    setting.clock.shift(2 * LIFE.as_secs() as i64);
    assert!(setting.stays_as_it_is(Duration::from_secs(300)).await);
    assert!(!setting.certificates.has(&id("a/sa/client")), "its time is over");
    let asked = setting.authority.asked.load(Ordering::SeqCst);
    setting.authority.works.store(true, Ordering::SeqCst);
    let back = tokio::time::Instant::now();
    setting.authority.back.notify_waiters();
    setting.next_change().await;
    assert!(back.elapsed() < Duration::from_millis(100), "{:?}", back.elapsed());
    assert!(setting.certificates.has(&id("a/sa/client")));
    assert_eq!(setting.authority.asked.load(Ordering::SeqCst), asked + 1, "once, and not again and again");
}

#[tokio::test(start_paused = true)]
async fn steps_of_the_clock_neither_lose_a_certificate_nor_keep_an_expired_one() {
    let setting = setting();
    setting.hold();
    setting.next_change().await;
    let first = setting.not_after();
    // Back before the issue, as far as certificates are backdated: as before.
    setting.clock.shift(-50);
    assert!(setting.certificates.has(&id("a/sa/client")));
    assert!(setting.stays_as_it_is(Duration::from_secs(120)).await);
    assert_eq!(setting.not_after(), first);
    // A day back: it is not valid yet, and so none; forward again, and it is the same one.
    setting.clock.shift(-86_400);
    assert!(!setting.certificates.has(&id("a/sa/client")));
    setting.clock.shift(86_400 + 50);
    assert!(setting.certificates.has(&id("a/sa/client")));
    // A step beyond its end: refused until the next one is there, within the keeper's longest sleep.
    setting.clock.shift(LIFE.as_secs() as i64 + 60);
    assert!(!setting.certificates.has(&id("a/sa/client")));
    setting.next_change().await;
    assert!(setting.not_after() > first && setting.certificates.has(&id("a/sa/client")));
}

#[tokio::test(start_paused = true)]
async fn a_bundle_that_no_longer_vouches_for_it_renews_it_at_once() {
    let setting = setting();
    setting.hold();
    setting.next_change().await;
    let asked = setting.authority.asked.load(Ordering::SeqCst);
    setting.certificates.set_bundle(world::Authority::new(&setting.clock).bundle);
    assert!(setting.stays_as_it_is(Duration::from_secs(1)).await);
    assert!(setting.authority.asked.load(Ordering::SeqCst) > asked);
    assert!(setting.certificates.has(&id("a/sa/client")), "what cannot be replaced yet stays");
}

#[tokio::test(start_paused = true)]
async fn the_key_goes_with_the_last_pod_of_its_identity() {
    let setting = setting();
    setting.hold();
    setting.hold();
    setting.next_change().await;
    setting.certificates.release(&id("a/sa/client"));
    assert!(setting.certificates.has(&id("a/sa/client")));
    setting.certificates.release(&id("a/sa/client"));
    assert!(!setting.certificates.has(&id("a/sa/client")) && setting.certificates.all().is_empty());
    // And the keeper does not bring it back.
    setting.clock.shift(LIFE.as_secs() as i64);
    assert!(setting.stays_as_it_is(Duration::from_secs(60)).await);
    assert!(setting.certificates.all().is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_the_last_proxy_left_is_news_when_a_pod_takes_it_and_when_its_key_goes() {
    let setting = setting();
    setting.hold();
    setting.next_change().await;
    let left = setting.certificates.all();
    let next = Certificates::new(setting.clock.clone());
    let next = Setting { certificates: Arc::new(next), ..setting };
    next.certificates.set_bundle(next.authority.authority.bundle.clone());
    next.authority.works.store(false, Ordering::SeqCst);
    next.certificates.inherit(left);
    // Whoever keeps them for the one after hears of them, whatever else happens.
    let mut news = next.certificates.changes();
    next.hold();
    assert!(news.has_changed().unwrap() && next.certificates.all().len() == 1);
    news.mark_unchanged();
    next.certificates.release(&id("a/sa/client"));
    assert!(news.has_changed().unwrap() && next.certificates.all().is_empty());
}

#[tokio::test(start_paused = true)]
async fn nothing_that_is_shown_names_a_key() {
    let setting = setting();
    setting.hold();
    setting.next_change().await;
    let shown = format!("{:?}", setting.certificates);
    assert!(shown.contains("key redacted") && !shown.contains("PRIVATE"));
}
