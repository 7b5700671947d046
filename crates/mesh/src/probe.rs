//! What the kubelet and the API server ask of a pod, and whether a connection in clear is that and nothing else (T32, T33).
//!
//! A pod's author declares its probes; the node that it runs on makes them, in clear. Whoever registers a webhook or an
//! aggregated API declares what the API server calls, in TLS of its own, which is plaintext to us. Where that is refused, what
//! was declared passes, from the pod's own node or from an API server's address, and no more than was declared:
//! [`AllowedProbe`] says what that is, and for a request it holds the very bytes.

mod target;

use std::net::{IpAddr, SocketAddr};

use crate::{Mode, PlaintextReason, PodUid, RefuseReason, Speaks, Uncaptured, View};

/// The most probes of one pod.
pub const MOST_PROBES: usize = 64;
/// The most bytes of text in the probes of one pod: targets, hosts, headers and names of servers.
pub const MOST_PROBE_TEXT: usize = 16 * 1024;
/// The longest User-Agent that is passed on.
const LONGEST_AGENT: usize = 128;

/// A probe, a hook that the kubelet calls, or what the API server calls, of one port of a pod.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Probe {
    /// The port that is asked.
    pub port: u16,
    /// What is asked.
    pub check: Check,
}

/// What a probe does. Of what a connection may be, the first counts.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Check {
    /// The API server calls, in TLS to this name, or with no name in its hello.
    ApiServer(Option<String>),
    /// One GET.
    Http(HttpProbe),
    /// The same within TLS, which nobody but the pod can look into.
    Https,
    /// It connects, and says nothing.
    Tcp,
    /// gRPC's health service, in HTTP/2.
    Grpc,
}

impl Check {
    /// Whether it is the API server who makes it, and not the kubelet.
    pub fn is_of_api_server(&self) -> bool {
        matches!(self, Self::ApiServer(_))
    }
}

/// The request of an HTTP probe.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct HttpProbe {
    target: String,
    host: Option<String>,
    headers: Vec<(String, String)>,
}

impl HttpProbe {
    /// The request that the kubelet makes of what is declared; `None` where it could make none. What decides where a request
    /// ends, or whether another protocol follows it, cannot be declared and is left out.
    pub fn new<'a>(
        path: &str,
        host: Option<&str>,
        headers: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Option<Self> {
        Self::requesting(&target::requested(path)?, host, headers)
    }

    /// The same of the target of the request itself, as [`HttpProbe::target`] gives it: whoever hears of a probe reads no path.
    pub fn requesting<'a>(
        target: &str,
        host: Option<&str>,
        headers: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Option<Self> {
        if !target::is_one(target) {
            return None;
        }
        let mut host = host.filter(|host| !host.is_empty()).map(ToOwned::to_owned);
        let mut kept = Vec::new();
        for (name, value) in headers {
            let value = value.trim_matches([' ', '\t']);
            if !is_token(name) || !is_visible(value) {
                return None;
            }
            if name.eq_ignore_ascii_case("host") {
                host = Some(value.to_owned());
            } else if value.is_empty() && DEFAULTS.iter().any(|default| name.eq_ignore_ascii_case(default)) {
                // So the kubelet is told to leave it out.
            } else if !FRAMING.iter().any(|framing| name.eq_ignore_ascii_case(framing)) {
                kept.push((name.to_owned(), value.to_owned()));
            }
        }
        let is_host = |host: &String| is_visible(host) && !host.contains(' ');
        host.as_ref().is_none_or(is_host).then(|| Self { target: target.to_owned(), host, headers: kept })
    }

    /// Path and query, as they stand in the request.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// The host that it names; the pod's own address where there is none.
    pub fn host(&self) -> Option<&str> {
        self.host.as_deref()
    }

