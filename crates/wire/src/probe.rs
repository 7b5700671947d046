//! What the kubelet and the API server ask of a pod: as it is told, and as it comes from a client in clear (T32, T33).

use mesh::{Check, HttpProbe, Probe, Probes, Request, Said};
use rustls::server::Acceptor;

use crate::hello::MAX_HELLO;
use crate::proto::v1;

/// The longest head of a request that is looked at. A hello of TLS may be as long as [`MAX_HELLO`].
pub const MAX_HEAD: usize = 8 * 1024;
/// The most headers in one.
const MOST_HEADERS: usize = 48;
/// How a client begins HTTP/2 without TLS (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The first byte of a TLS handshake.
const HANDSHAKE: u8 = 22;

/// What the first bytes of a client in clear are; `None` while more can make a difference. At most [`MAX_HELLO`] bytes are
/// ever waited for.
///
/// A request counts only where it is whole, has no body and nothing follows it: what comes behind a request is either none of
/// ours to read or smuggled.
pub fn said(bytes: &[u8]) -> Option<Said<'_>> {
    match bytes.first() {
        None => return None,
        Some(&HANDSHAKE) => return hello(bytes),
        Some(_) if bytes.starts_with(PREFACE) => return Some(Said::Http2),
        Some(_) if PREFACE.starts_with(bytes) => return None,
        Some(_) => {}
    }
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD => None,
        Ok(httparse::Status::Complete(length)) if length == bytes.len() && length <= MAX_HEAD => {
            Some(get(&request).map_or(Said::Other, Said::Get))
        }
        Ok(httparse::Status::Complete(_) | httparse::Status::Partial) | Err(_) => Some(Said::Other),
    }
}

/// TLS begins with a whole ClientHello (RFC 8446, section 4.1.2), which may name a server (RFC 6066, section 3).
fn hello(bytes: &[u8]) -> Option<Said<'static>> {
    // What comes behind a hello changes nothing about it.
    let (mut acceptor, mut rest) = (Acceptor::default(), &bytes[..bytes.len().min(MAX_HELLO)]);
    while !rest.is_empty() {
        if !matches!(acceptor.read_tls(&mut rest), Ok(1..)) {
            return Some(Said::Other);
        }
    }
    match acceptor.accept() {
        Ok(Some(accepted)) => {
            let server_name = accepted.client_hello().server_name().map(ToOwned::to_owned);
            Some(Said::Tls { server_name })
        }
        Ok(None) if bytes.len() < MAX_HELLO => None,
        Ok(None) | Err(_) => Some(Said::Other),
    }
}

fn get<'a>(request: &httparse::Request<'_, 'a>) -> Option<Request<'a>> {
    if request.method != Some("GET") || request.version != Some(1) {
        return None;
    }
    let (mut host, mut headers) = (None, Vec::new());
    for header in request.headers.iter() {
        let value = std::str::from_utf8(header.value).ok()?;
        if !header.name.eq_ignore_ascii_case("host") {
            headers.push((header.name, value));
        } else if host.replace(value).is_some() {
            return None;
        }
    }
    Some(Request { target: request.path?, host: host?, headers })
}

pub(crate) fn encode(probes: &Probes) -> Vec<v1::Probe> {
    let one = |probe: &Probe| {
        let (check, http) = match &probe.check {
            Check::ApiServer(_) => return None,
            Check::Http(http) => (v1::Check::Http, Some(http)),
            Check::Https => (v1::Check::Https, None),
            Check::Tcp => (v1::Check::Tcp, None),
            Check::Grpc => (v1::Check::Grpc, None),
        };
        let header = |(name, value): (&str, &str)| v1::ProbeHeader { name: name.to_owned(), value: value.to_owned() };
        Some(v1::Probe {
            port: probe.port.into(),
            check: check.into(),
            target: http.map(|http| http.target().to_owned()).unwrap_or_default(),
            host: http.and_then(HttpProbe::host).unwrap_or_default().to_owned(),
            headers: http.into_iter().flat_map(HttpProbe::headers).map(header).collect(),
        })
    };
    probes.iter().filter_map(one).collect()
}

