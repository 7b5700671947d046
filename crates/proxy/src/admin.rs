//! What the proxy shows: dumps as JSON on a Unix socket, and numbers for Prometheus there and on a TCP port.
//!
//! Everything is read-only, and nothing here can name a key.

use std::collections::HashMap;
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
use tokio::net::{TcpListener, UnixListener};
use wire::bounded::Bounded;

use crate::certs::Authority;
use crate::connections::{Connection, Security};
use crate::cores::Cores;
use crate::coverage;
use crate::metrics::Now;
use crate::node::Node;
use crate::pods::Pods;

/// What is shown.
#[derive(Debug)]
pub(crate) struct Shown<A> {
    /// The node.
    pub(crate) node: Arc<Node>,
    /// Its pods.
    pub(crate) pods: Arc<Pods<A>>,
    /// Its cores.
    pub(crate) cores: Arc<Cores>,
    /// How the process was started.
    pub(crate) config: Value,
}

type Shared<A> = State<Arc<Shown<A>>>;

/// Serves the dumps on a Unix socket that only this user and root can open. A socket that an earlier process left is
/// replaced.
///
/// # Errors
/// The socket cannot be made.
pub(crate) fn serve_dumps<A: Authority>(path: &Path, shown: Arc<Shown<A>>) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    let router = Router::new()
        .route("/connections", get(connections::<A>))
        .route("/coverage", get(coverage::<A>))
        .route("/workloads", get(workloads::<A>))
        .route("/certificates", get(certificates::<A>))
        .route("/pods", get(pods::<A>))
        .route("/config", get(config::<A>))
        .route("/readyz", get(ready::<A>))
        .route("/metrics", get(metrics::<A>))
        .fallback(async || no_such_page(PAGES))
        .with_state(shown);
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(())
}

/// All pages of the Unix socket.
const PAGES: &str = "/certificates, /config, /connections, /coverage, /metrics, /pods, /readyz, /workloads";

fn no_such_page(pages: &str) -> (StatusCode, String) {
    (StatusCode::NOT_FOUND, format!("there is no such page; there are {pages}"))
}

/// Serves the numbers, and whether we are ready, on a TCP port, for ever. Anybody who reaches it may read them.
pub(crate) async fn serve_metrics<A: Authority>(listener: TcpListener, shown: Arc<Shown<A>>) -> io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(metrics::<A>))
        .route("/readyz", get(ready::<A>))
        .fallback(async || no_such_page("/metrics, /readyz"))
        .with_state(shown);
    axum::serve(Bounded::new(listener), router).await
}