    /// What else it says.
    pub fn headers(&self) -> impl Iterator<Item = (&str, &str)> {
        self.headers.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    fn length(&self) -> usize {
        let headers = self.headers.iter().map(|(name, value)| name.len() + value.len());
        self.target.len() + self.host.as_ref().map_or(0, String::len) + headers.sum::<usize>()
    }

    /// The request, where a client asked for this and nothing else.
    fn request(&self, at: SocketAddr, asked: &Request<'_>) -> Option<Vec<u8>> {
        let declared = |name: &str, value: &str| {
            self.headers().any(|(other, same)| other.eq_ignore_ascii_case(name) && same == value)
        };
        let mut agent = None;
        for (name, value) in &asked.headers {
            let is = |other: &str| name.eq_ignore_ascii_case(other);
            match value {
                _ if declared(name, value) => {}
                _ if is("user-agent") && value.len() <= LONGEST_AGENT && is_visible(value) && agent.is_none() => {
                    agent = Some(*value);
                }
                _ if is("accept") || is("accept-encoding") => {}
                _ if is("connection") && ["close", "keep-alive"].iter().any(|it| value.eq_ignore_ascii_case(it)) => {}
                _ => return None,
            }
        }
        let complete = self.headers().all(|(name, value)| {
            asked.headers.iter().any(|(other, same)| other.eq_ignore_ascii_case(name) && *same == value)
        });
        let authority = at.to_string();
        let named = |host: &str| {
            let same = |expected: &str| host.eq_ignore_ascii_case(expected);
            match &self.host {
                // The kubelet puts the port behind a host, and not behind a header.
                Some(expected) => same(expected) || same(&format!("{expected}:{}", at.port())),
                None => same(&authority) || at.port() == 80 && authority.strip_suffix(":80").is_some_and(same),
            }
        };
        if !complete || !named(asked.host) || !target::is_same(asked.target, &self.target) {
            return None;
        }
        let mut request = format!("GET {} HTTP/1.1\r\nHost: {}\r\n", self.target, asked.host);
        let own = agent.map(|agent| ("User-Agent", agent));
        let accept =
            (!self.headers().any(|(name, _)| name.eq_ignore_ascii_case("accept"))).then_some(("Accept", "*/*"));
        for (name, value) in own.into_iter().chain(accept).chain(self.headers()).chain([("Connection", "close")]) {
            request.extend([name, ": ", value, "\r\n"]);
        }
        request.push_str("\r\n");
        Some(request.into_bytes())
    }
}

/// What says where a request ends and what comes after it (RFC 9110, sections 7.6 to 8.6, 10.1).
const FRAMING: [&str; 9] = [
    "connection",
    "content-length",
    "expect",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// What the kubelet says where nothing else is declared.
const DEFAULTS: [&str; 2] = ["accept", "user-agent"];

/// The probes of a pod.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Probes(Vec<Probe>);

impl Probes {
    /// Each of them once, or `None` where there are more than a pod may have.
    pub fn new(probes: impl IntoIterator<Item = Probe>) -> Option<Self> {
        let mut all: Vec<_> = probes.into_iter().collect();
        all.sort();
        all.dedup();
        let text = |probe: &Probe| match &probe.check {
            Check::Http(http) => http.length(),
            Check::ApiServer(name) => name.as_ref().map_or(0, String::len),
            Check::Https | Check::Tcp | Check::Grpc => 0,
        };
        let fits = all.len() <= MOST_PROBES && all.iter().map(text).sum::<usize>() <= MOST_PROBE_TEXT;
        fits.then_some(Self(all))
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Probe> {
        self.0.iter()
    }

    /// What one port is asked.
    pub fn at(&self, port: u16) -> impl Iterator<Item = &Check> + Clone {
        self.0.iter().filter(move |probe| probe.port == port).map(|probe| &probe.check)
    }
}

/// The request of a client, taken apart.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Request<'a> {
    /// Path and query.
    pub target: &'a str,
    /// The host that it names.
    pub host: &'a str,
    /// What else it says, in any order.
    pub headers: Vec<(&'a str, &'a str)>,
}

/// What a client in clear says first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Said<'a> {
    /// Nothing: it has ended.
    Nothing,
    /// One whole GET without a body, and nothing behind it.
    Get(Request<'a>),
    /// A whole hello of TLS of its own.
    Tls {
        /// The name of the server that it wants, where the hello has one.
        server_name: Option<String>,
    },
    /// HTTP/2 without TLS.
    Http2,
    /// Something else.
    Other,
}

/// The addresses of the node that a pod runs on, as its processes know them.
#[derive(Clone, Copy, Debug)]
pub struct OwnNode<'a> {
    /// The node's own.
    pub addresses: &'a [IpAddr],
    /// Those of the node as the pod sees it: the gateways of the pod's default routes.
    pub gateways: &'a [IpAddr],
}

impl OwnNode<'_> {
    /// Whether an address is the node's. One that the view knows as that of a pod with a network of its own never is,
    /// whatever a route says.
    pub fn has(&self, view: &View, address: IpAddr) -> bool {
        let shared = [Some(Uncaptured::HostNetwork), Some(Uncaptured::NotAPod)];
        (self.addresses.contains(&address) || self.gateways.contains(&address))
            && view.claimants_of(address).all(|workload| shared.contains(&workload.uncaptured))
    }

