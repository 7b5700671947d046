//! The bookkeeping, by cases and against a slow model.

use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::*;

const BOUNDS: Bounds =
    Bounds { nodes: 3, strangers: 12, strangers_of_source: 8, patience: Duration::from_secs(10), trust: Duration::MAX };

fn address(last: u8) -> IpAddr {
    Ipv4Addr::new(10, 0, 0, last).into()
}

/// Books whose times are seconds, and whose connections are named by what they are told to end.
struct Bed {
    books: Strangers<Id, &'static str>,
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
    assert_eq!(bed.admit(6), Err(TurnedAway::Full), "nobody has more than a node needs");
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
fn of_those_whose_tokens_are_looked_up_a_few_of_each_source_stay_and_their_time_does_not_end() {
    let mut bed = Bed::new(BOUNDS);
    let ids = bed.admit_all(1, 8);
    for id in &ids[..4] {
        assert!(bed.books.review_begins(*id, bed.at(1)));
    }
    for number in 4..100 {
        assert_eq!(bed.admit(1), Ok(Some((number, TurnedAway::TooManyOfSource))));
    }
    for id in bed.names - 4..bed.names {
        assert!(bed.books.review_begins(id, bed.at(1)));
    }
    assert_eq!(bed.admit(1), Ok(Some((ids[0], TurnedAway::TooManyOfSource))), "of more the one that waited longest");
    assert_eq!(bed.books.overdue(ids[1], bed.at(100)), Overdue::NotYet);
    bed.books.review_ends(ids[1]);
    assert_eq!(bed.books.overdue(ids[1], bed.at(100)), Overdue::Ended);
}

#[test]
fn while_reviews_of_strangers_do_not_end_a_node_of_another_address_gets_in() {
    let mut bed = Bed::new(Bounds { strangers: 64, ..BOUNDS });
    for source in 1..=8 {
        for id in bed.admit_all(source, 8) {
            bed.books.shaken(id);
            assert!(bed.books.review_begins(id, bed.at(1)));
        }
    }
    // The source with the highest address is one of those that have most.
    assert_eq!(bed.admit(9), Ok(Some((56, TurnedAway::TooMany))));
    let node = bed.names - 1;
    bed.books.shaken(node);
    assert!(bed.books.review_begins(node, bed.at(1)));
    // However many more come, and whatever of theirs goes: it stays.
    for round in 0..1000_usize {
        let ended = bed.admit(1 + u8::try_from(round % 8).unwrap()).unwrap().unwrap().0;
        assert_ne!(ended, node);
        bed.books.shaken(bed.names - 1);
        assert!(bed.books.review_begins(bed.names - 1, bed.at(1)));
    }
    assert_eq!(bed.books.proven(node, &"node"), Ok(None));
}

#[test]
fn a_flood_that_connects_again_and_again_ends_its_own_as_long_as_a_node_of_its_source_is_elsewhere() {
    for flood_finishes_tls in [false, true] {
        let mut bed = Bed::new(BOUNDS);
        let connect = |bed: &mut Bed| {
            let ended = bed.admit(1).unwrap();
            if flood_finishes_tls {
                bed.books.shaken(bed.names - 1);
            }
            ended.map(|(ended, _)| ended)
        };
        (0..8).for_each(|_| assert_eq!(connect(&mut bed), None));
        bed.admit(1).unwrap().unwrap();
        let node = bed.names - 1;
        if !flood_finishes_tls {
            bed.books.shaken(node);
        }
        (0..1000).for_each(|_| assert_ne!(connect(&mut bed), Some(node)));
        // Where the flood stops, too, it has as long as all of them are new.
        if flood_finishes_tls {
            bed.books.shaken(node);
        }
        assert!(bed.books.review_begins(node, bed.at(1)));
        (0..1000).for_each(|_| assert_ne!(connect(&mut bed), Some(node)));
        assert_eq!(bed.books.proven(node, &"node"), Ok(None));
    }
}

#[test]
fn the_oldest_of_a_caller_goes_for_one_more_and_nobody_elses() {
    let mut bed = Bed::new(Bounds { nodes: 2 * MOST_OF_CALLER, strangers: 100, ..BOUNDS });
    let mut prove = |caller: &'static str| {
        bed.admit(1).unwrap();
        bed.books.proven(bed.names - 1, &caller)
    };
    assert_eq!(prove("other"), Ok(None));
    (0..MOST_OF_CALLER).for_each(|_| assert_eq!(prove("leaked"), Ok(None)));
    assert_eq!(prove("leaked"), Ok(Some(1)));
    assert_eq!(prove("leaked"), Ok(Some(2)));
    assert_eq!(bed.books.nodes.len(), MOST_OF_CALLER + 1);
    bed.books.gone(3);
    bed.admit(1).unwrap();
    assert_eq!(bed.books.proven(bed.names - 1, &"leaked"), Ok(None));
    (0..bed.names).for_each(|id| bed.books.gone(id));
    assert!(bed.books.callers.is_empty());
}

