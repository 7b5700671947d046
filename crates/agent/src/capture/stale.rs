//! Connections from before a pod's capture, as connection tracking knows them (T11).
//!
//! It begins to look when the rules are loaded, in the middle of what is open. An end that is the first thing it sees of a
//! connection fits no flow, and would be dropped (T22): so it is told of what is open. And a last acknowledgement looks to it like
//! a connection that goes on for days: whoever has that port next would not be captured, and what is not captured does not leave
//! (T46). Such a flow has no socket, and is forgotten.
//!
//! Later such a flow begins only by chance: a segment comes for a connection of the proxy's to the wire that has ended (those have no
//! flow). It is looked for when the rules drop what a program opens, which is sent again.
//!
//! So is a connection that was accepted and has ended, and whose port the kernel keeps for a minute. Whoever has that port next
//! at the other end is refused where his timestamps are older (RFC 7323, 5.3); and they are of another clock where a program
//! dialled a Service's address before, and the proxy dials the pod's own now.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use linux::diag::{self, Stage};
use linux::flows::{self, Flow, Phase};
use linux::nft;

use super::{Capture, CaptureError, growth};
use crate::rules::{self, CapturePlan, INBOUND_PORT};

/// When to look again. A socket that has ended may send its last acknowledgement once more for a minute; ports come back in
/// seconds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Looks {
    next: Instant,
    pause: Duration,
}

impl Looks {
    const FIRST: Duration = Duration::from_secs(1);
    const LONGEST: Duration = Duration::from_secs(64);

    /// The first one now.
    pub(super) fn at_once() -> Looks {
        Looks { next: Instant::now(), pause: Looks::FIRST }
    }

    /// From now on.
    pub(super) fn from_now() -> Looks {
        Looks { next: Instant::now() + Looks::FIRST, pause: Looks::FIRST }
    }

    /// After this one; each pause is twice as long as the one before.
    fn after(self) -> Option<Looks> {
        let pause = self.pause * 2;
        (pause <= Looks::LONGEST).then(|| Looks { next: Instant::now() + pause, pause })
    }
}

impl Capture {
    /// Tells connection tracking of the connections that are open while it begins to look.
    ///
    /// Of those alone whose handshake is over: the SYN of another one may be on its way to being captured, or be sent again and
    /// captured then. Of a flow that is known already it would be a part, which is not captured, and would not leave (T46).
    pub(super) fn introduce(&mut self) {
        self.looks = Some(Looks::from_now());
        // What could not be told is picked up by its next packet.
        for open in self.from_before().unwrap_or_default().iter().filter(|it| it.stage == Stage::Standing) {
            let _ = flows::add(&mut self.netfilter, open.local, open.remote);
        }
    }

    /// Forgets the flows of the pod that no socket has any more, or that began while rules were gone, where it is time to look for
    /// some. Returns how many.
    pub fn forget_stale_when_due(&mut self) -> Result<usize, CaptureError> {
        if self.drops_what_opens()? {
            self.looks = Some(Looks::at_once());
        }
        let Some(looks) = self.looks.filter(|looks| looks.next <= Instant::now()) else { return Ok(0) };
        self.looks = looks.after();
        self.forget_ended()?;
        let begun = match self.repaired {
            0 => 0,
            left => {
                self.repaired = left - 1;
                self.forget_begun_without_rules()?
            }
        };
        Ok(begun + self.forget_stale()?)
    }

    /// Whether the rules have dropped what a program opened, since this was last asked.
    fn drops_what_opens(&mut self) -> Result<bool, CaptureError> {
        let counters = nft::counters(&mut self.netfilter, rules::TABLE)?;
        let dropped = counters.iter().filter(|it| it.why == rules::UNCAPTURED).map(|it| it.packets).sum();
        Ok(growth(&mut self.uncaptured, dropped) > 0)
    }

