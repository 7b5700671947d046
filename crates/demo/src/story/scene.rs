//! What the steps of the story can do: ask the box as anybody can, run programs in pods, and listen on a wire.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use linux::capture::{Interest, SNAP_LENGTH, Wiretap};
use linux::privileges::Capabilities;
use linux::sandbox::{self, RUN};
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::sleep;

use crate::boot::Event;
use crate::children::{self, Children};
use crate::conversation::{Place, Request};
use crate::network::Network;
use crate::server;
use crate::wiretap::{Analysis, Seen};

/// The interface by which a node reaches the other nodes.
const LINK: &str = "eth0";
/// Between two looks at a condition, and at a wire that was empty.
const LOOK: Duration = Duration::from_millis(10);

/// The means of the story.
pub(crate) struct Scene {
    pub(crate) events: UnboundedSender<Event>,
    pub(crate) network: Arc<Network>,
    pub(crate) children: Arc<Children>,
    /// When the box was begun.
    pub(crate) begun: Instant,
    /// Whether the cluster is the built-in one.
    pub(crate) built_in: bool,
    pub(crate) state: PathBuf,
    pub(crate) pods: Vec<String>,
}

impl Scene {
    pub(crate) fn is_built_in(&self) -> bool {
        self.built_in
    }

    pub(crate) fn pod_names(&self) -> Vec<String> {
        self.pods.clone()
    }

    /// What names this box on a command line; empty for the user's default one.
    pub(crate) fn state_argument(&self) -> String {
        if self.state == crate::StateDirectory::default_path() {
            String::new()
        } else {
            format!(" --state {}", self.state.display())
        }
    }

    /// Asks the box.
    async fn ask(&self, request: Request) -> anyhow::Result<(Value, Vec<OwnedFd>)> {
        let events = self.events.clone();
        let answer = tokio::task::spawn_blocking(move || server::ask(&events, request).recv()).await?;
        let (answer, descriptors) = answer.context("the box is ending")?;
        Ok((answer.map_err(|sentence| anyhow!(sentence))?, descriptors))
    }

    /// As `demo status`.
    pub(crate) async fn status(&self) -> anyhow::Result<Value> {
        Ok(self.ask(Request::Status).await?.0)
    }

    /// As `demo admin`.
    pub(crate) async fn admin(&self, process: &str, path: &str) -> anyhow::Result<Value> {
        let request = Request::Admin { process: process.to_owned(), path: path.to_owned() };
        match self.ask(request).await?.0 {
            Value::String(page) => serde_json::from_str(&page).with_context(|| format!("{process} {path}")),
            other => Ok(other),
        }
    }

    /// As `demo apply`.
    pub(crate) async fn apply(&self, text: &str) -> anyhow::Result<()> {
        let (answer, _) = self.ask(Request::Apply { file: "the story".to_owned(), text: text.to_owned() }).await?;
        if let Some(sentence) = answer["refused"][0].as_str() {
            bail!("the box refused an object: {sentence}");
        }
        Ok(())
    }

    /// As `demo kill`; the sentence that it gives.
    pub(crate) async fn kill(&self, process: &str) -> anyhow::Result<String> {
        let request = Request::Kill { process: process.to_owned(), hold: false };
        Ok(self.ask(request).await?.0["sentence"].as_str().unwrap_or_default().to_owned())
    }

