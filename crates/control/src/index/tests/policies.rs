//! AuthorizationPolicy: exactly, or refusing (D13).

use std::collections::BTreeMap;

use manifests::{Kind, ObjectKey};
use mesh::{Action, Clause, Match, Policy, Rule, Scope, ServiceAccountMatch, StringMatch};

use super::super::Index;
use super::{apply, assert_no_problems, assert_problem, delete, index, pod, workload};
use crate::problem::Severity;

fn policy(namespace: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{namespace: {namespace}, name: p}}\n\
         spec: {{{spec}}}\n"
    )
}

fn only(index: &Index) -> &Policy {
    let mut policies = index.views().policies.values();
    let policy = policies.next().unwrap();
    assert!(policies.next().is_none());
    policy
}

fn rule(matches: &[Match]) -> Rule {
    Rule { clauses: matches.iter().map(|one| Clause { matches: vec![one.clone()] }).collect() }
}

#[test]
fn every_condition_on_connections_is_translated() {
    let spec = "action: DENY, rules: [{from: [{source: {principals: [\"cluster.local/ns/a/sa/b\", \"cluster.local/*\", \"*/sa/b\", \
                \"*\"], notNamespaces: [bad], ipBlocks: [10.0.0.1, 10.1.0.0/16], notIpBlocks: [\"fd00::/8\"]}}, {source: \
                {serviceAccounts: [web, bank/teller]}}], to: [{operation: {ports: [\"80\"], notPorts: [\"81\"]}}], when: [{key: \
                destination.ip, values: [10.2.0.1]}, {key: source.namespace, notValues: [x]}]}]";
    let index = index(&policy("shop", spec));
    let sources = vec![
        Match {
            principals: vec![
                StringMatch::Exact("cluster.local/ns/a/sa/b".into()),
                StringMatch::Prefix("cluster.local/".into()),
                StringMatch::Suffix("/sa/b".into()),
                StringMatch::Presence,
            ],
            not_namespaces: vec![StringMatch::Exact("bad".into())],
            source_ips: vec!["10.0.0.1/32".parse().unwrap(), "10.1.0.0/16".parse().unwrap()],
            not_source_ips: vec!["fd00::/8".parse().unwrap()],
            ..Match::default()
        },
        Match {
            service_accounts: vec![
                ServiceAccountMatch { namespace: "shop".into(), service_account: "web".into() },
                ServiceAccountMatch { namespace: "bank".into(), service_account: "teller".into() },
            ],
            ..Match::default()
        },
    ];
    let operation = Match { destination_ports: vec![80], not_destination_ports: vec![81], ..Match::default() };
    let to = Match { destination_ips: vec!["10.2.0.1/32".parse().unwrap()], ..Match::default() };
    let namespace = Match { not_namespaces: vec![StringMatch::Exact("x".into())], ..Match::default() };
    let mut expected = rule(&[operation, to, namespace]);
    expected.clauses.insert(0, Clause { matches: sources });
    assert_eq!(only(&index).action, Action::Deny);
    assert_eq!(only(&index).rules, [expected]);
    assert_no_problems(&index);
}

#[test]
fn every_key_of_conditions_is_translated() {
    let with = |change: fn(&mut Match)| {
        let mut one = Match::default();
        change(&mut one);
        one
    };
    let cases: [(&str, &str, Match); 6] = [
        ("source.ip", "10.0.0.1", with(|m| m.source_ips = vec!["10.0.0.1/32".parse().unwrap()])),
        ("source.namespace", "a*", with(|m| m.namespaces = vec![StringMatch::Prefix("a".into())])),
        ("source.principal", "*b", with(|m| m.principals = vec![StringMatch::Suffix("b".into())])),
        (
            "source.serviceAccount",
            "web",
            with(|m| {
                m.service_accounts =
                    vec![ServiceAccountMatch { namespace: "shop".into(), service_account: "web".into() }];
            }),
        ),
        ("destination.ip", "10.0.0.0/8", with(|m| m.destination_ips = vec!["10.0.0.0/8".parse().unwrap()])),
        ("destination.port", "80", with(|m| m.destination_ports = vec![80])),
    ];
    for (key, value, expected) in cases {
        let index = index(&policy("shop", &format!("rules: [{{when: [{{key: {key}, values: [\"{value}\"]}}]}}]")));
        assert_eq!(only(&index).rules, [rule(&[expected])], "{key}");
    }
}

#[test]
fn a_policy_without_rules_and_one_with_an_empty_rule_say_opposite_things() {
    assert!(only(&index(&policy("shop", ""))).rules.is_empty());
    assert_eq!(only(&index(&policy("shop", "rules: [{}]"))).rules, [Rule::default()]);
}

