//! One thread and one single-threaded runtime per core: a connection is served by one core from its first byte to its
//! last, unless its payer keeps that core busy beside others ([`crate::turns`]).
//!
//! Each listener belongs to one core, in turn, since the cores cannot share it without letting others join (T24). That core
//! serves what it accepts, without waking another, unless it has clearly more to do than one that it can hand over to.

use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};

use crate::connections::Direction;
use crate::node::Node;
use crate::pod::Pod;
use crate::redirect::{self, Captured};
use crate::turns::{Everybody, Turns};
use crate::{legs, offload, pool};

/// Connections that may wait for a core to take them over. Beyond it whoever accepted one serves it.
const HANDED_OVER: usize = 1024;

/// A core serves what it accepts itself while it has at most so many connections more than the least busy one: waking
/// another costs more than a short connection does.
const SPREAD: usize = 8;

/// How often tunnels at rest are looked at: one that the other side has ended, or whose pods have changed, is not kept longer.
const SWEEP: Duration = Duration::from_secs(1);

/// The cores that serve.
#[derive(Debug)]
pub(crate) struct Cores {
    cores: Vec<Core>,
    /// Which core gets the next listener.
    turn: AtomicUsize,
}

#[derive(Debug)]
struct Core {
    open: Arc<AtomicUsize>,
    listeners: mpsc::UnboundedSender<Listening>,
    connections: mpsc::Sender<(Captured, Busy)>,
}

/// A listener on its way to its core.
struct Listening {
    listener: TcpListener,
    pod: Arc<Pod>,
    direction: Direction,
    cores: Arc<Cores>,
    stop: watch::Receiver<bool>,
}

/// A listener that is accepted on, until this is dropped or says otherwise.
#[derive(Debug)]
pub(crate) struct Accepting(watch::Sender<bool>);

impl Accepting {
    /// Stops accepting. What waits in the kernel's queue waits for whoever accepts next: the agent holds a duplicate.
    pub(crate) fn stop(&self) {
        self.0.send_replace(true);
    }
}

impl Cores {
    /// Starts so many threads, at least one.
    ///
    /// # Errors
    /// The system gives no thread or event queue.
    pub(crate) fn start(count: usize, node: &Arc<Node>) -> io::Result<Self> {
        let (count, everybody) = (count.max(1), Everybody::new());
        let start = |number| Core::start((number, count), &everybody, node.clone());
        let cores = (0..count).map(start).collect::<io::Result<_>>()?;
        Ok(Self { cores, turn: AtomicUsize::new(0) })
    }

    /// Accepts on a listener from now on.
    ///
    /// # Errors
    /// It does not take the options that its connections are to have.
    pub(crate) fn accept(
        self: &Arc<Self>,
        listener: TcpListener,
        pod: Arc<Pod>,
        direction: Direction,
    ) -> io::Result<Accepting> {
        legs::prepare_listener(&listener)?;
        let (stop, stopped) = watch::channel(false);
        let core = &self.cores[self.turn.fetch_add(1, Ordering::Relaxed) % self.cores.len()];
        let listening = Listening { listener, pod, direction, cores: self.clone(), stop: stopped };
        if core.listeners.send(listening).is_err() {
            // The core's thread is gone, which only its panic can bring about.
            tracing::error!("a core has ended");
        }
        Ok(Accepting(stop))
    }

    /// Serves a connection that core `own` has accepted: there, or on the least busy core. Only for a task of that core. It
    /// waits for nothing: an acceptor that is stopped would lose a connection that it waits with.
    fn serve(&self, (own, turns): (usize, &Turns), node: &Arc<Node>, mut captured: Captured) {
        let open = |core: &Core| core.open.load(Ordering::Relaxed);
        let Some(least) = self.cores.iter().min_by_key(|core| open(core)) else { return };
        let here = &self.cores[own];
        if open(here) > open(least) + SPREAD {
            match least.connections.try_send((captured, Busy::on(least))) {
                Ok(()) => return,
                // It is behind with what it was given.
                Err(TrySendError::Full((back, _busy)) | TrySendError::Closed((back, _busy))) => captured = back,
            }
        }
        serve_here(turns, node.clone(), captured, Busy::on(here));
    }

    /// How many connections each core has.
    pub(crate) fn open(&self) -> Vec<usize> {
        self.cores.iter().map(|core| core.open.load(Ordering::Relaxed)).collect()
    }
}

