//! Policy routing in a real kernel.

use linux::netlink::{Protocol, Socket};
use linux::netns::NetNs;
use linux::nft::IpFamily;
use linux::routes::LocalDelivery;

use crate::namespace::with_privilege;

const OURS: LocalDelivery = LocalDelivery { mark: 0x6a6d_0002, table: 27245, preference: 1000 };

fn loopback_up() {
    linux::links::Links::of(&NetNs::current().unwrap()).unwrap().up("lo").unwrap();
}

fn socket() -> Socket {
    Socket::open(Protocol::Route).unwrap()
}

#[test]
fn rule_and_route_are_added_found_and_removed() {
    with_privilege(rule_and_route_are_added_found_and_removed, || {
        let mut socket = socket();
        loopback_up();
        for family in [IpFamily::V4, IpFamily::V6] {
            let missing = OURS.missing(&mut socket, family).unwrap().unwrap();
            assert!(missing.ends_with("rule pref 1000 fwmark 0x6a6d0002 lookup 27245 is missing"));
            for _again in 0..2 {
                OURS.add(&mut socket, family).unwrap();
                assert_eq!(OURS.missing(&mut socket, family).unwrap(), None);
            }
            for _again in 0..2 {
                OURS.remove(&mut socket, family).unwrap();
                assert!(OURS.missing(&mut socket, family).unwrap().is_some());
            }
        }
    });
}

#[test]
fn another_mark_table_or_place_is_not_ours() {
    with_privilege(another_mark_table_or_place_is_not_ours, || {
        let mut socket = socket();
        loopback_up();
        OURS.add(&mut socket, IpFamily::V4).unwrap();
        let others = [
            LocalDelivery { mark: 1, ..OURS },
            LocalDelivery { table: 27246, ..OURS },
            LocalDelivery { preference: 999, ..OURS },
        ];
        for other in others {
            assert!(other.missing(&mut socket, IpFamily::V4).unwrap().is_some(), "{other:?}");
        }
        assert!(OURS.missing(&mut socket, IpFamily::V6).unwrap().is_some());
    });
}

#[test]
fn a_rule_whose_mark_nobody_knows_any_more_goes_with_the_next() {
    with_privilege(a_rule_whose_mark_nobody_knows_any_more_goes_with_the_next, || {
        let mut socket = socket();
        loopback_up();
        let (forgotten, others) = (LocalDelivery { mark: 1, ..OURS }, LocalDelivery { preference: 999, ..OURS });
        for family in [IpFamily::V4, IpFamily::V6] {
            let mut missing = |it: LocalDelivery| it.missing(&mut socket, family).unwrap();
            others.add(&mut self::socket(), family).unwrap();
            forgotten.add(&mut self::socket(), family).unwrap();
            OURS.add(&mut self::socket(), family).unwrap();
            assert!(missing(forgotten).is_some());
            assert_eq!([missing(OURS), missing(others)], [None, None]);
            forgotten.remove(&mut self::socket(), family).unwrap();
            assert!(missing(OURS).unwrap().contains("the rule"), "whoever takes it away need not know the mark");
        }
    });
}

#[test]
fn a_missing_route_is_seen_while_the_rule_stands() {
    with_privilege(a_missing_route_is_seen_while_the_rule_stands, || {
        let mut socket = socket();
        loopback_up();
        OURS.add(&mut socket, IpFamily::V4).unwrap();
        OURS.add(&mut socket, IpFamily::V6).unwrap();
        // A second rule for the same table keeps the table while the route goes.
        let flushed = std::process::Command::new("ip").args(["route", "flush", "table", "27245"]).status();
        if !flushed.is_ok_and(|status| status.success()) {
            return;
        }
        let missing = OURS.missing(&mut socket, IpFamily::V4).unwrap().unwrap();
        assert_eq!(missing, "the route ip -4 route local default dev lo table 27245 is missing");
        assert_eq!(OURS.missing(&mut socket, IpFamily::V6).unwrap(), None);
    });
}

#[test]
fn a_refusal_has_the_kernels_own_words() {
    with_privilege(a_refusal_has_the_kernels_own_words, || {
        loopback_up();
        let namespace = NetNs::current().unwrap();
        let mut links = linux::links::Links::of(&namespace).unwrap();
        let gateway = "192.0.2.1".parse().unwrap();
        let error = links.add_route("10.0.0.0/8".parse().unwrap(), Some(gateway), "lo").unwrap_err();
        assert!(error.to_string().ends_with("(os error 101) (Nexthop has invalid gateway)"), "{error}");
    });
}

#[test]
fn the_gateways_are_those_of_the_default_routes() {
    with_privilege(the_gateways_are_those_of_the_default_routes, || {
        let namespace = NetNs::current().unwrap();
        let mut links = linux::links::Links::of(&namespace).unwrap();
        links.up("lo").unwrap();
        assert_eq!(linux::links::gateways(&mut socket()).unwrap(), Vec::<std::net::IpAddr>::new());
        links.add_veth("eth0", "other", &namespace).unwrap();
        for name in ["other", "eth0"] {
            links.up(name).unwrap();
        }
        for (address, gateway, everywhere, elsewhere) in
            [("10.1.0.5/24", "10.1.0.1", "0.0.0.0/0", "10.9.0.0/16"), ("fd01::5/64", "fd01::1", "::/0", "fd09::/64")]
        {
            links.add_address("eth0", address.parse().unwrap()).unwrap();
            let gateway = gateway.parse().unwrap();
            links.add_route(everywhere.parse().unwrap(), Some(gateway), "eth0").unwrap();
            // Not every gateway is the node.
            let other = if gateway.is_ipv4() { "10.1.0.9" } else { "fd01::9" }.parse().unwrap();
            links.add_route(elsewhere.parse().unwrap(), Some(other), "eth0").unwrap();
        }
        let expected = ["10.1.0.1", "fd01::1"].map(|address| address.parse::<std::net::IpAddr>().unwrap());
        assert_eq!(linux::links::gateways(&mut socket()).unwrap(), expected);
    });
}
