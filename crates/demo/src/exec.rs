//! `exec`: runs a program of the machine in a pod, as a child of the caller, so that terminal, pipes,
//! signals and exit status are the real ones and nothing is copied.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use linux::privileges::{Capabilities, User};
use linux::sandbox;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, pthread_sigmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpgrp, tcgetpgrp, tcsetpgrp};

use crate::conversation::{Place, Request};
use crate::server::request;

/// What to run.
#[derive(Clone, Debug)]
pub struct ExecOptions {
    /// Where.
    pub place: Place,
    /// As whom; `None` is whom the pod says. Another than root needs root's box.
    pub user: Option<u32>,
    /// Whether the program keeps every capability, as a privileged container would.
    pub privileged: bool,
    /// The program and its arguments.
    pub command: Vec<OsString>,
}

/// What shells say for a program that is not there, and for one that cannot be run.
const NOT_FOUND: i32 = 127;
const NOT_EXECUTABLE: i32 = 126;

/// Proxies of the machine cannot be reached from a pod; programs would wait for them in vain.
const FOREIGN: [&str; 8] =
    ["http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"];

/// Runs a program in the box at `state` and gives its exit status; 128 and the signal's number for one
/// that a signal ended. The caller must not have started threads.
pub fn exec(state: &Path, options: &ExecOptions) -> anyhow::Result<i32> {
    let [program, arguments @ ..] = options.command.as_slice() else { bail!("there is no program to run") };
    let (answer, namespaces) = request(state, &Request::Exec { place: options.place.clone() })?;
    let mut rooms = Rooms::from_answer(namespaces)?;
    let user = user(options, &answer)?;
    let capabilities = if options.privileged || matches!(options.place, Place::Node(_)) {
        Capabilities::ALL
    } else {
        Capabilities::OF_A_CONTAINER
    };
    let directory = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
    sandbox::enter_box(rooms.user.as_ref().map(AsFd::as_fd), rooms.pid.as_fd()).context("cannot enter the box")?;

    let mut command = Command::new(program);
    command.args(arguments).env("PATH", path());
    for name in FOREIGN {
        command.env_remove(name);
    }
    let place = sandbox::Place {
        mount: rooms.mount.take(),
        net: Some(rooms.net),
        others: rooms.others,
        directory,
        user: Some(user),
        capabilities,
        dies_with_caller: true,
    };
    // Before the program's own arrangements: the terminal is handed over while signals cannot stop us.
    let signals = ForwardedSignals::block()?;
    let terminal = Terminal::of_an_interactive_program();
    if terminal.is_some() {
        command.process_group(0);
    }
    sandbox::run_in(&mut command, place);
    let child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            eprintln!("cannot run {}: {error}", program.display());
            return Ok(if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { NOT_EXECUTABLE });
        }
    };
    let pid = Pid::from_raw(child.id() as i32);
    if let Some(terminal) = &terminal {
        terminal.give_to(pid);
    }
    let status = signals.forward_until_the_end_of(pid, terminal.as_ref())?;
    if let Some(terminal) = &terminal {
        terminal.give_to(getpgrp());
    }
    Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}

/// The namespaces, in the order in which the box sends them.
struct Rooms {
    pid: OwnedFd,
    net: OwnedFd,
    mount: Option<OwnedFd>,
    user: Option<OwnedFd>,
    others: Vec<OwnedFd>,
}

impl Rooms {
    fn from_answer(namespaces: Vec<OwnedFd>) -> anyhow::Result<Rooms> {
        let mut all = namespaces.into_iter();
        let mut next = || all.next().context("the box sent too few namespaces");
        let (pid, net, mount) = (next()?, next()?, next()?);
        let others = vec![next()?, next()?];
        Ok(Rooms { pid, net, mount: Some(mount), others, user: all.next() })
    }
}

fn user(options: &ExecOptions, answer: &serde_json::Value) -> anyhow::Result<User> {
    let number = |name: &str| answer[name].as_u64().and_then(|id| u32::try_from(id).ok()).unwrap_or(0);
    let user = match options.user {
        None => User { uid: number("uid"), gid: number("gid") },
        Some(uid) => User { uid, gid: uid },
    };
    if answer["ordinary"].as_bool() == Some(true) && user != (User { uid: 0, gid: 0 }) {
        bail!("--user needs a box of root: in an ordinary user's there is only that user");
    }
    Ok(user)
}

fn path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    path.push(":/run/justmtls/bin");
    path
}

/// The terminal of a caller who sits at it.
struct Terminal;

impl Terminal {
    /// Only when all three streams are the terminal and we are in front of it: in a pipeline the other
    /// programs must stay in front, too.
    fn of_an_interactive_program() -> Option<Terminal> {
        let all = std::io::stdin().is_terminal() && std::io::stdout().is_terminal() && std::io::stderr().is_terminal();
        (all && tcgetpgrp(std::io::stdin()).ok()? == getpgrp()).then_some(Terminal)
    }

    fn give_to(&self, group: Pid) {
        // SIGTTOU is blocked, so this works from the background, too.
        let _ = tcsetpgrp(std::io::stdin(), group);
    }
}

struct ForwardedSignals {
    set: SigSet,
}

impl ForwardedSignals {
    fn block() -> anyhow::Result<ForwardedSignals> {
        use Signal::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTTOU, SIGUSR1, SIGUSR2, SIGWINCH};
        let set = SigSet::from_iter([SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH]);
        let mut blocked = set;
        blocked.add(SIGTTOU);
        pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&blocked), None)?;
        Ok(ForwardedSignals { set })
    }

    fn forward_until_the_end_of(
        &self,
        pid: Pid,
        terminal: Option<&Terminal>,
    ) -> anyhow::Result<std::process::ExitStatus> {
        let signals = SignalFd::with_flags(&self.set, SfdFlags::SFD_CLOEXEC)?;
        loop {
            match waitpid(pid, Some(WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED))? {
                WaitStatus::Exited(_, status) => return Ok(ExitStatusExt::from_raw(status << 8)),
                WaitStatus::Signaled(_, signal, _) => return Ok(ExitStatusExt::from_raw(signal as i32)),
                WaitStatus::Stopped(..) => self.stop_too(pid, terminal)?,
                _ => {}
            }
            let Some(signal) = signals.read_signal()? else { continue };
            // What the terminal sends reaches the program itself, as it is in the same process group.
            let from_terminal = signal.ssi_code == SI_KERNEL;
            if let Ok(signal) = Signal::try_from(signal.ssi_signo as i32)
                && signal != Signal::SIGCHLD
                && !from_terminal
            {
                let _ = kill(pid, signal);
            }
        }
    }

    /// Ctrl-Z: the caller's shell takes over until it sends us on.
    fn stop_too(&self, pid: Pid, terminal: Option<&Terminal>) -> anyhow::Result<()> {
        if let Some(terminal) = terminal {
            terminal.give_to(getpgrp());
        }
        kill(Pid::this(), Signal::SIGSTOP)?;
        if let Some(terminal) = terminal {
            terminal.give_to(pid);
        }
        let _ = kill(pid, Signal::SIGCONT);
        Ok(())
    }
}

/// `si_code` of a signal that the kernel itself sent, such as a terminal's Ctrl-C.
const SI_KERNEL: i32 = 0x80;
