//! Services and who serves them, as kube-proxy sees it.

use std::net::IpAddr;

use mesh::{Affinity, Reach, Service, Uncaptured, Workload};

use super::super::Index;
use super::{apply, assert_no_problems, assert_problem, delete, index, pod, workload};

fn service(name: &str, spec: &str) -> String {
    format!("---\napiVersion: v1\nkind: Service\nmetadata: {{namespace: shop, name: {name}}}\nspec: {{{spec}}}\n")
}

const WEB: &str = "clusterIP: 10.96.0.7, clusterIPs: [10.96.0.7, \"fd96::7\"], ports: [{name: http, port: 80, targetPort: 8080}, \
                   {name: dns, port: 53, protocol: UDP}]";

/// Endpoints as `address/conditions`, all behind port 8080 named http.
fn slice(name: &str, endpoints: &[(&str, &str)]) -> String {
    let endpoint = |(address, conditions): &(&str, &str)| {
        format!(
            "{{addresses: [\"{address}\"], conditions: {{{conditions}}}, nodeName: node-a, targetRef: {{kind: Pod, name: x}}}}"
        )
    };
    let endpoints: Vec<_> = endpoints.iter().map(endpoint).collect();
    format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{namespace: shop, name: {name}, labels: \
         {{kubernetes.io/service-name: web}}}}\naddressType: IPv4\nports: [{{name: http, port: 8080}}]\nendpoints: [{}]\n",
        endpoints.join(", ")
    )
}

fn pods() -> String {
    pod("shop", "one", "10.88.16.5", "", "") + &pod("shop", "two", "10.88.16.6", "", "")
}

fn published<'a>(index: &'a Index, name: &str) -> &'a Service {
    index.views().services.values().find(|service| service.name.hostname.starts_with(&format!("{name}."))).unwrap()
}

fn serving(index: &Index) -> Vec<&str> {
    let serving = |workload: &&Workload| !workload.endpoints.is_empty();
    index.views().workloads.values().filter(serving).map(|workload| &*workload.name).collect()
}

