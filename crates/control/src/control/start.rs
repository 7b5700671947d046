//! In which order the process starts: everything is read before anybody is served.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use identity::{TrustDomain, tls};
use kube::{Api, Client};
use manifests::ObjectKey;
use manifests::k8s_openapi::api::core::v1::ConfigMap;
use mesh::PodUid;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};
use wire::report::CaptureFailure;

use super::record::{Record, Shared};
use super::{Control, Event, QUEUE, take_in, withheld};
use crate::admin::{self, Shown};
use crate::ca::Certifier;
use crate::ca::authority::{self, Authority};
use crate::ca::token::{FileTokens, NodeOfPod, Reviews, Tokens};
use crate::captures::Captures;
use crate::clock::Clock;
use crate::index::{self, Index};
use crate::kubernetes::history::History;
use crate::kubernetes::lease::Election;
use crate::kubernetes::status::{self, Condition, Conditions, Statuses};
use crate::kubernetes::{self, duties, pause, pod_events, secret};
use crate::leaving::Leaving;
use crate::metrics::Metrics;
use crate::nodes::Nodes;
use crate::probes::Probes;
use crate::problem::Problem;
use crate::publication::Publication;
use crate::refusals::Refusals;
use crate::server::{self, Crowd, Served};
use crate::uncaptured::{Failures, Uncapturables};
use crate::watch::{Batch, Folder, Kubernetes, Source};
use crate::{Args, Files, ROOT_NAMESPACE, SETTINGS_NAME};

/// Over which time the streams of a replica that ends are ended: their nodes go to another one, and not all at once.
const SPREAD: Duration = Duration::from_secs(5);

/// What this process has in common with other replicas.
pub(super) struct Replica {
    leads: watch::Receiver<bool>,
    statuses: watch::Sender<Statuses>,
    failures: Failures,
    uncaptured: watch::Sender<Uncapturables>,
    /// Of the duties, and of what pods are told.
    problems: [watch::Receiver<Vec<Problem>>; 2],
    /// The election ends when this is dropped.
    alive: Option<watch::Sender<()>>,
}

impl Replica {
    pub(super) fn leads(&self) -> bool {
        *self.leads.borrow()
    }

    pub(super) fn problems(&self) -> Vec<Problem> {
        self.problems.iter().flat_map(|problems| problems.borrow().clone()).collect()
    }

    /// Passes on what policies are to be told about themselves, and what they say already.
    pub(super) fn tell_policies(&self, index: &Index, read: &BTreeMap<ObjectKey, Vec<Problem>>, there: Conditions) {
        let mut wanted = index.problems_of_policies();
        for (key, problems) in read {
            wanted.entry(key.clone()).or_default().extend(problems);
        }
        let wanted = wanted.into_iter().filter_map(|(key, problems)| Some((key, Condition::of(&problems)?))).collect();
        kubernetes::tell(&self.statuses, Statuses { wanted, there });
    }

    /// Takes in what an agent cannot capture.
    pub(super) fn failed(&mut self, node: &str, failed: BTreeMap<PodUid, CaptureFailure>) {
        self.failures.reported(node, failed);
    }

    /// Passes on of which pods their owners are to be told that they cannot be captured.
    pub(super) fn tell_pods(&mut self, index: &Index, nodes: &Nodes) {
        kubernetes::tell(&self.uncaptured, self.failures.all(index, nodes));
    }

    /// Lets another replica lead.
    pub(super) fn let_go(&mut self) {
        self.alive = None;
    }
}

/// What both sources come to.
struct Begun {
    source: Source,
    /// What was said last while everything was read.
    first: Batch,
    index: Index,
    certifier: Arc<Certifier>,
    record: Record,
    tokens: Tokens,
    /// Whether nodes may know more than this process was started with.
    follows: bool,
    replica: Option<Replica>,
    /// The API server's, where there is one.
    history: Option<History>,
}

/// What both need.
struct Beginning<'a> {
    args: &'a Args,
    clock: &'a Clock,
    metrics: &'a Arc<Metrics>,
    sender: &'a mpsc::Sender<Event>,
}

impl Control {
    /// Reads everything that there is, and only then serves.
    pub(crate) async fn start(args: &Args, clock: Clock) -> Result<Self> {
        let metrics = Arc::new(Metrics::new());
        let (sender, events) = mpsc::channel(QUEUE);
        let beginning = Beginning { args, clock: &clock, metrics: &metrics, sender: &sender };
        let probes = Probes::new();
        if let Some(address) = args.metrics {
            probes.listen(address).await?;
        }
        let begun = match args.source()? {
            crate::Source::Files(files) => beginning.with_files(&files)?,
            crate::Source::Kubernetes => {
                beginning.with_client(&kubernetes::connect(args.kubeconfig.as_deref()).await?).await?
            }
        };
        Self::serve(begun, args, clock, metrics, probes, sender, events).await
    }

