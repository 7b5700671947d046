//! Whether the process lives, whether it serves, and its numbers, over HTTP for anybody who reaches the port
//! ([`wire::bounded`]). It reads one request for each connection.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result};
use axum::serve::Listener;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::watch;
use wire::bounded::{Bounded, Brief};

use crate::admin::{self, Shown};

/// The longest request that is read.
const MAX_REQUEST: usize = 8 * 1024;

/// What answers are made of.
#[derive(Clone)]
pub(crate) struct Probes {
    ready: watch::Sender<bool>,
    shown: Arc<OnceLock<Arc<Shown>>>,
}

impl Probes {
    pub(crate) fn new() -> Self {
        Self { ready: watch::Sender::new(false), shown: Arc::default() }
    }

    /// From now on there are numbers, and nodes are served.
    pub(crate) fn serve_nodes(&self, shown: Arc<Shown>) {
        let _ = self.shown.set(shown);
        self.ready.send_replace(true);
    }

    /// From now on nodes better go to another replica.
    pub(crate) fn end(&self) {
        self.ready.send_replace(false);
    }

    /// Begins to answer; the address where.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub(crate) async fn listen(&self, address: SocketAddr) -> Result<SocketAddr> {
        let listener =
            TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address} (--metrics)"))?;
        let address = listener.local_addr().context("cannot read the address that is listened on")?;
        tokio::spawn(accept(Bounded::new(listener), self.clone()));
        Ok(address)
    }

    async fn answer(&self, path: &str) -> (u16, String) {
        match path {
            "/livez" => (200, "alive\n".to_owned()),
            "/readyz" if *self.ready.borrow() => (200, "ready\n".to_owned()),
            "/readyz" => (503, "not ready: nodes are not served yet, or not any more\n".to_owned()),
            "/metrics" => match self.shown.get() {
                Some(shown) => admin::numbers(shown).await.map_or((503, String::new()), |text| (200, text)),
                None => (503, "there are no numbers before nodes are served\n".to_owned()),
            },
            _ => (404, "there is no such page; there are /livez, /metrics, /readyz\n".to_owned()),
        }
    }
}

async fn accept(mut listener: Bounded, probes: Probes) {
    loop {
        let (stream, _) = listener.accept().await;
        let probes = probes.clone();
        tokio::spawn(async move {
            // Who breaks off has no answer, and needs none.
            let _ = converse(stream, |path| async move { probes.answer(&path).await }).await;
        });
    }
}

/// Reads one request and answers it.
async fn converse<F: Future<Output = (u16, String)>>(
    mut stream: Brief,
    answer: impl FnOnce(String) -> F,
) -> std::io::Result<()> {
    let mut request = Vec::new();
    let mut room = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let count = stream.read(&mut room).await?;
        if count == 0 || request.len() + count > MAX_REQUEST {
            return Ok(());
        }
        request.extend_from_slice(&room[..count]);
    }
    let line = String::from_utf8_lossy(&request);
    let mut words = line.lines().next().unwrap_or_default().split(' ');
    let (code, text) = match (words.next(), words.next()) {
        (Some("GET"), Some(target)) => {
            let answer = answer(target.split('?').next().unwrap_or_default().to_owned());
            tokio::select! {
                answered = answer => answered,
                () = stream.ended() => return Ok(()),
            }
        }
        _ => (405, "everything here is only read; use GET\n".to_owned()),
    };
    let reason = match code {
        200 => "OK",
        404 => "Not Found",
        405 => "Method Not Allowed",
        _ => "Service Unavailable",
    };
    let head = format!(
        "HTTP/1.1 {code} {reason}\r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        admin::OPEN_METRICS,
        text.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(text.as_bytes()).await?;
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpStream;

    use super::*;

    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    fn get(path: &str) -> String {
        format!("GET {path} HTTP/1.1\r\nHost: here\r\n\r\n")
    }

    #[tokio::test]
    async fn before_nodes_are_served_the_process_lives_and_is_not_ready() {
        let probes = Probes::new();
        let address = probes.listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        assert!(ask(address, &get("/livez")).await.starts_with("HTTP/1.1 200"));
        assert!(ask(address, &get("/readyz?verbose")).await.starts_with("HTTP/1.1 503"));
        assert!(ask(address, &get("/metrics")).await.starts_with("HTTP/1.1 503"));
        assert!(ask(address, &get("/secrets")).await.contains("there are /livez"));
        assert!(ask(address, "POST /livez HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 405"));
        assert_eq!(ask(address, &"x".repeat(MAX_REQUEST + 1)).await, "");
    }
}
