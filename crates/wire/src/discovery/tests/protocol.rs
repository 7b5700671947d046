//! Both ends of delta xDS, connected by hand.

use std::collections::BTreeMap;

use identity::UnixTime;
use proptest::prelude::*;

use super::{NodePod, pod};
use crate::discovery::server_state::BadRequest;
use crate::discovery::{
    Asked, Change, ClientState, Fault, Heartbeat, Kind, Known, Published, Removed, Resource, ServerState,
};
use crate::proto::envoy::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};

const KIND: Kind = Kind::NodePod;

/// A pod with an address: the number is what changes.
fn pod_at(name: &str, number: u8) -> Published {
    let Resource::NodePod(pod) = pod(name) else { unreachable!() };
    let addresses = vec![[10, 0, 0, number].into()];
    Published::new(&Resource::NodePod(NodePod { addresses, ..pod }))
}

/// A node that applies what it is told.
struct Node {
    state: ClientState,
    has: BTreeMap<String, NodePod>,
}

impl Node {
    fn new(known: Known, has: BTreeMap<String, NodePod>) -> Self {
        Self { state: ClientState::new(&[KIND], known), has }
    }

    /// Applies responses; returns how many resources were set and removed.
    fn apply(&mut self, server: &mut ServerState, responses: Vec<DeltaDiscoveryResponse>) -> (usize, usize) {
        let (mut set, mut removed) = (0, 0);
        for response in responses {
            let batch = self.state.receive(response).unwrap();
            assert_eq!(batch.refused, []);
            for change in batch.changes {
                match change {
                    Change::Set(Resource::NodePod(pod)) => {
                        set += 1;
                        self.has.insert(pod.pod.to_string(), pod);
                    }
                    Change::Removed(Removed::NodePod(pod)) => {
                        removed += 1;
                        self.has.remove(pod.as_str());
                    }
                    other => panic!("{other:?}"),
                }
            }
            let answer = self.state.answer(Ok(())).unwrap();
            assert!(matches!(server.receive(answer), Ok(Some(Asked::Accepted { kind: KIND, .. }))));
        }
        (set, removed)
    }
}

fn subscribed(node: &Node) -> ServerState {
    let mut server = ServerState::default();
    for request in node.state.subscribe("node-a/agent") {
        assert_eq!(server.receive(request), Ok(Some(Asked::Subscribed(KIND))));
    }
    assert_eq!(server.node(), "node-a/agent");
    server
}

#[test]
fn a_first_stream_gets_everything_and_then_changes_alone() {
    let mut node = Node::new(Known::default(), BTreeMap::new());
    let mut server = subscribed(&node);
    let responses = server.reconcile(KIND, &[pod_at("a", 1), pod_at("b", 1)]);
    assert!(!node.state.is_complete());
    assert_eq!(node.apply(&mut server, responses), (2, 0));
    assert!(node.state.is_complete());
    let responses = server.update(KIND, &[pod_at("a", 2), pod_at("b", 1)], ["never-heard-of"]);
    assert_eq!(node.apply(&mut server, responses), (1, 0));
    let responses = server.update(KIND, &[], ["b"]);
    assert_eq!(node.apply(&mut server, responses), (0, 1));
    assert_eq!(node.has.keys().collect::<Vec<_>>(), ["a"]);
    assert_eq!(server.update(KIND, &[pod_at("a", 2)], []), []);
}

