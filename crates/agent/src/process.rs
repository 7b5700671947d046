//! The process: what it is started with, in which order it starts, what wakes it, and how it ends.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use linux::channel::Channel;
use linux::privileges::{self, Capabilities, NET_ADMIN, SYS_ADMIN};
use mesh::PodUid;
use rustls::time_provider::DefaultTimeProvider;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep, sleep_until};
use wire::client::{ControlPlane, Role};
use wire::pods::CniResult;

use crate::admin::{self, Shown};
use crate::capture::Capture;
use crate::cluster;
use crate::cni::{self, Asked};
use crate::discovery::{self, Heard};
use crate::door::{Door, own_uid};
use crate::estate::{self, Predecessor};
use crate::failure::Failure;
use crate::keeper::Keeper;
use crate::node::Node;
use crate::pods::Request;
use crate::proxy::{self, Said};
use crate::running::{self, Seen};
use crate::verify::{self, Found};

/// What the agent is started with.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Name of the node that this agent runs on.
    #[arg(long)]
    pub node: String,
    /// Address of the control plane: IP, IP:PORT or `[IPv6]:PORT`.
    #[arg(long, value_parser = wire::client::control_address)]
    pub control: SocketAddr,
    /// File with the trust bundle, in PEM. It is read again at each connection to the control plane.
    #[arg(long)]
    pub bundle: PathBuf,
    /// File with the token that proves to the control plane which node this is.
    #[arg(long)]
    pub token: PathBuf,
    /// Unix socket for the node's proxy, which is made here.
    #[arg(long)]
    pub proxy_socket: PathBuf,
    /// The user that the node's proxy runs as: no other is let in.
    #[arg(long)]
    pub proxy_uid: u32,
    /// Unix socket for the container runtime, which is made here. It is root's.
    #[arg(long)]
    pub cni_socket: PathBuf,
    /// Unix socket for dumps and metrics, which is made here.
    #[arg(long)]
    pub admin: PathBuf,
    /// The user that listeners in pods belong to. No pod may run as it: a program of the same user could listen in their
    /// place.
    #[arg(long)]
    pub listener_owner: Option<u32>,
    /// Seconds that the container runtime waits for a pod to be captured.
    #[arg(long, default_value_t = 20)]
    pub cni_wait: u64,
    /// Address for metrics and probes: /metrics, /readyz, /livez.
    #[arg(long)]
    pub metrics: Option<SocketAddr>,
    /// What there is on a node of Kubernetes.
    #[command(flatten)]
    pub cluster: cluster::Args,
}

/// CAP_CHOWN: to give the proxy its socket, and listeners an owner.
const CHOWN: u32 = 0;
/// All that the agent keeps, each for a reason: namespaces are entered (SYS_ADMIN), rules, routes, marks and transparent
/// sockets are made there (NET_ADMIN), files change their owner (CHOWN).
const KEPT: Capabilities = Capabilities(1 << NET_ADMIN | 1 << SYS_ADMIN | 1 << CHOWN);

/// Threads for work that blocks. Kernel calls of some microseconds: many would only wait for the same locks.
const BLOCKING_THREADS: usize = 4;
/// Events that wait for the main thread; whoever has more waits.
const MOST_EVENTS: usize = 256;
/// The pause between two looks whether anybody has the place that was given away.
const STAND_BY: Duration = Duration::from_secs(1);
/// So long the next agent may take to come. A node's pod that is deleted has its next one at once, with the same image. Less than
/// the 30 s that kubelet gives besides the drain time.
const NEXT_COMES: Duration = Duration::from_secs(20);
/// The pause between two questions whether one comes at all.
const ASK_WHETHER: Duration = Duration::from_secs(3);
/// The pause before what failed is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// A message for the next agent, and the descriptors that go with it.
pub(crate) type Handed = (Vec<u8>, Vec<OwnedFd>);

