//! A container's program in a pod: where it runs, as whom, with which output, and how often again.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use linux::privileges::{Capabilities, User};
use linux::sandbox::{self, Authority, Place, RUN};
use manifests::k8s_openapi::api::core::v1::{Container, PodSpec};
use nix::mount::{MsFlags, mount};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use crate::children;
use crate::cluster::PodPlan;
use crate::kubelet::{Kubelet, Rooms};

/// Kubernetes' first delay between restarts is 10 s; a demonstration has less patience.
const FIRST_RESTART: Duration = Duration::from_millis(250);
const LAST_RESTART: Duration = Duration::from_secs(30);
/// A program that ran this long is not crash-looping.
const RECOVERED: Duration = Duration::from_secs(10);
/// Of a program's output so much is kept at most, in two halves of which the older one goes: the box's files are memory.
const LOG_LIMIT: u64 = 1 << 20;
/// What a program of a pod finds without being told more.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/run/justmtls/bin";

/// How a pod's programs are doing, all together.
#[derive(Clone, Debug, Default)]
pub(crate) struct Progress {
    /// How many run now.
    pub(crate) running: usize,
    /// What happened last, in words.
    pub(crate) message: String,
    /// Whether all ended well, once none will be started again.
    pub(crate) ended: Option<bool>,
}

/// A program to be run.
pub(crate) struct Program {
    pub(crate) kubelet: Arc<Kubelet>,
    pub(crate) rooms: Arc<Rooms>,
    pub(crate) plan: PodPlan,
    pub(crate) container: Container,
}

impl Program {
    /// Runs the program, and again as `policy` (`restartPolicy`) says. Returns whether its last run was
    /// a success.
    pub(crate) async fn keep_running(&self, policy: &str, progress: &watch::Sender<Progress>) -> bool {
        let mut delay = FIRST_RESTART;
        loop {
            let started = Instant::now();
            let (success, message) = match self.start() {
                Ok(child) => {
                    progress.send_modify(|progress| progress.running += 1);
                    let status = child.ended.await;
                    progress.send_modify(|progress| progress.running -= 1);
                    match status {
                        Ok(status) => (status.success(), children::describe(status)),
                        Err(_) => (false, "lost".to_owned()),
                    }
                }
                Err(error) => (false, format!("{error:#}")),
            };
            let message = format!("container {}: {message}", self.container.name);
            progress.send_modify(|progress| progress.message = message);
            match policy {
                "Never" => return success,
                "OnFailure" if success => return true,
                _ => {}
            }
            if started.elapsed() > RECOVERED {
                delay = FIRST_RESTART;
            }
            sleep(delay).await;
            delay = (delay * 2).min(LAST_RESTART);
        }
    }

    fn start(&self) -> anyhow::Result<children::Child> {
        let mut words = self.container.command.iter().flatten().chain(self.container.args.iter().flatten());
        let Some(program) = words.next() else { bail!("it has no command, and images are not read here") };
        let (user, capabilities) = security(&self.plan.spec, Some(&self.container), self.kubelet.authority)?;
        let mut command = Command::new(program);
        command.args(words).env_clear().env("PATH", PATH).env("HOSTNAME", &self.plan.name);
        for variable in self.container.env.iter().flatten() {
            command.env(&variable.name, variable.value.as_deref().unwrap_or_default());
        }
        let output = output(log_path(&self.kubelet.logs, &self.plan.namespace, &self.plan.name, &self.container.name))?;
        command.stdin(Stdio::null()).stderr(output.try_clone()?).stdout(output);
        let place = Place {
            mount: Some(self.rooms.mounts.try_clone()?),
            net: Some(self.rooms.network.namespace.try_clone()?.into()),
            others: Vec::new(),
            directory: self.container.working_dir.clone().unwrap_or_else(|| "/".to_owned()).into(),
            user,
            capabilities,
            dies_with_caller: false,
        };
        sandbox::run_in(&mut command, place);
        self.kubelet.children.spawn(&mut command).with_context(|| format!("cannot run {program}"))
    }
}

/// Where a program's output goes: a pipe whose other end keeps the last part in files.
pub(crate) fn output(path: PathBuf) -> io::Result<OwnedFd> {
    let file = File::options().create(true).append(true).open(&path)?;
    let (reader, writer) = io::pipe()?;
    // A pipe and a thread, as a file in memory without bound could fill the machine.
    std::thread::Builder::new().name("log".into()).spawn(move || keep_last_part(reader, file, &path))?;
    Ok(writer.into())
}

/// The file with a container's output.
fn log_path(logs: &Path, namespace: &str, pod: &str, container: &str) -> PathBuf {
    logs.join(format!("{namespace}_{pod}_{container}.log"))
}

