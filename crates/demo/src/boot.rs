//! Init: brings the box up, then does one thing after the other as events come in, until the end.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use linux::sandbox::{self, Authority, RUN};
use manifests::k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::admin;
use crate::children::Children;
use crate::cluster::{Action, Cluster, PodPlan};
use crate::complaints::{Complaints, Taken};
use crate::conversation::{Answer, Place, Request};
use crate::dns::{self, Zone};
use crate::folder::Folder;
use crate::kube_proxy::Services;
use crate::kubelet::{self, Kubelet, PodNews, Rooms};
use crate::manifest::Manifest;
use crate::network::{Network, node_plan};
use crate::processes::{self, Recipes, Role};
use crate::programs;
use crate::report;
use crate::server::{self, Reply};
use crate::state::StateDirectory;
use crate::story::{self, Scene};
use crate::supervisor::Supervisor;
use crate::{Options, ProcessArgument};

/// What the starter says to end the box in order.
pub(crate) const STOP: &[u8] = b"stop\n";

/// How many nodes there are.
const NODES: u8 = 2;
/// How long the first pods may take before the box counts as up regardless, with a word about them.
const PATIENCE: Duration = Duration::from_secs(20);

/// All that can wake init.
#[derive(Debug)]
pub(crate) enum Event {
    /// Somebody asks something.
    Request { request: Request, reply: Sender<Reply> },
    /// News about a pod.
    Pod { uid: String, news: PodNews },
    /// A process of the product has ended.
    ProcessEnded { role: Role, number: u64, how: String },
    /// The pause before its restart is over.
    ProcessDue { role: Role, number: u64 },
    /// A new process is ready to take over, or is not and why.
    Upgraded { role: Role, number: u64, ready: Result<(), String> },
    /// The story has been told.
    StoryEnded { shown: bool, once: bool },
    /// The starter wants the end.
    Stop,
}

/// Init's end of the pair of sockets that it shares with the starter.
#[derive(Debug)]
pub(crate) struct Lifeline {
    stream: UnixStream,
}

impl Lifeline {
    pub(crate) fn new(stream: UnixStream) -> Lifeline {
        Lifeline { stream }
    }

    /// Tells the starter something; if it is gone, the watching thread knows.
    fn say(&self, line: &str) {
        let _ = writeln!(&self.stream, "{line}");
    }

    /// Watches the starter, on a thread that nothing else can hold up. Its death is this process' death.
    fn watch(&self, state: Arc<StateDirectory>, events: mpsc::UnboundedSender<Event>) -> std::io::Result<()> {
        let mut stream = self.stream.try_clone()?;
        thread::Builder::new().name("lifeline".into()).spawn(move || {
            let mut word = [0; STOP.len()];
            while stream.read_exact(&mut word).is_ok() {
                let _ = events.send(Event::Stop);
            }
            state.remove();
            sandbox::end_now(1);
        })?;
        Ok(())
    }
}

/// Runs the box; its result is init's exit status.
pub(crate) fn run(options: Options, authority: Authority, state: Arc<StateDirectory>, lifeline: Lifeline) -> i32 {
    let (events, inbox) = mpsc::unbounded_channel();
    let up = || -> anyhow::Result<i32> {
        lifeline.watch(state.clone(), events.clone())?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let status = runtime.block_on(live(&options, authority, &state, &lifeline, events, inbox));
        // Not shut down: the story's thread may wait on it, and would panic. It ends with this process, which is init.
        std::mem::forget(runtime);
        status
    };
    match up() {
        Ok(status) => status,
        Err(error) => {
            lifeline.say(&format!("{error:#}"));
            1
        }
    }
}