/// Beside the probes and not among them: a reader that does not know of these goes on without them.
pub(crate) fn encode_calls(probes: &Probes) -> Vec<v1::ApiServerCall> {
    let one = |probe: &Probe| match &probe.check {
        Check::ApiServer(name) => {
            Some(v1::ApiServerCall { port: probe.port.into(), server_name: name.clone().unwrap_or_default() })
        }
        Check::Http(_) | Check::Https | Check::Tcp | Check::Grpc => None,
    };
    probes.iter().filter_map(one).collect()
}

/// `None` where one of them is none, or there are too many: an exemption is understood wholly or not at all.
pub(crate) fn decode(probes: &[v1::Probe], calls: &[v1::ApiServerCall]) -> Option<Probes> {
    let port = |port: u32| u16::try_from(port).ok().filter(|port| *port != 0);
    let call = |call: &v1::ApiServerCall| {
        let name = Some(call.server_name.clone()).filter(|name| !name.is_empty());
        Some(Probe { port: port(call.port)?, check: Check::ApiServer(name) })
    };
    let one = |probe: &v1::Probe| {
        let port = port(probe.port)?;
        let check = match v1::Check::try_from(probe.check).ok()? {
            v1::Check::Unspecified => return None,
            v1::Check::Http => {
                let headers = probe.headers.iter().map(|header| (header.name.as_str(), header.value.as_str()));
                Check::Http(HttpProbe::requesting(&probe.target, Some(&probe.host), headers)?)
            }
            v1::Check::Https => Check::Https,
            v1::Check::Tcp => Check::Tcp,
            v1::Check::Grpc => Check::Grpc,
        };
        Some(Probe { port, check })
    };
    Probes::new(probes.iter().map(one).chain(calls.iter().map(call)).collect::<Option<Vec<_>>>()?)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use identity::UnixTime;
    use identity::issuer::Root;
    use identity::tls::api_client_config;
    use rustls::time_provider::DefaultTimeProvider;

    use super::*;

    /// One of each kind.
    pub(crate) fn probes() -> Probes {
        let headers = [("X-Probe", "yes"), ("Host", "shop.example")];
        let named = HttpProbe::new("/live?full=1", None, headers).expect("a request");
        let plain = HttpProbe::new("ready", None, []).expect("a request");
        let calls = [Some("web.shop.svc".to_owned()), None].map(Check::ApiServer);
        let checks = [Check::Http(named), Check::Http(plain), Check::Https, Check::Tcp, Check::Grpc];
        Probes::new(checks.into_iter().chain(calls).map(|check| Probe { port: 8080, check })).expect("few")
    }

    #[test]
    fn an_exemption_is_understood_wholly_or_not_at_all() {
        let (all, calls) = (encode(&probes()), encode_calls(&probes()));
        assert_eq!((all.len(), calls.len(), decode(&all, &calls)), (5, 2, Some(probes())));
        assert_eq!(decode(&[], &[v1::ApiServerCall { port: 0, ..calls[0].clone() }]), None);
        let change = |change: fn(&mut v1::Probe)| {
            let mut changed = all.clone();
            change(&mut changed[0]);
            decode(&changed, &[])
        };
        assert_eq!(change(|probe| probe.port = 0), None);
        assert_eq!(change(|probe| probe.port = 65536), None);
        assert_eq!(change(|probe| probe.check = 0), None);
        assert_eq!(change(|probe| probe.check = 99), None);
        assert_eq!(change(|probe| probe.host = "a\r\nb".into()), None);
        assert_eq!(
            change(|probe| probe.headers = vec![v1::ProbeHeader { name: "A B".into(), value: String::new() }]),
            None
        );
        let many: Vec<_> = (1..=65).map(|port| v1::Probe { port, check: 3, ..v1::Probe::default() }).collect();
        assert_eq!((decode(&many[..64], &[]).is_some(), decode(&many, &[])), (true, None));
        assert_eq!(decode(&many[..64], &calls), None);
    }

    #[test]
    fn a_request_counts_where_it_is_whole_and_nothing_follows_it() {
        let whole =
            b"GET /live HTTP/1.1\r\nHost: 10.0.0.1:8080\r\nUser-Agent: kube-probe/1.33\r\nConnection: close\r\n\r\n";
        let request = Request {
            target: "/live",
            host: "10.0.0.1:8080",
            headers: vec![("User-Agent", "kube-probe/1.33"), ("Connection", "close")],
        };
        assert_eq!(said(whole), Some(Said::Get(request)));
        for length in 0..whole.len() {
            assert_eq!(said(&whole[..length]), None, "{length} bytes");
        }
        let others: [&[u8]; 9] = [
            &[&whole[..], b"G"].concat(),
            b"POST /live HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET /live HTTP/1.0\r\nHost: a\r\n\r\n",
            b"GET /live HTTP/1.1\r\n\r\n",
            b"GET /live HTTP/1.1\r\nHost: a\r\nhost: b\r\n\r\n",
            b"GET /live HTTP/1.1\r\nHost: a\r\nX: \xff\r\n\r\n",
            b"GET /live HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n",
            b"\x00",
            &[&b"GET / HTTP/1.1\r\nHost: "[..], &[b'a'; MAX_HEAD]].concat(),
        ];
        for bytes in others {
            assert_eq!(said(bytes), Some(Said::Other), "{}", String::from_utf8_lossy(&bytes[..bytes.len().min(80)]));
        }
    }

    /// The hello of a client that wants this server: by name, or by an address, which no hello names.
    fn hello_to(server: &str) -> Vec<u8> {
        let domain = "cluster.local".parse().expect("a trust domain");
        let now = UnixTime::since_unix_epoch(Duration::from_secs(1 << 30));
        let root = Root::generate(&domain, now, Duration::from_secs(1 << 20)).expect("a root");
        let roots = root.bundle().expect("a bundle").to_pem();
        let mut config = (*api_client_config(&roots, Arc::new(DefaultTimeProvider)).expect("its roots")).clone();
        config.enable_sni = true;
        let server = server.to_owned().try_into().expect("a name or an address");
        let mut client = rustls::ClientConnection::new(config.into(), server).expect("a client");
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).expect("a Vec takes all");
        bytes
    }

    #[test]
    fn a_hello_counts_where_it_is_whole_and_tells_whom_it_wants() {
        for (server, named) in [("web.shop.svc", Some("web.shop.svc")), ("10.96.0.7", None)] {
            let whole = hello_to(server);
            let expected = Said::Tls { server_name: named.map(ToOwned::to_owned) };
            assert_eq!(said(&whole), Some(expected.clone()));
            assert_eq!(said(&[&whole[..], b"\x17\x03\x03"].concat()), Some(expected), "more behind it");
            for length in 0..whole.len() {
                assert_eq!(said(&whole[..length]), None, "{length} bytes");
            }
        }
        // A record that is none, a message that is no hello, a hello that is none, and one that does not come to its end.
        let endless = [&[22, 3, 1, 0x40, 0][..], &[1, 0, 0x40, 0], &[b'a'; MAX_HELLO]].concat();
        for bytes in [&b"\x16\x03\x01\x00\x05\x02hello"[..], b"\x16GET / HTTP", &endless] {
            assert_eq!(said(bytes), Some(Said::Other), "{}", String::from_utf8_lossy(&bytes[..bytes.len().min(80)]));
        }
    }

    #[test]
    fn other_protocols_are_told_by_how_they_begin() {
        assert_eq!(said(&[22]), None);
        assert_eq!(said(&[PREFACE, b"\x00\x00"].concat()), Some(Said::Http2));
        assert_eq!(said(&PREFACE[..10]), None);
        assert_eq!(said(b"PRI * HTTP/2.0\r\n\r\nSX"), Some(Said::Other));
    }
}
