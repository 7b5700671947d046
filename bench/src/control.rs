//! `bench control`: what the control plane takes for a large cluster whose pods come and go. The product's own binary runs
//! against a simulated API server, and serves simulated nodes; everything is in a network namespace of its own.
//!
//! It fails where a node does not come to know what it is to know.

mod api_server;
mod figures;
mod nodes;
mod objects;
mod store;
mod world;

use std::collections::{BTreeSet, VecDeque};
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use mesh::{PodUid, WorkloadUid};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};

use self::api_server::{ApiServer, Holder, Holders};
use self::figures::{Delay, Figures};
use self::nodes::{Awaited, Delays, Node, NodeStart, Place, Seen};
use self::objects::ROOT_NAMESPACE;
use self::store::{Kind, Store};
use self::world::{Pod, World, node_address, node_name};
use crate::processor::{self, pinned};
use crate::results::Machine;

/// Where the control plane listens for nodes, and for who asks for its numbers; in a namespace of its own.
const PORT: u16 = 15012;
const METRICS: &str = "127.0.0.1:15014";
/// The nodes' own addresses, all of which lead here.
const NODES: &str = "172.16.0.0/12";
/// A step of churn, and how many steps a new pod takes until it is ready.
const STEP: Duration = Duration::from_millis(100);
const STEPS: usize = 10;
/// How often a node says that it is well.
const HEARTBEAT: Duration = Duration::from_secs(300);
/// How long everything may take that is waited for.
const PATIENCE: Duration = Duration::from_secs(300);
/// How often it is looked at until then.
const LOOK: Duration = Duration::from_millis(50);
/// How long a token is good.
const TOKEN: Duration = Duration::from_secs(24 * 3600);

/// What is simulated.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Nodes, each with an agent and a proxy.
    #[arg(long, default_value_t = 2000)]
    nodes: usize,
    /// Pods, fifty behind each Service.
    #[arg(long, default_value_t = 100_000)]
    pods: usize,
    /// Pods that are replaced each second.
    #[arg(long, default_value_t = 1000, value_name = "PODS")]
    churn: usize,
    /// How long it goes on.
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// Services that each node's pods dial.
    #[arg(long, default_value_t = 5, value_name = "SERVICES")]
    dialled: usize,
    /// Write what was found to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The product's binary.
    #[arg(long, env = "JUSTMTLS_BIN", value_name = "FILE")]
    binary: Option<PathBuf>,
}

/// Runs it.
///
/// # Errors
/// What is missing here; or which node does not know what it is to know.
pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "this has to run as root: it makes a network namespace");
    let binary = crate::product(args.binary.as_deref())?;
    // Before the first thread: a namespace is a thread's.
    unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
    ip(&["link", "set", "lo", "up"])?;
    ip(&["route", "add", "local", NODES, "dev", "lo"])?;
    let wanted = 4 * args.nodes as u64 + 1024;
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    ensure!(most >= wanted, "this needs {wanted} file descriptors, and {most} are allowed (ulimit -Hn)");
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let figures = runtime.block_on(async {
        tokio::select! {
            figures = measure(args, &binary) => figures,
            ended = told_to_end() => ended.and_then(|()| bail!("told to end")),
        }
    })?;
    print!("{}", figures.table());
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&figures)?;
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Waits for a signal. What runs beside it is dropped then, and with it the control plane's process.
async fn told_to_end() -> Result<()> {
    let [mut interrupt, mut terminate, mut hangup] =
        [signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::hangup())?];
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
    }
    Ok(())
}

fn ip(arguments: &[&str]) -> Result<()> {
    let status = Command::new("ip").args(arguments).status().context("cannot run ip (iproute2)")?;
    ensure!(status.success(), "ip {} failed", arguments.join(" "));
    Ok(())
}

/// The control plane's process; it ends when this is dropped.
struct Process(Child);