#[test]
fn who_asks_about_an_address_is_told_what_has_it_or_that_nothing_has() {
    let (mut client, mut server) = (ClientState::new(&[Kind::Address], Known::default()), ServerState::default());
    let question = |text: &str| ClientState::ask(text.parse().unwrap());
    for request in client.subscribe("node-a/proxy") {
        assert_eq!(server.receive(request), Ok(Some(Asked::Subscribed(Kind::Address))));
    }
    assert_eq!(server.nobody(["10.0.0.9".parse().unwrap()]), [], "nothing before the first comparison");
    let take = |client: &mut ClientState, server: &mut ServerState, response| {
        let batch = client.receive(response).unwrap();
        let accepted = server.receive(client.answer(Ok(())).unwrap());
        assert!(matches!(accepted, Ok(Some(Asked::Accepted { kind: Kind::Address, .. }))), "{accepted:?}");
        assert_eq!(batch.refused, []);
        batch.changes
    };
    let first = server.reconcile(Kind::Address, []).remove(0);
    assert_eq!(take(&mut client, &mut server, first), []);

    assert_eq!(server.receive(question("10.0.0.9")), Ok(None));
    assert_eq!(server.receive(question("fd00::9")), Ok(None));
    assert_eq!(server.receive(ClientState::forget("10.0.0.7".parse().unwrap())), Ok(None));
    let about: Vec<std::net::IpAddr> = vec!["10.0.0.9".parse().unwrap(), "fd00::9".parse().unwrap()];
    let no_longer = vec!["10.0.0.7".parse().unwrap()];
    assert_eq!(server.addresses(), Some(Asked::Addresses { about: about.clone(), no_longer }));
    assert_eq!(server.addresses(), None);
    let answer = server.nobody(about.clone()).remove(0);
    let changes: Vec<_> = about.into_iter().map(Change::Nobody).collect();
    assert_eq!(take(&mut client, &mut server, answer), changes);
    assert_eq!(client.known().count(Kind::Address), 0);

    let bad = DeltaDiscoveryRequest { resource_names_subscribe: vec!["/not-one".into()], ..question("10.0.0.9") };
    assert_eq!(server.receive(bad), Err(BadRequest::NotAnAddress));
    let bad = DeltaDiscoveryResponse {
        type_url: Kind::Address.type_url().to_owned(),
        removed_resources: vec!["/not-one".into()],
        ..Default::default()
    };
    let batch = client.receive(bad).unwrap();
    assert_eq!((batch.changes, batch.refused.len()), (vec![], 1));
}

#[test]
fn a_node_that_answers_nothing_is_not_told_for_ever() {
    let node = Node::new(Known::default(), BTreeMap::new());
    let mut server = subscribed(&node);
    server.reconcile(KIND, []);
    let mut sent = 1;
    while server.check_answers().is_ok() {
        assert!(sent <= 4096, "{sent} responses are unanswered");
        sent += server.update(KIND, &[pod_at("a", (sent % 2) as u8)], []).len();
    }
    assert_eq!((server.check_answers(), sent), (Err(BadRequest::TooManyUnanswered), 4097));
}

#[test]
fn nothing_to_say_is_said_once() {
    let mut node = Node::new(Known::default(), BTreeMap::new());
    let mut server = subscribed(&node);
    let responses = server.reconcile(KIND, &[]);
    assert_eq!(responses.len(), 1);
    assert_eq!(node.apply(&mut server, responses), (0, 0));
    assert!(node.state.is_complete());
    assert_eq!(server.reconcile(KIND, &[]), []);
}

#[test]
fn a_next_stream_gets_what_differs() {
    let mut node = Node::new(Known::default(), BTreeMap::new());
    let mut server = subscribed(&node);
    let responses = server.reconcile(KIND, &[pod_at("same", 1), pod_at("changed", 1), pod_at("gone", 1)]);
    node.apply(&mut server, responses);
    let mut node = Node::new(node.state.known().clone(), node.has);
    let mut server = subscribed(&node);
    let responses = server.reconcile(KIND, &[pod_at("same", 1), pod_at("changed", 2), pod_at("new", 1)]);
    assert_eq!(node.apply(&mut server, responses), (2, 1));
    assert_eq!(node.has.keys().collect::<Vec<_>>(), ["changed", "new", "same"]);
    assert_eq!(node.state.known().count(KIND), 3);
}

