//! What to expect of an incoming connection before its first byte (T17).

use std::net::IpAddr;
use std::time::Duration;

use crate::{AddressClass, Mode, PlaintextReason, Speaks, Uncaptured, View, Workload};

/// How long a client that must or may speak TLS is waited for.
const HELLO: Duration = Duration::from_secs(3);
/// For an address in the cluster's ranges that nobody knows (yet).
const UNKNOWN: Duration = Duration::from_millis(300);
/// For a pod that is not known to be captured: its capture may be newer than our view, and then its hello is on
/// its way already.
const GRACE: Duration = Duration::from_millis(50);

/// What an incoming connection is, as far as its source address tells. It decides how long to wait, and what to call
/// the connection if it turns out to be plaintext; it never decides who the client is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Expectation {
    /// How long to wait for the first byte before the connection counts as plaintext.
    pub wait: Duration,
    /// The name of this plaintext.
    pub plaintext: PlaintextReason,
    /// The mode of the port that was dialled.
    pub mode: Mode,
}

impl Expectation {
    /// The same for a client that is known to be the pod's own node: nobody waits for its hello where it may speak in clear.
    pub fn of_own_node(self) -> Self {
        match self.mode {
            Mode::Permissive => Self { wait: Duration::ZERO, plaintext: PlaintextReason::Node, ..self },
            Mode::Strict => Self { plaintext: PlaintextReason::Node, ..self },
        }
    }
}

/// What to expect of a connection from `source` to `port` of `destination`.
pub fn expect(view: &View, destination: &Workload, port: u16, source: IpAddr) -> Expectation {
    let mode = destination.modes.at(port);
    let (wait, plaintext) = match by_source(view, source) {
        // Whoever knows that this pod does not speak TLS any more, or not yet, dials it in clear, and whoever does not know yet
        // begins with a hello: its rules stand from before it is published until after it is taken back (T4).
        (_, PlaintextReason::Bypass) if destination.speaks == Speaks::Nothing => {
            (UNKNOWN, destination.uncaptured.unwrap_or(Uncaptured::Pending).in_clear())
        }
        by_source => by_source,
    };
    let (wait, plaintext) = match plaintext {
        // What the view says of who it is may be over: its hello is waited for, and its plaintext is called what it is.
        _ if !view.is_stale() => (wait, plaintext),
        PlaintextReason::OptedOut
        | PlaintextReason::SystemNamespace
        | PlaintextReason::NotCapturable
        | PlaintextReason::CapturePending
        | PlaintextReason::UnknownSource => (UNKNOWN, PlaintextReason::StaleView),
        PlaintextReason::NotAPod | PlaintextReason::Outside if view.is_within(source) => {
            (UNKNOWN, PlaintextReason::StaleView)
        }
        _ => (wait, plaintext),
    };
    // A strict port lets no plaintext through, so nobody is kept from speaking by waiting, and a client that our view
    // does not know as captured yet may still send its hello.
    let wait = if mode == Mode::Strict { HELLO } else { wait };
    Expectation { wait, plaintext, mode }
}

fn by_source(view: &View, source: IpAddr) -> (Duration, PlaintextReason) {
    if let Some(workload) = view.workload_at(source) {
        return match (workload.speaks, workload.uncaptured) {
            (Speaks::JustMtls, _) => (HELLO, PlaintextReason::Bypass),
            (_, Some(Uncaptured::OptedOut)) => (GRACE, PlaintextReason::OptedOut),
            (_, Some(Uncaptured::SystemNamespace)) => (GRACE, PlaintextReason::SystemNamespace),
            (_, Some(Uncaptured::NotCapturable)) => (GRACE, PlaintextReason::NotCapturable),
            (_, Some(Uncaptured::HostNetwork)) => (Duration::ZERO, PlaintextReason::HostNetwork),
            (_, Some(Uncaptured::NotAPod)) => (Duration::ZERO, PlaintextReason::NotAPod),
            (_, Some(Uncaptured::Pending) | None) => (UNKNOWN, PlaintextReason::CapturePending),
        };
    }
    match view.settings().map(|settings| settings.classify(source)) {
        Some(AddressClass::Node) => (Duration::ZERO, PlaintextReason::Node),
        Some(AddressClass::Outside) => (Duration::ZERO, PlaintextReason::Outside),
        Some(AddressClass::Mixed) if view.is_nobodys(source) => (Duration::ZERO, PlaintextReason::Outside),
        Some(AddressClass::Inside | AddressClass::Mixed) | None => (UNKNOWN, PlaintextReason::UnknownSource),
    }
}
