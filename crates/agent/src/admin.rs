//! What the agent shows, on a Unix socket: dumps as JSON, and numbers for Prometheus. Everything is read-only.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::net::{TcpListener, UnixListener};
use wire::bounded::Bounded;

use crate::journal::{Entry, Journal};
use crate::metrics::Metrics;
use crate::plugin::place::Standing;
use crate::pods;

/// What is shown. The main loop keeps it up to date.
#[derive(Debug)]
pub(crate) struct Shown {
    /// Numbers.
    pub(crate) metrics: Metrics,
    /// The last things that happened.
    pub(crate) journal: Journal,
    pods: Mutex<Vec<pods::Shown>>,
    complete: AtomicBool,
    /// All that was to be captured was, once.
    settled: AtomicBool,
    /// What an agent before this one had was taken over.
    inherited: AtomicBool,
    /// Another agent has this one's place.
    stands_by: AtomicBool,
    /// How the plugin stands on the node; `None` before it was looked at.
    plugin: Mutex<Option<Standing>>,
    /// Whether there is to be one.
    has_plugin: bool,
    /// Why the container runtime cannot be asked; `None` where it can, or is none of ours.
    runtime_failure: Mutex<Option<String>>,
    config: Value,
}

impl Shown {
    /// Nothing yet; `config` is how the process was started.
    pub(crate) fn new(config: Value, has_plugin: bool, has_runtime: bool) -> Self {
        let runtime_failure = has_runtime.then(|| "the container runtime has not said yet which pods run".to_owned());
        Self {
            runtime_failure: Mutex::new(runtime_failure),
            metrics: Metrics::default(),
            journal: Journal::default(),
            pods: Mutex::default(),
            complete: AtomicBool::new(false),
            settled: AtomicBool::new(false),
            inherited: AtomicBool::new(false),
            stands_by: AtomicBool::new(false),
            plugin: Mutex::new(None),
            has_plugin,
            config,
        }
    }

    /// The pods, as they are now.
    pub(crate) fn show(&self, pods: Vec<pods::Shown>) {
        *self.pods.lock().unwrap_or_else(PoisonError::into_inner) = pods;
    }

    /// How the plugin stands. Whether that is news.
    pub(crate) fn plugin(&self, standing: &Standing) -> bool {
        let mut before = self.plugin.lock().unwrap_or_else(PoisonError::into_inner);
        let news = before.as_ref() != Some(standing);
        *before = Some(standing.clone());
        news
    }

    /// Why the container runtime cannot be asked, if it cannot.
    pub(crate) fn runtime_fails(&self, failure: Option<String>) {
        *self.runtime_failure.lock().unwrap_or_else(PoisonError::into_inner) = failure;
    }

    /// What an agent before this one had was taken over: its pods are captured, whether or not the control plane is there to
    /// name them.
    pub(crate) fn inherited(&self) {
        self.inherited.store(true, Ordering::Relaxed);
    }

    /// Another agent has the place: what is shown grows no newer from here on. It is ready to take the place back.
    pub(crate) fn stand_by(&self) {
        self.stands_by.store(true, Ordering::Relaxed);
    }

    /// All pods of the node have been named once.
    pub(crate) fn complete(&self) {
        self.complete.store(true, Ordering::Relaxed);
    }
}

type Shared = State<Arc<Shown>>;

/// Listens on a Unix socket that only this user and root can open. A socket that an earlier process left is replaced, in
/// one step.
///
/// # Errors
/// The socket cannot be made.
pub(crate) fn listen(path: &Path) -> io::Result<UnixListener> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&new)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600))?;
    fs::rename(&new, path)?;
    Ok(listener)
}

/// Serves all pages, for ever.
pub(crate) async fn serve(listener: UnixListener, shown: Arc<Shown>) -> io::Result<()> {
    let router = Router::new()
        .route("/readyz", get(ready))
        .route("/livez", get(live))
        .route("/plugin", get(plugin))
        .route("/version", get(version))
        .route("/pods", get(pods))
        .route("/events", get(events))
        .route("/config", get(config))
        .route("/metrics", get(metrics))
        .fallback(async || (StatusCode::NOT_FOUND, format!("there is no such page; there are {PAGES}")))
        .with_state(shown);
    axum::serve(listener, router).await
}

