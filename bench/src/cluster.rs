//! The box that everything is measured in: two nodes, and for each contender a pod on one and a pod on the other.

use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::ending::Ending;
use crate::load::{Answer, Order, Work, at};
use crate::processor;

/// How long a started program may take until it is ready.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often something is looked at until then.
const LOOK: Duration = Duration::from_millis(10);

/// A running box. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Cluster {
    folder: TempDir,
    binary: PathBuf,
    init: u32,
    ending: Ending,
}

impl Cluster {
    /// Makes one, with these objects.
    ///
    /// # Errors
    /// What `demo start` said.
    pub(crate) fn start(binary: &Path, manifest: &str, ending: &Ending) -> Result<Cluster> {
        let folder = tempfile::Builder::new().prefix("justmtls-bench-").tempdir()?;
        let manifests = folder.path().join("manifests");
        std::fs::create_dir(&manifests)?;
        std::fs::write(manifests.join("all.yaml"), manifest)?;
        let mut cluster = Cluster { folder, binary: binary.to_owned(), init: 0, ending: ending.clone() };
        ending.set(Some(cluster.state()));
        let quiet = ["start", "--process-argument", "proxy=--access-log=off", "--manifests"];
        cluster.said(cluster.verb(&quiet).arg(&manifests))?;
        let lock = std::fs::read_to_string(cluster.state().join("lock")).context("a box holds its lock")?;
        let starter = lock.split_whitespace().next().and_then(|pid| pid.parse().ok());
        let children = processor::children(starter.context("the lock does not name the starter")?);
        cluster.init = *children.first().context("the starter has no child")?;
        ensure!(cluster.pods()?.iter().all(|pod| pod.ready), "not all pods run: {:#}", cluster.status()?["pods"]);
        Ok(cluster)
    }

    fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    fn verb(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(["demo", "--state"]).arg(self.state()).args(arguments).stdin(Stdio::null());
        command
    }

    fn said(&self, command: &mut Command) -> Result<String> {
        let output = command.stderr(Stdio::inherit()).output().context("cannot run justmtls")?;
        ensure!(output.status.success(), "justmtls demo failed ({})", output.status);
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Adds this many pods, and waits until all run.
    pub(crate) fn apply(&self, manifest: &str, pods: usize) -> Result<()> {
        let wanted = self.pods()?.len() + pods;
        let file = self.folder.path().join("more.yaml");
        std::fs::write(&file, manifest)?;
        self.said(self.verb(&["apply", "-f"]).arg(&file))?;
        let deadline = Instant::now() + PATIENCE;
        while self.pods()?.iter().filter(|pod| pod.ready).count() < wanted {
            ensure!(Instant::now() < deadline, "not all pods run: {:#}", self.status()?["pods"]);
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    fn status(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.said(&mut self.verb(&["status", "--json"]))?)?)
    }

    /// Where each pod is, and whether it is captured.
    pub(crate) fn pods(&self) -> Result<Vec<Pod>> {
        let status = self.status()?;
        let all = status["pods"].as_array().into_iter().flatten().filter_map(Pod::read).collect::<Vec<_>>();
        ensure!(!all.is_empty(), "the box has no pods: {status:#}");
        Ok(all)
    }

    /// The product's processes: `agent` or `proxy` with the node, and `control`.
    pub(crate) fn product(&self) -> Vec<Process> {
        processor::children(self.init).into_iter().filter_map(Process::read).collect()
    }

    /// The first process of the box, which plays the cluster.
    pub(crate) fn init(&self) -> u32 {
        self.init
    }

    /// What a program says that runs in a pod with all privileges.
    ///
    /// # Errors
    /// It is not there, or it fails.
    pub(crate) fn output(&self, pod: &str, command: &[&str]) -> Result<String> {
        let mut exec = self.verb(&["exec", "--privileged"]);
        let output = exec.arg(format!("bench/{pod}")).arg("--").args(command).stderr(Stdio::inherit()).output()?;
        ensure!(output.status.success(), "`{}` in {pod} failed ({})", command.join(" "), output.status);
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Starts this program in a pod, and waits until it says that it is ready.
    pub(crate) fn run(&self, pod: &str, privileged: bool, arguments: &[&str]) -> Result<Running> {
        let own = std::env::current_exe().context("this program has no path")?;
        let mut command = self.verb(&["exec"]);
        if privileged {
            command.arg("--privileged");
        }
        command.args([&format!("bench/{pod}"), "--"]).arg(own).args(arguments);
        Running::start(command.stdin(Stdio::piped())).with_context(|| format!("{} in {pod}", arguments.join(" ")))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Err(error) = self.said(&mut self.verb(&["stop"])) {
            eprintln!("bench: cannot end the box: {error:#}");
        }
        self.ending.set(None);
    }
}

/// A pod of the box.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pod {
    pub(crate) name: String,
    pub(crate) address: IpAddr,
    pub(crate) captured: bool,
    pub(crate) ready: bool,
}

impl Pod {
    fn read(status: &Value) -> Option<Pod> {
        let address = status["addresses"][0].as_str()?.parse().ok()?;
        let name = status["name"].as_str()?.to_owned();
        // A pod that failed is not known to be either.
        let is = |what: &str| status[what].as_bool().unwrap_or(false);
        Some(Pod { name, address, captured: is("captured"), ready: is("ready") })
    }
}

/// A process of the product.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    /// `agent`, `proxy` or `control`.
    pub(crate) role: String,
    /// Whose it is; none of control's.
    pub(crate) node: Option<String>,
}

