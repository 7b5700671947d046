//! The proxies of the node: the one that serves, one that is about to take its place, and those that serve what they
//! have to its end.
//!
//! A proxy that comes while another one serves is its successor: it is given every pod, and when it is ready for all of
//! them the other is told to drain. So an upgrade refuses nobody, and neither does one that fails: a successor that goes
//! before it was ready changes nothing.

use std::collections::{BTreeSet, HashMap};
use std::os::fd::OwnedFd;
use std::time::Duration;

use mesh::PodUid;
use wire::pods::{FromAgent, Kept, VERSION};

use crate::proxy::{Link, Sender};

/// What the agent keeps for the next proxy, as the last one gave it. Descriptors, never read.
pub(crate) type Left = HashMap<Kept, OwnedFd>;

/// Their links.
#[derive(Debug, Default)]
pub(crate) struct Proxies {
    serving: Option<Serving>,
    next: Option<Next>,
    leaving: HashMap<u64, Link>,
    left: Left,
    /// How often nobody served when it was looked.
    alone: usize,
}

/// So often nobody serves before one that drains is called back. A proxy that died is started again before that.
const ALONE: usize = 2;

#[derive(Debug)]
struct Serving {
    number: u64,
    started: Duration,
    link: Link,
}

#[derive(Debug)]
struct Next {
    number: u64,
    started: Duration,
    link: Link,
    missing: BTreeSet<PodUid>,
    ready: BTreeSet<PodUid>,
    left: Left,
}

/// What a change of the links comes to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// It changes nothing for the pods.
    Nothing,
    /// Nobody serves any more.
    Lost,
    /// The successor serves now, and is ready for these pods.
    Succeeded(BTreeSet<PodUid>),
}

impl Proxies {
    /// A proxy came, and no other one serves.
    pub(crate) fn is_free(&self) -> bool {
        self.serving.is_none()
    }

    /// It serves.
    pub(crate) fn serve(&mut self, number: u64, link: Link, started: Duration) {
        self.serving = Some(Serving { number, started, link });
    }

    /// Whether a proxy that started then is older than the one that serves: it is not its successor, but the one before.
    pub(crate) fn is_older(&self, started: Duration) -> bool {
        self.serving.as_ref().is_some_and(|serving| started < serving.started)
    }

    /// It serves what it has to its end, and gets sockets for that.
    pub(crate) fn drain(&mut self, number: u64, link: Link) {
        // One that does not read is not worth waiting for.
        if link.send(&FromAgent::Drain, Vec::new()) {
            self.leaving.insert(number, link);
        }
    }

    /// It drained already, and had another agent.
    pub(crate) fn rejoin(&mut self, number: u64, link: Link) {
        if link.send(&FromAgent::Hello { version: VERSION, kept: Vec::new() }, Vec::new()) {
            self.leaving.insert(number, link);
        }
    }

    /// A look, now and then, whether somebody serves. Where nobody does for some of them, as after an upgrade that was taken back,
    /// those that drain are told so: whether one was is returned.
    pub(crate) fn call_back(&mut self) -> bool {
        self.alone = if self.serving.is_some() || self.next.is_some() { 0 } else { self.alone.saturating_add(1) };
        let told = |link: &Link| link.send(&FromAgent::Needed, Vec::new());
        self.alone == ALONE && self.leaving.values().filter(|link| told(link)).count() > 0
    }

    /// It is to take the other's place, once it is ready for these pods.
    ///
    /// # Errors
    /// Another one is about to; the link is closed, with that word.
    pub(crate) fn prepare(
        &mut self,
        number: u64,
        link: Link,
        started: Duration,
        missing: BTreeSet<PodUid>,
    ) -> Result<(), ()> {
        if self.next.is_some() {
            link.send(&FromAgent::Refused("another proxy is about to take over".into()), Vec::new());
            return Err(());
        }
        self.next = Some(Next { number, started, link, missing, ready: BTreeSet::new(), left: Left::new() });
        Ok(())
    }

    /// The successor is ready for a pod.
    pub(crate) fn ready(&mut self, number: u64, pod: &PodUid) -> Change {
        let Some(next) = self.next.as_mut().filter(|next| next.number == number) else { return Change::Nothing };
        next.missing.remove(pod);
        next.ready.insert(pod.clone());
        self.succeed()
    }

    /// A pod is gone.
    pub(crate) fn forget(&mut self, pod: &PodUid) -> Change {
        let Some(next) = &mut self.next else { return Change::Nothing };
        next.missing.remove(pod);
        next.ready.remove(pod);
        self.succeed()
    }