async fn live(
    options: &Options,
    authority: Authority,
    state: &StateDirectory,
    lifeline: &Lifeline,
    events: mpsc::UnboundedSender<Event>,
    inbox: mpsc::UnboundedReceiver<Event>,
) -> anyhow::Result<i32> {
    // First, so that bad input costs no box.
    let begun = std::time::Instant::now();
    let manifest = match (&options.manifests, options.story) {
        (Some(path), _) => Manifest::from_path(path)?,
        (None, None) => Manifest::built_in(),
        (None, Some(_)) => Manifest::before_capture(),
    };
    let children = Arc::new(Children::default());
    tokio::spawn({
        let children = children.clone();
        async move { children.reap().await }
    });
    server::open(state, events.clone())?;
    processes::offer_own_binary().context("cannot offer this program to pods")?;

    let plans: Vec<_> = (0..NODES).map(node_plan).collect();
    let network = {
        let (directory, plans) = (Path::new(RUN).join("netns"), plans.clone());
        Arc::new(Network::build(&directory, plans).context("cannot make the box's network")?)
    };
    let zone = watch::Sender::new(Arc::new(Zone::default()));
    for (plan, namespace) in network.nodes() {
        dns::serve(namespace, plan.gateway, zone.subscribe()).context("cannot serve DNS on a node")?;
    }
    let logs = Path::new(RUN).join("logs");
    fs::create_dir(&logs)?;
    let kubelet = Kubelet { authority, network, children, events, logs };
    let cluster = Cluster::new(plans, random_uuid, now);
    let mut folder = Folder::create(Path::new(RUN).join("objects"))?;
    folder.hold(cluster.objects()).context("cannot write the objects for the control plane")?;
    let recipes = {
        let (network, children) = (kubelet.network.clone(), kubelet.children.clone());
        Recipes::new(authority, network, children, folder.path().to_owned(), process_arguments(options))?
    };
    let mut keeper = Keeper {
        authority,
        state: state.path().to_owned(),
        cluster,
        folder,
        zone,
        services: Services::default(),
        supervisor: Supervisor::start(recipes, kubelet.events.clone()).await?,
        kubelet: Arc::new(kubelet),
        pods: BTreeMap::new(),
        complaints: Complaints::default(),
        inbox,
    };
    keeper.publish();
    keeper.begin(manifest);
    keeper.wait_until_ready().await;
    lifeline.say("ready");
    if let Some(told) = options.story {
        let Kubelet { events, network, children, .. } = keeper.kubelet.as_ref();
        let scene = Scene {
            events: events.clone(),
            network: network.clone(),
            children: children.clone(),
            begun,
            built_in: options.manifests.is_none(),
            state: state.path().to_owned(),
            pods: keeper.pods.values().map(|pod| format!("{}/{}", pod.plan.namespace, pod.plan.name)).collect(),
        };
        let events = events.clone();
        let runtime = tokio::runtime::Handle::current();
        // A thread of its own: a teller that waits for a wire or a pipe keeps nobody else waiting.
        thread::Builder::new().name("story".into()).spawn(move || {
            let shown = runtime.block_on(story::tell(told, scene));
            // If nobody takes it the box is ending already.
            let _ = events.send(Event::StoryEnded { shown, once: told.once });
        })?;
    }
    Ok(keeper.serve(options.story.is_some_and(|story| story.once)).await)
}

/// Those that were asked for. In the story of the built-in shop, certificates rotate while one watches.
fn process_arguments(options: &Options) -> Vec<ProcessArgument> {
    let mut all = options.process_arguments.clone();
    let of_control = |argument: &ProcessArgument| argument.process == "control";
    if options.story.is_some() && options.manifests.is_none() && !all.iter().any(of_control) {
        let argument = format!("--leaf-validity={}", story::LEAF_LIFE);
        all.push(ProcessArgument { process: "control".to_owned(), argument });
    }
    all
}

pub(crate) fn random_uuid() -> String {
    // The kernel's own generator; without /proc there is no box.
    fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap_or_default().trim().to_owned()
}

fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp::from_second(since.as_secs() as i64).unwrap_or_default()
}

/// Who keeps everything together: the only one that changes the cluster's objects.
struct Keeper {
    authority: Authority,
    state: PathBuf,
    cluster: Cluster,
    folder: Folder,
    zone: watch::Sender<Arc<Zone>>,
    /// As they are loaded on the nodes.
    services: Services,
    kubelet: Arc<Kubelet>,
    supervisor: Supervisor,
    /// The pods that live, by uid.
    pods: BTreeMap<String, LivePod>,
    complaints: Complaints,
    inbox: mpsc::UnboundedReceiver<Event>,
}

struct LivePod {
    plan: PodPlan,
    stop: watch::Sender<bool>,
    /// Once programs can be run in it.
    rooms: Option<Arc<Rooms>>,
}

impl Keeper {
    /// Takes the first manifest. What is wrong with it is said to who sits in front, and `status` remembers it.
    fn begin(&mut self, manifest: Manifest) {
        let Taken { refused, notes, .. } = self.take(manifest);
        for sentence in refused.iter().map(|one| &one.sentence).chain(&notes) {
            anstream::eprintln!("{sentence}");
        }
        self.complaints.remember(refused);
    }

    /// Takes what can be taken of a manifest.
    fn take(&mut self, manifest: Manifest) -> Taken {
        let (mut taken, mut keys) = (Taken::of(manifest.problems), Vec::new());
        for (object, place) in manifest.objects {
            let key = object.key();
            match self.cluster.apply(object) {
                Ok(actions) => {
                    self.act(actions);
                    taken.done.push(format!("{key} applied"));
                    self.complaints.taken(key.clone(), place);
                    keys.push(key);
                }
                Err(refusal) => taken.refuse(key, format!("{place}: {refusal}")),
            }
        }
        self.publish();
        taken.notes.extend(self.complaints.about(&keys, self.cluster.objects()));
        taken
    }

