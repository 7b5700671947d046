//! One agent after the other, with the pods of the first.

use std::collections::BTreeSet;

use linux::netlink::{Protocol, Socket as Netlink};
use linux::netns::NetNs;
use linux::{nft, tc};
use mesh::{PodUid, Uncaptured};
use wire::discovery::NodePod;
use wire::pods::{CniResult, FromAgent, Kept, PodAdded, ToAgent};

use crate::armed::{interface, netlink};
use crate::lab::{A, App, B, Client, eventually, is_refused, plan, prepared, with_privilege};
use crate::world::{Room, World, pod};

/// The rules as they are, and how often any of the namespace has changed.
fn rules(namespace: &NetNs) -> (Option<nft::Normal>, u32) {
    let mut netfilter = namespace.enter(|| Netlink::open(Protocol::Netfilter)).unwrap().unwrap();
    (nft::read(&mut netfilter, agent::rules::TABLE).unwrap(), nft::generation(&mut netfilter).unwrap())
}

/// Every pod that a proxy is told of within so many messages.
fn told(proxy: &crate::world::FakeProxy, count: usize) -> BTreeSet<PodUid> {
    (0..count).map(|_| proxy.added().0.pod).collect()
}

#[test]
fn an_agent_hands_over_to_the_next_one_and_back_and_no_rule_changes() {
    with_privilege(an_agent_hands_over_to_the_next_one_and_back_and_no_rule_changes, || {
        let world = World::new(|_| ());
        world.control.publish([pod("a", A), pod("b", B)]);
        let proxy = world.proxy();
        let (room_a, room_b) = (Room::of(&world.lab.a), Room::of(&world.lab.b));
        world.capture(&proxy, "a", &room_a);
        proxy.hand(&ToAgent::Keep(Kept::View), &[linux::sealed::seal("test", b"a view").unwrap()]);
        // Its answer comes after the file was taken.
        proxy.say(&ToAgent::PodReady { pod: PodUid::from("a") });
        let before = rules(&world.lab.a);
        assert!(before.0.is_some());

        let second = world.another_agent();
        assert!(proxy.hear().is_none(), "the first agent has ended");
        let proxy = world.proxy();
        assert_eq!(told(&proxy, 1), [PodUid::from("a")].into());
        assert_eq!(rules(&world.lab.a), before, "the rules are those that were there");
        eventually("it is reported anew", || world.control.captured() == [PodUid::from("a")].into());
        assert_eq!(world.add("a", &room_a).join().unwrap(), CniResult::Captured, "asked again, it knows");
        // The next pod starts with the new agent, and the last one ends with it.
        world.capture(&proxy, "b", &room_b);
        world.delete("a");
        assert_eq!(proxy.hear().unwrap().0, FromAgent::PodRemoved { pod: PodUid::from("a") });

        let _third = world.another_agent();
        assert!(proxy.hear().is_none());
        second.join().unwrap();
        let proxy = crate::world::FakeProxy::connect(&world.path("proxy"));
        proxy.say(&ToAgent::Hello { version: wire::pods::VERSION, started: std::time::Duration::ZERO, leaving: false });
        let Some((FromAgent::Hello { kept, .. }, files)) = proxy.hear() else { panic!("a hello") };
        assert_eq!((kept, linux::sealed::read(&files[0], 9).unwrap()), (vec![Kept::View], b"a view".to_vec()));
        assert_eq!(told(&proxy, 1), [PodUid::from("b")].into());
    });
}