impl Core {
    fn start((number, count): (usize, usize), everybody: &Everybody, node: Arc<Node>) -> io::Result<Self> {
        let open = Arc::new(AtomicUsize::new(0));
        let (connections, handed_over) = mpsc::channel(HANDED_OVER);
        let (listeners, listening) = mpsc::unbounded_channel();
        let swept = node.clone();
        let (turns, returning) = Turns::new(everybody, move |aside| {
            let node = swept.clone();
            let started = thread(format!("aside-{number}"), count + number, || async move {
                offload::this_may_wait();
                tokio::task::spawn_local(sweep(node));
                aside.run().await;
            });
            started.inspect_err(|error| tracing::error!(%error, "a busy pod's neighbours wait with it")).is_ok()
        });
        thread(format!("core-{number}"), number, move || async move {
            tokio::task::spawn_local(returning.run());
            serve_all((number, turns), node, listening, handed_over).await;
        })?;
        Ok(Self { open, listeners, connections })
    }
}

/// Starts a thread with an event queue and a shelf of its own.
fn thread<F: Future<Output = ()>>(
    name: String,
    shelf: usize,
    main: impl FnOnce() -> F + Send + 'static,
) -> io::Result<()> {
    let (say, begun) = std::sync::mpsc::channel();
    let serve = move || {
        pool::this_is_shelf(shelf);
        let mut builder = Builder::new_current_thread();
        // The threads that it starts are those of [`offload`].
        builder.enable_all().on_thread_start(offload::this_may_wait);
        let (runtime, end) = match builder.build_local(LocalOptions::default()) {
            Ok(runtime) => (Some(runtime), Ok(())),
            Err(error) => (None, Err(error)),
        };
        // Whoever has started it waits.
        let _ = say.send(end);
        if let Some(runtime) = runtime {
            runtime.block_on(main());
        }
    };
    thread::Builder::new().name(name).spawn(serve)?;
    begun.recv().unwrap_or_else(|_| Err(io::Error::other("it has ended at its start")))
}

async fn serve_all(
    (number, turns): (usize, Turns),
    node: Arc<Node>,
    mut listening: mpsc::UnboundedReceiver<Listening>,
    mut handed_over: mpsc::Receiver<(Captured, Busy)>,
) {
    tokio::task::spawn_local(sweep(node.clone()));
    loop {
        tokio::select! {
            Some((captured, busy)) = handed_over.recv() => serve_here(&turns, node.clone(), captured, busy),
            Some(listening) = listening.recv() => {
                tokio::task::spawn_local(accept((number, turns.clone()), node.clone(), listening));
            }
            else => return,
        }
    }
}

/// Whether there is room for it is found out before it stands in a line: that may be long, and what stands there is held.
fn serve_here(turns: &Turns, node: Arc<Node>, captured: Captured, one: Busy) {
    let payer = captured.payer(&node);
    let share = captured.share(&node, payer.clone());
    let has_room = share.is_ok();
    let life = redirect::serve(node, captured, share, one);
    if has_room {
        turns.live(payer, Box::pin(life));
    } else {
        tokio::task::spawn_local(life);
    }
}

async fn accept((number, turns): (usize, Turns), node: Arc<Node>, listening: Listening) {
    let Listening { listener, pod, direction, cores, mut stop } = listening;
    let serve = |captured| cores.serve((number, &turns), &node, captured);
    let accepting = redirect::accept(&node, listener, &pod, direction, serve);
    tokio::select! {
        biased;
        // Its sender is dropped with the pod.
        _ = stop.wait_for(|stop| *stop) => {}
        Err(error) = accepting => tracing::error!(pod = %pod.name, %error, "cannot watch a listener"),
    }
}

/// Looks after this thread's tunnels at rest.
async fn sweep(node: Arc<Node>) {
    loop {
        tokio::time::sleep(SWEEP).await;
        node.pool.sweep(node.clock.wall(), &node.view);
    }
}

/// One connection of a core. It is counted out wherever this ends, also where serving it panicked.
#[derive(Debug)]
pub(crate) struct Busy(Arc<AtomicUsize>);

impl Busy {
    fn on(core: &Core) -> Self {
        core.open.fetch_add(1, Ordering::Relaxed);
        Self(core.open.clone())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
