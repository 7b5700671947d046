//! Resources that Istio does not know: the trust bundle, the settings of the mesh, the pods of a node.

use std::str::FromStr;
use std::time::Duration;

use identity::{SpiffeId, TrustBundle, TrustDomain, UnixTime};
use ipnet::IpNet;
use mesh::{MeshSettings, PodUid, Uncaptured};
use prost::Message;

use super::address::{decode_uncaptured, encode_uncaptured};
use super::{Fault, Heartbeat, NodePod, Resource};
use crate::proto::v1;

pub(super) fn encode_bundle(bundle: &TrustBundle) -> Vec<u8> {
    let message = v1::TrustBundle {
        trust_domain: bundle.trust_domain().to_string(),
        roots: bundle.roots().map(|root| root.to_vec()).collect(),
    };
    message.encode_to_vec()
}

pub(super) fn decode_bundle(content: &[u8]) -> Result<Resource, Fault> {
    let message = v1::TrustBundle::decode(content).map_err(|_| Fault::Encoding)?;
    let trust_domain = TrustDomain::from_str(&message.trust_domain)?;
    Ok(Resource::Bundle(TrustBundle::from_der(trust_domain, message.roots.into_iter().map(Into::into))?))
}

pub(super) fn encode_settings(settings: &MeshSettings) -> Vec<u8> {
    let message = v1::MeshSettings {
        inside: settings.inside.iter().map(ToString::to_string).collect(),
        mixed: settings.mixed.iter().map(ToString::to_string).collect(),
        nodes: settings.nodes.iter().map(ToString::to_string).collect(),
        api_servers: settings.api_servers.iter().map(ToString::to_string).collect(),
        view_lifetime_milliseconds: settings.view_lifetime.as_millis().try_into().unwrap_or(u32::MAX),
    };
    message.encode_to_vec()
}

/// Settings are understood wholly or refused: a range that is passed over would make what is inside look outside.
pub(super) fn decode_settings(content: &[u8]) -> Result<Resource, Fault> {
    let message = v1::MeshSettings::decode(content).map_err(|_| Fault::Encoding)?;
    let ranges = |texts: &[String], field| {
        texts.iter().map(|text| text.parse::<IpNet>().map_err(|_| Fault::Address { field })).collect::<Result<_, _>>()
    };
    let nodes = message.nodes.iter().map(|text| text.parse().map_err(|_| Fault::Address { field: "nodes" }));
    Ok(Resource::Mesh(mesh::Resource::Settings(MeshSettings {
        inside: ranges(&message.inside, "inside")?,
        mixed: ranges(&message.mixed, "mixed")?,
        nodes: nodes.collect::<Result<_, _>>()?,
        api_servers: ranges(&message.api_servers, "api_servers")?,
        view_lifetime: match message.view_lifetime_milliseconds {
            0 => mesh::VIEW_LIFETIME,
            milliseconds => Duration::from_millis(milliseconds.into()),
        },
    })))
}

pub(super) fn encode_heartbeat(heartbeat: Heartbeat) -> Vec<u8> {
    v1::Heartbeat { time: heartbeat.time.as_secs() }.encode_to_vec()
}

pub(super) fn decode_heartbeat(content: &[u8]) -> Result<Resource, Fault> {
    let message = v1::Heartbeat::decode(content).map_err(|_| Fault::Encoding)?;
    let time = UnixTime::since_unix_epoch(Duration::from_secs(message.time));
    Ok(Resource::Heartbeat(Heartbeat { time }))
}

pub(super) fn encode_node_pod(pod: &NodePod) -> Vec<u8> {
    let message = v1::NodePod {
        pod_uid: pod.pod.to_string(),
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        service_account: pod.identity.service_account().to_owned(),
        trust_domain: pod.identity.trust_domain().to_string(),
        addresses: pod.addresses.iter().map(ToString::to_string).collect(),
        capture: pod.capture.is_ok(),
        uncaptured: encode_uncaptured(pod.capture.err().unwrap_or(Uncaptured::Pending)).into(),
        excluded_ports: pod.excluded_ports.iter().map(|port| u32::from(*port)).collect(),
        probes: crate::probe::encode(&pod.probes),
        api_server_calls: crate::probe::encode_calls(&pod.probes),
        release: pod.release,
    };
    message.encode_to_vec()
}

pub(super) fn decode_node_pod(content: &[u8]) -> Result<Resource, Fault> {
    let message = v1::NodePod::decode(content).map_err(|_| Fault::Encoding)?;
    if message.pod_uid.is_empty() {
        return Err(Fault::Missing { field: "pod_uid" });
    }
    let unknown = Fault::UnknownValue { field: "uncaptured" };
    let capture = match (message.capture, decode_uncaptured(message.uncaptured)) {
        (true, _) => Ok(()),
        // "Not to be captured, and no reason for it" must not become a pod outside the mesh.
        (false, None | Some(Uncaptured::Pending)) => return Err(unknown),
        (false, Some(why)) => Err(why),
    };
    let addresses =
        message.addresses.iter().map(|text| text.parse().map_err(|_| Fault::Address { field: "addresses" }));
    let excluded = message
        .excluded_ports
        .iter()
        .map(|port| u16::try_from(*port).ok().filter(|port| *port != 0).ok_or(Fault::Port { field: "excluded_ports" }));
    let trust_domain = TrustDomain::from_str(&message.trust_domain)?;
    Ok(Resource::NodePod(NodePod {
        pod: PodUid::from(message.pod_uid.as_str()),
        identity: SpiffeId::new(&trust_domain, &message.namespace, &message.service_account)?,
        namespace: message.namespace,
        name: message.name,
        addresses: addresses.collect::<Result<_, _>>()?,
        capture,
        release: message.release && capture.is_err(),
        excluded_ports: excluded.collect::<Result<_, _>>()?,
        probes: crate::probe::decode(&message.probes, &message.api_server_calls)
            .ok_or(Fault::UnknownValue { field: "probes" })?,
    }))
}
