use identity::UnixTime;
use manifests::{Change as Object, parse};
use proptest::prelude::*;

use super::*;
use crate::index::Index;

fn bundle() -> TrustBundle {
    let root = identity::issuer::Root::generate(
        &"cluster.local".parse().unwrap(),
        UnixTime::now(),
        std::time::Duration::from_secs(60),
    );
    root.unwrap().bundle().unwrap()
}

fn object(text: &str) -> Object {
    Object::Applied(parse("test", text).objects.remove(0).0)
}

fn pod(name: &str, node: &str, address: u8) -> Object {
    object(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{namespace: shop, name: {name}, uid: uid-{name}}}\nspec: {{nodeName: {node}, \
         containers: [{{name: c, image: i}}]}}\nstatus: {{phase: Running, podIPs: [{{ip: 10.88.16.{address}}}]}}\n"
    ))
}

fn settings(whole: usize) -> Object {
    object(&format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{namespace: justmtls-system, name: justmtls}}\n\
         data: {{insideCIDRs: 10.88.0.0/16, serviceCIDRs: 10.96.0.0/16, wholeMeshUpTo: \"{whole}\"}}\n"
    ))
}

/// A Service at 10.96.0.`address`, and its endpoints.
fn service(name: &str, address: u8, endpoints: &[u8]) -> [Object; 2] {
    let list = |text: Vec<String>| text.join(", ");
    let endpoints = endpoints.iter().map(|last| format!("{{addresses: [10.88.16.{last}]}}")).collect();
    [
        object(&format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{namespace: shop, name: {name}}}\n\
             spec: {{clusterIP: 10.96.0.{address}, clusterIPs: [10.96.0.{address}], ports: [{{name: http, port: 80}}]}}\n"
        )),
        object(&format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{namespace: shop, name: {name}-1, \
             labels: {{kubernetes.io/service-name: {name}}}}}\naddressType: IPv4\nports: [{{name: http, port: 8080}}]\n\
             endpoints: [{}]\n",
            list(endpoints)
        )),
    ]
}

fn uid(pod: &str) -> Name {
    format!("Kubernetes//Pod/shop/{pod}").into()
}

fn service_name(name: &str) -> Name {
    format!("shop/{name}.shop.svc.cluster.local").into()
}

fn caller(role: Role, node: &str) -> Caller {
    Caller { role, node: node.to_owned() }
}

struct Bed {
    index: Index,
    publication: Publication,
}

impl Bed {
    fn with(objects: impl IntoIterator<Item = Object>) -> Self {
        let mut index = Index::new("cluster.local".parse().unwrap());
        for object in objects {
            index.apply([object]);
        }
        let publication = Publication::new(&bundle(), index.views());
        Self { index, publication }
    }

    fn proxy(&self, node: &str) -> Reading<'_> {
        self.publication.open(&caller(Role::Proxy, node))
    }
}

fn names(all: &[Published]) -> BTreeSet<String> {
    all.iter().map(|resource| resource.name().to_owned()).collect()
}

fn everything(reading: &Reading<'_>, kind: Kind) -> BTreeSet<String> {
    names(&reading.all(kind, std::iter::empty()))
}

/// What waits for a reader, of workloads and Services.
fn news(reading: &Reading<'_>) -> BTreeSet<Name> {
    match reading.mailbox().take() {
        News::Of(mut news) => news.remove(&Kind::Address).unwrap_or_default(),
        News::Everything => panic!("everything"),
    }
}

fn set(names: impl IntoIterator<Item = Name>) -> BTreeSet<Name> {
    names.into_iter().collect()
}

