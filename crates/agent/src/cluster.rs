//! What the agent needs to know of a node of Kubernetes, and how it comes and goes there.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use mesh::PodUid;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use crate::admin::Shown;
use crate::api_server::{ApiServer, Fate};
use crate::keeper::Keeper;
use crate::plugin::conflist::Entry;
use crate::plugin::place::{Folders, Place};
use crate::plugin::records::Records;
use crate::running;

/// For how long an agent that ends asks what becomes of its DaemonSet, at once or when it has asked and waited before, and the pause
/// between two questions. Kubelet gives it thirty seconds and the drain time.
const ASK_FOR: Duration = Duration::from_secs(20);
const ASK_ON: Duration = Duration::from_secs(4);
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// What is mounted into the agent's container, and what is around it.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Args {
    /// Runs on a node of Kubernetes: running pods are found by the container runtime's socket, and kubelet starts and ends
    /// this process.
    #[arg(long)]
    pub kubernetes: bool,
    /// Unix sockets at which the container runtime may listen (CRI): the first that is there is used.
    #[arg(long, value_delimiter = ',', default_values_os_t = [
        PathBuf::from("/host/run-cri/containerd.sock"),
        PathBuf::from("/host/run-cri/crio.sock"),
    ])]
    pub cri_socket: Vec<PathBuf>,
    /// Folder in which the node's network namespaces (its /run/netns) are seen.
    #[arg(long, default_value = "/run/netns")]
    pub netns_dir: PathBuf,
    /// Folder of the runtime's CNI plugins: justmtls puts its own there.
    #[arg(long, requires = "cni_conf_dir")]
    pub cni_bin_dir: Option<PathBuf>,
    /// Folder of the runtime's CNI configurations: justmtls puts its own there.
    #[arg(long, requires = "cni_bin_dir")]
    pub cni_conf_dir: Option<PathBuf>,
    /// Namespaces whose pods start also while no agent is there. The agent's own, of which `--daemonset` tells, is one of them
    /// by itself.
    #[arg(long, value_delimiter = ',', default_values_t = ["kube-system".to_owned()])]
    pub cni_exempt: Vec<String>,
    /// The DaemonSet of this agent, NAMESPACE/NAME: when it is deleted the plugin is taken out of the node.
    #[arg(long, value_parser = daemonset)]
    pub daemonset: Option<DaemonSet>,
}

/// A DaemonSet by name.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct DaemonSet {
    namespace: String,
    name: String,
}

fn daemonset(text: &str) -> Result<DaemonSet, String> {
    let fits = |name: &str| {
        let letter = |it: char| it.is_ascii_lowercase() || it.is_ascii_digit() || it == '-' || it == '.';
        !name.is_empty() && name.len() <= 253 && name.chars().all(letter)
    };
    match text.split_once('/') {
        Some((namespace, name)) if fits(namespace) && fits(name) => {
            Ok(DaemonSet { namespace: namespace.into(), name: name.into() })
        }
        _ => Err(format!("{text:?} is no DaemonSet; write NAMESPACE/NAME")),
    }
}

impl Args {
    pub(crate) fn has_plugin(&self) -> bool {
        self.cni_bin_dir.is_some()
    }

    /// Of the plugin, where there is to be one.
    pub(crate) fn keeper(&self, socket: &Path, shown: &Arc<Shown>) -> Result<Option<Keeper>> {
        let (Some(binaries), Some(configurations)) = (&self.cni_bin_dir, &self.cni_conf_dir) else { return Ok(None) };
        let program = std::env::current_exe().context("cannot find the program that the plugin is a copy of")?;
        let folders = Folders { binaries: binaries.clone(), configurations: configurations.clone(), program };
        let entry = Entry { socket: socket.to_owned(), exempt: self.exempt() };
        Ok(Some(Keeper::new(Place::new(folders, entry), shown.clone())))
    }

    /// Namespaces whose pods start without an agent. Without its own none would ever be there again after a node's boot.
    fn exempt(&self) -> Vec<String> {
        let own = self.daemonset.iter().map(|it| &it.namespace).filter(|own| !self.cni_exempt.contains(own));
        self.cni_exempt.iter().chain(own).cloned().collect()
    }

    /// Where the container runtime is.
    pub(crate) fn runtime(
        &self,
        socket: &Path,
        since: watch::Receiver<Option<SystemTime>>,
        wanted: watch::Receiver<std::collections::BTreeSet<PodUid>>,
    ) -> running::Place {
        running::Place {
            sockets: self.cri_socket.clone(),
            namespaces: self.netns_dir.clone(),
            records: Records::beside(socket),
            since,
            wanted,
        }
    }

    /// Whether the DaemonSet is being deleted, as far as the API server says: no agent comes after this one.
    pub(crate) async fn is_deleted(&self) -> bool {
        self.fate().await == Fate::Goes
    }

    /// The same, asked again for a while where nobody can say: when all agents of a cluster end at once, some get no answer, and
    /// a plugin that stays where no agent comes keeps pods of its node from starting.
    async fn fate_in_the_end(&self, has_waited: bool) -> Fate {
        let until = Instant::now() + if has_waited { ASK_ON } else { ASK_FOR };
        loop {
            match self.fate().await {
                Fate::Unknown(why) if Instant::now() < until => {
                    tracing::info!(why, "whether another agent comes is asked again");
                    sleep(ASK_AGAIN).await;
                }
                fate => return fate,
            }
        }
    }

    async fn fate(&self) -> Fate {
        let Some(daemonset) = &self.daemonset else { return Fate::Stays };
        match ApiServer::of_pod() {
            Ok(server) => server.fate(&daemonset.namespace, &daemonset.name).await,
            Err(why) => Fate::Unknown(why),
        }
    }

