//! The cluster's name server: A, AAAA and SRV for Services and for the pods of headless ones, on each node,
//! at the address that its pods have as their gateway.
//!
//! It knows the cluster's names and no others, asks nobody, and answers from memory.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, Metadata, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, SRV};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use linux::netns::NetNs;
use manifests::Object;
use manifests::k8s_openapi::api::core::v1::Service;
use manifests::k8s_openapi::api::discovery::v1::EndpointSlice;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

use crate::endpoints::SERVICE_NAME;
use crate::network::Addresses;

const DOMAIN: &str = "cluster.local";
const PORT: u16 = 53;
/// As CoreDNS: long enough for one connection, short enough to notice a change.
const TTL: u32 = 5;
/// The largest answer over UDP without EDNS (RFC 1035, 4.2.1), and the most that EDNS may ask of us.
const UDP_SIZES: (u16, u16) = (512, 4096);
/// TCP connections at a time on each address, and how long a silent one stays.
const MOST_CONNECTIONS: usize = 64;
const PATIENCE: Duration = Duration::from_secs(5);

/// The names of the cluster, as they were at one moment.
#[derive(Debug, Default)]
pub(crate) struct Zone {
    /// By lower-case name without the final dot.
    records: HashMap<String, Vec<RData>>,
}

impl Zone {
    /// The names that follow from Services and EndpointSlices.
    pub(crate) fn of<'a>(objects: impl Iterator<Item = &'a Object> + Clone) -> Zone {
        let mut zone = Zone::default();
        let slices: Vec<&EndpointSlice> = objects
            .clone()
            .filter_map(|object| match object {
                Object::EndpointSlice(slice) => Some(slice.as_ref()),
                _ => None,
            })
            .collect();
        for object in objects {
            if let Object::Service(service) = object {
                zone.add_service(service, &slices);
            }
        }
        zone.add_parents();
        zone
    }

    fn add_service(&mut self, service: &Service, slices: &[&EndpointSlice]) {
        let (Some(name), Some(namespace)) = (&service.metadata.name, &service.metadata.namespace) else { return };
        let domain = format!("{name}.{namespace}.svc.{DOMAIN}");
        let Some(spec) = &service.spec else { return };
        // The name exists, even with no address behind it.
        self.records.entry(domain.clone()).or_default();
        let cluster_ips: Vec<IpAddr> = spec.cluster_ips.iter().flatten().filter_map(|ip| ip.parse().ok()).collect();
        for address in &cluster_ips {
            self.add_address(&domain, *address);
        }
        if !cluster_ips.is_empty() {
            for port in spec.ports.iter().flatten() {
                self.add_port(&domain, port.name.as_deref(), port.protocol.as_deref(), port.port, &domain);
            }
            return;
        }
        let is_of = |slice: &&&EndpointSlice| {
            slice.metadata.namespace.as_ref() == Some(namespace)
                && slice.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME)) == Some(name)
        };
        for slice in slices.iter().filter(is_of) {
            self.add_headless(&domain, slice);
        }
    }

    fn add_headless(&mut self, domain: &str, slice: &EndpointSlice) {
        for endpoint in &slice.endpoints {
            // Absent means ready (EndpointConditions).
            if endpoint.conditions.as_ref().and_then(|conditions| conditions.ready) == Some(false) {
                continue;
            }
            let addresses = endpoint.addresses.iter().filter_map(|ip| ip.parse::<IpAddr>().ok());
            for address in addresses {
                let host = endpoint.hostname.clone().unwrap_or_else(|| address.to_string().replace(['.', ':'], "-"));
                let host = format!("{host}.{domain}");
                self.add_address(domain, address);
                self.add_address(&host, address);
                for port in slice.ports.iter().flatten() {
                    let number = port.port.unwrap_or_default();
                    self.add_port(domain, port.name.as_deref(), port.protocol.as_deref(), number, &host);
                }
            }
        }
    }

    fn add_address(&mut self, name: &str, address: IpAddr) {
        self.add(
            name,
            match address {
                IpAddr::V4(address) => RData::A(A(address)),
                IpAddr::V6(address) => RData::AAAA(AAAA(address)),
            },
        );
    }

    fn add_port(&mut self, domain: &str, name: Option<&str>, protocol: Option<&str>, port: i32, target: &str) {
        let (Some(name), Ok(port)) = (name.filter(|name| !name.is_empty()), u16::try_from(port)) else { return };
        let Ok(target) = Name::from_ascii(format!("{target}.")) else { return };
        let protocol = protocol.unwrap_or("TCP").to_lowercase();
        self.add(&format!("_{name}._{protocol}.{domain}"), RData::SRV(SRV::new(0, 100, port, target)));
    }

    fn add(&mut self, name: &str, data: RData) {
        let all = self.records.entry(name.to_lowercase()).or_default();
        if !all.contains(&data) {
            all.push(data);
        }
    }

    /// A name below which there are names exists itself (RFC 8020), if without records.
    fn add_parents(&mut self) {
        let names: Vec<String> = self.records.keys().cloned().collect();
        for name in names {
            let mut rest = name.as_str();
            while let Some((_, parent)) = rest.split_once('.') {
                self.records.entry(parent.to_owned()).or_default();
                rest = parent;
            }
        }
    }

    /// The answer to a message, or `None` for what deserves none.
    fn answer(&self, message: &[u8]) -> Option<(Message, u16)> {
        let request = Message::from_vec(message).ok()?;
        if request.metadata.message_type != MessageType::Query {
            return None;
        }
        let mut answer = Message::response(request.metadata.id, request.metadata.op_code);
        answer.metadata = Metadata::response_from_request(&request.metadata);
        answer.metadata.authoritative = true;
        answer.metadata.recursion_available = false;
        let size = request.edns.as_ref().map_or(UDP_SIZES.0, |edns| edns.max_payload().clamp(UDP_SIZES.0, UDP_SIZES.1));
        if let Some(edns) = &request.edns {
            let mut ours = edns.clone();
            ours.set_max_payload(UDP_SIZES.1);
            answer.set_edns(ours);
        }
        answer.add_queries(request.queries.iter().cloned());
        answer.metadata.response_code = match request.queries.as_slice() {
            _ if request.metadata.op_code != OpCode::Query => ResponseCode::NotImp,
            [query] if query.query_class() == DNSClass::IN => {
                let name = query.name().to_lowercase().to_ascii();
                match self.records.get(name.trim_end_matches('.')) {
                    Some(records) => {
                        let wanted = |data: &&RData| {
                            query.query_type() == RecordType::ANY || data.record_type() == query.query_type()
                        };
                        for data in records.iter().filter(wanted) {
                            answer.add_answer(Record::from_rdata(query.name().clone(), TTL, data.clone()));
                        }
                        ResponseCode::NoError
                    }
                    None => ResponseCode::NXDomain,
                }
            }
            [_] => ResponseCode::Refused,
            _ => ResponseCode::FormErr,
        };
        Some((answer, size))
    }
}

