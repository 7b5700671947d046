//! Pods that run already: which the container runtime has, and where their network namespaces are. So pods are captured that
//! ran before the product came, and those that a runtime made without the plugin; and those are let go that are gone.
//!
//! The runtime is asked when the control plane names a pod of whose sandbox nobody has told, and now and then.

use std::collections::{BTreeSet, HashMap};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use linux::netns::NetNs;
use mesh::PodUid;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout_at};
use wire::cri::{ContainerRuntime, CriError, Sandbox};

use crate::plugin::records::Records;
use crate::pods::Running;
use crate::process::Event;

/// The pause between two questions where nothing is missing.
const EVERY: Duration = Duration::from_secs(20);
/// The shortest one: kubelet makes a sandbox some time after its pod is bound to the node.
const SOON: Duration = Duration::from_millis(250);
/// A runtime takes up another configuration within this time: what was made in it may have been made without us.
const TAKES_UP: Duration = Duration::from_secs(5);
/// A pod that the runtime has not listed for so long is gone.
const GONE: Duration = Duration::from_secs(60);
/// Where sandboxes' network namespaces are on a node; the first is what the agent sees.
const NAMESPACES: [&str; 2] = ["/run/netns", "/var/run/netns"];

/// What the runtime has.
#[derive(Debug)]
pub(crate) enum Seen {
    /// It answers, or why it does not.
    Runtime(Result<String, String>),
    /// A pod that is to be captured, or to be looked into, and whose sandbox it has.
    Found {
        /// Which.
        running: Running,
        /// Its namespace.
        namespace: NetNs,
        /// It was made when the plugin was in place, and the plugin was not asked.
        missed: bool,
    },
    /// A pod whose sandbox it has and whose namespace cannot be found; why.
    Unfound(PodUid, String),
    /// All pods of which it has a sandbox, in whatever state.
    All(BTreeSet<PodUid>),
}

/// Where the runtime is, and what is to be known of it.
pub(crate) struct Place {
    /// Where its socket may be: the first that is there counts.
    pub(crate) sockets: Vec<PathBuf>,
    /// Where the node's network namespaces are seen.
    pub(crate) namespaces: PathBuf,
    /// What the plugin noted.
    pub(crate) records: Records,
    /// Since when the plugin is in place.
    pub(crate) since: watch::Receiver<Option<SystemTime>>,
    /// The pods that are looked for.
    pub(crate) wanted: watch::Receiver<BTreeSet<PodUid>>,
}

/// The loop that hears it has ended, and so has the process.
struct Ended;

/// Asks for as long as somebody listens.
pub(crate) async fn follow(mut place: Place, events: mpsc::Sender<Event>) {
    let mut said = None;
    loop {
        let why = match place.connect().await {
            Ok((mut runtime, name)) => {
                said = None;
                if tell(&events, Seen::Runtime(Ok(name))).await.is_err() {
                    return;
                }
                match place.ask(&mut runtime, &events).await {
                    Ok(error) => error.to_string(),
                    Err(Ended) => return,
                }
            }
            Err(why) => why,
        };
        if said.as_ref() != Some(&why) {
            said = Some(why.clone());
            if tell(&events, Seen::Runtime(Err(why))).await.is_err() {
                return;
            }
        }
        sleep(Duration::from_secs(1)).await;
    }
}

impl Place {
    async fn connect(&self) -> Result<(ContainerRuntime, String), String> {
        let Some(socket) = self.sockets.iter().find(|socket| socket.exists()) else {
            let tried: Vec<_> = self.sockets.iter().map(|socket| socket.display().to_string()).collect();
            return Err(format!("no container runtime listens at {} (--cri-socket)", tried.join(", ")));
        };
        ContainerRuntime::connect(socket).await.map_err(|error| error.to_string())
    }

