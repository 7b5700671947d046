//! What the API server calls, and from where.

use mesh::{Check, Probe};

use super::super::Index;
use super::{apply, assert_no_problems, assert_problem, delete, index, pod};

fn webhook(kind: &str, service: &str) -> String {
    format!(
        "---\napiVersion: admissionregistration.k8s.io/v1\nkind: {kind}\nmetadata: {{name: hooks}}\nwebhooks:\n- name: a.example.org\n  \
         sideEffects: None\n  admissionReviewVersions: [v1]\n  clientConfig: {{service: {service}}}\n"
    )
}

fn api(service: &str) -> String {
    format!(
        "---\napiVersion: apiregistration.k8s.io/v1\nkind: APIService\nmetadata: {{name: v1.example.org}}\nspec: {{group: example.org, \
         version: v1, groupPriorityMinimum: 100, versionPriority: 100, service: {service}}}\n"
    )
}

fn service(name: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{namespace: shop, name: {name}}}\nspec: {{clusterIP: 10.96.0.7, \
         ports: [{{name: https, port: 443}}, {{name: other, port: 8080}}]}}\n"
    )
}

fn slice(namespace: &str, service: &str, endpoint: &str) -> String {
    format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{namespace: {namespace}, name: {service}-1, \
         labels: {{kubernetes.io/service-name: {service}}}}}\naddressType: IPv4\nports: [{{name: https, port: 8443}}, \
         {{name: other, port: 8080}}]\nendpoints: [{endpoint}]\n"
    )
}

const WEB: &str = "{addresses: [10.88.16.5], conditions: {ready: false}}";

/// What is declared of shop/web.
fn declared(index: &Index) -> Vec<Probe> {
    let known = &index.views().node_pods["node-a"][&mesh::PodUid::from("uid-shop-web")];
    known.probes.iter().cloned().collect()
}

fn named(port: u16, name: &str) -> Probe {
    Probe { port, check: Check::ApiServer(Some(name.to_owned())) }
}

fn nameless(port: u16) -> Probe {
    Probe { port, check: Check::ApiServer(None) }
}

fn shop() -> Index {
    index(&(pod("shop", "web", "10.88.16.5", "", "") + &service("web") + &slice("shop", "web", WEB)))
}

#[test]
fn a_webhook_and_an_aggregated_api_are_declared_of_the_pods_behind_their_service_by_its_name() {
    let mut index = shop();
    assert_eq!(declared(&index), []);
    for kind in ["ValidatingWebhookConfiguration", "MutatingWebhookConfiguration"] {
        apply(&mut index, &webhook(kind, "{namespace: shop, name: web}"));
        assert_eq!(declared(&index), [named(8443, "web.shop.svc")], "{kind}: the port is 443 where none is named");
        apply(&mut index, &webhook(kind, "{namespace: shop, name: web, port: 8080}"));
        assert_eq!(declared(&index), [named(8080, "web.shop.svc")], "{kind}");
        for elsewhere in ["{namespace: shop, name: web, port: 1}", "{namespace: shop, name: other}"] {
            apply(&mut index, &webhook(kind, elsewhere));
            assert_eq!(declared(&index), [], "{kind} {elsewhere}");
        }
        delete(&mut index, kind, "", "hooks");
    }
    apply(&mut index, &api("{namespace: shop, name: web}"));
    assert_eq!(declared(&index), [nameless(8443), named(8443, "web.shop.svc")]);
    // Two objects that name the same: it goes with the last of them.
    apply(&mut index, &webhook("ValidatingWebhookConfiguration", "{namespace: shop, name: web}"));
    delete(&mut index, "APIService", "", "v1.example.org");
    assert_eq!(declared(&index), [named(8443, "web.shop.svc")]);
    delete(&mut index, "ValidatingWebhookConfiguration", "", "hooks");
    assert_eq!(declared(&index), []);
    assert_no_problems(&index);
}

#[test]
fn what_is_called_follows_the_service_its_slices_and_the_pod() {
    let mut index = shop();
    apply(&mut index, &webhook("ValidatingWebhookConfiguration", "{namespace: shop, name: web}"));
    let hook = [named(8443, "web.shop.svc")];
    apply(&mut index, &slice("shop", "web", "{addresses: [10.88.16.9]}"));
    assert_eq!(declared(&index), []);
    apply(&mut index, &slice("shop", "web", WEB));
    assert_eq!(declared(&index), hook);
    apply(&mut index, &service("web").replace("port: 443", "port: 444"));
    assert_eq!(declared(&index), []);
    apply(&mut index, &service("web"));
    assert_eq!(declared(&index), hook);
    apply(&mut index, &pod("shop", "web", "10.88.16.6", "", ""));
    assert_eq!(declared(&index), []);
    apply(&mut index, &pod("shop", "web", "10.88.16.5", "", ""));
    assert_eq!(declared(&index), hook);
    delete(&mut index, "Service", "shop", "web");
    assert_eq!(declared(&index), []);
}

