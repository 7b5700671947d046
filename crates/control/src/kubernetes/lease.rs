//! Which replica writes what must be written once: the holder of a Lease.
//!
//! All replicas serve; the holder alone publishes the roots, makes the authority, tells policies about themselves, and tells of pods what
//! objects alone say. What an agent found is told by the replica that serves it. Two that both think to hold it do no harm:
//! whatever a leader does is create-once or the same from each.

use std::time::Duration;

use kube::{Api, Client};
use manifests::k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use manifests::k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use manifests::k8s_openapi::jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{info, warn};

use super::{Failure, ask, metadata, parameters, tell};
use crate::clock::Clock;
use crate::{CONTROL_SERVICE_ACCOUNT, ROOT_NAMESPACE};

/// How long a Lease counts after it was renewed last.
const DURATION: Duration = Duration::from_secs(15);
/// How often it is renewed, or looked at.
const EVERY: Duration = Duration::from_secs(4);
/// A holder that could not renew for this long lets go, before another may take it.
const LET_GO: Duration = Duration::from_secs(10);

/// One replica's part in the election.
pub(crate) struct Election {
    api: Api<Lease>,
    identity: String,
    clock: Clock,
    /// The version that was seen last, and since when: another machine's clock is not believed.
    seen: Option<(String, Instant)>,
    renewed: Option<Instant>,
    leads: watch::Sender<bool>,
}

impl Election {
    pub(crate) fn new(client: &Client, identity: &str, clock: Clock) -> Self {
        let api = Api::namespaced(client.clone(), ROOT_NAMESPACE);
        let leads = watch::Sender::new(false);
        Self { api, identity: identity.to_owned(), clock, seen: None, renewed: None, leads }
    }

    /// Whether this replica leads.
    pub(crate) fn leads(&self) -> watch::Receiver<bool> {
        self.leads.subscribe()
    }

    /// Takes part until `ending` closes; then lets go, so that another one leads at once.
    pub(crate) async fn run(mut self, mut ending: watch::Receiver<()>) {
        loop {
            // Also where the API server does not answer at all.
            let until = self.renewed.filter(|_| *self.leads.borrow()).map(|renewed| renewed + LET_GO);
            let tried = tokio::select! {
                tried = self.try_once() => tried,
                () = sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => {
                    Err(Failure::Away("the Lease was not renewed in time".to_owned()))
                }
                _ = ending.changed() => break,
            };
            match tried {
                Ok(leads) => self.set(leads),
                Err(failure) => {
                    warn!(%failure, "the Lease cannot be asked for");
                    if self.renewed.is_none_or(|renewed| renewed.elapsed() >= LET_GO) {
                        self.set(false);
                    }
                }
            }
            tokio::select! {
                () = sleep(EVERY) => {}
                _ = ending.changed() => break,
            }
        }
        if *self.leads.borrow() {
            self.set(false);
            // Who does not get this through is followed after the Lease's own time.
            let _ = self.release().await;
        }
    }

    fn set(&self, leads: bool) {
        if tell(&self.leads, leads) {
            info!(identity = self.identity, leads, "leadership changed");
        }
    }

    /// Takes the Lease, or renews it; whether it is held now.
    pub(crate) async fn try_once(&mut self) -> Result<bool, Failure> {
        let began = Instant::now();
        let held = match ask(self.api.get_opt(CONTROL_SERVICE_ACCOUNT)).await? {
            None => {
                let lease = Lease { metadata: metadata(CONTROL_SERVICE_ACCOUNT), spec: Some(self.mine(None)) };
                self.write(ask(self.api.create(&parameters(), &lease)).await)?
            }
            Some(mut lease) => {
                let spec = lease.spec.clone().unwrap_or_default();
                if !self.may_take(&spec, lease.metadata.resource_version.as_deref().unwrap_or_default()) {
                    return Ok(false);
                }
                lease.spec = Some(self.mine(Some(&spec)));
                // With the version that was read: of two that try, one fails.
                self.write(ask(self.api.replace(CONTROL_SERVICE_ACCOUNT, &parameters(), &lease)).await)?
            }
        };
        if held {
            self.renewed = Some(began);
        }
        Ok(held)
    }

