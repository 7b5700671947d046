//! Authorization policies: Istio's semantics at layer 4.

use ipnet::IpNet;
use mesh::{
    Action, Clause, Denied, Incoming, Match, PlaintextReason as Plain, PodUid, Policy, RefuseReason as No, Resource,
    Rule, Scope, Security, ServiceAccountMatch, StringMatch, View, authorize,
};
use proptest::prelude::*;

use crate::peers::peer;
use crate::world::{at, id, ip, pod, policy_name, view};

fn policy(name: &str, scope: Scope, action: Action, rules: Vec<Rule>) -> Policy {
    Policy { name: policy_name(name), scope, action, rules }
}

fn rule(conditions: Match) -> Rule {
    Rule { clauses: vec![Clause { matches: vec![conditions] }] }
}

fn world(policies: impl IntoIterator<Item = Policy>) -> View {
    let mut server = pod("server", 1);
    server.policies = vec![policy_name("shop/selected")];
    let mut view = view([server], []);
    // Named by the workload, so that it must be there.
    view.apply(Resource::Policy(policy("shop/selected", Scope::Selected, Action::Deny, vec![])));
    for policy in policies {
        view.apply(Resource::Policy(policy));
    }
    view
}

/// Who asks, from 10.0.0.2 for 10.0.0.1:80: `None` is in clear.
fn ask(view: &View, client: Option<(&str, &str)>) -> Result<(), Denied> {
    let verified = client.map(|(namespace, account)| peer(&id(namespace, account)));
    let security = match &verified {
        Some(peer) => Security::Mtls(peer),
        None => Security::Plaintext(Plain::UnknownSource),
    };
    let pod = PodUid::from("server");
    authorize(view, Incoming { pod: &pod, destination: at("10.0.0.1:80"), source: ip("10.0.0.2"), security }).map(drop)
}

const WEB: Option<(&str, &str)> = Some(("shop", "web"));
const EVIL: Option<(&str, &str)> = Some(("evil", "web"));

fn exact(text: &str) -> Vec<StringMatch> {
    vec![StringMatch::Exact(text.to_owned())]
}

fn shop() -> Match {
    Match { namespaces: exact("shop"), ..Match::default() }
}

fn by(name: &str) -> Result<(), Denied> {
    Err(Denied { because: No::PolicyDeny, policy: Some(policy_name(name)) })
}

fn no_allow() -> Result<(), Denied> {
    Err(No::PolicyNoAllow.into())
}

#[test]
fn without_a_policy_everybody_passes() {
    let view = world([]);
    assert_eq!([ask(&view, WEB), ask(&view, EVIL), ask(&view, None)], [Ok(()), Ok(()), Ok(())]);
}

#[test]
fn with_an_allow_policy_only_who_matches_passes() {
    for scope in [Scope::Mesh, Scope::Namespace] {
        let view = world([policy("shop/allow", scope, Action::Allow, vec![rule(shop())])]);
        assert_eq!([ask(&view, WEB), ask(&view, EVIL), ask(&view, None)], [Ok(()), no_allow(), no_allow()]);
    }
}

#[test]
fn one_of_several_allow_policies_is_enough() {
    let evil = Match { namespaces: exact("evil"), ..Match::default() };
    let view = world([
        policy("shop/a", Scope::Namespace, Action::Allow, vec![rule(shop())]),
        policy("shop/b", Scope::Mesh, Action::Allow, vec![rule(evil)]),
    ]);
    assert_eq!([ask(&view, WEB), ask(&view, EVIL), ask(&view, None)], [Ok(()), Ok(()), no_allow()]);
}

#[test]
fn deny_comes_first() {
    let view = world([
        policy("shop/allow", Scope::Namespace, Action::Allow, vec![Rule::default()]),
        policy("shop/deny", Scope::Namespace, Action::Deny, vec![rule(shop())]),
    ]);
    assert_eq!([ask(&view, WEB), ask(&view, EVIL), ask(&view, None)], [by("shop/deny"), Ok(()), Ok(())]);
}