#[test]
fn the_first_publication_is_whole() {
    let bed = Bed::with([pod("web", "node-a", 5)]);
    let (proxy, agent) = (bed.proxy("node-a"), bed.publication.open(&caller(Role::Agent, "node-a")));
    assert_eq!(everything(&proxy, Kind::Address).len(), 1);
    assert_eq!(everything(&agent, Kind::NodePod).len(), 1);
    assert_eq!(everything(&proxy, Kind::Bundle).len(), 1);
    assert_eq!(everything(&proxy, Kind::Settings).len(), 1);
    let other = bed.publication.open(&caller(Role::Agent, "node-b"));
    assert!(everything(&other, Kind::NodePod).is_empty());
}

#[tokio::test]
async fn a_change_wakes_those_whom_it_concerns() {
    let Bed { mut index, publication } = Bed::with([]);
    let proxies = ["node-a", "node-b"].map(|node| publication.open(&caller(Role::Proxy, node)));
    let agents = ["node-a", "node-b"].map(|node| publication.open(&caller(Role::Agent, node)));
    let touched = index.apply([pod("web", "node-a", 5)]);
    publication.publish(index.views(), touched);
    for reading in proxies.iter().chain([&agents[0]]) {
        reading.mailbox().arrived().await;
    }
    assert!(proxies.iter().all(|proxy| news(proxy) == set([uid("web")])), "a small mesh is told to everybody");
    let of = |reading: &Reading<'_>| reading.mailbox().take();
    let pods = BTreeMap::from([(Kind::NodePod, set(["uid-web".into()]))]);
    assert_eq!((of(&agents[0]), of(&agents[1])), (News::Of(pods), News::Of(BTreeMap::new())));
    let touched = index.apply([pod("web", "node-a", 5)]);
    publication.publish(index.views(), touched);
    assert!(proxies.iter().all(|proxy| news(proxy).is_empty()), "nothing changed");
}

#[test]
fn a_large_mesh_is_told_by_node_and_by_question() {
    let pods = [pod("here", "node-a", 5), pod("there", "node-b", 6), pod("far", "node-c", 7)];
    let objects = pods.into_iter().chain([settings(0)]).chain(service("shop", 1, &[6]));
    let Bed { mut index, publication } = Bed::with(objects);
    let proxy = publication.open(&caller(Role::Proxy, "node-a"));
    assert_eq!(everything(&proxy, Kind::Address), BTreeSet::from([uid("here").to_string()]));
    let mut change = |object| {
        let touched = index.apply([object]);
        publication.publish(index.views(), touched);
    };
    change(pod("there", "node-b", 16));
    assert!(news(&proxy).is_empty(), "nobody on node-a has asked about it");

    let (found, nobody) = proxy.ask(&[[10, 96, 0, 1].into(), [10, 88, 16, 99].into()]);
    assert_eq!(found, set([service_name("shop")]), "its endpoint has another address by now");
    assert_eq!(nobody, [IpAddr::from([10, 88, 16, 99])]);
    change(pod("there", "node-b", 6));
    assert_eq!(news(&proxy), set([uid("there")]), "it is an endpoint of what was asked about");
    change(pod("late", "node-b", 99));
    assert_eq!(news(&proxy), set([uid("late")]), "what was waited for is there");
    change(pod("late", "node-b", 98));
    assert_eq!(news(&proxy), set([uid("late")]), "what one was told of one hears of again");

    let Object::Applied(late) = pod("late", "node-b", 98) else { panic!() };
    change(Object::Deleted(late.key()));
    let gone = news(&proxy);
    assert_eq!(gone, set([uid("late")]));
    assert_eq!(proxy.look(Kind::Address, &gone).1, [&*uid("late")]);
    change(pod("late", "node-b", 99));
    assert!(news(&proxy).is_empty(), "whoever wants to know of the next one asks again");
    change(pod("stray", "node-b", 1));
    assert!(news(&proxy).is_empty());
}

