//! Connections from before a pod's capture, by its sockets (T11).

use linux::diag;
use wire::pods::{Ends, MAX_CONNECTIONS};

use super::{Capture, CaptureError};
use crate::guard;

impl Capture {
    /// The pod's connections that go on in clear because they were open before their capture (T11).
    pub fn from_before(&self) -> Result<Vec<diag::Connection>, CaptureError> {
        let mut socket = self.diagnosis()?;
        Ok(guard::from_before(&self.plan, &diag::connections(&mut socket)?))
    }

    /// Of those the ones that were opened to the pod, at ports at which it listens: as many as one message names.
    pub fn opened_before(&self) -> Result<Vec<Ends>, CaptureError> {
        let mut socket = self.diagnosis()?;
        let listening = diag::listening(&mut socket)?;
        let before = guard::from_before(&self.plan, &diag::connections(&mut socket)?);
        let opened = before.iter().filter(|it| listening.contains(&it.local.port())).map(ends);
        let mut opened: Vec<_> = opened.collect();
        // In an order that does not change while they are the same.
        opened.sort_unstable();
        opened.truncate(MAX_CONNECTIONS);
        Ok(opened)
    }

    /// Ends those of the pod's connections from before its capture that `these` names, and no others. Returns how many.
    pub fn end_these_from_before(&self, these: &[Ends]) -> Result<usize, CaptureError> {
        let mut socket = self.diagnosis()?;
        let before = guard::from_before(&self.plan, &diag::connections(&mut socket)?);
        let is_meant = |it: &diag::Connection| these.contains(&ends(it)) && before.contains(it);
        Ok(diag::destroy(&mut socket, is_meant)?)
    }

    /// Ends the pod's connections from before its capture, where it should have been captured before it had any. Returns how
    /// many there were.
    pub fn end_from_before(&self) -> Result<usize, CaptureError> {
        let mut socket = self.diagnosis()?;
        let before = guard::from_before(&self.plan, &diag::connections(&mut socket)?);
        Ok(diag::destroy(&mut socket, |connection| before.contains(connection))?)
    }
}

fn ends(connection: &diag::Connection) -> Ends {
    Ends { own: connection.local, peer: connection.remote }
}
