//! No text makes the parser panic, and whatever it takes reads back as the same.

use manifests::{Set, parse};
use proptest::prelude::*;

/// Lines that look enough like manifests to get far into the parser.
fn lines() -> impl Strategy<Value = String> {
    let word = prop_oneof![
        Just("---".to_owned()),
        Just("apiVersion: v1".to_owned()),
        Just("apiVersion: security.istio.io/v1".to_owned()),
        "kind: (Pod|Service|List|ConfigMap|PeerAuthentication|AuthorizationPolicy|Node|Secret)",
        "metadata: \\{name: [a-z0-9.-]{0,4}(, namespace: [a-z]{0,2})?\\}",
        "metadata: \\{name: a, labels: \\{[a-z]{1,2}: [a-z*0-9]{0,2}\\}\\}",
        "spec: \\{(ports: \\[\\{port: -?[0-9]{1,6}\\}\\]|containers: \\[\\{name: [a-z]?\\}\\]|mtls: \\{mode: [A-Z]{0,6}\\})\\}",
        "data: \\{[a-z]{1,2}: (\\*a|&a x|\"[^\"\\\\]{0,4}\"|[a-z0-9]{1,3}|!!binary [A-Za-z=]{0,4})\\}",
        "(items:|- \\{kind: [A-Z]\\}|  - a|\\t|%YAML 1.2|\\.\\.\\.|# .|\\? x|: y|<<: \\*a|x: &a \\[\\*a\\])",
        ".{0,12}",
    ];
    prop::collection::vec(word, 0..12).prop_map(|lines| lines.join("\n"))
}

fn holds(text: &[u8]) {
    let parsed = parse("f", text);
    for problem in &parsed.problems {
        let sentence = problem.to_string();
        assert!(!sentence.contains(['\n', '\r', '\0', '\u{1b}']), "{sentence:?}");
    }
    for (object, _) in &parsed.objects {
        let yaml = object.to_yaml();
        let again = parse("f", &yaml);
        assert_eq!(again.objects.first().map(|(again, _)| again), Some(object), "{yaml}");
    }
    let mut set = Set::default();
    set.reload("f", text);
    set.reload("f", &text[..text.len() / 2]);
    set.reload("f", text);
    set.review();
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes_are_objects_or_problems(text in prop::collection::vec(any::<u8>(), 0..400)) {
        holds(&text);
    }

    #[test]
    fn arbitrary_text_is_objects_or_problems(text in any::<String>()) {
        holds(text.as_bytes());
    }

    #[test]
    fn text_that_looks_like_manifests_is_objects_or_problems(text in lines()) {
        holds(text.as_bytes());
    }

    #[test]
    fn any_text_in_an_object_reads_back(text in any::<String>(), name in "[a-z]([a-z0-9]{0,5}[a-z])?") {
        let mut map = manifests::k8s_openapi::api::core::v1::ConfigMap::default();
        map.metadata.name = Some(name);
        map.data = Some([("key".to_owned(), text)].into());
        let object = manifests::Object::from(map);
        let yaml = object.to_yaml();
        let again = parse("f", &yaml);
        prop_assert_eq!(again.objects.first().map(|(again, _)| again), Some(&object), "{}", yaml);
    }
}
