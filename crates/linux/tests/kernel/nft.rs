//! Tables in a real kernel, against what the `nft` program makes of the same text.

use std::io::Write;
use std::net::UdpSocket;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::namespace::{new_namespace, with_privilege};
use linux::links::Links;
use linux::netlink::{Protocol, Socket};
use linux::netns::NetNs;
use linux::nft::{
    AddressType, Chain, ChainKind, Compare, Direction, Expression, Hook, HookPoint, IpFamily, L4Protocol, Policy,
    PortSet, Rule, Table, Timeout, counters, delete, generation, read, replace,
};

fn chain(name: &str, kind: ChainKind, point: HookPoint, priority: i32, rules: Vec<Rule>) -> Chain {
    let hook = Some(Hook { kind, point, priority, policy: Policy::Accept });
    Chain { name: name.into(), hook, rules }
}

/// Every expression at least once.
fn everything() -> Table {
    use Compare::{Is, IsNot};
    use Expression as E;
    let rule = |expressions: Vec<E>| Rule::new("", expressions);
    Table {
        name: "everything".into(),
        timeouts: vec![
            Timeout { name: "half_closed_v4".into(), family: IpFamily::V4, fin_wait: 432_000, close_wait: 432_000 },
            Timeout { name: "half_closed_v6".into(), family: IpFamily::V6, fin_wait: 432_000, close_wait: 7 },
        ],
        sets: vec![
            PortSet { name: "excluded".into(), ports: [22, 9100].into() },
            PortSet { name: "nothing".into(), ports: [].into() },
        ],
        chains: vec![
            chain(
                "capture_out",
                ChainKind::Nat,
                HookPoint::Output,
                -100,
                vec![
                    Rule::new("T14: a reason", [E::Mark(Is, 0x6a6d_0001), E::Accept]),
                    rule(vec![E::DestinationType(Is, AddressType::Local), E::Accept]),
                    rule(vec![E::Source(Is, "10.1.1.1/32".parse().unwrap()), E::TcpSyn, E::Redirect(15001)]),
                    rule(vec![E::Source(Is, "fd00::1/128".parse().unwrap()), E::TcpSyn, E::Redirect(15001)]),
                    rule(vec![
                        E::Destination(Is, "10.0.0.0/8".parse().unwrap()),
                        E::DestinationPort(Is, 80),
                        E::Jump("endpoints".into()),
                    ]),
                    rule(vec![
                        E::Destination(IsNot, "fd00::/61".parse().unwrap()),
                        E::SourcePort(IsNot, 80),
                        E::Return,
                    ]),
                ],
            ),
            chain(
                "capture_in",
                ChainKind::Nat,
                HookPoint::Prerouting,
                -100,
                vec![
                    rule(vec![E::FromLoopback(IsNot), E::DestinationPortIn("excluded".into()), E::Accept]),
                    rule(vec![E::FromLoopback(IsNot), E::TcpSyn, E::HasSocket, E::DnatPort(15006)]),
                    rule(vec![E::FromLoopback(Is), E::TcpSyn, E::DnatPort(15006)]),
                ],
            ),
            chain(
                "leave",
                ChainKind::Nat,
                HookPoint::Postrouting,
                100,
                vec![
                    rule(vec![E::Source(IsNot, "10.0.0.0/20".parse().unwrap()), E::Masquerade]),
                    rule(vec![E::Forwarded, E::TcpReset, E::Return]),
                ],
            ),
            chain(
                "zones",
                ChainKind::Filter,
                HookPoint::Output,
                -300,
                vec![rule(vec![E::Mark(Is, 5), E::SetOriginalZone(27245)]), rule(vec![E::Mark(Is, 6), E::Untracked])],
            ),
            chain(
                "back",
                ChainKind::Route,
                HookPoint::Output,
                -150,
                vec![
                    rule(vec![E::FlowDirection(Direction::Reply), E::OriginalZone(Is, 27245), E::SetMark(5)]),
                    rule(vec![E::FlowDirection(Direction::Original), E::OriginalZone(IsNot, 5), E::Drop]),
                ],
            ),
            Chain {
                name: "guard_in".into(),
                hook: Some(Hook {
                    kind: ChainKind::Filter,
                    point: HookPoint::Input,
                    priority: 0,
                    policy: Policy::Drop,
                }),
                rules: vec![
                    rule(vec![E::TcpSyn, E::FlowDestinationTranslated(Is), E::Accept]),
                    rule(vec![E::TcpSyn, E::FlowDestinationTranslated(IsNot), E::Counter, E::RejectWithReset]),
                    rule(vec![E::FlowInvalid, E::Counter, E::Drop]),
                    rule(vec![E::SocketMark(IsNot, 7), E::Accept]),
                    rule(vec![E::SourceType(IsNot, AddressType::Local), E::Mark(IsNot, 7), E::Drop]),
                    rule(vec![E::Family(IpFamily::V4), E::TcpSyn, E::SetTimeout("half_closed_v4".into())]),
                    rule(vec![E::Family(IpFamily::V6), E::TcpSyn, E::SetTimeout("half_closed_v6".into())]),
                ],
            },
            Chain {
                name: "endpoints".into(),
                hook: None,
                rules: vec![
                    rule(vec![
                        E::Destination(Is, "10.96.0.1/32".parse().unwrap()),
                        E::DestinationPort(Is, 80),
                        E::Chance { below: 1, of: 3 },
                        E::Dnat("10.2.2.2:8080".parse().unwrap()),
                    ]),
                    rule(vec![
                        E::Destination(Is, "fd96::1/128".parse().unwrap()),
                        E::DestinationPort(Is, 80),
                        E::Dnat("[fd00::3]:8080".parse().unwrap()),
                    ]),
                    rule(vec![
                        E::Destination(Is, "10.96.0.0/16".parse().unwrap()),
                        E::Protocol(L4Protocol::Udp),
                        E::DestinationPort(Is, 53),
                        E::DnatAddress("10.2.2.3".parse().unwrap()),
                    ]),
                ],
            },
            chain(
                "untracked",
                ChainKind::Filter,
                HookPoint::Prerouting,
                -300,
                vec![rule(vec![
                    E::FromLoopback(IsNot),
                    E::Protocol(L4Protocol::Tcp),
                    E::SocketMark(Is, 6),
                    E::Untracked,
                ])],
            ),
        ],
    }
}