    /// The same with an API server that is given.
    #[cfg(test)]
    pub(crate) async fn start_with(client: &Client, args: &Args, clock: Clock) -> Result<Self> {
        let metrics = Arc::new(Metrics::new());
        let (sender, events) = mpsc::channel(QUEUE);
        let beginning = Beginning { args, clock: &clock, metrics: &metrics, sender: &sender };
        let begun = beginning.with_client(client).await?;
        Self::serve(begun, args, clock, metrics, Probes::new(), sender, events).await
    }

    async fn serve(
        begun: Begun,
        args: &Args,
        clock: Clock,
        metrics: Arc<Metrics>,
        probes: Probes,
        sender: mpsc::Sender<Event>,
        events: mpsc::Receiver<Event>,
    ) -> Result<Self> {
        let Begun { source, first, index, certifier, record, tokens, follows, replica, history } = begun;
        let own = certifier.authority().own_svid(clock.now(), args.leaf_validity)?;
        let publication = Arc::new(Publication::new(certifier.authority().bundle(), index.views()));
        publication.withhold(withheld(follows, &first));
        publication.reach(first.positions);
        let tokens = Arc::new(tokens);
        let nodes = Nodes::default();
        let (tls, _) = watch::channel(tls::control_server_config(&own, Arc::new(clock.clone())));

        let listener = TcpListener::bind(args.listen).await;
        let listener = listener.with_context(|| format!("cannot listen on {} (--listen)", args.listen))?;
        let address = listener.local_addr().context("cannot read the address that is listened on")?;
        let crowd = Arc::new(Crowd::default());
        let served = Served {
            refusals: Refusals::default(),
            crowd: crowd.clone(),
            history,
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
        let spread = if replica.is_some() { SPREAD } else { Duration::ZERO };
        let (served, config) = (Arc::new(served), move || config.borrow().clone());
        let served = wire::server::serve(listener, config, served, shutdown, spread, server::bounds());
        let serving = tokio::spawn(served);
        let shown = Arc::new(Shown {
            events: sender.clone(),
            nodes: nodes.clone(),
            publication: publication.clone(),
            metrics: metrics.clone(),
        });
        admin::serve(&args.admin, shown.clone())
            .with_context(|| format!("cannot listen on {} (--admin)", args.admin.display()))?;
        tokio::spawn(follow(source, sender.clone()));
        probes.serve_nodes(shown);
        if let Some(replica) = &replica {
            replica.tell_policies(&index, &first.of_policies, first.conditions);
        }
        let mut control = Self {
            index,
            publication,
            certifier,
            record,
            leaving: Leaving::new(),
            nodes,
            started: Instant::now(),
            replica,
            probes,
            follows,
            tokens,
            crowd,
            metrics,
            clock,
            source_problems: first.problems,
            behind: first.behind,
            logged: BTreeSet::new(),
            looks_at_problems: None,
            own,
            looks_around: Instant::now(),
            jitter: wire::dice::fraction(),
            failures: 0,
            leaf_validity: args.leaf_validity,
            tls,
            events,
            sender,
            address,
            alive: Some(alive),
            ends: None,
            serving,
        };
        control.log_problems();
        Ok(control)
    }
}

impl Beginning<'_> {
    /// From the files of a cluster in a box.
    fn with_files(&self, files: &Files) -> Result<Begun> {
        let now = self.clock.now();
        let tokens =
            FileTokens::open(&files.tokens).with_context(|| format!("{} (--tokens)", files.tokens.display()))?;
        let (folder, mut first) = Folder::open(&files.objects)?;
        let trust_domain = index::trust_domain(folder.objects()).map_err(|problem| anyhow!("{problem}"))?;
        let follows = Authority::is_in(&files.ca);
        let authority = Authority::open(&files.ca, &trust_domain, now)?;
        authority::publish(authority.bundle(), &files.publish_bundle)?;
        let mut captures = Captures::open(&files.ca)?;
        let mut index = Index::new(trust_domain);
        index.remember(captures.all());
        take_in(&mut index, &mut first, self.metrics);
        if first.unlisted.is_empty() {
            captures.retain(|(node, uid)| index.has_pod(node, uid))?;
        }
        captures.forget(&index.taken_back());
        Ok(Begun {
            source: Source::Folder(folder),
            first,
            index,
            certifier: Arc::new(Certifier::new(authority, self.args.leaf_validity, self.clock.clone())),
            record: Record::File(captures),
            tokens: Tokens::File(tokens),
            follows,
            replica: None,
            history: None,
        })
    }

