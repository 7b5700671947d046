//! What kube-proxy does: on each node, connections to a Service's address go to one of its endpoints.
//!
//! For the node itself and for pods that are not captured. Captured ones dial endpoints: their proxy has chosen already.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use linux::netlink::{Protocol, Socket};
use linux::netns::NetNs;
use linux::nft::{self, Chain, ChainKind, Compare, Expression as E, Hook, HookPoint, Policy, Rule, Table};
use manifests::Object;
use manifests::k8s_openapi::api::core::v1::Service;
use manifests::k8s_openapi::api::discovery::v1::EndpointSlice;

use crate::endpoints::SERVICE_NAME;

const TABLE: &str = "kube-proxy";
const DESTINATION_NAT: i32 = -100;
const FILTER: i32 = 0;
const SOURCE_NAT: i32 = 100;

/// What a node is to do about Services: for each address and port, its endpoints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Services(BTreeMap<SocketAddr, Vec<SocketAddr>>);

impl Services {
    /// From Services and EndpointSlices.
    pub(crate) fn of<'a>(objects: impl Iterator<Item = &'a Object> + Clone) -> Services {
        let mut services = BTreeMap::new();
        for object in objects.clone() {
            let Object::Service(service) = object else { continue };
            let slices = objects.clone().filter_map(|object| match object {
                Object::EndpointSlice(slice) if is_of(slice, service) => Some(slice.as_ref()),
                _ => None,
            });
            add_service(&mut services, service, slices);
        }
        Services(services)
    }

    /// Loads them on a node.
    pub(crate) fn load(&self, node: &NetNs) -> anyhow::Result<()> {
        let table = self.table();
        node.enter(|| -> anyhow::Result<()> { Ok(nft::replace(&mut Socket::open(Protocol::Netfilter)?, &table)?) })?
    }

    fn table(&self) -> Table {
        let chain = |name: &str, kind, point, priority, rules| Chain {
            name: name.to_owned(),
            hook: Some(Hook { kind, point, priority, policy: Policy::Accept }),
            rules,
        };
        let (translate, refuse) = (self.translations(), self.refusals());
        Table {
            name: TABLE.to_owned(),
            timeouts: Vec::new(),
            sets: Vec::new(),
            chains: vec![
                chain("services", ChainKind::Nat, HookPoint::Prerouting, DESTINATION_NAT, translate.clone()),
                chain("own", ChainKind::Nat, HookPoint::Output, DESTINATION_NAT, translate),
                chain("nobody", ChainKind::Filter, HookPoint::Forward, FILTER, refuse.clone()),
                chain("nobody_own", ChainKind::Filter, HookPoint::Output, FILTER, refuse),
                chain("hairpin", ChainKind::Nat, HookPoint::Postrouting, SOURCE_NAT, self.hairpins()),
            ],
        }
    }

    /// Of n endpoints the first is taken in one of n cases, the second in one of the n - 1 that are left, and so on.
    fn translations(&self) -> Vec<Rule> {
        let mut rules = Vec::new();
        for (service, endpoints) in &self.0 {
            for (endpoint, left) in endpoints.iter().zip((1..=endpoints.len() as u32).rev()) {
                let mut expressions = to(*service);
                if left > 1 {
                    expressions.push(E::Chance { below: 1, of: left });
                }
                expressions.push(E::Dnat(*endpoint));
                rules.push(Rule::new("an endpoint of the Service", expressions));
            }
        }
        rules
    }

    fn refusals(&self) -> Vec<Rule> {
        let empty = self.0.iter().filter(|(_, endpoints)| endpoints.is_empty());
        let refuse = |service: &SocketAddr| {
            let mut expressions = to(*service);
            expressions.push(E::RejectWithReset);
            Rule::new("the Service has no endpoint", expressions)
        };
        empty.map(|(service, _)| refuse(service)).collect()
    }

    /// A pod that reaches itself through its Service would take the answer for a stranger's.
    fn hairpins(&self) -> Vec<Rule> {
        let endpoints: std::collections::BTreeSet<IpAddr> = self.0.values().flatten().map(SocketAddr::ip).collect();
        let hairpin = |endpoint: IpAddr| {
            let network = IpNet::from(endpoint);
            Rule::new(
                "a pod that reaches itself through its Service",
                [E::Source(Compare::Is, network), E::Destination(Compare::Is, network), E::Masquerade],
            )
        };
        endpoints.into_iter().map(hairpin).collect()
    }
}

