//! What a client says first, looked at and kept, so that it can be given to TLS or to the application (T17).

use std::io;
use std::sync::Arc;
use std::time::Duration;

use mesh::RefuseReason;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use wire::hello::{Classifier, MAX_HELLO, Verdict};

use crate::batch::Batch;
use crate::reasons::{EndedEarly, Side};
use crate::splice::{self, Leg, PlainSink, PlainSource, Read, Source};

/// The first bytes of a connection so far. At most [`MAX_HELLO`] of them: then the classifier knows.
#[derive(Debug)]
pub(crate) struct FirstBytes {
    classifier: Classifier,
    bytes: Vec<u8>,
    /// When the first of them came.
    begun: Option<Instant>,
}

/// What a client turned out to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum First {
    /// It began a tunnel of ours.
    Hello,
    /// It said something else, or ended.
    Other,
    /// It has said nothing that decides.
    Silent,
}

impl FirstBytes {
    pub(crate) fn new() -> Self {
        Self { classifier: Classifier::new(), bytes: Vec::new(), begun: None }
    }

    /// Reads until the bytes decide, at most so long.
    ///
    /// # Errors
    /// [`EndedEarly::Reset`] where the client resets meanwhile.
    pub(crate) async fn wait(&mut self, tcp: &TcpStream, time: Duration) -> Result<First, EndedEarly> {
        match timeout(time, self.decide(tcp)).await {
            Err(_) => Ok(First::Silent),
            Ok(first) => first,
        }
    }

    /// Whether the client has said something that could become a hello, and has not become one.
    pub(crate) fn is_undecided(&self) -> bool {
        !self.bytes.is_empty()
    }

    /// Reads until the bytes decide, or have left it open for too long: a hello comes in one go, and others may say little
    /// and wait for an answer. Nothing is lost when the wait is given up.
    ///
    /// # Errors
    /// [`EndedEarly::Reset`] where the client resets meanwhile.
    pub(crate) async fn decide(&mut self, tcp: &TcpStream) -> Result<First, EndedEarly> {
        loop {
            match self.classifier.verdict() {
                Verdict::JustMtls => return Ok(First::Hello),
                Verdict::Other => return Ok(First::Other),
                Verdict::NeedMore => {}
            }
            let readable = match self.begun {
                None => tcp.readable().await,
                Some(begun) => match timeout_at(begun + UNDECIDED, tcp.readable()).await {
                    Ok(readable) => readable,
                    Err(_) => return Ok(First::Other),
                },
            };
            readable.map_err(|_| EndedEarly::Reset(Side::Client))?;
            // On the stack, behind the wait: a client that is waited for costs no buffer.
            let mut buffer = [0; 2048];
            let room = buffer.len().min((MAX_HELLO + 1).saturating_sub(self.bytes.len()));
            match tcp.try_read(&mut buffer[..room]) {
                // An end before a whole hello is no hello; the application gets to see it.
                Ok(0) => return Ok(First::Other),
                Ok(length) => {
                    self.begun.get_or_insert_with(Instant::now);
                    self.bytes.extend_from_slice(&buffer[..length]);
                    self.classifier.push(&buffer[..length]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Err(EndedEarly::Reset(Side::Client)),
            }
        }
    }

    /// Waits for more than what decided, for who wants to know what else it is and bounds how much. `false` is the client's
    /// end.
    ///
    /// # Errors
    /// [`EndedEarly::Reset`] where the client resets meanwhile.
    pub(crate) async fn more(&mut self, tcp: &TcpStream) -> Result<bool, EndedEarly> {
        loop {
            tcp.readable().await.map_err(|_| EndedEarly::Reset(Side::Client))?;
            let mut buffer = [0; 2048];
            match tcp.try_read(&mut buffer) {
                Ok(length) => {
                    self.bytes.extend_from_slice(&buffer[..length]);
                    return Ok(length > 0);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Err(EndedEarly::Reset(Side::Client)),
            }
        }
    }

    /// The bytes so far.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes, for whoever they are for.
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

/// How long the bytes of a client may leave it open whether they become a hello.
const UNDECIDED: Duration = Duration::from_secs(3);

/// The client's leg of a connection in clear. One that has not shown what it is is watched until it has.
pub(crate) fn guarded_leg(tcp: TcpStream, first: FirstBytes, seen: First) -> Leg<Guarded, PlainSink> {
    let mut leg = splice::plain_leg(tcp, Side::Client);
    let watched = match seen {
        First::Silent => Some(first),
        First::Hello | First::Other => {
            leg.source.replay(first.into_bytes());
            None
        }
    };
    let source = Guarded { tcp: leg.tcp.clone(), source: leg.source, watched };
    Leg { tcp: leg.tcp, side: leg.side, source, sink: leg.sink }
}

/// What comes from a client in clear, with its first bytes examined before they pass.
#[derive(Debug)]
pub(crate) struct Guarded {
    tcp: Arc<TcpStream>,
    source: PlainSource,
    watched: Option<FirstBytes>,
}

impl Source for Guarded {
    async fn ready(&mut self) -> Result<(), EndedEarly> {
        while let Some(first) = &mut self.watched {
            match first.wait(&self.tcp, UNDECIDED).await? {
                // The server has spoken in clear, or has ended: this client can no longer get what it began.
                First::Hello => return Err(EndedEarly::Refused(RefuseReason::LateHello)),
                First::Silent if first.bytes.is_empty() => {}
                First::Silent | First::Other => {
                    let bytes = self.watched.take().map(FirstBytes::into_bytes).unwrap_or_default();
                    self.source.replay(bytes);
                }
            }
        }
        self.source.ready().await
    }

    fn read(&mut self, batch: &mut Batch) -> Result<Read, EndedEarly> {
        // Not before `ready` has seen what the client is.
        if self.watched.is_some() { Ok(Read::Nothing) } else { self.source.read(batch) }
    }

    async fn cut_after_end(&mut self) -> EndedEarly {
        self.source.cut_after_end().await
    }
}