impl Process {
    fn read(pid: u32) -> Option<Process> {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let words: Vec<String> =
            line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        let role = words.iter().find(|word| ["agent", "proxy", "control"].contains(&word.as_str()))?.clone();
        let node = words.iter().skip_while(|word| *word != "--node").nth(1).cloned();
        Some(Process { pid, role, node })
    }
}

/// A program in a pod. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Running {
    exec: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    /// As this process sees it.
    pub(crate) pid: u32,
}

impl Running {
    fn start(command: &mut Command) -> Result<Running> {
        let mut exec = command.stdout(Stdio::piped()).spawn().context("cannot run justmtls")?;
        let (input, output) = (exec.stdin.take(), exec.stdout.take().context("no standard output")?);
        let mut running = Running { exec, input, output: BufReader::new(output), pid: 0 };
        let said = running.line()?;
        ensure!(said == "ready", "it said {said:?} instead of being ready");
        let deadline = Instant::now() + PATIENCE;
        while running.pid == 0 {
            ensure!(Instant::now() < deadline, "it has no process");
            running.pid = processor::children(running.exec.id()).first().copied().unwrap_or(0);
        }
        Ok(running)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            bail!("it ended ({})", self.exec.wait()?);
        }
        Ok(line.trim_end().to_owned())
    }

    fn ask(&mut self, order: Order) -> Result<Answer> {
        let mut line = serde_json::to_string(&order)?;
        line.push('\n');
        self.input.as_mut().context("it has no standard input")?.write_all(line.as_bytes())?;
        let answer: Answer = serde_json::from_str(&self.line()?)?;
        match answer.error {
            Some(error) => bail!("{order:?}: {error}"),
            None => Ok(answer),
        }
    }

    /// Has a client prepare some work.
    pub(crate) fn prepare(&mut self, work: Work, to: IpAddr, port: u16, time: Duration) -> Result<()> {
        let milliseconds = u64::try_from(time.as_millis())?;
        self.ask(Order::Prepare { work, to: at(to, port), milliseconds }).map(drop)
    }

    /// Has it do the work.
    pub(crate) fn go(&mut self) -> Result<Answer> {
        self.ask(Order::Go)
    }

    /// The processes to count: the program, and who holds its terminal.
    pub(crate) fn pids(&self) -> [u32; 2] {
        [self.pid, self.exec.id()]
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The end of its input ends it; the box takes along what does not listen.
        self.input = None;
        let deadline = Instant::now() + PATIENCE;
        while self.exec.try_wait().is_ok_and(|status| status.is_none()) {
            if Instant::now() > deadline {
                let _ = self.exec.kill();
                let _ = self.exec.wait();
                return;
            }
            std::thread::sleep(LOOK);
        }
    }
}
