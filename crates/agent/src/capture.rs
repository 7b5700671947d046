//! One pod, captured: its listeners, its policy routing, its rules, and the sockets that the proxy
//! asks for.
//!
//! The order is what makes capture safe: [`Capture::prepare`] makes the listeners and the routing,
//! the proxy takes the listeners, and only then [`Capture::begin`] loads the rules and arms the guard on the pod's
//! interface. A rule that leads to a listener which nobody holds refuses connections; it never lets them pass in clear.

mod before;
mod leaving;
mod stale;

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use linux::changes::{Changes, Subject};
use linux::links::{self, LinkError, Links};
use linux::netlink::{self, Protocol, Socket};
use linux::netns::{NetNs, NetNsError};
use linux::nft::{self, IpFamily, Table};
use linux::routes::LocalDelivery;
use linux::sockets::{self, SocketError};
use linux::tc::{self, Filter};
use wire::report::CaptureFailure;

use crate::guard::{self, Strength};
use crate::listeners::{INSIDE, Listeners};
use crate::rules::{self, CapturePlan};

pub(crate) use leaving::is_idle;
use stale::Looks;

/// The most sockets of one request: four requests fill a message of 253 descriptors.
pub const LARGEST_BATCH: usize = 64;
/// The interface index of `lo`, in every network namespace.
const LOOPBACK: u32 = 1;

/// Why a pod could not be captured, or its capture not kept.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The namespace is another pod's, or its interface is not there yet (T26).
    #[error("the network namespace does not have the pod's address {0}")]
    NotItsAddress(IpAddr),
    /// A pod without an address has no identity on the wire.
    #[error("the pod has no address")]
    NoAddress,
    /// The pod has no IPv6.
    #[error("the pod's network namespace has no IPv6")]
    NoIpv6,
    /// A request for none or for too many.
    #[error("{0} sockets were asked for, not 1 to {LARGEST_BATCH}")]
    BatchSize(usize),
    /// The namespace is gone or closed to us.
    #[error(transparent)]
    Namespace(#[from] NetNsError),
    /// Its interfaces cannot be read.
    #[error(transparent)]
    Links(#[from] LinkError),
    /// A listener or socket could not be made.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A listener does not tell its mark.
    #[error("cannot read the mark of a listener: {0}")]
    Mark(std::io::Error),
    /// Rules or routes could not be made or read.
    #[error(transparent)]
    Netlink(#[from] netlink::Error),
    /// The kernel does not tell of changes.
    #[error("the kernel's notifications cannot be had: {0}")]
    Changes(io::Error),
    /// Its addresses are only on `lo`, where the guard could not stand.
    #[error("no interface but lo has the pod's addresses")]
    NoInterface,
    /// The guard on the interface would be too long.
    #[error("{0} excluded ports are more than fit the guard on the pod's interface")]
    TooManyExcluded(usize),
    /// Connections of the data path come while others are ended.
    #[error("captured connections are left after all were ended")]
    StillOpen,
    /// The rules were loaded, and are not what was loaded: something else changes them.
    #[error("the capture does not stand after it was made: {0}")]
    DoesNotStand(String),
}

impl CaptureError {
    /// The name in reports, logs and metrics.
    pub fn name(&self) -> CaptureFailure {
        match self {
            Self::NotItsAddress(_) => CaptureFailure::NotItsAddress,
            Self::NoAddress => CaptureFailure::NoAddress,
            Self::NoIpv6 => CaptureFailure::NoIpv6,
            Self::BatchSize(_) => CaptureFailure::BatchSize,
            Self::Namespace(_) => CaptureFailure::Namespace,
            Self::Links(_) => CaptureFailure::Links,
            Self::Socket(_) => CaptureFailure::Socket,
            Self::Mark(_) => CaptureFailure::Mark,
            Self::Netlink(_) => CaptureFailure::Netlink,
            Self::Changes(_) => CaptureFailure::Notifications,
            Self::NoInterface => CaptureFailure::NoInterface,
            Self::TooManyExcluded(_) => CaptureFailure::TooManyExcludedPorts,
            Self::StillOpen => CaptureFailure::StillOpen,
            Self::DoesNotStand(_) => CaptureFailure::DoesNotStand,
        }
    }
}

/// Whether a capture is as it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// All of it.
    Intact,
    /// Something was taken away or changed, as the sentence says.
    Broken(String),
}

/// The kinds of sockets that the proxy uses in a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SocketKind {
    /// To the wire, IPv4.
    OutV4,
    /// To the wire, IPv6.
    OutV6,
    /// To the application, IPv4.
    InV4,
    /// To the application, IPv6.
    InV6,
}

