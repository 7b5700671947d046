//! One question to the cluster's API server, asked when the agent is told to end: is its DaemonSet being deleted? Then nobody
//! comes after it, and the plugin must not stay on the node, where it would keep every pod from starting.
//!
//! Whoever cannot be asked has not said yes: the plugin stays, and pods wait for an agent (fail closed).

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{ACCEPT, AUTHORIZATION, HOST, HeaderValue};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use identity::tls;
use rustls::pki_types::ServerName;
use rustls::time_provider::DefaultTimeProvider;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

/// How long the answer may take: kubelet does not wait for ever for who is to end.
const PATIENCE: Duration = Duration::from_secs(5);
/// The largest answer, in bytes.
const LARGEST: usize = 1024 * 1024;

/// Where the API server is, and how to prove oneself to it: what kubelet gives to every pod with a token.
#[derive(Debug, Clone)]
pub(crate) struct ApiServer {
    host: IpAddr,
    port: u16,
    /// With `token` and `ca.crt`.
    account: PathBuf,
}

/// What becomes of our DaemonSet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It is there, and another agent comes after this one.
    Stays,
    /// It is being deleted, or is gone.
    Goes,
    /// Nobody could say; why.
    Unknown(String),
}

#[derive(Deserialize)]
struct Object {
    metadata: Metadata,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    deletion_timestamp: Option<String>,
}

/// A `Status` of an object that is not there.
#[derive(Deserialize)]
struct Missing {
    reason: String,
    details: Details,
}

#[derive(Deserialize)]
struct Details {
    name: String,
}

impl Missing {
    fn is(&self, name: &str) -> bool {
        self.reason == "NotFound" && self.details.name == name
    }
}

impl ApiServer {
    /// As the environment of a pod says.
    ///
    /// # Errors
    /// What is missing there.
    pub(crate) fn of_pod() -> Result<Self, String> {
        let variable = |name: &str| std::env::var(name).map_err(|_| format!("{name} is not set"));
        let host = variable("KUBERNETES_SERVICE_HOST")?;
        let port = variable("KUBERNETES_SERVICE_PORT")?;
        Ok(Self {
            host: host.parse().map_err(|_| format!("KUBERNETES_SERVICE_HOST is {host:?}, and no IP address"))?,
            port: port.parse().map_err(|_| format!("KUBERNETES_SERVICE_PORT is {port:?}, and no port"))?,
            account: "/var/run/secrets/kubernetes.io/serviceaccount".into(),
        })
    }

    /// Asks what becomes of a DaemonSet.
    pub(crate) async fn fate(&self, namespace: &str, name: &str) -> Fate {
        let path = format!("/apis/apps/v1/namespaces/{namespace}/daemonsets/{name}");
        match timeout(PATIENCE, self.get(&path)).await {
            Ok(Ok((status, body))) => decide(status, &body, name),
            Ok(Err(why)) => Fate::Unknown(format!("the API server at {}:{} does not say: {why}", self.host, self.port)),
            Err(_) => Fate::Unknown(format!(
                "no answer of the API server at {}:{} within {} s",
                self.host,
                self.port,
                PATIENCE.as_secs()
            )),
        }
    }

    async fn get(&self, path: &str) -> Result<(StatusCode, Bytes), String> {
        let token = read(&self.account.join("token"))?;
        let config = tls::api_client_config(&read(&self.account.join("ca.crt"))?, Arc::new(DefaultTimeProvider))
            .map_err(|why| format!("{}: {why}", self.account.join("ca.crt").display()))?;
        let words = |error: &dyn std::error::Error| error.to_string();
        let tcp = TcpStream::connect((self.host, self.port)).await.map_err(|error| words(&error))?;
        let name = ServerName::IpAddress(self.host.into());
        let stream = TlsConnector::from(config).connect(name, tcp).await.map_err(|error| words(&error))?;
        converse(stream, path, &token).await
    }
}

/// One request on a connection that stands.
async fn converse(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    path: &str,
    token: &str,
) -> Result<(StatusCode, Bytes), String> {
    let words = |error: &dyn std::error::Error| error.to_string();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| words(&error))?;
    let connection = tokio::spawn(connection);
    let mut bearer = HeaderValue::from_str(&format!("Bearer {}", token.trim())).map_err(|_| "the token is none")?;
    bearer.set_sensitive(true);
    let request = Request::get(path)
        .header(HOST, "kubernetes.default.svc")
        .header(ACCEPT, "application/json")
        .header(AUTHORIZATION, bearer)
        .body(Empty::<Bytes>::new())
        .map_err(|error| words(&error))?;
    let answer = sender.send_request(request).await.map_err(|error| words(&error))?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), LARGEST).collect().await.map_err(|error| words(error.as_ref()))?;
    connection.abort();
    Ok((status, body.to_bytes()))
}

