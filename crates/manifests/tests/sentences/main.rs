//! What is said of each thing that can be wrong, word for word, and that nothing else is.

mod objects;
mod policies;

use manifests::{MAX_DOCUMENTS, MAX_FILE_BYTES, Object, parse, validate_for_box};

/// The text's problems are these, in this order, with the file's name left out of the expectation.
#[track_caller]
fn check(text: impl AsRef<[u8]>, expected: &[&str]) {
    let said: Vec<String> = parse("f", text).problems.iter().map(|problem| problem.to_string()).collect();
    let expected: Vec<String> = expected.iter().map(|sentence| format!("f:{sentence}")).collect();
    assert_eq!(said, expected);
}

/// A pod whose `spec` holds the given lines.
#[track_caller]
fn check_pod(spec: &str, expected: &[&str]) {
    let spec: String = spec.lines().map(|line| format!("  {line}\n")).collect();
    check(format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: web, namespace: shop}}\nspec:\n{spec}"), expected);
}

#[track_caller]
fn check_service(spec: &str, expected: &[&str]) {
    check(format!("apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop}}\nspec: {spec}"), expected);
}

#[track_caller]
fn check_modes(spec: &str, expected: &[&str]) {
    check(
        format!("apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: p}}\nspec: {spec}"),
        expected,
    );
}

#[track_caller]
fn check_policy(spec: &str, expected: &[&str]) {
    check(
        format!("apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p}}\nspec: {spec}"),
        expected,
    );
}

#[track_caller]
fn check_meta(kind: &str, metadata: &str, expected: &[&str]) {
    check(format!("apiVersion: v1\nkind: {kind}\nmetadata: {metadata}"), expected);
}

const KINDS: &str = "Namespace, Node, ServiceAccount, ConfigMap, Pod, Deployment, Service, EndpointSlice, NetworkPolicy, ValidatingWebhookConfiguration, MutatingWebhookConfiguration, APIService, PeerAuthentication, AuthorizationPolicy";

#[test]
fn text_that_is_not_yaml_is_refused_with_its_line() {
    check("a: [1\nb: 2", &["2: not YAML: illegal placement of ':' indicator; mend the syntax there or just above"]);
    check(
        "kind:\n\tx: 1",
        &["2: not YAML: tabs disallowed within this context (block indentation); mend the syntax there or just above"],
    );
    check("a: 1\na: 2", &["2: key a is there twice; remove one of the two"]);
    check("a:\n  - {1: x, \"1\": y}", &["2: key 1 is there twice; remove one of the two"]);
    check("a: *nowhere", &["1: an alias names an anchor that is not in this document; write the value out"]);
    check("a: .nan", &["1: a number is not finite; put it in quotes if it is text"]);
    check("~: 1", &["1: a key is not text; put it in quotes"]);
    check("? [a]\n: b", &["1: a key is not text; put it in quotes"]);
    check(
        "a: !!binary zz",
        &["1: what is marked !!binary is not text in base64; remove the mark, or write the text itself"],
    );
    check("a: &x [*x]", &["1: an alias holds itself; write the value out"]);
    check(b"a: 1\nb: \xff", &["2: the file is not UTF-8 text; save it as UTF-8"]);
    check("- 1", &["1: not an object; write `apiVersion:`, `kind:` and `metadata:`"]);
    check("just text", &["1: not an object; write `apiVersion:`, `kind:` and `metadata:`"]);
    check("", &[]);
    check("\u{feff}# nothing\n---\n", &[]);
}

#[test]
fn what_is_too_large_is_refused_and_not_unfolded() {
    let said = parse("f", vec![b'a'; MAX_FILE_BYTES + 1]).problems;
    assert_eq!(said[0].to_string(), "f: the file has 4194305 bytes, the most is 4194304; split it");
    let too_large = "the document is nested too deep or unfolds too large; split it, and use fewer aliases";
    check("[".repeat(100_000), &[&format!("1: {too_large}")]);
    check("- ".repeat(100), &[&format!("1: {too_large}")]);
    let bomb: String =
        (1..12).map(|n| format!("a{n}: &a{n} [{}]\n", vec![format!("*a{}", n - 1); 10].join(","))).collect();
    let said = parse("f", format!("a0: &a0 lol\n{bomb}")).problems;
    assert!(said[0].to_string().ends_with(too_large), "{}", said[0]);
    // Many small bombs are no better than a large one.
    let document = format!("---\na: &a [{}]\nb: [{}]\n", vec!["x"; 100].join(","), vec!["*a"; 50].join(","));
    let parsed = parse("f", document.repeat(9_000));
    assert!(parsed.problems.last().expect("refused").to_string().ends_with(too_large));
}

