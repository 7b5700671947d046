//! The process: in which order it starts, what wakes it, and what it does then.

mod record;
mod start;

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
use tokio::select;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tracing::{error, info, warn};

use self::record::Record;
pub(crate) use self::record::Report;
use self::start::Replica;
use crate::Args;
use crate::admin::Dump;
use crate::ca::token::Tokens;
use crate::ca::{Application, Certifier, Refused};
use crate::clock::Clock;
use crate::index::{self, Index, Told};
use crate::kubernetes::Failure;
use crate::leaving::Leaving;
use crate::metrics::Metrics;
use crate::nodes::Nodes;
use crate::probes::Probes;
use crate::problem::Problem;
use crate::publication::Publication;
use crate::server::Crowd;
use crate::watch::Batch;

/// Threads: one for the index, and one for streams beside it.
const WORKERS: usize = 2;
/// Events that may wait. Whoever sends more waits, too.
const QUEUE: usize = 1024;
/// How long it takes until those who route to ready replicas have seen that this one is none any more.
const UNREADY: Duration = Duration::from_secs(3);
/// The longest sleep before the time of day is looked at again: it can be set while we sleep.
const LOOK_AT_CLOCK: Duration = Duration::from_secs(30);

/// How long after a change it is looked at what is wrong: each look is at everything that is, however little changed.
const LOOK_AT_PROBLEMS: Duration = Duration::from_millis(200);
/// How often it is looked for records of captured pods that are gone.
const LOOK_AROUND: Duration = Duration::from_secs(10);

