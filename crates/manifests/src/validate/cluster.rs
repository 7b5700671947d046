//! Nodes, EndpointSlices and ConfigMaps.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use k8s_openapi::api::discovery::v1::EndpointSlice;

use crate::names::{CONFIG_KEY, LABEL, SUBDOMAIN};
use crate::problem::quoted;

use super::Checker;

pub(super) fn node(checker: &mut Checker<'_>, node: &Node) {
    if let Some(spec) = &node.spec {
        checker.key("spec", |checker| {
            let check = |checker: &mut Checker<'_>, cidr: &String| {
                if cidr.parse::<IpNet>().is_err() {
                    checker.error(
                        format!("{} is not a range of addresses", quoted(cidr)),
                        "write it as 10.0.0.0/24 or fd00::/64",
                    );
                }
            };
            if let Some(cidr) = spec.pod_cidr.as_ref().filter(|cidr| !cidr.is_empty()) {
                checker.key("podCIDR", |checker| check(checker, cidr));
            }
            checker.each("podCIDRs", spec.pod_cidrs.iter().flatten(), check);
        });
    }
    let addresses = node.status.as_ref().and_then(|status| status.addresses.as_deref()).unwrap_or_default();
    checker.key("status", |checker| {
        checker.each("addresses", addresses, |checker, address| {
            if address.type_.ends_with("IP") {
                checker.address("address", Some(&address.address));
            }
        });
    });
}

pub(super) fn endpoint_slice(checker: &mut Checker<'_>, slice: &EndpointSlice) {
    checker.word("addressType", Some(&slice.address_type), &["IPv4", "IPv6", "FQDN"]);
    checker.each("endpoints", &slice.endpoints, |checker, endpoint| {
        if endpoint.addresses.is_empty() {
            checker.missing("addresses", "write one address of the endpoint");
        }
        checker.optional_name("nodeName", endpoint.node_name.as_deref(), &SUBDOMAIN);
        checker.each("addresses", &endpoint.addresses, |checker, address| {
            let fits = match slice.address_type.as_str() {
                "IPv4" => address.parse::<Ipv4Addr>().is_ok(),
                "IPv6" => address.parse::<Ipv6Addr>().is_ok(),
                "FQDN" => (SUBDOMAIN.matches)(address),
                _ => true,
            };
            if !fits {
                let message = format!("{} is not an address of type {}", quoted(address), slice.address_type);
                checker.error(message, "write an address of that type, or another slice");
            }
        });
    });
    let mut names = BTreeSet::new();
    checker.each("ports", slice.ports.iter().flatten(), |checker, port| {
        if let Some(number) = port.port {
            checker.port("port", number);
        }
        checker.protocol(port.protocol.as_deref());
        let name = port.name.as_deref().unwrap_or_default();
        checker.optional_name("name", Some(name), &LABEL);
        checker.unique("name", &mut names, name, if name.is_empty() { "an empty name" } else { name });
    });
}

pub(super) fn config_map(checker: &mut Checker<'_>, map: &ConfigMap) {
    let data = map.data.iter().flat_map(|data| data.keys());
    for (field, key) in data
        .map(|key| ("data", key))
        .chain(map.binary_data.iter().flat_map(|data| data.keys()).map(|key| ("binaryData", key)))
    {
        if !(CONFIG_KEY.matches)(key) {
            checker
                .keys(&[field, key], |checker| checker.error("the key is not that of a ConfigMap", CONFIG_KEY.remedy));
        }
    }
}