#[test]
fn documents_beyond_the_limit_are_not_read() {
    let document = |n: usize| format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: n{n}}}\n");
    let parsed = parse("f", (0..=MAX_DOCUMENTS).map(document).collect::<String>());
    assert_eq!(parsed.objects.len(), MAX_DOCUMENTS);
    assert_eq!(parsed.problems.len(), 1);
    assert_eq!(
        parsed.problems[0].to_string(),
        "f:40001: the file has more than 10000 objects, the rest is not read; split it"
    );
    assert!(parsed.unidentified);
}

#[test]
fn a_document_must_say_which_object_it_is() {
    check("a: 1", &[&format!("1: field kind: is missing; write one of {KINDS}")]);
    check("kind: Pod\nmetadata: {name: x}", &["1: Pod x: field apiVersion: is missing; write v1"]);
    check(
        "apiVersion: v2\nkind: Pod\nmetadata: {name: x}",
        &["1: Pod x: field apiVersion: v2 is not a version of Pod; write v1"],
    );
    check(
        "kind: EndpointSlice\napiVersion: discovery.k8s.io/v1beta1\nmetadata: {namespace: shop, name: x}",
        &[
            "2: EndpointSlice shop/x: field apiVersion: discovery.k8s.io/v1beta1 is not a version of EndpointSlice; write discovery.k8s.io/v1",
        ],
    );
    check("apiVersion: v1\nkind: Pod", &["1: Pod: field metadata.name: is missing; write a name"]);
    check(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: 1",
        &["4: Pod: field metadata.name: 1 is not text to YAML; put it in quotes: \"1\""],
    );
    check(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  generateName: x-",
        &["3: Pod: field metadata.name: is missing; write a name: generateName is the API server's"],
    );
}

#[test]
fn an_unknown_kind_is_refused_by_name() {
    for kind in ["StatefulSet", "DaemonSet", "ReplicaSet", "Job", "CronJob"] {
        let sentence =
            format!("2: {kind} shop/db: field kind: a {kind} is not expanded into Pods; write Pods, or a Deployment");
        check(format!("apiVersion: x/v1\nkind: {kind}\nmetadata: {{name: db, namespace: shop}}"), &[&sentence]);
    }
    check(
        "apiVersion: v1\nkind: Secret\nmetadata: {name: x}",
        &[&format!(
            "2: Secret x: field kind: Secret is not a kind that is read here; remove it, or write one of {KINDS}"
        )],
    );
    check(
        "kind: Endpoints\nmetadata: {name: x}",
        &["1: Endpoints x: field kind: Endpoints are not read; write an EndpointSlice"],
    );
}

#[test]
fn names_and_labels_are_those_the_api_server_takes() {
    const SUBDOMAIN: &str = "use at most 253 of a-z, 0-9, - and ., with a letter or digit first and last in each part";
    check_meta(
        "ConfigMap",
        "{name: Web}",
        &[&format!("3: ConfigMap default/Web: field metadata.name: Web is not allowed; {SUBDOMAIN}")],
    );
    check_meta(
        "Namespace",
        "{name: a.b}",
        &[
            "3: Namespace a.b: field metadata.name: a.b is not allowed; use at most 63 of a-z, 0-9 and -, with a letter or digit first and last",
        ],
    );
    check_meta(
        "Namespace",
        "{name: a, namespace: b}",
        &["3: Namespace a: field metadata.namespace: a Namespace is in no namespace; remove the field"],
    );
    check_meta(
        "ServiceAccount",
        "\n  name: a\n  labels:\n    mode: \"*\"",
        &[
            "6: ServiceAccount default/a: field metadata.labels.mode: * is not the value of a label; use at most 63 letters, digits, -, _ and ., with a letter or digit first and last",
        ],
    );
    check_meta("ServiceAccount", "\n  name: a\n  labels: {a.b/c: x}\n  annotations: {A.b/c: \"any thing\"}", &[]);
    check_meta(
        "Namespace",
        "\n  name: a\n  labels: {justmtls.dev/mode: off}",
        &[
            "5: Namespace a: field metadata.labels[\"justmtls.dev/mode\"]: off is not text to YAML; put it in quotes: \"off\"",
        ],
    );
    check_meta(
        "Namespace",
        "\n  name: a\n  labels: {v: 1}",
        &["5: Namespace a: field metadata.labels.v: 1 is not text to YAML; put it in quotes: \"1\""],
    );
    check_meta(
        "Namespace",
        "\n  name: a\n  labels: {v: }",
        &["5: Namespace a: field metadata.labels.v: nothing (null) is not text; write text there"],
    );
    check_meta(
        "ConfigMap",
        "{name: a}\ndata: {a b: x}",
        &[
            "4: ConfigMap default/a: field data[\"a b\"]: the key is not that of a ConfigMap; use at most 253 letters, digits, -, _ and .",
        ],
    );
}