#[test]
fn a_service_of_another_namespace_opens_no_pod() {
    let mut index = index(&pod("shop", "web", "10.88.16.5", "", ""));
    apply(&mut index, &service("web").replace("namespace: shop", "namespace: evil"));
    apply(&mut index, &webhook("ValidatingWebhookConfiguration", "{namespace: evil, name: web}"));
    apply(&mut index, &slice("evil", "web", WEB));
    assert_eq!(declared(&index), []);
}

#[test]
fn what_does_not_fit_beside_the_probes_is_left_out_and_said() {
    let mut index = shop();
    let hooks: String = (1..=65)
        .map(|number| {
            let name = format!("web{number}");
            let hook = webhook("ValidatingWebhookConfiguration", &format!("{{namespace: shop, name: {name}}}"));
            service(&name).replace("clusterIP: 10.96.0.7, ", "")
                + &slice("shop", &name, WEB)
                + &hook.replace("name: hooks", &format!("name: hooks{number}"))
        })
        .collect();
    apply(&mut index, &hooks);
    assert_eq!(declared(&index), []);
    assert_problem(&index, "Pod shop/web", "let fewer webhooks");
    delete(&mut index, "ValidatingWebhookConfiguration", "", "hooks65");
    assert_eq!(declared(&index).len(), 64);
    assert_no_problems(&index);
}

#[test]
fn where_an_overlay_shows_the_api_servers_node_by_another_address_that_is_learned_too() {
    let servers = |annotations: &str| {
        let node = |name: &str, address: &str, range: &str| {
            format!(
                "---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}, annotations: {{{annotations}}}}}\nspec: {{podCIDRs: \
                 [{range}]}}\nstatus: {{addresses: [{{type: InternalIP, address: {address}}}]}}\n"
            )
        };
        let index = index(
            &(node("node-a", "10.88.0.10", "10.88.16.0/24")
                + &node("node-b", "10.88.0.11", "10.88.17.0/24")
                + &slice("default", "kubernetes", "{addresses: [10.88.0.10]}")),
        );
        index.views().settings.api_servers.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(servers(""), ["10.88.0.10/32"]);
    assert_eq!(servers("flannel.alpha.coreos.com/backend-type: host-gw"), ["10.88.0.10/32"]);
    assert_eq!(servers("flannel.alpha.coreos.com/backend-type: vxlan"), ["10.88.0.10/32", "10.88.16.0/32"]);
    assert_eq!(servers("projectcalico.org/IPv4VXLANTunnelAddr: 10.88.16.1"), ["10.88.0.10/32", "10.88.16.1/32"]);
    assert_eq!(servers("network.cilium.io/ipv6-cilium-host: \"fd00::1\""), ["10.88.0.10/32", "fd00::1/128"]);
}

#[test]
fn from_where_the_api_server_calls_is_learned_and_added_to() {
    let servers =
        |index: &Index| index.views().settings.api_servers.iter().map(ToString::to_string).collect::<Vec<_>>();
    let mut index = index(
        "---\napiVersion: v1\nkind: Node\nmetadata: {name: node-a}\nspec: {podCIDRs: [10.88.16.0/24]}\nstatus: {addresses: \
         [{type: InternalIP, address: 10.88.0.10}, {type: InternalIP, address: \"fd00::10\"}]}\n",
    );
    assert_eq!(servers(&index), Vec::<String>::new());
    apply(&mut index, &slice("default", "kubernetes", "{addresses: [10.88.0.10]}, {addresses: [192.0.2.7]}"));
    assert_eq!(servers(&index), ["10.88.0.10/32", "192.0.2.7/32", "fd00::10/128"]);
    let config = |addresses: &str| {
        format!(
            "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{namespace: justmtls-system, name: justmtls}}\ndata: {{apiServerAddresses: \
             \"{addresses}\"}}\n"
        )
    };
    apply(&mut index, &config("10.90.0.0/16, 2001:db8::1"));
    let all = ["10.88.0.10/32", "10.90.0.0/16", "192.0.2.7/32", "2001:db8::1/128", "fd00::10/128"];
    assert_eq!(servers(&index), all);
    assert_no_problems(&index);
    apply(&mut index, &config("kubernetes.default"));
    assert_problem(&index, "ConfigMap justmtls-system/justmtls", "kubernetes.default is not an address such as");
    assert_eq!(servers(&index), all, "the last good value stays");
    delete(&mut index, "EndpointSlice", "default", "kubernetes-1");
    assert_eq!(servers(&index), ["10.90.0.0/16", "2001:db8::1/128"]);
}
