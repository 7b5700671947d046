//! A pod that is let go while it runs (T4): first nothing new is captured, and when the last captured connection has ended the
//! rules go.
//!
//! While the rules stand, connection tracking may also give a connection that is not captured another port: its own is
//! remembered of a flow that the proxy had, whose socket is gone. With the rules goes what it translates, and such a
//! connection would hang. So flows without a socket are forgotten, and the rules wait for what is translated nevertheless.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use linux::diag;
use linux::flows::{self, Flow, Phase};
use linux::netlink::{Error, Socket};
use linux::{nft, tc};

use super::stale::{looks_open, sockets_of};
use super::{Capture, CaptureError, Guard, LOOPBACK, Rules, Standing, Strength, interfaces};
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
    /// a row found nothing that needs the rules. One look could come while a connection is between the rule that captured
    /// it and its socket. Whether everything is gone.
    pub fn leave(&mut self) -> Result<bool, CaptureError> {
        if !self.is_draining() {
            self.drain()?;
            self.forget_what_is_over()?;
            return Ok(false);
        }
        self.forget_what_is_over()?;
        if let Standing::Broken(_) = self.verify()? {
            self.repair()?;
            return Ok(false);
        }
        let idle = !self.needs_rules()?;
        if std::mem::replace(&mut self.idle, idle) && idle {
            self.remove()?;
            self.end_translated()?;
            return Ok(true);
        }
        Ok(false)
    }

    /// Lets a pod that leaves go at once: both ends of what it still has open through the data path see a reset, then everything
    /// goes. What is not captured and translated has a moment to end by itself. Returns how many connections were ended; the
    /// proxy may end some by itself when it sees others end.
    pub fn cut_short(&mut self) -> Result<usize, CaptureError> {
        // What was about to be accepted comes into the list with its last acknowledgement.
        const LOOKS: usize = 5;
        const MOMENT: Duration = Duration::from_secs(1);
        const PAUSE: Duration = Duration::from_millis(5);
        let (mut socket, marks) = (self.diagnosis()?, self.plan.marks);
        let mut ended = 0;
        let mut looks = 0..LOOKS;
        loop {
            looks.next().ok_or(CaptureError::StillOpen)?;
            ended += diag::destroy(&mut socket, |it| is_ours(marks, it))?;
            if is_idle(&mut socket, marks)? {
                break;
            }
        }
        let until = Instant::now() + MOMENT;
        loop {
            self.forget_what_is_over()?;
            if !self.needs_rules()? {
                break;
            }
            if Instant::now() >= until {
                ended += self.end_translated()?;
                break;
            }
            std::thread::sleep(PAUSE);
        }
        self.remove()?;
        Ok(ended + self.end_translated()?)
    }

    /// Whether something is open that cannot go on without the rules: a connection of the data path, or one that is translated.
    fn needs_rules(&mut self) -> Result<bool, CaptureError> {
        let translated = translated(&flows::list(&mut self.netfilter)?);
        let marks = self.plan.marks;
        let open = diag::connections(&mut self.diagnosis()?)?;
        Ok(open.iter().any(|it| is_ours(marks, it) || translated.contains(&(it.local, it.remote))))
    }

    /// Forgets what would stand in the way of who has a port next: flows of the proxy's, what looks open and is not, and kept
    /// ports. A connection that meets such a flow is translated, to another port or where that flow went.
    fn forget_what_is_over(&mut self) -> Result<(), CaptureError> {
        let plan = self.plan.clone();
        self.forget_without_socket(|flow| {
            let is_translated = || flow.phase != Phase::Ended && is_translated_by_us(flow);
            rules::is_zone(flow.zone) || is_translated() || looks_open(&plan, flow)
        })?;
        self.forget_ended()?;
        Ok(())
    }

    /// Ends what is translated: without the rules it would wait in vain. Returns how many.
    fn end_translated(&mut self) -> Result<usize, CaptureError> {
        let translated = translated(&flows::list(&mut self.netfilter)?);
        Ok(diag::destroy(&mut self.diagnosis()?, |it| translated.contains(&(it.local, it.remote)))?)
    }

    /// Takes the guard away, and leaves what it hung on: without that the pod would lose what it sends for a moment, now and
    /// when it is captured again.
    fn disarm(&mut self) -> Result<(), CaptureError> {
        // One of an agent that is gone is as long as a whole one at most.
        let before = match &self.guard {
            None if self.armed_before => Some(Guard::of(&self.plan, Strength::Everything)?),
            _ => None,
        };
        let Some(guard) = self.guard.as_ref().or(before.as_ref()) else { return Ok(()) };
        for interface in interfaces(&mut self.route, &self.plan)?.into_iter().chain([LOOPBACK]) {
            tc::clear(&mut self.route, interface, guard.on(interface).len() as u16)?;
        }
        // Not before: where something fails it is taken away by the next look.
        (self.guard, self.armed_before) = (None, false);
        Ok(())
    }

    /// Takes the guard away with what it hung on.
    fn remove_guard(&mut self) -> Result<(), CaptureError> {
        self.disarm()?;
        for interface in interfaces(&mut self.route, &self.plan)?.into_iter().chain([LOOPBACK]) {
            tc::remove(&mut self.route, interface, 0)?;
        }
        Ok(())
    }

    /// Takes everything out of the pod. Only when no captured connection is left: the next bytes of one would leave in
    /// clear (T3).
    pub fn remove(&mut self) -> Result<(), CaptureError> {
        self.standing = None;
        self.remove_guard()?;
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

/// The sockets of all flows that our rules translate. Those that have ended have none: who has their ports meanwhile is another.
fn translated(flows: &[Flow]) -> HashSet<(SocketAddr, SocketAddr)> {
    let goes_on = |flow: &&Flow| flow.phase != Phase::Ended && is_translated_by_us(flow);
    flows.iter().filter(goes_on).flat_map(sockets_of).collect()
}

/// Whether a flow goes to a listener, or has another source port and else nothing changed. What somebody else's rules in the pod
/// translate goes on without ours.
fn is_translated_by_us(flow: &Flow) -> bool {
    let (from, to) = flow.answers;
    let other_port = from == flow.destination && to.ip() == flow.source.ip() && to.port() != flow.source.port();
    other_port || (flow.is_translated() && [INBOUND_PORT, OUTBOUND_PORT].contains(&from.port()))
}

/// Whether a connection is of the data path: the proxy's to the wire or to a program, or one that waits for it.
fn is_ours(marks: Marks, connection: &diag::Connection) -> bool {
    [marks.outer, marks.inner].contains(&connection.mark)
        || [INBOUND_PORT, OUTBOUND_PORT].contains(&connection.local.port())
}