#[test]
fn rules_that_a_dead_agent_has_left_in_a_pod_that_is_let_go_are_found_reported_and_taken_away() {
    with_privilege(rules_that_a_dead_agent_has_left_in_a_pod_that_is_let_go_are_found_reported_and_taken_away, || {
        let world = World::new(|_| ());
        let (inside, other) = (&world.lab.a, &world.lab.b);
        // What lives on when agent and proxy are gone.
        let mut left = prepared(inside, plan(A));
        left.begin().unwrap();
        drop(left);
        let _app = App::start(inside, A[0], 7000);
        is_refused(other, A[0], 7000);
        // Somebody's own filter is no guard.
        let mut pass = linux::bpf::Assembler::new();
        pass.answer(tc::PASS);
        let theirs = [tc::Filter { answer: tc::Answer::Pass, program: pass.finish().unwrap() }];
        tc::set(&mut netlink(other, Protocol::Route), 1, &theirs).unwrap();

        let out = |name: &str, addresses, release| NodePod {
            capture: Err(Uncaptured::OptedOut),
            release,
            ..pod(name, addresses)
        };
        world.control.publish([out("a", A, false), out("b", B, false)]);
        let proxy = world.proxy();
        for (name, namespace) in [("a", inside), ("b", other)] {
            let answer = world.add(name, &Room::of(namespace)).join().unwrap();
            assert_eq!(answer, CniResult::NotCaptured("opted-out".into()), "{name}");
        }
        eventually("its peers are told", || world.control.captured() == [PodUid::from("a")].into());
        assert!(world.page("/events").contains("rules-found"));
        assert_eq!(told(&proxy, 1), [PodUid::from("a")].into(), "nothing is made in the other");
        assert!(rules(inside).0.is_some() && rules(other).0.is_none());

        world.control.publish([out("a", A, true), out("b", B, false)]);
        // While they are exchanged for those that let it go they cannot be read.
        let read = || nft::read(&mut netlink(inside, Protocol::Netfilter), agent::rules::TABLE);
        eventually("its rules are gone", || matches!(read(), Ok(None)));
        eventually("it is said", || world.page("/pods").contains(r#""stands":false"#));
        let guarded = |namespace, index, filters: &[tc::Filter]| {
            tc::difference(&mut netlink(namespace, Protocol::Route), index, filters).unwrap().is_none()
        };
        let whole = agent::guard::inside().unwrap();
        assert!(!guarded(inside, 1, &whole) && !guarded(inside, interface(inside, A), &whole));
        assert_eq!(Client::connect(other, A[0], 7000).unwrap().seen().unwrap().0, B[0]);
        assert!(guarded(other, 1, &theirs), "what is another's stays");
    });
}

/// A pod that is captured, and then in nobody's hands but the proxy's: what a proxy has that outlived its agent.
fn orphan(world: &World, name: &str, room: &Room) -> (PodAdded, Vec<std::os::fd::OwnedFd>) {
    let proxy = world.proxy();
    let answer = world.add(name, room);
    let (added, listeners) = proxy.added();
    proxy.say(&ToAgent::PodReady { pod: added.pod.clone() });
    assert_eq!(answer.join().unwrap(), CniResult::Captured);
    (added, listeners)
}

#[test]
fn a_new_agent_takes_the_pods_from_the_proxy_that_outlived_the_last_one() {
    with_privilege(a_new_agent_takes_the_pods_from_the_proxy_that_outlived_the_last_one, || {
        let mut world = World::new(|_| ());
        world.control.publish([pod("a", A), pod("b", B)]);
        let (added, listeners) = orphan(&world, "a", &Room::of(&world.lab.a));
        let before = rules(&world.lab.a);
        // The next one finds no agent to ask: for it the first is as good as dead.
        world.move_sockets();
        let _next = world.another_agent();
        eventually("it listens", || world.path("admin").exists());
        eventually("it is told of its pods", || world.page("/readyz").contains(r#""pods_named":true"#));
        assert!(!world.page("/pods").contains(r#""state":"captured""#));
        let reports = world.control.reports();

        let proxy = world.greeted();
        proxy.hand(&ToAgent::Held(added.clone()), &listeners);
        let mut gone = added.clone();
        gone.pod = PodUid::from("gone");
        proxy.hand(&ToAgent::Held(gone), &listeners);
        proxy.say(&ToAgent::HeldAll);
        assert_eq!(told(&proxy, 1), [PodUid::from("a")].into());
        eventually("it is reported", || world.control.reports() > reports);
        assert_eq!(world.control.captured(), [PodUid::from("a")].into(), "no report was without it");
        assert_eq!(rules(&world.lab.a), before, "the rules are those that were there");
        assert!(world.page("/pods").contains(r#""state":"captured""#));
        // What it makes carries the marks of the rules that stand.
        proxy.say(&ToAgent::WantSockets { pod: added.pod, kind: wire::pods::SocketKind::OuterV4, count: 1 });
        let Some((FromAgent::Sockets { .. }, sockets)) = proxy.hear() else { panic!("sockets") };
        assert_eq!(linux::sockets::mark(&sockets[0]).unwrap(), linux::sockets::mark(&listeners[2]).unwrap());
        // New pods start with it, and those that it has taken over end with it.
        world.capture(&proxy, "b", &Room::of(&world.lab.b));
        world.delete("a");
        assert_eq!(proxy.hear().unwrap().0, FromAgent::PodRemoved { pod: PodUid::from("a") });
    });
}