/// Only what the API server says of the object itself counts: that it does not let us ask says nothing of it.
fn decide(status: StatusCode, body: &[u8], name: &str) -> Fate {
    match status {
        // A gateway's answer, or that of a server that does not know of DaemonSets yet, names no object.
        StatusCode::NOT_FOUND if serde_json::from_slice::<Missing>(body).is_ok_and(|it| it.is(name)) => Fate::Goes,
        StatusCode::OK => match serde_json::from_slice::<Object>(body) {
            Ok(object) if object.metadata.deletion_timestamp.is_some() => Fate::Goes,
            Ok(_) => Fate::Stays,
            Err(error) => Fate::Unknown(format!("the API server's answer is not understood: {error}")),
        },
        other => Fate::Unknown(format!("the API server answers {other}")),
    }
}

fn read(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn only_the_object_itself_says_that_it_goes() {
        let there = br#"{"kind":"DaemonSet","metadata":{"name":"justmtls-node"}}"#;
        let going = br#"{"metadata":{"deletionTimestamp":"2026-01-01T00:00:00Z"}}"#;
        let decide = |status, body| decide(status, body, "justmtls-node");
        assert_eq!(decide(StatusCode::OK, there), Fate::Stays);
        assert_eq!(decide(StatusCode::OK, going), Fate::Goes);
        let missing =
            br#"{"kind":"Status","reason":"NotFound","details":{"name":"justmtls-node","kind":"daemonsets"}}"#;
        assert_eq!(decide(StatusCode::NOT_FOUND, missing), Fate::Goes);
        for status in [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN, StatusCode::BAD_GATEWAY] {
            assert!(matches!(decide(status, missing), Fate::Unknown(_)), "{status}");
        }
        let others = br#"{"kind":"Status","reason":"NotFound","details":{"name":"another"}}"#;
        let no_kind = br#"{"kind":"Status","reason":"NotFound","details":{}}"#;
        for body in [&b""[..], b"<html>", others, no_kind] {
            assert!(matches!(decide(StatusCode::NOT_FOUND, body), Fate::Unknown(_)), "{body:?}");
        }
        assert!(matches!(decide(StatusCode::OK, b"<html>"), Fate::Unknown(_)));
    }

    fn server(place: &Path, port: u16) -> ApiServer {
        ApiServer { host: IpAddr::from([127, 0, 0, 1]), port, account: place.to_owned() }
    }

    #[tokio::test]
    async fn who_does_not_answer_or_is_not_believed_has_not_said_yes() {
        let place = tempfile::tempdir().unwrap();
        let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let fate = server(place.path(), nobody).fate("justmtls-system", "justmtls-node").await;
        let Fate::Unknown(why) = fate else { panic!("{fate:?}") };
        assert!(why.contains("cannot read") && why.contains("token"), "{why}");

        std::fs::write(place.path().join("token"), "t").unwrap();
        std::fs::write(place.path().join("ca.crt"), "").unwrap();
        let fate = server(place.path(), nobody).fate("justmtls-system", "justmtls-node").await;
        assert!(matches!(&fate, Fate::Unknown(why) if why.contains("no certificate")), "{fate:?}");
    }

    #[tokio::test]
    async fn what_is_asked_is_the_daemonset_with_the_token_and_the_answer_is_bounded() {
        let body = r#"{"metadata":{"deletionTimestamp":"2026-01-01T00:00:00Z"}}"#;
        for (length, fits) in [(body.len(), true), (LARGEST + 1, false)] {
            let (near, mut far) = tokio::io::duplex(1 << 16);
            let serving = tokio::spawn(async move {
                let mut buffer = [0; 2048];
                let read = far.read(&mut buffer).await.unwrap();
                let rest = " ".repeat(length - body.len());
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{body}{rest}");
                // Whoever has heard enough hangs up.
                let _ = far.write_all(answer.as_bytes()).await;
                String::from_utf8_lossy(&buffer[..read]).to_lowercase()
            });
            let answer = converse(near, "/apis/apps/v1/namespaces/a/daemonsets/b", "the-token\n").await;
            let asked = serving.await.unwrap();
            assert!(asked.starts_with("get /apis/apps/v1/namespaces/a/daemonsets/b http/1.1\r\n"), "{asked}");
            assert!(asked.contains("authorization: bearer the-token\r\n"), "{asked}");
            match answer {
                Ok((status, body)) if fits => assert_eq!(decide(status, &body, "b"), Fate::Goes),
                other => assert!(!fits && other.is_err(), "{other:?}"),
            }
        }
    }
}
