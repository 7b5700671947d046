//! What the kubelet asks of a pod: as it is told, and as it comes from a client in clear (T32).

use mesh::{Check, HttpProbe, Probe, Probes, Request, Said};

use crate::proto::v1;

/// The longest head of a request that is looked at.
pub const MAX_HEAD: usize = 8 * 1024;
/// The most headers in one.
const MOST_HEADERS: usize = 48;
/// How a client begins HTTP/2 without TLS (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The first byte of a TLS handshake.
const HANDSHAKE: u8 = 22;

/// What the first bytes of a client in clear are; `None` while more can make a difference. At most [`MAX_HEAD`] bytes are ever
/// waited for.
///
/// A request counts only where it is whole, has no body and nothing follows it: what comes behind a request is either none of
/// ours to read or smuggled.
pub fn said(bytes: &[u8]) -> Option<Said<'_>> {
    match bytes.first() {
        None => return None,
        Some(&HANDSHAKE) => return Some(Said::Tls),
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
            Check::Http(http) => (v1::Check::Http, Some(http)),
            Check::Https => (v1::Check::Https, None),
            Check::Tcp => (v1::Check::Tcp, None),
            Check::Grpc => (v1::Check::Grpc, None),
        };
        let header = |(name, value): (&str, &str)| v1::ProbeHeader { name: name.to_owned(), value: value.to_owned() };
        v1::Probe {
            port: probe.port.into(),
            check: check.into(),
            target: http.map(|http| http.target().to_owned()).unwrap_or_default(),
            host: http.and_then(HttpProbe::host).unwrap_or_default().to_owned(),
            headers: http.into_iter().flat_map(HttpProbe::headers).map(header).collect(),
        }
    };
    probes.iter().map(one).collect()
}

/// `None` where one of them is none, or there are too many: an exemption is understood wholly or not at all.
pub(crate) fn decode(probes: &[v1::Probe]) -> Option<Probes> {
    let one = |probe: &v1::Probe| {
        let port = u16::try_from(probe.port).ok().filter(|port| *port != 0)?;
        let check = match v1::Check::try_from(probe.check).ok()? {
            v1::Check::Unspecified => return None,
            v1::Check::Http => {
                let headers = probe.headers.iter().map(|header| (header.name.as_str(), header.value.as_str()));
                Check::Http(HttpProbe::new(&probe.target, Some(&probe.host), headers)?)
            }
            v1::Check::Https => Check::Https,
            v1::Check::Tcp => Check::Tcp,
            v1::Check::Grpc => Check::Grpc,
        };
        Some(Probe { port, check })
    };
    Probes::new(probes.iter().map(one).collect::<Option<Vec<_>>>()?)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// One of each kind.
    pub(crate) fn probes() -> Probes {
        let headers = [("X-Probe", "yes"), ("Host", "shop.example")];
        let named = HttpProbe::new("/live?full=1", None, headers).expect("a request");
        let plain = HttpProbe::new("ready", None, []).expect("a request");
        let checks = [Check::Http(named), Check::Http(plain), Check::Https, Check::Tcp, Check::Grpc];
        Probes::new(checks.map(|check| Probe { port: 8080, check })).expect("few")
    }

    #[test]
    fn an_exemption_is_understood_wholly_or_not_at_all() {
        let all = encode(&probes());
        assert_eq!(decode(&all), Some(probes()));
        let change = |change: fn(&mut v1::Probe)| {
            let mut changed = all.clone();
            change(&mut changed[0]);
            decode(&changed)
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
        assert_eq!((decode(&many[..64]).is_some(), decode(&many)), (true, None));
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

    #[test]
    fn other_protocols_are_told_by_how_they_begin() {
        assert_eq!(said(&[22]), Some(Said::Tls));
        assert_eq!(said(&[PREFACE, b"\x00\x00"].concat()), Some(Said::Http2));
        assert_eq!(said(&PREFACE[..10]), None);
        assert_eq!(said(b"PRI * HTTP/2.0\r\n\r\nSX"), Some(Said::Other));
    }
}