    /// Whether an API server calls from an address: one that the settings name; and, where one of the node's own is named, any
    /// by which the node shows itself. That of a pod which is in the mesh, or is to be, never is: it would have proven itself.
    pub fn has_api_server(&self, view: &View, address: IpAddr) -> bool {
        let Some(settings) = view.settings() else { return false };
        let in_mesh =
            |speaks, uncaptured| speaks == Speaks::JustMtls || matches!(uncaptured, None | Some(Uncaptured::Pending));
        let named = settings.is_api_server(address)
            && !view.claimants_of(address).any(|workload| in_mesh(workload.speaks, workload.uncaptured));
        named || self.has(view, address) && self.addresses.iter().any(|own| settings.is_api_server(*own))
    }
}

/// A connection that may be a probe.
#[derive(Clone, Copy, Debug)]
pub struct MaybeProbe<'a> {
    /// The pod: known from the listener that it was captured on.
    pub pod: &'a PodUid,
    /// The address and port that the client dialled.
    pub destination: SocketAddr,
    /// The address that it comes from.
    pub source: IpAddr,
    /// The pod's node.
    pub node: OwnNode<'a>,
    /// What is declared.
    pub probes: &'a Probes,
}

impl<'a> MaybeProbe<'a> {
    /// What the port is asked by whoever this client may be.
    fn checks(self, view: &View) -> impl Iterator<Item = &'a Check> + Clone + use<'a> {
        let kubelet = self.node.has(view, self.source);
        let api_server = self.node.has_api_server(view, self.source);
        let of_client = move |check: &&Check| if check.is_of_api_server() { api_server } else { kubelet };
        self.probes.at(self.destination.port()).filter(of_client)
    }
}

/// What may pass of a connection that is a probe. There is no way from it to an [`crate::Allowed`].
#[derive(PartialEq, Eq, Debug)]
pub enum Passes {
    /// Nothing: it connects, and ends.
    Nothing,
    /// This request, and what is answered to it.
    Request(Vec<u8>),
    /// Bytes that nobody here understands; few, and not for long.
    Opaque,
    /// TLS between the API server and the pod, for as long as they like.
    Stream,
}

/// The proof that a connection may reach a pod as one of its probes, and as nothing else. Only [`authorize_probe()`] makes
/// one.
#[derive(PartialEq, Eq, Debug)]
pub struct AllowedProbe {
    destination: SocketAddr,
    source: IpAddr,
    because: PlaintextReason,
    passes: Passes,
    exposes: String,
}

