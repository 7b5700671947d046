//! `status`: everything of the box as one value.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use linux::sandbox::Authority;
use manifests::Object;
use manifests::k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use crate::admin;
use crate::cluster::Cluster;
use crate::complaints::problem;
use crate::endpoints;
use crate::network::{Network, OUTSIDE, control_address};
use crate::supervisor::Supervisor;

/// Whether nothing more is to be expected of a pod: it is ready, or has ended.
pub(crate) fn is_settled(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    endpoints::is_ready(pod) || matches!(phase, Some("Succeeded" | "Failed"))
}

/// The status, and handles on the processes in it: their numbers outside of the box are not known here.
pub(crate) fn status(
    state: &Path,
    authority: Authority,
    cluster: &Cluster,
    network: &Network,
    supervisor: &Supervisor,
    complaints: Vec<Value>,
) -> (Value, Vec<OwnedFd>) {
    let mut handles = Vec::new();
    let control = supervisor.shown(None, &mut handles);
    let nodes: Vec<_> = network
        .nodes()
        .map(|(plan, _)| {
            json!({
                "name": plan.name,
                "addresses": plan.fabric.both(),
                "gateway": plan.gateway.both(),
                "processes": supervisor.shown(Some(&plan.name), &mut handles),
                "podCIDRs": [plan.pods_v4.to_string(), plan.pods_v6.to_string()],
            })
        })
        .collect();
    let ended = supervisor.problems().map(|sentence| problem("error", &sentence));
    let services: Vec<_> = cluster.objects().filter_map(|(_, object)| service(object)).collect();
    let status = json!({
        "state": state,
        "authority": match authority { Authority::Root => "root", Authority::UserNamespace => "user" },
        "ready": cluster.pods().all(is_settled),
        "control": { "addresses": control_address().both(), "processes": control },
        "outside": { "addresses": OUTSIDE.both() },
        "nodes": nodes,
        "pods": cluster.pods().map(pod).collect::<Vec<_>>(),
        "services": services,
        "problems": ended.chain(complaints).collect::<Vec<_>>(),
    });
    (status, handles)
}

/// Adds what the control plane knows: for each pod its mode and whether it is captured, and further problems.
pub(crate) async fn add_control_plane_view(status: &mut Value, control: PathBuf) {
    let view = admin::json(control.clone(), "/workloads").await;
    let workloads = &view["workloads"];
    let of = |uid: &Value| workloads.as_array().into_iter().flatten().find(|workload| workload["pod_uid"] == *uid);
    for pod in status["pods"].as_array_mut().into_iter().flatten() {
        if let Some(workload) = of(&pod["uid"]) {
            for field in ["captured", "uncaptured", "mode", "identity"] {
                pod[field] = workload[field].clone();
            }
        }
    }
    if let (Some(problems), Value::Array(more)) =
        (status["problems"].as_array_mut(), admin::json(control, "/problems").await)
    {
        problems.extend(more);
    }
}

fn pod(pod: &Pod) -> Value {
    let status = pod.status.as_ref();
    json!({
        "namespace": pod.metadata.namespace,
        "name": pod.metadata.name,
        "uid": pod.metadata.uid,
        "node": pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref()),
        "serviceAccount": pod.spec.as_ref().and_then(|spec| spec.service_account_name.as_ref()),
        "addresses": endpoints::addresses(pod).collect::<Vec<_>>(),
        "phase": status.and_then(|status| status.phase.as_ref()),
        "ready": endpoints::is_ready(pod),
        "message": status.and_then(|status| status.message.as_ref()),
        "ending": pod.metadata.deletion_timestamp.is_some(),
    })
}

fn service(object: &Object) -> Option<Value> {
    let Object::Service(service) = object else { return None };
    let spec = service.spec.as_ref()?;
    let ports: Vec<_> = spec.ports.iter().flatten().map(|port| port.port).collect();
    Some(json!({
        "namespace": service.metadata.namespace,
        "name": service.metadata.name,
        "addresses": spec.cluster_ips,
        "ports": ports,
    }))
}