    /// Forgets what began while rules were gone and does not stand yet. The kernel would go on with it as it began, past the rules,
    /// and the guards let none of that by: its next attempt is captured, where it would wait in vain. Returns how many.
    fn forget_begun_without_rules(&mut self) -> Result<usize, CaptureError> {
        let plan = &self.plan;
        let is_own = |end: SocketAddr| plan.addresses.contains(&end.ip());
        let is_excluded = |flow: &Flow| {
            let ports = if is_own(flow.source) { &plan.excluded_out } else { &plan.excluded_in };
            ports.contains(&flow.destination.port())
        };
        let begun = |flow: &Flow| {
            is_past_rules(flow, Phase::Opening) && is_own(flow.source) != is_own(flow.destination) && !is_excluded(flow)
        };
        let flows: Vec<_> = flows::list(&mut self.netfilter)?.into_iter().filter(begun).collect();
        self.forget(&flows)
    }

    /// Forgets the pod's connections that were accepted and have ended, and whose ports are kept. Returns how many. A client's are
    /// kept: connection tracking remembers them, too, and would take who has the port next for who had it before.
    pub fn forget_ended(&mut self) -> Result<usize, CaptureError> {
        let mut socket = self.diagnosis()?;
        let listening = diag::listening(&mut socket)?;
        let accepted = |it: &diag::Connection| {
            self.plan.addresses.contains(&it.local.ip()) && listening.contains(&it.local.port())
        };
        Ok(diag::forget_ended(&mut socket, accepted)?)
    }

    /// Forgets the flows of the pod that no socket has any more. Returns how many.
    pub fn forget_stale(&mut self) -> Result<usize, CaptureError> {
        let plan = self.plan.clone();
        self.forget_without_socket(|flow| looks_open(&plan, flow))
    }

    /// Forgets those of `these` flows that no socket of the pod has. Returns how many.
    pub(super) fn forget_without_socket(&mut self, these: impl Fn(&Flow) -> bool) -> Result<usize, CaptureError> {
        let mut flows = flows::list(&mut self.netfilter)?;
        // Afterwards: what was opened meanwhile is not taken for one that is gone.
        let sockets = diag::connections(&mut self.diagnosis()?)?;
        // The proxy's to the wire have no flow, unless one began while rules were gone. What an inbound listener accepted has their
        // mark, too, and a flow.
        let tracked = sockets.iter().filter(|it| it.mark != self.plan.marks.outer || it.local.port() == INBOUND_PORT);
        let live: HashMap<(SocketAddr, SocketAddr), Stage> =
            tracked.map(|it| ((it.local, it.remote), it.stage)).collect();
        // Who still asks has the port of a flow that is open next, and waits for an answer in vain.
        let has = |flow: &Flow, stage: Stage| flow.phase != Phase::Open || stage != Stage::Asking;
        let is_live =
            |flow: &Flow| sockets_of(flow).iter().any(|it| live.get(it).is_some_and(|stage| has(flow, *stage)));
        flows.retain(|flow| these(flow) && !is_live(flow));
        self.forget(&flows)
    }

    /// Forgets flows. Returns how many were still there.
    fn forget(&mut self, flows: &[Flow]) -> Result<usize, CaptureError> {
        let mut forgotten = 0;
        for flow in flows {
            forgotten += usize::from(flows::forget(&mut self.netfilter, flow)?);
        }
        Ok(forgotten)
    }
}

/// Whether a flow of the pod's has met none of our rules and is open, if there is a socket that has it.
pub(super) fn looks_open(plan: &CapturePlan, flow: &Flow) -> bool {
    let ends = [flow.source, flow.destination];
    is_past_rules(flow, Phase::Open) && ends.iter().any(|end| plan.addresses.contains(&end.ip()))
}

/// Whether a flow that is so far has met none of our rules.
fn is_past_rules(flow: &Flow, phase: Phase) -> bool {
    flow.phase == phase && !flow.is_translated() && flow.zone == 0
}

/// The sockets, by their own and their peer's address, that the pod may have of a flow: of who began it, and of who answers.
pub(super) fn sockets_of(flow: &Flow) -> [(SocketAddr, SocketAddr); 2] {
    [(flow.source, flow.destination), flow.answers]
}
