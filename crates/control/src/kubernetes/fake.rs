//! An API server for tests, in this process: objects with versions, lists by pages, watches from a version on, and what can go
//! wrong with each. A real one is asked by the tests on a cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::body::Body;
use axum::http::{Method, Request, Response, StatusCode};
use futures_util::{Stream, StreamExt, stream};
use serde_json::{Value, json};
use tokio::sync::watch;

type Answer = Response<Body>;
type Review = Box<dyn Fn(&Value) -> Value + Send>;

/// The API server, and one way to it, on which watches may be held up.
#[derive(Clone, Default)]
pub(crate) struct Fake(Arc<Shared>, watch::Sender<bool>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: watch::Sender<()>,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Value>,
    version: u64,
    events: Vec<(u64, String, Value)>,
    /// Versions up to this one are forgotten.
    forgotten: u64,
    fails: Option<u16>,
    silent: bool,
    absent: BTreeSet<String>,
    terminating: BTreeSet<String>,
    without_streaming: bool,
    /// Lists end with an error after so many objects.
    lists_break_after: Option<usize>,
    /// What lists as streams say before they are over.
    said_in_lists: Vec<(String, Value)>,
    /// Watches that began before are cut.
    era: u64,
    writes: Vec<String>,
    lists: usize,
    reviews: usize,
    review: Option<Review>,
}

/// What a path names.
struct Target {
    prefix: String,
    namespace: Option<String>,
    plural: String,
    name: Option<String>,
}

impl Target {
    fn of(path: &str) -> Self {
        let mut rest: Vec<&str> = path.trim_matches('/').split('/').collect();
        let prefix: Vec<_> = rest.drain(..if rest[0] == "api" { 2 } else { 3 }).collect();
        let namespace = (rest.len() >= 3 && rest[0] == "namespaces").then(|| rest[1].to_owned());
        let rest = if namespace.is_some() { &rest[2..] } else { &rest[..] };
        let name = rest.get(1).map(|name| (*name).to_owned());
        Self { prefix: prefix.join("/"), namespace, plural: rest[0].to_owned(), name }
    }

    fn holds(&self, path: &str) -> bool {
        let other = Self::of(path);
        other.prefix == self.prefix
            && other.plural == self.plural
            && (self.namespace.is_none() || other.namespace == self.namespace)
    }
}

impl Fake {
    pub(crate) fn client(&self) -> kube::Client {
        let fake = self.clone();
        let service = tower::service_fn(move |request: Request<kube::client::Body>| {
            let fake = fake.clone();
            async move { Ok::<_, Infallible>(fake.answer(request).await) }
        });
        kube::Client::new(service, "default")
    }

    /// Another way to the same API server.
    pub(crate) fn another_way(&self) -> Self {
        Self(self.0.clone(), watch::Sender::default())
    }

    /// Holds up what watches would say on this way, or no longer.
    pub(crate) fn hold_up(&self, holds: bool) {
        self.1.send_replace(holds);
    }

    /// As after a backup that was restored: versions are low again.
    pub(crate) fn set_back(&self) {
        self.lock().version = 1;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }

    /// Answers everything with this status, until it is told otherwise.
    pub(crate) fn fail_with(&self, code: Option<u16>) {
        self.lock().fails = code;
    }

    /// Answers nothing any more, until it is told otherwise; what was asked meanwhile has no answer ever.
    pub(crate) fn be_silent(&self, silent: bool) {
        self.lock().silent = silent;
    }

    /// Does not serve a kind.
    pub(crate) fn without(&self, plural: &str) {
        self.lock().absent.insert(plural.to_owned());
    }

    pub(crate) fn with(&self, plural: &str) {
        self.lock().absent.remove(plural);
    }

    /// Deletes a namespace, which takes its time: nothing may be made in it meanwhile.
    pub(crate) fn terminate(&self, namespace: &str) {
        self.lock().terminating.insert(namespace.to_owned());
    }

    /// Knows nothing of lists as streams, as older servers.
    pub(crate) fn without_streaming(&self) {
        self.lock().without_streaming = true;
    }

    /// Lists end with an error after so many objects, or by pages after the first page, until it is told otherwise.
    pub(crate) fn break_lists_after(&self, objects: Option<usize>) {
        self.lock().lists_break_after = objects;
    }

    /// What goes while it is listed as a stream.
    pub(crate) fn remove_in_lists(&self, path: &str) {
        let mut state = self.lock();
        let event = json!({ "type": "DELETED", "object": state.objects[path] });
        state.said_in_lists.push((path.to_owned(), event));
    }

    /// How many objects were written by calls.
    pub(crate) fn writes(&self) -> usize {
        self.lock().writes.len()
    }

    /// How often this object was.
    pub(crate) fn writes_to(&self, path: &str) -> usize {
        self.lock().writes.iter().filter(|written| *written == path).count()
    }

    /// How often something was listed, by pages or as a stream.
    pub(crate) fn lists(&self) -> usize {
        self.lock().lists
    }

