//! PeerAuthentication as Istio documents it.

use mesh::Mode::{self, Permissive, Strict};

use super::{apply, assert_no_problems, assert_problem, delete, index, peer_authentication, pod, workload};

fn shop() -> String {
    pod("shop", "web", "10.88.16.5", "  labels: {app: web}", "")
}

#[test]
fn without_a_policy_everything_is_permissive() {
    let index = index(&shop());
    assert_eq!(workload(&index, "shop", "web").modes.at(80), Permissive);
}

/// Mesh, namespace, workload and port against the documented order, in all combinations.
#[test]
fn the_narrowest_scope_that_says_anything_decides() {
    let modes = [None, Some("UNSET"), Some("DISABLE"), Some("PERMISSIVE"), Some("STRICT")];
    let meant = |mode: Option<&str>| match mode {
        Some("STRICT") => Some(Strict),
        Some("PERMISSIVE" | "DISABLE") => Some(Permissive),
        _ => None,
    };
    for mesh in modes {
        for own in modes {
            for workload_mode in modes {
                for port in modes {
                    let mut text = shop();
                    if let Some(mode) = mesh {
                        text += &peer_authentication("justmtls-system", "mesh", &format!("{{mtls: {{mode: {mode}}}}}"));
                    }
                    if let Some(mode) = own {
                        text += &peer_authentication("shop", "own", &format!("{{mtls: {{mode: {mode}}}}}"));
                    }
                    let mtls = workload_mode.map(|mode| format!(", mtls: {{mode: {mode}}}")).unwrap_or_default();
                    let ports =
                        port.map(|mode| format!(", portLevelMtls: {{\"80\": {{mode: {mode}}}}}")).unwrap_or_default();
                    if workload_mode.or(port).is_some() {
                        let spec = format!("{{selector: {{matchLabels: {{app: web}}}}{mtls}{ports}}}");
                        text += &peer_authentication("shop", "web", &spec);
                    }
                    let expected: Mode = meant(workload_mode).or(meant(own)).or(meant(mesh)).unwrap_or(Permissive);
                    let index = index(&text);
                    let resolved = &workload(&index, "shop", "web").modes;
                    assert_eq!(resolved.at(443), expected, "{text}");
                    assert_eq!(resolved.at(80), meant(port).unwrap_or(expected), "{text}");
                }
            }
        }
    }
}

#[test]
fn a_policy_speaks_for_its_own_namespace_and_labels_alone() {
    let text = shop()
        + &peer_authentication("bank", "default", "{mtls: {mode: STRICT}}")
        + &peer_authentication("shop", "db", "{selector: {matchLabels: {app: db}}, mtls: {mode: STRICT}}");
    let index = index(&text);
    assert_eq!(workload(&index, "shop", "web").modes.at(80), Permissive);
    assert_no_problems(&index);
}

#[test]
fn the_oldest_policy_of_a_scope_counts_and_then_the_first_by_name() {
    let strict = "{mtls: {mode: STRICT}}";
    let permissive = "{mtls: {mode: PERMISSIVE}}";
    let created = |text: String, year: u32| {
        text.replace("metadata: {", &format!("metadata: {{creationTimestamp: \"{year}-01-01T00:00:00Z\", "))
    };
    for (first, second, expected) in [
        (
            created(peer_authentication("shop", "a", permissive), 2026),
            created(peer_authentication("shop", "b", strict), 2025),
            Strict,
        ),
        (
            created(peer_authentication("shop", "a", strict), 2025),
            created(peer_authentication("shop", "b", permissive), 2026),
            Strict,
        ),
        (peer_authentication("shop", "a", strict), peer_authentication("shop", "b", permissive), Strict),
        (peer_authentication("shop", "a", permissive), peer_authentication("shop", "b", strict), Permissive),
    ] {
        for text in [shop() + &first + &second, shop() + &second + &first] {
            let index = index(&text);
            assert_eq!(workload(&index, "shop", "web").modes.at(80), expected, "{text}");
            assert_problem(&index, "PeerAuthentication shop/", "comes before it for the same pods");
        }
    }
}

#[test]
fn a_selector_in_the_root_namespace_selects_nothing_and_says_so() {
    let text = shop()
        + &peer_authentication("justmtls-system", "web", "{selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}}");
    let index = index(&text);
    assert_eq!(workload(&index, "shop", "web").modes.at(80), Permissive);
    assert_problem(&index, "PeerAuthentication justmtls-system/web", "selects nothing");
}

#[test]
fn strict_for_the_whole_mesh_under_istio_is_for_one_namespace_here_and_says_so() {
    let strict = "{mtls: {mode: STRICT}}";
    let text = shop() + &pod("istio-system", "istiod", "10.88.16.6", "", "");
    let elsewhere = index(&(text.clone() + &peer_authentication("istio-system", "default", strict)));
    assert_eq!(workload(&elsewhere, "shop", "web").modes.at(80), Permissive);
    assert_eq!(workload(&elsewhere, "istio-system", "istiod").modes.at(80), Strict);
    assert_problem(&elsewhere, "PeerAuthentication istio-system/default", "put it into justmtls-system");
    let ours = index(&(text.clone() + &peer_authentication("justmtls-system", "default", strict)));
    assert_eq!(workload(&ours, "shop", "web").modes.at(80), Strict);
    assert_no_problems(&ours);
    let selects = "{selector: {matchLabels: {app: istiod}}, mtls: {mode: STRICT}}";
    assert_no_problems(&index(&(text + &peer_authentication("istio-system", "istiod", selects))));
}

#[test]
fn disable_is_permissive_and_says_so() {
    let index = index(&(shop() + &peer_authentication("shop", "default", "{mtls: {mode: DISABLE}}")));
    assert_eq!(workload(&index, "shop", "web").modes.at(80), Permissive);
    assert_problem(&index, "PeerAuthentication shop/default", "DISABLE is taken as PERMISSIVE");
}

#[test]
fn a_deleted_policy_stops_counting() {
    let mut index = index(&(shop() + &peer_authentication("justmtls-system", "default", "{mtls: {mode: STRICT}}")));
    assert_eq!(workload(&index, "shop", "web").modes.at(80), Strict);
    assert_eq!(delete(&mut index, "PeerAuthentication", "justmtls-system", "default").len(), 1);
    assert_eq!(workload(&index, "shop", "web").modes.at(80), Permissive);
}

#[test]
fn a_change_of_labels_changes_the_mode() {
    let text =
        shop() + &peer_authentication("shop", "db", "{selector: {matchLabels: {app: db}}, mtls: {mode: STRICT}}");
    let mut index = index(&text);
    apply(&mut index, &shop().replace("app: web", "app: db"));
    assert_eq!(workload(&index, "shop", "web").modes.at(80), Strict);
}