    /// Lets the successor serve, if it is ready.
    pub(crate) fn succeed(&mut self) -> Change {
        let ready = |next: &Next| next.missing.is_empty() || self.serving.is_none();
        let Some(next) = self.next.take_if(|next| ready(next)) else { return Change::Nothing };
        let serving = Serving { number: next.number, started: next.started, link: next.link };
        if let Some(before) = self.serving.replace(serving) {
            self.drain(before.number, before.link);
        }
        self.left.extend(next.left);
        Change::Succeeded(next.ready)
    }

    /// A link ended.
    pub(crate) fn gone(&mut self, number: u64) -> Change {
        self.leaving.remove(&number);
        self.next.take_if(|next| next.number == number);
        match self.serving.take_if(|serving| serving.number == number) {
            Some(_) => self.lost(),
            None => Change::Nothing,
        }
    }

    /// A proxy accepts no more.
    pub(crate) fn leaving(&mut self, number: u64) -> Change {
        let Some(before) = self.serving.take_if(|serving| serving.number == number) else {
            return Change::Nothing;
        };
        self.leaving.insert(number, before.link);
        self.lost()
    }

    fn lost(&mut self) -> Change {
        match self.succeed() {
            Change::Nothing => Change::Lost,
            change => change,
        }
    }

    /// Keeps a file that a proxy gave. That of a successor counts when it serves.
    pub(crate) fn keep(&mut self, number: u64, what: Kept, file: OwnedFd) {
        if self.is_serving(number) {
            self.left.insert(what, file);
        } else if let Some(next) = self.next.as_mut().filter(|next| next.number == number) {
            next.left.insert(what, file);
        }
    }

    /// Keeps what another agent kept.
    pub(crate) fn inherit(&mut self, what: Kept, file: OwnedFd) {
        self.left.insert(what, file);
    }