    /// How many tokens were reviewed.
    pub(crate) fn reviews(&self) -> usize {
        self.lock().reviews
    }

    /// Answers reviews of tokens: from spec to status.
    pub(crate) fn review_by(&self, review: impl Fn(&Value) -> Value + Send + 'static) {
        self.lock().review = Some(Box::new(review));
    }

    pub(crate) fn get(&self, path: &str) -> Option<Value> {
        self.lock().objects.get(path).cloned()
    }

    /// All objects whose paths begin so.
    pub(crate) fn all_below(&self, path: &str) -> Vec<Value> {
        let state = self.lock();
        state
            .objects
            .range(path.to_owned()..)
            .take_while(|(it, _)| it.starts_with(path))
            .map(|it| it.1.clone())
            .collect()
    }

    /// Puts an object as somebody else would.
    pub(crate) fn put(&self, path: &str, mut object: Value) {
        let target = Target::of(path);
        object["metadata"]["name"] = json!(target.name);
        if let Some(namespace) = target.namespace {
            object["metadata"]["namespace"] = json!(namespace);
        }
        self.store(&mut self.lock(), path, object);
    }

    pub(crate) fn change(&self, path: &str, change: impl FnOnce(&mut Value)) {
        let mut state = self.lock();
        let mut object = state.objects[path].clone();
        change(&mut object);
        self.store(&mut state, path, object);
    }

    pub(crate) fn remove(&self, path: &str) {
        let mut state = self.lock();
        let object = state.objects.remove(path).expect("it is there");
        state.version += 1;
        let event = json!({ "type": "DELETED", "object": object });
        let version = state.version;
        state.events.push((version, path.to_owned(), event));
        self.0.changed.send_replace(());
    }

    /// Cuts all watches.
    pub(crate) fn cut(&self) {
        self.lock().era += 1;
        self.0.changed.send_replace(());
    }

    /// Forgets what was, so that no watch can go on from there.
    pub(crate) fn forget(&self) {
        let mut state = self.lock();
        state.version += 1;
        state.forgotten = state.version;
    }

    fn store(&self, state: &mut State, path: &str, mut object: Value) -> Value {
        state.version += 1;
        let version = state.version;
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        if object["metadata"]["uid"].is_null() {
            object["metadata"]["uid"] = json!(format!("uid-{version}"));
        }
        let kind = if state.objects.contains_key(path) { "MODIFIED" } else { "ADDED" };
        state.objects.insert(path.to_owned(), object.clone());
        state.events.push((version, path.to_owned(), json!({ "type": kind, "object": object })));
        self.0.changed.send_replace(());
        object
    }

