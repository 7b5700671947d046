//! A client that counts for itself: short connections, long ones, and bulk, each checked to the last byte.
//!
//! It prints a line of JSON every 250 ms, and one when somebody says that something happens: the counts before, during and
//! after that are kept apart, by when each request began.

mod tally;
mod work;

use std::cell::{Cell, RefCell};
use std::io::{self, BufRead, Write};
use std::rc::Rc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::{JoinSet, LocalSet};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use tally::{Begun, Phase, Tally, Work};
use work::{Broken, Client};

/// Whom to ask, how, and how often.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// `HOST:PORT`, looked up for every connection.
    pub to: String,
    /// So many ask at the same time, each request on a connection of its own.
    pub short: usize,
    /// Requests a second on short connections, of all together; 0 is as many as possible.
    pub rate: u32,
    /// Short connections altogether; 0 goes on for ever.
    pub count: u64,
    /// Connections that are opened at the start and never again.
    pub long: usize,
    /// How often each of those asks, and the pause between two transfers of bulk.
    pub every: Duration,
    /// Connections that carry bulk, one transfer after the other: down, then up.
    pub bulk: usize,
    /// Bytes of a transfer.
    pub bulk_bytes: u64,
    /// How long a connect, or an answer, may take.
    pub patience: Duration,
    /// Something to be found in every request and answer.
    pub marker: String,
    /// Reads from standard input: `event` and `over` are said when something begins and has ended; `end`, or the end of
    /// the input, asks for the last report.
    pub controlled: bool,
}

const REPORT_EVERY: Duration = Duration::from_millis(250);
/// Who fails does not try again at once: a failure must not be counted a thousand times for one cause.
const AFTER_FAILURE: Duration = Duration::from_millis(20);
/// Long connections that are being opened at a time.
const OPENING: usize = 64;

/// What all parts of a load share.
struct Shared {
    options: LoadOptions,
    client: Client,
    tally: RefCell<Tally>,
    stopping: Cell<bool>,
    stop: Notify,
    /// Short connections that were begun.
    begun: Cell<u64>,
    opening: Semaphore,
}

/// Asks, and reports. Returns whether there was no failure.
pub fn load(options: &LoadOptions) -> io::Result<bool> {
    linux::privileges::raise_descriptor_limit()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let shared = Rc::new(Shared {
        options: options.clone(),
        client: Client { to: options.to.clone(), marker: options.marker.clone(), patience: options.patience },
        tally: RefCell::new(Tally::new(Instant::now())),
        stopping: Cell::new(false),
        stop: Notify::new(),
        begun: Cell::new(0),
        opening: Semaphore::new(OPENING),
    });
    LocalSet::new().block_on(&runtime, run(shared))
}

async fn run(shared: Rc<Shared>) -> io::Result<bool> {
    let options = &shared.options;
    let mut all = JoinSet::new();
    (0..options.short).for_each(|number| drop(all.spawn_local(short(shared.clone(), number))));
    (0..options.long).for_each(|number| drop(all.spawn_local(long(shared.clone(), number))));
    (0..options.bulk).for_each(|number| drop(all.spawn_local(bulk(shared.clone(), number))));

    let mut words = if options.controlled { Some(listen()?) } else { None };
    let mut report = tokio::time::interval(REPORT_EVERY);
    loop {
        tokio::select! {
            word = hear(&mut words) => match word.as_deref() {
                Some("event") => shared.enter(Phase::During)?,
                Some("over") => shared.enter(Phase::After)?,
                Some("end") | None => break,
                Some(other) => return Err(io::Error::other(format!("{other:?} is none of event, over and end"))),
            },
            _ = report.tick() => say(&shared.tally.borrow_mut().brief())?,
            // All that there was to do is done; who controls us says when it is the end.
            done = all.join_next(), if !options.controlled => if done.is_none() { break },
        }
    }
    shared.stopping.set(true);
    shared.stop.notify_waiters();
    // Each finishes what it has begun, which is bounded.
    while all.join_next().await.is_some() {}
    let report = shared.tally.borrow_mut().full();
    say(&report)?;
    Ok(report["failed"] == 0)
}

fn say(line: &Value) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

/// Lines of standard input, on a thread: it cannot be asked whether it has any.
fn listen() -> io::Result<mpsc::UnboundedReceiver<String>> {
    let (sender, words) = mpsc::unbounded_channel();
    std::thread::Builder::new().name("input".into()).spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            let _ = sender.send(line);
        }
    })?;
    Ok(words)
}

