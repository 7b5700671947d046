//! A simulated API server over HTTP: lists as streams or whole, watches, reads and writes with versions, and reviews of
//! tokens; no more than the control plane asks for.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{Method, Response, StatusCode};
use futures_util::{Stream, StreamExt, stream};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::time::{Instant, timeout_at};

use super::store::{Kind, Store, Stored, event};

/// Events that go out in one piece.
const PIECE: usize = 200;
/// The longest request.
const MAX_REQUEST: usize = 4 * 1024 * 1024;
/// How long a watch lasts whose caller does not say.
const WATCH: Duration = Duration::from_secs(60);

/// Who a token is of: the audience, the node, and the pod's UID.
#[derive(Clone)]
pub(super) struct Holder {
    pub(super) audience: &'static str,
    pub(super) node: String,
    pub(super) pod: String,
}

/// Whose each token is.
pub(super) type Holders = HashMap<String, Holder>;

/// The API server.
pub(super) struct ApiServer {
    pub(super) store: Arc<Store>,
    pub(super) tokens: Holders,
}

/// Serves for as long as the runtime lives; the address where.
pub(super) async fn serve(server: ApiServer) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await.context("cannot listen for the simulated API server")?;
    let address = listener.local_addr()?;
    let router = Router::new().fallback(answer).with_state(Arc::new(server));
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            eprintln!("bench: the simulated API server ended: {error}");
        }
    });
    Ok(address)
}

/// What a path names.
struct Target {
    kind: Kind,
    /// Of one object: `namespace/name`, or the name.
    key: Option<String>,
    namespace: Option<String>,
}

impl Target {
    /// `/api/v1/…` and `/apis/GROUP/VERSION/…`.
    fn of(path: &str) -> Option<Target> {
        let mut parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let words = if parts.first() == Some(&"api") { 2 } else { 3 };
        let group = parts.get(1..words)?.join("/");
        parts.drain(..words);
        let namespace = (parts.len() >= 3 && parts[0] == "namespaces").then(|| parts[1].to_owned());
        let rest = if namespace.is_some() { &parts[2..] } else { &parts[..] };
        let kind = Kind::of(&group, rest.first()?)?;
        let key = rest.get(1).map(|name| match &namespace {
            Some(namespace) => format!("{namespace}/{name}"),
            None => (*name).to_owned(),
        });
        Some(Target { kind, key, namespace })
    }
}

async fn answer(State(server): State<Arc<ApiServer>>, request: Request) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let Ok(body) = axum::body::to_bytes(body, MAX_REQUEST).await else { return status(413, "too long") };
    let path = parts.uri.path();
    let pairs = parts.uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    let query: BTreeMap<&str, &str> = pairs.collect();
    match path {
        "/readyz" => return whole(200, "ok".to_owned()),
        "/apis/authentication.k8s.io/v1/tokenreviews" => return server.review(&body),
        _ => {}
    }
    let Some(target) = Target::of(path) else { return status(404, "no such kind") };
    match (parts.method, &target.key) {
        (Method::GET, None) if query.contains_key("watch") => watch(&server.store, target.kind, &query),
        (Method::GET, None) => server.list(target.kind),
        (Method::GET, Some(key)) => match server.store.get(target.kind, key) {
            Some(stored) => whole(200, stored.text.to_string()),
            None => status(404, "no such object"),
        },
        (Method::POST, None) => server.write(&target, None, &body, 201),
        (Method::PUT, Some(key)) => server.write(&target, Some(key), &body, 200),
        (Method::DELETE, Some(key)) => {
            server.store.remove(target.kind, key);
            whole(200, "{}".to_owned())
        }
        _ => status(405, "nobody was expected to ask for this"),
    }
}