fn keep_last_part(mut reader: io::PipeReader, mut file: File, path: &Path) {
    use std::io::Read;
    let mut buffer = [0; 8192];
    // To the end whatever happens: a program whose output nobody reads would stand still.
    while let Ok(length @ 1..) = reader.read(&mut buffer) {
        let present = file.metadata().map_or(0, |found| found.len());
        if present + length as u64 > LOG_LIMIT / 2 && fs::rename(path, older_half(path)).is_ok() {
            let Ok(fresh) = File::create(path) else { continue };
            file = fresh;
        }
        let _ = file.write_all(&buffer[..length]);
    }
}

/// What is kept of a program's output.
pub(crate) fn recent_output(path: &Path) -> String {
    let halves = [older_half(path), path.to_owned()];
    halves
        .iter()
        .filter_map(|half| fs::read(half).ok())
        .map(|half| String::from_utf8_lossy(&half).into_owned())
        .collect()
}

fn older_half(path: &Path) -> PathBuf {
    path.with_added_extension("older")
}

/// As whom a container runs, and with what.
pub(crate) fn security(
    spec: &PodSpec,
    container: Option<&Container>,
    authority: Authority,
) -> anyhow::Result<(Option<User>, Capabilities)> {
    let of_pod = spec.security_context.as_ref();
    let of_container = container.and_then(|container| container.security_context.as_ref());
    let uid = of_container.and_then(|it| it.run_as_user).or(of_pod.and_then(|it| it.run_as_user));
    let gid = of_container.and_then(|it| it.run_as_group).or(of_pod.and_then(|it| it.run_as_group));
    let privileged = of_container.and_then(|it| it.privileged).unwrap_or(false);
    let capabilities = if privileged { Capabilities::ALL } else { Capabilities::OF_A_CONTAINER };
    let id = |id: Option<i64>| id.map_or(Ok(0), u32::try_from);
    let user = User { uid: id(uid)?, gid: id(gid)? };
    if authority == Authority::UserNamespace && user != ROOT {
        bail!("runAsUser and runAsGroup need a box of root: in an ordinary user's there is only that user");
    }
    Ok((Some(user), capabilities))
}

const ROOT: User = User { uid: 0, gid: 0 };

/// The pod's own mounts: its `/etc/resolv.conf` and `/etc/hosts`, memory of its own in `/dev/shm`, and
/// nothing of the box's but the binary.
pub(crate) fn furnish(plan: &PodPlan) -> anyhow::Result<OwnedFd> {
    let (resolv, hosts) = (resolv_conf(plan), hosts(plan));
    let mounts = sandbox::mount_namespace(move || {
        let binary = File::open(Path::new(RUN).join("bin"))?;
        let memory = |at: &str, options: &str| {
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
            mount(Some("tmpfs"), at, Some("tmpfs"), flags, Some(options))
        };
        // Over the box's own files: a pod has no business with the tokens of agents and proxies.
        memory(RUN, "mode=0755,size=4m")?;
        let bin = Path::new(RUN).join("bin");
        fs::create_dir(&bin)?;
        bind(Path::new(&descriptor_path(&binary)), &bin)?;
        if Path::new("/dev/shm").is_dir() {
            memory("/dev/shm", "mode=1777")?;
        }
        for (name, text) in [("resolv.conf", &resolv), ("hosts", &hosts)] {
            let file = Path::new(RUN).join(name);
            fs::write(&file, text)?;
            let target = Path::new("/etc").join(name);
            // Where the machine has none there is nothing to cover, and nothing may be made on its disk.
            if target.exists() {
                bind(&file, &target)?;
            }
        }
        Ok(())
    });
    mounts.context("cannot make the pod's mounts")
}

fn bind(from: &Path, to: &Path) -> nix::Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
}

fn descriptor_path(file: &File) -> String {
    use std::os::fd::AsRawFd;
    format!("/proc/thread-self/fd/{}", file.as_raw_fd())
}

/// As kubelet writes it.
fn resolv_conf(plan: &PodPlan) -> String {
    format!(
        "nameserver {}\nsearch {}.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n",
        plan.node.gateway.v4, plan.namespace
    )
}

fn hosts(plan: &PodPlan) -> String {
    let mut text = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    for address in plan.addresses.both() {
        text += &format!("{address}\t{}\n", plan.name);
    }
    for alias in plan.spec.host_aliases.iter().flatten() {
        text +=
            &format!("{}\t{}\n", alias.ip, alias.hostnames.iter().flatten().cloned().collect::<Vec<_>>().join("\t"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_long_output_the_last_part_is_kept() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("pod.log");
        let mut writer = File::from(output(path.clone()).unwrap());
        let line = "x".repeat(1023) + "\n";
        for _ in 0..4096 {
            writer.write_all(line.as_bytes()).unwrap();
        }
        writer.write_all(b"the end\n").unwrap();
        drop(writer);
        while !recent_output(&path).ends_with("the end\n") {
            std::thread::yield_now();
        }
        let kept = recent_output(&path).len() as u64;
        assert!((LOG_LIMIT / 2..=LOG_LIMIT).contains(&kept), "{kept}");
    }
}