/// All pages of the Unix socket, and those of the TCP port.
const PAGES: &str = "/config, /events, /livez, /metrics, /plugin, /pods, /readyz, /version";
const OPEN_PAGES: &str = "/livez, /metrics, /readyz";

/// Serves the numbers, and whether we are ready and alive, on a TCP port, for ever. Anybody who reaches it may read them.
pub(crate) async fn serve_metrics(listener: TcpListener, shown: Arc<Shown>) -> io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/readyz", get(ready))
        .route("/livez", get(live))
        .fallback(async || (StatusCode::NOT_FOUND, format!("there is no such page; there are {OPEN_PAGES}")))
        .with_state(shown);
    axum::serve(Bounded::new(listener), router).await
}

/// The main thread serves this, too: who gets an answer has one that lives.
async fn live() -> &'static str {
    "alive\n"
}

async fn version(State(shown): Shared) -> Json<Value> {
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "stands_by": shown.stands_by.load(Ordering::Relaxed),
    }))
}

async fn plugin(State(shown): Shared) -> Json<Value> {
    let standing = shown.plugin.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let (state, primary, error) = match (&standing, shown.has_plugin) {
        (None, true) => ("waiting", None, None),
        (None, false) => ("none", None, None),
        (Some(standing), _) => (standing.as_str(), standing.primary(), standing.error()),
    };
    Json(json!({
        "state": state,
        "installed": standing.as_ref().is_some_and(Standing::is_installed),
        "primary": primary,
        "error": error,
        "version": env!("CARGO_PKG_VERSION"),
        "restored": shown.metrics.plugin_restored.get(),
        "missed_pods": shown.metrics.missed.get(),
    }))
}

/// Ready means: the pods that there were are captured, as far as the runtime has said by now, which must have answered, and one
/// that starts here gets captured, for which it must ask. Once that was so, a runtime that is away makes nothing unready: it comes
/// back by itself. What was inherited of an agent before needs no control plane. A pod whose capture fails is named, and does not
/// hold up its node; nor do pods that come later.
async fn ready(State(shown): Shared) -> impl IntoResponse {
    let named = shown.complete.load(Ordering::Relaxed);
    // In the box the control plane is always waited for.
    let inherited = shown.has_plugin && shown.inherited.load(Ordering::Relaxed);
    let plugin = !shown.has_plugin || shown.metrics.plugin_in_place.get() == 1;
    let proxy = shown.metrics.proxy.get() == 1;
    let control_plane = shown.metrics.control_plane.get() == 1;
    let of_state = |states: &[&str]| -> Vec<String> {
        let pods = shown.pods.lock().unwrap_or_else(PoisonError::into_inner);
        pods.iter().filter(|pod| states.contains(&pod.state)).map(|pod| pod.name.clone()).collect()
    };
    let pending = of_state(&["waiting", "looking", "preparing", "offered", "beginning"]);
    let known = named || inherited;
    let runtime_failure = shown.runtime_failure.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if known && proxy && runtime_failure.is_none() && pending.is_empty() {
        shown.settled.store(true, Ordering::Relaxed);
    }
    let stands_by = shown.stands_by.load(Ordering::Relaxed);
    let ready = stands_by || known && proxy && plugin && shown.settled.load(Ordering::Relaxed);
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let page = json!({
        "ready": ready,
        "stands_by": stands_by,
        "pods_named": named,
        "inherited": inherited,
        "plugin": plugin,
        "proxy": proxy,
        "control_plane": control_plane,
        "runtime_failure": runtime_failure,
        "pending": pending,
        "failed": of_state(&["failed"]),
    });
    (status, Json(page))
}

async fn pods(State(shown): Shared) -> Json<Vec<pods::Shown>> {
    Json(shown.pods.lock().unwrap_or_else(PoisonError::into_inner).clone())
}

async fn events(State(shown): Shared) -> Json<Vec<Entry>> {
    Json(shown.journal.all())
}

async fn config(State(shown): Shared) -> Json<Value> {
    Json(shown.config.clone())
}

async fn metrics(State(shown): Shared) -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], shown.metrics.text())
}
