//! Who may have how many of the connections that this process has room for (T18).
//!
//! Whoever opens a connection pays for it: a pod of the mesh by whatever address it comes from, and anybody else by that
//! address. So what others open towards a pod takes nothing from what the pod opens itself. Each account may hold at most
//! [`SHARE`] times what is still free, which adapts by itself: one alone gets four fifths, two that grow together get four ninths each, and there
//! is always something left for whoever comes next. The last of the room is for those of the mesh who have little.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh::{AddressClass, PodUid, View};

use crate::budgets::Budget;

/// How many times what is free one account may hold.
const SHARE: usize = 4;

/// The part of the room that only payers of the mesh with fewer than [`LITTLE`] connections may take.
const KEPT_BACK: usize = 16;

/// Up to how many connections a payer of the mesh has little.
const LITTLE: usize = 32;

/// Who opens a connection.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Payer {
    /// A pod, captured or not.
    Pod(PodUid),
    /// A node, from where probes come, or another address that the view knows and that is no pod's.
    Known(IpAddr),
    /// Anybody else. Of IPv6 the network (RFC 4291, section 2.5.4): whoever has one address has all of it.
    Stranger(IpAddr),
}

impl Payer {
    /// Whoever has an address.
    pub(crate) fn at(view: &View, address: IpAddr) -> Self {
        match view.workload_at(address) {
            Some(workload) if workload.pod_uid.as_str().is_empty() => return Self::Known(address),
            Some(workload) => return Self::Pod(workload.pod_uid.clone()),
            None => {}
        }
        if view.settings().map(|settings| settings.classify(address)) == Some(AddressClass::Node) {
            return Self::Known(address);
        }
        Self::Stranger(match address {
            IpAddr::V4(_) => address,
            IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)).into(),
        })
    }

    /// Who has a turn of its own. Strangers choose their addresses, and have one together.
    pub(crate) fn in_turn(self) -> Self {
        match self {
            Self::Stranger(_) => Self::Stranger(Ipv6Addr::UNSPECIFIED.into()),
            known => known,
        }
    }

    /// Whether the view knows it. There are only so many of these, while strangers choose their addresses.
    pub(crate) fn is_known(&self) -> bool {
        !matches!(self, Self::Stranger(_))
    }
}

/// The accounts of the process.
#[derive(Clone, Debug)]
pub(crate) struct Shares(Arc<Mutex<Accounts>>);

#[derive(Debug)]
struct Accounts {
    room: usize,
    taken: usize,
    /// What all strangers have together: one account, however many they are.
    of_strangers: usize,
    by_payer: HashMap<Payer, usize>,
    /// What others have opened towards each pod of this node.
    towards: HashMap<PodUid, usize>,
}

/// Room for one connection; dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Share {
    payer: Payer,
    towards: Option<PodUid>,
    shares: Shares,
}

impl Shares {
    /// Accounts of a process that has room for so many connections.
    pub(crate) fn new(room: usize) -> Self {
        let (by_payer, towards) = (HashMap::new(), HashMap::new());
        Self(Arc::new(Mutex::new(Accounts { room, taken: 0, of_strangers: 0, by_payer, towards })))
    }

    /// There is room for so many from now on. Who has more keeps it.
    pub(crate) fn set_room(&self, room: usize) {
        self.lock().room = room;
    }