    /// The agent ends. Where nobody comes after it the plugin is taken out, as it would keep every pod of the node waiting.
    /// Whether nobody comes.
    pub(crate) async fn leave(&self, keeper: &Keeper, sockets: [&PathBuf; 3], has_waited: bool) -> bool {
        let fate = self.fate_in_the_end(has_waited).await;
        let goes = fate == Fate::Goes;
        match fate {
            Fate::Stays => tracing::info!("the plugin stays for the next agent"),
            Fate::Goes => match keeper.remove() {
                Ok(()) => {
                    Records::beside(sockets[0]).clear();
                    clear(sockets);
                    tracing::info!("the DaemonSet is deleted, and the plugin taken out of the node");
                }
                Err(why) => tracing::error!(why, "the DaemonSet is deleted, and the plugin could not be taken out"),
            },
            Fate::Unknown(why) => tracing::warn!(
                why,
                "whether another agent comes is not known; the plugin stays, and pods of this node wait for an agent"
            ),
        }
        goes
    }
}

/// Takes away the sockets, and the folders that are empty then. What somebody else keeps there, or a mount, stays.
fn clear(sockets: [&PathBuf; 3]) {
    for socket in sockets {
        let _ = fs::remove_file(socket);
    }
    for folder in sockets.iter().filter_map(|socket| socket.parent()) {
        let _ = fs::remove_dir(folder);
    }
}

/// The folders of the sockets: the proxy's user may pass through the one that its socket is in, and see nothing of it. What
/// agents left there that are gone is removed.
///
/// # Errors
/// A folder cannot be made.
pub(crate) fn prepare(args: &crate::Args) -> io::Result<()> {
    for (socket, mode) in [(&args.cni_socket, 0o711), (&args.proxy_socket, 0o711), (&args.admin, 0o700)] {
        if let Some(folder) = socket.parent() {
            fs::create_dir_all(folder)?;
            fs::set_permissions(folder, Permissions::from_mode(mode))?;
        }
    }
    let Some(folder) = args.admin.parent() else { return Ok(()) };
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
        if path.extension().is_some_and(|it| it == "sock") && UnixStream::connect(&path).is_err_and(refused) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: crate::Args,
    }

    fn line(place: &Path, more: &[&str]) -> Result<crate::Args, String> {
        let at = |name: &str| place.join(name).display().to_string();
        let (proxy, cni, admin) = (at("run/proxy/agent.sock"), at("run/cni.sock"), at("run/agent/pod.sock"));
        let mut all = vec!["agent", "--node", "n", "--control", "10.0.0.1", "--bundle", "b", "--token", "t"];
        all.extend(["--proxy-socket", &proxy, "--proxy-uid", "2147", "--cni-socket", &cni, "--admin", &admin]);
        all.extend(more);
        Line::try_parse_from(all).map(|line| line.args).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_ours_goes_and_what_is_anothers_stays() {
        let place = tempfile::tempdir().unwrap();
        let sockets = ["cni.sock", "proxy/agent.sock", "agent/a.sock"].map(|name| place.path().join(name));
        for socket in &sockets {
            fs::create_dir_all(socket.parent().unwrap()).unwrap();
            fs::write(socket, "").unwrap();
        }
        fs::write(place.path().join("agent/anothers"), "").unwrap();
        clear(sockets.each_ref());
        let left = |folder: &str| fs::read_dir(place.path().join(folder)).unwrap().count();
        assert_eq!((left(""), left("agent")), (1, 1));
    }

    #[test]
    fn the_command_line_of_the_daemonset_is_understood() {
        let place = Path::new("/nowhere");
        let more = ["--kubernetes", "--metrics", "[::]:15021", "--cni-bin-dir", "/host/cni/bin", "--cni-conf-dir"];
        let more =
            [&more[..], &["/host/cni/conf", "--cni-exempt", "a,b", "--daemonset", "justmtls-system/justmtls-node"]];
        let args = line(place, &more.concat()).unwrap();
        assert_eq!(args.control, "10.0.0.1:15012".parse().unwrap());
        assert_eq!(args.cluster.exempt(), ["a", "b", "justmtls-system"], "its own pods wait for no agent");
        let own = ["--cni-exempt", "justmtls-system,a", "--daemonset", "justmtls-system/justmtls-node"];
        assert_eq!(line(place, &own).unwrap().cluster.exempt(), ["justmtls-system", "a"], "each once");
        assert_eq!(args.cluster.cri_socket.len(), 2);
        let wrong = line(place, &["--daemonset", "justmtls-node"]).unwrap_err();
        assert!(wrong.contains("write NAMESPACE/NAME"), "{wrong}");
        assert!(line(place, &["--cni-bin-dir", "/x"]).unwrap_err().contains("--cni-conf-dir"));
    }

    #[test]
    fn folders_are_made_and_what_agents_left_that_are_gone_is_removed() {
        let place = tempfile::tempdir().unwrap();
        let args = line(place.path(), &[]).unwrap();
        prepare(&args).unwrap();
        let mode = |path: &str| fs::metadata(place.path().join(path)).unwrap().permissions().mode() & 0o777;
        assert_eq!([mode("run"), mode("run/proxy"), mode("run/agent")], [0o711, 0o711, 0o700]);
        let (gone, there) = (place.path().join("run/agent/gone.sock"), place.path().join("run/agent/there.sock"));
        drop(UnixListener::bind(&gone).unwrap());
        let _serving = UnixListener::bind(&there).unwrap();
        prepare(&args).unwrap();
        assert!(!gone.exists() && there.exists());
    }
}