#[test]
fn a_change_before_the_first_comparison_is_left_to_the_comparison() {
    let node = Node::new(Known::default(), BTreeMap::new());
    let mut server = subscribed(&node);
    assert_eq!(server.update(KIND, &[pod_at("a", 1)], ["b"]), []);
    assert_eq!(server.update(Kind::Policy, &[], ["b"]), []);
    assert_eq!(server.reconcile(Kind::Policy, &[]), [], "nobody subscribed");
}

#[test]
fn a_malformed_resource_is_refused_alone_and_sent_again_to_the_next_stream() {
    let mut node = Node::new(Known::default(), BTreeMap::new());
    let mut server = subscribed(&node);
    let mut responses = server.reconcile(KIND, &[pod_at("bad", 1), pod_at("good", 1)]);
    let any = responses[0].resources[0].resource.as_mut().unwrap();
    any.value = vec![255];
    let batch = node.state.receive(responses.remove(0)).unwrap();
    assert_eq!(batch.changes.len(), 1);
    assert_eq!(batch.refused.len(), 1);
    assert_eq!((batch.refused[0].name.as_str(), &batch.refused[0].fault), ("bad", &Fault::Encoding));
    let answer = node.state.answer(Ok(())).unwrap();
    let detail = "node-pod bad: the content does not parse".to_owned();
    assert_eq!(server.receive(answer), Ok(Some(Asked::Refused { kind: KIND, detail })));
    assert_eq!(node.state.known().count(KIND), 1);
    let mut node = Node::new(node.state.known().clone(), BTreeMap::new());
    let mut server = subscribed(&node);
    let responses = server.reconcile(KIND, &[pod_at("bad", 1), pod_at("good", 1)]);
    assert_eq!(node.apply(&mut server, responses), (1, 0));
}

#[test]
fn what_the_caller_refuses_is_not_known() {
    let mut node = Node::new(Known::default(), BTreeMap::new());
    let mut server = subscribed(&node);
    let response = server.reconcile(KIND, &[pod_at("a", 1)]).remove(0);
    node.state.receive(response).unwrap();
    let answer = node.state.answer(Err("no\nroom".to_owned())).unwrap();
    let refused = Asked::Refused { kind: KIND, detail: "no room".to_owned() };
    assert_eq!(server.receive(answer), Ok(Some(refused)));
    assert_eq!(node.state.known(), &Known::default());
    assert!(!node.state.is_complete());
    assert_eq!(node.state.answer(Ok(())), None, "each response is answered once");
}

#[test]
fn settings_and_bundle_cannot_be_taken_back() {
    let mut state = ClientState::new(&[Kind::Settings], Known::default());
    let response = DeltaDiscoveryResponse {
        type_url: Kind::Settings.type_url().to_owned(),
        removed_resources: vec!["mesh".to_owned()],
        ..Default::default()
    };
    let batch = state.receive(response).unwrap();
    assert_eq!((batch.changes.len(), &batch.refused[0].fault), (0, &Fault::NotRemovable));
}

#[test]
fn a_response_of_a_type_that_was_not_asked_for_is_refused() {
    for url in ["type.googleapis.com/envoy.config.listener.v3.Listener", Kind::Policy.type_url()] {
        let mut state = ClientState::new(&[KIND], Known::default());
        let response = DeltaDiscoveryResponse {
            type_url: url.to_owned(),
            nonce: "7".to_owned(),
            removed_resources: vec!["shop/p".to_owned()],
            ..Default::default()
        };
        assert_eq!(state.receive(response), None);
        let answer = state.answer(Ok(())).unwrap();
        assert_eq!((answer.type_url.as_str(), answer.response_nonce.as_str()), (url, "7"));
        assert_eq!(answer.error_detail.unwrap().message, "nobody subscribed to this type");
    }
}