/// All that can wake the owner of the index.
#[derive(Debug)]
pub(crate) enum Event {
    /// The source of objects says something. It says no more before this was taken in: the objects of a large cluster, in a
    /// queue, would fill the memory.
    Objects(Batch, OwnedSemaphorePermit),
    /// An agent says what its node has captured and what it cannot: all of it.
    Captured(Report),
    /// A node's record of captured pods was written, or not yet.
    Written {
        /// The node.
        node: String,
        /// Why not yet.
        failure: Option<Failure>,
    },
    /// A token is a pod's, and nobody else says of which node.
    NodeOfPod {
        /// The pod.
        pod: PodUid,
        /// Told its node, if it is known.
        answer: oneshot::Sender<Option<String>>,
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
    /// It may be time for a new certificate of our own, or to let go of pods that leave.
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
        let mut stop = Box::pin(async move {
            select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        });
        // To wait for an API server may take long, and is no reason to stay.
        let control = select! {
            control = Control::start(&args, Clock::default()) => control?,
            () = &mut stop => return Ok(()),
        };
        let events = control.sender.clone();
        tokio::spawn(async move {
            stop.await;
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
    record: Record,
    leaving: Leaving,
    nodes: Nodes,
    started: Instant,
    /// What is shared with other replicas, where there are any.
    replica: Option<Replica>,
    probes: Probes,
    /// Whether nodes may know more than this process was started with.
    follows: bool,
    tokens: Arc<Tokens>,
    crowd: Arc<Crowd>,
    metrics: Arc<Metrics>,
    clock: Clock,
    /// What is wrong with the source of objects.
    source_problems: Vec<Problem>,
    /// Whether changes of objects may be missing here.
    behind: bool,
    /// What was wrong when it was last looked at, so that each problem is logged once.
    logged: BTreeSet<Problem>,
    /// When to look next, if anything may be different.
    looks_at_problems: Option<Instant>,
    own: Svid,
    looks_around: Instant,
    jitter: f64,
    failures: u32,
    leaf_validity: Duration,
    tls: watch::Sender<Arc<ServerConfig>>,
    events: mpsc::Receiver<Event>,
    sender: mpsc::Sender<Event>,
    /// Where nodes are served.
    address: SocketAddr,
    /// The server ends when this is dropped.
    alive: Option<watch::Sender<()>>,
    /// When that is to be, once it is known.
    ends: Option<Instant>,
    serving: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Control {
    /// Does what each event asks for, until the last one.
    ///
    /// # Errors
    /// The server ended by itself.
    pub(crate) async fn run(mut self) -> Result<()> {
        info!(address = %self.address, workloads = self.index.views().workloads.len(), "serving");
        loop {
            let look = self.looks_around.min(Instant::now() + self.until_renewal());
            let look = self.leaving.next_look().into_iter().chain(self.looks_at_problems).fold(look, Instant::min);
            let event = select! {
                event = self.events.recv() => event.unwrap_or(Event::Terminate),
                ended = &mut self.serving => {
                    ended.context("serving nodes failed")?.context("serving nodes failed")?;
                    return if self.alive.is_none() { Ok(()) } else { Err(anyhow!("serving nodes ended")) };
                }
                () = sleep_until(self.ends.unwrap_or(look)), if self.ends.is_some() => Event::Terminate,
                () = sleep_until(look) => Event::LookAtClock,
            };
            match event {
                Event::Objects(batch, _turn) => self.take(batch),
                Event::Captured(report) => self.captured(report),
                Event::Written { node, failure } => {
                    if let Record::Shared(shared) = &mut self.record {
                        shared.written(&node, failure);
                    }
                    self.problems_may_differ();
                }
                Event::NodeOfPod { pod, answer } => {
                    let _ = answer.send(self.index.node_of(&pod).map(str::to_owned));
                }
                Event::Certify { application, answer } => {
                    let runs_there = self.index.runs_on(&application.node, &application.id);
                    let _ = answer.send(self.certifier.certify(&application, runs_there));
                }
                // Who asked may have gone while it waited.
                Event::Dump { answer } if answer.is_closed() => {}
                Event::Dump { answer } => {
                    let _ = answer.send(self.dump());
                }
                Event::LookAtClock => {
                    self.renew_own();
                    self.let_go();
                }
                Event::Terminate => self.end(),
            }
            if Instant::now() >= self.looks_around {
                self.looks_around = Instant::now() + LOOK_AROUND;
                self.look_around();
            }
            if self.looks_at_problems.is_some_and(|look| Instant::now() >= look) {
                self.looks_at_problems = None;
                self.log_problems();
                if let Some(replica) = &mut self.replica {
                    replica.tell_pods(&self.index, &self.nodes);
                }
            }
        }
    }

    /// Ends in order. Where there are other replicas, nodes are sent to them before streams end, and whoever is still here is
    /// served meanwhile; asked a second time, streams end at once.
    fn end(&mut self) {
        self.probes.end();
        match (&mut self.replica, self.ends) {
            (Some(replica), None) => {
                info!("ending: no new nodes are to come");
                replica.let_go();
                self.ends = Some(Instant::now() + UNREADY);
            }
            _ => {
                info!("ending");
                (self.ends, self.alive) = (None, None);
            }
        }
    }

    fn take(&mut self, mut batch: Batch) {
        // Whose reports may be confirmed by it: to look at all that wait, for each change, would cost their square.
        let (mut touched, mut nodes) = (index::Touched::new(), BTreeSet::new());
        if let Record::Shared(shared) = &mut self.record {
            (touched, nodes) = shared.take_in(&batch.changes, &mut self.index);
            if batch.behind {
                shared.forget_missing();
            }
        }
        touched.extend(take_in(&mut self.index, &mut batch, &self.metrics));
        nodes.extend(touched.iter().filter_map(|told| match told {
            Told::NodePod(node, _) => Some(node.clone()),
            _ => None,
        }));
        self.publish(touched);
        self.publication.withhold(withheld(self.follows, &batch));
        self.publication.reach(batch.positions);
        self.behind = batch.behind;
        self.source_problems = batch.problems;
        if let Some(replica) = &self.replica {
            replica.tell_policies(&self.index, &batch.of_policies, batch.conditions);
        }
        nodes.iter().for_each(|node| self.confirm(node));
        self.problems_may_differ();
    }

    /// An agent says what its node has captured, and what it cannot.
    fn captured(&mut self, mut report: Report) {
        // In a box there is no API server where owners of pods would look.
        if let Some(replica) = &mut self.replica {
            replica.failed(&report.node, std::mem::take(&mut report.failed));
        }
        match &mut self.record {
            Record::Shared(shared) => {
                let node = report.node.clone();
                shared.report(report, &self.index);
                self.confirm(&node);
            }
            Record::File(_) => self.publish_captured(report),
        }
        self.problems_may_differ();
    }

    /// Confirms the reports of a node that every replica can read by now.
    fn confirm(&mut self, node: &str) {
        let Record::Shared(shared) = &mut self.record else { return };
        for report in shared.confirmed(node, &self.index) {
            self.publish_captured(report);
        }
    }

    fn publish_captured(&mut self, report: Report) {
        let touched = self.index.captured(&report.node, report.pods);
        self.publish(touched);
        // An agent that is gone needs no answer.
        let _ = report.published.send(());
    }

    /// What is looked at now and then.
    fn look_around(&mut self) {
        let leads = self.replica.as_ref().is_some_and(Replica::leads);
        self.metrics.leader.set(i64::from(leads));
        if let Record::Shared(shared) = &mut self.record
            && leads
            && !self.behind
        {
            shared.tidy(&self.index, self.clock.monotonic());
        }
        self.problems_may_differ();
    }

    fn publish(&mut self, touched: index::Touched) {
        let taken_back = self.index.taken_back();
        match &mut self.record {
            Record::File(captures) => {
                let workloads = &self.index.views().workloads;
                let touched_workloads = touched.iter().filter_map(|told| match told {
                    Told::Workload(uid) => workloads.get(uid),
                    _ => None,
                });
                // On disk before anybody is told.
                let captured = touched_workloads.filter(|workload| workload.speaks == Speaks::JustMtls);
                captures.add(captured.map(|workload| (workload.node.to_string(), workload.pod_uid.clone())));
                captures.forget(&taken_back);
            }
            Record::Shared(shared) => {
                let here = |place: &&(String, PodUid)| self.nodes.serves_agent_of(&place.0);
                shared.take_out(taken_back.iter().filter(here));
                shared.put_back(self.index.unrecorded().iter().filter(here));
            }
        }
        self.metrics.published.inc_by(touched.len() as u64);
        self.publication.publish(self.index.views(), touched);
        self.leaving.note(self.index.moved(), self.publication.number());
    }

    /// Releases pods that leave, where all peers know it.
    fn let_go(&mut self) {
        // What is known here may not be all that decides it.
        let is_due = self.leaving.next_look().is_some_and(|look| Instant::now() >= look);
        if !is_due || self.publication.withheld().is_some() {
            return;
        }
        let lifetime = self.index.views().settings.view_lifetime;
        let knows = |change, ago| self.nodes.know((change, ago), self.index.nodes(), self.started, lifetime);
        let due = self.leaving.due(knows);
        // A pod that the record still has would count as captured after a restart.
        let due = match &mut self.record {
            Record::File(captures) => {
                let forgotten = captures.forget(&due);
                due.into_iter().filter(|_| forgotten).collect()
            }
            Record::Shared(shared) => {
                let here = due.into_iter().filter(|(node, _)| self.nodes.serves_agent_of(node)).collect();
                shared.forget(here)
            }
        };
        if due.is_empty() {
            return;
        }
        for (node, pod) in &due {
            info!(node, %pod, "released: its peers know that it is not captured any more");
        }
        let touched = self.index.release(due);
        self.publish(touched);
    }

    /// Everything that is wrong, wherever it was found.
    fn problems(&self) -> BTreeSet<Problem> {
        let elsewhere = self.tokens.problem().into_iter().chain(self.certifier.authority().problem(self.clock.now()));
        let elsewhere = elsewhere.chain(self.record.problems());
        let elsewhere = elsewhere.chain(self.replica.iter().flat_map(Replica::problems));
        let withheld = self.publication.withheld().map(|because| Problem::error("the control plane", because));
        let elsewhere = elsewhere.chain(withheld).chain(self.crowd.problems(self.clock.monotonic()));
        self.index.problems().into_iter().chain(&self.source_problems).cloned().chain(elsewhere).collect()
    }

    fn problems_may_differ(&mut self) {
        self.looks_at_problems.get_or_insert_with(|| Instant::now() + LOOK_AT_PROBLEMS);
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
                self.jitter = wire::dice::fraction();
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
fn take_in(index: &mut Index, batch: &mut Batch, metrics: &Metrics) -> index::Touched {
    metrics.changes.inc_by(batch.changes.len() as u64);
    let mut touched = index.apply(batch.changes.drain(..));
    touched.extend(index.unreadable(&batch.unreadable));
    touched
}
