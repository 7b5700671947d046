//! One node's discovery stream: what it asked for, at once and then as it changes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use tokio::select;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, info, warn};
use wire::discovery::{Asked, Kind};
use wire::server::{DiscoveryStream, Refused};

use crate::ca::token::{Caller, Role};
use crate::clock::Clock;
use crate::kubernetes::history::History;
use crate::metrics::Metrics;
use crate::nodes::Registered;
use crate::problem::quoted;
use crate::publication::{News, Publication, Reading};
use crate::server::Served;

/// The kinds that a process may have. An agent's are its own node's alone.
fn allowed(role: Role) -> &'static [Kind] {
    match role {
        Role::Agent => &[Kind::Bundle, Kind::NodePod],
        Role::Proxy => &[Kind::Address, Kind::Policy, Kind::Bundle, Kind::Settings, Kind::Heartbeat],
    }
}

/// Serves a stream until it ends.
pub(crate) async fn serve(served: &Served, caller: Caller, stream: DiscoveryStream) -> Result<(), Refused> {
    let Served { publication, nodes, metrics, clock, history, .. } = served;
    if let Some(because) = publication.withheld() {
        return Err(Refused::Unavailable(because));
    }
    let Some(registered) = nodes.register(&caller) else {
        let message = format!("the {} of node {} has too many discovery streams", caller.role.as_str(), caller.node);
        return Err(Refused::TooMany(message));
    };
    info!(node = caller.node, role = caller.role.as_str(), "discovery stream opened");
    let reading = publication.open(&caller);
    let mut subscriber = Subscriber {
        publication,
        reading,
        metrics,
        clock,
        registered,
        stream,
        caller,
        subscribed: BTreeSet::new(),
        beats: Beats::default(),
        counted: 0,
        history,
        checked: false,
    };
    let result = subscriber.run().await;
    let Caller { node, role } = subscriber.caller;
    info!(
        node,
        role = role.as_str(),
        refused = result.as_ref().err().map(tracing::field::display),
        "discovery stream closed"
    );
    result
}

/// Heartbeats of a stream.
#[derive(Default)]
struct Beats {
    /// When the last one was sent.
    last: Option<Instant>,
    /// When the next one is due: never before the last one was answered.
    next: Option<Instant>,
}

struct Subscriber<'a> {
    publication: &'a Publication,
    reading: Reading<'a>,
    metrics: &'a Metrics,
    clock: &'a Clock,
    registered: Registered,
    stream: DiscoveryStream,
    caller: Caller,
    /// The kinds that the node is told of.
    subscribed: BTreeSet<Kind>,
    beats: Beats,
    /// What of all that was told is in the metrics.
    counted: u64,
    history: &'a Option<History>,
    /// What the node was told before was looked at.
    checked: bool,
}