#[test]
fn workloads_and_services_are_told_apart_by_name_when_they_go() {
    let mut state = ClientState::new(&[Kind::Address], Known::default());
    let response = DeltaDiscoveryResponse {
        type_url: Kind::Address.type_url().to_owned(),
        removed_resources: vec!["Kubernetes//Pod/shop/web".to_owned(), "shop/web.shop.svc.cluster.local".to_owned()],
        ..Default::default()
    };
    let changes = state.receive(response).unwrap().changes;
    let workload = mesh::ResourceKey::Workload("Kubernetes//Pod/shop/web".into());
    let service = mesh::ResourceKey::Service("shop/web.shop.svc.cluster.local".parse().unwrap());
    assert_eq!(changes, [workload, service].map(|key| Change::Removed(Removed::Mesh(key))));
}

fn request(kind: Kind) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest { type_url: kind.type_url().to_owned(), ..Default::default() }
}

#[test]
fn who_subscribes_by_name_is_told_of_that_and_also_that_there_is_none() {
    let mut server = ServerState::default();
    let by_name =
        DeltaDiscoveryRequest { resource_names_subscribe: vec!["a".to_owned(), "none".to_owned()], ..request(KIND) };
    assert_eq!(server.receive(by_name), Ok(Some(Asked::Subscribed(KIND))));
    let all = [pod_at("a", 1), pod_at("b", 1)];
    let response = server.reconcile(KIND, &all).remove(0);
    assert_eq!(response.resources.iter().map(|resource| resource.name.as_str()).collect::<Vec<_>>(), ["a"]);
    assert_eq!(response.removed_resources, ["none"]);
    // Asking again is answered again; what is unsubscribed is not.
    let again = DeltaDiscoveryRequest {
        resource_names_subscribe: vec!["a".to_owned()],
        resource_names_unsubscribe: vec!["none".to_owned()],
        ..request(KIND)
    };
    assert_eq!(server.receive(again), Ok(Some(Asked::Subscribed(KIND))));
    let response = server.reconcile(KIND, &all).remove(0);
    assert_eq!((response.resources.len(), response.removed_resources.len()), (1, 0));
    let star = DeltaDiscoveryRequest { resource_names_subscribe: vec!["*".to_owned()], ..request(KIND) };
    assert_eq!(server.receive(star), Ok(Some(Asked::Subscribed(KIND))));
    let response = server.reconcile(KIND, &all).remove(0);
    assert_eq!(response.resources.iter().map(|resource| resource.name.as_str()).collect::<Vec<_>>(), ["b"]);
    assert_eq!(response.removed_resources, Vec::<String>::new());
}

#[test]
fn answers_that_answer_nothing_say_nothing() {
    let node = Node::new(Known::default(), BTreeMap::new());
    let mut server = subscribed(&node);
    let response = server.reconcile(KIND, &[]).remove(0);
    let answer = |nonce: &str| DeltaDiscoveryRequest { response_nonce: nonce.to_owned(), ..request(KIND) };
    assert_eq!(server.receive(answer("forged")), Ok(None));
    assert_eq!(server.receive(answer(&response.nonce)), Ok(Some(Asked::Accepted { kind: KIND, current: true })));
    assert_eq!(server.receive(answer(&response.nonce)), Ok(None), "once");
}

#[test]
fn a_node_is_current_when_all_responses_are_answered() {
    let node = Node::new(Known::default(), BTreeMap::new());
    let mut server = subscribed(&node);
    let first = server.reconcile(KIND, &[]).remove(0);
    let second = server.update(KIND, &[pod_at("a", 1)], []).remove(0);
    for (response, current) in [(first, false), (second, true)] {
        let answer = DeltaDiscoveryRequest { response_nonce: response.nonce, ..request(KIND) };
        assert_eq!(server.receive(answer), Ok(Some(Asked::Accepted { kind: KIND, current })));
    }
}

