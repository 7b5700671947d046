//! The process: what it is started with, in which order it starts, what wakes it, and how it ends.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until};

use crate::access_log::AccessLog;
use crate::agent::{self, Place, Said, State, Told};
use crate::certs::Authority;
use crate::clock::Clock;
use crate::control_plane::ControlPlane;
use crate::cores::Cores;
use crate::node::Node;
use crate::offload::Offload;
use crate::pods::Pods;
use crate::reasons::EndedEarly;
use crate::{admin, estate};

/// What the proxy is started with.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Name of the node that this proxy runs on.
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
    /// Addresses of this node, separated by commas: who connects from one of them may be its kubelet, which makes the
    /// probes that pods declare.
    #[arg(long, value_delimiter = ',')]
    pub node_addresses: Vec<IpAddr>,
    /// Unix socket of the node's agent.
    #[arg(long)]
    pub agent_socket: PathBuf,
    /// The user that the node's agent runs as: to no other are keys and sockets handed.
    #[arg(long, default_value_t = 0)]
    pub agent_uid: u32,
    /// Unix socket for dumps, which is made here.
    #[arg(long)]
    pub admin: PathBuf,
    /// Address for metrics, as Prometheus reads them.
    #[arg(long)]
    pub metrics: SocketAddr,
    /// Threads that serve connections; one for each processor where it is not said.
    #[arg(long)]
    pub cores: Option<usize>,
    /// How connections are logged when they have ended: one JSON object in a line for each, or not at all.
    #[arg(long, value_enum, default_value = "json")]
    pub access_log: AccessLogFormat,
    /// File that the access log is appended to, instead of standard output.
    #[arg(long)]
    pub access_log_file: Option<PathBuf>,
    /// Seconds that open connections may take to end once another proxy serves, or this one is told to end. What is open
    /// then is reset.
    #[arg(long, default_value_t = 30 * 60)]
    pub drain: u64,
    /// Kubelet starts and ends this process: once another proxy has taken its place it waits for SIGTERM when its
    /// connections have ended, as what ends before that is started again.
    #[arg(long)]
    pub kubernetes: bool,
}

/// How connections are logged.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum, Debug)]
pub enum AccessLogFormat {
    /// Not at all.
    Off,
    /// One JSON object for each, in a line of its own.
    Json,
}

/// The shortest time between two judgements of all open connections: a rollout changes the view many times a second.
const JUDGE_EVERY: Duration = Duration::from_millis(100);

/// How long connections may take to end when the process does.
const FAREWELL: Duration = Duration::from_millis(500);

/// How long the control plane's stream waits for what the last proxy left at the agent: with it only what changed since is
/// sent.
const WAIT_FOR_LEFT: Duration = Duration::from_secs(1);

/// How often a process that drains looks whether all connections have ended.
const LOOK: Duration = Duration::from_millis(50);

/// The pause between two attempts to listen on a port that a process still has which drains, or is about to.
const PORT_AGAIN: Duration = Duration::from_millis(200);

/// All that can wake the main thread.
#[derive(Debug)]
enum Event {
    /// The agent said something.
    Agent(Said),
    /// The view changed.
    View,
    /// A certificate or the trust bundle changed.
    Certificates,
    /// The agent did not say in time what the last proxy left.
    NothingLeft,
    /// It is time to look whether all connections have ended.
    Look,
    /// The process is to end: at the first time when its connections have, at the second time now.
    Terminate,
}

struct Events {
    agent: mpsc::Receiver<Said>,
    view: watch::Receiver<u64>,
    certificates: watch::Receiver<u64>,
    terminate: Signal,
    judged: Instant,
    /// A change of the view was seen and not judged by yet.
    unjudged: bool,
    /// Until when what the last proxy left is waited for.
    wait_for_left: Option<Instant>,
    /// While draining, when to look next.
    look: Option<Instant>,
}

impl Events {
    async fn next(&mut self) -> Event {
        loop {
            let now = Instant::now();
            tokio::select! {
                biased;
                _ = self.terminate.recv() => return Event::Terminate,
                () = sleep_until(self.look.unwrap_or(now)), if self.look.is_some() => {
                    self.look = Some(now + LOOK);
                    return Event::Look;
                }
                Some(said) = self.agent.recv() => return Event::Agent(said),
                () = sleep_until(self.wait_for_left.unwrap_or(now)), if self.wait_for_left.is_some() => {
                    return Event::NothingLeft;
                }
                _ = self.certificates.changed() => return Event::Certificates,
                _ = self.view.changed(), if !self.unjudged => self.unjudged = true,
                () = sleep_until(self.judged + JUDGE_EVERY), if self.unjudged => {
                    (self.judged, self.unjudged) = (Instant::now(), false);
                    return Event::View;
                }
            }
        }
    }
}

