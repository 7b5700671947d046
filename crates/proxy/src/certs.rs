//! Certificates: one SVID per identity that runs on this node, kept valid, and the TLS configurations made of them.
//!
//! Keys are made here and stay here. `(identity, chain, key)` is one value, validated before it goes live and swapped
//! whole; a failed renewal keeps the valid one. What has expired is as good as none: connections are refused, by name.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use identity::csr::CertificateRequest;
use identity::lifecycle::{self, Next};
use identity::verify::{Role, verify};
use identity::{PrivateKey, SpiffeId, Svid, TrustBundle, UnixTime, VerifiedPeer, tls};
use rustls::{ClientConfig, ServerConfig};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout_at};

use crate::clock::Clock;
use crate::metrics::Metrics;
use crate::reasons::EndedEarly;

/// How long a connection waits for the certificate of its pod.
const PATIENCE: Duration = Duration::from_secs(5);

/// The longest sleep of a keeper: wall time may jump while it sleeps, and it must notice.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);

/// The most client configurations that are kept. They are remade at need: the bound costs a little time, never a
/// connection.
const MOST_CONFIGS: usize = 4096;

/// Who certifies keys: the control plane.
pub(crate) trait Authority: Send + Sync + 'static {
    /// Asks for a certificate for the key of `request`, as `id`.
    ///
    /// # Errors
    /// One sentence for the log.
    fn certify(
        &self,
        id: &SpiffeId,
        request: &CertificateRequest,
    ) -> impl Future<Output = Result<identity::chain::Chain, String>> + Send;

    /// Waits until the authority can be reached again, after it could not: whoever waits to try again need not wait longer.
    fn restored(&self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }
}

/// All certificates of the process.
#[derive(Debug)]
pub(crate) struct Certificates {
    clock: Clock,
    held: Mutex<Held>,
    /// Tells of each change: of the bundle, or of an SVID.
    changes: watch::Sender<u64>,
}

#[derive(Default, Debug)]
struct Held {
    bundle: Option<TrustBundle>,
    svids: HashMap<SpiffeId, Slot>,
    servers: HashMap<SpiffeId, Arc<ServerConfig>>,
    clients: HashMap<(SpiffeId, SpiffeId), Arc<ClientConfig>>,
    /// What the last proxy left, until its pods come.
    inherited: HashMap<SpiffeId, Svid>,
}

/// One identity: how many pods have it, and its SVID once there is one.
#[derive(Default, Debug)]
struct Slot {
    pods: usize,
    svid: Option<Svid>,
    keeper: Option<AbortHandle>,
}

impl Certificates {
    /// None yet.
    pub(crate) fn new(clock: Clock) -> Self {
        Self { clock, held: Mutex::default(), changes: watch::Sender::new(0) }
    }

    /// Takes in a new trust bundle. Every configuration made under the old one is forgotten; connections that stand go on.
    pub(crate) fn set_bundle(&self, bundle: TrustBundle) {
        {
            let mut held = self.lock();
            if held.bundle.as_ref().is_some_and(|old| old.digest() == bundle.digest()) {
                return;
            }
            held.bundle = Some(bundle);
            held.servers.clear();
            held.clients.clear();
        }
        self.changes.send_modify(|number| *number += 1);
    }

    /// The trust bundle.
    pub(crate) fn bundle(&self) -> Option<TrustBundle> {
        self.lock().bundle.clone()
    }

    /// Puts an SVID live.
    pub(crate) fn install(&self, svid: Svid) {
        {
            let mut held = self.lock();
            let id = svid.id().clone();
            held.servers.remove(&id);
            held.clients.retain(|(from, _), _| *from != id);
            held.svids.entry(id).or_default().svid = Some(svid);
        }
        self.changes.send_modify(|number| *number += 1);
    }

    /// Takes in what the last proxy left. Nothing of it is in use before a pod of its identity comes.
    pub(crate) fn inherit(&self, svids: Vec<Svid>) {
        self.lock().inherited = svids.into_iter().map(|svid| (svid.id().clone(), svid)).collect();
    }