async fn hear(words: &mut Option<mpsc::UnboundedReceiver<String>>) -> Option<String> {
    match words {
        Some(words) => words.recv().await,
        None => std::future::pending().await,
    }
}

impl Shared {
    fn enter(&self, phase: Phase) -> io::Result<()> {
        let mut tally = self.tally.borrow_mut();
        tally.enter(phase);
        say(&tally.full())
    }

    fn count(&self, work: Work, begun: Begun, outcome: &Result<u64, Broken>) {
        self.tally.borrow_mut().count(work, begun, outcome);
    }

    /// Waits, and not longer than until the end.
    async fn pause_until(&self, when: Instant) {
        let stop = self.stop.notified();
        if !self.stopping.get() {
            tokio::select! {
                () = sleep_until(when) => {}
                () = stop => {}
            }
        }
    }
}

/// One request after the other, each on a connection of its own.
async fn short(shared: Rc<Shared>, number: usize) {
    let options = &shared.options;
    let pause = match options.rate {
        0 => Duration::ZERO,
        rate => Duration::from_secs(1) * u32::try_from(options.short).unwrap_or(u32::MAX) / rate,
    };
    let mut next = Instant::now();
    for turn in 0_u64.. {
        if shared.stopping.get() || (options.count > 0 && shared.begun.get() >= options.count) {
            return;
        }
        shared.begun.set(shared.begun.get() + 1);
        let begun = shared.tally.borrow().begin();
        let outcome = shared.client.ask(&format!("s{number}-{turn}")).await;
        shared.count(Work::Short, begun, &outcome);
        if outcome.is_err() {
            sleep(AFTER_FAILURE).await;
        }
        // Behind: no burst afterwards.
        next = (next + pause).max(Instant::now());
        if pause.is_zero() {
            tokio::task::yield_now().await;
        } else {
            shared.pause_until(next).await;
        }
    }
}

/// One connection from the start to the end, and a question on it again and again.
async fn long(shared: Rc<Shared>, number: usize) {
    let begun = shared.tally.borrow().begin();
    let opened = {
        let _turn = shared.opening.acquire().await;
        shared.client.open().await
    };
    let mut connection = match opened {
        Ok(connection) => connection,
        Err(broken) => return shared.count(Work::Long, begun, &Err(broken)),
    };
    let mut next = Instant::now();
    for turn in 0_u64.. {
        let begun = shared.tally.borrow().begin();
        let outcome = shared.client.ask_on(&mut connection, &format!("l{number}-{turn}")).await;
        shared.count(Work::Long, begun, &outcome);
        if outcome.is_err() {
            // One that never had an answer was never open.
            return if turn > 0 {
                shared.tally.borrow_mut().long_lost()
            };
        }
        if turn == 0 {
            shared.tally.borrow_mut().long_opened();
        }
        next = (next + shared.options.every).max(Instant::now());
        shared.pause_until(next).await;
        if shared.stopping.get() {
            break;
        }
    }
    let begun = shared.tally.borrow().begin();
    match work::close(connection, shared.options.patience).await {
        Ok(()) => shared.tally.borrow_mut().long_closed(),
        Err(broken) => shared.count(Work::Long, begun, &Err(broken)),
    }
}

/// Transfers, each on a connection of its own.
async fn bulk(shared: Rc<Shared>, _number: usize) {
    let bytes = shared.options.bulk_bytes;
    for turn in 0_u64.. {
        if shared.stopping.get() {
            return;
        }
        let begun = shared.tally.borrow().begin();
        let outcome = if turn % 2 == 0 { shared.client.fetch(bytes).await } else { shared.client.send(bytes).await };
        shared.count(Work::Bulk, begun, &outcome);
        let pause = if outcome.is_err() { AFTER_FAILURE } else { shared.options.every };
        shared.pause_until(Instant::now() + pause).await;
    }
}

/// A step that may take so long and no longer.
async fn within<T>(
    patience: Duration,
    stage: &'static str,
    step: impl Future<Output = io::Result<T>>,
) -> Result<T, Broken> {
    match timeout(patience, step).await {
        Ok(done) => done.map_err(|error| Broken::by(stage, &error)),
        Err(_) => Err(Broken::by(stage, &io::ErrorKind::TimedOut.into())),
    }
}
