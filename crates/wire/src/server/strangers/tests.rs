//! The bookkeeping, by cases and against a slow model.

use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::*;

const BOUNDS: Bounds = Bounds { nodes: 3, strangers: 12, strangers_of_source: 8, patience: Duration::from_secs(10) };

fn address(last: u8) -> IpAddr {
    Ipv4Addr::new(10, 0, 0, last).into()
}

/// Books whose times are seconds, and whose connections are named by what they are told to end.
struct Bed {
    books: Strangers<Id>,
    start: Instant,
    names: Id,
}

impl Bed {
    fn new(bounds: Bounds) -> Self {
        Self { books: Strangers::new(bounds), start: Instant::now(), names: 0 }
    }

    fn at(&self, second: u64) -> Instant {
        self.start + Duration::from_secs(second)
    }

    /// The name of the newcomer is its number; which one went for it, and why.
    fn admit(&mut self, last: u8) -> Result<Option<(Id, TurnedAway)>, TurnedAway> {
        let admitted = self.books.admit(address(last), self.start, self.names)?;
        assert_eq!(admitted.id, self.names);
        self.names += 1;
        Ok(admitted.ended)
    }

    fn admit_all(&mut self, last: u8, count: usize) -> Vec<Id> {
        let first = self.names;
        (0..count).for_each(|_| assert_eq!(self.admit(last), Ok(None)));
        (first..self.names).collect()
    }
}

#[test]
fn a_source_that_has_its_share_ends_its_own_and_the_one_that_waited_longest() {
    let mut bed = Bed::new(BOUNDS);
    bed.admit_all(1, 1);
    let flood = bed.admit_all(2, 8);
    assert_eq!(bed.admit(2), Ok(Some((flood[0], TurnedAway::TooManyOfSource))));
    assert_eq!(bed.admit(2), Ok(Some((flood[1], TurnedAway::TooManyOfSource))));
    assert_eq!(bed.admit(1), Ok(None));
}

#[test]
fn where_all_places_are_taken_the_source_that_has_most_ends_one() {
    let mut bed = Bed::new(BOUNDS);
    let few = bed.admit_all(1, 4);
    let many = bed.admit_all(2, 8);
    for (newcomer, ended) in [3, 4, 1].into_iter().zip(&many) {
        assert_eq!(bed.admit(newcomer), Ok(Some((*ended, TurnedAway::TooMany))));
    }
    // The flood has 5 by now, and 10.0.0.1 has 5: of the two, the higher address.
    assert_eq!(bed.admit(5), Ok(Some((many[3], TurnedAway::TooMany))));
    assert_eq!(bed.admit(5), Ok(Some((few[0], TurnedAway::TooMany))));
    assert_eq!(bed.admit(6), Err(TurnedAway::TooMany), "nobody has more than a node needs");
}

#[test]
fn ipv4_as_a_part_of_ipv6_is_the_same_source() {
    let mut bed = Bed::new(BOUNDS);
    bed.admit_all(1, 8);
    let mapped = IpAddr::V6(Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped());
    let admitted = bed.books.admit(mapped, bed.start, 100).unwrap();
    assert_eq!(admitted.ended, Some((0, TurnedAway::TooManyOfSource)));
}

#[test]
fn a_token_that_is_looked_up_keeps_its_connection() {
    let mut bed = Bed::new(BOUNDS);
    let flood = bed.admit_all(1, 8);
    for id in &flood[..7] {
        assert!(bed.books.review_begins(*id, bed.at(1)));
    }
    assert_eq!(bed.admit(1), Ok(Some((flood[7], TurnedAway::TooManyOfSource))));
    let newest = bed.names - 1;
    assert!(bed.books.review_begins(newest, bed.at(1)));
    assert_eq!(bed.admit(1), Err(TurnedAway::TooManyOfSource), "all of them have done what they can");
    assert!(!bed.books.overdue(flood[0], bed.at(100)));
    bed.books.review_ends(flood[0]);
    assert!(bed.books.overdue(flood[0], bed.at(100)));
}

#[test]
fn two_reviews_of_a_connection_end_with_the_last_and_late_ones_do_not_count() {
    let mut bed = Bed::new(BOUNDS);
    let id = bed.admit_all(1, 1)[0];
    assert!(bed.books.review_begins(id, bed.at(9)));
    assert!(bed.books.review_begins(id, bed.at(9)));
    assert!(!bed.books.review_begins(id, bed.at(10)), "it would go on for ever");
    bed.books.review_ends(id);
    assert!(!bed.books.overdue(id, bed.at(20)));
    bed.books.review_ends(id);
    assert!(bed.books.overdue(id, bed.at(20)));
    assert!(!bed.books.overdue(id, bed.at(20)), "it is ended once");
}

#[test]
fn a_node_has_left_the_strangers_and_nothing_ends_it() {
    let mut bed = Bed::new(BOUNDS);
    let node = bed.admit_all(1, 1)[0];
    assert_eq!(bed.books.proven(node), Ok(()));
    assert!(!bed.books.overdue(node, bed.at(100)));
    let flood = bed.admit_all(1, 8);
    assert_eq!(bed.admit(1), Ok(Some((flood[0], TurnedAway::TooManyOfSource))));
    for id in &flood[1..3] {
        assert_eq!(bed.books.proven(*id), Ok(()));
    }
    assert_eq!(bed.books.proven(flood[3]), Err(TurnedAway::NoPlace));
    assert_eq!(bed.books.proven(node), Ok(()), "it is one already");
    bed.books.gone(node);
    assert_eq!(bed.books.proven(flood[3]), Ok(()), "a node that went has left its place");
}