impl ApiServer {
    fn review(&self, body: &[u8]) -> Response<Body> {
        let review: Value = serde_json::from_slice(body).unwrap_or_default();
        let holder = review["spec"]["token"].as_str().and_then(|token| self.tokens.get(token));
        let answer = match holder {
            Some(Holder { audience, node, pod }) => json!({
                "authenticated": true, "audiences": [audience],
                "user": {
                    "username": "system:serviceaccount:justmtls-system:justmtls-node",
                    "extra": {
                        "authentication.kubernetes.io/node-name": [node], "authentication.kubernetes.io/pod-uid": [pod],
                    },
                },
            }),
            None => json!({ "authenticated": false }),
        };
        let review = json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "metadata": {}, "spec": {}, "status": answer });
        whole(201, review.to_string())
    }

    fn list(&self, kind: Kind) -> Response<Body> {
        let (objects, version) = self.store.all(kind);
        let items = objects.join(",");
        let metadata = json!({ "resourceVersion": version.to_string() });
        whole(200, format!(r#"{{"apiVersion":"v1","kind":"List","metadata":{metadata},"items":[{items}]}}"#))
    }

    fn write(&self, target: &Target, key: Option<&str>, body: &[u8], code: u16) -> Response<Body> {
        let Ok(mut object) = serde_json::from_slice::<Value>(body) else { return status(400, "no object") };
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let key = match (key, &target.namespace) {
            (Some(key), _) => key.to_owned(),
            (None, Some(namespace)) => format!("{namespace}/{name}"),
            (None, None) => name,
        };
        let was = match object["metadata"]["resourceVersion"].as_str().map(str::parse::<u64>) {
            Some(Ok(version)) => Some(version),
            // Without a version whatever is there is replaced; and only what is not there is made.
            _ if code == 200 => self.store.get(target.kind, &key).map(|stored| stored.version),
            _ => None,
        };
        object["metadata"]["resourceVersion"] = json!("@VERSION@");
        if let Some(namespace) = &target.namespace {
            object["metadata"]["namespace"] = json!(namespace);
        }
        if object["metadata"]["uid"].is_null() {
            object["metadata"]["uid"] = json!(format!("uid-of-{key}"));
        }
        match self.store.put_if(target.kind, &key, was, &object.to_string()) {
            Ok(Stored { text, .. }) => whole(code, text.to_string()),
            Err(_) => status(409, "it is another version"),
        }
    }
}

/// What changes, and before that, if it is asked for, all that there is.
fn watch(store: &Arc<Store>, kind: Kind, query: &BTreeMap<&str, &str>) -> Response<Body> {
    let lasts = query.get("timeoutSeconds").and_then(|text| text.parse().ok()).map_or(WATCH, Duration::from_secs);
    let ends = Instant::now() + lasts;
    let mut from = query.get("resourceVersion").and_then(|text| text.parse().ok()).unwrap_or(0);
    let mut first = Vec::new();
    if query.contains_key("sendInitialEvents") {
        (first, from) = store.all(kind);
    } else if store.since(kind, from, 0).is_none() {
        let gone = json!({ "code": 410, "reason": "Expired", "message": "too old", "status": "Failure" }).to_string();
        return streamed(stream::iter([Bytes::from(event("ERROR", &gone))]));
    }
    let mark = query.contains_key("sendInitialEvents").then(|| {
        let annotations = json!({ "k8s.io/initial-events-end": "true" });
        let metadata = json!({ "resourceVersion": from.to_string(), "annotations": annotations });
        Bytes::from(event("BOOKMARK", &json!({ "apiVersion": "v1", "kind": "Some", "metadata": metadata }).to_string()))
    });
    let added = move |objects: Vec<Arc<str>>| {
        Bytes::from(objects.iter().map(|object| event("ADDED", object)).collect::<String>())
    };
    let initial = stream::iter(first).chunks(PIECE).map(added).chain(stream::iter(mark));
    let (store, changed) = (store.clone(), store.changes());
    let later = stream::unfold((store, changed, from), move |(store, mut changed, from)| async move {
        loop {
            changed.borrow_and_update();
            let (lines, last) = store.since(kind, from, PIECE)?;
            if !lines.is_empty() {
                return Some((Bytes::from(lines.concat()), (store, changed, last)));
            }
            timeout_at(ends, changed.changed()).await.ok()?.ok()?;
        }
    });
    streamed(initial.chain(later))
}

fn streamed(pieces: impl Stream<Item = Bytes> + Send + 'static) -> Response<Body> {
    Response::new(Body::from_stream(pieces.map(Ok::<_, Infallible>)))
}

fn whole(code: u16, text: String) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response
}

fn status(code: u16, message: &str) -> Response<Body> {
    let reason = match code {
        404 => "NotFound",
        409 => "Conflict",
        _ => "BadRequest",
    };
    let status = json!({
        "apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": message,
    });
    whole(code, status.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_names_a_kind_and_perhaps_an_object() {
        let target = |path: &str| Target::of(path).map(|target| (target.kind, target.key));
        assert_eq!(target("/api/v1/pods"), Some((Kind::Pods, None)));
        assert_eq!(target("/api/v1/namespaces"), Some((Kind::Namespaces, None)));
        let config = "/api/v1/namespaces/justmtls-system/configmaps/justmtls";
        assert_eq!(target(config), Some((Kind::ConfigMaps, Some("justmtls-system/justmtls".into()))));
        assert_eq!(target("/apis/discovery.k8s.io/v1/endpointslices"), Some((Kind::EndpointSlices, None)));
        assert_eq!(target("/apis/certificates.k8s.io/v1/clustertrustbundles"), None);
        assert_eq!(target("/apis"), None);
    }
}