    async fn answer(&self, request: Request<kube::client::Body>) -> Answer {
        let (parts, body) = request.into_parts();
        let body = axum::body::to_bytes(Body::new(body), usize::MAX).await.unwrap();
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let path = parts.uri.path().to_owned();
        let query: BTreeMap<String, String> = parts
            .uri
            .query()
            .unwrap_or_default()
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        // Others may come in between.
        tokio::task::yield_now().await;
        if self.lock().silent {
            std::future::pending::<()>().await;
        }
        let mut state = self.lock();
        if let Some(code) = state.fails {
            return status(code, "it is made to fail");
        }
        if path == "/readyz" {
            return whole(200, &json!("ok"));
        }
        let target = Target::of(&path);
        if state.absent.contains(&target.plural) {
            return status(404, "no such kind");
        }
        if target.plural == "tokenreviews" {
            state.reviews += 1;
            let status = state.review.as_ref().expect("reviews are expected")(&body["spec"]);
            return whole(
                201,
                &json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {}, "status": status }),
            );
        }
        match (&parts.method, &target.name) {
            (&Method::GET, None) if query.contains_key("watch") => self.watch(&mut state, target, &query),
            (&Method::GET, None) => list(&mut state, &target, &query),
            (&Method::GET, Some(_)) => {
                state.objects.get(&path).map_or_else(|| status(404, "no such object"), |object| whole(200, object))
            }
            (&Method::POST, None) => {
                if let Some(namespace) = target.namespace.as_ref().filter(|it| state.terminating.contains(*it)) {
                    return terminating(namespace);
                }
                let path = format!("{path}/{}", body["metadata"]["name"].as_str().unwrap());
                if state.objects.contains_key(&path) {
                    return status(409, "it is there already");
                }
                let mut object = body;
                if let Some(namespace) = target.namespace {
                    object["metadata"]["namespace"] = json!(namespace);
                }
                state.writes.push(path.clone());
                whole(201, &self.store(&mut state, &path, object))
            }
            (method, Some(_)) => {
                let path = path.strip_suffix("/status").unwrap_or(&path).to_owned();
                let Some(there) = state.objects.get(&path).cloned() else { return status(404, "no such object") };
                let version = match *method {
                    Method::DELETE => &body["preconditions"]["resourceVersion"],
                    _ => &body["metadata"]["resourceVersion"],
                };
                if !version.is_null() && *version != there["metadata"]["resourceVersion"] {
                    return status(409, "it is another version");
                }
                state.writes.push(path.clone());
                match *method {
                    Method::PUT => whole(200, &self.store(&mut state, &path, body)),
                    Method::PATCH => {
                        let mut object = there;
                        object["status"] = body["status"].clone();
                        whole(200, &self.store(&mut state, &path, object))
                    }
                    Method::DELETE => {
                        drop(state);
                        self.remove(&path);
                        whole(200, &there)
                    }
                    _ => status(405, "no such method"),
                }
            }
            _ => status(405, "no such method"),
        }
    }

    fn watch(&self, state: &mut State, target: Target, query: &BTreeMap<String, String>) -> Answer {
        let initial = query.contains_key("sendInitialEvents");
        let from = query["resourceVersion"].parse().unwrap_or(0);
        if initial && state.without_streaming {
            return status(422, "sendInitialEvents is forbidden");
        }
        if !initial && from < state.forgotten {
            let event =
                json!({ "type": "ERROR", "object": { "code": 410, "reason": "Expired", "message": "too old" } });
            return lines(stream::iter([event]));
        }
        let mut first = Vec::new();
        if initial {
            state.lists += 1;
            let objects = state.objects.iter().filter(|(path, _)| target.holds(path));
            first.extend(objects.map(|(_, object)| json!({ "type": "ADDED", "object": object })));
            if let Some(objects) = state.lists_break_after {
                first.truncate(objects);
                let error = json!({ "code": 500, "reason": "Made", "message": "it breaks" });
                // Later than the objects: in a piece of its own.
                let error = stream::once(async move {
                    tokio::task::yield_now().await;
                    json!({ "type": "ERROR", "object": error })
                });
                return lines(stream::iter(first).chain(error));
            }
            first.extend(state.said_in_lists.iter().filter(|(path, _)| target.holds(path)).map(|it| it.1.clone()));
            let annotations = json!({ "k8s.io/initial-events-end": "true" });
            let metadata = json!({ "resourceVersion": state.version.to_string(), "annotations": annotations });
            let object = json!({ "apiVersion": "v1", "kind": "Some", "metadata": metadata });
            first.push(json!({ "type": "BOOKMARK", "object": object }));
        }
        let last = if initial { state.version } else { from };
        let (fake, era, changed) = (self.clone(), state.era, self.0.changed.subscribe());
        let later =
            stream::unfold((fake, target, last, changed), move |(fake, target, last, mut changed)| async move {
                loop {
                    // Its sender lives in `fake`.
                    let _ = fake.1.subscribe().wait_for(|holds| !holds).await;
                    {
                        let state = fake.lock();
                        if state.era != era {
                            return None;
                        }
                        let next = state.events.iter().find(|(version, path, _)| *version > last && target.holds(path));
                        if let Some((version, _, event)) = next.cloned() {
                            drop(state);
                            return Some((event, (fake, target, version, changed)));
                        }
                    }
                    changed.changed().await.ok()?;
                }
            });
        lines(stream::iter(first).chain(later))
    }
}

fn list(state: &mut State, target: &Target, query: &BTreeMap<String, String>) -> Answer {
    let from: usize = query.get("continue").and_then(|token| token.parse().ok()).unwrap_or(0);
    if from > 0 && state.lists_break_after.is_some() {
        return status(500, "it breaks");
    }
    state.lists += usize::from(from == 0);
    let limit: usize = query.get("limit").and_then(|limit| limit.parse().ok()).unwrap_or(usize::MAX);
    let all: Vec<_> = state.objects.iter().filter(|(path, _)| target.holds(path)).map(|(_, object)| object).collect();
    let end = all.len().min(from.saturating_add(limit));
    let mut metadata = json!({ "resourceVersion": state.version.to_string() });
    if end < all.len() {
        metadata["continue"] = json!(end.to_string());
    }
    whole(200, &json!({ "apiVersion": "v1", "kind": "List", "metadata": metadata, "items": &all[from.min(end)..end] }))
}

fn whole(code: u16, value: &Value) -> Answer {
    let body = Body::from(value.to_string());
    Response::builder().status(StatusCode::from_u16(code).unwrap()).body(body).unwrap()
}

fn status(code: u16, message: &str) -> Answer {
    let reason = match code {
        404 => "NotFound",
        409 => "Conflict",
        _ => "Made",
    };
    let status = json!({
        "apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": message,
    });
    whole(code, &status)
}

fn terminating(namespace: &str) -> Answer {
    let message = format!("namespace {namespace} is being terminated");
    let cause = json!({ "reason": "NamespaceTerminating", "message": message, "field": "metadata.namespace" });
    let status = json!({
        "apiVersion": "v1", "kind": "Status", "status": "Failure", "code": 403, "reason": "Forbidden", "message": message,
        "details": { "causes": [cause] },
    });
    whole(403, &status)
}

fn lines(events: impl Stream<Item = Value> + Send + 'static) -> Answer {
    Response::new(Body::from_stream(events.map(|event| Ok::<_, Infallible>(format!("{event}\n")))))
}