#[test]
fn what_cannot_be_enforced_denies_everything_and_says_why() {
    let source = |field: &str| format!("rules: [{{from: [{{source: {{namespaces: [a], {field}}}}}]}}]");
    let operation = |field: &str| format!("rules: [{{to: [{{operation: {{ports: [\"80\"], {field}}}}}]}}]");
    let condition = |key: &str| format!("rules: [{{when: [{{key: \"{key}\", values: [a]}}]}}]");
    let cases = [
        ("action: CUSTOM, provider: {name: x}, rules: [{}]".to_owned(), "action CUSTOM"),
        ("targetRefs: [{kind: Service, group: \"\", name: web}], rules: [{}]".to_owned(), "targetRefs"),
        (source("requestPrincipals: [\"*\"]"), "requestPrincipals"),
        (source("notRequestPrincipals: [\"*\"]"), "notRequestPrincipals"),
        (source("remoteIpBlocks: [10.0.0.1]"), "remoteIpBlocks"),
        (source("notRemoteIpBlocks: [10.0.0.1]"), "notRemoteIpBlocks"),
        (operation("methods: [GET]"), "methods"),
        (operation("notMethods: [GET]"), "notMethods"),
        (operation("paths: [/]"), "paths"),
        (operation("notPaths: [/]"), "notPaths"),
        (operation("hosts: [a]"), "hosts"),
        (operation("notHosts: [a]"), "notHosts"),
        (condition("request.headers[x]"), "request.headers[x]"),
        (condition("request.auth.claims[iss]"), "request.auth.claims[iss]"),
        (condition("connection.sni"), "connection.sni"),
        (condition("remote.ip").replace("[a]", "[10.0.0.1]"), "remote.ip"),
        (source("principals: [\"spiffe://cluster.local/ns/a/sa/b\"]"), "without spiffe://"),
    ];
    for (spec, why) in cases {
        let text = policy("shop", &spec) + &pod("shop", "web", "10.88.16.5", "", "");
        let index = index(&text);
        assert_eq!((only(&index).action, &only(&index).rules[..]), (Action::Deny, &[Rule::default()][..]), "{spec}");
        assert_eq!(only(&index).scope, Scope::Namespace);
        assert_problem(&index, "AuthorizationPolicy shop/p", why);
    }
}

#[test]
fn a_policy_reaches_its_scope_and_a_selected_pod_names_it() {
    let select = "selector: {matchLabels: {app: web}}";
    let pods = pod("shop", "web", "10.88.16.5", "  labels: {app: web}", "")
        + &pod("bank", "web", "10.88.16.6", "  labels: {app: web}", "");
    for (namespace, spec, scope, in_shop, in_bank) in [
        ("justmtls-system", "", Scope::Mesh, 0, 0),
        ("shop", "", Scope::Namespace, 0, 0),
        ("shop", select, Scope::Selected, 1, 0),
        ("justmtls-system", select, Scope::Selected, 1, 1),
        ("shop", "selector: {matchLabels: {app: db}}", Scope::Selected, 0, 0),
    ] {
        let mut index = index(&(pods.clone() + &policy(namespace, spec)));
        assert_eq!(only(&index).scope, scope, "{namespace} {spec}");
        assert_eq!(workload(&index, "shop", "web").policies.len(), in_shop, "{namespace} {spec}");
        assert_eq!(workload(&index, "bank", "web").policies.len(), in_bank, "{namespace} {spec}");
        delete(&mut index, "AuthorizationPolicy", namespace, "p");
        assert!(index.views().policies.is_empty());
        assert!(workload(&index, "shop", "web").policies.is_empty());
    }
}

fn key(namespace: &str) -> ObjectKey {
    ObjectKey { kind: Kind::AuthorizationPolicy, namespace: Some(namespace.to_owned()), name: "p".to_owned() }
}

#[test]
fn a_policy_that_was_never_readable_refuses_all_of_its_scope_until_it_is() {
    for (namespace, scope) in [("shop", Scope::Namespace), ("justmtls-system", Scope::Mesh)] {
        let mut index = index("");
        let unreadable = BTreeMap::from([(key(namespace), BTreeMap::new())]);
        assert_eq!(index.unreadable(&unreadable).len(), 1);
        assert!(index.unreadable(&unreadable).is_empty());
        let expected = (scope, Action::Deny, vec![Rule::default()]);
        let policy_now = only(&index);
        assert_eq!((policy_now.scope, policy_now.action, policy_now.rules.clone()), expected);
        assert_problem(&index, &key(namespace).to_string(), "cannot be read");

        let mut gone = self::index("");
        gone.unreadable(&unreadable);
        gone.unreadable(&BTreeMap::new());
        assert!(gone.views().policies.is_empty());
        assert_no_problems(&gone);

        apply(&mut index, &policy(namespace, "rules: [{}]"));
        index.unreadable(&BTreeMap::new());
        assert_eq!(only(&index).action, Action::Allow);
        assert_no_problems(&index);
    }
}

