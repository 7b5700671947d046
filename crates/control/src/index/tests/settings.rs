//! Address classes and the settings' ConfigMap.

use mesh::AddressClass::{self, Inside, Mixed, Node, Outside};

use super::super::{Index, Told, trust_domain};
use super::{apply, assert_no_problems, assert_problem, delete, index, objects, pod};

fn config(data: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{namespace: justmtls-system, name: justmtls}}\ndata: {{{data}}}\n"
    )
}

fn node(name: &str, ranges: &str, address: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDRs: [{ranges}]}}\nstatus:\n  addresses: \
         [{{type: InternalIP, address: \"{address}\"}}, {{type: Hostname, address: {name}}}]\n"
    )
}

fn class(index: &Index, address: &str) -> AddressClass {
    index.views().settings.classify(address.parse().unwrap())
}

#[test]
fn ranges_of_pods_services_and_the_admin_are_inside_and_nodes_are_nodes() {
    let index = index(
        &(node("node-a", "10.88.16.0/24, \"fd88:16::/64\"", "10.88.0.10")
            + &config(
                "insideCIDRs: 10.1.0.0/16, mixedCIDRs: \"10.2.0.0/16, 10.3.0.0/16\", serviceCIDRs: 10.96.0.0/16",
            )),
    );
    for (address, expected) in [
        ("10.88.16.7", Inside),
        ("fd88:16::7", Inside),
        ("10.1.2.3", Inside),
        ("10.96.0.10", Inside),
        ("10.2.0.1", Mixed),
        ("10.3.0.1", Mixed),
        ("10.88.0.10", Node),
        ("192.0.2.1", Outside),
    ] {
        assert_eq!(class(&index, address), expected, "{address}");
    }
    assert_no_problems(&index);
}

#[test]
fn a_node_that_goes_takes_its_ranges_along() {
    let mut index = index(&node("node-a", "10.88.16.0/24", "10.88.0.10"));
    assert!(delete(&mut index, "Node", "", "node-a").contains(&Told::Settings));
    assert_eq!(class(&index, "10.88.16.7"), Outside);
}

#[test]
fn a_setting_that_cannot_be_read_keeps_its_last_value() {
    let mut index = index(&config("insideCIDRs: 10.1.0.0/16, excludedPorts: \"22 9100\""));
    apply(&mut index, &config("insideCIDRs: \"10.1.0.0/16,10.2.0.0/33\", excludedPorts: \"70000\""));
    assert_eq!(class(&index, "10.1.2.3"), Inside);
    assert_eq!(index.cluster.settings.excluded_ports(), [22, 9100]);
    assert_problem(&index, "ConfigMap justmtls-system/justmtls", "insideCIDRs: 10.2.0.0/33 is not a range");
    assert_problem(&index, "ConfigMap justmtls-system/justmtls", "excludedPorts: 70000 is not a port");
}

#[test]
fn excluded_ports_reach_the_agents_pods() {
    let mut index = index(&pod("shop", "web", "10.88.16.5", "", ""));
    let touched = apply(&mut index, &config("excludedPorts: \"9100\""));
    assert!(touched.contains(&Told::NodePod("node-a".to_owned(), "uid-shop-web".into())));
    assert_eq!(index.views().node_pods["node-a"].values().next().unwrap().excluded_ports, [9100]);
}

#[test]
fn the_trust_domain_is_read_once_and_a_change_is_a_problem() {
    assert_eq!(trust_domain(objects("").iter()).unwrap().as_str(), "cluster.local");
    assert_eq!(trust_domain(objects(&config("trustDomain: example.org")).iter()).unwrap().as_str(), "example.org");
    let problem = trust_domain(objects(&config("trustDomain: Example.org")).iter()).unwrap_err().to_string();
    assert!(problem.contains("Example.org is not a trust domain"), "{problem}");
    let index = index(&(config("trustDomain: example.org") + &pod("shop", "web", "10.88.16.5", "", "")));
    assert_problem(&index, "ConfigMap justmtls-system/justmtls", "started with cluster.local and stays with it");
}

#[test]
fn a_node_without_pod_ranges_is_a_problem_unless_the_admin_lists_some() {
    let mut index = index(&node("node-a", "", "10.88.0.10"));
    assert_problem(&index, "Node node-a", "would count as outside");
    apply(&mut index, &config("mixedCIDRs: 10.88.0.0/16"));
    assert_no_problems(&index);
}
