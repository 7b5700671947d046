//! The definitions of Istio's two policies, for clusters that do not have them.
//!
//! All fields of `security.istio.io/v1` are there: one that the API server dropped would widen a policy.

use serde_json::{Value, json};

use super::{MANAGED_BY, Object, labels};

/// The two definitions. They are made only where they are absent.
pub(crate) fn definitions() -> Vec<Object> {
    vec![
        definition("PeerAuthentication", "peerauthentications", "pa", peer_authentication(), &peer_columns()),
        definition("AuthorizationPolicy", "authorizationpolicies", "ap", authorization_policy(), &policy_columns()),
    ]
}

fn definition(kind: &str, plural: &str, short: &str, spec: Value, columns: &Value) -> Object {
    let mut labels = labels();
    labels[MANAGED_BY] = json!("justmtls");
    // Conditions and messages of whoever enforces: ours, or Istio's.
    let status = json!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true });
    let version = |name: &str, storage: bool| {
        json!({
            "name": name,
            "served": true,
            "storage": storage,
            "subresources": { "status": {} },
            "additionalPrinterColumns": columns,
            "schema": { "openAPIV3Schema": {
                "type": "object",
                "properties": { "spec": spec, "status": status },
            } },
        })
    };
    Object::new(json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": { "name": format!("{plural}.security.istio.io"), "labels": labels },
        "spec": {
            "group": "security.istio.io",
            "scope": "Namespaced",
            "names": {
                "kind": kind,
                "listKind": format!("{kind}List"),
                "plural": plural,
                "singular": kind.to_lowercase(),
                "shortNames": [short],
                "categories": ["istio-io", "security-istio-io"],
            },
            "versions": [version("v1", true), version("v1beta1", false)],
        },
    }))
}

fn column(name: &str, path: &str) -> Value {
    json!({ "name": name, "type": "string", "jsonPath": path })
}

fn age() -> Value {
    json!({ "name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp" })
}

fn peer_columns() -> Value {
    json!([column("Mode", ".spec.mtls.mode"), age()])
}

fn policy_columns() -> Value {
    json!([column("Action", ".spec.action"), age()])
}

fn text() -> Value {
    json!({ "type": "string" })
}

fn texts() -> Value {
    json!({ "type": "array", "items": text() })
}

/// Addresses and ranges of them: one that is mistyped is refused where it is written, and not found in a status later. By a pattern and not
/// by CEL, whose `isCIDR` is younger than the oldest Kubernetes that we run on, and whose cost would bound the lists. It holds IPv4 to the
/// letter; what it cannot tell of IPv6 is left to the control plane, as everything is where Istio's own definition is in use.
fn blocks() -> Value {
    const BYTE: &str = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])";
    let v4 = format!("({BYTE}[.]){{3}}{BYTE}");
    let pattern = format!(
        "^({v4}(/(3[0-2]|[12]?[0-9]))?|[0-9A-Fa-f]*:[0-9A-Fa-f:]*(:{v4})?(/(12[0-8]|1[01][0-9]|[1-9]?[0-9]))?)$"
    );
    list(json!({ "type": "string", "pattern": pattern }))
}

fn one_of(words: &[&str]) -> Value {
    json!({ "type": "string", "enum": words })
}

fn object(properties: Value) -> Value {
    json!({ "type": "object", "properties": properties })
}

fn list(items: Value) -> Value {
    json!({ "type": "array", "items": items })
}

fn selector() -> Value {
    object(json!({ "matchLabels": { "type": "object", "additionalProperties": text() } }))
}

fn peer_authentication() -> Value {
    let mtls = || object(json!({ "mode": one_of(&["UNSET", "DISABLE", "PERMISSIVE", "STRICT"]) }));
    let mut spec = object(json!({
        "selector": selector(),
        "mtls": mtls(),
        "portLevelMtls": { "type": "object", "additionalProperties": mtls() },
    }));
    // As Istio's own has it.
    spec["x-kubernetes-validations"] = json!([{
        "rule": "!has(self.portLevelMtls) || has(self.selector) && has(self.selector.matchLabels) && \
                 self.selector.matchLabels.size() > 0",
        "message": "modes of ports need a selector: add spec.selector.matchLabels, or remove portLevelMtls",
    }]);
    spec["properties"]["portLevelMtls"]["x-kubernetes-validations"] = json!([{
        "rule": "self.all(port, port.matches('^[1-9][0-9]{0,4}$') && int(port) <= 65535)",
        "message": "a port is a number from 1 to 65535",
    }]);
    spec
}