/// All that can wake the main thread.
pub(crate) enum Event {
    /// The runtime asks, and waits.
    Asked(Request, Asked, oneshot::Sender<CniResult>),
    /// It has waited long enough.
    Overdue(Request),
    /// Another agent is to take this one's place, and asks for all that it needs.
    HandOver(oneshot::Sender<std::io::Result<Vec<Handed>>>),
    /// It has taken it, and this ends when that agent does.
    Succeeded(oneshot::Receiver<()>),
    /// A proxy says something, on the link of that number.
    Proxy(u64, Said),
    /// The control plane says something.
    ControlPlane(Heard),
    /// Listeners and routing of a pod are made, or not.
    Prepared(PodUid, u64, Result<Box<Capture>, Failure>),
    /// Rules of a pod were loaded, or not.
    Begun(PodUid, u64, Result<(), Failure>),
    /// A pod that leaves was looked at. `true`: nothing of it is left.
    Left(PodUid, u64, Result<bool, Failure>),
    /// A pod that is not to be captured was looked into: whether rules stand in it.
    LookedInto(PodUid, u64, Result<bool, Failure>),
    /// The connections of a pod that the runtime deletes have ended, or were waited for long enough.
    Ended {
        /// The runtime's request.
        request: Request,
        /// Which pod.
        pod: PodUid,
        /// Whether they have.
        ended: bool,
    },
    /// Something is wrong with these captures.
    Found(Vec<(PodUid, Found)>),
    /// All captures were looked at; something is wrong with these.
    Looked(Vec<(PodUid, Found)>),
    /// It is time to look at all captures.
    Look,
    /// It is time to try again what failed.
    Retry,
    /// The container runtime says which pods run.
    Seen(Seen),
    /// The process is to end.
    Terminate,
    /// No agent comes after this one: the DaemonSet is being deleted.
    NobodyComes,
}

struct Events<'a> {
    inbox: mpsc::Receiver<Event>,
    terminate: &'a mut Signal,
    retry: Interval,
    /// `None` while a look is under way.
    look: Option<Instant>,
    /// It was told to end, and waits until then for the next agent.
    ends: Option<Instant>,
}

impl Events<'_> {
    async fn next(&mut self) -> Event {
        let [look, ends] = [self.look, self.ends].map(|at| at.unwrap_or_else(Instant::now));
        let event = tokio::select! {
            biased;
            _ = self.terminate.recv() => Event::Terminate,
            () = sleep_until(ends), if self.ends.is_some() => Event::Terminate,
            () = sleep_until(look), if self.look.is_some() => Event::Look,
            _ = self.retry.tick() => Event::Retry,
            // The node holds a sender of its own.
            event = self.inbox.recv() => event.unwrap_or(Event::Terminate),
        };
        match event {
            Event::Look => self.look = None,
            Event::Looked(_) => self.look = Some(Instant::now() + verify::EVERY),
            _ => {}
        }
        event
    }
}

/// Runs the agent until it is told to end.
///
/// # Errors
/// What keeps it from starting, in one sentence.
pub fn run(args: Args) -> Result<()> {
    // Before the first thread: threads inherit what is left.
    drop_privileges()?;
    privileges::raise_descriptor_limit().context("cannot raise the limit of open descriptors")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .build()
        .context("cannot start the main thread's event queue")?;
    runtime.block_on(serve(args))
}

fn drop_privileges() -> Result<()> {
    let held = privileges::describe().context("cannot read the agent's own privileges")?;
    for (number, name) in [(NET_ADMIN, "NET_ADMIN"), (SYS_ADMIN, "SYS_ADMIN")] {
        ensure!(held.effective.has(number), "the agent needs CAP_{name} and does not have it; start it as root");
    }
    privileges::keep_only(KEPT).context("cannot give up the privileges that the agent does not need")?;
    privileges::no_new_privileges().context("cannot rule out new privileges")?;
    privileges::hide_memory().context("cannot rule out core dumps")
}

async fn serve(args: Args) -> Result<()> {
    let on_kubernetes = args.cluster.kubernetes;
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut estate = None;
    while let Some(mut place) = hold(&args, estate, &mut terminate).await? {
        if !on_kubernetes {
            break;
        }
        // Kubelet would start again what ends before it is told to. And a successor may go before it was of any use, with an
        // upgrade that is taken back: then the place is this one's again.
        tokio::select! {
            biased;
            _ = terminate.recv() => break,
            () = place.is_free(&args.cni_socket) => {}
        }
        tracing::warn!("the agent that had taken this one's place is gone; this one takes it back");
        // Its ports are free when this has ended.
        place.pages.shutdown().await;
        estate = Some(place.estate);
    }
    if on_kubernetes {
        // Named after this pod, and nobody else's.
        let _ = std::fs::remove_file(&args.admin);
    }
    // Rules stand, and the proxy has the listeners: pods that are captured notice nothing.
    tracing::info!("the agent ends");
    Ok(())
}