    /// Duplicates of what is kept.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub(crate) fn left(&self) -> std::io::Result<Vec<(Kept, OwnedFd)>> {
        self.left.iter().map(|(what, file)| Ok((*what, file.try_clone()?))).collect()
    }

    /// Whether this link is of the proxy that serves.
    pub(crate) fn is_serving(&self, number: u64) -> bool {
        self.serving.as_ref().is_some_and(|serving| serving.number == number)
    }

    /// The links of those that are to know of every pod, the one that serves first.
    pub(crate) fn all(&self) -> impl Iterator<Item = (u64, &Link)> {
        let serving = self.serving.iter().map(|serving| (serving.number, &serving.link));
        serving.chain(self.next.iter().map(|next| (next.number, &next.link)))
    }

    /// The links of those that have sockets of pods.
    pub(crate) fn holders(&self) -> impl Iterator<Item = (u64, &Link)> {
        self.all().chain(self.leaving.iter().map(|(number, link)| (*number, link)))
    }

    /// The way to one of them.
    pub(crate) fn sender(&self, number: u64) -> Option<Sender> {
        self.holders().find(|(other, _)| *other == number).map(|(_, link)| link.sender())
    }

    /// The successor must be ready for one more pod.
    pub(crate) fn expect(&mut self, pod: &PodUid) {
        if let Some(next) = &mut self.next {
            next.missing.insert(pod.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::testing::link;

    fn pods(names: &[&str]) -> BTreeSet<PodUid> {
        names.iter().map(|name| PodUid::from(*name)).collect()
    }

    #[test]
    fn who_drains_is_called_back_once_where_nobody_serves_for_a_while() {
        let mut proxies = Proxies::default();
        let (old, mut hears) = link();
        proxies.rejoin(1, old);
        assert_eq!(hears.next(), Some(FromAgent::Hello { version: VERSION, kept: Vec::new() }));
        assert!(proxies.is_free() && proxies.sender(1).is_some(), "it gets sockets, and serves nobody");
        for _ in 1..ALONE {
            assert!(!proxies.call_back(), "one that died is started again meanwhile");
        }
        let (new, _new_hears) = link();
        proxies.serve(2, new, Duration::from_secs(2));
        assert!(!proxies.call_back() && hears.next().is_none());
        assert_eq!(proxies.gone(2), Change::Lost);
        let told: Vec<_> = (0..2 * ALONE).map(|_| proxies.call_back()).collect();
        assert_eq!(told.iter().position(|told| *told), Some(ALONE - 1));
        assert_eq!((hears.next(), hears.next()), (Some(FromAgent::Needed), None));
    }

    #[test]
    fn a_successor_serves_when_it_is_ready_for_every_pod_and_the_other_is_told_to_drain() {
        let mut proxies = Proxies::default();
        let (old, mut old_hears) = link();
        let (new, _new_hears) = link();
        proxies.serve(1, old, Duration::from_secs(1));
        proxies.prepare(2, new, Duration::from_secs(2), pods(&["a", "b"])).unwrap();
        assert_eq!(proxies.ready(2, &PodUid::from("a")), Change::Nothing);
        assert_eq!(proxies.ready(1, &PodUid::from("b")), Change::Nothing, "the other one is not asked");
        assert!(proxies.is_serving(1) && old_hears.next().is_none());
        assert_eq!(proxies.ready(2, &PodUid::from("b")), Change::Succeeded(pods(&["a", "b"])));
        assert!(proxies.is_serving(2));
        assert_eq!(old_hears.next(), Some(FromAgent::Drain));
        assert!(proxies.sender(1).is_some(), "it still gets sockets");
        assert_eq!(proxies.gone(1), Change::Nothing);
        assert_eq!(proxies.gone(2), Change::Lost);
    }

    #[test]
    fn an_older_proxy_is_no_successor_and_drains_at_once() {
        let mut proxies = Proxies::default();
        assert!(!proxies.is_older(Duration::ZERO), "nobody serves");
        let (new, mut new_hears) = link();
        let (old, mut old_hears) = link();
        proxies.serve(2, new, Duration::from_secs(2));
        assert!(proxies.is_older(Duration::from_secs(1)) && !proxies.is_older(Duration::from_secs(3)));
        proxies.drain(1, old);
        assert_eq!((old_hears.next(), new_hears.next()), (Some(FromAgent::Drain), None));
        assert!(proxies.is_serving(2) && proxies.sender(1).is_some(), "it still gets sockets");
        assert_eq!(proxies.gone(1), Change::Nothing);
    }

    #[test]
    fn a_successor_that_goes_changes_nothing_and_a_second_one_is_refused_by_name() {
        let mut proxies = Proxies::default();
        let (old, _a) = link();
        let (new, _b) = link();
        let (third, mut third_hears) = link();
        proxies.serve(1, old, Duration::from_secs(1));
        proxies.prepare(2, new, Duration::from_secs(2), pods(&["a"])).unwrap();
        assert!(proxies.prepare(3, third, Duration::from_secs(3), pods(&["a"])).is_err());
        assert!(matches!(third_hears.next(), Some(FromAgent::Refused(why)) if why.contains("about to take over")));
        assert_eq!(proxies.gone(2), Change::Nothing);
        assert!(proxies.is_serving(1));
    }

    #[test]
    fn a_successor_serves_at_once_when_the_other_dies_or_its_last_pod_goes() {
        for leaves in [true, false] {
            let mut proxies = Proxies::default();
            let (old, _a) = link();
            let (new, _b) = link();
            proxies.serve(1, old, Duration::from_secs(1));
            proxies.prepare(2, new, Duration::from_secs(2), pods(&["a"])).unwrap();
            let change = if leaves { proxies.leaving(1) } else { proxies.gone(1) };
            assert_eq!(change, Change::Succeeded(pods(&[])));
            assert!(proxies.is_serving(2));
        }
        let mut proxies = Proxies::default();
        let (old, _a) = link();
        let (new, _b) = link();
        proxies.serve(1, old, Duration::from_secs(1));
        proxies.prepare(2, new, Duration::from_secs(2), pods(&["a"])).unwrap();
        assert_eq!(proxies.forget(&PodUid::from("a")), Change::Succeeded(pods(&[])));
    }

    #[test]
    fn what_a_successor_gives_counts_when_it_serves() {
        let file = |content: &[u8]| linux::sealed::seal("test", content).unwrap();
        let kept = |proxies: &Proxies| linux::sealed::read(&proxies.left().unwrap()[0].1, 9).unwrap();
        let mut proxies = Proxies::default();
        let (old, _a) = link();
        let (new, _b) = link();
        proxies.serve(1, old, Duration::from_secs(1));
        proxies.keep(1, Kept::View, file(b"old"));
        proxies.prepare(2, new, Duration::from_secs(2), pods(&["a"])).unwrap();
        proxies.keep(2, Kept::View, file(b"new"));
        assert_eq!(kept(&proxies), b"old");
        proxies.gone(1);
        assert_eq!(kept(&proxies), b"new");
        proxies.gone(2);
        assert_eq!(kept(&proxies), b"new", "for the next one");
    }
}
