//! What is said of the fields of Kubernetes' own kinds.

use super::{check, check_meta, check_pod, check_service};

#[test]
fn pods_are_checked() {
    check(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a}",
        &["1: Pod default/a: field spec: is missing; write a spec with containers"],
    );
    check_pod(
        "nodeName: node-a",
        &["4: Pod shop/web: field spec.containers: is missing; write at least one container"],
    );
    check_pod(
        "containers: [{}]",
        &[
            "5: Pod shop/web: field spec.containers[0].name: is missing; use at most 63 of a-z, 0-9 and -, with a letter or digit first and last",
        ],
    );
    check_pod(
        "containers: [{name: c}, {name: c}]",
        &["5: Pod shop/web: field spec.containers[1].name: c is there twice; change or remove one of the two"],
    );
    let port = |port: &str, sentence: &str| {
        check_pod(
            &format!("containers:\n- name: c\n  ports:\n  - {port}"),
            &[&format!("8: Pod shop/web: field spec.containers[0].ports[0]{sentence}")],
        );
    };
    port("containerPort: 0", ".containerPort: 0 is not a port; use a number from 1 to 65535");
    port("containerPort: 70000", ".containerPort: 70000 is not a port; use a number from 1 to 65535");
    port("containerPort: -1", ".containerPort: -1 is not a port; use a number from 1 to 65535");
    port("name: http", ".containerPort: is missing; use a number from 1 to 65535");
    port("{containerPort: 1, protocol: tcp}", ".protocol: tcp is not known; use TCP or UDP or SCTP");
    port(
        "{containerPort: 1, name: HTTP}",
        ".name: HTTP is not allowed; use at most 15 of a-z, 0-9 and single -, at least one letter, and no - first or last",
    );
    check_pod(
        "containers:\n- name: c\n  ports: [{name: http, containerPort: 1}, {name: http, containerPort: 2}]",
        &[
            "7: Pod shop/web: field spec.containers[0].ports[1].name: http is there twice; change or remove one of the two",
        ],
    );
    check_pod(
        "securityContext: {runAsUser: -1}\ncontainers: [{name: c, securityContext: {runAsGroup: 4294967296}}]",
        &[
            "5: Pod shop/web: field spec.securityContext.runAsUser: -1 is not a user or group id; use a number from 0 to 2147483647",
            "6: Pod shop/web: field spec.containers[0].securityContext.runAsGroup: 4294967296 is not a user or group id; use a number from 0 to 2147483647",
        ],
    );
    check_pod(
        "restartPolicy: Sometimes\ncontainers: [{name: c}]",
        &["5: Pod shop/web: field spec.restartPolicy: Sometimes is not known; use Always or OnFailure or Never"],
    );
    check_pod(
        "containers: [{name: c, readinessProbe: {tcpSocket: {port: 0}}}]",
        &[
            "5: Pod shop/web: field spec.containers[0].readinessProbe.tcpSocket.port: 0 is not a port; use a number from 1 to 65535",
        ],
    );
}

#[test]
fn deployments_are_checked_like_the_pods_they_become() {
    let deployment = |spec: &str| format!("apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: d}}\nspec: {spec}");
    check(
        deployment(
            "{replicas: -1, selector: {}, template: {spec: {containers: [{name: c, ports: [{containerPort: 0}]}]}}}",
        ),
        &[
            "4: Deployment default/d: field spec.replicas: -1 is not a number of pods; use 0 or more",
            "4: Deployment default/d: field spec.selector: selects no pods of its own; write matchLabels that are the labels of spec.template",
            "4: Deployment default/d: field spec.template.spec.containers[0].ports[0].containerPort: 0 is not a port; use a number from 1 to 65535",
        ],
    );
    let template = "template: {metadata: {labels: {app: web}}, spec: {containers: [{name: c}]}}";
    check(
        deployment(&format!("{{selector: {{matchLabels: {{app: db}}}}, {template}}}")),
        &[
            "4: Deployment default/d: field spec.selector: does not select the pods of spec.template; use labels of spec.template.metadata.labels",
        ],
    );
    check(
        deployment(&format!("{{selector: {{matchExpressions: [{{key: app, operator: Is}}]}}, {template}}}")),
        &[
            "4: Deployment default/d: field spec.selector.matchExpressions[0].operator: Is is not an operator; use In or NotIn with values, Exists or DoesNotExist without",
            "4: Deployment default/d: field spec.selector: does not select the pods of spec.template; use labels of spec.template.metadata.labels",
        ],
    );
    check(
        deployment(&format!(
            "{{selector: {{matchExpressions: [{{key: app, operator: In, values: [web]}}]}}, {template}}}"
        )),
        &[],
    );
}

