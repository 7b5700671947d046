//! The process: in which order it starts, what wakes it, and what it does then.

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use identity::lifecycle::{self, Next};
use identity::{Svid, tls};
use mesh::{PodUid, Speaks};
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::select;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tracing::{error, info, warn};

use crate::Args;
use crate::admin::{self, Dump, Shown};
use crate::ca::authority::{self, Authority};
use crate::ca::token::Tokens;
use crate::ca::{Application, Certifier, Refused};
use crate::captures::Captures;
use crate::clock::Clock;
use crate::index::{self, Index, Told};
use crate::metrics::Metrics;
use crate::nodes::Nodes;
use crate::problem::Problem;
use crate::publication::Publication;
use crate::server::Served;
use crate::watch::{Batch, Folder};

/// Threads: one for the index, and one for streams beside it.
const WORKERS: usize = 2;
/// Events that may wait. Whoever sends more waits, too.
const QUEUE: usize = 1024;
/// The longest sleep before the time of day is looked at again: it can be set while we sleep.
const LOOK_AT_CLOCK: Duration = Duration::from_secs(30);

/// All that can wake the owner of the index.
#[derive(Debug)]
pub(crate) enum Event {
    /// The source of objects says something.
    Objects(Batch),
    /// An agent says what its node has captured: all of it.
    Captured {
        /// The agent's node.
        node: String,
        /// The pods.
        pods: BTreeSet<PodUid>,
        /// Told once peers can know.
        published: oneshot::Sender<()>,
    },
    /// A proxy asks for a certificate.
    Certify {
        /// What has passed the other checks.
        application: Application,
        /// Told what became of it.
        answer: oneshot::Sender<Result<Vec<String>, Refused>>,
    },
    /// Somebody looks at everything.
    Dump {
        /// Told all of it.
        answer: oneshot::Sender<Dump>,
    },
    /// It may be time for a new certificate of our own.
    LookAtClock,
    /// The process is to end.
    Terminate,
}

/// Runs the control plane until it is told to end.
///
/// # Errors
/// One sentence for what is wrong with a file, a folder, an address or a socket that it was given.
pub fn run(args: Args) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build()
        .context("cannot start the control plane's threads")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
        let control = Control::start(&args, Clock::default()).await?;
        let events = control.sender.clone();
        tokio::spawn(async move {
            select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            let _ = events.send(Event::Terminate).await;
        });
        let ended = control.run().await;
        let _ = std::fs::remove_file(&args.admin);
        ended
    })
}