    /// Until the runtime fails.
    async fn ask(&mut self, runtime: &mut ContainerRuntime, events: &mpsc::Sender<Event>) -> Result<CriError, Ended> {
        let mut pause = SOON;
        loop {
            let wanted = self.wanted.borrow_and_update().clone();
            let all = match runtime.sandboxes().await {
                Ok(all) => all,
                Err(error) => return Ok(error),
            };
            for sandbox in newest(&all).into_values().filter(|sandbox| wanted.contains(&sandbox.pod)) {
                let seen = match runtime.network_namespace(&sandbox.id).await {
                    Ok(path) => self.found(sandbox, &path),
                    // It may have gone since: the next list says.
                    Err(error) => Seen::Unfound(sandbox.pod.clone(), error.to_string()),
                };
                tell(events, seen).await?;
            }
            tell(events, Seen::All(all.into_iter().map(|sandbox| sandbox.pod).collect())).await?;
            pause = self.wait(&wanted, pause).await?;
        }
    }

    /// Waits until there is something to ask for. What is wanted and is not there is asked for again, ever more slowly.
    async fn wait(&mut self, before: &BTreeSet<PodUid>, pause: Duration) -> Result<Duration, Ended> {
        let pause = if before.is_empty() { EVERY } else { pause };
        let until = Instant::now() + pause;
        loop {
            match timeout_at(until, self.wanted.changed()).await {
                Err(_) => return Ok((pause * 2).min(EVERY)),
                Ok(Err(_)) => return Err(Ended),
                Ok(Ok(())) if self.wanted.borrow_and_update().is_subset(before) => {}
                Ok(Ok(())) => {
                    sleep(SOON).await;
                    return Ok(SOON);
                }
            }
        }
    }

    fn found(&self, sandbox: &Sandbox, path: &Path) -> Seen {
        let opened = self.seen_here(path).and_then(|path| NetNs::open(&path).map_err(|error| error.to_string()));
        match opened {
            Err(why) => Seen::Unfound(sandbox.pod.clone(), why),
            Ok(namespace) => Seen::Found {
                running: Running {
                    pod: sandbox.pod.clone(),
                    name: format!("{}/{}", sandbox.namespace, sandbox.name),
                    container: sandbox.id.clone(),
                },
                namespace,
                missed: is_missed(sandbox.created_at, *self.since.borrow(), self.records.has(&sandbox.id)),
            },
        }
    }

    /// The runtime's path as this process sees it. Whatever the runtime says, nothing but that folder is opened.
    fn seen_here(&self, path: &Path) -> Result<PathBuf, String> {
        let below = NAMESPACES.iter().find_map(|folder| path.strip_prefix(folder).ok());
        let plain = below.filter(|below| below.components().all(|it| matches!(it, Component::Normal(_))));
        plain.map(|below| self.namespaces.join(below)).ok_or_else(|| {
            format!(
                "the container runtime says that its network namespace is {}, which is not below {}",
                path.display(),
                NAMESPACES[0]
            )
        })
    }
}

/// The sandbox of each pod that runs: kubelet may have several of one pod, and only the last one of them is it.
fn newest(all: &[Sandbox]) -> HashMap<&PodUid, &Sandbox> {
    let mut newest: HashMap<&PodUid, &Sandbox> = HashMap::new();
    for sandbox in all.iter().filter(|sandbox| sandbox.ready) {
        let before = newest.entry(&sandbox.pod).or_insert(sandbox);
        if (sandbox.attempt, sandbox.created_at) > (before.attempt, before.created_at) {
            *before = sandbox;
        }
    }
    newest
}

/// Whether a sandbox should have come to us before its programs started, and did not (T9).
fn is_missed(created_at: i64, since: Option<SystemTime>, noted: bool) -> bool {
    let Some(since) = since else { return false };
    let created = UNIX_EPOCH + Duration::from_nanos(u64::try_from(created_at).unwrap_or(0));
    !noted && created > since + TAKES_UP
}

/// Since when pods are missing from the runtime's list. It lists a sandbox some time after the plugin was asked about it.
#[derive(Debug, Default)]
pub(crate) struct Missing(HashMap<PodUid, Instant>);

