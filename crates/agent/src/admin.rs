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
        .route("/ready", get(ready))
        .route("/pods", get(pods))
        .route("/events", get(events))
        .route("/config", get(config))
        .route("/metrics", get(metrics))
        .with_state(shown);
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(())
}

/// Ready means: a pod that starts here gets captured.
async fn ready(State(shown): Shared) -> impl IntoResponse {
    let pods = shown.complete.load(Ordering::Relaxed);
    let proxy = shown.metrics.proxy.get() == 1;
    let control_plane = shown.metrics.control_plane.get() == 1;
    let status = if pods && proxy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(json!({ "pods_named": pods, "proxy": proxy, "control_plane": control_plane })))
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
