//! Workloads and Services, as `istio.workload.Address` with our extensions.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::str::FromStr;

use identity::{SpiffeId, TrustDomain};
use mesh::{
    Affinity, Canonical, Endpoint, EndpointPort, Mode, Modes, PodUid, Reach, Service, ServiceName, ServicePort, Speaks,
    Uncaptured, Workload, WorkloadUid,
};
use prost::Message;
use prost_types::Any;

use super::{Fault, Resource, policy_name};
use crate::proto::istio::workload as istio;
use crate::proto::v1;

const CLUSTER: &str = "Kubernetes";

pub(super) fn encode_workload(workload: &Workload) -> Vec<u8> {
    let extension = v1::WorkloadExtension {
        pod_uid: workload.pod_uid.to_string(),
        speaks: match workload.speaks {
            Speaks::Nothing => v1::Speaks::Nothing,
            Speaks::JustMtls => v1::Speaks::Justmtls1,
        }
        .into(),
        uncaptured: workload.uncaptured.map_or(v1::Uncaptured::Pending, encode_uncaptured).into(),
        mode: encode_mode(workload.modes.default).into(),
        port_modes: workload
            .modes
            .ports
            .iter()
            .map(|(port, mode)| ((*port).into(), encode_mode(*mode).into()))
            .collect(),
        network_rules: workload.network_rules,
    };
    let message = istio::Workload {
        name: workload.name.to_string(),
        namespace: workload.namespace.to_string(),
        addresses: workload.addresses.iter().map(|address| crate::octets(*address)).collect(),
        // Not HBONE: Istio's own ztunnel must not expect it on port 15008.
        tunnel_protocol: istio::TunnelProtocol::None.into(),
        trust_domain: workload.identity.trust_domain().to_string(),
        service_account: workload.identity.service_account().to_owned(),
        node: workload.node.to_string(),
        workload_type: istio::WorkloadType::Pod.into(),
        workload_name: workload.canonical.workload.to_string(),
        canonical_name: workload.canonical.service.to_string(),
        canonical_revision: workload.canonical.revision.to_string(),
        authorization_policies: workload.policies.iter().map(ToString::to_string).collect(),
        status: istio::WorkloadStatus::Healthy.into(),
        cluster_id: CLUSTER.to_owned(),
        uid: workload.uid.to_string(),
        services: workload.endpoints.iter().map(encode_endpoint).collect(),
        network_mode: match workload.uncaptured {
            Some(Uncaptured::HostNetwork) => istio::NetworkMode::HostNetwork,
            _ => istio::NetworkMode::Standard,
        }
        .into(),
        extensions: vec![encode_extension(&extension)],
        ..Default::default()
    };
    istio::Address { r#type: Some(istio::address::Type::Workload(message)) }.encode_to_vec()
}

pub(super) fn encode_service(service: &Service) -> Vec<u8> {
    let port = |port: &ServicePort| istio::Port { service_port: port.port.into(), target_port: 0 };
    let address = |address: &IpAddr| istio::NetworkAddress { network: String::new(), address: crate::octets(*address) };
    let name = service.name.hostname.split('.').next().unwrap_or_default();
    let message = istio::Service {
        name: name.to_owned(),
        namespace: service.name.namespace.to_string(),
        hostname: service.name.hostname.to_string(),
        addresses: service.addresses.iter().map(address).collect(),
        ports: service.ports.iter().map(port).collect(),
        load_balancing: match service.reach {
            Reach::Cluster => None,
            Reach::Node => Some(istio::LoadBalancing {
                routing_preference: vec![istio::load_balancing::Scope::Node.into()],
                mode: istio::load_balancing::Mode::Strict.into(),
            }),
        },
        extensions: vec![encode_extension(&v1::ServiceExtension {
            client_ip_affinity: service.affinity == Affinity::ClientIp,
        })],
    };
    istio::Address { r#type: Some(istio::address::Type::Service(message)) }.encode_to_vec()
}

fn encode_endpoint(endpoint: &Endpoint) -> (String, istio::PortList) {
    let port = |port: &EndpointPort| istio::Port {
        service_port: port.service_port.into(),
        target_port: port.target_port.into(),
    };
    (endpoint.service.to_string(), istio::PortList { ports: endpoint.ports.iter().map(port).collect() })
}

fn encode_mode(mode: Mode) -> v1::Mode {
    match mode {
        Mode::Permissive => v1::Mode::Permissive,
        Mode::Strict => v1::Mode::Strict,
    }
}

pub(super) fn encode_uncaptured(why: Uncaptured) -> v1::Uncaptured {
    match why {
        Uncaptured::Pending => v1::Uncaptured::Pending,
        Uncaptured::OptedOut => v1::Uncaptured::OptedOut,
        Uncaptured::HostNetwork => v1::Uncaptured::HostNetwork,
        Uncaptured::SystemNamespace => v1::Uncaptured::SystemNamespace,
        Uncaptured::NotAPod => v1::Uncaptured::NotAPod,
        Uncaptured::NotCapturable => v1::Uncaptured::NotCapturable,
    }
}

/// `None` where the value is not one that is known here.
pub(super) fn decode_uncaptured(value: i32) -> Option<Uncaptured> {
    Some(match v1::Uncaptured::try_from(value).ok()? {
        v1::Uncaptured::Pending => Uncaptured::Pending,
        v1::Uncaptured::OptedOut => Uncaptured::OptedOut,
        v1::Uncaptured::HostNetwork => Uncaptured::HostNetwork,
        v1::Uncaptured::SystemNamespace => Uncaptured::SystemNamespace,
        v1::Uncaptured::NotAPod => Uncaptured::NotAPod,
        v1::Uncaptured::NotCapturable => Uncaptured::NotCapturable,
    })
}

fn encode_extension<M: Message + ExtensionName>(message: &M) -> istio::Extension {
    let config = Any { type_url: format!("type.googleapis.com/{}", M::NAME), value: message.encode_to_vec() };
    istio::Extension { name: M::NAME.to_owned(), config: Some(config) }
}

/// The extension of that type; its default where there is none, which is the safe one: speaks nothing, yet to be
/// captured, strict.
fn decode_extension<M: Message + Default + ExtensionName>(extensions: &[istio::Extension]) -> Result<M, Fault> {
    let Some(extension) = extensions.iter().find(|extension| extension.name == M::NAME) else {
        return Ok(M::default());
    };
    let config = extension.config.as_ref().ok_or(Fault::Missing { field: "extensions.config" })?;
    if config.type_url.rsplit('/').next() != Some(M::NAME) {
        return Err(Fault::WrongType);
    }
    M::decode(config.value.as_slice()).map_err(|_| Fault::Encoding)
}

trait ExtensionName {
    const NAME: &'static str;
}

impl ExtensionName for v1::WorkloadExtension {
    const NAME: &'static str = "justmtls.v1.WorkloadExtension";
}

impl ExtensionName for v1::ServiceExtension {
    const NAME: &'static str = "justmtls.v1.ServiceExtension";
}

pub(super) fn decode(content: &[u8]) -> Result<Resource, Fault> {
    let address = istio::Address::decode(content).map_err(|_| Fault::Encoding)?;
    Ok(Resource::Mesh(match address.r#type.ok_or(Fault::Empty)? {
        istio::address::Type::Workload(workload) => mesh::Resource::Workload(Box::new(decode_workload(workload)?)),
        istio::address::Type::Service(service) => mesh::Resource::Service(decode_service(service)?),
    }))
}

fn decode_workload(message: istio::Workload) -> Result<Workload, Fault> {
    let extension: v1::WorkloadExtension = decode_extension(&message.extensions)?;
    // A name like a Service's could never be removed again.
    if message.uid.is_empty() || ServiceName::from_str(&message.uid).is_ok() {
        return Err(Fault::Name { field: "uid" });
    }
    let speaks = match v1::Speaks::try_from(extension.speaks) {
        Ok(v1::Speaks::Nothing) => Speaks::Nothing,
        Ok(v1::Speaks::Justmtls1) => Speaks::JustMtls,
        Err(_) => return Err(Fault::UnknownValue { field: "speaks" }),
    };
    let uncaptured = match speaks {
        Speaks::JustMtls => None,
        Speaks::Nothing => {
            Some(decode_uncaptured(extension.uncaptured).ok_or(Fault::UnknownValue { field: "uncaptured" })?)
        }
    };
    let trust_domain = TrustDomain::from_str(&message.trust_domain)?;
    let policies = message.authorization_policies.iter().map(|name| policy_name(name, "authorization_policies"));
    Ok(Workload {
        uid: WorkloadUid::from(message.uid.as_str()),
        pod_uid: PodUid::from(extension.pod_uid.as_str()),
        identity: SpiffeId::new(&trust_domain, &message.namespace, &message.service_account)?,
        canonical: Canonical {
            workload: message.workload_name.into(),
            service: message.canonical_name.into(),
            revision: message.canonical_revision.into(),
        },
        name: message.name.into(),
        namespace: message.namespace.into(),
        addresses: message
            .addresses
            .iter()
            .map(|address| crate::address(address).ok_or(Fault::Address { field: "addresses" }))
            .collect::<Result<_, _>>()?,
        node: message.node.into(),
        speaks,
        uncaptured,
        modes: decode_modes(&extension)?,
        endpoints: message.services.iter().map(decode_endpoint).collect::<Result<_, _>>()?,
        network_rules: extension.network_rules,
        policies: policies.collect::<Result<_, _>>()?,
    })
}

fn decode_modes(extension: &v1::WorkloadExtension) -> Result<Modes, Fault> {
    let ports: Result<BTreeMap<u16, Mode>, Fault> = extension
        .port_modes
        .iter()
        .map(|(port, mode)| Ok((decode_port(*port, "port_modes")?, decode_mode(*mode))))
        .collect();
    Ok(Modes { default: decode_mode(extension.mode), ports: ports? })
}

/// A mode that is not known here is newer than this program, and can only be stricter than it understands.
fn decode_mode(value: i32) -> Mode {
    match v1::Mode::try_from(value) {
        Ok(v1::Mode::Permissive) => Mode::Permissive,
        Ok(v1::Mode::Strict) | Err(_) => Mode::Strict,
    }
}

fn decode_endpoint((service, ports): (&String, &istio::PortList)) -> Result<Endpoint, Fault> {
    let port = |port: &istio::Port| {
        Ok::<_, Fault>(EndpointPort {
            service_port: decode_port(port.service_port, "services.service_port")?,
            target_port: decode_port(port.target_port, "services.target_port")?,
        })
    };
    Ok(Endpoint {
        service: service.parse().map_err(|_| Fault::Name { field: "services" })?,
        ports: ports.ports.iter().map(port).collect::<Result<_, _>>()?,
    })
}

fn decode_service(message: istio::Service) -> Result<Service, Fault> {
    let extension: v1::ServiceExtension = decode_extension(&message.extensions)?;
    let name = format!("{}/{}", message.namespace, message.hostname);
    Ok(Service {
        name: name.parse().map_err(|_| Fault::Name { field: "hostname" })?,
        addresses: message
            .addresses
            .iter()
            .map(|address| crate::address(&address.address).ok_or(Fault::Address { field: "addresses" }))
            .collect::<Result<_, _>>()?,
        ports: message
            .ports
            .iter()
            .map(|port| Ok(ServicePort { port: decode_port(port.service_port, "ports")? }))
            .collect::<Result<_, Fault>>()?,
        affinity: if extension.client_ip_affinity { Affinity::ClientIp } else { Affinity::None },
        reach: message.load_balancing.map_or(Ok(Reach::Cluster), |balancing| decode_reach(&balancing))?,
    })
}

/// Preferences may be passed over; what is strict must be understood.
fn decode_reach(balancing: &istio::LoadBalancing) -> Result<Reach, Fault> {
    use istio::load_balancing::{Mode, Scope};
    let field = "load_balancing";
    match Mode::try_from(balancing.mode).map_err(|_| Fault::UnknownValue { field })? {
        Mode::UnspecifiedMode | Mode::Failover | Mode::Passthrough => Ok(Reach::Cluster),
        Mode::Strict => match balancing.routing_preference.as_slice() {
            [] => Ok(Reach::Cluster),
            [scope] if Scope::try_from(*scope) == Ok(Scope::Node) => Ok(Reach::Node),
            _ => Err(Fault::UnknownValue { field }),
        },
    }
}

fn decode_port(port: u32, field: &'static str) -> Result<u16, Fault> {
    u16::try_from(port).ok().filter(|port| *port != 0).ok_or(Fault::Port { field })
}
