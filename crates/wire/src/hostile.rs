//! What a stranger could send on a discovery stream, or first of all in clear, given to whoever takes it apart: entries for fuzzing and its tests.
//! Each panics where something does not hold that must, whatever the bytes are.

use mesh::{HttpProbe, Said};
use prost::Message;

use crate::discovery::{Change, Kind, Known, Published, Removed};
use crate::discovery::{ClientState, ServerState};
use crate::hello::MAX_HELLO;
use crate::probe::{MAX_HEAD, said};
use crate::proto::envoy::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};

/// Every kind there is.
const KINDS: [Kind; 5] = [Kind::Settings, Kind::Bundle, Kind::Policy, Kind::Address, Kind::NodePod];

/// A response of a control plane: what is accepted is known and can be said again, what is not is refused and named.
pub fn discovery_response(bytes: &[u8]) {
    let Ok(response) = DeltaDiscoveryResponse::decode(bytes) else { return };
    let (nonce, type_url) = (response.nonce.clone(), response.type_url.clone());
    let parts = response.resources.len() + response.removed_resources.len();
    let mut client = ClientState::new(&KINDS, Known::default());
    let batch = client.receive(response);
    for change in batch.iter().flat_map(|batch| &batch.changes) {
        match change {
            Change::Set(resource) => {
                let published = Published::new(resource);
                let same = crate::discovery::decode(resource.kind(), &published.to_proto());
                assert_eq!(same.as_ref(), Ok(resource), "what was said once cannot be said again");
            }
            Change::Removed(Removed::Mesh(_) | Removed::NodePod(_)) | Change::Nobody(_) => {}
        }
    }
    let refused = batch.as_ref().is_none_or(|batch| !batch.refused.is_empty());
    if let Some(batch) = &batch {
        assert_eq!(batch.changes.len() + batch.refused.len(), parts, "a resource vanished");
    }
    let answer = client.answer(Ok(())).expect("each response is answered");
    assert_eq!((answer.response_nonce, answer.type_url), (nonce, type_url));
    assert_eq!(answer.error_detail.is_some(), refused, "a refusal that is not told, or one of nothing");
    assert!(client.answer(Ok(())).is_none(), "answered twice");
    let known: usize = KINDS.iter().map(|kind| client.known().count(*kind)).sum();
    let set = batch.iter().flat_map(|batch| &batch.changes).filter(|change| matches!(change, Change::Set(_))).count();
    assert!(known <= set, "more is known than was accepted");
}

/// Requests of a node, one after the other: a node that repeats itself changes nothing, and is told of what it lacks alone.
pub fn discovery_request(bytes: &[u8]) {
    let Ok(request) = DeltaDiscoveryRequest::decode(bytes) else { return };
    let kind = Kind::from_type_url(&request.type_url);
    let mut server = ServerState::default();
    let first = server.receive(request.clone());
    assert!(kind.is_some() || first.is_err(), "a type that is not served was taken");
    let (Some(kind), Ok(_)) = (kind, first) else { return };
    assert!(!server.node().chars().any(char::is_control), "a stranger's name goes into logs as it is");
    let responses = server.reconcile(kind, []);
    assert!(!responses.is_empty(), "the first request is always answered");
    let told: usize = responses.iter().map(|response| response.removed_resources.len()).sum();
    let named = request.initial_resource_versions.len() + request.resource_names_subscribe.len();
    assert!(told <= named, "told of more than it asked for");
    let sent: Vec<&Resource> = responses.iter().flat_map(|response| &response.resources).collect();
    assert!(sent.is_empty(), "sent something out of nothing");
    // Nothing has changed, and nothing is asked for.
    assert!(server.reconcile(kind, []).is_empty(), "told twice");
    let ours = responses.iter().any(|response| response.nonce == request.response_nonce);
    let again = server.receive(DeltaDiscoveryRequest {
        response_nonce: request.response_nonce,
        type_url: request.type_url,
        ..Default::default()
    });
    assert!(again.is_ok_and(|asked| asked.is_some() == ours), "an answer to nothing counts");
}

/// What a client in clear says first: a verdict is final but for what follows a request, comes in time, and a request that
/// counts is whole and has no body; the probe that declares it says the same.
pub fn first_words(bytes: &[u8]) {
    let mut before: Option<Said<'_>> = None;
    let most = if bytes.first() == Some(&22) { MAX_HELLO } else { MAX_HEAD };
    // Each length of a short one, and some of a long one: the head is read again whenever more comes.
    let step = bytes.len().div_ceil(512).max(1);
    for length in (1..=bytes.len()).step_by(step) {
        let now = said(&bytes[..length]);
        match (&before, &now) {
            (None, None) => assert!(length < most, "more bytes are wanted than are ever looked at"),
            (None, Some(_)) => {}
            (Some(Said::Get(_)), now) => assert_eq!(*now, Some(Said::Other), "something followed a request"),
            (Some(before), now) => assert_eq!(now.as_ref(), Some(before), "a verdict was taken back"),
        }
        before = now;
    }
    let Some(Said::Get(request)) = said(bytes) else { return };
    assert!(bytes.len() <= MAX_HEAD && bytes.ends_with(b"\n"));
    assert!(!request.target.is_empty() && !request.target.bytes().any(|byte| byte <= b' '));
    if let Some(probe) = HttpProbe::requesting(request.target, Some(request.host), request.headers.iter().copied()) {
        let again = HttpProbe::requesting(probe.target(), probe.host(), probe.headers());
        assert_eq!(again.as_ref(), Some(&probe), "what was declared once cannot be declared again");
    }
}
