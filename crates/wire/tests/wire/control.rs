//! A control plane for tests: one view, one token, and everything it hears.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use identity::tls;
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use wire::discovery::{Asked, Kind, Published};
use wire::report::Report;
use wire::server::{
    Bounds, Caller, CaptureStream, CertificateRequest, DiscoveryStream, Handler, Refused, TurnedAway, serve,
};

use crate::pki::{Authority, clock};

pub(crate) const TOKEN: &str = "the-token-of-node-a";
pub(crate) const CONTROL: &str = "spiffe://cluster.local/ns/justmtls-system/sa/justmtls-control";

/// What it publishes and what it heard.
pub(crate) struct Control {
    pub(crate) resources: watch::Sender<Vec<Published>>,
    pub(crate) heard: watch::Sender<Vec<Asked>>,
    pub(crate) reported: watch::Sender<Report>,
    pub(crate) asked_for: Mutex<Option<CertificateRequest>>,
    pub(crate) turned_away: watch::Sender<Vec<(SocketAddr, TurnedAway)>>,
    /// Tokens are looked up only while this is so: whoever knows may be away.
    pub(crate) reviews: watch::Sender<bool>,
    /// The token stands for nobody any more.
    pub(crate) revoked: Mutex<bool>,
    /// How many it was asked to look up.
    pub(crate) asked: watch::Sender<usize>,
}

impl Handler for Control {
    type Known = ();

    async fn authenticate(&self, caller: Caller) -> Result<(), Refused> {
        assert_ne!(caller.address.port(), 0, "the caller's address is known");
        self.asked.send_modify(|asked| *asked += 1);
        self.reviews.subscribe().wait_for(|reviews| *reviews).await.unwrap();
        match caller.token == TOKEN {
            true => Ok(()),
            false => Err(Refused::UnknownCaller("this token is nobody's".to_owned())),
        }
    }

    async fn is_disowned(&self, caller: Caller, (): &()) -> bool {
        assert_eq!(caller.token, TOKEN);
        self.asked.send_modify(|asked| *asked += 1);
        *self.revoked.lock().unwrap()
    }

    async fn discovery(&self, (): (), mut stream: DiscoveryStream) -> Result<(), Refused> {
        let mut changes = self.resources.subscribe();
        let mut kinds = BTreeSet::new();
        loop {
            tokio::select! {
                asked = stream.next() => {
                    let Some(asked) = asked? else { return Ok(()) };
                    assert_eq!(stream.node(), "node-a/proxy");
                    if let Asked::Subscribed(kind) = asked {
                        kinds.insert(kind);
                        let all = changes.borrow().clone();
                        stream.reconcile(kind, &all).await;
                    }
                    self.heard.send_modify(|heard| heard.push(asked));
                }
                _ = changes.changed() => {
                    let all = changes.borrow_and_update().clone();
                    for kind in &kinds {
                        stream.reconcile(*kind, &all).await;
                    }
                }
            }
        }
    }

    async fn certify(&self, (): (), request: CertificateRequest) -> Result<Vec<String>, Refused> {
        let allowed = request.identity.ends_with("/sa/web");
        *self.asked_for.lock().unwrap() = Some(request);
        match allowed {
            true => Ok(vec!["leaf".to_owned(), "root".to_owned()]),
            false => Err(Refused::BadRequest("no such pod runs there".to_owned())),
        }
    }

    async fn captures(&self, (): (), mut stream: CaptureStream) -> Result<(), Refused> {
        while let Some(report) = stream.next().await {
            self.reported.send_replace(report);
            stream.confirm().await;
        }
        Ok(())
    }

    fn turned_away(&self, address: SocketAddr, because: TurnedAway) {
        self.turned_away.send_modify(|turned_away| turned_away.push((address, because)));
    }
}

/// A running control plane.
pub(crate) struct Running {
    pub(crate) control: Arc<Control>,
    pub(crate) address: SocketAddr,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Running {
    pub(crate) async fn start(authority: &Authority) -> Self {
        Self::start_as(authority, CONTROL).await
    }

    pub(crate) async fn start_as(authority: &Authority, id: &str) -> Self {
        Self::start_with(authority, id, Bounds::within(1024)).await
    }

    pub(crate) async fn start_with(authority: &Authority, id: &str, bounds: Bounds) -> Self {
        let control = Arc::new(Control {
            resources: watch::Sender::new(Vec::new()),
            heard: watch::Sender::new(Vec::new()),
            reported: watch::Sender::new(Report::default()),
            asked_for: Mutex::new(None),
            turned_away: watch::Sender::new(Vec::new()),
            reviews: watch::Sender::new(true),
            revoked: Mutex::new(false),
            asked: watch::Sender::new(0),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let config = tls::control_server_config(&authority.svid(id), clock());
        let (stop, stopped) = oneshot::channel();
        let handler = control.clone();
        let task = tokio::spawn(async move {
            let shutdown = async {
                let _ = stopped.await;
            };
            serve(listener, move || config.clone(), handler, shutdown, Duration::ZERO, bounds).await
        });
        Self { control, address, stop, task }
    }

    /// Waits until it has heard a number of things, and returns them.
    pub(crate) async fn heard(&self, count: usize) -> Vec<Asked> {
        let mut heard = self.control.heard.subscribe();
        heard.wait_for(|heard| heard.len() >= count).await.unwrap().clone()
    }

    /// Waits until somebody was turned away, of whom something holds.
    pub(crate) async fn turned_away(&self, holds: impl Fn(&(SocketAddr, TurnedAway)) -> bool) {
        self.turned_away_after(0, holds).await;
    }

    /// The same, of those who came after so many.
    pub(crate) async fn turned_away_after(&self, before: usize, holds: impl Fn(&(SocketAddr, TurnedAway)) -> bool) {
        let mut turned_away = self.control.turned_away.subscribe();
        let holds = turned_away.wait_for(|all| all.iter().skip(before).any(&holds));
        tokio::time::timeout(Duration::from_secs(20), holds).await.expect("nobody is turned away like that").unwrap();
    }

    pub(crate) fn publish(&self, resources: Vec<Published>) {
        self.control.resources.send_replace(resources);
    }

    /// Stops it, and waits until it has.
    pub(crate) async fn stop(self) {
        let _ = self.stop.send(());
        self.task.await.unwrap().unwrap();
    }
}

/// The kinds that a proxy subscribes to.
pub(crate) const KINDS: &[Kind] = &[Kind::Address, Kind::Policy, Kind::Bundle, Kind::Settings];