impl Subscriber<'_> {
    async fn run(&mut self) -> Result<(), Refused> {
        loop {
            let told = self.stream.told();
            self.metrics.told.inc_by(told - std::mem::replace(&mut self.counted, told));
            let due = self.beats.next;
            let asked = select! {
                asked = self.stream.next() => {
                    self.check_hello()?;
                    asked?
                }
                () = self.reading.mailbox().arrived() => {
                    self.tell_news().await;
                    continue;
                }
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    self.beat().await;
                    continue;
                }
            };
            if asked.is_some() {
                self.check_position().await?;
            }
            match asked {
                None => return Ok(()),
                Some(Asked::Subscribed(kind)) => self.subscribe(kind).await?,
                Some(Asked::Addresses { about, no_longer }) => self.answer(&about, &no_longer).await,
                Some(Asked::Accepted { kind, current }) => self.accepted(kind, current),
                Some(Asked::Refused { kind, detail }) => self.refused(kind, detail),
            }
        }
    }

    /// A process that takes itself for another node's is not served: it would be told what it has no use for. Whose it is, its
    /// token says.
    fn check_hello(&self) -> Result<(), Refused> {
        let (said, Caller { node, role }) = (self.stream.node(), &self.caller);
        let known = said
            .strip_prefix(&**node)
            .is_some_and(|rest| rest.is_empty() || rest.strip_prefix('/') == Some(role.as_str()));
        if said.is_empty() || known {
            return Ok(());
        }
        let whose = format!("the token is of the {} of node {node}", role.as_str());
        Err(Refused::NotAllowed(format!("{whose}, and the caller says that it is {}", quoted(said))))
    }

    async fn subscribe(&mut self, kind: Kind) -> Result<(), Refused> {
        if !allowed(self.caller.role).contains(&kind) {
            return Err(Refused::NotAllowed(format!("{kind} is not for the {} of a node", self.caller.role.as_str())));
        }
        if kind == Kind::Heartbeat {
            self.beat().await;
        } else {
            self.reconcile(kind).await;
        }
        Ok(())
    }

    /// The number of the last change, and the position of what is told from here on. What is read after it is at least as new, and
    /// being told twice does no harm.
    fn number(&mut self) -> u64 {
        self.stream.set_position(self.publication.changed());
        self.publication.number()
    }

    /// A replica that lacks what another one has told the node must not take it back (T10): who is refused asks again, and finds
    /// the other one, or this one when it knows. Where the API server itself does not know it any more, its history was set back.
    async fn check_position(&mut self) -> Result<(), Refused> {
        let Some(history) = self.history.as_ref().filter(|_| !std::mem::replace(&mut self.checked, true)) else {
            return Ok(());
        };
        let Some((kind, told, reached)) = self.publication.lacks(self.stream.position()) else { return Ok(()) };
        match history.present().await {
            Ok(present) if present < told => {
                warn!(
                    node = self.caller.node,
                    kind, told, present, "the API server's history was set back; what it has now counts"
                );
                Ok(())
            }
            present => {
                let cannot = present.err().map(|failure| format!(" ({failure})")).unwrap_or_default();
                Err(Refused::Unavailable(format!(
                    "this replica knows {kind} objects up to version {reached}, and the node was told of {told}{cannot}; ask another \
                     replica, or again in a moment"
                )))
            }
        }
    }

    /// Says that the control plane is there. All news that there is goes before: a heartbeat says that nothing is missing.
    async fn beat(&mut self) {
        self.tell_news().await;
        self.beats.next = None;
        if self.stream.beat(self.clock.now()).await {
            self.beats.last = Some(Instant::now());
        }
    }

    /// Tells everything of a kind that the node does not have.
    async fn reconcile(&mut self, kind: Kind) {
        let number = self.number();
        let all = self.reading.all(kind, self.stream.has(kind));
        let messages = self.stream.reconcile(kind, &all).await;
        self.told(kind, number, messages);
    }

    /// Says what has the addresses that the node asks about.
    async fn answer(&mut self, about: &[IpAddr], no_longer: &[IpAddr]) {
        // What it was told of before it asked comes before the answer.
        self.tell_news().await;
        let number = self.number();
        self.reading.forget(no_longer);
        let (found, nobody) = self.reading.ask(about);
        let (set, _) = self.reading.look(Kind::Address, &found);
        let mut messages = self.stream.update(Kind::Address, &set, []).await;
        messages += self.stream.nobody(nobody).await;
        self.told(Kind::Address, number, messages);
    }

    /// Tells what concerns the node and changed since it was last told.
    async fn tell_news(&mut self) {
        let number = self.number();
        let subscribed = self.subscribed.clone();
        let News::Of(news) = self.reading.mailbox().take() else {
            for kind in subscribed {
                self.reconcile(kind).await;
            }
            return;
        };
        let changes = |kind: &Kind| Some((*kind, self.reading.look(*kind, news.get(kind)?)));
        let all: BTreeMap<_, _> = subscribed.iter().filter_map(changes).collect();
        let mut messages: BTreeMap<Kind, usize> = BTreeMap::new();
        // A workload that names a policy comes after the policy, and goes before it: in between, the node would refuse
        // every connection to it.
        if let Some((set, _)) = all.get(&Kind::Policy) {
            *messages.entry(Kind::Policy).or_default() += self.stream.update(Kind::Policy, set, []).await;
        }
        for (kind, (set, gone)) in all.iter().filter(|(kind, _)| **kind != Kind::Policy) {
            *messages.entry(*kind).or_default() += self.stream.update(*kind, set, gone.iter().copied()).await;
        }
        if let Some((_, gone)) = all.get(&Kind::Policy) {
            *messages.entry(Kind::Policy).or_default() +=
                self.stream.update(Kind::Policy, [], gone.iter().copied()).await;
        }
        for kind in subscribed {
            self.told(kind, number, messages.get(&kind).copied().unwrap_or_default());
        }
    }

    /// Notes up to which change the node was told, in so many messages.
    fn told(&mut self, kind: Kind, number: u64, messages: usize) {
        self.subscribed.insert(kind);
        debug!(node = self.caller.node, kind = kind.as_str(), number, messages, "told");
        self.registered.note(kind, |progress| {
            // Where there was nothing to say and nothing is unanswered, nothing has to be waited for.
            if messages == 0 && progress.acknowledged == progress.sent {
                progress.acknowledged = number;
            }
            progress.sent = number;
        });
    }

    fn accepted(&mut self, kind: Kind, current: bool) {
        if kind == Kind::Heartbeat {
            self.beats.next = self.beats.last.map(|last| last + self.publication.heartbeat());
            self.registered.note(kind, |progress| progress.accepted += 1);
            return;
        }
        self.metrics.accepted.inc();
        self.registered.note(kind, |progress| {
            progress.accepted += 1;
            if current {
                progress.acknowledged = progress.sent;
                progress.refusal = None;
            }
        });
    }

    fn refused(&mut self, kind: Kind, detail: String) {
        warn!(
            node = self.caller.node,
            role = self.caller.role.as_str(),
            kind = kind.as_str(),
            detail,
            "a node refuses what it was told"
        );
        self.metrics.refused(kind);
        self.registered.note(kind, |progress| {
            progress.refused += 1;
            progress.refusal = Some(detail);
        });
    }
}
