//! What comes through a tunnel, and what goes into one: frames in records.

use std::fmt;
use std::sync::Arc;

use tokio::net::TcpStream;
use wire::records::{self, Opened, Opener, RecordError, Sealer};
use wire::tunnel::{Control, Decoder, MAX_CONTROL_FRAME, Piece, Violation};

use crate::batch::{self, Batch};
use crate::reasons::{EndedEarly, Side};
use crate::splice::{self, Read, Sink, Source, Waiting};

/// What comes through a tunnel.
pub(crate) struct TunnelSource {
    tcp: Arc<TcpStream>,
    /// The side that the tunnel leads to.
    far: Side,
    opener: Opener,
    decoder: Decoder,
    /// Content that lay behind a control frame in its record.
    content: Vec<u8>,
    /// Sealed bytes: the beginning of a record, or what lay behind a control frame.
    sealed: Vec<u8>,
    /// There is something in `content` or `sealed` that can be looked at before anything else is read.
    unread: bool,
    /// What came next behind the payload that was given out last.
    next: Option<Result<Control, EndedEarly>>,
}

impl fmt::Debug for TunnelSource {
    /// Without bytes: they are the application's.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TunnelSource").field("far", &self.far).finish_non_exhaustive()
    }
}

/// What a look at a tunnel gave.
enum Look {
    Nothing,
    Data,
    Control(Control),
}

impl TunnelSource {
    pub(super) fn new(tcp: Arc<TcpStream>, far: Side, opener: Opener, decoder: Decoder, rest: Vec<u8>) -> Self {
        let unread = !rest.is_empty();
        Self { tcp, far, opener, decoder, content: Vec::new(), sealed: rest, unread, next: None }
    }

    /// Reads from another descriptor of the same connection.
    pub(super) fn set_tcp(&mut self, tcp: Arc<TcpStream>) {
        self.tcp = tcp;
    }

    /// Waits for the next control frame, where no payload may come before it.
    pub(super) async fn control(&mut self) -> Result<Control, EndedEarly> {
        loop {
            self.ready().await?;
            match batch::with(|batch| self.look(batch))? {
                Look::Nothing => {}
                Look::Control(control) => return Ok(control),
                Look::Data => return Err(Violation::OutOfOrder.into()),
            }
        }
    }

    /// Whether nothing has come that was not looked at: neither a word nor an end.
    pub(super) fn is_quiet(&mut self) -> bool {
        let quiet = batch::with(|batch| self.look(batch));
        matches!(quiet, Ok(Look::Nothing)) && self.sealed.is_empty()
    }

    /// Whether more has come than was looked at.
    pub(super) fn has_more(&self) -> bool {
        self.unread
    }

    /// Reads to the end, whatever comes.
    pub(super) async fn rest(&mut self) {
        while self.ready().await.is_ok() && batch::with(|batch| self.look(batch)).is_ok() {}
    }

    /// Takes what there is. Payload in front of a control frame, or of an error, is given out first.
    fn look(&mut self, batch: &mut Batch) -> Result<Look, EndedEarly> {
        if self.next.is_none() {
            match self.take_in(batch) {
                Ok(None) => {}
                Ok(Some(control)) => self.next = Some(Ok(control)),
                Err(early) => self.next = Some(Err(early)),
            }
            if batch.len() > 0 {
                return Ok(Look::Data);
            }
        }
        match self.next.take() {
            None => Ok(Look::Nothing),
            Some(next) => next.map(Look::Control),
        }
    }

    /// Opens records until there are no more or a control frame comes; payload goes into the batch.
    fn take_in(&mut self, batch: &mut Batch) -> Result<Option<Control>, EndedEarly> {
        if !std::mem::take(&mut self.unread) {
            let Some(length) = batch.read_sealed(&self.tcp, &self.sealed).map_err(|_| EndedEarly::Reset(self.far))?
            else {
                return Ok(None);
            };
            if length == self.sealed.len() {
                // The end of TCP inside a lease: whoever killed the other side must not have truncated a stream (T8).
                return Err(EndedEarly::Truncated);
            }
            self.sealed = Vec::new();
            return self.open(batch, 0, length);
        }
        let sealed = std::mem::take(&mut self.sealed);
        let content = std::mem::take(&mut self.content);
        batch.put_sealed(0, &content);
        // Content first: what is sealed came behind it.
        if let Some(control) = self.decode(batch, 0..content.len())? {
            self.keep_sealed(&sealed);
            return Ok(Some(control));
        }
        batch.put_sealed(content.len(), &sealed);
        self.open(batch, content.len(), content.len() + sealed.len())
    }

    /// Opens the records between two places of the batch.
    fn open(&mut self, batch: &mut Batch, mut at: usize, end: usize) -> Result<Option<Control>, EndedEarly> {
        loop {
            let (bytes, _) = batch.sealed();
            let whole = records::length(&bytes[at..end]).map_err(broken)?.map(|length| at + length);
            let Some(next) = whole.filter(|next| *next <= end) else {
                // The beginning of a record: never more than one of them is kept.
                self.sealed = bytes[at..end].to_vec();
                return Ok(None);
            };
            match self.opener.open(&mut bytes[at..next]).map_err(broken)? {
                Opened::Nothing => {}
                // The end of TLS inside a lease is no better than that of TCP.
                Opened::Closed => return Err(EndedEarly::Truncated),
                Opened::Data(content) => {
                    if let Some(control) = self.decode(batch, at + content.start..at + content.end)? {
                        let (bytes, _) = batch.sealed();
                        let sealed = bytes[next..end].to_vec();
                        self.keep_sealed(&sealed);
                        return Ok(Some(control));
                    }
                }
            }
            at = next;
        }
    }