#[test]
fn services_are_checked() {
    check_service(
        "\n  ports:\n  - port: 80\n    targetPort: 70000",
        &["7: Service shop/web: field spec.ports[0].targetPort: 70000 is not a port; use a number from 1 to 65535"],
    );
    check_service(
        "\n  ports:\n  - port: 70000",
        &["6: Service shop/web: field spec.ports[0].port: 70000 is not a port; use a number from 1 to 65535"],
    );
    check_service(
        "{ports: [{targetPort: http}]}",
        &["4: Service shop/web: field spec.ports[0].port: is missing; use a number from 1 to 65535"],
    );
    check_service(
        "{selector: {app: web}}",
        &["4: Service shop/web: field spec.ports: is missing; write at least one port"],
    );
    check_service("{clusterIP: None, selector: {app: web}}", &[]);
    check_service(
        "{type: ExternalName}",
        &[
            "4: Service shop/web: field spec.externalName: is missing; use at most 253 of a-z, 0-9, - and ., with a letter or digit first and last in each part",
        ],
    );
    check_service(
        "{type: Public, ports: [{port: 1}]}",
        &[
            "4: Service shop/web: field spec.type: Public is not known; use ClusterIP or NodePort or LoadBalancer or ExternalName",
        ],
    );
    check_service(
        "{clusterIP: 10.0.0, ports: [{port: 1}]}",
        &["4: Service shop/web: field spec.clusterIP: 10.0.0 is not an IP address; write an IPv4 or IPv6 address"],
    );
    check_service(
        "{ports: [{port: 1}, {port: 2, name: b}]}",
        &[
            "4: Service shop/web: field spec.ports[0].name: is missing; name every port of a Service that has more than one",
        ],
    );
    check_service(
        "{ports: [{port: 1, name: b}, {port: 2, name: b}]}",
        &["4: Service shop/web: field spec.ports[1].name: b is there twice; change or remove one of the two"],
    );
    check_service(
        "{ports: [{port: 1, name: a}, {port: 1, name: b}]}",
        &["4: Service shop/web: field spec.ports[1].port: TCP port 1 is there twice; change or remove one of the two"],
    );
    check_service("{ports: [{port: 1, name: a}, {port: 1, name: b, protocol: UDP}]}", &[]);
    check_meta(
        "Service",
        "{name: 1a}\nspec: {ports: [{port: 1}]}",
        &[
            "3: Service default/1a: field metadata.name: 1a is not allowed; use at most 63 of a-z, 0-9 and -, with a letter first and no - last",
        ],
    );
}

#[test]
fn nodes_and_slices_are_checked() {
    let slice =
        |rest: &str| format!("apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: s}}\n{rest}");
    check(
        slice("addressType: IPv4\nendpoints: [{addresses: [\"fd00::1\"]}]\nports: [{port: 0}]"),
        &[
            "5: EndpointSlice default/s: field endpoints[0].addresses[0]: fd00::1 is not an address of type IPv4; write an address of that type, or another slice",
            "6: EndpointSlice default/s: field ports[0].port: 0 is not a port; use a number from 1 to 65535",
        ],
    );
    check(
        slice("addressType: ipv4\nendpoints: []"),
        &["4: EndpointSlice default/s: field addressType: ipv4 is not known; use IPv4 or IPv6 or FQDN"],
    );
    check_meta(
        "Node",
        "{name: m}\nspec: {podCIDRs: [10.0.0.0]}\nstatus: {addresses: [{type: InternalIP, address: x}, {type: Hostname, address: m}]}",
        &[
            "4: Node m: field spec.podCIDRs[0]: 10.0.0.0 is not a range of addresses; write it as 10.0.0.0/24 or fd00::/64",
            "5: Node m: field status.addresses[0].address: x is not an IP address; write an IPv4 or IPv6 address",
        ],
    );
}
