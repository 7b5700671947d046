//! The successors of a connection's keys (RFC 8446, section 7.2), which rustls derives.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;

use super::RecordError;
use super::aead::Key;

/// What both directions of a connection share: a key update of the one may ask for one of the other. It is locked for key
/// updates alone.
#[derive(Clone)]
pub(super) struct Keys(Arc<Shared>);

struct Shared {
    next: Mutex<Next>,
    /// The other side asked us for a key update and has not got it yet.
    requested: AtomicBool,
}

enum Next {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

impl fmt::Debug for Keys {
    /// Without what it is for.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys")
    }
}

impl Keys {
    pub(super) fn of_client(connection: KernelConnection<ClientConnectionData>) -> Self {
        Self::new(Next::Client(connection))
    }

    pub(super) fn of_server(connection: KernelConnection<ServerConnectionData>) -> Self {
        Self::new(Next::Server(connection))
    }

    fn new(next: Next) -> Self {
        Self(Arc::new(Shared { next: Mutex::new(next), requested: AtomicBool::new(false) }))
    }

    /// Whether the other side has asked for a key update since the last call.
    pub(super) fn take_request(&self) -> bool {
        // A plain look first: this runs for every write.
        self.0.requested.load(Ordering::Relaxed) && self.0.requested.swap(false, Ordering::Relaxed)
    }

    /// The next key to seal with.
    pub(super) fn next_to_seal(&self) -> Result<Key, RecordError> {
        let secrets = match &mut *self.lock() {
            Next::Client(connection) => connection.update_tx_secret(),
            Next::Server(connection) => connection.update_tx_secret(),
        };
        let (sequence, secrets) = secrets.map_err(RecordError::Keys)?;
        Ok(Key::new(sequence, &secrets))
    }

    /// The next key to open with, after a key update of the other side, which may want one of ours.
    pub(super) fn next_to_open(&self, requested: bool) -> Result<Key, RecordError> {
        if requested {
            self.0.requested.store(true, Ordering::Relaxed);
        }
        let secrets = match &mut *self.lock() {
            Next::Client(connection) => connection.update_rx_secret(),
            Next::Server(connection) => connection.update_rx_secret(),
        };
        let (sequence, secrets) = secrets.map_err(RecordError::Keys)?;
        Ok(Key::new(sequence, &secrets))
    }

    fn lock(&self) -> MutexGuard<'_, Next> {
        self.0.next.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
