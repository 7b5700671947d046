//! The access log: one JSON object for each connection, in a line of its own, when it has ended.
//!
//! The data path never waits for whoever reads it. Lines go through a bounded queue to a thread that makes text of them
//! and writes many at once; when the queue is full they are dropped, and counted. What waits there holds no socket.

use std::fmt;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use identity::SpiffeId;
use prometheus_client::metrics::counter::Counter;
use serde::Serialize;

use crate::connections::{Connection, Decision, Security};
use crate::reasons::EndedEarly;

/// Lines that may wait.
const WAITING: usize = 2048;

/// How much text is written at once, in bytes, where so much waits.
const BATCH: usize = 64 * 1024;

/// The log, or none.
pub(crate) struct AccessLog {
    queue: Option<SyncSender<Message>>,
    dropped: Counter,
}

enum Message {
    Line(Box<Line>),
    /// Tell when all before it is written.
    Flush(SyncSender<()>),
}

/// What is to be said of a connection.
struct Line {
    time: u64,
    id: u64,
    direction: &'static str,
    pod: Arc<str>,
    identity: SpiffeId,
    source: SocketAddr,
    dialled: Option<SocketAddr>,
    decision: Option<Arc<Decision>>,
    other: Option<Arc<str>>,
    sent: u64,
    received: u64,
    duration: Duration,
    early: Option<EndedEarly>,
    reason: &'static str,
    exposes: Option<Arc<str>>,
}

/// How it looks. SPECIFICATION.md explains the fields.
#[derive(Serialize)]
struct Text<'a> {
    time: u64,
    level: &'static str,
    id: u64,
    direction: &'static str,
    pod: &'a str,
    identity: &'a str,
    source: SocketAddr,
    dialled: Option<SocketAddr>,
    to: Option<SocketAddr>,
    service: Option<&'a str>,
    other: Option<&'a str>,
    peer: Option<&'a str>,
    security: &'static str,
    reason: &'static str,
    exposes: Option<&'a str>,
    tls: Option<&'static str>,
    group: Option<&'static str>,
    cipher: Option<&'static str>,
    sent: u64,
    received: u64,
    duration_ms: u64,
    outcome: &'static str,
    detail: Option<String>,
    fault: Option<&'static str>,
}

impl fmt::Debug for AccessLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AccessLog")
    }
}

impl AccessLog {
    /// No log.
    pub(crate) fn off() -> Self {
        Self { queue: None, dropped: Counter::default() }
    }

    /// Starts to write to `output`; `dropped` counts the lines that were not written.
    ///
    /// # Errors
    /// The system gives no thread.
    pub(crate) fn start(output: impl Write + Send + 'static, dropped: Counter) -> io::Result<Self> {
        let (queue, waiting) = sync_channel(WAITING);
        let lost = dropped.clone();
        thread::Builder::new().name("access-log".to_owned()).spawn(move || write_all(output, &waiting, &lost))?;
        Ok(Self { queue: Some(queue), dropped })
    }

    /// Says that a connection has ended. Never waits.
    pub(crate) fn ended(
        &self,
        connection: &Connection,
        end: Result<(), &EndedEarly>,
        other: Option<Arc<str>>,
        time: identity::UnixTime,
    ) {
        let Some(queue) = &self.queue else { return };
        let (sent, received) = connection.bytes.now();
        let line = Line {
            time: time.as_secs(),
            id: connection.id,
            direction: connection.direction.as_str(),
            pod: connection.pod.name.clone(),
            identity: connection.pod.identity.clone(),
            source: connection.source,
            dialled: connection.destination(),
            decision: connection.decision(),
            other,
            sent,
            received,
            duration: connection.age(),
            early: end.err().cloned(),
            reason: connection.reason(),
            exposes: connection.exposed().map(|it| it.what.clone()),
        };
        if queue.try_send(Message::Line(Box::new(line))).is_err() {
            self.dropped.inc();
        }
    }

    /// Waits, but no longer than this, until all that was said is written.
    pub(crate) fn flush(&self, patience: Duration) {
        let Some(queue) = &self.queue else { return };
        let (done, wait) = sync_channel(1);
        if queue.try_send(Message::Flush(done)).is_ok() {
            // Nobody reads, or all is written: either way it was tried.
            let _ = wait.recv_timeout(patience);
        }
    }
}

/// Writes what comes, until nobody can say anything any more.
fn write_all(mut output: impl Write, waiting: &Receiver<Message>, dropped: &Counter) {
    let mut text = Vec::with_capacity(BATCH);
    let mut failing = false;
    while let Ok(first) = waiting.recv() {
        let (mut lines, mut flushed) = (0, Vec::new());
        let more = std::iter::from_fn(|| waiting.try_recv().ok());
        for message in std::iter::once(first).chain(more) {
            match message {
                Message::Line(line) => {
                    line.write(&mut text);
                    lines += 1;
                }
                Message::Flush(done) => flushed.push(done),
            }
            if text.len() >= BATCH {
                break;
            }
        }
        let written = output.write_all(&text).and_then(|()| output.flush());
        match &written {
            Ok(()) => failing = false,
            Err(error) => {
                dropped.inc_by(lines);
                if !failing {
                    tracing::error!(%error, "cannot write the access log (--access-log)");
                }
                failing = true;
            }
        }
        text.clear();
        for done in flushed {
            // Whoever waits may have given up.
            let _ = done.try_send(());
        }
    }
}

impl Line {
    fn write(&self, text: &mut Vec<u8>) {
        let decision = self.decision.as_deref();
        let security = decision.map(|decision| &decision.security);
        let handshake = match security {
            Some(Security::Mtls(peer)) => Some(peer.handshake()),
            Some(Security::Plaintext(_)) | None => None,
        };
        let facts = self.early.as_ref().map(EndedEarly::facts);
        let outcome = facts.map_or("orderly", |facts| facts.name);
        let line = Text {
            time: self.time,
            level: facts.map_or(tracing::Level::INFO, |facts| facts.level).as_str(),
            id: self.id,
            direction: self.direction,
            pod: &self.pod,
            identity: self.identity.as_str(),
            source: self.source,
            dialled: self.dialled,
            to: decision.map(|decision| decision.to),
            service: decision.and_then(|decision| decision.service.as_deref()),
            other: self.other.as_deref(),
            peer: security.and_then(Security::peer).map(SpiffeId::as_str),
            security: security.map_or("none", Security::as_str),
            reason: self.reason,
            exposes: self.exposes.as_deref(),
            tls: handshake.map(|handshake| handshake.version()),
            group: handshake.map(|handshake| handshake.group()),
            cipher: handshake.map(|handshake| handshake.cipher()),
            sent: self.sent,
            received: self.received,
            duration_ms: u64::try_from(self.duration.as_millis()).unwrap_or(u64::MAX),
            outcome,
            detail: self.early.as_ref().map(ToString::to_string).filter(|detail| detail != outcome),
            fault: facts.map(|facts| facts.fault.as_str()),
        };
        // Neither JSON of these fields nor a Vec can fail.
        let _ = serde_json::to_writer(&mut *text, &line);
        text.push(b'\n');
    }
}