fn authorization_policy() -> Value {
    let target = || object(json!({ "group": text(), "kind": text(), "name": text(), "namespace": text() }));
    let source = object(json!({
        "principals": texts(), "notPrincipals": texts(),
        "requestPrincipals": texts(), "notRequestPrincipals": texts(),
        "namespaces": texts(), "notNamespaces": texts(),
        "serviceAccounts": texts(), "notServiceAccounts": texts(),
        "ipBlocks": blocks(), "notIpBlocks": blocks(),
        "remoteIpBlocks": blocks(), "notRemoteIpBlocks": blocks(),
    }));
    let operation = object(json!({
        "hosts": texts(), "notHosts": texts(),
        "ports": texts(), "notPorts": texts(),
        "methods": texts(), "notMethods": texts(),
        "paths": texts(), "notPaths": texts(),
    }));
    let mut condition = object(json!({ "key": text(), "values": texts(), "notValues": texts() }));
    condition["required"] = json!(["key"]);
    object(json!({
        "selector": selector(),
        "targetRef": target(),
        "targetRefs": list(target()),
        "action": one_of(&["ALLOW", "DENY", "AUDIT", "CUSTOM"]),
        "provider": object(json!({ "name": text() })),
        "rules": list(object(json!({
            "from": list(object(json!({ "source": source }))),
            "to": list(object(json!({ "operation": operation }))),
            "when": list(condition),
        }))),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What an object of the definition may say, as paths.
    fn fields(schema: &Value, at: &str, found: &mut Vec<String>) {
        for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
            found.push(format!("{at}{name}"));
            fields(inner, &format!("{at}{name}."), found);
            fields(&inner["items"], &format!("{at}{name}."), found);
        }
    }

    #[test]
    fn each_field_that_the_control_plane_reads_can_be_stored() {
        let source = "{principals: [a], notPrincipals: [a], requestPrincipals: [a], notRequestPrincipals: [a], \
                      namespaces: [a], notNamespaces: [a], serviceAccounts: [a], notServiceAccounts: [a], ipBlocks: [10.0.0.0/8], \
                      notIpBlocks: [10.0.0.0/8], remoteIpBlocks: [10.0.0.0/8], notRemoteIpBlocks: [10.0.0.0/8]}";
        let operation = "{hosts: [a], notHosts: [a], ports: ['1'], notPorts: ['1'], methods: [a], notMethods: [a], \
                         paths: [a], notPaths: [a]}";
        let text = format!(
            "metadata: {{name: a, namespace: b}}\nspec:\n  \
             rules: [{{from: [{{source: {source}}}], to: [{{operation: {operation}}}], when: [{{key: source.ip, values: [a], notValues: [b]}}]}}]\n"
        );
        let parsed: manifests::istio::AuthorizationPolicy = serde_saphyr::from_str(&text).unwrap();
        let again = serde_json::to_value(&parsed.spec).unwrap();
        let mut stored = Vec::new();
        fields(&authorization_policy(), "", &mut stored);
        let mut said = Vec::new();
        collect(&again, "", &mut said);
        assert!(said.len() > 20, "{said:?}");
        for path in said {
            assert!(stored.contains(&path), "{path} would be dropped");
        }
    }

    /// Nothing that the control plane could read is refused, and of what it could not, what people mistype is.
    #[test]
    fn what_is_no_address_is_not_stored() {
        let pattern = regex::Regex::new(blocks()["items"]["pattern"].as_str().unwrap()).unwrap();
        let reads = |text: &str| text.parse::<ipnet::IpNet>().is_ok() || text.parse::<std::net::IpAddr>().is_ok();
        for good in [
            "10.0.0.1",
            "0.0.0.0/0",
            "10.0.0.0/8",
            "255.255.255.255/32",
            "192.168.99.200/19",
            "::",
            "::/0",
            "::1",
            "1::",
            "fd00::/8",
            "FD00::AB/128",
            "2001:db8:1:2:3:4:5:6/64",
            "::ffff:10.0.0.1",
            "::ffff:10.0.0.0/104",
            "64:ff9b::10.0.0.1/96",
            "1:2:3:4:5:6:10.0.0.1",
        ] {
            assert!(reads(good) && pattern.is_match(good), "{good}");
        }
        for bad in [
            "",
            " ",
            "10.0.0.0/33",
            "10.0.0.0/-1",
            "10.0.0.0/",
            "/8",
            "10.0.0",
            "10.0.0.0.0",
            "10.0.0.256",
            "010.0.0.1",
            "10.0.0.1 ",
            "10.0.0.1\n",
            "10.0.0.0/8,10.1.0.0/16",
            "10.0.0.0-10.0.0.9",
            "10.0.0.*",
            "*",
            "localhost",
            "redis:6379",
            "fd00::/129",
            "fd00::/",
            "fd00::%eth0",
            "[::1]",
            "10.0.0.1:80",
            "::ffff:10.0.0.300",
        ] {
            assert!(!reads(bad) && !pattern.is_match(bad), "{bad:?}");
        }
        let schema = authorization_policy();
        let source = &schema["properties"]["rules"]["items"]["properties"]["from"]["items"]["properties"]["source"];
        for field in ["ipBlocks", "notIpBlocks", "remoteIpBlocks", "notRemoteIpBlocks"] {
            assert_eq!(source["properties"][field], blocks(), "{field}");
        }
    }

    fn collect(value: &Value, at: &str, found: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                for (name, inner) in map {
                    found.push(format!("{at}{name}"));
                    collect(inner, &format!("{at}{name}."), found);
                }
            }
            Value::Array(all) => all.iter().for_each(|inner| collect(inner, at, found)),
            _ => {}
        }
    }

    #[test]
    fn one_version_is_stored_and_both_have_a_status() {
        for definition in definitions() {
            let versions = definition.value["spec"]["versions"].as_array().unwrap();
            let stored: Vec<_> = versions.iter().filter(|version| version["storage"] == true).collect();
            assert_eq!(stored.len(), 1);
            assert_eq!(stored[0]["name"], "v1");
            assert!(versions.iter().all(|version| version["subresources"]["status"].is_object()));
            assert_eq!(definition.value["metadata"]["labels"][MANAGED_BY], "justmtls");
        }
    }
}