#[test]
fn an_address_outside_of_the_ranges_is_told_to_everybody() {
    let ranges = "apiVersion: v1\nkind: ConfigMap\nmetadata: {namespace: justmtls-system, name: justmtls}\n\
                  data: {insideCIDRs: 10.99.0.0/16, wholeMeshUpTo: \"0\"}\n";
    let Bed { mut index, publication } = Bed::with([object(ranges), pod("web", "node-b", 5)]);
    let proxy = publication.open(&caller(Role::Proxy, "node-a"));
    assert_eq!(everything(&proxy, Kind::Address), BTreeSet::from([uid("web").to_string()]));
    for (object, expected) in [(settings(0), News::Of(BTreeMap::new())), (object(ranges), News::Everything)] {
        let touched = index.apply([object]);
        publication.publish(index.views(), touched);
        let mut taken = proxy.mailbox().take();
        if let News::Of(news) = &mut taken {
            news.remove(&Kind::Settings);
        }
        assert_eq!(taken, expected);
    }
}

#[test]
fn a_mesh_that_grows_and_shrinks_is_told_wholly_again_at_half_of_the_bound() {
    let pods = |count: u8| (1..=count).map(|number| pod(&format!("p{number}"), "node-b", number));
    let Bed { mut index, publication } = Bed::with(pods(4).chain([settings(4)]));
    let proxy = publication.open(&caller(Role::Proxy, "node-a"));
    assert_eq!(everything(&proxy, Kind::Address).len(), 4);
    let mut change = |object| {
        let touched = index.apply([object]);
        publication.publish(index.views(), touched);
    };
    change(pod("p5", "node-b", 5));
    assert!(news(&proxy).is_empty());
    change(pod("p4", "node-b", 44));
    assert_eq!(news(&proxy), set([uid("p4")]), "what it knows stays right");
    for number in (3..=5).rev() {
        let Object::Applied(gone) = pod(&format!("p{number}"), "node-b", number) else { panic!() };
        assert_ne!(proxy.mailbox().take(), News::Everything);
        change(Object::Deleted(gone.key()));
    }
    assert_eq!(proxy.mailbox().take(), News::Everything);
}

/// What happens to a cluster of 6 pods, 2 Services and 3 nodes.
#[derive(Clone, Debug)]
enum Step {
    Pod { pod: u8, node: u8, address: u8 },
    NoPod(u8),
    Service { service: u8, endpoints: Vec<u8> },
    NoService(u8),
    Settings(usize),
    Ask { reader: usize, addresses: Vec<IpAddr> },
    Reopen(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let address = prop_oneof![
        (1..10_u8).prop_map(|last| IpAddr::from([10, 88, 16, last])),
        (1..3_u8).prop_map(|last| IpAddr::from([10, 96, 0, last])),
    ];
    prop_oneof![
        4 => (0..6_u8, 0..3_u8, 1..10_u8).prop_map(|(pod, node, address)| Step::Pod { pod, node, address }),
        2 => (0..6_u8).prop_map(Step::NoPod),
        2 => (1..3_u8, prop::collection::vec(1..10_u8, 0..4))
            .prop_map(|(service, endpoints)| Step::Service { service, endpoints }),
        1 => (1..3_u8).prop_map(Step::NoService),
        1 => (0..8_usize).prop_map(Step::Settings),
        4 => (0..3_usize, prop::collection::vec(address, 1..3))
            .prop_map(|(reader, addresses)| Step::Ask { reader, addresses }),
        1 => (0..3_usize).prop_map(Step::Reopen),
    ]
}

/// A node's end: what it has by what it was told, and which addresses it takes to be nobody's.
struct Client<'a> {
    reading: Reading<'a>,
    has: BTreeMap<Name, String>,
    nobody: BTreeSet<IpAddr>,
}

