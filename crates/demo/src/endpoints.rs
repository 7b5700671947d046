//! What the endpoint controller does: from Services and pods to EndpointSlices.
//!
//! Pure: objects in, objects out.

use std::collections::BTreeMap;
use std::net::IpAddr;

use manifests::k8s_openapi::api::core::v1::{ObjectReference, Pod, Service, ServicePort};
use manifests::k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use manifests::k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use manifests::k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// Who wrote a slice: only such slices are replaced, those of the user stay.
pub(crate) const MANAGER: &str = "demo.justmtls.dev";
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// The label by which a slice belongs to its Service.
pub(crate) const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// The slices of a Service: for each family, one for each set of target ports (a named port may mean
/// different numbers in different pods). Without a selector there are none: the user writes them.
pub(crate) fn slices<'a>(service: &Service, pods: impl Iterator<Item = &'a Pod>) -> Vec<EndpointSlice> {
    let spec = service.spec.as_ref();
    let Some(selector) = spec.and_then(|spec| spec.selector.as_ref()).filter(|labels| !labels.is_empty()) else {
        return Vec::new();
    };
    let namespace = service.metadata.namespace.as_deref();
    let ports = spec.and_then(|spec| spec.ports.as_deref()).unwrap_or_default();
    let despite = spec.and_then(|spec| spec.publish_not_ready_addresses).unwrap_or(false);

    let mut groups: BTreeMap<(&'static str, Vec<Option<i32>>), Vec<Endpoint>> = BTreeMap::new();
    for pod in pods {
        let labels = pod.metadata.labels.clone().unwrap_or_default();
        let selected = pod.metadata.namespace.as_deref() == namespace
            && selector.iter().all(|(key, value)| labels.get(key) == Some(value));
        if !selected || has_ended(pod) {
            continue;
        }
        let targets: Vec<_> = ports.iter().map(|port| target_port(port, pod)).collect();
        for address in addresses(pod) {
            let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
            let endpoint = endpoint(service, pod, address, despite);
            groups.entry((family, targets.clone())).or_default().push(endpoint);
        }
    }
    groups
        .into_iter()
        .enumerate()
        .map(|(number, ((family, targets), endpoints))| EndpointSlice {
            address_type: family.to_owned(),
            metadata: slice_metadata(service, family, number),
            ports: Some(slice_ports(ports, &targets)),
            endpoints,
        })
        .collect()
}

fn slice_metadata(service: &Service, family: &str, number: usize) -> ObjectMeta {
    let name = service.metadata.name.clone().unwrap_or_default();
    ObjectMeta {
        name: Some(format!("{name}-{}-{number}", family.to_lowercase())),
        namespace: service.metadata.namespace.clone(),
        labels: Some(BTreeMap::from([(SERVICE_NAME.to_owned(), name), (MANAGED_BY.to_owned(), MANAGER.to_owned())])),
        ..ObjectMeta::default()
    }
}

/// Whether a slice is one of ours.
pub(crate) fn is_ours(slice: &EndpointSlice) -> bool {
    slice.metadata.labels.as_ref().and_then(|labels| labels.get(MANAGED_BY)).is_some_and(|by| by == MANAGER)
}

fn slice_ports(ports: &[ServicePort], targets: &[Option<i32>]) -> Vec<EndpointPort> {
    ports
        .iter()
        .zip(targets)
        // A pod without that named port does not serve it.
        .filter(|(_, target)| target.is_some())
        .map(|(port, target)| EndpointPort {
            // The empty name is how a Service's only port is called.
            name: Some(port.name.clone().unwrap_or_default()),
            port: *target,
            protocol: Some(port.protocol.clone().unwrap_or_else(|| "TCP".to_owned())),
            app_protocol: port.app_protocol.clone(),
        })
        .collect()
}

fn target_port(port: &ServicePort, pod: &Pod) -> Option<i32> {
    match &port.target_port {
        None => Some(port.port),
        Some(IntOrString::Int(0)) => Some(port.port),
        Some(IntOrString::Int(number)) => Some(*number),
        Some(IntOrString::String(name)) => pod
            .spec
            .iter()
            .flat_map(|spec| &spec.containers)
            .flat_map(|container| container.ports.iter().flatten())
            .find(|declared| declared.name.as_ref() == Some(name))
            .map(|declared| declared.container_port),
    }
}

fn endpoint(service: &Service, pod: &Pod, address: IpAddr, despite: bool) -> Endpoint {
    let terminating = pod.metadata.deletion_timestamp.is_some();
    let serving = is_ready(pod) || despite;
    let spec = pod.spec.as_ref();
    let of_this_service = spec.and_then(|spec| spec.subdomain.as_ref()) == service.metadata.name.as_ref();
    Endpoint {
        addresses: vec![address.to_string()],
        conditions: Some(EndpointConditions {
            ready: Some(serving && !terminating),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        hostname: spec.and_then(|spec| spec.hostname.clone()).filter(|_| of_this_service),
        node_name: spec.and_then(|spec| spec.node_name.clone()),
        target_ref: Some(ObjectReference {
            kind: Some("Pod".to_owned()),
            name: pod.metadata.name.clone(),
            namespace: pod.metadata.namespace.clone(),
            uid: pod.metadata.uid.clone(),
            ..ObjectReference::default()
        }),
        ..Endpoint::default()
    }
}

/// The addresses that a pod's status has.
pub(crate) fn addresses(pod: &Pod) -> impl Iterator<Item = IpAddr> {
    pod.status.iter().flat_map(|status| status.pod_ips.iter().flatten()).filter_map(|entry| entry.ip.parse().ok())
}

/// Whether a pod's status says that it is Ready.
pub(crate) fn is_ready(pod: &Pod) -> bool {
    pod.status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use manifests::Object;

    fn objects(yaml: &str) -> Vec<Object> {
        let parsed = manifests::parse("test", yaml);
        assert_eq!(parsed.problems, []);
        parsed.objects.into_iter().map(|(object, _)| object).collect()
    }

    fn slices_of(yaml: &str) -> Vec<EndpointSlice> {
        let objects = objects(yaml);
        let service = objects.iter().find_map(|object| match object {
            Object::Service(service) => Some(service),
            _ => None,
        });
        let pods = objects.iter().filter_map(|object| match object {
            Object::Pod(pod) => Some(pod.as_ref()),
            _ => None,
        });
        slices(service.unwrap(), pods)
    }

    fn pod(name: &str, port: u16, ready: bool, address: &str) -> String {
        format!(
            "---\n{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: shop, labels: {{app: web}}}}, \
             spec: {{nodeName: node-a, containers: [{{name: main, command: [x], ports: [{{name: http, containerPort: {port}}}]}}]}}, \
             status: {{podIPs: [{{ip: {address}}}], conditions: [{{type: Ready, status: \"{}\"}}]}}}}\n",
            if ready { "True" } else { "False" }
        )
    }

    const SERVICE: &str = "{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, \
        spec: {selector: {app: web}, ports: [{port: 80, targetPort: http}]}}\n";

    #[test]
    fn a_named_port_is_what_each_pod_says_it_is() {
        let made = slices_of(&format!(
            "{SERVICE}{}{}",
            pod("one", 8080, true, "10.88.16.2"),
            pod("two", 9090, true, "10.88.16.3")
        ));
        let ports: Vec<_> = made.iter().map(|slice| slice.ports.as_ref().unwrap()[0].port).collect();
        assert_eq!(ports, [Some(8080), Some(9090)]);
    }

    #[test]
    fn families_have_slices_of_their_own_and_a_pod_that_is_not_ready_says_so() {
        let made = slices_of(&format!(
            "{SERVICE}{}{}",
            pod("one", 8080, true, "10.88.16.2"),
            pod("two", 8080, false, "'fd88:16::3'")
        ));
        let summary: Vec<_> = made
            .iter()
            .map(|slice| {
                let endpoint = &slice.endpoints[0];
                let ready = endpoint.conditions.as_ref().unwrap().ready;
                (slice.address_type.as_str(), endpoint.addresses[0].as_str(), ready)
            })
            .collect();
        assert_eq!(summary, [("IPv4", "10.88.16.2", Some(true)), ("IPv6", "fd88:16::3", Some(false))]);
    }
}
