//! Pages of the processes' admin sockets, over HTTP.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::time::timeout;

/// How long a process may take for a page.
const PATIENCE: Duration = Duration::from_secs(5);
/// The largest page, in bytes: what an answer of the box can carry, escaped.
const LARGEST: usize = 8 << 20;

/// A page of an admin socket.
pub(crate) async fn page(socket: PathBuf, path: &str) -> anyhow::Result<String> {
    if !path.starts_with('/') {
        bail!("{path} is not a page: it begins with a slash, as /metrics");
    }
    match timeout(PATIENCE, get(&socket, path)).await {
        Ok(page) => page,
        Err(_) => bail!("no answer within {} s", PATIENCE.as_secs()),
    }
}

/// A page as JSON; `null` where there is none. For a status that shows what it can.
pub(crate) async fn json(socket: PathBuf, path: &str) -> Value {
    page(socket, path).await.ok().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
}

async fn get(socket: &Path, path: &str) -> anyhow::Result<String> {
    let stream = UnixStream::connect(socket).await.context("the process does not answer")?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let request = hyper::Request::get(path).header("host", "admin").body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), LARGEST).collect().await;
    driver.abort();
    let body = body.map_err(|error| anyhow::anyhow!("the page cannot be read: {error}"))?.to_bytes();
    let text = String::from_utf8_lossy(&body).into_owned();
    if status == hyper::StatusCode::NOT_FOUND {
        bail!("{}, and /log", text.trim());
    }
    if !status.is_success() {
        bail!("{status}: {}", text.trim());
    }
    Ok(text)
}
