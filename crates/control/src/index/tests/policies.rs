//! AuthorizationPolicy: exactly, or refusing (D13).

use std::collections::BTreeSet;

use manifests::{Kind, ObjectKey};
use mesh::{Action, Clause, Match, Policy, Rule, Scope, ServiceAccountMatch, StringMatch};

use super::super::Index;
use super::{apply, assert_no_problems, assert_problem, delete, index, pod, workload};

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
        ("action: AUDIT, rules: [{}]".to_owned(), "action AUDIT"),
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

#[test]
fn a_policy_that_was_never_readable_refuses_all_of_its_scope_until_it_is() {
    let key = |namespace: &str| ObjectKey {
        kind: Kind::AuthorizationPolicy,
        namespace: Some(namespace.to_owned()),
        name: "p".to_owned(),
    };
    for (namespace, scope) in [("shop", Scope::Namespace), ("justmtls-system", Scope::Mesh)] {
        let mut index = index("");
        let unreadable = BTreeSet::from([key(namespace)]);
        assert_eq!(index.unreadable(&unreadable).len(), 1);
        assert!(index.unreadable(&unreadable).is_empty());
        let expected = (scope, Action::Deny, vec![Rule::default()]);
        let policy_now = only(&index);
        assert_eq!((policy_now.scope, policy_now.action, policy_now.rules.clone()), expected);
        assert_problem(&index, &key(namespace).to_string(), "cannot be read");

        let mut gone = self::index("");
        gone.unreadable(&unreadable);
        gone.unreadable(&BTreeSet::new());
        assert!(gone.views().policies.is_empty());
        assert_no_problems(&gone);

        apply(&mut index, &policy(namespace, "rules: [{}]"));
        index.unreadable(&BTreeSet::new());
        assert_eq!(only(&index).action, Action::Allow);
        assert_no_problems(&index);
    }
}

#[test]
fn a_dry_run_is_enforced_and_says_so() {
    let text = policy("shop", "rules: [{}]").replace("name: p}", "name: p, annotations: {istio.io/dry-run: \"true\"}}");
    assert_problem(&index(&text), "AuthorizationPolicy shop/p", "istio.io/dry-run is not supported");
}
