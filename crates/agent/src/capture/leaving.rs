//! A pod that is let go while it runs (T4): first nothing new is captured, and when the last captured connection has ended the
//! rules go.

use linux::diag;
use linux::netlink::{Error, Socket};
use linux::nft;

use super::{Capture, CaptureError, Rules, Standing};
use crate::rules::{self, INBOUND_PORT, Marks, OUTBOUND_PORT};

impl Capture {
    /// Whether new connections are not captured any more.
    pub fn is_draining(&self) -> bool {
        self.standing.as_ref().is_some_and(|expected| expected.rules == Rules::Draining)
    }

    /// Captures no new connections from here on; those that were captured go on, and need the proxy
    /// until they end. Then comes [`Capture::remove`], or [`Capture::begin`] again.
    pub fn drain(&mut self) -> Result<(), CaptureError> {
        self.idle = false;
        self.disarm()?;
        self.load(Rules::Draining)
    }

    /// One step of letting the pod go: first [`Capture::drain`], then a look each time, and [`Capture::remove`] when two looks in
    /// a row found no connection of the data path. One look could come while a connection is between the rule that captured
    /// it and its socket. Whether everything is gone.
    pub fn leave(&mut self) -> Result<bool, CaptureError> {
        if !self.is_draining() {
            self.drain()?;
            return Ok(false);
        }
        if let Standing::Broken(_) = self.verify()? {
            self.repair()?;
            return Ok(false);
        }
        let idle = is_idle(&mut self.diagnosis()?, self.plan.marks)?;
        if std::mem::replace(&mut self.idle, idle) && idle {
            self.remove()?;
            return Ok(true);
        }
        Ok(false)
    }

    /// Lets a pod that leaves go at once: both ends of what it still has open through the data path see a reset, then everything
    /// goes. Returns how many connections were ended.
    pub fn cut_short(&mut self) -> Result<usize, CaptureError> {
        // What was about to be accepted comes into the list with its last acknowledgement.
        const LOOKS: usize = 5;
        let (mut socket, marks) = (self.diagnosis()?, self.plan.marks);
        let mut ended = 0;
        for _ in 0..LOOKS {
            ended += diag::destroy(&mut socket, |it| is_ours(marks, it))?;
            if is_idle(&mut socket, marks)? {
                self.remove()?;
                return Ok(ended);
            }
        }
        Err(CaptureError::StillOpen)
    }

    /// Takes everything out of the pod. Only when no captured connection is left: the next bytes of one would leave in
    /// clear (T3).
    pub fn remove(&mut self) -> Result<(), CaptureError> {
        self.standing = None;
        self.disarm()?;
        nft::delete(&mut self.netfilter, rules::TABLE)?;
        for family in &self.families {
            self.delivery.remove(&mut self.route, *family)?;
        }
        Ok(())
    }
}

/// Whether no connection of the data path is left in the socket's namespace.
pub(crate) fn is_idle(socket: &mut Socket, marks: Marks) -> Result<bool, Error> {
    Ok(!diag::connections(socket)?.iter().any(|it| is_ours(marks, it)))
}

/// Whether a connection is of the data path: the proxy's to the wire or to a program, or one that waits for it.
fn is_ours(marks: Marks, connection: &diag::Connection) -> bool {
    [marks.outer, marks.inner].contains(&connection.mark)
        || [INBOUND_PORT, OUTBOUND_PORT].contains(&connection.local.port())
}