/// Serves on a node, over UDP and TCP, at its addresses towards its pods.
pub(crate) fn serve(node: &NetNs, at: Addresses, zone: watch::Receiver<Arc<Zone>>) -> anyhow::Result<()> {
    for address in at.both() {
        let address = SocketAddr::new(address, PORT);
        let sockets = node.enter(|| -> io::Result<_> {
            let (udp, tcp) = (UdpSocket::bind(address)?, TcpListener::bind(address)?);
            udp.set_nonblocking(true)?;
            tcp.set_nonblocking(true)?;
            Ok((tokio::net::UdpSocket::from_std(udp)?, tokio::net::TcpListener::from_std(tcp)?))
        });
        let (udp, tcp) = sockets??;
        tokio::spawn(serve_udp(udp, zone.clone()));
        tokio::spawn(serve_tcp(tcp, zone.clone()));
    }
    Ok(())
}

async fn serve_udp(socket: tokio::net::UdpSocket, zone: watch::Receiver<Arc<Zone>>) {
    let mut buffer = [0; 4096];
    loop {
        // An error here is an ICMP message about an earlier answer, and no reason to stop.
        let Ok((length, client)) = socket.recv_from(&mut buffer).await else { continue };
        let current = zone.borrow().clone();
        let Some((answer, size)) = current.answer(&buffer[..length]) else { continue };
        let Ok(mut bytes) = answer.to_vec() else { continue };
        if bytes.len() > usize::from(size) {
            let Ok(shorter) = answer.truncate().to_vec() else { continue };
            bytes = shorter;
        }
        let _ = socket.send_to(&bytes, client).await;
    }
}