    /// From an API server. It is waited for, however long it takes.
    async fn with_client(&self, client: &Client) -> Result<Begun> {
        let election = Election::new(client, &self.args.identity, self.clock.clone());
        let leads = election.leads();
        let (alive, ending) = watch::channel(());
        tokio::spawn(election.run(ending));
        let trust_domain = trust_domain(client).await?;
        let authority = self.authority(client, &trust_domain, leads.clone()).await?;
        let certifier = Arc::new(Certifier::new(authority, self.args.leaf_validity, self.clock.clone()));

        let mut index = Index::with_record(trust_domain);
        let mut shared = Shared::new(client, self.sender.clone());
        let mut source = Kubernetes::follow(client, self.metrics);
        let mut first = Batch::default();
        let mut logged = BTreeSet::new();
        while !source.is_complete() {
            first = source.next().await;
            shared.take_in(&first.changes, &mut index);
            take_in(&mut index, &mut first, self.metrics);
            for problem in first.problems.iter().filter(|problem| logged.insert((*problem).clone())) {
                warn!(subject = %problem.subject, "{}", problem.message);
            }
        }

        let (problem_sender, problems) = watch::channel(Vec::new());
        let duties = duties::keep(client.clone(), certifier.clone(), self.clock.clone(), leads.clone(), problem_sender);
        tokio::spawn(duties);
        let (statuses, told) = watch::channel(Statuses::default());
        tokio::spawn(status::keep(client.clone(), self.clock.clone(), told, leads.clone()));
        let (uncaptured, told) = watch::channel(Uncapturables::new());
        let (problem_sender, problems_of_events) = watch::channel(Vec::new());
        tokio::spawn(pod_events::keep(client.clone(), self.clock.clone(), told, leads.clone(), problem_sender));
        let (problems, failures) = ([problems, problems_of_events], Failures::default());
        let nodes = NodeOfPod(self.sender.clone());
        let reviews = Reviews::new(client, nodes, self.clock.clone(), self.metrics.clone());
        Ok(Begun {
            source: Source::Kubernetes(source),
            first,
            index,
            certifier,
            record: Record::Shared(shared),
            tokens: Tokens::Reviewed(reviews),
            // Every list is whole here.
            follows: false,
            replica: Some(Replica { leads, statuses, failures, uncaptured, problems, alive: Some(alive) }),
            history: Some(History::new(client)),
        })
    }

    /// The authority that all replicas have; the one that leads makes it where there is none.
    async fn authority(
        &self,
        client: &Client,
        trust_domain: &TrustDomain,
        mut leads: watch::Receiver<bool>,
    ) -> Result<Authority> {
        let mut failures = 0;
        loop {
            let now = self.clock.now();
            let found = match secret::load(client, trust_domain, now).await {
                Ok(None) if *leads.borrow_and_update() => {
                    info!("there is no {} yet, and this replica makes it", secret::PLACE);
                    secret::make(client, trust_domain, now).await.map(Some)
                }
                found => found,
            };
            match found {
                Ok(Some(authority)) => return Ok(authority),
                Ok(None) => failures = 0,
                // What somebody must mend may be mended at any time; until then nobody is served under another authority.
                Err(error) => {
                    warn!("{error}");
                    failures += 1;
                }
            }
            tokio::select! {
                () = sleep(pause(failures)) => {}
                _ = leads.changed() => {}
            }
        }
    }
}

/// The trust domain that the settings name.
async fn trust_domain(client: &Client) -> Result<TrustDomain> {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), ROOT_NAMESPACE);
    let mut failures = 0;
    loop {
        match kubernetes::ask(api.get_opt(SETTINGS_NAME)).await {
            Ok(settings) => {
                let object = settings.map(manifests::Object::from);
                return index::trust_domain(object.iter()).map_err(|problem| anyhow!("{problem}"));
            }
            Err(failure) => {
                failures += 1;
                warn!(%failure, "the settings cannot be read; nobody is served before");
                sleep(pause(failures)).await;
            }
        }
    }
}

/// Passes on what the source says, one batch at a time.
async fn follow(mut source: Source, events: mpsc::Sender<Event>) {
    let turns = Arc::new(Semaphore::new(1));
    while let Ok(turn) = turns.clone().acquire_owned().await {
        let batch = source.next().await;
        if events.send(Event::Objects(batch, turn)).await.is_err() {
            return;
        }
    }
}