/// A captured pod. Dropping it closes our descriptors and changes nothing in the pod; as long as it lives, so
/// does the pod's network namespace (T42).
#[derive(Debug)]
pub struct Capture {
    namespace: NetNs,
    plan: CapturePlan,
    listeners: Arc<Listeners>,
    families: Vec<IpFamily>,
    gateways: Vec<IpAddr>,
    delivery: LocalDelivery,
    netfilter: Socket,
    route: Socket,
    /// The rules that must stand.
    standing: Option<Expected>,
    /// The guard that must stand.
    guard: Option<Guard>,
    /// A guard of an agent that is gone stood when this began.
    armed_before: bool,
    /// Told by the kernel, until somebody takes them.
    changes: Option<[Changes; 2]>,
    /// Packets that the guard had dropped when it was last asked.
    dropped: u64,
    /// Of a pod that leaves: the last look found no connection of the data path.
    idle: bool,
    /// Packets that opened a connection and were dropped by the rules, when that was last asked.
    uncaptured: u64,
    /// When to look for flows that nobody has any more.
    looks: Option<Looks>,
    /// At how many of those to forget what began while rules were gone: at none, but after a repair.
    repaired: u8,
}

/// Of the pod's namespace.
struct Sockets {
    netfilter: Socket,
    route: Socket,
    changes: [Changes; 2],
}

impl Sockets {
    /// Opens them; to be called inside the namespace.
    fn open() -> Result<Sockets, CaptureError> {
        let of = |subject| Changes::of(subject).map_err(CaptureError::Changes);
        let (netfilter, route) = (Socket::open(Protocol::Netfilter)?, Socket::open(Protocol::Route)?);
        Ok(Sockets { netfilter, route, changes: [of(Subject::Network)?, of(Subject::Nftables)?] })
    }
}

#[derive(Debug)]
struct Guard {
    strength: Strength,
    filters: Vec<Filter>,
    /// On `lo`.
    inside: Vec<Filter>,
}

impl Guard {
    fn of(plan: &CapturePlan, strength: Strength) -> Result<Guard, CaptureError> {
        let count = plan.excluded_in.len() + plan.excluded_out.len();
        let too_long = || CaptureError::TooManyExcluded(count);
        let filters = guard::filters(plan, strength).ok_or_else(too_long)?;
        let inside = guard::inside().ok_or_else(too_long)?;
        Ok(Guard { strength, filters, inside })
    }

    /// What stands on an interface.
    fn on(&self, interface: u32) -> &[Filter] {
        if interface == LOOPBACK { &self.inside } else { &self.filters }
    }
}

/// Rules that must stand. The table itself is made from the plan whenever it is needed: it is a hundred times as large as this.
#[derive(Debug)]
struct Expected {
    rules: Rules,
    /// The generation of the namespace's ruleset in which they were last seen.
    generation: Option<u32>,
}

/// Which rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rules {
    /// Those that capture.
    Whole,
    /// Those that let captured connections end.
    Draining,
}

impl Rules {
    fn table(self, plan: &CapturePlan) -> Table {
        match self {
            Self::Whole => rules::ruleset(plan),
            Self::Draining => rules::draining(plan),
        }
    }
}

impl Capture {
    /// Makes listeners and routing. `owner` becomes the owner of the listeners, a uid that no pod has. Nothing is captured
    /// yet, unless the rules of an agent before this one stand: then they keep their marks.
    pub fn prepare(namespace: NetNs, mut plan: CapturePlan, owner: Option<u32>) -> Result<Capture, CaptureError> {
        owns(&namespace, &plan)?;
        let (listeners, sockets) = namespace.enter(|| {
            let mut sockets = Sockets::open()?;
            let before = nft::read(&mut sockets.netfilter, rules::TABLE)?;
            plan.marks = before.as_ref().and_then(rules::marks_of).unwrap_or(plan.marks);
            Ok::<_, CaptureError>((Listeners::open(&plan, owner)?, sockets))
        })??;
        Capture::with(namespace, plan, Arc::new(listeners), sockets)
    }

