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
use tokio::net::UnixListener;

use crate::journal::{Entry, Journal};
use crate::metrics::Metrics;
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
    config: Value,
}

impl Shown {
    /// Nothing yet; `config` is how the process was started.
    pub(crate) fn new(config: Value) -> Self {
        Self {
            metrics: Metrics::default(),
            journal: Journal::default(),
            pods: Mutex::default(),
            complete: AtomicBool::new(false),
            settled: AtomicBool::new(false),
            config,
        }
    }

    /// The pods, as they are now.
    pub(crate) fn show(&self, pods: Vec<pods::Shown>) {
        *self.pods.lock().unwrap_or_else(PoisonError::into_inner) = pods;
    }

    /// All pods of the node have been named once.
    pub(crate) fn complete(&self) {
        self.complete.store(true, Ordering::Relaxed);
    }
}

type Shared = State<Arc<Shown>>;

/// Serves on a Unix socket that only this user and root can open. A socket that an earlier process left is replaced, in
/// one step.
///
/// # Errors
/// The socket cannot be made.
pub(crate) fn serve(path: &Path, shown: Arc<Shown>) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&new)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600))?;
    fs::rename(&new, path)?;
    let router = Router::new()
        .route("/readyz", get(ready))
        .route("/pods", get(pods))
        .route("/events", get(events))
        .route("/config", get(config))
        .route("/metrics", get(metrics))
        .fallback(async || {
            (StatusCode::NOT_FOUND, "there is no such page; there are /config, /events, /metrics, /pods, /readyz")
        })
        .with_state(shown);
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(())
}

/// Ready means: the pods that there were are captured, and one that starts here gets captured. A pod whose capture fails
/// is named, and does not hold up its node; nor do pods that come later.
async fn ready(State(shown): Shared) -> impl IntoResponse {
    let named = shown.complete.load(Ordering::Relaxed);
    let proxy = shown.metrics.proxy.get() == 1;
    let control_plane = shown.metrics.control_plane.get() == 1;
    let of_state = |states: &[&str]| -> Vec<String> {
        let pods = shown.pods.lock().unwrap_or_else(PoisonError::into_inner);
        pods.iter().filter(|pod| states.contains(&pod.state)).map(|pod| pod.name.clone()).collect()
    };
    let pending = of_state(&["waiting", "preparing", "offered", "beginning"]);
    if named && proxy && pending.is_empty() {
        shown.settled.store(true, Ordering::Relaxed);
    }
    let ready = named && proxy && shown.settled.load(Ordering::Relaxed);
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let page = json!({
        "ready": ready,
        "pods_named": named,
        "proxy": proxy,
        "control_plane": control_plane,
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