impl AllowedProbe {
    /// The address and port that may be reached.
    pub fn destination(&self) -> SocketAddr {
        self.destination
    }

    /// The client's address.
    pub fn source(&self) -> IpAddr {
        self.source
    }

    /// Why it is in clear: [`PlaintextReason::Probe`] or [`PlaintextReason::ApiServer`].
    pub fn because(&self) -> PlaintextReason {
        self.because
    }

    /// What is let through, for people.
    pub fn exposes(&self) -> &str {
        &self.exposes
    }

    /// What may pass.
    pub fn passes(self) -> Passes {
        self.passes
    }
}

/// Whether a connection may be a probe, before anything is known of what it says.
pub fn may_be_probe(view: &View, connection: MaybeProbe<'_>) -> bool {
    let MaybeProbe { pod, destination, .. } = connection;
    let here = view.workload_of(pod).is_some_and(|workload| workload.addresses.contains(&destination.ip()));
    here && connection.checks(view).next().is_some()
}

/// Decides about a connection in clear that would be refused, and may be a probe. What an AuthorizationPolicy says of clients
/// is not asked: probes are exempt from it, as they are in Istio, and so is the API server, which every admission waits for.
pub fn authorize_probe(view: &View, connection: MaybeProbe<'_>, said: &Said<'_>) -> Result<AllowedProbe, RefuseReason> {
    if !may_be_probe(view, connection) {
        return Err(RefuseReason::Strict);
    }
    let MaybeProbe { destination, source, .. } = connection;
    let pass = |check: &Check| match (check, said) {
        (Check::ApiServer(declared), Said::Tls { server_name }) => {
            let exposes = match (declared, server_name) {
                (Some(declared), Some(name)) if declared.eq_ignore_ascii_case(name) => format!("TLS to {declared}"),
                (None, None) => "TLS to no name".to_owned(),
                (Some(_) | None, Some(_) | None) => return None,
            };
            Some((PlaintextReason::ApiServer, Passes::Stream, exposes))
        }
        (Check::Tcp, Said::Nothing) => probe(Passes::Nothing, "a connection without a byte"),
        (Check::Https, Said::Tls { .. }) => probe(Passes::Opaque, "TLS that is not looked into"),
        (Check::Grpc, Said::Http2) => probe(Passes::Opaque, "HTTP/2 that is not looked into"),
        (Check::Http(http), Said::Get(request)) => {
            let request = http.request(destination, request)?;
            probe(Passes::Request(request), &format!("GET {}", http.target))
        }
        _ => None,
    };
    let mut checks = connection.checks(view);
    let refused = match checks.clone().all(Check::is_of_api_server) {
        true => RefuseReason::NotTheApiServer,
        false => RefuseReason::NotTheProbe,
    };
    let (because, passes, exposes) = checks.find_map(pass).ok_or(refused)?;
    Ok(AllowedProbe { destination, source, because, passes, exposes })
}

fn probe(passes: Passes, exposes: &str) -> Option<(PlaintextReason, Passes, String)> {
    Some((PlaintextReason::Probe, passes, exposes.to_owned()))
}

/// Why an open probe, or call of the API server, would be refused now: it was begun by somebody who is not known as the pod's
/// node, or as an API server, any more; or nothing is declared any more that the API server calls at that port.
pub fn probe_refused_now(view: &View, because: PlaintextReason, connection: MaybeProbe<'_>) -> Option<RefuseReason> {
    let mode = view.workload_of(connection.pod)?.modes.at(connection.destination.port());
    let may = match because {
        PlaintextReason::ApiServer => connection.checks(view).any(Check::is_of_api_server),
        _ => connection.node.has(view, connection.source),
    };
    (mode == Mode::Strict && !may).then_some(RefuseReason::Strict)
}

fn is_token(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

fn is_visible(value: &str) -> bool {
    value.bytes().all(|byte| matches!(byte, b' '..=b'~'))
}