    /// Takes over a pod from an agent before this one: its listeners, and the rules that lead to them, which keep their
    /// marks. Where the table is there it is looked at, and what is not as this agent makes it is made so in one
    /// transaction, and so the guard: at no time is the pod without them. Whether it was there says [`Capture::has_begun`].
    /// The table of a pod that leaves stays that: it leaves.
    pub fn take_over(
        namespace: NetNs,
        mut plan: CapturePlan,
        listeners: Arc<Listeners>,
    ) -> Result<Capture, CaptureError> {
        owns(&namespace, &plan)?;
        let mut sockets = namespace.enter(Sockets::open)??;
        let before = nft::read(&mut sockets.netfilter, rules::TABLE)?;
        plan.marks = before.as_ref().and_then(rules::marks_of).unwrap_or(plan.marks);
        // What an inbound listener accepts carries its mark, whatever the table says.
        let outer = linux::sockets::mark(&listeners.in_v4).map_err(CaptureError::Mark)?;
        if outer != 0 && outer != plan.marks.inner {
            plan.marks.outer = outer;
        }
        let mut capture = Capture::with(namespace, plan, listeners, sockets)?;
        if let Some(before) = before {
            let rules = if rules::is_draining(&before) { Rules::Draining } else { Rules::Whole };
            capture.standing = Some(Expected { rules, generation: None });
            if let Standing::Broken(_) = capture.verify()? {
                capture.repair()?;
            }
            // What a pod that leaves opens now passes it without a mark.
            if rules == Rules::Whole {
                capture.set_on_guard()?;
            }
        }
        Ok(capture)
    }

    fn with(
        namespace: NetNs,
        plan: CapturePlan,
        listeners: Arc<Listeners>,
        sockets: Sockets,
    ) -> Result<Capture, CaptureError> {
        let Sockets { netfilter, mut route, changes } = sockets;
        let mut families = vec![IpFamily::V4];
        if listeners.in_v6.is_some() {
            families.push(IpFamily::V6);
        }
        let gateways = links::gateways(&mut route)?;
        let armed_before = is_armed(&mut route)?;
        let delivery = rules::delivery(plan.marks);
        for family in &families {
            delivery.add(&mut route, *family)?;
        }
        Ok(Capture {
            namespace,
            plan,
            listeners,
            families,
            gateways,
            delivery,
            netfilter,
            route,
            standing: None,
            guard: None,
            armed_before,
            changes: Some(changes),
            dropped: 0,
            uncaptured: 0,
            idle: false,
            looks: None,
            repaired: 0,
        })
    }

    /// The listeners, to be duplicated and handed over.
    pub fn listeners(&self) -> Arc<Listeners> {
        self.listeners.clone()
    }

    /// The gateways of the pod's default routes: how its node may show itself to it.
    pub fn gateways(&self) -> &[IpAddr] {
        &self.gateways
    }

    /// What is captured.
    pub fn plan(&self) -> &CapturePlan {
        &self.plan
    }

    /// The pod's network namespace.
    pub fn namespace(&self) -> &NetNs {
        &self.namespace
    }

    /// Loads the rules in one transaction, and reads them back; then arms the guard. From here on new connections are
    /// captured; open ones go on as they are. What an agent before this one armed stays armed.
    pub fn begin(&mut self) -> Result<(), CaptureError> {
        self.load(Rules::Whole)?;
        self.introduce();
        self.set_on_guard()
    }

    /// Arms the guard, unless one before this agent did, as it is to be.
    fn set_on_guard(&mut self) -> Result<(), CaptureError> {
        let whole = Guard::of(&self.plan, Strength::Everything)?;
        if self.misses(&whole)?.is_none() {
            self.guard = Some(whole);
            return Ok(());
        }
        // Not before the rules: in between, what a running pod opens would wait for its SYN to be sent again.
        self.arm()
    }

    /// What the kernel tells of changes in the pod's namespace, from the beginning on; once.
    pub fn take_changes(&mut self) -> Option<[Changes; 2]> {
        self.changes.take()
    }

    /// Whether rules were loaded.
    pub fn has_begun(&self) -> bool {
        self.standing.is_some()
    }

    /// How much the guard judges; `None` while there is none.
    pub fn guarded(&self) -> Option<Strength> {
        self.guard.as_ref().map(|guard| guard.strength)
    }

    /// Makes the guard judge everything, if it does not yet and the pod's connections from before its capture have ended.
    /// Says whether it did.
    pub fn strengthen(&mut self) -> Result<bool, CaptureError> {
        if self.guarded() != Some(Strength::Opening) || !self.from_before()?.is_empty() {
            return Ok(false);
        }
        self.set_guard(Guard::of(&self.plan, Strength::Everything)?)?;
        self.looks = Some(Looks::from_now());
        Ok(true)
    }

    /// How many packets the guard has dropped since this was last asked.
    pub fn dropped(&mut self) -> Result<u64, CaptureError> {
        let mut all = 0;
        for interface in interfaces(&mut self.route, &self.plan)? {
            all += tc::dropped(&mut self.route, interface)?;
        }
        Ok(growth(&mut self.dropped, all))
    }