#[test]
fn two_reviews_of_a_connection_end_with_the_last_and_late_ones_do_not_count() {
    let mut bed = Bed::new(BOUNDS);
    let id = bed.admit_all(1, 1)[0];
    assert!(bed.books.review_begins(id, bed.at(9)));
    assert!(bed.books.review_begins(id, bed.at(9)));
    assert!(!bed.books.review_begins(id, bed.at(10)), "it would go on for ever");
    bed.books.review_ends(id);
    assert_eq!(bed.books.overdue(id, bed.at(20)), Overdue::NotYet);
    bed.books.review_ends(id);
    assert_eq!(bed.books.overdue(id, bed.at(9)), Overdue::NotYet);
    assert_eq!(bed.books.overdue(id, bed.at(20)), Overdue::Ended);
    assert_eq!(bed.books.overdue(id, bed.at(20)), Overdue::Never, "it is ended once");
}

#[test]
fn a_node_has_left_the_strangers_and_none_of_them_ends_it() {
    let mut bed = Bed::new(BOUNDS);
    let node = bed.admit_all(1, 1)[0];
    assert_eq!(bed.books.proven(node, &"node"), Ok(None));
    assert_eq!(bed.books.overdue(node, bed.at(100)), Overdue::Never);
    let flood = bed.admit_all(1, 8);
    assert_eq!(bed.admit(1), Ok(Some((flood[0], TurnedAway::TooManyOfSource))));
    for id in &flood[1..3] {
        assert_eq!(bed.books.proven(*id, &"node"), Ok(None));
    }
    assert_eq!(bed.books.proven(flood[3], &"node"), Err(NoPlace { first: true }));
    assert_eq!(bed.books.proven(flood[3], &"node"), Err(NoPlace { first: false }));
    assert_eq!(bed.books.proven(node, &"node"), Ok(None), "it is one already");
    bed.books.gone(node);
    assert_eq!(bed.books.proven(flood[3], &"node"), Ok(None), "a node that went has left its place");
    assert_eq!(bed.books.proven(flood[4], &"node"), Err(NoPlace { first: true }));
    assert_eq!(bed.books.overdue(flood[4], bed.at(100)), Overdue::EndedWithoutPlace, "it counts once");
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
    Shaken(usize),
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
        2 => which.clone().prop_map(Step::Shaken),
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
    shaken: bool,
    reviews: usize,
}

impl Model {
    fn stage(&self) -> Stage {
        match self {
            Self { reviews: 1.., .. } => Stage::Review,
            Self { shaken: true, .. } => Stage::Silent,
            _ => Stage::Handshake,
        }
    }
}

/// Which of a source goes first.
fn first_to_go(model: &[Model], source: u8) -> usize {
    let of_stage = |stage| model.iter().filter(|it| it.source == source && it.stage() == stage).count();
    let stages = [Stage::Review, Stage::Silent, Stage::Handshake];
    let most = stages.into_iter().max_by_key(|stage| match stage {
        Stage::Review => of_stage(*stage).saturating_sub(FEW),
        _ => of_stage(*stage),
    });
    model.iter().position(|it| it.source == source && Some(it.stage()) == most).unwrap()
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
                    let most = (0..4).max_by_key(|source| (has(*source), *source)).unwrap();
                    let goes = match () {
                        () if has(source) >= BOUNDS.strangers_of_source => Some(source),
                        () if model.len() >= BOUNDS.strangers => Some(most),
                        () => None,
                    };
                    match (bed.admit(source), goes) {
                        (Ok(None), None) => {}
                        (Ok(Some((id, _))), Some(goes)) if has(goes) > FEW => {
                            prop_assert_eq!(model.remove(first_to_go(&model, goes)).id, id);
                        }
                        (Err(TurnedAway::Full), Some(goes)) if has(goes) <= FEW => continue,
                        other => prop_assert!(false, "{:?}", other),
                    }
                    model.push(Model { id: bed.names - 1, source, shaken: false, reviews: 0 });
                }
                Step::Shaken(which) => if let Some(it) = model.get_mut(which) {
                    bed.books.shaken(it.id);
                    it.shaken = true;
                },
                Step::Begin(which) => if let Some(it) = model.get_mut(which) {
                    prop_assert!(bed.books.review_begins(it.id, bed.at(9)));
                    (it.reviews, it.shaken) = (it.reviews + 1, true);
                },
                Step::End(which) => if let Some(it) = model.get_mut(which).filter(|it| it.reviews > 0) {
                    bed.books.review_ends(it.id);
                    it.reviews -= 1;
                },
                Step::Proven(which) => if let Some(it) = model.get(which) {
                    let proven = bed.books.proven(it.id, &"node").is_ok();
                    prop_assert_eq!(proven, nodes.len() < BOUNDS.nodes);
                    if proven {
                        nodes.push(model.remove(which).id);
                    }
                },
                Step::Overdue(which) => if let Some(it) = model.get(which) {
                    let overdue = bed.books.overdue(it.id, bed.at(10 + second as u64));
                    prop_assert_eq!(overdue == Overdue::NotYet, it.reviews > 0);
                    if it.reviews == 0 {
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
            prop_assert_eq!(weights, model.len());
            let sources: BTreeSet<u8> = model.iter().map(|it| it.source).collect();
            prop_assert_eq!(bed.books.sources.len(), sources.len());
        }
    }
}