fn addresses(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

#[test]
fn a_service_has_its_addresses_tcp_ports_affinity_and_reach() {
    let spec = format!("{WEB}, externalIPs: [192.0.2.7], sessionAffinity: ClientIP, internalTrafficPolicy: Local");
    let balancer = "status: {loadBalancer: {ingress: [{ip: 192.0.2.8}, {ip: 192.0.2.9, ipMode: Proxy}, {hostname: lb.example}]}}\n";
    let index = index(&(service("web", &spec) + balancer));
    let service = published(&index, "web");
    assert_eq!(service.name.to_string(), "shop/web.shop.svc.cluster.local");
    assert_eq!(service.addresses, addresses(&["10.96.0.7", "fd96::7", "192.0.2.7", "192.0.2.8"]));
    assert_eq!(service.ports.iter().map(|port| port.port).collect::<Vec<_>>(), [80]);
    assert_eq!((service.affinity, service.reach), (Affinity::ClientIp, Reach::Node));
    assert_no_problems(&index);
}

#[test]
fn a_headless_service_has_no_address_and_an_external_name_is_no_service() {
    let text = service("web", "clusterIP: None, ports: [{name: http, port: 80}]")
        + &service("alias", "type: ExternalName, externalName: example.org");
    let index = index(&text);
    assert_eq!(index.views().services.len(), 1);
    assert!(published(&index, "web").addresses.is_empty());
    assert_no_problems(&index);
}

#[test]
fn the_ready_endpoints_serve_under_the_port_that_the_slice_names() {
    let text = service("web", WEB)
        + &pods()
        + &slice("web-1", &[("10.88.16.5", "ready: true"), ("10.88.16.6", "ready: false")]);
    let index = index(&text);
    assert_eq!(serving(&index), ["one"]);
    let endpoint = &workload(&index, "shop", "one").endpoints[0];
    assert_eq!(endpoint.service, published(&index, "web").name);
    assert_eq!(
        endpoint.ports.iter().map(|port| (port.service_port, port.target_port)).collect::<Vec<_>>(),
        [(80, 8080)]
    );
}

#[test]
fn where_none_is_ready_those_that_serve_to_their_end_do() {
    let terminating = "ready: false, serving: true, terminating: true";
    for (first, second, expected) in [
        ("ready: true", terminating, &["one"][..]),
        ("ready: false", terminating, &["two"]),
        ("ready: false, serving: false, terminating: true", "ready: false", &[]),
        ("", "ready: false", &["one"]),
    ] {
        let text = service("web", WEB) + &pods() + &slice("web-1", &[("10.88.16.5", first), ("10.88.16.6", second)]);
        assert_eq!(serving(&index(&text)), expected, "{first} {second}");
    }
}

#[test]
fn a_service_that_stays_on_the_node_judges_each_node_by_itself() {
    let terminating = "ready: false, serving: true, terminating: true";
    let two_nodes = slice("web-1", &[("10.88.16.5", "ready: true")])
        + &slice("web-2", &[("10.88.16.6", terminating)]).replace("nodeName: node-a", "nodeName: node-b");
    let text = service("web", WEB) + &pods() + &two_nodes;
    assert_eq!(serving(&index(&text)), ["one"]);
    let local = service("web", &format!("{WEB}, internalTrafficPolicy: Local")) + &pods() + &two_nodes;
    assert_eq!(serving(&index(&local)), ["one", "two"]);
}

#[test]
fn readiness_of_one_pod_touches_it_and_those_it_stands_in_for() {
    let mut index =
        index(&(service("web", WEB) + &pods() + &slice("web-1", &[("10.88.16.5", ""), ("10.88.16.6", "")])));
    let touched = apply(&mut index, &slice("web-1", &[("10.88.16.5", ""), ("10.88.16.6", "ready: false")]));
    assert_eq!(touched.len(), 1);
    assert_eq!(serving(&index), ["one"]);
    delete(&mut index, "EndpointSlice", "shop", "web-1");
    assert!(serving(&index).is_empty());
}

#[test]
fn a_port_of_another_name_or_protocol_does_not_serve() {
    let text = service("web", WEB) + &pods() + &slice("web-1", &[("10.88.16.5", "")]);
    assert!(
        serving(&index(&text.replace("ports: [{name: http, port: 8080}]", "ports: [{name: grpc, port: 8080}]")))
            .is_empty()
    );
    assert!(
        serving(&index(
            &text
                .replace("{name: http, port: 8080}]\nendpoints", "{name: http, port: 8080, protocol: UDP}]\nendpoints")
        ))
        .is_empty()
    );
}

#[test]
fn an_endpoint_outside_of_the_cluster_is_a_workload_that_is_not_a_pod() {
    let bare = slice("web-1", &[("192.0.2.50", "")]).replace(", targetRef: {kind: Pod, name: x}", "");
    let mut index = index(&(service("web", WEB) + &bare));
    let workload = index.views().workloads.values().next().unwrap();
    assert_eq!(workload.uncaptured, Some(Uncaptured::NotAPod));
    assert_eq!(workload.addresses, addresses(&["192.0.2.50"]));
    assert!(workload.pod_uid.as_str().is_empty());
    assert_eq!(workload.endpoints.len(), 1);
    delete(&mut index, "Service", "shop", "web");
    assert!(index.views().workloads.is_empty());
}

#[test]
fn an_endpoint_whose_pod_has_not_come_yet_is_unknown_and_not_outside() {
    let mut index = index(&(service("web", WEB) + &slice("web-1", &[("192.0.2.50", "")])));
    assert!(index.views().workloads.is_empty());
    apply(&mut index, &pod("shop", "one", "192.0.2.50", "", ""));
    assert_eq!(serving(&index), ["one"]);
    assert_eq!(index.views().workloads.len(), 1);
}

#[test]
fn an_endpoint_in_the_pods_ranges_that_is_no_pod_is_a_problem() {
    let node = "---\napiVersion: v1\nkind: Node\nmetadata: {name: node-a}\nspec: {podCIDRs: [10.88.16.0/24]}\n";
    let bare = slice("web-1", &[("10.88.16.5", "")]).replace(", targetRef: {kind: Pod, name: x}", "");
    let mut index = index(&(service("web", WEB) + &bare + node));
    assert!(index.views().workloads.is_empty());
    assert_problem(&index, "EndpointSlice shop/web-1", "no pod has that address");
    apply(&mut index, &pod("shop", "one", "10.88.16.5", "", ""));
    assert_no_problems(&index);
}

#[test]
fn an_endpoint_in_the_hosts_network_is_called_so() {
    let text = service("web", WEB)
        + &pod("shop", "host", "10.88.0.10", "", "  hostNetwork: true")
        + &slice("web-1", &[("10.88.0.10", "")]);
    let index = index(&text);
    assert_eq!(serving(&index), ["10.88.0.10"]);
    let bare = index.views().workloads.values().find(|workload| workload.pod_uid.as_str().is_empty()).unwrap();
    assert_eq!(bare.uncaptured, Some(Uncaptured::HostNetwork));
}

#[test]
fn a_service_cannot_claim_what_is_anothers() {
    let thief = "clusterIP: 10.96.0.8, externalIPs: [10.96.0.7, 10.88.16.5, 192.0.2.1], ports: [{port: 80}]";
    let text = service("web", WEB)
        + &pods()
        + &service("thief", thief)
        + &service("zweiter", &thief.replace("10.96.0.8", "10.96.0.9"));
    let mut index = index(&text);
    assert_eq!(published(&index, "thief").addresses, addresses(&["10.96.0.8", "192.0.2.1"]));
    assert_eq!(published(&index, "zweiter").addresses, addresses(&["10.96.0.9"]));
    assert_problem(&index, "Service shop/thief", "10.96.0.7 belongs to Service shop/web");
    assert_problem(&index, "Service shop/thief", "10.88.16.5 belongs to a pod");
    assert_problem(&index, "Service shop/zweiter", "192.0.2.1 belongs to Service shop/thief");
    delete(&mut index, "Service", "shop", "thief");
    assert_eq!(published(&index, "zweiter").addresses, addresses(&["10.96.0.9", "192.0.2.1"]));
}
