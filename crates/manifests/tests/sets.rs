//! What a set keeps, changes and says when its files change.

use std::collections::BTreeMap;

use manifests::{Change, Kind, Location, Object, ObjectKey, Reloaded, Set, parse};

fn namespace(name: &str) -> String {
    format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}}}\n")
}

fn service(name: &str, port: u32) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{ports: [{{port: {port}}}]}}\n"
    )
}

fn strict(mode: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: all}}\nspec: {{mtls: {{mode: {mode}}}}}\n"
    )
}

fn keys(set: &Set) -> Vec<String> {
    set.iter().map(|(object, _)| object.key().to_string()).collect()
}

fn shown(changes: &[Change]) -> Vec<String> {
    let show = |change: &Change| match change {
        Change::Applied(object) => format!("+{}", object.key()),
        Change::Deleted(key) => format!("-{key}"),
    };
    changes.iter().map(show).collect()
}

fn sentences(reloaded: &Reloaded) -> Vec<String> {
    reloaded.problems.iter().map(|problem| problem.to_string()).collect()
}

#[test]
fn a_reload_says_what_it_changed() {
    let mut set = Set::default();
    assert_eq!(
        shown(&set.reload("a", namespace("x") + &service("web", 80)).changes),
        ["+Namespace x", "+Service shop/web"]
    );
    assert_eq!(shown(&set.reload("a", namespace("x") + &service("web", 80)).changes), [""; 0], "the same text again");
    assert_eq!(shown(&set.reload("a", service("web", 81)).changes), ["+Service shop/web", "-Namespace x"]);
    assert_eq!(shown(&set.reload("a", "").changes), ["-Service shop/web"]);
    assert!(set.is_empty());
}

#[test]
fn an_object_whose_new_text_is_wrong_stays_as_it_was_and_the_others_go_on() {
    let mut set = Set::default();
    set.reload("a", service("web", 80) + &service("db", 1) + &namespace("x"));
    let before = set.clone();
    let reloaded = set.reload("a", service("web", 70000) + &service("db", 2));
    assert_eq!(shown(&reloaded.changes), ["+Service shop/db", "-Namespace x"], "what is known to be gone is gone");
    assert_eq!(reloaded.kept.iter().map(ObjectKey::to_string).collect::<Vec<_>>(), ["Service shop/web"]);
    assert_eq!(
        sentences(&reloaded),
        ["a:5: Service shop/web: field spec.ports[0].port: 70000 is not a port; use a number from 1 to 65535"]
    );
    assert_eq!(set.get(&reloaded.kept[0]), before.get(&reloaded.kept[0]));
    assert_eq!(
        shown(&set.reload("a", service("web", 82)).changes),
        ["+Service shop/web", "-Service shop/db"],
        "and is mended"
    );
}

#[test]
fn a_policy_that_becomes_unreadable_does_not_open_what_it_closed() {
    for broken in [
        "spec: {mtls: {mode: STRICT",
        "---\nkind: PeerAuthentication",
        "kind: [",
        "\0",
        "just text",
        &strict("STRICTLY"),
    ] {
        let mut set = Set::default();
        set.reload("a", strict("STRICT"));
        let reloaded = set.reload("a", broken);
        assert_eq!(reloaded.changes, [], "{broken:?}");
        assert_eq!(reloaded.kept.len(), 1, "{broken:?}");
        assert_eq!(keys(&set), ["PeerAuthentication default/all"], "{broken:?}");
    }
}

#[test]
fn a_document_of_an_unknown_kind_keeps_nothing() {
    let mut set = Set::default();
    set.reload("a", namespace("x"));
    let reloaded = set.reload("a", "apiVersion: v1\nkind: Secret\nmetadata: {name: x}");
    assert_eq!(shown(&reloaded.changes), ["-Namespace x"]);
}

#[test]
fn a_policy_that_was_never_readable_is_known_to_be_there() {
    let mut set = Set::default();
    set.reload("a", strict("STRICTLY"));
    assert_eq!(set.unreadable().map(ObjectKey::to_string).collect::<Vec<_>>(), ["PeerAuthentication default/all"]);
    set.reload("a", strict("STRICT"));
    assert_eq!(set.unreadable().count(), 0);
    set.reload("a", strict("STRICTLY"));
    assert_eq!(set.unreadable().count(), 0, "its last good state stands");
    set.forget("a");
    set.reload("b", strict("x"));
    set.forget("b");
    assert_eq!(set, Set::default(), "a file that is forgotten leaves nothing");
}

#[test]
fn an_object_of_two_files_counts_once_and_both_places_are_named() {
    let both = |set: &Set| {
        parse("", service("web", 1))
            .objects
            .into_iter()
            .filter_map(|(object, _)| set.get(&object.key()).cloned())
            .next()
    };
    let port = |set: &Set| both(set).map(|object| object.to_json()["spec"]["ports"][0]["port"].clone());
    let mut ab = Set::default();
    ab.reload("a", service("web", 1));
    let second = ab.reload("b", service("web", 2));
    let sentence =
        "b:2: Service shop/web: the object is there twice, also at a:2, which counts; remove one or rename it";
    assert_eq!(sentences(&second), [sentence]);
    assert_eq!(second.changes, []);
    let mut ba = Set::default();
    ba.reload("b", service("web", 2));
    let second = ba.reload("a", service("web", 1));
    assert_eq!(sentences(&second), [sentence]);
    assert_eq!(shown(&second.changes), ["+Service shop/web"]);
    assert_eq!(ab, ba, "the order of events decides nothing");
    assert_eq!(port(&ab), Some(1.into()));
    assert_eq!(shown(&ab.forget("a")), ["+Service shop/web"], "the next one steps in");
    assert_eq!(port(&ab), Some(2.into()));
    assert_eq!(shown(&ab.forget("b")), ["-Service shop/web"]);
}