#[test]
fn bounds_leave_descriptors_for_everything_else() {
    let bounds = Bounds::within(1_048_576);
    assert_eq!((bounds.nodes, bounds.strangers, bounds.strangers_of_source), (20_000, 2048, 256));
    for descriptors in [1024, 4096, 20_000, 22_048] {
        let bounds = Bounds::within(descriptors);
        assert!(bounds.all() + RESERVED <= usize::try_from(descriptors).unwrap(), "{descriptors}: {bounds:?}");
        assert!(bounds.nodes >= 3 * bounds.strangers, "{descriptors}: {bounds:?}");
    }
    assert_eq!(Bounds::within(20_000).nodes, 17_440);
    assert_eq!(Bounds::within(0).all(), LEAST);
}

/// What happens to the books.
#[derive(Clone, Copy, Debug)]
enum Step {
    Admit(u8),
    Begin(usize),
    End(usize),
    Proven(usize),
    Overdue(usize),
    Gone(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let which = 0..40_usize;
    let step = prop_oneof![
        6 => (0..4_u8).prop_map(Step::Admit),
        2 => which.clone().prop_map(Step::Begin),
        1 => which.clone().prop_map(Step::End),
        1 => which.clone().prop_map(Step::Proven),
        1 => which.clone().prop_map(Step::Overdue),
        1 => which.prop_map(Step::Gone),
    ];
    proptest::collection::vec(step, 0..120)
}

/// A connection as the model has it.
struct Model {
    id: Id,
    source: u8,
    reviews: usize,
}

proptest! {
    #[test]
    fn whatever_happens_the_books_agree_with_those_who_are_there(steps in steps()) {
        let mut bed = Bed::new(BOUNDS);
        let (mut model, mut nodes): (Vec<Model>, Vec<Id>) = Default::default();
        for (second, step) in steps.into_iter().enumerate() {
            match step {
                Step::Admit(source) => {
                    let has = |source: u8| model.iter().filter(|it| it.source == source).count();
                    let endable = |source: u8| model.iter().filter(|it| it.source == source && it.reviews == 0).count();
                    let most = (0..4).max_by_key(|source| (endable(*source), *source)).unwrap();
                    let goes = match () {
                        () if has(source) >= BOUNDS.strangers_of_source => Some(source),
                        () if model.len() >= BOUNDS.strangers => Some(most),
                        () => None,
                    };
                    let for_others = goes.is_some_and(|goes| has(source) < BOUNDS.strangers_of_source && endable(goes) <= FEW);
                    let ended = goes.map(|goes| model.iter().position(|it| it.source == goes && it.reviews == 0));
                    match (bed.admit(source), ended) {
                        (Ok(None), None) => {}
                        (Ok(Some((id, _))), Some(Some(place))) if !for_others => prop_assert_eq!(model.remove(place).id, id),
                        (Err(_), Some(place)) => {
                            prop_assert!(for_others || place.is_none());
                            continue;
                        }
                        other => prop_assert!(false, "{:?}", other),
                    }
                    model.push(Model { id: bed.names - 1, source, reviews: 0 });
                }
                Step::Begin(which) => if let Some(it) = model.get_mut(which) {
                    prop_assert!(bed.books.review_begins(it.id, bed.at(9)));
                    it.reviews += 1;
                },
                Step::End(which) => if let Some(it) = model.get_mut(which).filter(|it| it.reviews > 0) {
                    bed.books.review_ends(it.id);
                    it.reviews -= 1;
                },
                Step::Proven(which) => if let Some(it) = model.get(which) {
                    let proven = bed.books.proven(it.id).is_ok();
                    prop_assert_eq!(proven, nodes.len() < BOUNDS.nodes);
                    if proven {
                        nodes.push(model.remove(which).id);
                    }
                },
                Step::Overdue(which) => if let Some(it) = model.get(which) {
                    let overdue = bed.books.overdue(it.id, bed.at(10 + second as u64));
                    prop_assert_eq!(overdue, it.reviews == 0);
                    if overdue {
                        model.remove(which);
                    }
                },
                Step::Gone(which) => {
                    if which < model.len() {
                        bed.books.gone(model.remove(which).id);
                    } else if !nodes.is_empty() {
                        bed.books.gone(nodes.remove(which % nodes.len()));
                    }
                }
            }
            prop_assert_eq!(bed.books.strangers.len(), model.len());
            prop_assert_eq!(bed.books.nodes.len(), nodes.len());
            let weights: usize = bed.books.weights.iter().map(|(weight, _)| weight).sum();
            prop_assert_eq!(weights, model.iter().filter(|it| it.reviews == 0).count());
            let sources: BTreeSet<u8> = model.iter().map(|it| it.source).collect();
            prop_assert_eq!(bed.books.sources.len(), sources.len());
        }
    }
}
