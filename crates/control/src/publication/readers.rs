//! Who reads: one for each discovery stream, with what it was told of and what it waits for, so that a change costs its
//! readers and nobody else (T31).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use wire::discovery::Kind;

use super::places::Name;
use crate::ca::token::{Caller, Role};

/// News that may wait for one reader. One that is further behind than that looks at everything.
const MAX_NEWS: usize = 16 * 1024;

/// Addresses that nothing has, and that one reader may wait for. A proxy keeps to a quarter of it.
const MAX_WAITING: usize = 4 * 1024;

/// What may be different since a reader last looked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum News {
    /// These resources, by kind.
    Of(BTreeMap<Kind, BTreeSet<Name>>),
    /// Anything.
    Everything,
}

/// Where news wait for their reader.
#[derive(Debug)]
pub(crate) struct Mailbox {
    news: Mutex<News>,
    arrived: Notify,
}

impl Mailbox {
    /// Waits until there may be news. Cancel safe.
    pub(crate) async fn arrived(&self) {
        self.arrived.notified().await;
    }

    /// Takes out what is there.
    pub(crate) fn take(&self) -> News {
        std::mem::replace(&mut *self.lock(), News::Of(BTreeMap::new()))
    }

    /// Adds news, all in one step: who is told of a workload is told of its policies first.
    fn post(&self, posted: News) {
        {
            let mut news = self.lock();
            match (&mut *news, posted) {
                (News::Everything, _) => {}
                (news, News::Everything) => *news = News::Everything,
                (News::Of(waiting), News::Of(posted)) => {
                    for (kind, names) in posted {
                        waiting.entry(kind).or_default().extend(names);
                    }
                    if waiting.values().map(BTreeSet::len).sum::<usize>() > MAX_NEWS {
                        *news = News::Everything;
                    }
                }
            }
        }
        self.arrived.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, News> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct Reader {
    node: Name,
    role: Role,
    mailbox: Arc<Mailbox>,
    /// Workloads and Services that it was told of: it hears of each of their changes until they are gone.
    told: BTreeSet<Name>,
    /// Addresses that it asked about, and that nothing has.
    waiting: BTreeSet<IpAddr>,
}

/// All readers, and who of them is concerned by what.
#[derive(Default, Debug)]
pub(super) struct Readers {
    last_id: u64,
    readers: BTreeMap<u64, Reader>,
    by_node: HashMap<Name, BTreeSet<u64>>,
    told: HashMap<Name, BTreeSet<u64>>,
    waiting: HashMap<IpAddr, BTreeSet<u64>>,
}

impl Readers {
    pub(super) fn open(&mut self, caller: &Caller) -> (u64, Arc<Mailbox>) {
        self.last_id += 1;
        let mailbox = Arc::new(Mailbox { news: Mutex::new(News::Of(BTreeMap::new())), arrived: Notify::new() });
        let node: Name = caller.node.as_str().into();
        self.by_node.entry(node.clone()).or_default().insert(self.last_id);
        let reader = Reader {
            node,
            role: caller.role,
            mailbox: mailbox.clone(),
            told: BTreeSet::new(),
            waiting: BTreeSet::new(),
        };
        self.readers.insert(self.last_id, reader);
        (self.last_id, mailbox)
    }

    pub(super) fn close(&mut self, id: u64) {
        let Some(reader) = self.readers.remove(&id) else { return };
        take(&mut self.by_node, &reader.node, id);
        reader.told.iter().for_each(|name| take(&mut self.told, name, id));
        reader.waiting.iter().for_each(|address| take(&mut self.waiting, address, id));
    }

    /// Notes that a reader is told of a workload or Service, or that it is gone.
    pub(super) fn note(&mut self, id: u64, name: &Name, there: bool) {
        let Some(reader) = self.readers.get_mut(&id) else { return };
        if there && reader.told.insert(name.clone()) {
            self.told.entry(name.clone()).or_default().insert(id);
        } else if !there && reader.told.remove(name) {
            take(&mut self.told, name, id);
        }
    }

    /// Notes that a reader waits for an address. Whether it may: one waits for a bounded number.
    pub(super) fn wait(&mut self, id: u64, address: IpAddr) -> bool {
        let Some(reader) = self.readers.get_mut(&id) else { return false };
        if reader.waiting.len() >= MAX_WAITING && !reader.waiting.contains(&address) {
            return false;
        }
        reader.waiting.insert(address);
        self.waiting.entry(address).or_default().insert(id);
        true
    }

    /// Notes that a reader waits for an address no longer.
    pub(super) fn forget(&mut self, id: u64, address: IpAddr) {
        if self.readers.get_mut(&id).is_some_and(|reader| reader.waiting.remove(&address)) {
            take(&mut self.waiting, &address, id);
        }
    }

    /// Takes out those who wait for an address: something has it now, and of that they hear from here on.
    pub(super) fn served(&mut self, address: IpAddr) -> BTreeSet<u64> {
        let ids = self.waiting.remove(&address).unwrap_or_default();
        for id in &ids {
            if let Some(reader) = self.readers.get_mut(id) {
                reader.waiting.remove(&address);
            }
        }
        ids
    }

    /// Those who were told of a workload or Service.
    pub(super) fn of(&self, name: &str) -> impl Iterator<Item = u64> {
        self.told.get(name).into_iter().flatten().copied()
    }

    /// The streams of one process of a node.
    pub(super) fn on_node(&self, node: &str, role: Role) -> impl Iterator<Item = u64> {
        let ids = self.by_node.get(node).into_iter().flatten().copied();
        ids.filter(move |id| self.readers.get(id).is_some_and(|reader| reader.role == role))
    }

    /// The streams of every node's process.
    pub(super) fn all(&self, role: Role) -> impl Iterator<Item = u64> {
        self.readers.iter().filter(move |(_, reader)| reader.role == role).map(|(id, _)| *id)
    }

    pub(super) fn node(&self, id: u64) -> Option<Name> {
        self.readers.get(&id).map(|reader| reader.node.clone())
    }

    pub(super) fn post(&self, id: u64, news: News) {
        if let Some(reader) = self.readers.get(&id) {
            reader.mailbox.post(news);
        }
    }
}

fn take<K: std::hash::Hash + Eq>(map: &mut HashMap<K, BTreeSet<u64>>, key: &K, id: u64) {
    if let Some(ids) = map.get_mut(key) {
        ids.remove(&id);
        if ids.is_empty() {
            map.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(readers: &mut Readers, node: &str) -> (u64, Arc<Mailbox>) {
        readers.open(&Caller { role: Role::Proxy, node: node.to_owned() })
    }

    fn named(number: usize) -> News {
        News::Of(BTreeMap::from([(Kind::Address, BTreeSet::from([number.to_string().into()]))]))
    }

    #[test]
    fn news_that_nobody_takes_are_bounded_and_then_everything() {
        let mut readers = Readers::default();
        let (id, mailbox) = open(&mut readers, "node-a");
        for number in 0..MAX_NEWS {
            readers.post(id, named(number));
            readers.post(id, named(number));
        }
        let News::Of(news) = mailbox.take() else { panic!("too early") };
        assert_eq!(news[&Kind::Address].len(), MAX_NEWS);
        (0..=MAX_NEWS).for_each(|number| readers.post(id, named(number)));
        readers.post(id, named(7));
        assert_eq!((mailbox.take(), mailbox.take()), (News::Everything, News::Of(BTreeMap::new())));
    }

    #[test]
    fn a_reader_waits_for_a_bounded_number_of_addresses_and_leaves_nothing_behind() {
        let mut readers = Readers::default();
        let (id, _mailbox) = open(&mut readers, "node-a");
        let (other, _mailbox) = open(&mut readers, "node-a");
        let address = |number: usize| IpAddr::from((number as u128).to_be_bytes());
        assert!((0..MAX_WAITING).all(|number| readers.wait(id, address(number))));
        assert!(readers.wait(id, address(0)), "it waits for that already");
        assert!(!readers.wait(id, address(MAX_WAITING)) && readers.wait(other, address(0)));
        readers.forget(id, address(1));
        assert!(readers.wait(id, address(MAX_WAITING)));
        assert_eq!(readers.served(address(0)), BTreeSet::from([id, other]));
        assert_eq!(readers.served(address(1)), BTreeSet::new());
        readers.note(id, &"web".into(), true);
        readers.note(other, &"web".into(), true);
        readers.note(other, &"web".into(), false);
        assert_eq!(readers.of("web").collect::<Vec<_>>(), [id]);
        readers.close(id);
        readers.close(other);
        assert!(readers.readers.is_empty() && readers.by_node.is_empty());
        assert!(readers.told.is_empty() && readers.waiting.is_empty());
    }
}
