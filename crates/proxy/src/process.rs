//! The process: what it is started with, in which order it starts, what wakes it, and how it ends.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};

use crate::access_log::AccessLog;
use crate::agent::{self, Said};
use crate::clock::Clock;
use crate::control_plane::ControlPlane;
use crate::cores::Cores;
use crate::node::Node;
use crate::pods::Pods;
use crate::reasons::EndedEarly;
use crate::{admin, judge};

/// What the proxy is started with.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Name of the node that this proxy runs on.
    #[arg(long)]
    pub node: String,
    /// Address of the control plane.
    #[arg(long)]
    pub control: SocketAddr,
    /// File with the trust bundle, in PEM. It is read again at each connection to the control plane.
    #[arg(long)]
    pub bundle: PathBuf,
    /// File with the token that proves to the control plane which node this is.
    #[arg(long)]
    pub token: PathBuf,
    /// Unix socket of the node's agent.
    #[arg(long)]
    pub agent_socket: PathBuf,
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

/// All that can wake the main thread.
#[derive(Debug)]
enum Event {
    /// The agent said something.
    Agent(Said),
    /// The view changed.
    View,
    /// A certificate or the trust bundle changed.
    Certificates,
    /// The process is to end.
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
}

impl Events {
    async fn next(&mut self) -> Event {
        loop {
            tokio::select! {
                biased;
                _ = self.terminate.recv() => return Event::Terminate,
                Some(said) = self.agent.recv() => return Event::Agent(said),
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
    let node = Arc::new(node);
    let cores = Arc::new(Cores::start(count, &node).context("cannot start the threads that serve connections")?);
    let control = Arc::new(ControlPlane::new(&args, node.clone()));
    let (say, outgoing) = mpsc::unbounded_channel();
    let pods = Arc::new(Pods::new(node.clone(), cores.clone(), control.clone(), say));

    let shown = Arc::new(admin::Shown { node: node.clone(), pods: pods.clone(), cores, config: config(&args, count) });
    admin::serve_dumps(&args.admin, shown.clone())
        .with_context(|| format!("cannot listen on {} (--admin)", args.admin.display()))?;
    admin::serve_metrics(args.metrics, shown)
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
    };
    tokio::spawn(control.follow());
    tokio::spawn({
        let node = node.clone();
        async move { node.view.grow_old().await }
    });
    tokio::spawn(agent::keep(args.agent_socket, said, outgoing));
    tracing::info!(node = args.node, cores = count, descriptors, "the proxy runs");

    loop {
        match events.next().await {
            Event::Agent(Said::Connected) => {
                node.metrics.agent.set(1);
            }
            Event::Agent(Said::Gone) => {
                node.metrics.agent.set(0);
            }
            Event::Agent(Said::PodAdded(pod, listeners)) => pods.add(pod, listeners),
            Event::Agent(Said::PodRemoved(pod)) => pods.remove(&pod),
            Event::Agent(Said::Sockets(pod, kind, sockets)) => pods.put(&pod, kind, sockets),
            Event::View => judge::judge(&node.view, &node.connections),
            Event::Certificates => pods.tell_ready(),
            Event::Terminate => break,
        }
    }
    pods.stop_accepting();
    end(&node).await;
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

/// Ends what is open. There is nothing that could take it over yet, so each connection gets its reset and its line.
async fn end(node: &Node) {
    let open = node.connections.all();
    tracing::info!(open = open.len(), "the proxy ends");
    open.iter().for_each(|connection| connection.cut(EndedEarly::ShuttingDown));
    let deadline = Instant::now() + FAREWELL;
    while !node.connections.all().is_empty() && Instant::now() < deadline {
        sleep(Duration::from_millis(10)).await;
    }
    node.access_log.flush(FAREWELL);
}

fn config(args: &Args, cores: usize) -> serde_json::Value {
    json!({
        "node": args.node,
        "control": args.control,
        "bundle": args.bundle,
        "token": args.token,
        "agent_socket": args.agent_socket,
        "admin": args.admin,
        "metrics": args.metrics,
        "cores": cores,
        "access_log": format!("{:?}", args.access_log).to_lowercase(),
        "access_log_file": args.access_log_file,
    })
}