async fn metrics<A: Authority>(State(shown): Shared<A>) -> impl IntoResponse {
    let node = &shown.node;
    let age = node.view.age().map_or(-1, |age| i64::try_from(age.as_millis()).unwrap_or(i64::MAX));
    node.metrics.view_age.set(age);
    node.metrics.view_stale.set(node.view.read(mesh::View::is_stale).into());
    let now = Now {
        time: node.clock.monotonic(),
        connections: &node.connections.all(),
        view: node.view.version(),
        svids: &node.certificates.all(),
        stash: shown.pods.stashed(),
    };
    ([(CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], node.metrics.text(&now))
}

/// Ready means: the view is live, and each pod that is served here can prove who it is. A proxy whose agent is away
/// serves its pods as before; one that has never had one has none.
async fn ready<A: Authority>(State(shown): Shared<A>) -> impl IntoResponse {
    let node = &shown.node;
    let view = node.view.read(|view| view.settings().is_some());
    let bundle = node.certificates.bundle().is_some();
    let agent = node.metrics.agent.get() == 1;
    let pods = shown.pods.all();
    let mut waiting: Vec<_> = pods.iter().filter(|it| !node.certificates.has(&it.pod.identity)).collect();
    waiting.sort_by(|a, b| a.pod.name.cmp(&b.pod.name));
    let ready = view && bundle && waiting.is_empty() && (agent || !pods.is_empty());
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let without_certificate: Vec<_> = waiting.iter().map(|it| &*it.pod.name).collect();
    let page = json!({
        "ready": ready,
        "view": view,
        "bundle": bundle,
        "agent": agent,
        "pods": pods.len(),
        "without_certificate": without_certificate,
    });
    (status, Json(page))
}

async fn config<A: Authority>(State(shown): Shared<A>) -> Json<Value> {
    Json(shown.config.clone())
}

async fn connections<A: Authority>(State(shown): Shared<A>) -> Json<Value> {
    let mut all = shown.node.connections.all();
    all.sort_by_key(|connection| connection.id);
    Json(all.iter().map(|connection| dump(connection)).collect())
}

fn dump(connection: &Connection) -> Value {
    let (sent, received) = connection.bytes.now();
    let decision = connection.decision();
    let security = decision.as_ref().map(|decision| &decision.security);
    let handshake = match security {
        Some(Security::Mtls(peer)) => Some(peer.handshake()),
        Some(Security::Plaintext(_)) | None => None,
    };
    json!({
        "id": connection.id,
        "direction": connection.direction.as_str(),
        "pod": &*connection.pod.name,
        "identity": connection.pod.identity.as_str(),
        "source": connection.source.to_string(),
        "dialled": connection.destination().map(|address| address.to_string()),
        "to": decision.as_ref().map(|decision| decision.to.to_string()),
        "other": decision.as_ref().and_then(|decision| decision.other.as_deref()),
        "service": decision.as_ref().and_then(|decision| decision.service.as_deref()),
        "security": security.map_or("none", Security::as_str),
        "reason": connection.reason(),
        "exposes": connection.exposed().map(|it| &*it.what),
        "peer": security.and_then(Security::peer).map(|peer| peer.as_str()),
        "tls": handshake.map(|handshake| handshake.version()),
        "group": handshake.map(|handshake| handshake.group()),
        "cipher": handshake.map(|handshake| handshake.cipher()),
        "sent": sent,
        "received": received,
        "since": connection.since.as_secs(),
        "age_ms": u64::try_from(connection.age().as_millis()).unwrap_or(u64::MAX),
    })
}

async fn coverage<A: Authority>(State(shown): Shared<A>) -> Json<Value> {
    let mut edges = shown.node.coverage.all();
    let now = shown.node.clock.wall();
    let pods = shown.pods.all();
    let open =
        |view: &mesh::View| pods.iter().flat_map(|it| coverage::from_before(&it.pod, view, now)).collect::<Vec<_>>();
    edges.extend(shown.node.view.read(open));
    Json(edges.iter().map(|(edge, counts)| json!({ "edge": edge, "counts": counts })).collect())
}

async fn certificates<A: Authority>(State(shown): Shared<A>) -> Json<Value> {
    let certificates = &shown.node.certificates;
    let now = shown.node.clock.wall();
    let mut svids = certificates.all();
    svids.sort_by(|a, b| a.id().cmp(b.id()));
    let svids = svids.iter().map(|svid| {
        json!({
            "identity": svid.id().as_str(),
            "not_before": svid.not_before().as_secs(),
            "not_after": svid.not_after().as_secs(),
            "valid": svid.validity().contains(now),
            "age": now.as_secs().saturating_sub(svid.not_before().as_secs()),
            "left": svid.not_after().as_secs().saturating_sub(now.as_secs()),
            "certificates": svid.chain().len(),
        })
    });
    let bundle = certificates.bundle().map(|bundle| {
        json!({
            "trust_domain": bundle.trust_domain().as_str(),
            "digest": bundle.digest().to_string(),
            "roots": bundle.roots().count(),
        })
    });
    Json(json!({ "bundle": bundle, "svids": svids.collect::<Vec<_>>(), "now": now.as_secs() }))
}

async fn pods<A: Authority>(State(shown): Shared<A>) -> Json<Value> {
    let mut pods = shown.pods.all();
    pods.sort_by(|a, b| a.pod.name.cmp(&b.pod.name));
    let pods = pods.iter().map(|summary| {
        let pod = &summary.pod;
        json!({
            "uid": pod.uid.as_str(),
            "name": &*pod.name,
            "identity": pod.identity.as_str(),
            "addresses": pod.addresses,
            "listeners": summary.listeners,
            "ready": summary.ready,
            "certificate": shown.node.certificates.has(&pod.identity),
            "connections": pod.open(),
            "stash": pod.stash.counts(),
        })
    });
    Json(json!({ "pods": pods.collect::<Vec<_>>(), "cores": shown.cores.open() }))
}

async fn workloads<A: Authority>(State(shown): Shared<A>) -> Json<Value> {
    Json(shown.node.view.read(|view| {
        let mut workloads: Vec<_> = view.workloads().collect();
        workloads.sort_by(|a, b| a.uid.cmp(&b.uid));
        let mut services: Vec<_> = view.services().collect();
        services.sort_by(|a, b| a.name.cmp(&b.name));
        let policies: Vec<_> = view.policies().map(|policy| policy.name.to_string()).collect();
        let endpoints: HashMap<_, Vec<_>> = services
            .iter()
            .map(|service| {
                let names = view.endpoints_of(&service.name).map(|it| format!("{}/{}", it.namespace, it.name));
                (service.name.to_string(), names.collect())
            })
            .collect();
        let settings = view.settings();
        json!({
            "workloads": workloads.iter().map(|workload| of_workload(workload)).collect::<Vec<_>>(),
            "services": services.iter().map(|service| json!({
                "name": service.name.to_string(),
                "addresses": service.addresses,
                "ports": service.ports.iter().map(|port| port.port).collect::<Vec<_>>(),
                "endpoints": endpoints.get(&service.name.to_string()),
            })).collect::<Vec<_>>(),
            "policies": policies,
            "settings": settings.map(|settings| json!({
                "inside": settings.inside,
                "mixed": settings.mixed,
                "nodes": settings.nodes,
                "api_servers": settings.api_servers,
            })),
        })
    }))
}

fn of_workload(workload: &mesh::Workload) -> Value {
    let ports: HashMap<_, _> = workload
        .modes
        .ports
        .iter()
        .map(|(port, mode)| (port.to_string(), format!("{mode:?}").to_lowercase()))
        .collect();
    json!({
        "uid": workload.uid.as_str(),
        "pod_uid": workload.pod_uid.as_str(),
        "name": &*workload.name,
        "namespace": &*workload.namespace,
        "identity": workload.identity.as_str(),
        "addresses": workload.addresses,
        "node": &*workload.node,
        "workload": &*workload.canonical.workload,
        "canonical_service": &*workload.canonical.service,
        "canonical_revision": &*workload.canonical.revision,
        "captured": workload.speaks == mesh::Speaks::JustMtls,
        "mode": format!("{:?}", workload.modes.default).to_lowercase(),
        "port_modes": ports,
        "uncaptured": workload.uncaptured.map(|why| format!("{why:?}")),
        "services": workload.endpoints.iter().map(|endpoint| endpoint.service.to_string()).collect::<Vec<_>>(),
        "policies": workload.policies.iter().map(ToString::to_string).collect::<Vec<_>>(),
    })
}