    fn keep_sealed(&mut self, sealed: &[u8]) {
        self.sealed = sealed.to_vec();
        self.unread = !self.content.is_empty() || !self.sealed.is_empty();
    }

    /// Takes content apart. What lies behind a control frame is kept.
    fn decode(&mut self, batch: &mut Batch, content: std::ops::Range<usize>) -> Result<Option<Control>, EndedEarly> {
        let (bytes, pieces) = batch.sealed();
        let mut input = &bytes[content.clone()];
        loop {
            match self.decoder.next(&mut input)? {
                None => return Ok(None),
                Some(Piece::Data(data)) => {
                    // Payload is the last thing that was taken off the input.
                    let behind = content.end - input.len();
                    pieces.push(behind - data.len()..behind);
                }
                Some(Piece::Control(control)) => {
                    self.content = input.to_vec();
                    return Ok(Some(control));
                }
            }
        }
    }
}

fn broken(error: RecordError) -> EndedEarly {
    EndedEarly::Handshake(error.refusal())
}

impl Source for TunnelSource {
    async fn ready(&mut self) -> Result<(), EndedEarly> {
        if !self.unread && self.next.is_none() {
            splice::readable(&self.tcp, self.far).await?;
        }
        Ok(())
    }

    fn read(&mut self, batch: &mut Batch) -> Result<Read, EndedEarly> {
        match self.look(batch)? {
            Look::Nothing => Ok(Read::Nothing),
            Look::Data => Ok(Read::Data),
            Look::Control(Control::Fin { .. }) => Ok(Read::Fin),
            Look::Control(Control::Reset { .. }) => Err(EndedEarly::Reset(self.far)),
            Look::Control(_) => Err(Violation::OutOfOrder.into()),
        }
    }

    async fn cut_after_end(&mut self) -> EndedEarly {
        match self.control().await {
            Ok(Control::Reset { .. }) => EndedEarly::Reset(self.far),
            Ok(Control::Closed { lease }) => {
                // The other side has seen both directions end, as we are about to.
                self.next = Some(Ok(Control::Closed { lease }));
                splice::in_error(&self.tcp).await;
                EndedEarly::Reset(self.far)
            }
            Ok(_) => Violation::OutOfOrder.into(),
            Err(early) => early,
        }
    }
}

/// What goes into a tunnel.
#[derive(Debug)]
pub(crate) struct TunnelSink {
    tcp: Arc<TcpStream>,
    far: Side,
    sealer: Sealer,
    waiting: Waiting,
    /// The lease that is open.
    pub(super) lease: u64,
}

impl TunnelSink {
    pub(super) fn new(tcp: Arc<TcpStream>, far: Side, sealer: Sealer) -> Self {
        Self { tcp, far, sealer, waiting: Waiting::default(), lease: wire::tunnel::FIRST_LEASE }
    }

    /// Writes to another descriptor of the same connection.
    pub(super) fn set_tcp(&mut self, tcp: Arc<TcpStream>) {
        self.tcp = tcp;
    }

    /// Puts a frame behind what waits to be written.
    pub(super) fn queue(&mut self, control: &Control) {
        let mut buffer = [0; MAX_CONTROL_FRAME];
        self.queue_content(control.encode(&mut buffer));
    }

    /// Puts a record of this content, which is not empty, behind what waits to be written.
    pub(super) fn queue_content(&mut self, content: &[u8]) {
        self.renew_key();
        let mut record = vec![0; records::BEFORE + content.len() + records::AFTER];
        record[records::BEFORE..records::BEFORE + content.len()].copy_from_slice(content);
        self.sealer.seal(&mut record);
        self.waiting.push(&record);
    }

    /// Says that nothing follows.
    pub(super) fn queue_close(&mut self) {
        let record = self.sealer.close_notify();
        self.waiting.push(&record);
    }

    fn renew_key(&mut self) {
        if let Some(update) = self.sealer.key_update() {
            self.waiting.push(&update);
        }
    }
}

impl Sink for TunnelSink {
    fn take(&mut self, batch: &mut Batch) -> Result<(), EndedEarly> {
        self.renew_key();
        batch.seal(&mut self.sealer);
        self.waiting.take(&self.tcp, batch).map_err(|_| EndedEarly::Reset(self.far))
    }

    async fn flush(&mut self) -> Result<(), EndedEarly> {
        self.waiting.flush(&self.tcp).await.map_err(|_| EndedEarly::Reset(self.far))
    }

    fn fin(&mut self, last: bool) -> Result<bool, EndedEarly> {
        self.queue(&Control::Fin { lease: self.lease });
        // Of the two sides the server has the last word: its `Closed` goes with its `Fin`.
        if last && self.far == Side::Client {
            return Ok(false);
        }
        self.waiting.write(&self.tcp).map_err(|_| EndedEarly::Reset(self.far))?;
        Ok(true)
    }

    fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }
}
