//! The agent notices what is done to a capture, and undoes it: at once, by name, and without working itself to death.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use agent::rules;
use linux::links::Links;
use linux::netlink::Protocol;
use linux::netns::NetNs;
use linux::nft::{self, IpFamily, Table};
use linux::routes::LocalDelivery;
use linux::tc;
use mesh::PodUid;
use socket2::SockRef;
use wire::pods::{FromAgent, SocketKind, ToAgent};
use wire::report::CaptureFailure;

use crate::armed::{disarm, interface, netlink};
use crate::lab::{A, eventually, with_privilege};
use crate::world::{FakeProxy, Room, World, pod};

/// The promise.
const WITHIN: Duration = Duration::from_secs(1);

/// What the pod's rules deliver here, as the kernel has them: the proxy's sockets tell the mark.
fn delivery(proxy: &FakeProxy) -> LocalDelivery {
    proxy.say(&ToAgent::WantSockets { pod: PodUid::from("a"), kind: SocketKind::InnerV4, count: 1 });
    let Some((FromAgent::Sockets { .. }, sockets)) = proxy.hear() else { panic!("sockets") };
    let inner = linux::sockets::mark(&sockets[0]).unwrap();
    rules::delivery(rules::Marks { outer: !inner, inner })
}

fn flush(pod: &NetNs) {
    assert!(nft::delete(&mut netlink(pod, Protocol::Netfilter), rules::TABLE).unwrap());
}

fn counted(world: &World, metric: &str) -> u64 {
    let metrics = world.page("/metrics");
    let line = metrics.lines().find(|line| line.starts_with(metric)).unwrap();
    line.rsplit_once(' ').unwrap().1.parse().unwrap()
}

fn repairs(world: &World) -> u64 {
    counted(world, "justmtls_agent_repairs_total")
}

