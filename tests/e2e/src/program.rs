//! Programs: started with their input, watched while they run, and ended when their time is over.

use std::ffi::OsStr;
use std::fmt;
use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait::{PATIENCE, pause, wait_until};

/// A program that has not been started yet.
#[derive(Debug)]
pub struct Program {
    command: Command,
    input: Vec<u8>,
    within: Duration,
}

/// A program that has ended.
#[derive(Debug)]
pub struct Finished {
    /// What was run, for messages.
    pub command: String,
    /// How it ended.
    pub status: ExitStatus,
    /// All that it said.
    pub stdout: String,
    /// All that it complained about.
    pub stderr: String,
    /// How long it ran.
    pub took: Duration,
}

/// A program that runs. Dropping it kills it.
#[derive(Debug)]
pub struct Running {
    shown: String,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Collector,
    stderr: Collector,
    started: Instant,
}

/// What comes out of a pipe, as it comes.
#[derive(Debug)]
struct Collector {
    text: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Program {
    /// A program of the machine.
    pub fn new(program: impl AsRef<OsStr>) -> Program {
        Program { command: Command::new(program), input: Vec::new(), within: PATIENCE }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args(mut self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Program {
        self.command.args(arguments);
        self
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Program {
        self.command.env(name, value);
        self
    }

    /// What it reads; nothing otherwise.
    #[must_use]
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Program {
        self.input = bytes.into();
        self
    }

    /// How long it may take; otherwise [`PATIENCE`].
    #[must_use]
    pub fn within(mut self, within: Duration) -> Program {
        self.within = within;
        self
    }

    /// Runs it to its end.
    #[track_caller]
    pub fn run(mut self) -> Finished {
        let (input, within) = (std::mem::take(&mut self.input), self.within);
        let mut running = self.spawn();
        if let Some(mut stdin) = running.stdin.take() {
            // On a thread of its own: the program may write before it has read everything. One that does not read is no error.
            std::thread::spawn(move || stdin.write_all(&input));
        }
        running.finish(within)
    }

    /// Starts it; its standard input stays open until it is closed.
    #[track_caller]
    pub fn spawn(mut self) -> Running {
        let shown = shortened(&format!("{:?}", self.command));
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.command.spawn().unwrap_or_else(|error| panic!("cannot start {shown}: {error}"));
        let stdout = Collector::of(child.stdout.take().expect("a pipe"));
        let stderr = Collector::of(child.stderr.take().expect("a pipe"));
        let stdin = child.stdin.take();
        Running { shown, child, stdin, stdout, stderr, started: Instant::now() }
    }
}

impl Finished {
    /// Whether it ended well.
    #[must_use]
    pub fn success(&self) -> bool {
        self.status.success()
    }

    /// Its output, if it ended well; panics with everything that is known otherwise.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(self.success(), "{self}");
        self.stdout
    }

    /// Its complaint, if it ended badly; panics with everything that is known otherwise.
    #[track_caller]
    pub fn fails(self) -> String {
        assert!(!self.success(), "should have failed: {self}");
        self.stderr
    }
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Finished { command, status, stdout, stderr, took } = self;
        write!(f, "{command}: {status} after {took:.1?}\n{}{}", shortened(stdout), shortened(stderr))
    }
}

/// A test's report is for reading.
fn shortened(text: &str) -> String {
    const MOST: usize = 2000;
    let mut short: String = text.chars().take(MOST).collect();
    if short.len() < text.len() {
        short += "…";
    }
    short
}

impl Running {
    /// The process id. For `exec` it is that of `justmtls`, which passes signals on.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// What it has said so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        self.stdout.so_far()
    }

    /// What it has complained about so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.stderr.so_far()
    }

    /// Gives it something to read.
    #[track_caller]
    pub fn write(&mut self, bytes: impl AsRef<[u8]>) {
        let stdin = self.stdin.as_mut().expect("standard input is open");
        stdin.write_all(bytes.as_ref()).unwrap_or_else(|error| panic!("{} does not read: {error}", self.shown));
        stdin.flush().expect("a pipe has no buffer");
    }

    /// Ends its input.
    pub fn close_input(&mut self) {
        self.stdin = None;
    }

    /// Waits until it has said `text`, on either stream.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        self.wait_for_within(text, PATIENCE);
    }

    /// The same, with another limit.
    #[track_caller]
    pub fn wait_for_within(&mut self, text: &str, within: Duration) {
        wait_until(&format!("{text:?} from {}", self.shown), within, || {
            let (said, complained) = (self.stdout(), self.stderr());
            if said.contains(text) || complained.contains(text) {
                return Ok(());
            }
            Err(format!("{}{said}{complained}", if self.is_alive() { "" } else { "it has ended; " }))
        });
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends it a signal; one that has ended already is fine.
    pub fn signal(&self, signal: Signal) {
        let _ = kill(self.pid(), signal);
    }

    /// Waits for its end. A program that takes longer is killed, and the test fails.
    #[track_caller]
    pub fn finish(mut self, within: Duration) -> Finished {
        self.close_input();
        let deadline = Instant::now() + within;
        let status = wait_until(&format!("the end of {}", self.shown), within, || match self.child.try_wait() {
            Ok(Some(status)) => Ok(status),
            _ => Err(format!("it runs, and has said:\n{}{}", self.stdout(), self.stderr())),
        });
        let took = self.started.elapsed();
        // What it left behind in the background may hold the pipes open for ever.
        let left = deadline.saturating_duration_since(Instant::now()).min(Duration::from_secs(2));
        let (stdout, stderr) = (self.stdout.all(left), self.stderr.all(left));
        Finished { command: self.shown.clone(), status, stdout, stderr, took }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.is_alive() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

impl Collector {
    fn of(mut pipe: impl Read + Send + 'static) -> Collector {
        let text = Arc::new(Mutex::new(Vec::new()));
        let collected = text.clone();
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 65536];
            while let Ok(length @ 1..) = pipe.read(&mut buffer) {
                collected.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&buffer[..length]);
            }
        });
        Collector { text, reader }
    }

    fn so_far(&self) -> String {
        String::from_utf8_lossy(&self.text.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    fn all(&self, within: Duration) -> String {
        let deadline = Instant::now() + within;
        while !self.reader.is_finished() && Instant::now() < deadline {
            pause();
        }
        self.so_far()
    }
}