#[test]
fn objects_are_inserted_and_removed_one_by_one() {
    let mut set = Set::default();
    let (object, location) = parse("a", namespace("x")).objects.remove(0);
    assert_eq!(set.insert(object.clone(), location.clone()), None);
    let again = set.insert(object.clone(), Location::line("a", 9)).expect("the same file").to_string();
    assert_eq!(
        again,
        "a:9: Namespace x: the object is there twice, also at a:2, which counts; remove one or rename it"
    );
    let again = set.insert(object.clone(), Location::line("b", 7)).expect("another file").to_string();
    assert_eq!(
        again,
        "b:7: Namespace x: the object is there twice, also at a:2, which counts; remove one or rename it"
    );
    assert_eq!((set.len(), set.location(&object.key())), (1, Some(&location)));
    assert_eq!(set.remove(&object.key()), Some(object.clone()));
    assert_eq!(set.remove(&object.key()), None);
    assert_eq!(set, Set::default());
}

#[test]
fn the_difference_of_two_sets_leads_from_one_to_the_other() {
    let (old, problems) =
        Set::from_parsed([parse("a", namespace("x") + &service("web", 80)), parse("b", namespace("w"))]);
    assert_eq!(problems, []);
    let (new, _) = Set::from_parsed([parse("c", namespace("w") + &service("web", 81) + &namespace("z"))]);
    assert_eq!(shown(&old.diff(&new)), ["+Namespace z", "+Service shop/web", "-Namespace x"]);
    assert_eq!(old.diff(&old), []);
}

#[test]
fn what_does_not_fit_together_is_said() {
    let pods = "\
---\napiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: node-c, serviceAccountName: seller, containers: [{name: c, ports: [{name: http, containerPort: 80}]}]}
---\napiVersion: v1\nkind: Node\nmetadata: {name: node-a}
---\napiVersion: v1\nkind: Service\nmetadata: {name: good, namespace: shop}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: http}]}
---\napiVersion: v1\nkind: Service\nmetadata: {name: nobody, namespace: shop}
spec: {selector: {app: wbe}, ports: [{port: 80}]}
---\napiVersion: v1\nkind: Service\nmetadata: {name: unnamed, namespace: shop}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: htp}]}
---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: none, namespace: shop}
spec: {selector: {matchLabels: {app: wbe}}, mtls: {mode: STRICT}}
---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: lost, namespace: nowhere}
";
    let (set, problems) = Set::from_parsed([parse("f", pods.to_owned() + &namespace("shop"))]);
    assert_eq!(problems, []);
    let said: Vec<String> = set.review().iter().map(|problem| problem.to_string()).collect();
    assert_eq!(
        said,
        [
            "f:31: ConfigMap nowhere/lost: field metadata.namespace: there is no Namespace nowhere; add one",
            "f:2: Pod shop/web: field spec.serviceAccountName: there is no ServiceAccount shop/seller; add one",
            "f:2: Pod shop/web: field spec.nodeName: there is no Node node-c; name one that is there, or remove the field",
            "f:16: Service shop/nobody: field spec.selector: selects no pod; use labels of a pod of the same namespace",
            "f:21: Service shop/unnamed: field spec.ports[0].targetPort: no selected pod has a port named htp; name the port in the pod, or write a number",
            "f:26: PeerAuthentication shop/none: field spec.selector: selects no pod of its namespace; use labels of a pod",
        ]
    );
    assert!(set.review().iter().all(|problem| !problem.is_error()));
}

#[test]
fn what_is_written_reads_as_the_same_object() {
    let awkward = [
        "off", "n", "1", "010", "1e3", "~", "", "a: b", "x\ny\n", " x ", "#", "*a", "12:30:45", "\u{7f}\0", "<<", "=",
        "'", "\"",
    ];
    let data: BTreeMap<String, String> =
        awkward.iter().enumerate().map(|(n, text)| (format!("k{n}"), (*text).to_owned())).collect();
    let (mut map, location) =
        parse("f", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: \"n\", annotations: {\"8\": \"y\"}}")
            .objects
            .remove(0);
    if let Object::ConfigMap(map) = &mut map {
        map.data = Some(data);
    }
    let policy = "apiVersion: security.istio.io/v1beta1\nkind: AuthorizationPolicy\nmetadata: {name: p}\nspec: {action: DENY, rules: [{}, {from: [{source: {principals: [\"*\"]}}], to: [{operation: {ports: [\"80\"]}}], when: [{key: source.ip, notValues: [10.0.0.0/8]}]}]}\n---\n";
    let modes = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: p}\nspec: {selector: {matchLabels: {a: b}}, mtls: {}, portLevelMtls: {8080: {mode: DISABLE}}}\n";
    let policies = parse("f", policy.to_owned() + modes);
    assert_eq!(policies.problems, []);
    for (object, _) in policies.objects.into_iter().chain([(map, location)]) {
        let yaml = object.to_yaml();
        let again = parse("f", &yaml);
        assert_eq!(again.problems, [], "{yaml}");
        assert_eq!(again.objects[0].0, object, "{yaml}");
    }
}

#[test]
fn objects_made_by_a_program_get_a_namespace() {
    let object = Object::from(manifests::k8s_openapi::api::core::v1::Pod::default());
    assert_eq!(object.key(), ObjectKey { kind: Kind::Pod, namespace: Some("default".to_owned()), name: String::new() });
    assert!(!manifests::validate(&object, &Location::file("made")).is_empty(), "it has no name");
}