    /// The address of a listener that does not listen any more: somebody who had it shut it down.
    pub fn closed_listener(&self) -> Option<SocketAddr> {
        self.listeners.closed()
    }

    /// A socket that lists the connections in the pod's namespace, and ends them.
    pub(crate) fn diagnosis(&self) -> Result<Socket, CaptureError> {
        Ok(self.namespace.enter(|| Socket::open(Protocol::SocketDiagnosis))??)
    }

    /// Whether guard, table, rules and routes are as they were made. One question when no table in the
    /// namespace has changed since the last time.
    pub fn verify(&mut self) -> Result<Standing, CaptureError> {
        if let Some(address) = self.closed_listener() {
            return Ok(Standing::Broken(format!("the listener on {address} is closed")));
        }
        if let Some(guard) = self.guard.take() {
            let missing = self.misses(&guard);
            self.guard = Some(guard);
            if let Some(missing) = missing? {
                return Ok(Standing::Broken(missing));
            }
        }
        for family in &self.families {
            if let Some(missing) = self.delivery.missing(&mut self.route, *family)? {
                return Ok(Standing::Broken(missing));
            }
        }
        let Some(expected) = &mut self.standing else {
            return Ok(Standing::Broken("no rules were loaded".into()));
        };
        // Before the table is read, so that a change in between is seen the next time.
        let generation = nft::generation(&mut self.netfilter)?;
        if expected.generation == Some(generation) {
            return Ok(Standing::Intact);
        }
        let Some(found) = nft::read(&mut self.netfilter, rules::TABLE)? else {
            return Ok(Standing::Broken(format!("the table {} is gone", rules::TABLE)));
        };
        if let Some(difference) = expected.rules.table(&self.plan).normal().difference(&found) {
            return Ok(Standing::Broken(difference));
        }
        expected.generation = Some(generation);
        Ok(Standing::Intact)
    }

    /// Makes anew what [`Capture::verify`] found broken: the guard first, as nothing else closes the pod while the rules are
    /// gone; then routes, then the rules, in one transaction. Connections that were captured and still live go on.
    pub fn repair(&mut self) -> Result<(), CaptureError> {
        if let Some(guard) = self.guard.take() {
            self.set_guard(guard)?;
        }
        self.listeners.listen_again()?;
        for family in &self.families {
            self.delivery.add(&mut self.route, *family)?;
        }
        let rules = self.standing.as_ref().map_or(Rules::Whole, |expected| expected.rules);
        self.load(rules)?;
        if rules == Rules::Whole {
            (self.looks, self.repaired) = (Some(Looks::at_once()), 2);
        }
        Ok(())
    }

    /// Captures connections to and from these ports no longer, and those of all others. Before [`Capture::begin`] it is
    /// noted for then; afterwards the rules are replaced in one transaction, and open connections go on as they are. After
    /// an error [`Capture::verify`] finds it broken, and [`Capture::repair`] completes it.
    pub fn exclude(&mut self, ports: BTreeSet<u16>) -> Result<(), CaptureError> {
        let mut both = self.plan.clone();
        both.excluded_in.extend(&ports);
        both.excluded_out.extend(&ports);
        self.plan.excluded_in.clone_from(&ports);
        self.plan.excluded_out = ports;
        match &self.standing {
            None => return Ok(()),
            // A pod that leaves has no guard, and captures nothing anew.
            Some(expected) if expected.rules == Rules::Draining => return self.load(Rules::Draining),
            Some(_) => {}
        }
        // While the rules change the guard lets by what either of the two lets by.
        let strength = self.guarded().unwrap_or(Strength::Opening);
        self.set_guard(Guard::of(&both, strength)?)?;
        self.load(Rules::Whole)?;
        self.arm()
    }

    /// Makes 1 to [`LARGEST_BATCH`] sockets of a kind in the pod, ready to be bound and connected.
    pub fn sockets(&self, kind: SocketKind, count: usize) -> Result<Vec<OwnedFd>, CaptureError> {
        if count == 0 || count > LARGEST_BATCH {
            return Err(CaptureError::BatchSize(count));
        }
        let v6 = matches!(kind, SocketKind::OutV6 | SocketKind::InV6);
        if v6 && !self.families.contains(&IpFamily::V6) {
            return Err(CaptureError::NoIpv6);
        }
        let marks = self.plan.marks;
        let make = || match kind {
            SocketKind::OutV4 => sockets::outer_client(IpFamily::V4, marks.outer, None),
            SocketKind::OutV6 => sockets::outer_client(IpFamily::V6, marks.outer, None),
            SocketKind::InV4 => sockets::inner_client(IpFamily::V4, marks.inner, INSIDE),
            SocketKind::InV6 => sockets::inner_client(IpFamily::V6, marks.inner, INSIDE),
        };
        let made: Result<Vec<OwnedFd>, SocketError> =
            self.namespace.enter(|| (0..count).map(|_| make().map(OwnedFd::from)).collect())?;
        Ok(made?)
    }