/// A place that another agent has taken.
struct Place {
    /// Ends when that agent does.
    taken: oneshot::Receiver<()>,
    /// What it was handed. Who waits in a listener waits for as long as this is kept.
    estate: Vec<Said>,
    /// Pages that say that this agent stands by.
    pages: JoinSet<io::Result<()>>,
}

impl Place {
    /// Waits until nobody has it.
    async fn is_free(&mut self, path: &Path) {
        let _ = (&mut self.taken).await;
        // It may be another than the one that took it, by now.
        while Channel::connect(path).is_ok() {
            sleep(STAND_BY).await;
        }
    }
}

/// Holds the node's place until this process is told to end, or another agent has taken it. `estate` is what this one had when
/// another took it before.
async fn hold(args: &Args, estate: Option<Vec<Said>>, terminate: &mut Signal) -> Result<Option<Place>> {
    let (events, inbox) = mpsc::channel(MOST_EVENTS);
    let inform = events.clone();
    let on_kubernetes = args.cluster.kubernetes;
    let shown = Arc::new(Shown::new(config(args), args.cluster.has_plugin(), on_kubernetes));
    let mut node = Node::new(args.listener_owner, events.clone(), shown.clone());
    if on_kubernetes {
        cluster::prepare(args).context("cannot prepare the folders of the agent's sockets")?;
    }

    // Before the doors are taken over: from then on whoever asks finds this agent, which must know all by then.
    let predecessor = Predecessor::ask(&args.cni_socket).await;
    let predecessor = predecessor.map(|(predecessor, estate)| {
        tracing::info!(messages = estate.len(), "another agent hands over");
        node.succeed(estate);
        predecessor
    });
    // What is handed over is newer.
    if let Some(estate) = estate.filter(|_| predecessor.is_none()) {
        node.succeed(estate);
    }

    let own = own_uid().context("cannot read the agent's own uid")?;
    let strangers = &shown.metrics.strangers;
    let proxies = Door::open(&args.proxy_socket, args.proxy_uid, vec![args.proxy_uid], strangers);
    let proxies = proxies.with_context(|| {
        let path = args.proxy_socket.display();
        format!("cannot make {path} (--proxy-socket) for uid {} (--proxy-uid)", args.proxy_uid)
    })?;
    let runtimes = Door::open(&args.cni_socket, own, vec![0, own], strangers)
        .with_context(|| format!("cannot make {} (--cni-socket)", args.cni_socket.display()))?;
    let mut pages = JoinSet::new();
    let dumps =
        admin::listen(&args.admin).with_context(|| format!("cannot make {} (--admin)", args.admin.display()))?;
    pages.spawn(admin::serve(dumps, shown.clone()));
    if let Some(address) = args.metrics {
        let listener = TcpListener::bind(address).await;
        let listener = listener.with_context(|| format!("cannot listen on {address} (--metrics)"))?;
        pages.spawn(admin::serve_metrics(listener, shown.clone()));
    }

    let place = ControlPlane {
        address: args.control,
        bundle_file: args.bundle.clone(),
        token_file: args.token.clone(),
        node: args.node.clone(),
        role: Role::Agent,
        time: Arc::new(DefaultTimeProvider),
    };
    let mut retry = interval(RETRY);
    retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut wake = Events { inbox, terminate, retry, look: Some(Instant::now()), ends: None };

    // They end with this set.
    let mut tasks = JoinSet::new();
    tasks.spawn(discovery::follow(place, node.reported(), node.settled(), events.clone()));
    tasks.spawn(proxy::serve(proxies, events.clone()));
    tasks.spawn(cni::serve(runtimes, Duration::from_secs(args.cni_wait), events.clone()));
    let keeper = args.cluster.keeper(&args.cni_socket, &shown)?;
    if let (Some(keeper), Some(folder)) = (keeper.clone(), args.cluster.cni_conf_dir.clone()) {
        let answers = node.answers();
        tasks.spawn(async move { keeper.keep(&folder, answers).await });
    }
    if on_kubernetes {
        let since = keeper.as_ref().map_or_else(|| watch::Sender::new(None).subscribe(), Keeper::since);
        let place = args.cluster.runtime(&args.cni_socket, since, node.wanted());
        tasks.spawn(running::follow(place, events));
    }
    // It is kept: the one before stands by for as long as the connection lasts.
    if let Some(predecessor) = &predecessor {
        predecessor.taken();
    }
    tracing::info!(node = args.node, "the agent runs");

    let taken = loop {
        match wake.next().await {
            Event::Asked(request, asked, reply) => node.asked(request, asked, reply),
            Event::Overdue(request) => node.overdue(request),
            Event::HandOver(reply) => {
                // The other agent may be gone already.
                let _ = reply.send(node.hand_over());
            }
            Event::Proxy(link, said) => node.said(link, said),
            Event::ControlPlane(heard) => node.heard(heard),
            Event::Seen(seen) => node.seen(seen),
            Event::Prepared(pod, attempt, outcome) => node.prepared(&pod, attempt, outcome),
            Event::Begun(pod, attempt, outcome) => node.begun(&pod, attempt, outcome),
            Event::Left(pod, attempt, outcome) => node.left(&pod, attempt, outcome),
            Event::LookedInto(pod, attempt, found) => node.looked_into(&pod, attempt, found),
            Event::Ended { request, pod, ended } => node.ended(request, &pod, ended),
            Event::Found(found) | Event::Looked(found) => node.found(found),
            Event::Look => node.look(),
            Event::Retry => node.retry(),
            Event::Succeeded(taken) => break Some(taken),
            // Whoever connects to a captured pod meanwhile waits in its listener, which is held here and goes to the next agent.
            Event::Terminate
                if on_kubernetes
                    && wake.ends.is_none()
                    && node.has_standing()
                    && !predecessor.as_ref().is_some_and(Predecessor::stands_by) =>
            {
                tracing::info!(seconds = NEXT_COMES.as_secs(), "told to end: the next agent is waited for");
                wake.ends = Some(Instant::now() + NEXT_COMES);
                let (cluster, inform) = (args.cluster.clone(), inform.clone());
                tasks.spawn(async move {
                    while !cluster.is_deleted().await {
                        sleep(ASK_WHETHER).await;
                    }
                    // When nobody listens any more the process ends.
                    let _ = inform.send(Event::NobodyComes).await;
                });
            }
            Event::Terminate | Event::NobodyComes => break None,
        }
    };
    if let Some(taken) = taken {
        tracing::info!("another agent has taken this one's place");
        if let Some(keeper) = &keeper {
            keeper.let_go();
        }
        tasks.shutdown().await;
        if wake.ends.is_some() {
            return Ok(None);
        }
        shown.stand_by();
        let estate = node.hand_over().and_then(estate::kept).context("cannot keep what was handed over")?;
        return Ok(Some(Place { taken, estate, pages }));
    }
    if let Some(keeper) = &keeper
        && args.cluster.leave(keeper, [&args.cni_socket, &args.proxy_socket, &args.admin], wake.ends.is_some()).await
    {
        node.end_leaving().await;
    }
    Ok(None)
}

fn config(args: &Args) -> serde_json::Value {
    json!({
        "node": args.node,
        "control": args.control,
        "bundle": args.bundle,
        "token": args.token,
        "proxy_socket": args.proxy_socket,
        "proxy_uid": args.proxy_uid,
        "cni_socket": args.cni_socket,
        "cni_wait": args.cni_wait,
        "admin": args.admin,
        "metrics": args.metrics,
        "listener_owner": args.listener_owner,
        "kubernetes": args.cluster.kubernetes,
        "cri_socket": args.cluster.cri_socket,
        "netns_dir": args.cluster.netns_dir,
        "cni_bin_dir": args.cluster.cni_bin_dir,
        "cni_conf_dir": args.cluster.cni_conf_dir,
        "cni_exempt": args.cluster.cni_exempt,
        "daemonset": args.cluster.daemonset,
    })
}
