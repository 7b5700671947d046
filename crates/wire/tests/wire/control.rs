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
use wire::server::{Caller, CaptureStream, CertificateRequest, DiscoveryStream, Handler, NoTls, Refused, serve};

use crate::pki::{Authority, clock};

pub(crate) const TOKEN: &str = "the-token-of-node-a";
pub(crate) const CONTROL: &str = "spiffe://cluster.local/ns/justmtls-system/sa/justmtls-control";

/// What it publishes and what it heard.
pub(crate) struct Control {
    pub(crate) resources: watch::Sender<Vec<Published>>,
    pub(crate) heard: watch::Sender<Vec<Asked>>,
    pub(crate) reported: watch::Sender<Report>,
    pub(crate) asked_for: Mutex<Option<CertificateRequest>>,
    pub(crate) strangers: watch::Sender<Vec<(SocketAddr, NoTls)>>,
}

impl Control {
    fn admit(caller: &Caller) -> Result<(), Refused> {
        assert_ne!(caller.address.port(), 0, "the caller's address is known");
        match caller.token == TOKEN {
            true => Ok(()),
            false => Err(Refused::UnknownCaller("this token is nobody's".to_owned())),
        }
    }
}

impl Handler for Control {
    async fn discovery(&self, caller: Caller, mut stream: DiscoveryStream) -> Result<(), Refused> {
        Self::admit(&caller)?;
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

    async fn certify(&self, caller: Caller, request: CertificateRequest) -> Result<Vec<String>, Refused> {
        Self::admit(&caller)?;
        let allowed = request.identity.ends_with("/sa/web");
        *self.asked_for.lock().unwrap() = Some(request);
        match allowed {
            true => Ok(vec!["leaf".to_owned(), "root".to_owned()]),
            false => Err(Refused::BadRequest("no such pod runs there".to_owned())),
        }
    }

    async fn captures(&self, caller: Caller, mut stream: CaptureStream) -> Result<(), Refused> {
        Self::admit(&caller)?;
        while let Some(report) = stream.next().await {
            self.reported.send_replace(report);
            stream.confirm().await;
        }
        Ok(())
    }

    fn stranger(&self, address: SocketAddr, because: NoTls) {
        self.strangers.send_modify(|strangers| strangers.push((address, because)));
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
        let control = Arc::new(Control {
            resources: watch::Sender::new(Vec::new()),
            heard: watch::Sender::new(Vec::new()),
            reported: watch::Sender::new(Report::default()),
            asked_for: Mutex::new(None),
            strangers: watch::Sender::new(Vec::new()),
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
            serve(listener, move || config.clone(), handler, shutdown, Duration::ZERO).await
        });
        Self { control, address, stop, task }
    }

    /// Waits until it has heard a number of things, and returns them.
    pub(crate) async fn heard(&self, count: usize) -> Vec<Asked> {
        let mut heard = self.control.heard.subscribe();
        heard.wait_for(|heard| heard.len() >= count).await.unwrap().clone()
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