    /// Takes room for a connection that `payer` opens: towards a pod of this node, or out of one.
    ///
    /// # Errors
    /// The account that has its share already.
    pub(crate) fn take(&self, payer: Payer, towards: Option<PodUid>) -> Result<Share, Budget> {
        self.lock().take(&payer, towards.as_ref())?;
        Ok(Share { payer, towards, shares: self.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, Accounts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Accounts {
    fn take(&mut self, payer: &Payer, towards: Option<&PodUid>) -> Result<(), Budget> {
        let of_payer = self.by_payer.get(payer).copied().unwrap_or(0);
        let has_little = payer.is_known() && of_payer < LITTLE && self.taken < self.room;
        if !has_little {
            let free = (self.room - self.room / KEPT_BACK).saturating_sub(self.taken);
            let most = SHARE * free;
            let of_pod = towards.and_then(|pod| self.towards.get(pod)).copied().unwrap_or(0);
            if of_payer >= most {
                return Err(Budget::Source);
            }
            if of_pod >= most {
                return Err(Budget::Towards);
            }
            if !payer.is_known() && self.of_strangers >= most {
                return Err(Budget::Strangers);
            }
        }
        self.taken += 1;
        self.of_strangers += usize::from(!payer.is_known());
        *self.by_payer.entry(payer.clone()).or_default() += 1;
        if let Some(pod) = towards {
            *self.towards.entry(pod.clone()).or_default() += 1;
        }
        Ok(())
    }

    fn give_back(&mut self, payer: &Payer, towards: Option<&PodUid>) {
        self.taken -= 1;
        self.of_strangers -= usize::from(!payer.is_known());
        decrease(&mut self.by_payer, payer);
        if let Some(pod) = towards {
            decrease(&mut self.towards, pod);
        }
    }
}

/// Strangers choose their addresses: an entry without a connection would be a leak that they control.
fn decrease<K: Eq + Hash>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.shares.lock().give_back(&self.payer, self.towards.as_ref());
    }
}

#[cfg(test)]
mod tests {
    use mesh::Resource;
    use proptest::prelude::*;

    use super::*;
    use crate::tests::world::{id, workload};

    const ROOM: usize = 1600;

    fn uid(number: usize) -> PodUid {
        PodUid::from(format!("pod-{number}").as_str())
    }

    fn pod(number: usize) -> Payer {
        Payer::Pod(uid(number))
    }

    fn stranger(number: usize) -> Payer {
        Payer::Stranger(IpAddr::from((0xcb00_7100_u32 + number as u32).to_be_bytes()))
    }

    /// As many as it gets.
    fn all(shares: &Shares, payer: &Payer, towards: Option<usize>) -> Vec<Share> {
        std::iter::from_fn(|| shares.take(payer.clone(), towards.map(uid)).ok()).collect()
    }

    #[test]
    fn what_others_open_towards_a_pod_takes_nothing_that_it_opens_itself() {
        let shares = Shares::new(ROOM);
        // Neighbours on the same node: each of their connections is one out of them, and one into the besieged pod.
        let mut held = Vec::new();
        for hostile in 1..=3 {
            loop {
                let Ok(out) = shares.take(pod(hostile), None) else { break };
                let Ok(into) = shares.take(pod(hostile), Some(uid(0))) else { break };
                held.push((out, into));
            }
        }
        assert!(held.len() > ROOM / 4, "{}", held.len());
        let own: Vec<_> = (0..LITTLE).map(|_| shares.take(pod(0), None)).collect();
        assert!(own.iter().all(Result::is_ok), "{own:?}");
        assert!(shares.take(pod(1), Some(uid(0))).is_err());
    }

    #[test]
    fn one_alone_gets_most_and_leaves_as_much_as_it_needs_to_the_next() {
        let shares = Shares::new(ROOM);
        let first = all(&shares, &pod(1), None);
        assert_eq!(first.len(), ROOM * 15 / 16 * 4 / 5);
        assert_eq!(shares.take(pod(1), None).unwrap_err(), Budget::Source);
        let second = all(&shares, &pod(2), Some(3));
        assert!(second.len() >= ROOM / 8, "{}", second.len());
        drop(first);
        assert!(all(&shares, &pod(2), Some(3)).len() + second.len() >= ROOM * 15 / 16 * 4 / 5);
    }

    #[test]
    fn strangers_however_many_are_one_account_and_take_nothing_of_what_is_kept_back() {
        let shares = Shares::new(ROOM);
        let held: Vec<_> = (0..2 * ROOM).map_while(|number| shares.take(stranger(number), Some(uid(0))).ok()).collect();
        assert_eq!(held.len(), ROOM * 15 / 16 * 4 / 5);
        // To another pod, so that it is not the pod's account.
        assert_eq!(shares.take(stranger(2 * ROOM), Some(uid(1))).unwrap_err(), Budget::Strangers);
        let probes = Payer::Known(IpAddr::from([10, 0, 0, 1]));
        let of_probes: Vec<_> = (0..LITTLE).map(|_| shares.take(probes.clone(), Some(uid(0)))).collect();
        assert!(of_probes.iter().all(Result::is_ok), "{of_probes:?}");
    }

    #[test]
    fn a_pod_is_one_payer_by_all_of_its_addresses_and_a_network_of_ipv6_is_one_stranger() {
        let mut view = View::default();
        let mut workload = workload("pod-1", &id("a/sa/b"), "10.0.0.1".parse().unwrap());
        workload.addresses.push("fd00::1".parse().unwrap());
        view.apply(Resource::Workload(Box::new(workload)));
        let at = |address: &str| Payer::at(&view, address.parse().unwrap());
        assert_eq!((at("10.0.0.1"), at("fd00::1")), (pod(1), pod(1)));
        assert!(!at("10.0.0.2").is_known());
        assert_eq!(at("2001:db8::1"), at("2001:db8::ffff:ffff:ffff:ffff"));
        assert_ne!(at("2001:db8::1"), at("2001:db8:0:1::1"));
        assert_ne!(at("203.0.113.1"), at("203.0.113.2"));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Take(usize, Option<usize>),
        Drop(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        let take = (0_usize..8, prop::option::of(0_usize..2)).prop_map(|(payer, towards)| Step::Take(payer, towards));
        prop_oneof![4 => take, 1 => any::<usize>().prop_map(Step::Drop)]
    }

    /// What the rule says, counted anew each time from a list of what is open.
    fn may(open: &[(Payer, Option<usize>)], room: usize, payer: &Payer, towards: Option<usize>) -> bool {
        let known = payer.is_known();
        let own = open.iter().filter(|(other, _)| other == payer).count();
        if known && own < LITTLE && open.len() < room {
            return true;
        }
        let free = (room - room / KEPT_BACK).saturating_sub(open.len());
        let pod = open.iter().filter(|(_, other)| towards.is_some() && *other == towards).count();
        let strangers = open.iter().filter(|(other, _)| !known && !other.is_known()).count();
        [own, pod, strangers].iter().all(|held| *held < SHARE * free)
    }

    proptest! {
        #[test]
        fn it_does_what_the_rule_says_and_never_more_than_there_is_room(
            room in 0_usize..300,
            steps in prop::collection::vec(step(), 0..800),
        ) {
            let shares = Shares::new(room);
            let (mut model, mut held) = (Vec::new(), Vec::new());
            for step in steps {
                match step {
                    Step::Take(number, towards) => {
                        let payer = if number < 5 { pod(number) } else { stranger(number) };
                        let expected = may(&model, room, &payer, towards);
                        let taken = shares.take(payer.clone(), towards.map(uid));
                        prop_assert_eq!(taken.is_ok(), expected);
                        if let Ok(share) = taken {
                            model.push((payer, towards));
                            held.push(share);
                        }
                    }
                    Step::Drop(which) if !held.is_empty() => {
                        let which = which % held.len();
                        model.swap_remove(which);
                        drop(held.swap_remove(which));
                    }
                    Step::Drop(_) => {}
                }
                prop_assert!(held.len() <= room);
            }
            drop(held);
            let accounts = shares.lock();
            prop_assert_eq!((accounts.taken, accounts.of_strangers), (0, 0));
            prop_assert!(accounts.by_payer.is_empty() && accounts.towards.is_empty(), "nobody is remembered");
        }
    }
}