#[test]
fn whatever_is_taken_away_is_seen_named_counted_and_back_within_a_second() {
    with_privilege(whatever_is_taken_away_is_seen_named_counted_and_back_within_a_second, || {
        let world = World::new(|_| ());
        world.control.publish([pod("a", A)]);
        let proxy = world.proxy();
        let listeners: Vec<TcpListener> =
            world.capture(&proxy, "a", &Room::of(&world.lab.a)).into_iter().map(TcpListener::from).collect();
        let (delivery, inside) = (delivery(&proxy), &world.lab.a);
        let remove = |family| delivery.remove(&mut netlink(inside, Protocol::Route), family).unwrap();
        let shut = |listener: &TcpListener| SockRef::from(listener).shutdown(std::net::Shutdown::Both).unwrap();
        let unarm = || disarm(inside, A);
        let other = || {
            // A filter of ours that lets everything by.
            let mut pass = linux::bpf::Assembler::new();
            pass.answer(tc::PASS);
            let pass = tc::Filter { answer: tc::Answer::Pass, program: pass.finish().unwrap() };
            tc::set(&mut netlink(inside, Protocol::Route), interface(inside, A), &[pass]).unwrap();
        };
        let faults: [(&str, &dyn Fn()); 8] = [
            ("the table justmtls is gone", &|| flush(inside)),
            ("the rule ip -4 rule pref 1000", &|| remove(IpFamily::V4)),
            ("the rule ip -6 rule pref 1000", &|| remove(IpFamily::V6)),
            ("is missing", &unarm),
            ("differs", &other),
            ("the listener on 127.0.0.1:15001 is closed", &|| shut(&listeners[0])),
            ("the listener on [::]:15006 is closed", &|| shut(&listeners[3])),
            ("is missing", &|| {
                unarm();
                flush(inside);
                remove(IpFamily::V4);
            }),
        ];
        for (broken, fault) in faults {
            let failures = || counted(&world, "justmtls_agent_repair_failures_total");
            let before = (repairs(&world), failures());
            let since = Instant::now();
            fault();
            eventually("it is repaired", || repairs(&world) > before.0);
            let took = since.elapsed();
            assert!(took < WITHIN, "{broken}: {took:?}");
            println!("{broken}: {took:?}");
            let events = world.page("/events");
            assert!(events.contains(r#""event":"repaired""#) && events.contains(broken), "{broken}: {events}");
            // A guard goes in steps: a repair of the first may be undone by the next before it is read back, and counts as failed.
            let in_steps = ["is missing", "differs"].contains(&broken);
            assert!(in_steps || failures() == before.1, "{broken}: a repair failed");
            eventually("all of it stands", || {
                listeners.iter().all(linux::sockets::is_listening)
                    && delivery.missing(&mut netlink(inside, Protocol::Route), IpFamily::V4).unwrap().is_none()
                    && nft::read(&mut netlink(inside, Protocol::Netfilter), rules::TABLE).unwrap().is_some()
            });
        }
    });
}

/// The pod's interface is gone, and with it the guard, which cannot stand anywhere until there is another.
#[test]
fn what_cannot_be_made_anew_is_shown_and_reported_until_it_stands_again() {
    with_privilege(what_cannot_be_made_anew_is_shown_and_reported_until_it_stands_again, || {
        let world = World::new(|_| ());
        world.control.publish([pod("a", A)]);
        let proxy = world.proxy();
        world.capture(&proxy, "a", &Room::of(&world.lab.a));
        assert!(world.page("/pods").contains(r#""state":"captured""#) && world.control.failed().is_empty());

        let mut links = Links::of(&world.lab.a).unwrap();
        links.remove("eth0").unwrap();
        eventually("it is damaged", || world.page("/pods").contains(r#""state":"damaged""#));
        assert!(world.page("/pods").contains("it cannot be made anew"), "{}", world.page("/pods"));
        let told = BTreeMap::from([(PodUid::from("a"), CaptureFailure::NoInterface)]);
        eventually("the control plane is told", || world.control.failed() == told);

        links.add_veth("eth0", "a-again", &world.lab.node).unwrap();
        for address in A {
            links.add_address("eth0", address.into()).unwrap();
        }
        links.up("eth0").unwrap();
        eventually("it is captured again", || world.page("/pods").contains(r#""state":"captured""#));
        eventually("the control plane is told of that", || world.control.failed().is_empty());
    });
}

#[test]
fn a_program_that_changes_rules_in_a_loop_keeps_the_agent_from_nothing() {
    with_privilege(a_program_that_changes_rules_in_a_loop_keeps_the_agent_from_nothing, || {
        let world = World::new(|_| ());
        world.control.publish([pod("a", A)]);
        let proxy = world.proxy();
        let _listeners: Vec<OwnedFd> = world.capture(&proxy, "a", &Room::of(&world.lab.a));
        let mut netfilter = netlink(&world.lab.a, Protocol::Netfilter);
        let none = Table { name: "others".into(), timeouts: vec![], sets: vec![], chains: vec![] };
        // One that is undone before it was read back counts as failed.
        let attempts = || repairs(&world) + counted(&world, "justmtls_agent_repair_failures_total");
        let (since, before) = (Instant::now(), attempts());
        let mut changes = 0;
        while since.elapsed() < Duration::from_secs(3) {
            nft::replace(&mut netfilter, &none).unwrap();
            let _ = nft::delete(&mut netfilter, rules::TABLE).unwrap();
            changes += 2;
        }
        let repaired = attempts() - before;
        println!("{changes} changes, {repaired} attempts in {:?}", since.elapsed());
        // At least one a second, and no more than the pauses allow: 320 ms, but for the first ones.
        assert!((3..=40).contains(&repaired), "{changes} changes, {repaired} attempts");
        assert!(changes > 10 * repaired, "{changes} changes are no loop");
        eventually("it stands in the end", || nft::read(&mut netfilter, rules::TABLE).unwrap().is_some());
    });
}
