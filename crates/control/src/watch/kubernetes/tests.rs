use kube::Client;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::*;
use crate::kubernetes::fake::Fake;

/// Far more than anything here takes. The clock is a test's own: what waits for nothing else passes at once.
const LONG: Duration = Duration::from_secs(600);
const POLICIES: &str = "/apis/security.istio.io/v1/namespaces/shop";

fn pod(name: &str) -> (String, Value) {
    let path = format!("/api/v1/namespaces/shop/pods/{name}");
    (path, json!({ "apiVersion": "v1", "kind": "Pod", "metadata": {}, "spec": { "containers": [] } }))
}

fn strict(mode: &str) -> Value {
    let spec = json!({ "mtls": { "mode": mode } });
    json!({ "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": {}, "spec": spec })
}

/// What a source has said, all together.
struct Heard {
    source: Kubernetes,
    there: BTreeMap<ObjectKey, Object>,
    last: Batch,
    deleted: usize,
}

impl Heard {
    fn of(client: &Client) -> Self {
        let source = Kubernetes::follow(client, &Arc::new(Metrics::new()));
        Self { source, there: BTreeMap::new(), last: Batch::default(), deleted: 0 }
    }

    /// Listens until every kind is listed.
    async fn whole(client: &Client) -> Self {
        let mut heard = Self::of(client);
        heard.until(|heard| heard.source.is_complete()).await;
        heard
    }

    async fn until(&mut self, holds: impl Fn(&Self) -> bool) {
        let listen = async {
            while !holds(self) {
                let mut batch = self.source.next().await;
                for change in batch.changes.drain(..) {
                    match change {
                        Change::Applied(object) => drop(self.there.insert(object.key(), object)),
                        Change::Deleted(key) => {
                            self.deleted += 1;
                            self.there.remove(&key);
                        }
                    }
                }
                self.last = batch;
            }
        };
        timeout(LONG, listen).await.expect("it is never said");
    }

    fn names(&self) -> Vec<&str> {
        self.there.keys().map(|key| key.name.as_str()).collect()
    }

    fn problem(&self, text: &str) -> bool {
        self.last.problems.iter().any(|problem| problem.to_string().contains(text))
    }
}

fn put_pods(fake: &Fake, names: &[&str]) {
    for (path, pod) in names.iter().map(|name| pod(name)) {
        fake.put(&path, pod);
    }
}

/// So many pods, in the order of their names, on a server that lists as a stream or only by pages.
fn with_many_pods(count: usize, streams: bool) -> (Fake, Vec<String>) {
    let fake = Fake::default();
    if !streams {
        fake.without_streaming();
    }
    let many: Vec<_> = (0..count).map(|number| format!("web-{number:04}")).collect();
    put_pods(&fake, &many.iter().map(String::as_str).collect::<Vec<_>>());
    (fake, many)
}

#[tokio::test(start_paused = true)]
async fn what_is_there_comes_first_and_then_every_change_by_either_kind_of_list() {
    for streams in [true, false] {
        let (fake, many) = with_many_pods(1100, streams);
        let mut heard = Heard::whole(&fake.client()).await;
        assert_eq!(heard.names(), many);
        let lists = fake.lists();
        fake.remove(&pod("web-0000").0);
        put_pods(&fake, &["web-9999"]);
        heard.until(|heard| heard.names().contains(&"web-9999") && heard.deleted == 1).await;
        assert_eq!(heard.there.len(), 1100);
        assert_eq!(fake.lists(), lists, "what changes is not listed anew");
    }
}

#[tokio::test(start_paused = true)]
async fn a_cut_goes_on_from_where_it_was_and_what_is_forgotten_is_listed_anew() {
    let fake = Fake::default();
    put_pods(&fake, &["one", "two"]);
    let mut heard = Heard::whole(&fake.client()).await;
    let lists = fake.lists();
    fake.remove(&pod("one").0);
    fake.cut();
    heard.until(|heard| heard.names() == ["two"]).await;
    assert_eq!(fake.lists(), lists);
    // What goes while nobody watches is known by what the next list lacks.
    fake.fail_with(Some(503));
    fake.cut();
    heard.until(|heard| heard.problem("Pod objects: cannot be followed")).await;
    fake.remove(&pod("two").0);
    put_pods(&fake, &["three"]);
    fake.forget();
    fake.fail_with(None);
    heard.until(|heard| heard.names() == ["three"] && !heard.last.behind).await;
    assert!(fake.lists() > lists);
}