/// Runs the proxy until it is told to end.
///
/// # Errors
/// What keeps it from starting, in one sentence.
pub fn run(args: Args) -> Result<()> {
    // Before the first thread: threads inherit what is left.
    linux::privileges::give_up_all().context("cannot give up privileges")?;
    let descriptors =
        linux::privileges::raise_descriptor_limit().context("cannot raise the limit of open descriptors")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the main thread's event queue")?;
    runtime.block_on(serve(args, descriptors))
}

async fn serve(args: Args, descriptors: u64) -> Result<()> {
    let count = args.cores.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let mut node = Node::new(Clock::default(), descriptors);
    node.access_log = access_log(&args, &node)?;
    node.addresses.clone_from(&args.node_addresses);
    node.offload = Offload::new(count);
    let node = Arc::new(node);
    let cores = Arc::new(Cores::start(count, &node).context("cannot start the threads that serve connections")?);
    let control = Arc::new(ControlPlane::new(&args, node.clone()));
    let (say, outgoing) = mpsc::unbounded_channel();
    let pods = Arc::new(Pods::new(node.clone(), cores.clone(), control.clone(), say));

    let config = config(&args, count);
    let shown = Arc::new(admin::Shown { node: node.clone(), pods: pods.clone(), cores: cores.clone(), config });
    admin::serve_dumps(&args.admin, shown.clone())
        .with_context(|| format!("cannot listen on {} (--admin)", args.admin.display()))?;
    let metrics = serve_metrics(args.metrics, shown)
        .await
        .with_context(|| format!("cannot listen on {} (--metrics)", args.metrics))?;

    let (said, heard) = mpsc::channel(64);
    let mut events = Events {
        agent: heard,
        view: node.view.changes(),
        certificates: node.certificates.changes(),
        terminate: signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?,
        judged: Instant::now(),
        unjudged: false,
        wait_for_left: Some(Instant::now() + WAIT_FOR_LEFT),
        look: None,
    };
    let state = watch::Sender::new(State::default());
    let held = pods.clone();
    let told =
        Told { pods: Box::new(move || held.held()), state: state.subscribe(), started: linux::clock::since_boot() };
    tokio::spawn(agent::keep(Place { path: args.agent_socket, uid: args.agent_uid }, said, outgoing, told));
    tokio::spawn(estate::keep(node.clone(), state.clone()));
    tokio::spawn({
        let node = node.clone();
        async move { node.view.grow_old().await }
    });
    tracing::info!(node = args.node, cores = count, descriptors, "the proxy runs");

    let mut drain: Option<Drain> = None;
    // By whoever started it, who says it also to one that drains because its successor serves.
    let mut told_to_end = false;
    let why = loop {
        let event = events.next().await;
        match event {
            Event::Agent(Said::Connected(left)) => {
                node.metrics.agent.set(1);
                pods.ask_again();
                if events.wait_for_left.take().is_some() {
                    tokio::spawn(control.clone().follow(estate::take_over(&node, left)));
                }
            }
            Event::NothingLeft => {
                events.wait_for_left = None;
                tokio::spawn(control.clone().follow(None));
            }
            Event::Agent(Said::Gone) => {
                node.metrics.agent.set(0);
            }
            Event::Agent(Said::PodAdded(pod, listeners)) => pods.add(pod, listeners),
            Event::Agent(Said::PodRemoved(pod)) => pods.remove(&pod),
            Event::Agent(Said::FromBefore(pod, open)) => pods.set_opened_before(&pod, open),
            Event::Agent(Said::Sockets(pod, kind, sockets)) => pods.put(&pod, kind, sockets),
            Event::View => {
                pods.judge();
                pods.tell_ready();
            }
            Event::Certificates => pods.tell_ready(),
            Event::Terminate if told_to_end => break EndedEarly::ShuttingDown,
            // Only there it is started again.
            Event::Agent(Said::Needed) if args.kubernetes && drain.is_some() && !told_to_end => {
                tracing::warn!("no proxy serves: this one ends, and the next one in its place serves");
                break EndedEarly::ShuttingDown;
            }
            Event::Agent(Said::Needed) => {}
            Event::Agent(Said::Drain) | Event::Terminate => {
                told_to_end |= matches!(event, Event::Terminate);
                if drain.is_none() {
                    drain = Some(Drain::begin(&node, Duration::from_secs(args.drain)));
                    pods.stop_accepting();
                    state.send_modify(|state| state.leaving = true);
                    // The successor's, where both are in one network namespace.
                    if !args.kubernetes {
                        metrics.abort();
                    }
                    events.look = Some(Instant::now());
                }
            }
            Event::Look if drain.as_ref().is_some_and(|drain| drain.is_over(&cores)) => {
                if !args.kubernetes || told_to_end {
                    break EndedEarly::Drained;
                }
                end_connections(&node, &EndedEarly::Drained);
            }
            Event::Look => {}
        }
    };
    end(&node, &why).await;
    Ok(())
}