fn to(service: SocketAddr) -> Vec<E> {
    vec![E::Destination(Compare::Is, IpNet::from(service.ip())), E::DestinationPort(Compare::Is, service.port())]
}

fn is_of(slice: &EndpointSlice, service: &Service) -> bool {
    slice.metadata.namespace == service.metadata.namespace
        && slice.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME)) == service.metadata.name.as_ref()
}

fn add_service<'a>(
    services: &mut BTreeMap<SocketAddr, Vec<SocketAddr>>,
    service: &Service,
    slices: impl Iterator<Item = &'a EndpointSlice> + Clone,
) {
    let spec = service.spec.as_ref();
    let addresses = spec.and_then(|spec| spec.cluster_ips.as_ref()).into_iter().flatten();
    for address in addresses.filter_map(|text| text.parse::<IpAddr>().ok()) {
        let ports = spec.and_then(|spec| spec.ports.as_ref()).into_iter().flatten();
        for port in ports.filter(|port| port.protocol.as_deref().unwrap_or("TCP") == "TCP") {
            let Ok(number) = u16::try_from(port.port) else { continue };
            let endpoints = slices.clone().flat_map(|slice| endpoints(slice, port.name.as_deref(), address.is_ipv4()));
            services.insert(SocketAddr::new(address, number), endpoints.collect());
        }
    }
}

/// The usable endpoints of a slice for a port of the Service, in the family that is asked for.
fn endpoints(slice: &EndpointSlice, port: Option<&str>, v4: bool) -> Vec<SocketAddr> {
    // A port without a name has the empty one in some slices, and none in others.
    let wanted = port.unwrap_or_default();
    let ports = slice.ports.iter().flatten();
    let number = ports
        .filter(|candidate| candidate.name.as_deref().unwrap_or_default() == wanted)
        .find_map(|candidate| u16::try_from(candidate.port?).ok());
    let Some(number) = number else { return Vec::new() };
    let ready = slice
        .endpoints
        .iter()
        .filter(|endpoint| endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true));
    ready
        .filter_map(|endpoint| endpoint.addresses.first()?.parse::<IpAddr>().ok())
        .filter(|address| address.is_ipv4() == v4)
        .map(|address| SocketAddr::new(address, number))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn services(yaml: &str) -> Services {
        let parsed = manifests::parse("test", yaml);
        assert!(parsed.problems.is_empty(), "{:?}", parsed.problems);
        let objects: Vec<_> = parsed.objects.into_iter().map(|(object, _)| object).collect();
        Services::of(objects.iter())
    }

    const SERVICE: &str = "{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, spec: {clusterIP: \
                           10.96.0.10, clusterIPs: [10.96.0.10, 'fd96::a'], ports: [{name: http, port: 80}]}}\n---\n";

    fn slice(ready: &str) -> String {
        format!(
            "{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {{name: web-1, namespace: shop, labels: \
             {{kubernetes.io/service-name: web}}}}, addressType: IPv4, ports: [{{name: http, port: 8080}}], endpoints: \
             [{{addresses: [10.88.16.2]}}, {{addresses: [10.88.16.3], conditions: {{ready: {ready}}}}}]}}"
        )
    }

    #[test]
    fn each_endpoint_that_is_ready_gets_its_share() {
        let both = services(&format!("{SERVICE}{}", slice("true")));
        let v4 = &both.0[&"10.96.0.10:80".parse().unwrap()];
        assert_eq!(v4.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.88.16.2:8080", "10.88.16.3:8080"]);
        let chances: Vec<_> = both.translations().iter().map(|rule| rule.expressions.len()).collect();
        assert_eq!(chances, [4, 3], "the last one takes what is left");
        let one = services(&format!("{SERVICE}{}", slice("false")));
        assert_eq!(one.0[&"10.96.0.10:80".parse().unwrap()].len(), 1);
    }

    #[test]
    fn a_service_without_endpoints_refuses() {
        let none = services(SERVICE);
        assert_eq!(none.refusals().len(), 2, "one for each family");
        assert!(none.translations().is_empty());
        assert!(services(&format!("{SERVICE}{}", slice("true"))).refusals().len() == 1, "IPv6 has none still");
    }
}