#[test]
fn a_policy_without_rules_matches_nobody() {
    let allow_nothing = world([policy("shop/nothing", Scope::Namespace, Action::Allow, vec![])]);
    assert_eq!([ask(&allow_nothing, WEB), ask(&allow_nothing, None)], [no_allow(), no_allow()]);
    let deny_nothing = world([policy("shop/nothing", Scope::Namespace, Action::Deny, vec![])]);
    assert_eq!(ask(&deny_nothing, WEB), Ok(()));
}

#[test]
fn a_policy_of_another_namespace_or_of_a_selection_that_does_not_name_the_pod_does_not_apply() {
    let everybody = || vec![Rule::default()];
    let view = world([
        policy("evil/deny", Scope::Namespace, Action::Deny, everybody()),
        policy("shop/others", Scope::Selected, Action::Deny, everybody()),
    ]);
    assert_eq!(ask(&view, WEB), Ok(()));
    let view = world([policy("shop/selected", Scope::Selected, Action::Deny, everybody())]);
    assert_eq!(ask(&view, WEB), by("shop/selected"));
    let view = world([policy("justmtls-system/mesh", Scope::Mesh, Action::Deny, everybody())]);
    assert_eq!(ask(&view, WEB), by("justmtls-system/mesh"));
}

#[test]
fn a_policy_that_the_pod_names_and_nobody_has_sent_lets_nothing_pass() {
    let mut view = world([]);
    view.remove(&mesh::ResourceKey::Policy(policy_name("shop/selected")));
    assert_eq!([ask(&view, WEB), ask(&view, None)], [by("shop/selected"), by("shop/selected")]);
}

#[test]
fn rules_are_alternatives_clauses_must_all_hold_and_matches_are_alternatives() {
    let port = |port| Match { destination_ports: vec![port], ..Match::default() };
    let clause = |matches: Vec<Match>| Clause { matches };
    let cases = [
        (vec![], false),
        (vec![Rule { clauses: vec![] }], true),
        (vec![Rule { clauses: vec![clause(vec![])] }], true),
        (vec![rule(port(80))], true),
        (vec![rule(port(81))], false),
        (vec![rule(port(81)), rule(port(80))], true),
        (vec![Rule { clauses: vec![clause(vec![port(80)]), clause(vec![shop()])] }], true),
        (vec![Rule { clauses: vec![clause(vec![port(81)]), clause(vec![shop()])] }], false),
        (vec![Rule { clauses: vec![clause(vec![port(81), port(80)])] }], true),
        (vec![Rule { clauses: vec![clause(vec![port(80)]), clause(vec![])] }], true),
    ];
    for (rules, matches) in cases {
        let view = world([policy("shop/p", Scope::Namespace, Action::Deny, rules.clone())]);
        assert_eq!(ask(&view, WEB).is_err(), matches, "{rules:?}");
    }
}

