//! A control plane that names the pods it is told to, and hears which are captured.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use identity::csr::{CertificateRequest, PublicKeyOfRequest};
use identity::issuer::{Root, WorkloadToCertify};
use identity::{PrivateKey, SpiffeId, Svid, UnixTime, tls};
use mesh::PodUid;
use rustls::time_provider::DefaultTimeProvider;
use tokio::sync::watch;
use wire::discovery::{Asked, Kind, NodePod, Published, Resource};
use wire::report::{CaptureFailure, Report};
use wire::server::{self, Bounds, Caller, CaptureStream, DiscoveryStream, Handler, Refused, serve};

const CONTROL: &str = "spiffe://cluster.local/ns/justmtls-system/sa/justmtls-control";
const TOKEN: &str = "the token of this node's agent";
const DAY: Duration = Duration::from_secs(86_400);

/// What it says and hears.
pub(crate) struct Control {
    pub(crate) address: SocketAddr,
    pods: watch::Sender<Vec<Published>>,
    reported: watch::Sender<Report>,
    reports: AtomicUsize,
}

impl Control {
    /// Starts one in the caller's network namespace, whose bundle and token are in `files`. It ends with the test's process.
    pub(crate) fn start(files: &Path) -> Arc<Control> {
        let now = UnixTime::since_unix_epoch(SystemTime::now().duration_since(UNIX_EPOCH).unwrap());
        let root = Root::generate(&"cluster.local".parse().unwrap(), now, 30 * DAY).unwrap();
        let (bundle, intermediate) = (root.bundle().unwrap(), root.issue_intermediate(now, 10 * DAY).unwrap());
        let id: SpiffeId = CONTROL.parse().unwrap();
        let key = PrivateKey::generate().unwrap();
        let request = CertificateRequest::new(&key).unwrap();
        let public = PublicKeyOfRequest::from_pem(request.as_pem()).unwrap();
        let chain = intermediate.sign(&WorkloadToCertify::assertion(id.clone()), &public, now, DAY).unwrap();
        let svid = Svid::assemble(key, chain, &bundle, &id, now).unwrap();
        std::fs::write(files.join("bundle.pem"), bundle.to_pem()).unwrap();
        std::fs::write(files.join("token"), TOKEN).unwrap();

        let config = tls::control_server_config(&svid, Arc::new(DefaultTimeProvider));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let control = Arc::new(Control {
            address: listener.local_addr().unwrap(),
            pods: watch::Sender::new(Vec::new()),
            reported: watch::Sender::new(Report::default()),
            reports: AtomicUsize::new(0),
        });
        let handler = control.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                let (config, never) = (move || config.clone(), std::future::pending());
                serve(listener, config, handler, never, Duration::ZERO, Bounds::within(1024)).await.unwrap();
            });
        });
        control
    }

    /// Names these pods, and no other.
    pub(crate) fn publish(&self, pods: impl IntoIterator<Item = NodePod>) {
        self.pods.send_replace(pods.into_iter().map(|pod| Published::new(&Resource::NodePod(pod))).collect());
    }

    /// What was last reported.
    pub(crate) fn captured(&self) -> BTreeSet<PodUid> {
        self.reported.borrow().captured.clone()
    }

    pub(crate) fn failed(&self) -> BTreeMap<PodUid, CaptureFailure> {
        self.reported.borrow().failed.clone()
    }

    /// How many reports there were.
    pub(crate) fn reports(&self) -> usize {
        self.reports.load(Ordering::Relaxed)
    }
}

impl Handler for Control {
    type Known = ();

    async fn authenticate(&self, caller: Caller) -> Result<(), Refused> {
        assert_eq!(caller.token, TOKEN);
        Ok(())
    }

    async fn is_disowned(&self, _: Caller, (): &()) -> bool {
        false
    }

    async fn discovery(&self, (): (), mut stream: DiscoveryStream) -> Result<(), Refused> {
        let mut changes = self.pods.subscribe();
        let mut subscribed = false;
        loop {
            tokio::select! {
                asked = stream.next() => match asked? {
                    None => return Ok(()),
                    Some(Asked::Subscribed(kind)) => {
                        assert_eq!((kind, stream.node()), (Kind::NodePod, "node-a/agent"));
                        subscribed = true;
                        changes.mark_changed();
                    }
                    Some(_) => {}
                },
                _ = changes.changed(), if subscribed => {
                    let pods = changes.borrow_and_update().clone();
                    stream.reconcile(Kind::NodePod, &pods).await;
                }
            }
        }
    }

    async fn certify(&self, (): (), _: server::CertificateRequest) -> Result<Vec<String>, Refused> {
        Err(Refused::NotAllowed("an agent asks for no certificate".into()))
    }

    async fn captures(&self, (): (), mut stream: CaptureStream) -> Result<(), Refused> {
        while let Some(report) = stream.next().await {
            self.reported.send_replace(report);
            self.reports.fetch_add(1, Ordering::Relaxed);
            stream.confirm().await;
        }
        Ok(())
    }

    fn turned_away(&self, address: SocketAddr, because: server::TurnedAway) {
        panic!("{address} was turned away: {because:?}");
    }
}