#[test]
fn a_dry_run_is_enforced_and_says_so() {
    let text = policy("shop", "rules: [{}]").replace("name: p}", "name: p, annotations: {istio.io/dry-run: \"true\"}}");
    assert_problem(&index(&text), "AuthorizationPolicy shop/p", "istio.io/dry-run is not supported");
}

#[test]
fn of_a_policy_that_selects_and_was_never_readable_the_pods_beside_know_nothing() {
    let app = |app: &str| BTreeMap::from([("app".to_owned(), app.to_owned())]);
    for (namespace, in_bank) in [("shop", 0), ("justmtls-system", 1)] {
        let mut index = index(
            &(pod("shop", "redis", "10.88.16.5", "  labels: {app: redis}", "")
                + &pod("shop", "web", "10.88.16.6", "  labels: {app: web}", "")
                + &pod("bank", "redis", "10.88.16.7", "  labels: {app: redis}", "")),
        );
        let named = |index: &Index| {
            [("shop", "redis"), ("shop", "web"), ("bank", "redis")]
                .map(|(namespace, name)| workload(index, namespace, name).policies.len())
        };
        index.unreadable(&BTreeMap::from([(key(namespace), app("redis"))]));
        let policy_now = only(&index);
        assert_eq!((policy_now.scope, policy_now.action), (Scope::Selected, Action::Deny));
        assert_eq!(policy_now.rules, [Rule::default()]);
        assert_eq!(named(&index), [1, 0, in_bank]);
        assert_problem(&index, &key(namespace).to_string(), "every connection to pods that it selects is refused");
        // Written anew, and still not to be read: it is the last that counts.
        index.unreadable(&BTreeMap::from([(key(namespace), app("web"))]));
        assert_eq!(named(&index), [0, 1, 0]);
        index.unreadable(&BTreeMap::from([(key(namespace), BTreeMap::new())]));
        assert_ne!(only(&index).scope, Scope::Selected);
        index.unreadable(&BTreeMap::new());
        assert_eq!(named(&index), [0, 0, 0]);
        assert_no_problems(&index);
    }
}

#[test]
fn a_policy_that_audits_decides_nothing_and_says_so() {
    let nobody = "from: [{source: {principals: [cluster.local/ns/no/sa/body]}}]";
    for spec in [
        format!("action: AUDIT, rules: [{{{nobody}}}]"),
        format!("selector: {{matchLabels: {{app: web}}}}, action: AUDIT, rules: [{{{nobody}}}]"),
        "action: AUDIT, rules: [{to: [{operation: {methods: [GET]}}]}]".to_owned(),
        "action: AUDIT".to_owned(),
    ] {
        let web = pod("shop", "web", "10.88.16.5", "  labels: {app: web}", "");
        let mut index = index(&(web + &policy("shop", &spec)));
        assert!(index.views().policies.is_empty(), "{spec}");
        assert!(workload(&index, "shop", "web").policies.is_empty(), "{spec}");
        assert_problem(&index, "AuthorizationPolicy shop/p", "nothing is audited");
        assert!(index.problems().iter().all(|problem| problem.severity == Severity::Warning));
        // The same with another action counts, and stops to.
        apply(&mut index, &policy("shop", &spec.replace("AUDIT", "DENY")));
        assert_eq!(only(&index).action, Action::Deny);
        apply(&mut index, &policy("shop", &spec));
        assert!(index.views().policies.is_empty(), "{spec}");
    }
}

#[test]
fn for_the_whole_mesh_under_istio_is_for_one_namespace_here_and_says_so() {
    let deny = "action: DENY, rules: [{}]";
    let index_of = |namespace: &str, spec: &str| index(&policy(namespace, spec));
    let elsewhere = index_of("istio-system", deny);
    assert_eq!(only(&elsewhere).scope, Scope::Namespace);
    assert_problem(&elsewhere, "AuthorizationPolicy istio-system/p", "put it into justmtls-system");
    for (namespace, spec) in [
        ("justmtls-system", deny.to_owned()),
        ("shop", deny.to_owned()),
        ("istio-system", format!("selector: {{matchLabels: {{app: web}}}}, {deny}")),
    ] {
        assert_no_problems(&index_of(namespace, &spec));
    }
}