    /// Forgets what was left for pods that did not come.
    pub(crate) fn disinherit(&self) {
        self.lock().inherited.clear();
    }

    /// One more pod has this identity. The first one starts its keeper.
    pub(crate) fn hold<A: Authority>(self: &Arc<Self>, id: &SpiffeId, authority: &Arc<A>, metrics: &Arc<Metrics>) {
        let was_inherited = {
            let mut held = self.lock();
            let inherited = held.inherited.remove(id);
            let slot = held.svids.entry(id.clone()).or_default();
            slot.pods += 1;
            let takes = slot.svid.is_none() && inherited.is_some();
            slot.svid = slot.svid.take().or(inherited);
            if slot.keeper.is_none() {
                let keeping = keep(self.clone(), id.clone(), authority.clone(), metrics.clone());
                slot.keeper = Some(tokio::spawn(keeping).abort_handle());
            }
            takes
        };
        // It is the next proxy's, too: an agent that comes later has it from nobody else.
        if was_inherited {
            self.changes.send_modify(|number| *number += 1);
        }
    }

    /// One pod less has this identity. With the last one its key goes, also from what is kept for the next proxy.
    pub(crate) fn release(&self, id: &SpiffeId) {
        {
            let mut held = self.lock();
            let Some(slot) = held.svids.get_mut(id) else { return };
            slot.pods = slot.pods.saturating_sub(1);
            if slot.pods > 0 {
                return;
            }
            if let Some(keeper) = &slot.keeper {
                keeper.abort();
            }
            held.svids.remove(id);
            held.servers.remove(id);
            held.clients.retain(|(from, _), _| from != id);
        }
        self.changes.send_modify(|number| *number += 1);
    }

    /// What to show to a server and whom to expect, for a pod of identity `from` that connects to one of `to`, and the last
    /// second in which it is valid. Waits for the certificate where there is none yet.
    ///
    /// # Errors
    /// [`EndedEarly::NoCertificate`] when none came in time.
    pub(crate) async fn client(
        &self,
        from: &SpiffeId,
        to: &SpiffeId,
    ) -> Result<(Arc<ClientConfig>, UnixTime), EndedEarly> {
        self.wait_for(|held, clock| {
            let key = (from.clone(), to.clone());
            let (svid, bundle) = held.valid(from, clock)?;
            if let Some(config) = held.clients.get(&key) {
                return Some((config.clone(), svid.not_after()));
            }
            let config = tls::client_config(&svid, &bundle, to, Arc::new(clock.clone()));
            if held.clients.len() >= MOST_CONFIGS {
                held.clients.clear();
            }
            held.clients.insert(key, config.clone());
            Some((config, svid.not_after()))
        })
        .await
    }

    /// What to show to a client, for a pod of identity `id`. Waits for the certificate where there is none yet.
    ///
    /// # Errors
    /// [`EndedEarly::NoCertificate`] when none came in time.
    pub(crate) async fn server(&self, id: &SpiffeId) -> Result<Arc<ServerConfig>, EndedEarly> {
        self.wait_for(|held, clock| {
            let (svid, bundle) = held.valid(id, clock)?;
            let make = || tls::server_config(&svid, &bundle, Arc::new(clock.clone()));
            Some(held.servers.entry(id.clone()).or_insert_with(make).clone())
        })
        .await
    }

    /// Whether what a peer proved in its handshake still holds: under the bundle of today, at this time (T45).
    ///
    /// # Errors
    /// What a new handshake would be refused for.
    pub(crate) fn still_proven(&self, peer: &VerifiedPeer, role: Role) -> Result<(), EndedEarly> {
        let bundle = self.bundle().ok_or(EndedEarly::NoCertificate)?;
        peer.still_valid(role, &bundle, self.clock.wall()).map_err(|error| EndedEarly::Handshake(error.into()))
    }

    /// Whether there is a valid certificate for an identity now.
    pub(crate) fn has(&self, id: &SpiffeId) -> bool {
        self.lock().valid(id, &self.clock).is_some()
    }

    /// The SVIDs that are held, for people: keys do not show.
    pub(crate) fn all(&self) -> Vec<Svid> {
        self.lock().svids.values().filter_map(|slot| slot.svid.clone()).collect()
    }