fn socket() -> Socket {
    Socket::open(Protocol::Netfilter).unwrap()
}

/// Runs `nft` in the calling thread's namespace; `None` when there is no such program.
fn nft(arguments: &[&str], input: &str) -> Option<String> {
    let mut child = Command::new("nft")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .ok()?;
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap())
}

#[test]
fn what_is_loaded_is_what_is_read() {
    with_privilege(what_is_loaded_is_what_is_read, || {
        let (mut socket, table) = (socket(), everything());
        assert_eq!(read(&mut socket, &table.name).unwrap(), None);
        replace(&mut socket, &table).unwrap();
        let found = read(&mut socket, &table.name).unwrap().expect("the table is there");
        assert_eq!(table.normal().difference(&found), None);
        assert_eq!(table.normal(), found);
        assert!(delete(&mut socket, &table.name).unwrap());
        assert!(!delete(&mut socket, &table.name).unwrap());
    });
}

#[test]
fn the_nft_program_makes_the_same_rules_of_the_text() {
    with_privilege(the_nft_program_makes_the_same_rules_of_the_text, || {
        let table = everything();
        if nft(&["-f", "-"], &table.to_string()).is_none() {
            return;
        }
        let theirs = read(&mut socket(), &table.name).unwrap().unwrap();
        assert_eq!(table.normal().difference(&theirs), None, "{:#?}\n{theirs:#?}", table.normal());
    });
}

#[test]
fn every_change_is_seen() {
    with_privilege(every_change_is_seen, || {
        let (mut socket, table) = (socket(), everything());
        let mut others = vec![];
        for change in 0..8 {
            let mut other = table.clone();
            match change {
                0 => drop(other.chains[0].rules.pop()),
                1 => other.chains[0].rules.swap(1, 2),
                2 => drop(other.chains.remove(3)),
                3 => other.sets[1].ports.extend([80]),
                4 => other.timeouts[1].close_wait = 8,
                5 => other.chains[0].rules[0].expressions[0] = Expression::Mark(Compare::Is, 1),
                6 => other.chains[2].hook.as_mut().unwrap().priority = 99,
                _ => other.chains[5].hook.as_mut().unwrap().policy = Policy::Accept,
            }
            others.push(other);
        }
        for other in others {
            let before = generation(&mut socket).unwrap();
            replace(&mut socket, &other).unwrap();
            assert_ne!(generation(&mut socket).unwrap(), before);
            let found = read(&mut socket, &table.name).unwrap().unwrap();
            assert!(table.normal().difference(&found).is_some());
            assert_ne!(table.normal(), found);
            assert_eq!(other.normal(), found);
        }
    });
}

#[test]
fn a_dormant_table_is_not_taken_for_a_working_one() {
    with_privilege(a_dormant_table_is_not_taken_for_a_working_one, || {
        let (mut socket, table) = (socket(), everything());
        replace(&mut socket, &table).unwrap();
        if nft(&["add table inet everything { flags dormant; }"], "").is_none() {
            return;
        }
        let found = read(&mut socket, &table.name).unwrap().unwrap();
        let difference = table.normal().difference(&found).unwrap();
        assert_eq!(difference, "the table's flags are 0x1, not 0x0");
    });
}