/// The owner of the index.
pub(crate) struct Control {
    index: Index,
    publication: Arc<Publication>,
    certifier: Arc<Certifier>,
    captures: Captures,
    /// Whether nodes may know more than this process was started with.
    follows: bool,
    tokens: Arc<Tokens>,
    metrics: Arc<Metrics>,
    clock: Clock,
    /// What is wrong with the source of objects.
    source_problems: Vec<Problem>,
    /// What was wrong when it was last looked at, so that each problem is logged once.
    logged: BTreeSet<Problem>,
    own: Svid,
    jitter: f64,
    failures: u32,
    leaf_validity: Duration,
    tls: watch::Sender<Arc<ServerConfig>>,
    events: mpsc::Receiver<Event>,
    sender: mpsc::Sender<Event>,
    /// Where nodes are served.
    address: SocketAddr,
    /// The server ends when this is dropped.
    alive: watch::Sender<()>,
    serving: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Control {
    /// Reads everything that there is, and only then serves.
    pub(crate) async fn start(args: &Args, clock: Clock) -> Result<Self> {
        let tokens = Tokens::open(&args.tokens).with_context(|| format!("{} (--tokens)", args.tokens.display()))?;
        let (folder, first) = Folder::open(&args.objects)?;
        let trust_domain = index::trust_domain(folder.objects()).map_err(|problem| anyhow!("{problem}"))?;
        let follows = Authority::is_in(&args.ca);
        let authority = Authority::open(&args.ca, &trust_domain, clock.now())?;
        let own = authority.own_svid(clock.now(), args.leaf_validity)?;
        authority::publish(authority.bundle(), &args.publish_bundle)?;

        let metrics = Arc::new(Metrics::new());
        let mut captures = Captures::open(&args.ca)?;
        let mut index = Index::new(trust_domain);
        index.remember(captures.all());
        take_in(&mut index, &first, &metrics);
        if first.unlisted.is_empty() {
            captures.retain(|(node, uid)| index.has_pod(node, uid))?;
        }
        let publication = Arc::new(Publication::new(authority.bundle(), index.views()));
        publication.withhold(withheld(follows, &first));
        let certifier = Arc::new(Certifier::new(authority, args.leaf_validity, clock.clone()));
        let tokens = Arc::new(tokens);
        let nodes = Nodes::default();
        let (sender, events) = mpsc::channel(QUEUE);
        let (tls, _) = watch::channel(tls::control_server_config(&own, Arc::new(clock.clone())));

        let listener = TcpListener::bind(args.listen).await;
        let listener = listener.with_context(|| format!("cannot listen on {} (--listen)", args.listen))?;
        let address = listener.local_addr().context("cannot read the address that is listened on")?;
        let served = Served {
            publication: publication.clone(),
            certifier: certifier.clone(),
            tokens: tokens.clone(),
            nodes: nodes.clone(),
            metrics: metrics.clone(),
            clock: clock.clone(),
            events: sender.clone(),
        };
        let config = tls.subscribe();
        let (alive, mut ending) = watch::channel(());
        let shutdown = async move {
            // The owner of the index is gone when the sender is.
            while ending.changed().await.is_ok() {}
        };
        let served = wire::server::serve(listener, move || config.borrow().clone(), Arc::new(served), shutdown);
        let serving = tokio::spawn(served);
        admin::serve(
            &args.admin,
            Arc::new(Shown {
                events: sender.clone(),
                nodes,
                publication: publication.clone(),
                metrics: metrics.clone(),
            }),
        )
        .with_context(|| format!("cannot listen on {} (--admin)", args.admin.display()))?;
        tokio::spawn(follow(folder, sender.clone()));
        let mut control = Self {
            index,
            publication,
            certifier,
            captures,
            follows,
            tokens,
            metrics,
            clock,
            source_problems: first.problems,
            logged: BTreeSet::new(),
            own,
            jitter: jitter(),
            failures: 0,
            leaf_validity: args.leaf_validity,
            tls,
            events,
            sender,
            address,
            alive,
            serving,
        };
        control.log_problems();
        Ok(control)
    }

    /// Does what each event asks for, until the last one.
    ///
    /// # Errors
    /// The server ended by itself.
    pub(crate) async fn run(mut self) -> Result<()> {
        info!(address = %self.address, workloads = self.index.views().workloads.len(), "serving");
        loop {
            let look = Instant::now() + self.until_renewal();
            let event = select! {
                event = self.events.recv() => event.unwrap_or(Event::Terminate),
                ended = &mut self.serving => {
                    ended.context("serving nodes failed")?.context("serving nodes failed")?;
                    return Err(anyhow!("serving nodes ended"));
                }
                () = sleep_until(look) => Event::LookAtClock,
            };
            match event {
                Event::Objects(batch) => self.take(batch),
                Event::Captured { node, pods, published } => {
                    let touched = self.index.captured(&node, pods);
                    self.publish(touched);
                    self.log_problems();
                    // An agent that is gone needs no answer.
                    let _ = published.send(());
                }
                Event::Certify { application, answer } => {
                    let runs_there = self.index.runs_on(&application.node, &application.id);
                    let _ = answer.send(self.certifier.certify(&application, runs_there));
                }
                Event::Dump { answer } => {
                    let _ = answer.send(self.dump());
                }
                Event::LookAtClock => self.renew_own(),
                Event::Terminate => break,
            }
        }
        info!("ending");
        drop(self.alive);
        self.serving.await.context("serving nodes failed")?.context("serving nodes failed")
    }

    fn take(&mut self, batch: Batch) {
        let touched = take_in(&mut self.index, &batch, &self.metrics);
        self.publish(touched);
        self.publication.withhold(withheld(self.follows, &batch));
        self.source_problems = batch.problems;
        self.log_problems();
    }

    fn publish(&mut self, touched: index::Touched) {
        let workloads = &self.index.views().workloads;
        let touched_workloads = touched.iter().filter_map(|told| match told {
            Told::Workload(uid) => workloads.get(uid),
            _ => None,
        });
        // On disk before anybody is told.
        let captured = touched_workloads.filter(|workload| workload.speaks == Speaks::JustMtls);
        self.captures.add(captured.map(|workload| (workload.node.to_string(), workload.pod_uid.clone())));
        self.metrics.published.inc_by(touched.len() as u64);
        self.publication.publish(self.index.views(), touched);
    }

    /// Everything that is wrong, wherever it was found.
    fn problems(&self) -> BTreeSet<Problem> {
        let elsewhere = self.tokens.problem().into_iter().chain(self.certifier.authority().problem(self.clock.now()));
        let elsewhere = elsewhere.chain(self.captures.problem());
        let withheld = self.publication.withheld().map(|because| Problem::error("the control plane", because));
        let elsewhere = elsewhere.chain(withheld);
        self.index.problems().into_iter().chain(&self.source_problems).cloned().chain(elsewhere).collect()
    }

    fn log_problems(&mut self) {
        let problems = self.problems();
        for problem in problems.difference(&self.logged) {
            warn!(subject = %problem.subject, "{}", problem.message);
        }
        self.logged = problems;
    }

    fn dump(&self) -> Dump {
        let views = self.index.views();
        Dump {
            workloads: views.workloads.values().cloned().collect(),
            services: views.services.values().cloned().collect(),
            policies: views.policies.values().cloned().collect(),
            settings: views.settings.clone(),
            problems: self.problems().into_iter().collect(),
            nodes: self.index.nodes().map(str::to_owned).collect(),
        }
    }

    /// How long the own certificate can be left alone.
    fn until_renewal(&self) -> Duration {
        if self.failures > 0 {
            return lifecycle::retry_after(self.failures, self.jitter);
        }
        let now = self.clock.now();
        match lifecycle::next(self.own.validity(), now, self.jitter) {
            Next::Wait { until } => Duration::from_secs(until.as_secs().saturating_sub(now.as_secs()))
                .clamp(Duration::from_millis(500), LOOK_AT_CLOCK),
            Next::Renew | Next::Expired => Duration::ZERO,
        }
    }

    /// Renews the own certificate if it is time. One that cannot be had leaves the one before in use.
    fn renew_own(&mut self) {
        let now = self.clock.now();
        if matches!(lifecycle::next(self.own.validity(), now, self.jitter), Next::Wait { .. }) {
            return;
        }
        match self.certifier.authority().own_svid(now, self.leaf_validity) {
            Ok(svid) => {
                self.tls.send_replace(tls::control_server_config(&svid, Arc::new(self.clock.clone())));
                info!(not_after = svid.not_after().as_secs(), "renewed the control plane's own certificate");
                self.own = svid;
                self.jitter = jitter();
                self.failures = 0;
            }
            Err(problem) => {
                self.failures = self.failures.saturating_add(1);
                error!(%problem, "cannot renew the control plane's own certificate");
            }
        }
    }
}

/// Why nodes are told nothing, where that is so (T10). They may know, from the control plane before this one, what a file
/// said that cannot be read now: to tell them of a mesh without it would take it away from them, and a strict mode with it.
/// They keep what they know, and get certificates for pods that are known here.
fn withheld(follows: bool, batch: &Batch) -> Option<String> {
    let files: Vec<&str> = batch.unlisted.iter().map(String::as_str).collect();
    (follows && !files.is_empty()).then(|| {
        format!(
            "nodes are told nothing and keep what they know, because {} could not be read since the start; mend or remove {}",
            files.join(", "),
            if files.len() == 1 { "it" } else { "them" }
        )
    })
}

/// Applies a batch to the index.
fn take_in(index: &mut Index, batch: &Batch, metrics: &Metrics) -> index::Touched {
    metrics.changes.inc_by(batch.changes.len() as u64);
    let mut touched: index::Touched = batch.changes.iter().flat_map(|change| index.apply(change.clone())).collect();
    touched.extend(index.unreadable(&batch.unreadable));
    touched
}

/// Passes on what the folder says.
async fn follow(mut folder: Folder, events: mpsc::Sender<Event>) {
    loop {
        let batch = folder.next().await;
        if events.send(Event::Objects(batch)).await.is_err() {
            return;
        }
    }
}

/// Between 0 and 1. Spreads renewals, and needs to be no secret: the process's own random hash seed will do.
fn jitter() -> f64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0_u8) as f64 / u64::MAX as f64
}
