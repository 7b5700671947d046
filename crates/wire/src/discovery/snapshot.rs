//! All that a node was told, as bytes: what one process leaves to the next.
//!
//! It is the protocol itself, message after message, each with its length before it: whoever reads it takes it in as if a
//! stream had said it, with the same checks, and can go on with a stream from there.

use identity::TrustBundle;
use prost::Message;

use super::{Batch, Change, ClientState, Kind, Known, Position, Published, Resource};
use crate::proto::envoy::DeltaDiscoveryResponse;

/// The longest snapshot, in bytes: 250,000 workloads have a quarter of it.
pub const MAX_SNAPSHOT: u64 = 512 * 1024 * 1024;

/// Resources in one message of a snapshot.
const TOGETHER: usize = 256;

/// A snapshot that was read.
#[derive(Debug)]
pub struct Snapshot {
    /// For the next stream, so that it begins where the last one ended.
    pub known: Known,
    /// What to take in, in this order.
    pub batches: Vec<Batch>,
}

/// Bytes that are no snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("what was left of the last view does not parse")]
pub struct BadSnapshot;

impl Snapshot {
    /// Writes one of these resources, which were told from this position.
    pub fn encode(resources: impl IntoIterator<Item = Resource>, position: &Position) -> Vec<u8> {
        let position = position.to_string();
        let mut open: Vec<(Kind, DeltaDiscoveryResponse)> = Vec::new();
        let mut bytes = Vec::new();
        for resource in resources {
            let kind = resource.kind();
            let published = Published::new(&resource).to_proto();
            let index = open.iter().position(|(other, _)| *other == kind).unwrap_or_else(|| {
                let response = DeltaDiscoveryResponse {
                    type_url: kind.type_url().into(),
                    system_version_info: position.clone(),
                    ..Default::default()
                };
                open.push((kind, response));
                open.len() - 1
            });
            let response = &mut open[index].1;
            response.resources.push(published);
            if response.resources.len() == TOGETHER {
                bytes.extend(response.encode_length_delimited_to_vec());
                response.resources.clear();
            }
        }
        for (_, response) in open.iter().filter(|(_, response)| !response.resources.is_empty()) {
            bytes.extend(response.encode_length_delimited_to_vec());
        }
        bytes
    }

    /// Reads one, as a subscriber of these kinds.
    ///
    /// # Errors
    /// It is broken, or has what nobody subscribed to.
    pub fn decode(kinds: &[Kind], mut bytes: &[u8]) -> Result<Self, BadSnapshot> {
        let mut state = ClientState::new(kinds, Known::default());
        let mut batches = Vec::new();
        while !bytes.is_empty() {
            let response = DeltaDiscoveryResponse::decode_length_delimited(&mut bytes).map_err(|_| BadSnapshot)?;
            batches.push(state.receive(response).ok_or(BadSnapshot)?);
            state.answer(Ok(()));
        }
        Ok(Self { known: state.known().clone(), batches })
    }

    /// The trust bundle, where there is one.
    pub fn bundle(&self) -> Option<&TrustBundle> {
        self.batches.iter().flat_map(|batch| &batch.changes).find_map(|change| match change {
            Change::Set(Resource::Bundle(bundle)) => Some(bundle),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use mesh::{MeshSettings, Policy, PolicyName};
    use proptest::prelude::*;

    use super::*;

    fn policy(number: usize) -> Resource {
        Resource::Mesh(mesh::Resource::Policy(Policy {
            name: PolicyName { namespace: "a".into(), name: format!("deny-{number}").into() },
            scope: mesh::Scope::Mesh,
            action: mesh::Action::Deny,
            rules: Vec::new(),
        }))
    }

    #[test]
    fn what_was_written_is_read_again_and_known() {
        let settings = Resource::Mesh(mesh::Resource::Settings(MeshSettings::default()));
        let all: Vec<_> = (0..2 * TOGETHER + 3).map(policy).chain([settings]).collect();
        let kinds = [Kind::Policy, Kind::Settings];
        let position = Position::parse("Pod=7").unwrap();
        let read = Snapshot::decode(&kinds, &Snapshot::encode(all.clone(), &position)).unwrap();
        assert!(read.batches.iter().all(|batch| batch.refused.is_empty()));
        assert_eq!(*read.known.position(), position, "the next control plane is told of it, too");
        let changes: Vec<_> = read.batches.into_iter().flat_map(|batch| batch.changes).collect();
        assert_eq!(changes, all.into_iter().map(Change::Set).collect::<Vec<_>>());
        assert_eq!((read.known.count(Kind::Policy), read.known.count(Kind::Settings)), (2 * TOGETHER + 3, 1));
    }

    #[test]
    fn what_is_cut_off_or_of_another_kind_is_refused_whole() {
        let bytes = Snapshot::encode([policy(1)], &Position::default());
        assert!(Snapshot::decode(&[Kind::Policy], &bytes).is_ok());
        assert_eq!(Snapshot::decode(&[Kind::Policy], &bytes[..bytes.len() - 1]).err(), Some(BadSnapshot));
        assert_eq!(Snapshot::decode(&[Kind::Settings], &bytes).err(), Some(BadSnapshot));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = Snapshot::decode(Kind::ALL, &bytes);
        }
    }
}