async fn serve_tcp(listener: tokio::net::TcpListener, zone: watch::Receiver<Arc<Zone>>) {
    let slots = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    while let Ok(slot) = slots.clone().acquire_owned().await {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await; // out of descriptors: not in a tight loop
            continue;
        };
        let zone = zone.clone();
        tokio::spawn(async move {
            // A client that breaks off is its own loss.
            let _ = serve_connection(stream, &zone).await;
            drop(slot);
        });
    }
}

/// Messages with their length in front (RFC 1035, 4.2.2), one after the other.
async fn serve_connection(mut stream: TcpStream, zone: &watch::Receiver<Arc<Zone>>) -> io::Result<()> {
    loop {
        let length = timeout(PATIENCE, stream.read_u16()).await??;
        let mut message = vec![0; usize::from(length)];
        timeout(PATIENCE, stream.read_exact(&mut message)).await??;
        let current = zone.borrow().clone();
        let Some((answer, _)) = current.answer(&message) else { return Ok(()) };
        let bytes = answer.to_vec().map_err(io::Error::other)?;
        let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
        let framed = [&length.to_be_bytes()[..], &bytes].concat();
        timeout(PATIENCE, stream.write_all(&framed)).await??;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::Query;

    const OBJECTS: &str = "
{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, spec: {clusterIP: 10.96.0.10, clusterIPs: [10.96.0.10, 'fd96::a'], ports: [{name: http, port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: db, namespace: shop}, spec: {clusterIP: None, clusterIPs: [None], ports: [{name: sql, port: 5432}]}}
---
{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4, metadata: {name: db-1, namespace: shop, labels: {kubernetes.io/service-name: db}}, ports: [{name: sql, port: 5432}], endpoints: [{addresses: [10.88.16.2], hostname: db-0}, {addresses: [10.88.16.3], conditions: {ready: false}}]}
";

    fn zone() -> Zone {
        let parsed = manifests::parse("test", OBJECTS);
        let objects: Vec<_> = parsed.objects.into_iter().map(|(object, _)| object).collect();
        Zone::of(objects.iter())
    }

    fn ask(name: &str, kind: RecordType) -> (ResponseCode, Vec<String>) {
        let mut query = Message::query();
        query.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        let (answer, _) = zone().answer(&query.to_vec().unwrap()).unwrap();
        let answers = answer.answers.iter().map(|record| record.data.to_string()).collect();
        (answer.metadata.response_code, answers)
    }

    #[test]
    fn a_service_has_its_cluster_ips_whatever_the_case_of_the_question() {
        let found = |answers: &[&str]| (ResponseCode::NoError, answers.iter().map(ToString::to_string).collect());
        assert_eq!(ask("web.shop.svc.cluster.local.", RecordType::A), found(&["10.96.0.10"]));
        assert_eq!(ask("WEB.Shop.svc.cluster.LOCAL.", RecordType::AAAA), found(&["fd96::a"]));
        assert_eq!(
            ask("_http._tcp.web.shop.svc.cluster.local.", RecordType::SRV),
            found(&["0 100 80 web.shop.svc.cluster.local."])
        );
    }

    #[test]
    fn a_headless_service_has_its_ready_pods() {
        assert_eq!(ask("db.shop.svc.cluster.local.", RecordType::A).1, ["10.88.16.2"]);
        assert_eq!(ask("db-0.db.shop.svc.cluster.local.", RecordType::A).1, ["10.88.16.2"]);
        assert_eq!(
            ask("_sql._tcp.db.shop.svc.cluster.local.", RecordType::SRV).1,
            ["0 100 5432 db-0.db.shop.svc.cluster.local."]
        );
    }

    #[test]
    fn a_name_without_such_records_exists_and_an_unknown_one_does_not() {
        assert_eq!(ask("web.shop.svc.cluster.local.", RecordType::MX), (ResponseCode::NoError, vec![]));
        assert_eq!(ask("shop.svc.cluster.local.", RecordType::A), (ResponseCode::NoError, vec![]));
        assert_eq!(ask("web.shop.", RecordType::A).0, ResponseCode::NXDomain);
    }

    #[test]
    fn nonsense_gets_no_answer() {
        assert!(zone().answer(b"").is_none());
        assert!(zone().answer(&[0xff; 40]).is_none());
    }
}