/// Conditions, and whether they hold for shop/web, for evil/web and for a client in clear.
fn conditions() -> Vec<(Match, [bool; 3])> {
    let any = Match::default;
    let nets = |text: &str| -> Vec<IpNet> { vec![text.parse().unwrap()] };
    let account = |namespace: &str, account: &str| {
        vec![ServiceAccountMatch { namespace: namespace.into(), service_account: account.into() }]
    };
    let prefix = |text: &str| vec![StringMatch::Prefix(text.to_owned())];
    let suffix = |text: &str| vec![StringMatch::Suffix(text.to_owned())];
    let presence = || vec![StringMatch::Presence];
    let web = "cluster.local/ns/shop/sa/web";
    vec![
        (any(), [true, true, true]),
        // Who: only a certificate says so. In clear nobody is anybody, and anybody is "not somebody".
        (Match { namespaces: exact("shop"), ..any() }, [true, false, false]),
        (Match { not_namespaces: exact("shop"), ..any() }, [false, true, true]),
        (Match { principals: exact(web), ..any() }, [true, false, false]),
        (Match { not_principals: exact(web), ..any() }, [false, true, true]),
        (Match { principals: exact(&format!("spiffe://{web}")), ..any() }, [false, false, false]),
        (Match { principals: prefix("cluster.local/ns/shop/"), ..any() }, [true, false, false]),
        (Match { principals: suffix("/sa/web"), ..any() }, [true, true, false]),
        (Match { principals: prefix(""), ..any() }, [true, true, false]),
        (Match { principals: suffix(""), ..any() }, [true, true, false]),
        (Match { principals: exact(""), ..any() }, [false, false, false]),
        (Match { not_principals: exact(""), ..any() }, [true, true, true]),
        (Match { principals: presence(), ..any() }, [true, true, false]),
        (Match { not_principals: presence(), ..any() }, [false, false, true]),
        (Match { service_accounts: account("shop", "web"), ..any() }, [true, false, false]),
        (Match { service_accounts: account("shop", "we"), ..any() }, [false, false, false]),
        (Match { not_service_accounts: account("shop", "web"), ..any() }, [false, true, true]),
        // Where from and where to.
        (Match { source_ips: nets("10.0.0.0/24"), ..any() }, [true, true, true]),
        (Match { source_ips: nets("10.0.1.0/24"), ..any() }, [false, false, false]),
        (Match { source_ips: nets("::/0"), ..any() }, [false, false, false]),
        (Match { not_source_ips: nets("10.0.0.2/32"), ..any() }, [false, false, false]),
        (Match { destination_ips: nets("10.0.0.1/32"), ..any() }, [true, true, true]),
        (Match { not_destination_ips: nets("10.0.0.1/32"), ..any() }, [false, false, false]),
        (Match { destination_ports: vec![79, 80], ..any() }, [true, true, true]),
        (Match { not_destination_ports: vec![80], ..any() }, [false, false, false]),
        // All of them together.
        (Match { namespaces: exact("shop"), destination_ports: vec![80], ..any() }, [true, false, false]),
        (Match { namespaces: exact("shop"), destination_ports: vec![81], ..any() }, [false, false, false]),
        (Match { namespaces: exact("shop"), not_principals: exact(web), ..any() }, [false, false, false]),
    ]
}

#[test]
fn each_condition_holds_for_whom_it_should() {
    for (conditions, expected) in conditions() {
        let deny = world([policy("shop/p", Scope::Namespace, Action::Deny, vec![rule(conditions.clone())])]);
        let allow = world([policy("shop/p", Scope::Namespace, Action::Allow, vec![rule(conditions.clone())])]);
        for (client, matches) in [WEB, EVIL, None].into_iter().zip(expected) {
            assert_eq!(ask(&deny, client).is_err(), matches, "deny {conditions:?} for {client:?}");
            assert_eq!(ask(&allow, client).is_ok(), matches, "allow {conditions:?} for {client:?}");
        }
    }
}

proptest! {
    /// The whole rule, over policies each of which is known to match or not.
    #[test]
    fn deny_then_allow_then_default(policies in prop::collection::vec((any::<bool>(), any::<bool>()), 0..6)) {
        let resources = policies.iter().enumerate().map(|(index, (deny, matches))| {
            let action = if *deny { Action::Deny } else { Action::Allow };
            let conditions = Match { destination_ports: vec![if *matches { 80 } else { 81 }], ..Match::default() };
            policy(&format!("shop/p{index}"), Scope::Namespace, action, vec![rule(conditions)])
        });
        let denied = policies.contains(&(true, true));
        let allows = policies.iter().any(|(deny, _)| !deny);
        let allowed = policies.contains(&(false, true));
        let expected = !denied && (allowed || !allows);
        prop_assert_eq!(ask(&world(resources), None).is_ok(), expected);
    }
}