fn access_log(args: &Args, node: &Node) -> Result<AccessLog> {
    let dropped = node.metrics.log_dropped.clone();
    let started = match (args.access_log, &args.access_log_file) {
        (AccessLogFormat::Off, _) => return Ok(AccessLog::off()),
        (AccessLogFormat::Json, None) => AccessLog::start(std::io::stdout(), dropped),
        (AccessLogFormat::Json, Some(path)) => {
            // Appending lets others truncate it under us.
            let file = std::fs::File::options().create(true).append(true).open(path);
            let file = file.with_context(|| format!("cannot open {} (--access-log-file)", path.display()))?;
            AccessLog::start(file, dropped)
        }
    };
    started.context("cannot start the thread of the access log")
}

/// The time between the last accept and the end.
struct Drain {
    until: Instant,
}

impl Drain {
    fn begin(node: &Node, time: Duration) -> Self {
        tracing::info!(open = node.connections.all().len(), seconds = time.as_secs(), "draining: nothing is accepted");
        Self { until: Instant::now() + time }
    }

    /// A tunnel that rests counts until its other side knows: what it asks for meanwhile has an answer.
    fn is_over(&self, cores: &Cores) -> bool {
        Instant::now() >= self.until || cores.open().iter().all(|open| *open == 0)
    }
}

fn end_connections(node: &Node, why: &EndedEarly) {
    node.connections.all().iter().for_each(|connection| connection.cut(why.clone()));
}

/// Ends what is open: each connection gets its reset and its line.
async fn end(node: &Node, why: &EndedEarly) {
    tracing::info!(open = node.connections.all().len(), reason = %why, "the proxy ends");
    end_connections(node, why);
    let deadline = Instant::now() + FAREWELL;
    while !node.connections.all().is_empty() && Instant::now() < deadline {
        sleep(Duration::from_millis(10)).await;
    }
    node.access_log.flush(FAREWELL);
}

/// Serves the numbers; as soon as the port is free, where a predecessor still has it. Aborting it lets go of the port.
async fn serve_metrics<A: Authority>(address: SocketAddr, shown: Arc<admin::Shown<A>>) -> io::Result<AbortHandle> {
    let mut listener = match TcpListener::bind(address).await {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            tracing::warn!(%address, "another process has the port for metrics; waiting for it to let go");
            None
        }
        bound => Some(bound?),
    };
    let serve = async move {
        loop {
            match listener.take() {
                Some(listener) => return admin::serve_metrics(listener, shown).await,
                None => {
                    sleep(PORT_AGAIN).await;
                    listener = TcpListener::bind(address).await.ok();
                }
            }
        }
    };
    Ok(tokio::spawn(serve).abort_handle())
}

fn config(args: &Args, cores: usize) -> serde_json::Value {
    json!({
        "node": args.node,
        "control": args.control,
        "bundle": args.bundle,
        "token": args.token,
        "agent_socket": args.agent_socket,
        "agent_uid": args.agent_uid,
        "node_addresses": args.node_addresses,
        "drain": args.drain,
        "kubernetes": args.kubernetes,
        "admin": args.admin,
        "metrics": args.metrics,
        "cores": cores,
        "access_log": format!("{:?}", args.access_log).to_lowercase(),
        "access_log_file": args.access_log_file,
    })
}