    async fn wait_until_ready(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.cluster.pods().all(report::is_settled) {
            let Ok(Some(event)) = tokio::time::timeout_at(deadline, self.inbox.recv()).await else { return };
            if !self.handle(event) {
                return;
            }
        }
    }

    /// Until the end. Gives init's exit status: 1 where the story did not show what it should, and where it was for the
    /// story alone (`once`) and ended before that was told: who stops it half-way has not seen it succeed.
    async fn serve(mut self, once: bool) -> i32 {
        let mut status = i32::from(once);
        while let Some(event) = self.inbox.recv().await {
            if let Event::StoryEnded { shown, once } = event {
                status = if shown { 0 } else { 1 };
                if once {
                    break;
                }
            } else if !self.handle(event) {
                break;
            }
        }
        self.end_pods().await;
        status
    }

    /// Whether to go on.
    fn handle(&mut self, event: Event) -> bool {
        match event {
            Event::Stop | Event::Request { request: Request::Stop, .. } => {
                // Seen again by `serve`, if it was `wait_until_ready` that saw it.
                let _ = self.kubelet.events.send(Event::Stop);
                return false;
            }
            Event::Pod { uid, news } => self.pod_news(&uid, news),
            // Taken by `serve`: before it, no story is told.
            Event::StoryEnded { .. } => {}
            Event::ProcessEnded { role, number, how } => self.supervisor.ended(&role, number, &how),
            Event::ProcessDue { role, number } => self.supervisor.due(&role, number),
            Event::Upgraded { role, number, ready } => self.supervisor.upgraded(&role, number, ready),
            Event::Request { request: Request::Kill { process, hold }, reply } => {
                self.supervisor.kill(&process, hold, reply);
            }
            Event::Request { request: Request::Upgrade { process, binary }, reply } => {
                self.supervisor.upgrade(&process, binary.as_deref(), reply);
            }
            Event::Request { request: Request::Admin { process, path }, reply } => {
                let found = self.supervisor.find(&process);
                tokio::spawn(async move {
                    let page = match found {
                        // By the box, as a process that has ended can show nothing any more.
                        Ok((_, log)) if path == "/log" => Ok(programs::recent_output(&log)),
                        Ok((Some(socket), _)) => {
                            admin::page(socket, &path).await.map_err(|error| format!("{process}: {error:#}"))
                        }
                        Ok((None, _)) => Err(format!("{process} does not run; it has a /log still")),
                        Err(sentence) => Err(sentence),
                    };
                    let _ = reply.send((page.map(Value::String), Vec::new()));
                });
            }
            Event::Request { request: Request::Status, reply } => {
                let network = &self.kubelet.network;
                let complaints = self.complaints.all(self.cluster.objects());
                let (mut status, handles) =
                    report::status(&self.state, self.authority, &self.cluster, network, &self.supervisor, complaints);
                let control = self.supervisor.control();
                tokio::spawn(async move {
                    if let Some(control) = control {
                        report::add_control_plane_view(&mut status, control).await;
                    }
                    let _ = reply.send((Ok(status), handles));
                });
            }
            Event::Request { request, reply } => {
                let answer = self.answer(request);
                // Who asked may have left.
                let _ = reply.send(answer);
            }
        }
        true
    }

    fn pod_news(&mut self, uid: &str, news: PodNews) {
        match news {
            PodNews::Rooms(rooms) => {
                if let Some(pod) = self.pods.get_mut(uid) {
                    pod.rooms = Some(rooms);
                }
            }
            PodNews::State(state) => self.cluster.pod_is(uid, &state),
            PodNews::Gone => {
                self.pods.remove(uid);
                let actions = self.cluster.pod_is_gone(uid);
                self.act(actions);
            }
        }
        self.publish();
    }

    fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Start(plan) => {
                    let (stop, stopped) = watch::channel(false);
                    let pod = LivePod { plan: (*plan).clone(), stop, rooms: None };
                    self.pods.insert(plan.uid.clone(), pod);
                    // Its object is in the folder before anybody is asked about it.
                    self.publish();
                    tokio::spawn(kubelet::run(self.kubelet.clone(), *plan, stopped));
                }
                Action::Stop { uid } => {
                    if let Some(pod) = self.pods.get(&uid) {
                        pod.stop.send_replace(true);
                    }
                }
            }
        }
    }

    /// Lets the world see the objects as they are now.
    fn publish(&mut self) {
        if let Err(error) = self.folder.hold(self.cluster.objects()) {
            tracing::error!(%error, "cannot write the objects for the control plane");
        }
        let services = Services::of(self.cluster.objects().map(|(_, object)| object));
        if services != self.services {
            for (plan, node) in self.kubelet.network.nodes() {
                if let Err(error) = services.load(node) {
                    tracing::error!(node = plan.name, error = format!("{error:#}"), "cannot load the Services");
                }
            }
            self.services = services;
        }
        self.zone.send_replace(Arc::new(Zone::of(self.cluster.objects().map(|(_, object)| object))));
    }

    async fn end_pods(&mut self) {
        for pod in self.pods.values() {
            pod.stop.send_replace(true);
        }
        while !self.pods.is_empty() {
            match self.inbox.recv().await {
                Some(Event::Pod { uid, news: PodNews::Gone }) => drop(self.pods.remove(&uid)),
                Some(_) => {}
                None => return,
            }
        }
    }

    // ---- requests -------------------------------------------------------------------------------

    fn answer(&mut self, request: Request) -> Reply {
        let without = |answer: Answer| (answer, Vec::new());
        match request {
            Request::Exec { place } => match self.namespaces(&place) {
                Ok((value, namespaces)) => (Ok(value), namespaces),
                Err(error) => without(Err(format!("{error:#}"))),
            },
            Request::Apply { file, text } => without(Ok(self.take(Manifest::from_text(&file, &text)).answer())),
            Request::Delete { file, text } => without(Ok(self.delete(Manifest::from_text(&file, &text)).answer())),
            Request::Resume { process } => self.supervisor.resume(&process),
            // Answered where the event is taken, or later.
            Request::Status
            | Request::Admin { .. }
            | Request::Kill { .. }
            | Request::Upgrade { .. }
            | Request::Stop => without(Ok(Value::Null)),
        }
    }

    fn delete(&mut self, manifest: Manifest) -> Taken {
        let mut taken = Taken::of(manifest.problems);
        for (object, place) in manifest.objects {
            let key = object.key();
            match self.cluster.delete(&key) {
                Some(actions) => {
                    self.act(actions);
                    taken.done.push(format!("{key} deleted"));
                    self.complaints.deleted(&key);
                }
                None => {
                    let sentence =
                        format!("{place}: {key}: there is no such object; `justmtls demo status` shows what there is");
                    taken.refuse(key, sentence);
                }
            }
        }
        self.publish();
        taken
    }

    /// The namespaces of a place, in the order that `exec` reads: pid, network, mounts, host name, IPC and,
    /// in an ordinary user's box, user.
    fn namespaces(&self, place: &Place) -> anyhow::Result<(Value, Vec<OwnedFd>)> {
        let own =
            |kind: &str| -> std::io::Result<OwnedFd> { Ok(fs::File::open(format!("/proc/self/ns/{kind}"))?.into()) };
        let ordinary = self.authority == Authority::UserNamespace;
        let (net, mounts, user) = match place {
            Place::Pod { namespace, name } => {
                let rooms = self.rooms(namespace, name)?;
                (rooms.network.namespace.try_clone()?, rooms.mounts.try_clone()?, rooms.user)
            }
            Place::Node(name) => {
                let found = self.kubelet.network.place(name);
                let found = found.with_context(|| format!("there is no node {name}; {}", self.places()))?;
                (found.try_clone()?, own("mnt")?, None)
            }
        };
        let mut all = vec![own("pid")?, net.into(), mounts, own("uts")?, own("ipc")?];
        if ordinary {
            all.push(own("user")?);
        }
        let user = user.unwrap_or(linux::privileges::User { uid: 0, gid: 0 });
        Ok((json!({ "uid": user.uid, "gid": user.gid, "ordinary": ordinary }), all))
    }

    fn rooms(&self, namespace: &str, name: &str) -> anyhow::Result<&Rooms> {
        let is_it = |pod: &&LivePod| pod.plan.namespace == namespace && pod.plan.name == name;
        let all: Vec<_> = self.pods.values().filter(is_it).collect();
        let Some(pod) = all.last() else {
            let names: Vec<_> =
                self.pods.values().map(|pod| format!("{}/{}", pod.plan.namespace, pod.plan.name)).collect();
            anyhow::bail!("there is no pod {namespace}/{name}; there are {}", names.join(", "));
        };
        let message = self.cluster.pod(namespace, name).and_then(|pod| pod.status.as_ref()?.message.clone());
        pod.rooms.as_deref().with_context(|| {
            format!(
                "pod {namespace}/{name} is not ready for programs: {}",
                message.unwrap_or_else(|| "it is being made".into())
            )
        })
    }

    fn places(&self) -> String {
        let nodes: Vec<_> = self.kubelet.network.nodes().map(|(plan, _)| plan.name.as_str()).collect();
        format!("there are {}, control and outside", nodes.join(", "))
    }
}