#[test]
fn a_batch_with_a_mistake_changes_nothing() {
    with_privilege(a_batch_with_a_mistake_changes_nothing, || {
        let (mut socket, table) = (socket(), everything());
        replace(&mut socket, &table).unwrap();
        let before = generation(&mut socket).unwrap();
        let mut wrong = table.clone();
        wrong.chains[0].rules.push(Rule::new("", [Expression::Jump("nowhere".into())]));
        let error = replace(&mut socket, &wrong).unwrap_err();
        assert_eq!(error.errno(), Some(nix::libc::ENOENT));
        assert!(error.to_string().starts_with("the kernel refused to load the nftables table"));
        assert_eq!(generation(&mut socket).unwrap(), before);
        assert_eq!(read(&mut socket, &table.name).unwrap().unwrap(), table.normal());
    });
}

#[test]
fn three_hundred_rules_fit_in_one_batch() {
    with_privilege(three_hundred_rules_fit_in_one_batch, || {
        let (mut socket, mut table) = (socket(), everything());
        let rule = table.chains[6].rules[0].clone();
        table.chains[6].rules.extend(vec![rule; 300]);
        replace(&mut socket, &table).unwrap();
        assert_eq!(read(&mut socket, &table.name).unwrap().unwrap(), table.normal());
    });
}

#[test]
fn counters_are_read_with_the_reason_of_their_rule() {
    with_privilege(counters_are_read_with_the_reason_of_their_rule, || {
        let mut socket = socket();
        let rules = vec![Rule::new("D26: all of it", [Expression::Counter])];
        let chains = vec![chain("count", ChainKind::Filter, HookPoint::Output, 0, rules)];
        let table = Table { name: "c".into(), timeouts: vec![], sets: vec![], chains };
        replace(&mut socket, &table).unwrap();
        let counters = counters(&mut socket, "c").unwrap();
        assert_eq!(counters.len(), 1);
        assert_eq!((counters[0].chain.as_str(), counters[0].why.as_str()), ("count", "D26: all of it"));
        assert_eq!(counters[0].packets, 0);
    });
}

#[test]
fn a_socket_belongs_to_the_namespace_where_it_was_opened() {
    with_privilege(a_socket_belongs_to_the_namespace_where_it_was_opened, || {
        let (table, other) = (everything(), new_namespace());
        let mut here = socket();
        let mut there = other.enter(socket).unwrap();
        replace(&mut there, &table).unwrap();
        assert_eq!(read(&mut here, &table.name).unwrap(), None);
        assert_eq!(read(&mut there, &table.name).unwrap(), Some(table.normal()));
    });
}

/// Each packet that leaves takes a mark from the table that is replaced, or is counted by another.
#[test]
fn no_packet_meets_a_table_without_its_rules_while_it_is_replaced() {
    with_privilege(no_packet_meets_a_table_without_its_rules_while_it_is_replaced, || {
        let (here, mut socket) = (NetNs::current().unwrap(), socket());
        Links::of(&here).unwrap().up("lo").unwrap();
        let of = |name: &str, priority, rule| {
            let rules = vec![Rule::new("", rule)];
            let chains = vec![chain("judge", ChainKind::Filter, HookPoint::Output, priority, rules)];
            Table { name: name.into(), timeouts: vec![], sets: vec![], chains }
        };
        let one = of("marks", 0, vec![Expression::SetMark(1)]);
        let other = of("marks", 0, vec![Expression::Counter, Expression::SetMark(1)]);
        replace(&mut socket, &of("counts", 1, vec![Expression::Mark(Compare::IsNot, 1), Expression::Counter])).unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = sender.local_addr().unwrap();
        sender.send_to(b"unmarked", to).unwrap();
        let unmarked = |socket: &mut Socket| counters(socket, "counts").unwrap()[0].packets;
        assert_eq!(unmarked(&mut socket), 1);
        replace(&mut socket, &one).unwrap();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let senders = [(); 2].map(|()| {
                let sender = sender.try_clone().unwrap();
                scope.spawn(|| {
                    let sender = sender;
                    while !over.load(Ordering::Relaxed) {
                        sender.send_to(b"marked", to).unwrap();
                    }
                })
            });
            for _ in 0..10000 {
                replace(&mut socket, &other).unwrap();
                replace(&mut socket, &one).unwrap();
            }
            over.store(true, Ordering::Relaxed);
            for sender in senders {
                sender.join().unwrap();
            }
        });
        assert_eq!(unmarked(&mut socket), 1, "a packet met no rule");
    });
}