impl Client<'_> {
    fn take(&mut self, set: Vec<Published>, gone: Vec<&str>, publication: &Publication) {
        gone.into_iter().for_each(|name| drop(self.has.remove(name)));
        for resource in set {
            let state = publication.read();
            let place = state.places.get(resource.name()).unwrap();
            self.nobody.retain(|address| !place.addresses.contains(address));
            self.has.insert(resource.name().into(), resource.version().to_owned());
        }
    }

    fn read(&mut self, publication: &Publication) {
        match self.reading.mailbox().take() {
            News::Of(news) => {
                if let Some(names) = news.get(&Kind::Address) {
                    let (set, gone) = self.reading.look(Kind::Address, names);
                    self.take(set, gone, publication);
                }
            }
            News::Everything => self.reconcile(publication),
        }
    }

    fn reconcile(&mut self, publication: &Publication) {
        let names: Vec<Name> = self.has.keys().cloned().collect();
        let all = self.reading.all(Kind::Address, names.iter());
        self.has.clear();
        self.take(all, vec![], publication);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// Whatever happens in whatever order: what a node has is what is, it has all that it must have, and what it takes to be
    /// nobody's is nobody's.
    #[test]
    fn what_a_node_has_is_right_and_enough(steps in prop::collection::vec(step(), 1..40)) {
        let Bed { mut index, publication } = Bed::with([settings(3)]);
        let open = |node: usize| Client {
            reading: publication.open(&caller(Role::Proxy, &format!("node-{node}"))),
            has: BTreeMap::new(),
            nobody: BTreeSet::new(),
        };
        let mut clients: Vec<_> = (0..3).map(open).collect();
        for step in steps {
            let mut change = |object: Object| {
                let touched = index.apply([object]);
                publication.publish(index.views(), touched);
            };
            let deleted = |object: Object| match object {
                Object::Applied(object) => Object::Deleted(object.key()),
                deleted => deleted,
            };
            match step {
                Step::Pod { pod: number, node, address } => {
                    change(pod(&format!("p{number}"), &format!("node-{node}"), address));
                }
                Step::NoPod(number) => change(deleted(pod(&format!("p{number}"), "", 1))),
                Step::Service { service: number, endpoints } => {
                    service(&format!("s{number}"), number, &endpoints).into_iter().for_each(change);
                }
                Step::NoService(number) => {
                    service(&format!("s{number}"), number, &[]).into_iter().map(deleted).for_each(change);
                }
                Step::Settings(whole) => change(settings(whole)),
                Step::Ask { reader, addresses } => {
                    let client = &mut clients[reader];
                    client.read(&publication);
                    let (found, nobody) = client.reading.ask(&addresses);
                    client.nobody.extend(nobody);
                    let (set, gone) = client.reading.look(Kind::Address, &found);
                    prop_assert!(gone.is_empty());
                    client.take(set, vec![], &publication);
                }
                Step::Reopen(number) => {
                    let client = &mut clients[number];
                    let again = Client { has: std::mem::take(&mut client.has), ..open(number) };
                    *client = again;
                    client.reconcile(&publication);
                }
            }
            for (number, client) in clients.iter_mut().enumerate() {
                client.read(&publication);
                let state = publication.read();
                let all = state.shared.get(&Kind::Address);
                let version = |name: &str| all.and_then(|all| all.get(name)).map(|it| it.version().to_owned());
                for (name, has) in &client.has {
                    prop_assert_eq!(version(name), Some(has.clone()), "{} of node-{}", name, number);
                }
                let mut must: BTreeSet<Name> = state.places.on_node(&format!("node-{number}")).cloned().collect();
                must.extend(state.places.strays().cloned());
                must.extend(client.has.keys().flat_map(|name| state.places.endpoints(name)).cloned());
                if state.whole {
                    must.extend(all.into_iter().flat_map(BTreeMap::keys).cloned());
                }
                let missing: Vec<_> = must.iter().filter(|name| !client.has.contains_key(*name)).collect();
                prop_assert!(missing.is_empty(), "node-{} lacks {:?}", number, missing);
                for address in &client.nobody {
                    prop_assert!(state.places.at(*address).next().is_none(), "{} is somebody's", address);
                }
            }
        }
    }
}