#[tokio::test(start_paused = true)]
async fn what_goes_after_a_list_that_broke_off_or_while_it_is_listed_is_gone() {
    for streams in [true, false] {
        let (fake, many) = with_many_pods(600, streams);
        fake.break_lists_after(Some(300));
        let mut heard = Heard::of(&fake.client());
        heard
            .until(|heard| heard.names().contains(&"web-0001") && heard.problem("Pod objects: cannot be followed"))
            .await;
        fake.remove(&pod("web-0000").0);
        fake.break_lists_after(None);
        heard.until(|heard| heard.source.is_complete()).await;
        assert!(heard.names() == many[1..], "{streams}: {} objects, {:?} first", heard.there.len(), heard.names()[0]);
    }
    let fake = Fake::default();
    put_pods(&fake, &["one", "two"]);
    fake.remove_in_lists(&pod("one").0);
    assert_eq!(Heard::whole(&fake.client()).await.names(), ["two"]);
}

#[tokio::test(start_paused = true)]
async fn an_api_server_that_is_away_takes_nothing_away_and_that_is_said() {
    let fake = Fake::default();
    put_pods(&fake, &["one"]);
    fake.put(&format!("{POLICIES}/peerauthentications/default"), strict("STRICT"));
    let mut heard = Heard::whole(&fake.client()).await;
    for code in [503, 403, 404, 410] {
        fake.fail_with(Some(code));
        fake.cut();
        heard
            .until(|heard| heard.problem("Pod objects: cannot be followed") && heard.problem("PeerAuthentication"))
            .await;
        assert!(heard.last.behind && heard.names() == ["one", "default"], "{code}: {:?}", heard.names());
        fake.fail_with(None);
        heard.until(|heard| !heard.last.behind).await;
    }
    assert_eq!(heard.deleted, 0);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_complete_before_every_kind_is_listed() {
    let fake = Fake::default();
    fake.fail_with(Some(503));
    let mut source = Kubernetes::follow(&fake.client(), &Arc::new(Metrics::new()));
    let batch = timeout(LONG, source.next()).await.unwrap();
    assert!(batch.behind && !source.is_complete());
    assert!(batch.problems[0].message.contains("nothing is served before"), "{}", batch.problems[0]);
    fake.fail_with(None);
    let complete = async {
        while !source.is_complete() {
            source.next().await;
        }
    };
    timeout(LONG, complete).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn kinds_that_the_cluster_does_not_have_are_no_error_and_are_found_when_they_come() {
    let fake = Fake::default();
    fake.without("peerauthentications");
    fake.without("authorizationpolicies");
    let mut heard = Heard::whole(&fake.client()).await;
    assert!(heard.last.problems.is_empty(), "{:?}", heard.last.problems);
    fake.with("peerauthentications");
    fake.put(&format!("{POLICIES}/peerauthentications/default"), strict("STRICT"));
    heard.until(|heard| heard.names() == ["default"]).await;
    // Taken away for good, its objects are gone, and not at the first word of it.
    fake.without("peerauthentications");
    fake.cut();
    heard.until(|heard| heard.problem("PeerAuthentication objects")).await;
    assert_eq!(heard.deleted, 0);
    heard.until(|heard| heard.names().is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn a_policy_that_cannot_be_read_keeps_its_last_state_or_closes_its_namespace() {
    let fake = Fake::default();
    let path = format!("{POLICIES}/peerauthentications/default");
    fake.put(&path, strict("PERMISSIVE"));
    fake.put(&format!("{POLICIES}/peerauthentications/new"), strict("MAYBE"));
    let policy = json!({ "metadata": {}, "spec": { "action": "MAYBE" } });
    fake.put(&format!("{POLICIES}/authorizationpolicies/new"), policy);
    let mut heard = Heard::whole(&fake.client()).await;
    let modes = |heard: &Heard| -> Vec<_> {
        let policies = heard.there.values().filter_map(|object| match object {
            Object::PeerAuthentication(policy) => policy.spec.mtls.map(|mtls| mtls.mode),
            _ => None,
        });
        policies.collect()
    };
    use manifests::istio::MtlsMode::{Permissive, Strict};
    assert_eq!(modes(&heard), [Permissive, Strict]);
    assert!(heard.problem("MAYBE is not a known value"), "{:?}", heard.last.problems);
    let unreadable: Vec<_> = heard.last.unreadable.keys().map(|key| key.kind).collect();
    assert_eq!(unreadable, [Kind::PeerAuthentication, Kind::AuthorizationPolicy]);
    fake.change(&path, |policy| policy["spec"]["mtls"]["mode"] = json!("NEVER"));
    heard.until(|heard| heard.problem("NEVER")).await;
    assert_eq!(modes(&heard), [Permissive, Strict]);
    fake.change(&path, |policy| policy["spec"]["mtls"]["mode"] = json!("STRICT"));
    heard.until(|heard| !heard.problem("NEVER") && modes(heard) == [Strict, Strict]).await;
}

#[tokio::test(start_paused = true)]
async fn what_stands_in_for_a_policy_selects_as_it_does_and_is_as_old_where_its_selector_can_be_read() {
    let fake = Fake::default();
    let created = "2026-11-30T06:31:55Z";
    let web = json!({ "matchLabels": { "app": "web" } });
    let put = |namespace: &str, name: &str, selector: Value, unknown: Option<&str>| {
        let mut policy = strict("PERMISSIVE");
        policy["metadata"]["creationTimestamp"] = json!(created);
        policy["spec"]["selector"] = selector;
        policy["spec"]["portLevelMtls"] = json!({ "99999": { "mode": "PERMISSIVE" } });
        if let Some(unknown) = unknown {
            policy["spec"][unknown] = json!({});
        }
        fake.put(&format!("/apis/security.istio.io/v1/namespaces/{namespace}/peerauthentications/{name}"), policy);
    };
    put("shop", "field", web.clone(), Some("selectsToo"));
    put("shop", "label", json!({ "matchLabels": { "app": "no label" } }), None);
    put("shop", "plain", json!(null), None);
    put("shop", "selects", web.clone(), None);
    put(crate::ROOT_NAMESPACE, "all", json!(null), None);
    put(crate::ROOT_NAMESPACE, "selects", web, None);
    let heard = Heard::whole(&fake.client()).await;
    let of_policies = heard.there.values().filter_map(|object| match object {
        Object::PeerAuthentication(policy) => Some(policy),
        _ => None,
    });
    let seen: Vec<_> = of_policies
        .map(|policy| {
            assert_eq!(policy.spec.mtls.unwrap().mode, manifests::istio::MtlsMode::Strict);
            let (metadata, selector) = (&policy.metadata, policy.spec.selector.as_ref());
            let selects = selector.is_some_and(|selector| !selector.match_labels.is_empty());
            (metadata.name.as_deref().unwrap(), selects, metadata.creation_timestamp.is_some())
        })
        .collect();
    let of_mesh = [("all", false, true), ("selects", true, true)];
    let of_shop = [("field", false, false), ("label", false, false), ("plain", false, true), ("selects", true, true)];
    assert_eq!(seen, [&of_mesh[..], &of_shop[..]].concat());
    for whom in ["every pod of the mesh,", "the pods of namespace shop,", "the pods that it selects,"] {
        assert!(heard.problem(&format!("taken as STRICT for {whom}")), "{whom}: {:?}", heard.last.problems);
    }
    assert!(heard.problem("no earlier state of it is known: correct it"), "{:?}", heard.last.problems);
}

#[tokio::test(start_paused = true)]
async fn what_policies_say_of_themselves_is_passed_on() {
    let fake = Fake::default();
    let mut policy = strict("STRICT");
    policy["status"] = json!({ "conditions": [
        { "type": "Other", "status": "True" },
        { "type": "justmtls.dev/Enforced", "status": "False", "message": "because" },
    ] });
    fake.put(&format!("{POLICIES}/peerauthentications/default"), policy);
    let heard = Heard::whole(&fake.client()).await;
    let conditions: Vec<_> = heard.last.conditions.values().map(|it| (it.enforced, it.message.as_str())).collect();
    assert_eq!(conditions, [(false, "because")]);
}

#[tokio::test(start_paused = true)]
async fn a_policy_with_one_bad_element_is_about_those_that_it_selects() {
    let fake = Fake::default();
    let bad = json!([{ "from": [{ "source": { "ipBlocks": ["10.0.0.0/33"] } }] }]);
    let redis = json!({ "matchLabels": { "app": "redis" } });
    let put = |name: &str, spec: Value| {
        fake.put(
            &format!("{POLICIES}/authorizationpolicies/{name}"),
            json!({ "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {}, "spec": spec }),
        );
    };
    put("selects", json!({ "selector": redis, "action": "DENY", "rules": bad }));
    put("action", json!({ "selector": redis, "action": "MAYBE", "rules": [] }));
    put("rule", json!({ "selector": redis, "action": "DENY", "rules": [{ "someday": [] }] }));
    // Of these it is not known whom they are about.
    put("all", json!({ "action": "DENY", "rules": bad }));
    put("label", json!({ "selector": { "matchLabels": { "app": "no label" } }, "rules": [{}] }));
    put("expression", json!({ "selector": { "matchExpressions": [] }, "rules": [{}] }));
    put("field", json!({ "selector": redis, "selectsToo": {}, "rules": [{}] }));
    put("targets", json!({ "selector": redis, "targetRefs": [{ "kind": "Service", "name": "web" }], "rules": [{}] }));
    put("audits", json!({ "selector": redis, "action": "AUDIT", "rules": bad }));
    let mut heard = Heard::whole(&fake.client()).await;
    let unreadable = |heard: &Heard| -> Vec<(String, bool)> {
        let all = heard.last.unreadable.iter();
        all.map(|(key, labels)| (key.name.clone(), labels.get("app").is_some_and(|app| app == "redis"))).collect()
    };
    let expected = [
        ("action", true),
        ("all", false),
        ("expression", false),
        ("field", false),
        ("label", false),
        ("rule", true),
        ("selects", true),
        ("targets", false),
    ];
    assert_eq!(unreadable(&heard), expected.map(|(name, selects)| (name.to_owned(), selects)));
    for (key, problems) in &heard.last.of_policies {
        assert!(
            ["selects", "all", "audits"].contains(&&*key.name) == problems[0].message.contains("10.0.0.0/33"),
            "{key}"
        );
    }
    // One that comes to audit alone refuses nobody any more.
    let path = format!("{POLICIES}/authorizationpolicies/selects");
    fake.change(&path, |policy| policy["spec"]["action"] = json!("AUDIT"));
    heard.until(|heard| heard.last.unreadable.len() == expected.len() - 1).await;
    assert!(unreadable(&heard).iter().all(|(name, _)| name != "selects"));
}

#[tokio::test(start_paused = true)]
async fn of_a_policy_that_audited_no_state_is_kept() {
    let fake = Fake::default();
    let path = format!("{POLICIES}/authorizationpolicies/audits");
    let bad = json!([{ "from": [{ "source": { "ipBlocks": ["10.0.0.0/33"] } }] }]);
    let spec = json!({ "selector": { "matchLabels": { "app": "redis" } }, "action": "DENY", "rules": [{}] });
    fake.put(
        &path,
        json!({ "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {}, "spec": spec }),
    );
    let mut heard = Heard::whole(&fake.client()).await;
    assert!(heard.last.unreadable.is_empty());
    // What denied before it audited is as little kept as that.
    fake.change(&path, |policy| policy["spec"]["action"] = json!("AUDIT"));
    heard.until(|heard| heard.there.values().any(|policy| !decides(policy))).await;
    fake.change(&path, |policy| {
        policy["spec"]["action"] = json!("DENY");
        policy["spec"]["rules"] = bad;
    });
    heard.until(|heard| !heard.last.unreadable.is_empty()).await;
    let labels: Vec<_> = heard.last.unreadable.values().flatten().map(|(_, label)| label.as_str()).collect();
    assert_eq!(labels, ["redis"], "it refuses for those that it selects");
}
