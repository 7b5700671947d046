//! Which frame may follow which, in one direction of a tunnel.

use super::{FIRST_LEASE, MAX_CONTROL, MAX_DATA, MAX_REASON, Violation};

/// The kind of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FrameKind {
    /// A connection is asked for.
    Open,
    /// It is accepted.
    Opened,
    /// It is refused.
    Refused,
    /// Bytes of the application.
    Data,
    /// The end of one direction.
    Fin,
    /// The end of both.
    Reset,
    /// The end of the lease.
    Closed,
    /// No further lease.
    Drain,
}

impl FrameKind {
    pub(super) const fn code(self) -> u8 {
        match self {
            Self::Open => 1,
            Self::Opened => 2,
            Self::Refused => 3,
            Self::Data => 4,
            Self::Fin => 5,
            Self::Reset => 6,
            Self::Closed => 7,
            Self::Drain => 8,
        }
    }

    pub(super) fn from_code(code: u8) -> Option<Self> {
        use FrameKind as F;
        let all = [F::Open, F::Opened, F::Refused, F::Data, F::Fin, F::Reset, F::Closed, F::Drain];
        all.into_iter().find(|kind| kind.code() == code)
    }

    /// Checks the length that a header gives.
    pub(super) fn check_length(self, length: usize) -> Result<(), Violation> {
        let (least, most) = match self {
            Self::Open => (8, MAX_CONTROL),
            Self::Refused => (9, 8 + MAX_REASON),
            Self::Opened | Self::Fin | Self::Reset | Self::Closed | Self::Drain => (8, 8),
            Self::Data if length == 0 => return Err(Violation::EmptyData),
            Self::Data => (1, MAX_DATA),
        };
        match length {
            _ if length < least => Err(Violation::FrameTooShort),
            _ if length > most => Err(Violation::FrameTooLong),
            _ => Ok(()),
        }
    }
}

/// Whose frames these are.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Sender {
    /// The side that made the TLS connection.
    Client,
    /// The side that accepted it.
    Server,
}

/// The frames of one direction so far.
///
/// Per lease, a client sends `Open Data* (Fin Reset? | Reset)` and a server sends
/// `(Opened Data* (Fin (Closed | Reset) | Reset) | Refused | Reset)`. The next lease may begin after the client's
/// `Fin` and the server's `Closed`; after a `Reset` or a `Refused` nothing may. Between two leases a server may send
/// `Drain`, and then only `Refused`.
///
/// What the other direction must have seen before (an answer needs an `Open`, `Closed` needs both `Fin`s) is for the
/// owner of the tunnel, who knows both.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sequence {
    sender: Sender,
    lease: u64,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// The lease of that number has not begun.
    Before,
    /// Its bytes flow.
    Flowing,
    /// It was said that it will not begin.
    Draining,
    /// Its direction ended cleanly.
    Finished,
    /// Nothing may follow any more.
    Over,
}

impl Sequence {
    /// A direction in which nothing was sent yet.
    pub fn new(sender: Sender) -> Self {
        Self { sender, lease: FIRST_LEASE, state: State::Before }
    }

    /// Takes the next frame's kind, before its payload is known.
    ///
    /// # Errors
    /// [`Violation::OutOfOrder`] where it may not come now.
    pub fn step(&mut self, kind: FrameKind) -> Result<(), Violation> {
        use {FrameKind as F, Sender as S, State as T};
        let (lease, state) = match (self.sender, self.state, kind) {
            (S::Client, T::Before, F::Open) => (self.lease, T::Flowing),
            (S::Client, T::Finished, F::Open) => (self.lease.checked_add(1).ok_or(Violation::OutOfOrder)?, T::Flowing),
            (S::Server, T::Before, F::Opened) => (self.lease, T::Flowing),
            (S::Server, T::Before, F::Refused) => (self.lease, T::Over),
            (S::Server, T::Before, F::Reset) => (self.lease, T::Over),
            (S::Server, T::Before, F::Drain) => (self.lease, T::Draining),
            (S::Server, T::Draining, F::Refused) => (self.lease, T::Over),
            (_, T::Flowing, F::Data) => (self.lease, T::Flowing),
            (_, T::Flowing, F::Fin) => (self.lease, T::Finished),
            (_, T::Flowing | T::Finished, F::Reset) => (self.lease, T::Over),
            (S::Server, T::Finished, F::Closed) => (self.lease.checked_add(1).ok_or(Violation::OutOfOrder)?, T::Before),
            _ => return Err(Violation::OutOfOrder),
        };
        *self = Self { sender: self.sender, lease, state };
        Ok(())
    }

    /// The lease that a frame of that kind would have to name if it came next.
    pub(super) fn lease(&self, kind: FrameKind) -> u64 {
        match (self.state, kind) {
            (State::Finished, FrameKind::Open) => self.lease.saturating_add(1),
            _ => self.lease,
        }
    }

    /// Whether the stream may end here: no lease is open in this direction. Anywhere else the end of TLS is a `Reset`,
    /// for otherwise a killed process would look like a clean end (T8).
    pub fn may_end(&self) -> bool {
        match self.state {
            State::Before | State::Draining | State::Over => true,
            State::Finished => self.sender == Sender::Client,
            State::Flowing => false,
        }
    }
}