    /// Arms the guard as far as the pod's open connections allow it. The rules stand: what opens meanwhile is captured.
    fn arm(&mut self) -> Result<(), CaptureError> {
        let strength = match self.from_before()?.is_empty() {
            true => Strength::Everything,
            false => Strength::Opening,
        };
        self.set_guard(Guard::of(&self.plan, strength)?)
    }

    /// On each interface in one step. First noted, so that what could not be set is found missing.
    fn set_guard(&mut self, guard: Guard) -> Result<(), CaptureError> {
        let guard = self.guard.insert(guard);
        let interfaces = interfaces(&mut self.route, &self.plan)?;
        if interfaces.is_empty() {
            return Err(CaptureError::NoInterface);
        }
        for interface in interfaces.into_iter().chain([LOOPBACK]) {
            tc::set(&mut self.route, interface, guard.on(interface))?;
            if let Some(difference) = tc::difference(&mut self.route, interface, guard.on(interface))? {
                return Err(CaptureError::DoesNotStand(difference));
            }
        }
        Ok(())
    }

    /// What is missing of a guard.
    fn misses(&mut self, guard: &Guard) -> Result<Option<String>, CaptureError> {
        let interfaces = interfaces(&mut self.route, &self.plan)?;
        if interfaces.is_empty() {
            return Ok(Some(CaptureError::NoInterface.to_string()));
        }
        for interface in interfaces.into_iter().chain([LOOPBACK]) {
            if let Some(difference) = tc::difference(&mut self.route, interface, guard.on(interface))? {
                return Ok(Some(difference));
            }
        }
        Ok(None)
    }

    fn load(&mut self, rules: Rules) -> Result<(), CaptureError> {
        // First, so that what could not be loaded is found missing. No generation yet: the first look must be a whole one.
        self.standing = Some(Expected { rules, generation: None });
        nft::replace(&mut self.netfilter, &rules.table(&self.plan))?;
        match self.verify()? {
            Standing::Intact => Ok(()),
            Standing::Broken(difference) => Err(CaptureError::DoesNotStand(difference)),
        }
    }
}

/// Whether rules or a guard of an agent stand in a namespace.
pub(crate) fn stands_in(namespace: &NetNs) -> Result<bool, CaptureError> {
    let open = || Ok::<_, CaptureError>((Socket::open(Protocol::Netfilter)?, Socket::open(Protocol::Route)?));
    let (mut netfilter, mut route) = namespace.enter(open)??;
    Ok(nft::read(&mut netfilter, rules::TABLE)?.is_some() || is_armed(&mut route)?)
}

/// Whether a guard stands, by its part that is the same for each pod. Others may have filters there, too.
fn is_armed(route: &mut Socket) -> Result<bool, CaptureError> {
    let inside = guard::inside().unwrap_or_default();
    Ok(tc::difference(route, LOOPBACK, &inside)?.is_none())
}

/// By how much a counter has grown since it was last asked. One that was taken away and made anew counts from 0 again.
fn growth(last: &mut u64, now: u64) -> u64 {
    let before = std::mem::replace(last, now);
    if now < before { now } else { now - before }
}

/// By which what the pod says leaves.
fn interfaces(route: &mut Socket, plan: &CapturePlan) -> Result<BTreeSet<u32>, netlink::Error> {
    let all = links::addresses(route)?.into_iter();
    Ok(all
        .filter(|(index, address)| *index != LOOPBACK && plan.addresses.contains(address))
        .map(|(index, _)| index)
        .collect())
}

/// Whether the namespace is the pod's: it has all of the pod's addresses (T26).
fn owns(namespace: &NetNs, plan: &CapturePlan) -> Result<(), CaptureError> {
    if plan.addresses.is_empty() {
        return Err(CaptureError::NoAddress);
    }
    let there = Links::of(namespace)?.addresses()?;
    match plan.addresses.iter().find(|address| !there.contains(address)) {
        Some(missing) => Err(CaptureError::NotItsAddress(*missing)),
        None => Ok(()),
    }
}
