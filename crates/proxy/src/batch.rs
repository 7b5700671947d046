//! The buffer that all connections of a thread share: bytes are read into it, sealed or opened where they lie, and written
//! from it, all in one step without a wait. So a connection that has nothing to say owns no buffer.
//!
//! What is read in clear lies in slots with room around each for a frame's and a record's header and trailer; so a tunnel's
//! records are made in place, and a write takes many at once.

use std::cell::RefCell;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;

use tokio::io::Interest;
use tokio::net::TcpStream;
use wire::records;
use wire::tunnel::{HEADER, MAX_DATA};

/// Slots of the buffer, one record each. More of them did not make a byte cheaper; fewer did make it dearer.
const SLOTS: usize = 8;

/// Room in front of a slot's payload. The content of a record, which is the frame's header and its payload, begins at a
/// multiple of 64 bytes, where ciphers are fastest.
const ROOM: usize = 64 + HEADER;

/// From one slot to the next: a multiple of 64.
const STRIDE: usize = (ROOM + MAX_DATA + records::AFTER).next_multiple_of(64);

/// The most payload that is read at once in clear, in bytes.
pub(crate) const MOST: usize = SLOTS * MAX_DATA;

/// Pieces that are written at once.
const PLACES: usize = 16;

/// Whether the event queue has told of a socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Told {
    /// What it has said of the socket counts: where that is that nothing is there, the socket is not asked.
    Yes,
    /// It could not yet: the socket is new to it.
    NotYet,
}

/// The buffer, and where in it the pieces lie that are to be written.
#[derive(Debug)]
pub(crate) struct Batch {
    buffer: Vec<u8>,
    /// Where the slots begin: at a multiple of 64 bytes of memory.
    start: usize,
    pieces: Vec<Range<usize>>,
}

/// Does something with the thread's buffer. Nothing that waits can be done in `work`, and so no connection ever finds
/// another's bytes there.
pub(crate) fn with<T>(work: impl FnOnce(&mut Batch) -> T) -> T {
    thread_local!(static BATCH: RefCell<Batch> = RefCell::new(Batch::new()));
    BATCH.with_borrow_mut(|batch| {
        batch.pieces.clear();
        work(batch)
    })
}

impl Batch {
    fn new() -> Self {
        let buffer = vec![0; SLOTS * STRIDE + 64];
        let start = buffer.as_ptr().align_offset(64);
        // A buffer that cannot be aligned would merely be slower.
        Self { start: if start < 64 { start } else { 0 }, buffer, pieces: Vec::with_capacity(4 * SLOTS) }
    }

    /// Bytes of the pieces.
    pub(crate) fn len(&self) -> usize {
        self.pieces.iter().map(Range::len).sum()
    }