#[test]
fn a_heartbeat_waits_for_the_answer_to_the_last_and_is_never_known() {
    let kinds = [KIND, Kind::Heartbeat];
    let mut state = ClientState::new(&kinds, Known::default());
    let mut server = ServerState::default();
    assert_eq!(server.beat(UnixTime::now()), None, "nobody asked for any");
    let requests = state.subscribe("node-a/proxy");
    assert_eq!(requests.last().unwrap().type_url, Kind::Heartbeat.type_url(), "after everything else");
    for request in requests {
        server.receive(request).unwrap();
    }
    let all = server.reconcile(KIND, &[]).remove(0);
    let time = UnixTime::since_unix_epoch(std::time::Duration::from_secs(1_800_000_000));
    let beat = server.beat(time).unwrap();
    assert_eq!(server.beat(time), None, "the last one is not answered");
    state.receive(all).unwrap();
    server.receive(state.answer(Ok(())).unwrap()).unwrap();
    assert!(state.is_complete(), "heartbeats never end");
    let batch = state.receive(beat).unwrap();
    assert_eq!(batch.changes, [Change::Set(Resource::Heartbeat(Heartbeat { time }))]);
    let answered = server.receive(state.answer(Ok(())).unwrap());
    assert_eq!(answered, Ok(Some(Asked::Accepted { kind: Kind::Heartbeat, current: true })));
    assert!(server.beat(time).is_some());
    assert_eq!(state.known().count(Kind::Heartbeat), 0);
    assert_eq!(server.told(), 0, "heartbeats are no news");
}

#[test]
fn a_type_that_is_not_served_ends_the_stream() {
    let request = DeltaDiscoveryRequest { type_url: "x".to_owned(), ..Default::default() };
    assert_eq!(ServerState::default().receive(request), Err(BadRequest::UnknownType));
}

#[test]
fn a_large_view_comes_in_several_messages_and_is_complete_with_the_last() {
    let mut node = Node::new(Known::default(), BTreeMap::new());
    let mut server = subscribed(&node);
    let all: Vec<_> = (0..30_000).map(|number| pod_at(&format!("{number:0200}"), 1)).collect();
    let mut responses = server.reconcile(KIND, &all);
    assert!(responses.len() > 2);
    let last = responses.pop().unwrap();
    node.apply(&mut server, responses);
    assert!(!node.state.is_complete());
    node.apply(&mut server, vec![last]);
    assert!(node.state.is_complete());
    assert_eq!(node.has.len(), all.len());
}

proptest! {
    /// Whatever changes while streams come and go, a node that has read everything has what there is.
    #[test]
    fn a_node_ends_up_with_what_there_is(steps in prop::collection::vec((0u8..6, 0u8..5, any::<u8>()), 1..40)) {
        let mut world: BTreeMap<String, Published> = BTreeMap::new();
        let mut node = Node::new(Known::default(), BTreeMap::new());
        let mut server = subscribed(&node);
        let responses = server.reconcile(KIND, world.values());
        node.apply(&mut server, responses);
        let mut lost = false;
        for (action, which, number) in steps {
            let name = format!("pod-{which}");
            let responses = match action {
                // A change or removal that the node hears of, or that happens while it has no stream.
                0..=2 => {
                    let pod = pod_at(&name, number % 3);
                    world.insert(name, pod.clone());
                    if lost { vec![] } else { server.update(KIND, [&pod], []) }
                }
                3 => {
                    world.remove(&name);
                    if lost { vec![] } else { server.update(KIND, [], [name.as_str()]) }
                }
                4 => {
                    lost = true;
                    vec![]
                }
                _ => {
                    lost = false;
                    node = Node::new(node.state.known().clone(), node.has);
                    server = subscribed(&node);
                    server.reconcile(KIND, world.values())
                }
            };
            node.apply(&mut server, responses);
            if !lost {
                prop_assert_eq!(node.has.keys().collect::<Vec<_>>(), world.keys().collect::<Vec<_>>());
                for (name, published) in &world {
                    let held = Published::new(&Resource::NodePod(node.has[name].clone()));
                    prop_assert_eq!(held.version(), published.version());
                }
                prop_assert_eq!(server.reconcile(KIND, world.values()), vec![]);
            }
        }
    }
}