#[test]
fn a_typo_is_not_silent() {
    check_pod(
        "containers:\n- name: c\n  imagee: x",
        &[
            "7: Pod shop/web: field spec.containers[0].imagee: is not a known field and is ignored; check its spelling and indentation",
        ],
    );
    let parsed = parse("f", "apiVersion: v1\nkind: Namespace\nmetadata: {name: a, sevice: b}");
    assert!(!parsed.problems[0].is_error());
    assert_eq!(parsed.objects.len(), 1, "a warning does not refuse the object");
    check_modes(
        "{mtls: {mode: STRICT}, selctor: {matchLabels: {app: web}}}",
        &[
            "4: PeerAuthentication default/p: field spec.selctor: selctor is not a known field; known are selector, mtls, portLevelMtls",
        ],
    );
    check_policy(
        "\n  rules:\n  - from:\n    - source: {namespace: [shop]}",
        &[
            "7: AuthorizationPolicy default/p: field spec.rules[0].from[0].source.namespace: namespace is not a known field; known are \
           principals, notPrincipals, serviceAccounts, notServiceAccounts, requestPrincipals, notRequestPrincipals, namespaces, notNamespaces, \
           ipBlocks, notIpBlocks, remoteIpBlocks, notRemoteIpBlocks",
        ],
    );
}

#[test]
fn a_value_of_the_wrong_type_is_explained() {
    check_service(
        "{ports: [{port: \"80\"}]}",
        &["4: Service shop/web: field spec.ports[0].port: \"80\" is not a number; write a whole number without quotes"],
    );
    check_service(
        "{ports: [{port: 99999999999}]}",
        &[
            "4: Service shop/web: field spec.ports[0].port: 99999999999 is not a number of the field's range; write a smaller whole number",
        ],
    );
    check_service(
        "{ports: {port: 80}}",
        &["4: Service shop/web: field spec.ports: a mapping is not a list; begin each item with `- `"],
    );
    check_service(
        "hello",
        &[
            "4: Service shop/web: field spec: hello is not a mapping with the field's own members; write `name: value` lines below the field",
        ],
    );
    check_pod(
        "containers:\n- name: c\n  command: [\"nc\", -l, 8080]",
        &["7: Pod shop/web: field spec.containers[0].command[2]: 8080 is not text to YAML; put it in quotes: \"8080\""],
    );
    check_pod(
        "hostNetwork: \"true\"\ncontainers: []",
        &["5: Pod shop/web: field spec.hostNetwork: \"true\" is not true or false; write true or false without quotes"],
    );
}

#[test]
fn an_object_that_is_there_twice_is_named_with_both_lines() {
    let document = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n";
    check(
        format!("{document}---\n{document}"),
        &["5: Namespace shop: the object is there twice, first at line 1, which counts; remove one or rename it"],
    );
}

#[test]
fn lists_are_expanded() {
    check(
        "apiVersion: v1\nkind: List",
        &["1: a List has apiVersion v1 and a list of items; write `apiVersion: v1`, `kind: List`, `items:`"],
    );
    check(
        "apiVersion: v1\nkind: List\nitems:\n- kind: List\n  items: []",
        &["4: List: field kind: a List within a List is not read; move its items up"],
    );
    let parsed = parse(
        "f",
        "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Namespace, metadata: {name: a}}\n- {kind: Namespace}\n- {apiVersion: v1, kind: Namespace, metadata: {name: b}}\n",
    );
    let lines: Vec<String> =
        parsed.objects.iter().map(|(object, location)| format!("{location} {}", object.key())).collect();
    assert_eq!(lines, ["f:4 Namespace a", "f:6 Namespace b"]);
    assert_eq!(parsed.problems.len(), 1);
}

#[test]
fn a_pod_without_a_command_is_refused_for_the_box_alone() {
    let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec: {containers: [{name: a, image: nginx}, {name: b, command: [sleep, \"1\"]}]}";
    let parsed = parse("f", text);
    assert_eq!(parsed.problems, []);
    let (object, location) = &parsed.objects[0];
    let said: Vec<String> = validate_for_box(object, location).iter().map(|problem| problem.to_string()).collect();
    assert_eq!(
        said,
        [
            "f:1: Pod default/web: field spec.containers[0].command: is missing; write the program to run; images are not read here"
        ]
    );
    assert!(matches!(object, Object::Pod(_)));
}