    fn write(&self, written: Result<Lease, Failure>) -> Result<bool, Failure> {
        match written {
            Ok(_) => Ok(true),
            Err(Failure::Conflict) => Ok(false),
            Err(failure) => Err(failure),
        }
    }

    /// Whether the Lease is ours, nobody's, or was not renewed for as long as we have watched it.
    fn may_take(&mut self, spec: &LeaseSpec, version: &str) -> bool {
        let holder = spec.holder_identity.as_deref().unwrap_or_default();
        if holder.is_empty() || holder == self.identity {
            return true;
        }
        match &self.seen {
            Some((seen, since)) if seen == version => since.elapsed() > DURATION,
            _ => {
                self.seen = Some((version.to_owned(), Instant::now()));
                false
            }
        }
    }

    fn mine(&self, before: Option<&LeaseSpec>) -> LeaseSpec {
        let seconds = i64::try_from(self.clock.now().as_secs()).unwrap_or_default();
        let now = MicroTime(Timestamp::from_second(seconds).unwrap_or_default());
        let goes_on = before.is_some_and(|before| before.holder_identity.as_deref() == Some(&self.identity));
        let acquired = before.filter(|_| goes_on).and_then(|before| before.acquire_time.clone());
        let transitions = before.and_then(|before| before.lease_transitions).unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: Some(acquired.unwrap_or_else(|| now.clone())),
            renew_time: Some(now),
            lease_transitions: Some(transitions.saturating_add(i32::from(!goes_on))),
            ..LeaseSpec::default()
        }
    }

    async fn release(&self) -> Result<(), Failure> {
        let mut lease = ask(self.api.get(CONTROL_SERVICE_ACCOUNT)).await?;
        if let Some(spec) = lease.spec.as_mut().filter(|spec| spec.holder_identity.as_deref() == Some(&self.identity)) {
            spec.holder_identity = None;
            ask(self.api.replace(CONTROL_SERVICE_ACCOUNT, &parameters(), &lease)).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::Fake;
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_of_two_leads_and_the_other_one_after_it_was_silent_for_long_enough() {
        let fake = Fake::default();
        let [mut one, mut two] = ["one", "two"].map(|name| Election::new(&fake.client(), name, Clock::default()));
        assert!(one.try_once().await.unwrap());
        assert!(!two.try_once().await.unwrap());
        tokio::time::advance(DURATION * 2).await;
        // It was renewed meanwhile: what counts is what this replica has seen.
        assert!(one.try_once().await.unwrap());
        assert!(!two.try_once().await.unwrap());
        tokio::time::advance(DURATION * 2).await;
        assert!(two.try_once().await.unwrap());
        assert!(!one.try_once().await.unwrap());
        one.release().await.unwrap();
        assert!(two.try_once().await.unwrap(), "nobody releases what is another's");
        two.release().await.unwrap();
        assert!(one.try_once().await.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn who_cannot_renew_lets_go_before_another_may_take_it() {
        let fake = Fake::default();
        let election = Election::new(&fake.client(), "one", Clock::default());
        let mut leads = election.leads();
        let (alive, ending) = watch::channel(());
        let running = tokio::spawn(election.run(ending));
        leads.wait_for(|leads| *leads).await.unwrap();
        for silent in [false, true] {
            let began = Instant::now();
            if silent {
                fake.be_silent(true)
            } else {
                fake.fail_with(Some(503))
            }
            leads.wait_for(|leads| !*leads).await.unwrap();
            assert!(began.elapsed() < DURATION, "{silent}: {:?}", began.elapsed());
            if silent {
                fake.be_silent(false)
            } else {
                fake.fail_with(None)
            }
            leads.wait_for(|leads| *leads).await.unwrap();
        }
        drop(alive);
        running.await.unwrap();
        assert!(
            Election::new(&fake.client(), "two", Clock::default()).try_once().await.unwrap(),
            "it was let go at the end"
        );
    }
}
