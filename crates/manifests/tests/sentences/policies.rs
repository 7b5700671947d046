//! What is said of the fields of Istio's policies.

use super::{check, check_modes, check_policy};

#[test]
fn modes_are_checked() {
    check_modes(
        "{mtls: {mode: STRICTLY}}",
        &[
            "4: PeerAuthentication default/p: field spec.mtls.mode: STRICTLY is not a known value; known are UNSET, DISABLE, PERMISSIVE, STRICT",
        ],
    );
    check_modes(
        "{portLevelMtls: {8080: {mode: STRICT}}}",
        &[
            "4: PeerAuthentication default/p: field spec.portLevelMtls: modes of ports need a selector; add spec.selector.matchLabels, or remove portLevelMtls",
        ],
    );
    check_modes(
        "{selector: {matchLabels: {}}, portLevelMtls: {8080: {mode: STRICT}}}",
        &[
            "4: PeerAuthentication default/p: field spec.portLevelMtls: modes of ports need a selector; add spec.selector.matchLabels, or remove portLevelMtls",
        ],
    );
    for port in ["0", "70000", "http"] {
        let sentence = format!(
            "4: PeerAuthentication default/p: field spec.portLevelMtls: {port} is not a port; use a number from 1 to 65535"
        );
        check_modes(
            &format!("{{selector: {{matchLabels: {{a: b}}}}, portLevelMtls: {{{port}: {{mode: STRICT}}}}}}"),
            &[&sentence],
        );
    }
    check_modes(
        "{selector: {matchLabels: {a: }}}",
        &[
            "4: PeerAuthentication default/p: field spec.selector.matchLabels.a: nothing (null) is not text; write text there",
        ],
    );
    check(
        "apiVersion: security.istio.io/v1beta1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: a}",
        &[],
    );
}

#[test]
fn policies_are_checked() {
    check_policy(
        "{action: MAYBE}",
        &[
            "4: AuthorizationPolicy default/p: field spec.action: MAYBE is not a known value; known are ALLOW, DENY, AUDIT, CUSTOM",
        ],
    );
    check_policy(
        "{action: CUSTOM}",
        &[
            "4: AuthorizationPolicy default/p: field spec.provider: is missing; name the authorizer that action CUSTOM asks",
        ],
    );
    check_policy(
        "{provider: {name: x}}",
        &["4: AuthorizationPolicy default/p: field spec.provider: is for action CUSTOM alone; remove it"],
    );
    check_policy(
        "{selector: {}, targetRefs: [{kind: Service, name: web}]}",
        &["4: AuthorizationPolicy default/p: field spec.selector: stands beside targetRefs; keep one of the two"],
    );
    let rule = |rule: &str, sentence: &str| {
        check_policy(
            &format!("{{rules: [{rule}]}}"),
            &[&format!("4: AuthorizationPolicy default/p: field spec.rules[0].{sentence}")],
        )
    };
    rule("{from: [{source: {}}]}", "from[0].source: says nothing; write who connects, or remove the item");
    rule("{from: [{}]}", "from[0]: source is missing; add source");
    rule(
        "{from: [{source: {ipBlocks: [10.0.0]}}]}",
        "from[0].source.ipBlocks[0]: 10.0.0 is not an address or a range of addresses; write it as 10.0.0.1 or 10.0.0.0/24",
    );
    rule(
        "{to: [{operation: {ports: [\"70000\"]}}]}",
        "to[0].operation.ports[0]: 70000 is not a port; use a number from 1 to 65535, in quotes",
    );
    rule(
        "{to: [{operation: {ports: [80]}}]}",
        "to[0].operation.ports[0]: 80 is not text to YAML; put it in quotes: \"80\"",
    );
    rule("{when: [{key: source.ip}]}", "when[0]: has neither values nor notValues; write at least one of them");
    rule(
        "{when: [{key: source.port, values: [x]}]}",
        "when[0].key: source.port is not an attribute; use source.ip, source.namespace, source.principal, source.serviceAccount, remote.ip, \
         destination.ip, destination.port, connection.sni or one that begins with request.",
    );
    check_policy("{rules: [{}]}", &[]);
    check_policy("", &[]);
}
