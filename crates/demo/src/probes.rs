//! What the kubelet asks of a pod to know whether it is ready: what its containers declare, from the node's own network
//! namespace.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use linux::netns::NetNs;
use manifests::k8s_openapi::api::core::v1::{Container, HTTPGetAction, PodSpec, Probe};
use manifests::k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// How long an answer may take where a probe does not say, as on Kubernetes.
const TIMEOUT: Duration = Duration::from_secs(1);
/// So much of an answer is read.
const MOST: u64 = 10 * 1024;

/// Whether any container declares when it is ready, by the network and in a way that is played here.
pub(crate) fn any(spec: &PodSpec) -> bool {
    declared(spec).next().is_some()
}

fn declared(spec: &PodSpec) -> impl Iterator<Item = (&Container, &Probe)> {
    let all = spec.containers.iter().filter_map(|container| Some((container, container.readiness_probe.as_ref()?)));
    all.filter(|(_, probe)| {
        let plain = |http: &HTTPGetAction| http.scheme.as_deref() != Some("HTTPS");
        probe.http_get.as_ref().is_some_and(plain) || probe.tcp_socket.is_some()
    })
}

/// Asks all of them; what is wrong with the first that is not ready.
pub(crate) fn ask(node: &NetNs, spec: &PodSpec, address: IpAddr) -> Result<(), String> {
    for (container, probe) in declared(spec) {
        let asked = node.enter(|| one(container, probe, address)).map_err(io::Error::other).flatten();
        asked.map_err(|error| format!("the readiness probe of container {} fails: {error}", container.name))?;
    }
    Ok(())
}

fn one(container: &Container, probe: &Probe, address: IpAddr) -> io::Result<()> {
    let seconds = probe.timeout_seconds.and_then(|seconds| u64::try_from(seconds).ok()).filter(|seconds| *seconds > 0);
    let patience = seconds.map_or(TIMEOUT, Duration::from_secs);
    let to = |wanted: &IntOrString| {
        let port = port(container, wanted).ok_or_else(|| io::Error::other("it names no port of its container"))?;
        Ok::<_, io::Error>(SocketAddr::new(address, port))
    };
    match (&probe.http_get, &probe.tcp_socket) {
        (Some(http), _) => get(http, to(&http.port)?, patience),
        (None, Some(tcp)) => TcpStream::connect_timeout(&to(&tcp.port)?, patience).map(drop),
        (None, None) => Ok(()),
    }
}

fn get(http: &HTTPGetAction, to: SocketAddr, patience: Duration) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, patience)?;
    stream.set_read_timeout(Some(patience))?;
    let path = http.path.as_deref().unwrap_or("/");
    let slash = if path.starts_with('/') { "" } else { "/" };
    let mut request = format!("GET {slash}{path} HTTP/1.1\r\n");
    let all = || http.http_headers.iter().flatten();
    if !all().any(|header| header.name.eq_ignore_ascii_case("host")) {
        request.push_str(&format!("Host: {to}\r\n"));
    }
    for header in all() {
        request.push_str(&format!("{}: {}\r\n", header.name, header.value));
    }
    request.push_str("User-Agent: kube-probe/1.33\r\nAccept: */*\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.take(MOST).read_to_end(&mut answer)?;
    match status(&answer) {
        Some(200..400) => Ok(()),
        Some(other) => Err(io::Error::other(format!("it answers {other}"))),
        None => Err(io::Error::other("it answers with no HTTP")),
    }
}

/// `HTTP/1.1 200 OK`.
fn status(answer: &[u8]) -> Option<u16> {
    let line = answer.strip_prefix(b"HTTP/1.")?;
    std::str::from_utf8(line.get(2..5)?).ok()?.parse().ok()
}

fn port(container: &Container, wanted: &IntOrString) -> Option<u16> {
    let number = match wanted {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => {
            let named = container.ports.iter().flatten().find(|port| port.name.as_ref() == Some(name));
            named?.container_port
        }
    };
    u16::try_from(number).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_known_by_its_status_and_nothing_else_is_one() {
        assert_eq!(status(b"HTTP/1.1 200 OK\r\n"), Some(200));
        assert_eq!(status(b"HTTP/1.0 503 Unavailable\r\n"), Some(503));
        assert_eq!(status(b"HTTP/1.1 20"), None);
        assert_eq!(status(b"SSH-2.0-x 200"), None);
    }
}