impl Missing {
    /// Those of `standing` that are gone.
    pub(crate) fn gone(&mut self, standing: &BTreeSet<PodUid>, all: &BTreeSet<PodUid>, now: Instant) -> Vec<PodUid> {
        let since = |pod: &PodUid| self.0.get(pod).copied().unwrap_or(now);
        self.0 = standing.difference(all).map(|pod| (pod.clone(), since(pod))).collect();
        let gone = self.0.extract_if(|_, since| now.duration_since(*since) >= GONE);
        gone.map(|(pod, _)| pod).collect()
    }
}

async fn tell(events: &mpsc::Sender<Event>, seen: Seen) -> Result<(), Ended> {
    events.send(Event::Seen(seen)).await.map_err(|_| Ended)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox(id: &str, pod: &str, attempt: u32, ready: bool) -> Sandbox {
        let pod = PodUid::from(pod);
        Sandbox { id: id.into(), pod, namespace: "shop".into(), name: "web".into(), attempt, ready, created_at: 0 }
    }

    #[test]
    fn of_several_sandboxes_of_a_pod_the_last_that_runs_is_it() {
        let all = [
            sandbox("first", "a", 0, false),
            sandbox("third", "a", 2, true),
            sandbox("second", "a", 1, true),
            sandbox("dead", "b", 0, false),
        ];
        let newest = newest(&all);
        assert_eq!(newest.len(), 1);
        assert_eq!(newest[&PodUid::from("a")].id, "third");
    }

    #[test]
    fn a_sandbox_is_missed_when_it_was_made_with_the_plugin_in_place_and_without_it() {
        let since = UNIX_EPOCH + Duration::from_secs(1_000);
        let at = |seconds: i64| seconds * 1_000_000_000;
        assert!(is_missed(at(1_006), Some(since), false));
        assert!(!is_missed(at(1_006), Some(since), true), "the plugin noted it");
        assert!(!is_missed(at(1_006), None, false), "there was no plugin");
        assert!(!is_missed(at(999), Some(since), false), "it ran before");
        assert!(!is_missed(at(1_004), Some(since), false), "the runtime may not have read the configuration yet");
        assert!(!is_missed(-1, Some(since), false));
    }

    #[test]
    fn a_path_is_looked_up_in_one_folder_and_nowhere_else() {
        let (since, wanted) = (watch::Sender::new(None), watch::Sender::new(BTreeSet::new()));
        let place = Place {
            sockets: Vec::new(),
            namespaces: "/host/netns".into(),
            records: Records::beside(Path::new("/nowhere/cni.sock")),
            since: since.subscribe(),
            wanted: wanted.subscribe(),
        };
        for path in ["/run/netns/cni-1", "/var/run/netns/cni-1"] {
            assert_eq!(place.seen_here(Path::new(path)), Ok("/host/netns/cni-1".into()));
        }
        for path in ["/proc/1/ns/net", "/run/netns/../../etc/passwd", "cni-1", "/run/netns2/x"] {
            assert!(place.seen_here(Path::new(path)).unwrap_err().contains(path));
        }
    }

    #[test]
    fn a_pod_is_gone_when_the_runtime_has_not_listed_it_for_a_minute() {
        let pods = |names: &[&str]| names.iter().map(|name| PodUid::from(*name)).collect::<BTreeSet<_>>();
        let (mut missing, begin, both) = (Missing::default(), Instant::now(), pods(&["a", "b"]));
        let at = |seconds| begin + Duration::from_secs(seconds);
        assert_eq!(missing.gone(&both, &pods(&["b"]), at(0)), []);
        assert_eq!(missing.gone(&both, &pods(&["b"]), at(59)), []);
        assert_eq!(missing.gone(&both, &both, at(60)), [], "it is there again");
        assert_eq!(missing.gone(&both, &pods(&["b"]), at(70)), []);
        assert_eq!(missing.gone(&both, &pods(&[]), at(130)), [PodUid::from("a")]);
        assert_eq!(missing.gone(&pods(&["b"]), &pods(&[]), at(190)), [PodUid::from("b")]);
    }
}