impl Process {
    fn start(binary: &Path, folder: &Path, kubeconfig: &Path) -> Result<Process> {
        let log = fs::File::create(folder.join("control.log"))?;
        let mut command = Command::new(binary);
        command.args(["control", "--kubernetes", "--metrics", METRICS, "--kubeconfig"]).arg(kubeconfig);
        command.arg("--listen").arg(format!("0.0.0.0:{PORT}")).arg("--admin").arg(folder.join("admin.sock"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        Ok(Process(command.spawn().context("cannot start the control plane")?))
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }

    fn time(&self) -> f64 {
        processor::time(self.pid()).as_secs_f64()
    }

    fn resident(&self) -> Result<u64> {
        crate::memory::resident(self.pid())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Times of one moment.
struct Moment {
    at: Instant,
    control: f64,
    own: f64,
    machine: f64,
}

impl Moment {
    fn now(control: &Process) -> Result<Moment> {
        let own = processor::time(std::process::id()).as_secs_f64();
        let machine = processor::machine()?.busy.as_secs_f64();
        Ok(Moment { at: Instant::now(), control: control.time(), own, machine })
    }
}

async fn measure(args: &Args, binary: &Path) -> Result<Figures> {
    ensure!(args.churn * 2 <= args.pods, "--churn is {}; give at most half of --pods", args.churn);
    let folder = tempfile::Builder::new().prefix("justmtls-bench-").tempdir()?;
    let store = Arc::new(Store::default());
    store.put(Kind::Namespaces, ROOT_NAMESPACE, &objects::namespace(ROOT_NAMESPACE));
    store.put(Kind::ConfigMaps, &format!("{ROOT_NAMESPACE}/justmtls"), &objects::settings());
    let mut world = World::new(args.nodes, args.pods, &store)?;
    let mut figures = Figures {
        machine: Machine::here(),
        nodes: args.nodes,
        pods: args.pods,
        services: world.services.len(),
        pod_bytes: mean_length(&store),
        ..Figures::default()
    };
    let (tokens, holders) = tokens(args.nodes)?;
    let address = api_server::serve(ApiServer { store: store.clone(), tokens: holders }).await?;
    let kubeconfig = folder.path().join("kubeconfig");
    fs::write(&kubeconfig, kubeconfig_of(address))?;

    eprintln!("the control plane starts");
    let [first, second] = processor::two_processors()?;
    processor::pin(std::process::id(), first)?;
    let began = Instant::now();
    let control = pinned(second, || Process::start(binary, folder.path(), &kubeconfig))??;
    let result =
        drive(args, &mut figures, Run { folder: folder.path(), store, tokens, control, began }, &mut world).await;
    if result.is_err() {
        let log = fs::read_to_string(folder.path().join("control.log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().filter(|line| !line.contains("INFO")).collect();
        eprintln!("{}", lines[lines.len().saturating_sub(20)..].join("\n"));
    }
    result.map(|()| figures)
}

/// What runs.
struct Run<'a> {
    folder: &'a Path,
    store: Arc<Store>,
    tokens: Vec<[String; 2]>,
    control: Process,
    began: Instant,
}

async fn drive(args: &Args, figures: &mut Figures, run: Run<'_>, world: &mut World) -> Result<()> {
    let Run { folder, store, tokens, control, began } = run;
    let deadline = Instant::now() + PATIENCE;
    while !ask("/readyz").await.is_ok_and(|answer| answer.starts_with("HTTP/1.1 200")) {
        ensure!(Instant::now() < deadline, "the control plane is not ready after {} s", PATIENCE.as_secs());
        sleep(LOOK).await;
    }
    figures.ready_after = began.elapsed().as_secs_f64();
    figures.ready_processor = control.time();
    figures.resident_ready = control.resident()?;

    eprintln!("all nodes connect");
    let bundle = folder.join("bundle.pem");
    fs::write(&bundle, published_bundle(&store).await?)?;
    let asked: Vec<Vec<usize>> = (0..args.nodes).map(|_| dialled(world, args.dialled)).collect();
    let starts = tokens.into_iter().enumerate().map(|(node, tokens)| NodeStart {
        name: node_name(node),
        address: IpAddr::V4(node_address(node)),
        tokens,
        asks: asked[node].iter().map(|number| IpAddr::V4(world.services[*number].address)).collect(),
    });
    let delays = Arc::new(Delays::default());
    let (failed, mut failures) = mpsc::unbounded_channel();
    let (began, before) = (Instant::now(), control.time());
    let place = Place { folder, bundle: &bundle, port: PORT };
    let nodes = nodes::start(&place, starts.collect(), &delays, &failed)?;
    settled(&nodes, world, &asked, &mut failures).await?;
    figures.connected_after = began.elapsed().as_secs_f64();
    figures.connected_processor = control.time() - before;
    figures.resident_connected = control.resident()?;

    let quiet = Moment::now(&control)?;
    sleep(Duration::from_secs(args.seconds.min(10))).await;
    let (before, sent, told) = (Moment::now(&control)?, sent()?, number("resources_sent_total").await?);
    figures.quiet_processor = (before.control - quiet.control) / (before.at - quiet.at).as_secs_f64();
    let (lists, watched) = (number("lists_total").await?, store.bytes());

    eprintln!("pods come and go");
    churn(args, figures, &control, world, &store, &delays, &mut failures).await?;
    let after = Moment::now(&control)?;
    let last = Instant::now();
    let seconds = (after.at - before.at).as_secs_f64();
    figures.seconds = seconds;
    figures.churn_processor = (after.control - before.control) / seconds;
    figures.simulator_processor = (after.own - before.own) / seconds;
    let ours = figures.churn_processor + figures.simulator_processor;
    figures.foreign = ((after.machine - before.machine) / seconds - ours).max(0.0);
    figures.watched = (store.bytes() - watched) as f64 / seconds;
    figures.bytes_per_node = (self::sent()? - sent) as f64 / seconds / args.nodes as f64;
    figures.told = (number("resources_sent_total").await? - told) / seconds;
    settled(&nodes, world, &asked, &mut failures).await?;
    figures.settled_after = last.elapsed().as_secs_f64();
    figures.lists_again = number("lists_total").await? - lists;
    figures.resident_churned = control.resident()?;
    figures.placed = Delay::of(delays.of(Awaited::Placed));
    figures.with_address = Delay::of(delays.of(Awaited::Ready));
    figures.gone = Delay::of(delays.of(Awaited::Gone));
    Ok(())
}

/// Replaces pods at a steady rate, and waits until the last ones are ready.
async fn churn(
    args: &Args,
    figures: &mut Figures,
    control: &Process,
    world: &mut World,
    store: &Store,
    delays: &Delays,
    failures: &mut mpsc::UnboundedReceiver<String>,
) -> Result<()> {
    let steps = args.seconds as usize * (Duration::from_secs(1).as_millis() / STEP.as_millis()) as usize;
    let heartbeats = args.nodes as f64 * STEP.as_secs_f64() / HEARTBEAT.as_secs_f64();
    let (began, mut under_way) = (Instant::now(), VecDeque::new());
    let mut due = 0.0;
    for step in 0..steps + STEPS {
        sleep_until(began + STEP * step as u32).await;
        if let Ok(failure) = failures.try_recv() {
            bail!("{failure}");
        }
        if step >= STEPS
            && let Some(oldest) = under_way.pop_front()
        {
            let ready = |name| delays.begin(Awaited::Ready, name);
            world.end(oldest, store, ready, |name| delays.begin(Awaited::Gone, name));
        }
        if step < steps {
            // All of a second's pods, however they are spread over its steps.
            let until = |step: usize| args.churn * step * STEP.as_millis() as usize / 1000;
            let count = until(step + 1) - until(step);
            under_way.push_back(world.begin(count, store, |name| delays.begin(Awaited::Placed, name)));
            figures.replaced += count;
        }
        due += heartbeats;
        while due >= 1.0 {
            let node = world.chance(world.nodes());
            world.write_node(node, store);
            due -= 1.0;
        }
        figures.resident_most = figures.resident_most.max(control.resident()?);
    }
    Ok(())
}

/// Waits until every node knows what it is to know, and nothing else.
async fn settled(
    nodes: &[Arc<Node>],
    world: &World,
    asked: &[Vec<usize>],
    failures: &mut mpsc::UnboundedReceiver<String>,
) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut left: Vec<usize> = (0..nodes.len()).collect();
    let truth = world.by_node();
    loop {
        let mut why = String::new();
        for node in std::mem::take(&mut left) {
            if let Some(difference) = differs(&nodes[node], &truth[node], &asked[node], world) {
                why = format!("{}: {difference}", node_name(node));
                left.push(node);
            }
            // Streams go on meanwhile.
            tokio::task::yield_now().await;
        }
        if left.is_empty() {
            return Ok(());
        }
        if let Ok(failure) = failures.try_recv() {
            bail!("{failure}");
        }
        ensure!(Instant::now() < deadline, "{} nodes do not know what they are to know; {why}", left.len());
        sleep(LOOK).await;
    }
}

/// What a node knows and is not so, or the other way round.
fn differs(node: &Node, own: &[(usize, &Pod)], asked: &[usize], world: &World) -> Option<String> {
    {
        let pods = node.pods();
        if pods.len() != own.len() || !own.iter().all(|(_, pod)| pods.contains(&PodUid::from(pod.uid.as_str()))) {
            return Some(format!("its agent knows {} pods, and not just these {}", pods.len(), own.len()));
        }
    }
    let dialled = asked.iter().flat_map(|number| world.services[*number].pods.iter().map(move |pod| (*number, pod)));
    let others = own.iter().filter(|(number, _)| !asked.contains(number)).copied();
    let known = node.known();
    let mut count = 0;
    for (number, pod) in dialled.chain(others) {
        let service = &world.services[number];
        let name = service.workload(pod);
        let right =
            Seen { addresses: vec![IpAddr::V4(pod.address)], captured: true, services: vec![service.stream_name()] };
        let found = known.get(&WorkloadUid::from(name.as_str()));
        if found != Some(&right) {
            return Some(format!("{name} is {right:?}, and its proxy knows {found:?}"));
        }
        count += 1;
    }
    (known.len() != count).then(|| format!("its proxy knows {} workloads, and is to know {count}", known.len()))
}

/// Some Services, each once.
fn dialled(world: &mut World, count: usize) -> Vec<usize> {
    let mut chosen = BTreeSet::new();
    while chosen.len() < count.min(world.services.len()) {
        chosen.insert(world.chance(world.services.len()));
    }
    chosen.into_iter().collect()
}

/// Tokens of the form that kubelet projects, each node's agent's and proxy's, and whose they are. Their signature is the word of the
/// simulated API server.
fn tokens(nodes: usize) -> Result<(Vec<[String; 2]>, Holders)> {
    let ends = SystemTime::now().duration_since(UNIX_EPOCH)? + TOKEN;
    let mut holders = Holders::new();
    let mut token = |node: usize, audience: &'static str| {
        let holder = Holder { audience, node: node_name(node), pod: format!("justmtls-node-{node}") };
        let claims = json!({
            "aud": [audience], "exp": ends.as_secs(), "iss": "https://kubernetes.default.svc.cluster.local",
            "sub": "system:serviceaccount:justmtls-system:justmtls-node",
            "kubernetes.io": { "namespace": ROOT_NAMESPACE, "node": { "name": holder.node }, "pod": { "uid": holder.pod } },
        });
        let part = |text: &str| BASE64_URL_SAFE_NO_PAD.encode(text);
        let header = json!({ "alg": "RS256", "kid": "simulated" });
        let signature = "s".repeat(256);
        let token = [header.to_string(), claims.to_string(), signature].map(|text| part(&text)).join(".");
        holders.insert(token.clone(), holder);
        token
    };
    let tokens = (0..nodes).map(|node| ["justmtls.dev/agent", "justmtls.dev/proxy"].map(|role| token(node, role)));
    Ok((tokens.collect(), holders))
}

fn kubeconfig_of(address: SocketAddr) -> String {
    let cluster = json!({ "name": "simulated", "cluster": { "server": format!("http://{address}") } });
    let context = json!({ "name": "simulated", "context": { "cluster": "simulated", "user": "simulated" } });
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "simulated", "clusters": [cluster], "contexts": [context],
        "users": [{ "name": "simulated", "user": {} }],
    })
    .to_string()
}

/// The roots, when the control plane has published them.
async fn published_bundle(store: &Store) -> Result<String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(config) = store.get(Kind::ConfigMaps, &format!("{ROOT_NAMESPACE}/justmtls-trust-bundle")) {
            let config: serde_json::Value = serde_json::from_str(&config.text)?;
            return Ok(config["data"]["bundle.pem"].as_str().context("the published bundle is empty")?.to_owned());
        }
        ensure!(Instant::now() < deadline, "the control plane publishes no trust bundle");
        sleep(LOOK).await;
    }
}

/// A page of the control plane's.
async fn ask(page: &str) -> Result<String> {
    let mut stream = TcpStream::connect(METRICS).await?;
    stream.write_all(format!("GET {page} HTTP/1.1\r\nHost: control\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

/// One of its numbers.
async fn number(name: &str) -> Result<f64> {
    let page = ask("/metrics").await?;
    let name = format!("justmtls_control_{name}");
    let line = page.lines().find_map(|line| line.strip_prefix(&name)?.strip_prefix(' '));
    line.and_then(|value| value.trim().parse().ok()).with_context(|| format!("the control plane has no {name}"))
}

/// Bytes that the control plane has sent on the connections that nodes have, TLS included.
fn sent() -> Result<u64> {
    let output = Command::new("ss").args(["-tinH", "sport", "=", &format!(":{PORT}")]).output();
    let output = output.context("cannot run ss (iproute2)")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let sent = text.split_whitespace().filter_map(|word| word.strip_prefix("bytes_sent:")?.parse::<u64>().ok());
    Ok(sent.sum())
}

fn mean_length(store: &Store) -> usize {
    let (pods, _) = store.all(Kind::Pods);
    pods.iter().map(|pod| pod.len()).sum::<usize>() / pods.len().max(1)
}
