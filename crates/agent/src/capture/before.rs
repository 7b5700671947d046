//! Connections from before a pod's capture, by its sockets (T11).

use linux::diag;
use linux::netlink::Socket;
use wire::pods::{Ends, MAX_CONNECTIONS};

use super::{Capture, CaptureError};
use crate::guard;

impl Capture {
    /// The pod's connections that go on in clear because they were open before their capture (T11).
    pub fn from_before(&self) -> Result<Vec<diag::Connection>, CaptureError> {
        self.listed_from_before(&mut self.diagnosis()?)
    }

    /// Of those the ones that were opened to the pod, at ports at which it listens: as many as one message names.
    pub fn opened_before(&self) -> Result<Vec<Ends>, CaptureError> {
        let mut socket = self.diagnosis()?;
        let listening = diag::listening(&mut socket)?;
        let before = self.listed_from_before(&mut socket)?;
        let opened = before.iter().filter(|it| listening.contains(&it.local.port())).map(ends);
        let mut opened: Vec<_> = opened.collect();
        // In an order that does not change while they are the same.
        opened.sort_unstable();
        opened.truncate(MAX_CONNECTIONS);
        Ok(opened)
    }

    /// Ends those of the pod's connections from before its capture that `these` says, and no others. Returns how many.
    pub fn end_from_before(&self, these: impl Fn(&Ends) -> bool) -> Result<usize, CaptureError> {
        let mut socket = self.diagnosis()?;
        let before = self.listed_from_before(&mut socket)?;
        Ok(diag::destroy(&mut socket, |it| these(&ends(it)) && before.contains(it))?)
    }

    fn listed_from_before(&self, socket: &mut Socket) -> Result<Vec<diag::Connection>, CaptureError> {
        Ok(guard::from_before(&self.plan, &diag::connections(socket)?))
    }
}

fn ends(connection: &diag::Connection) -> Ends {
    Ends { own: connection.local, peer: connection.remote }
}
