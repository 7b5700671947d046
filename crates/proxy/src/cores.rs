//! One thread and one single-threaded runtime per core: a connection is served by one core from its first byte to its
//! last, and nothing of it is shared.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::mpsc;

use crate::node::Node;
use crate::pool::{self, Ends};
use crate::redirect::{self, Captured};

/// Connections that may wait for a core to take them over. Beyond it acceptors wait, and the kernel queues.
const HANDED_OVER: usize = 1024;

/// How often tunnels at rest are looked at: one that the other side has ended, or whose pods have changed, is not kept longer.
const SWEEP: Duration = Duration::from_secs(1);

/// The cores that serve.
#[derive(Debug)]
pub(crate) struct Cores(Vec<Core>);

#[derive(Debug)]
struct Core {
    open: Arc<AtomicUsize>,
    connections: mpsc::Sender<Captured>,
}

impl Cores {
    /// Starts so many threads, at least one.
    ///
    /// # Errors
    /// The system gives no thread or event queue.
    pub(crate) fn start(count: usize, node: &Arc<Node>) -> io::Result<Self> {
        (0..count.max(1)).map(|number| Core::start(number, node.clone())).collect::<io::Result<_>>().map(Self)
    }

    /// Hands a connection to the core that has the fewest.
    pub(crate) async fn serve(&self, captured: Captured) {
        let Some(core) = self.0.iter().min_by_key(|core| core.open.load(Ordering::Relaxed)) else { return };
        core.open.fetch_add(1, Ordering::Relaxed);
        if core.connections.send(captured).await.is_err() {
            // The core's thread is gone, which only its panic can bring about; its connections are reset.
            tracing::error!("a core has ended");
        }
    }

    /// How many connections each core has.
    pub(crate) fn open(&self) -> Vec<usize> {
        self.0.iter().map(|core| core.open.load(Ordering::Relaxed)).collect()
    }
}

impl Core {
    fn start(number: usize, node: Arc<Node>) -> io::Result<Self> {
        let open = Arc::new(AtomicUsize::new(0));
        let (connections, handed_over) = mpsc::channel(HANDED_OVER);
        let counter = open.clone();
        thread::Builder::new().name(format!("core-{number}")).spawn(move || {
            pool::this_is_core(number);
            match Builder::new_current_thread().enable_all().build_local(LocalOptions::default()) {
                Ok(runtime) => runtime.block_on(serve_all(node, handed_over, counter)),
                Err(error) => tracing::error!(%error, "a core has no event queue"),
            }
        })?;
        Ok(Self { open, connections })
    }
}

async fn serve_all(node: Arc<Node>, mut handed_over: mpsc::Receiver<Captured>, open: Arc<AtomicUsize>) {
    tokio::task::spawn_local(sweep(node.clone()));
    while let Some(captured) = handed_over.recv().await {
        let (node, one) = (node.clone(), Busy(open.clone()));
        tokio::task::spawn_local(async move {
            redirect::serve(&node, captured).await;
            drop(one);
        });
    }
}

/// Looks after this core's tunnels at rest.
async fn sweep(node: Arc<Node>) {
    loop {
        tokio::time::sleep(SWEEP).await;
        node.pool.sweep(node.clock.wall(), |key| {
            node.view.read(|view| {
                let destination = view.workload_of(&key.destination_pod)?.clone();
                Some(Ends { source: view.workload_of(&key.source_pod).cloned(), destination })
            })
        });
    }
}

/// Counts its connection out, also where serving it panicked.
struct Busy(Arc<AtomicUsize>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
