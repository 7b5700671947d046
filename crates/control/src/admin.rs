//! What the control plane shows: dumps as JSON on a Unix socket, and numbers for Prometheus.
//!
//! Everything is read-only, and nothing here can name a key or a token.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};

use crate::control::Event;
use crate::metrics::Metrics;
use crate::nodes::Nodes;
use crate::problem::Problem;
use crate::publication::Publication;

/// What is shown.
pub(crate) struct Shown {
    pub(crate) events: mpsc::Sender<Event>,
    pub(crate) nodes: Nodes,
    pub(crate) publication: Arc<Publication>,
    pub(crate) metrics: Arc<Metrics>,
}

/// What only the owner of the index can say.
#[derive(Debug)]
pub(crate) struct Dump {
    pub(crate) workloads: Vec<mesh::Workload>,
    pub(crate) services: Vec<mesh::Service>,
    pub(crate) policies: Vec<mesh::Policy>,
    pub(crate) settings: mesh::MeshSettings,
    pub(crate) problems: Vec<Problem>,
    /// The cluster's nodes.
    pub(crate) nodes: Vec<String>,
}

type Shared = State<Arc<Shown>>;

/// Serves the dumps on a Unix socket that only this user and root can open. A socket that an earlier process left is
/// replaced.
///
/// # Errors
/// The socket cannot be made.
pub(crate) fn serve(path: &Path, shown: Arc<Shown>) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    let router = Router::new()
        .route("/readyz", get(ready))
        .route("/problems", get(problems))
        .route("/nodes", get(nodes))
        .route("/workloads", get(workloads))
        .route("/metrics", get(metrics))
        .fallback(async || {
            (StatusCode::NOT_FOUND, "there is no such page; there are /metrics, /nodes, /problems, /readyz, /workloads")
        })
        .with_state(shown);
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(())
}

/// Asks the owner of the index.
async fn dump(shown: &Shown) -> Result<Dump, StatusCode> {
    let (answer, dump) = oneshot::channel();
    let asked = shown.events.send(Event::Dump { answer }).await;
    asked.map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
    dump.await.map_err(|_| StatusCode::SERVICE_UNAVAILABLE)
}

/// Ready means: every object was listed, and nodes are served. The socket is not there before the list was read.
async fn ready(State(shown): Shared) -> Result<Json<Value>, StatusCode> {
    let dump = dump(&shown).await?;
    let withheld = shown.publication.withheld();
    Ok(Json(json!({
        "ready": withheld.is_none(),
        "withheld": withheld,
        "workloads": dump.workloads.len(),
        "problems": dump.problems.len(),
    })))
}

async fn problems(State(shown): Shared) -> Result<Json<Value>, StatusCode> {
    let problems = dump(&shown).await?.problems;
    let problem = |problem: &Problem| {
        json!({
            "severity": problem.severity,
            "subject": problem.subject,
            "message": problem.message,
            "sentence": problem.to_string(),
        })
    };
    Ok(Json(problems.iter().map(problem).collect()))
}

/// All nodes of the cluster, also those that are not connected, and nodes that only have a token.
async fn nodes(State(shown): Shared) -> Result<Json<Value>, StatusCode> {
    let known = dump(&shown).await?.nodes;
    let mut streams = shown.nodes.all();
    for node in &known {
        streams.entry(node.clone()).or_default();
    }
    let node = |(name, streams): (&String, &Vec<_>)| json!({ "node": name, "known": known.contains(name), "streams": streams });
    Ok(Json(streams.iter().map(node).collect()))
}

async fn workloads(State(shown): Shared) -> Result<Json<Value>, StatusCode> {
    let dump = dump(&shown).await?;
    let service = |service: &mesh::Service| {
        let name = &service.name;
        let serving = dump.workloads.iter().filter(|workload| workload.endpoints.iter().any(|it| it.service == *name));
        json!({
            "name": name.to_string(),
            "addresses": service.addresses,
            "ports": service.ports.iter().map(|port| port.port).collect::<Vec<_>>(),
            "endpoints": serving.map(|workload| format!("{}/{}", workload.namespace, workload.name)).collect::<Vec<_>>(),
        })
    };
    Ok(Json(json!({
        "workloads": dump.workloads.iter().map(workload).collect::<Vec<_>>(),
        "services": dump.services.iter().map(service).collect::<Vec<_>>(),
        "policies": dump.policies.iter().map(|policy| policy.name.to_string()).collect::<Vec<_>>(),
        "settings": {
            "inside": dump.settings.inside,
            "mixed": dump.settings.mixed,
            "nodes": dump.settings.nodes,
        },
    })))
}

fn workload(workload: &mesh::Workload) -> Value {
    let ports = workload.modes.ports.iter().map(|(port, mode)| (port.to_string(), json!(mode_name(*mode))));
    json!({
        "uid": workload.uid.as_str(),
        "pod_uid": workload.pod_uid.as_str(),
        "namespace": &*workload.namespace,
        "name": &*workload.name,
        "node": &*workload.node,
        "identity": workload.identity.as_str(),
        "workload": &*workload.canonical.workload,
        "canonical_service": &*workload.canonical.service,
        "canonical_revision": &*workload.canonical.revision,
        "addresses": workload.addresses,
        "captured": workload.speaks == mesh::Speaks::JustMtls,
        "uncaptured": workload.uncaptured.map(|why| why.in_clear().as_str()),
        "mode": mode_name(workload.modes.default),
        "port_modes": ports.collect::<serde_json::Map<_, _>>(),
        "services": workload.endpoints.iter().map(|endpoint| endpoint.service.to_string()).collect::<Vec<_>>(),
        "policies": workload.policies.iter().map(ToString::to_string).collect::<Vec<_>>(),
    })
}

fn mode_name(mode: mesh::Mode) -> &'static str {
    match mode {
        mesh::Mode::Permissive => "permissive",
        mesh::Mode::Strict => "strict",
    }
}

/// What [`numbers`] are written in.
pub(crate) const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

async fn metrics(State(shown): Shared) -> Result<impl IntoResponse, StatusCode> {
    Ok(([(CONTENT_TYPE, OPEN_METRICS)], numbers(&shown).await?))
}

/// All numbers, as they are now.
pub(crate) async fn numbers(shown: &Shown) -> Result<String, StatusCode> {
    let dump = dump(shown).await?;
    let metrics = &shown.metrics;
    let captured = dump.workloads.iter().filter(|workload| workload.speaks == mesh::Speaks::JustMtls).count();
    for (gauge, value) in [
        (&metrics.problems, dump.problems.len()),
        (&metrics.workloads, dump.workloads.len()),
        (&metrics.captured, captured),
        (&metrics.streams, shown.nodes.open()),
        (&metrics.nodes, dump.nodes.len()),
        (&metrics.nodes_current, shown.nodes.current()),
    ] {
        gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
    }
    Ok(metrics.text())
}