    /// Reads payload in clear. `None`: nothing is there; 0: the end of the stream.
    ///
    /// # Errors
    /// The socket's.
    pub(crate) fn read_clear(&mut self, tcp: &TcpStream) -> io::Result<Option<usize>> {
        let mut slots = self.buffer[self.start..].chunks_exact_mut(STRIDE);
        let mut places: [IoSliceMut<'_>; SLOTS] = std::array::from_fn(|_| {
            let slot = slots.next().map_or(&mut [][..], |slot| &mut slot[ROOM..ROOM + MAX_DATA]);
            IoSliceMut::new(slot)
        });
        let read = read_now(tcp, MOST, || linux::sockets::read_vectored(tcp, &mut places))?;
        if let Some(length) = read {
            self.fill_slots(length);
        }
        Ok(read)
    }

    /// Reads at most `most` bytes of payload in clear behind others, and says how many; 0 is the end of the stream, `None`
    /// that nothing is there or that none are wanted.
    ///
    /// # Errors
    /// The socket's.
    pub(crate) fn read_ahead(
        &mut self,
        tcp: &TcpStream,
        told: Told,
        most: usize,
        behind: &mut Vec<u8>,
    ) -> io::Result<Option<usize>> {
        if most == 0 {
            return Ok(None);
        }
        let room = &mut self.buffer[..most];
        let mut read = || linux::sockets::read_vectored(tcp, &mut [IoSliceMut::new(room)]);
        let read = match told {
            Told::Yes => read_now(tcp, most, read)?,
            Told::NotYet => match read() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
                read => Some(read?),
            },
        };
        behind.extend_from_slice(&self.buffer[..read.unwrap_or(0)]);
        Ok(read)
    }

    /// Puts payload there that was read before, as if it had just come: at most [`MOST`] bytes of it.
    pub(crate) fn put_clear(&mut self, bytes: &[u8]) {
        debug_assert!(bytes.len() <= MOST);
        let slots = self.buffer[self.start..].chunks_exact_mut(STRIDE);
        for (slot, part) in slots.zip(bytes.chunks(MAX_DATA)) {
            slot[ROOM..ROOM + part.len()].copy_from_slice(part);
        }
        self.fill_slots(bytes.len().min(MOST));
    }

    fn fill_slots(&mut self, mut length: usize) {
        let mut slot = self.start + ROOM;
        while length > 0 {
            let part = length.min(MAX_DATA);
            self.pieces.push(slot..slot + part);
            (slot, length) = (slot + STRIDE, length - part);
        }
    }

    /// Makes a frame and a record around each piece that [`Self::read_clear`] or [`Self::put_clear`] has left.
    pub(crate) fn seal(&mut self, sealer: &mut records::Sealer) {
        for piece in &mut self.pieces {
            let header = wire::tunnel::header_for_data(piece.len());
            self.buffer[piece.start - HEADER..piece.start].copy_from_slice(&header);
            *piece = piece.start - HEADER - records::BEFORE..piece.end + records::AFTER;
            sealer.seal(&mut self.buffer[piece.clone()]);
        }
    }

    /// Reads sealed bytes behind `kept`, which came before them, and returns all of them; with `None` nothing is there, and
    /// where nothing but `kept` is there, the stream has ended.
    ///
    /// # Errors
    /// The socket's.
    pub(crate) fn read_sealed(&mut self, tcp: &TcpStream, kept: &[u8]) -> io::Result<Option<usize>> {
        let room = &mut self.buffer[kept.len()..];
        let most = room.len();
        let Some(length) = read_now(tcp, most, || linux::sockets::read_vectored(tcp, &mut [IoSliceMut::new(room)]))?
        else {
            return Ok(None);
        };
        self.put_sealed(0, kept);
        Ok(Some(kept.len() + length))
    }

    /// Puts bytes there that came through a tunnel before, from `at` on. They lay in this buffer once, all together, and so
    /// they fit.
    pub(crate) fn put_sealed(&mut self, at: usize, bytes: &[u8]) {
        self.buffer[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// The bytes that [`Self::read_sealed`] has left, and where to say which of them are payload.
    pub(crate) fn sealed(&mut self) -> (&mut [u8], &mut Vec<Range<usize>>) {
        (&mut self.buffer, &mut self.pieces)
    }

    /// Writes the pieces, as much of them as the socket takes at once; the rest goes behind `left`, where nothing may lie
    /// that is not written yet.
    ///
    /// # Errors
    /// The socket's.
    pub(crate) fn write(&self, tcp: &TcpStream, left: &mut Vec<u8>) -> io::Result<()> {
        let mut pieces = &self.pieces[..];
        while !pieces.is_empty() {
            let (now, later) = pieces.split_at(pieces.len().min(PLACES));
            let mut places = [IoSlice::new(&[]); PLACES];
            for (place, piece) in places.iter_mut().zip(now) {
                *place = IoSlice::new(&self.buffer[piece.clone()]);
            }
            let places = &places[..now.len()];
            let length = now.iter().map(Range::len).sum();
            let mut written = write_now(tcp, length, || linux::sockets::write_vectored(tcp, places))?;
            if written < length {
                for piece in pieces {
                    let piece = &self.buffer[piece.clone()];
                    left.extend_from_slice(&piece[written.min(piece.len())..]);
                    written = written.saturating_sub(piece.len());
                }
                return Ok(());
            }
            pieces = later;
        }
        Ok(())
    }

    /// Puts all pieces behind what waits to be written already.
    pub(crate) fn keep(&self, waiting: &mut Vec<u8>) {
        for piece in &self.pieces {
            waiting.extend_from_slice(&self.buffer[piece.clone()]);
        }
    }
}

/// Reads at most `most` bytes by `read`. One that gave less has emptied the socket: to ask again would be a system call in
/// vain.
fn read_now(tcp: &TcpStream, most: usize, read: impl FnOnce() -> io::Result<usize>) -> io::Result<Option<usize>> {
    let mut short = None;
    let result = tcp.try_io(Interest::READABLE, || match read()? {
        length if length > 0 && length < most => {
            short = Some(length);
            Err(io::ErrorKind::WouldBlock.into())
        }
        length => Ok(length),
    });
    match result {
        Ok(length) => Ok(Some(length)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(short),
        Err(error) => Err(error),
    }
}

/// The same for a write of `most` bytes: one that took less has filled the socket.
pub(crate) fn write_now(tcp: &TcpStream, most: usize, write: impl FnOnce() -> io::Result<usize>) -> io::Result<usize> {
    let mut short = 0;
    let result = tcp.try_io(Interest::WRITABLE, || match write()? {
        length if length < most => {
            short = length;
            Err(io::ErrorKind::WouldBlock.into())
        }
        length => Ok(length),
    });
    match result {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(short),
        result => result,
    }
}