    /// What an identity has now.
    fn svid(&self, id: &SpiffeId) -> Option<Svid> {
        self.lock().svids.get(id)?.svid.clone()
    }

    /// Tells of each change from now on.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    async fn wait_for<T>(&self, look: impl Fn(&mut Held, &Clock) -> Option<T>) -> Result<T, EndedEarly> {
        let deadline = Instant::now() + PATIENCE;
        let mut changes = self.changes();
        loop {
            changes.mark_unchanged();
            if let Some(found) = look(&mut self.lock(), &self.clock) {
                return Ok(found);
            }
            if !matches!(timeout_at(deadline, changes.changed()).await, Ok(Ok(()))) {
                return Err(EndedEarly::NoCertificate);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    fn valid(&self, id: &SpiffeId, clock: &Clock) -> Option<(Svid, TrustBundle)> {
        let svid = self.svids.get(id)?.svid.as_ref()?;
        svid.validity().contains(clock.wall()).then(|| Some((svid.clone(), self.bundle.clone()?)))?
    }
}

/// Gets an identity's certificate, and the next one, for as long as a pod has that identity.
async fn keep<A: Authority>(certificates: Arc<Certificates>, id: SpiffeId, authority: Arc<A>, metrics: Arc<Metrics>) {
    let mut changes = certificates.changes();
    let mut failures = 0_u32;
    let mut current = certificates.svid(&id);
    let mut jitter = wire::dice::fraction();
    loop {
        changes.mark_unchanged();
        let now = certificates.clock.wall();
        let Some(bundle) = certificates.bundle() else {
            if changes.changed().await.is_err() {
                return;
            }
            continue;
        };
        if let Some(pause) = current.as_ref().and_then(|svid| rest(svid, &bundle, now, jitter)) {
            // A new bundle may no longer vouch for what we have: look again at once.
            tokio::select! {
                () = sleep(pause.min(LONGEST_SLEEP)) => {}
                _ = changes.changed() => {}
            }
            continue;
        }
        match renew(&id, &bundle, &*authority, &certificates.clock).await {
            Ok(svid) => {
                tracing::info!(identity = %id, not_after = svid.not_after().as_secs(), "certificate issued");
                metrics.certificates.inc();
                certificates.install(svid.clone());
                (current, failures, jitter) = (Some(svid), 0, wire::dice::fraction());
            }
            Err(why) => {
                failures = failures.saturating_add(1);
                metrics.certificate_failures.inc();
                tracing::warn!(identity = %id, failures, "no certificate: {why}");
                tokio::select! {
                    () = sleep(lifecycle::retry_after(failures, wire::dice::fraction())) => {}
                    () = authority.restored() => {
                        // Who still has a valid one leaves the first moment to those who have none.
                        if current.as_ref().is_some_and(|svid| svid.validity().contains(certificates.clock.wall())) {
                            sleep(lifecycle::reconnect_after(1, wire::dice::fraction())).await;
                        }
                    }
                }
            }
        }
    }
}

/// How long a certificate may be left alone; `None` where it is to be renewed now.
fn rest(svid: &Svid, bundle: &TrustBundle, now: UnixTime, jitter: f64) -> Option<Duration> {
    let Next::Wait { until } = lifecycle::next(svid.validity(), now, jitter) else { return None };
    let [leaf, intermediates @ ..] = svid.chain() else { return None };
    verify(bundle, leaf, intermediates, Role::Server, now).ok()?;
    Some(Duration::from_secs(until.as_secs().saturating_sub(now.as_secs())))
}

async fn renew<A: Authority>(
    id: &SpiffeId,
    bundle: &TrustBundle,
    authority: &A,
    clock: &Clock,
) -> Result<Svid, String> {
    let key = PrivateKey::generate().map_err(|error| error.to_string())?;
    let request = CertificateRequest::new(&key).map_err(|error| error.to_string())?;
    let chain = authority.certify(id, &request).await?;
    Svid::assemble(key, chain, bundle, id, clock.wall()).map_err(|error| error.to_string())
}