    /// Waits until a question to the box has the answer that is wanted, and gives it.
    pub(crate) async fn until<T>(
        &self,
        what: &str,
        patience: Duration,
        mut question: impl AsyncFnMut() -> anyhow::Result<Option<T>>,
    ) -> anyhow::Result<T> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(answer) = question().await? {
                return Ok(answer);
            }
            if Instant::now() > deadline {
                bail!("{what}: not within {} ms", patience.as_millis());
            }
            sleep(LOOK).await;
        }
    }

    /// The addresses of pods, by NAMESPACE/NAME; of all of them where none is named.
    pub(crate) async fn addresses(&self, pods: &[&str]) -> anyhow::Result<BTreeSet<IpAddr>> {
        let status = self.status().await?;
        let named = |pod: &Value| {
            let name = format!("{}/{}", pod["namespace"].as_str().unwrap_or(""), pod["name"].as_str().unwrap_or(""));
            pods.is_empty() || pods.contains(&name.as_str())
        };
        let all = status["pods"].as_array().into_iter().flatten().filter(|pod| named(pod));
        let addresses = all.flat_map(|pod| pod["addresses"].as_array().into_iter().flatten());
        Ok(addresses.filter_map(|address| address.as_str()?.parse().ok()).collect())
    }

    /// Starts a client in a pod.
    pub(crate) async fn load(&self, pod: &str, arguments: &[&str]) -> anyhow::Result<Load> {
        let (namespace, name) = pod.split_once('/').context("NAMESPACE/NAME")?;
        let place = Place::Pod { namespace: namespace.to_owned(), name: name.to_owned() };
        let (_, descriptors) = self.ask(Request::Exec { place }).await?;
        // In the order that `exec` reads: pid, network, mounts.
        let mut descriptors = descriptors.into_iter().skip(1);
        let (net, mount) = (descriptors.next(), descriptors.next());
        let (output, writer) = std::io::pipe()?;
        let mut command = Command::new(Path::new(RUN).join("bin/justmtls"));
        command.args(["demo-app", "load"]).args(arguments).env_clear();
        let (reader, input) = std::io::pipe()?;
        command.stdin(reader).stderr(Stdio::null()).stdout(writer);
        let place = sandbox::Place {
            mount,
            net,
            others: Vec::new(),
            directory: PathBuf::from("/"),
            user: None,
            capabilities: Capabilities::OF_A_CONTAINER,
            dies_with_caller: false,
        };
        sandbox::run_in(&mut command, place);
        let child = self.children.spawn(&mut command)?;
        // The command keeps its ends of the pipes, and with them the reader would never see the end.
        drop(command);
        let (sender, lines) = mpsc::channel();
        let reader = std::thread::Builder::new().name("load".into()).spawn(move || {
            use std::io::BufRead;
            for line in std::io::BufReader::new(output.take(16 << 20)).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        })?;
        Ok(Load { child: Some(child), input, lines, reader: Some(reader), last: Value::Null })
    }

    /// Runs a client in a pod to its end and gives its last report.
    pub(crate) async fn load_to_the_end(&self, pod: &str, arguments: &[&str]) -> anyhow::Result<Counts> {
        self.load(pod, arguments).await?.end().await
    }

    /// Listens between the nodes, for connections between these pods.
    pub(crate) fn listen(&self, pods: BTreeSet<IpAddr>, marker: &str) -> anyhow::Result<Listening> {
        let (plan, node) = self.network.nodes().next().context("there is no node")?;
        let name = plan.name.clone();
        let tap = node.enter(|| Wiretap::open(LINK, Interest::Tcp))?;
        let tap = tap.with_context(|| format!("cannot listen on {LINK} of {name}"))?;
        let mut analysis = Analysis::new(pods, marker);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::Builder::new().name("wiretap".into()).spawn(move || -> anyhow::Result<Seen> {
            let mut buffer = vec![0; SNAP_LENGTH];
            loop {
                // Looked at before the queue: what came until then is still read.
                let last = stopped.load(Ordering::Acquire);
                while let Some(packet) = tap.next(&mut buffer)? {
                    analysis.packet(&buffer[..packet.captured]);
                }
                if last {
                    break;
                }
                std::thread::sleep(LOOK);
            }
            let dropped = tap.dropped()?;
            if dropped > 0 {
                bail!("the wiretap was too slow: it missed {dropped} packets, so it proves nothing");
            }
            Ok(analysis.seen().clone())
        })?;
        Ok(Listening { stop, thread })
    }
}

/// A wiretap that listens.
pub(crate) struct Listening {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<Seen>>,
}

impl Listening {
    /// Ends it, and gives what it has seen.
    pub(crate) async fn end(self) -> anyhow::Result<Seen> {
        self.stop.store(true, Ordering::Release);
        let joined = tokio::task::spawn_blocking(move || self.thread.join()).await?;
        joined.map_err(|_| anyhow!("the wiretap broke down"))?
    }
}

/// What a client counted.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) ok: u64,
    pub(crate) failed: u64,
    /// The last failure, in words.
    pub(crate) last_error: String,
}

/// A client that runs in a pod.
pub(crate) struct Load {
    child: Option<children::Child>,
    input: std::io::PipeWriter,
    lines: mpsc::Receiver<String>,
    reader: Option<JoinHandle<()>>,
    last: Value,
}

impl Load {
    /// Says a word to one that is `--controlled`.
    pub(crate) fn say(&mut self, word: &str) -> anyhow::Result<()> {
        Ok(writeln!(self.input, "{word}")?)
    }

    /// Its last report.
    pub(crate) fn report(&mut self) -> &Value {
        for line in self.lines.try_iter() {
            if let Ok(report) = serde_json::from_str(&line) {
                self.last = report;
            }
        }
        &self.last
    }

    /// What it has counted by its last report.
    pub(crate) fn counts(&mut self) -> Counts {
        self.report();
        let number = |field: &str| self.last[field].as_u64().unwrap_or(0);
        let last_error = self.last["last_error"].as_str().unwrap_or_default().to_owned();
        Counts { ok: number("ok"), failed: number("failed"), last_error }
    }

    /// Waits for its end, and gives what it has counted.
    pub(crate) async fn end(mut self) -> anyhow::Result<Counts> {
        self.wait().await?;
        let counts = self.counts();
        if counts.ok + counts.failed == 0 {
            bail!("a client ended without a report");
        }
        Ok(counts)
    }

    /// Waits for its end, and gives its last report.
    pub(crate) async fn end_with_report(mut self) -> anyhow::Result<Value> {
        self.wait().await?;
        Ok(self.report().clone())
    }

    async fn wait(&mut self) -> anyhow::Result<()> {
        if let Some(child) = &mut self.child {
            (&mut child.ended).await.context("a client was lost")?;
        }
        self.child = None;
        if let Some(reader) = self.reader.take() {
            let _ = tokio::task::spawn_blocking(move || reader.join()).await?;
        }
        Ok(())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if let Some(child) = &self.child {
            children::send(child.pid, Signal::SIGKILL);
        }
    }
}
