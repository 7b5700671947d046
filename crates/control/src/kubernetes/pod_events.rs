//! What the owner of a pod is told where he looks for it: a Kubernetes Event for each pod that runs, is meant to be captured, and
//! cannot be.
//!
//! One Event for a pod and a reason. Its name follows from both, so that whoever else writes it writes the same one, a replica
//! that has just taken over included, and one that is there already is as good as written. Events are forgotten by the API server,
//! after an hour unless it is told otherwise, and a pod may stay as it is for longer: so the same one is made again when it may be
//! forgotten, and one of which nobody here knows how old it is is looked after more often. It is never changed: a count that grows
//! would be a write each time, a permission more, and tell nobody anything.

use std::collections::BTreeMap;
use std::mem;
use std::ops::Bound;
use std::time::{Duration, Instant};

use kube::{Api, Client};
use manifests::k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use manifests::k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use manifests::k8s_openapi::jiff::Timestamp;
use mesh::PodUid;
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::info;

use super::{Failure, ask, metadata, parameters, tell};
use crate::clock::Clock;
use crate::problem::Problem;
use crate::uncaptured::{Uncapturable, Uncapturables};

/// How long a pod must be so: one whose capture is merely late, as while its node is upgraded, is not worth an Event.
const STANDS: Duration = Duration::from_secs(10);
/// How often it is looked for what is to be written.
const LOOK: Duration = Duration::from_secs(1);
/// Events of one look, at most. In a cluster where everything fails at once they come one after the other.
const OF_A_LOOK: usize = 5;
/// When what was written is written again: it may be forgotten by then (`--event-ttl` of the API server is an hour by default).
const ANEW: Duration = Duration::from_secs(3660);
/// When what was there already is written again: it may be of any age, and forgotten at any time.
const THERE: Duration = Duration::from_secs(300);
/// Between two Events of a pod, whatever their reasons: an agent that makes reasons up has no more written than that.
const PAUSE: Duration = Duration::from_secs(300);
/// When what could not be written is tried again.
const AGAIN: Duration = Duration::from_secs(15);
/// The longest name of an object.
const MAX_NAME: usize = 253;

/// Writes Events for as long as there is somebody who says of which pods, and says what is wrong with that. What an agent found
/// is written by the replica that it reports to, which alone knows it; all else by the one that leads.
pub(crate) async fn keep(
    client: Client,
    clock: Clock,
    mut pods: watch::Receiver<Uncapturables>,
    leads: watch::Receiver<bool>,
    problems: watch::Sender<Vec<Problem>>,
) {
    let mut events = Events::new(client, clock);
    loop {
        let now = pods.borrow_and_update().clone();
        let leads = *leads.borrow();
        tell(&problems, events.look(&now, leads).await);
        let ended = if now.is_empty() { pods.changed().await.is_err() } else { pods.has_changed().is_err() };
        if ended {
            return;
        }
        // No sooner than that, whatever changes: each look has its share of writes.
        sleep(LOOK).await;
    }
}

/// What is known of the pods that were there at the last look: as many as those are.
struct Events {
    client: Client,
    clock: Clock,
    pods: BTreeMap<PodUid, Pod>,
    /// When a pod last had an Event, for as long as it may have no other. Also of pods that are gone from `pods`: they come back
    /// when it pleases their agent. As many as are written within that time.
    told: BTreeMap<PodUid, Instant>,
    /// The node that had its turn last.
    turn: String,
}

struct Pod {
    why: &'static str,
    /// When something is to be written next.
    next: Instant,
    /// The last try failed.
    failed: bool,
    /// Why it cannot be done, where somebody is to know.
    problem: Option<String>,
}

/// What became of an Event that is to be there.
enum Written {
    New,
    /// It was there already.
    There,
}

impl Events {
    fn new(client: Client, clock: Clock) -> Self {
        Self { client, clock, pods: BTreeMap::new(), told: BTreeMap::new(), turn: String::new() }
    }

    /// Writes what is due, as much as one look may; what is wrong with that.
    async fn look(&mut self, pods: &Uncapturables, leads: bool) -> Vec<Problem> {
        let now = self.clock.monotonic();
        self.pods.retain(|uid, pod| pods.get(uid).is_some_and(|found| found.why == pod.why));
        self.told.retain(|_, told| now < *told + PAUSE);
        for (uid, found) in pods {
            let may = self.told.get(uid).map_or(now, |told| *told + PAUSE);
            let new = || Pod { why: found.why, next: may.max(now + STANDS), failed: false, problem: None };
            self.pods.entry(uid.clone()).or_insert_with(new);
        }
        for uid in self.due(pods, leads, now) {
            let (Some(found), Some(pod)) = (pods.get(&uid), self.pods.get_mut(&uid)) else { continue };
            self.turn.clone_from(&found.node);
            let written = write(&self.client, &self.clock, &uid, found).await;
            pod.next = now
                + match &written {
                    Ok(Written::New) => ANEW,
                    Ok(Written::There) => THERE,
                    // Its namespace is gone or going, and so will the pod be.
                    Err(Failure::Absent | Failure::Terminating(_)) => THERE,
                    Err(_) => AGAIN,
                };
            pod.problem = None;
            let failed = mem::take(&mut pod.failed);
            match written {
                Ok(written) => {
                    self.told.insert(uid, now);
                    if let Written::New = written {
                        info!(
                            namespace = found.namespace,
                            pod = found.name,
                            reason = found.why,
                            "an event says why it is not captured"
                        );
                    }
                }
                Err(Failure::Absent | Failure::Terminating(_)) => {}
                Err(failure) => {
                    let away = matches!(failure, Failure::Away(_));
                    pod.failed = true;
                    // Once is what happens while an API server is started anew. More often it may be this kind of object alone,
                    // as where a webhook fails, and then nobody else says it.
                    pod.problem = (failed || !away).then(|| failure.to_string());
                    if away {
                        // Nothing else would be answered now.
                        break;
                    }
                }
            }
        }
        self.problem(pods, leads).into_iter().collect()
    }

    /// The pods whose turn it is: one of each node, from where it was at the last look, so that what one agent says keeps nobody
    /// else's from being told.
    fn due(&self, pods: &Uncapturables, leads: bool, now: Instant) -> Vec<PodUid> {
        let mut by_node: BTreeMap<&str, (&PodUid, Instant)> = BTreeMap::new();
        for (uid, found) in pods.iter().filter(|(_, found)| is_told_here(found, leads)) {
            let Some(pod) = self.pods.get(uid).filter(|pod| pod.next <= now) else { continue };
            let first = by_node.entry(&found.node).or_insert((uid, pod.next));
            if pod.next < first.1 {
                *first = (uid, pod.next);
            }
        }
        let after = by_node.range::<str, _>((Bound::Excluded(&*self.turn), Bound::Unbounded));
        let before = by_node.range::<str, _>((Bound::Unbounded, Bound::Included(&*self.turn)));
        after.chain(before).take(OF_A_LOOK).map(|(_, (uid, _))| (*uid).clone()).collect()
    }

    /// One for all: what keeps one Event from being written mostly keeps all of them.
    fn problem(&self, pods: &Uncapturables, leads: bool) -> Option<Problem> {
        let mut problems = self.pods.iter().filter_map(|(uid, pod)| Some((pods.get(uid)?, pod.problem.as_ref()?)));
        let (found, failure) = problems.find(|(found, _)| is_told_here(found, leads))?;
        let message = format!(
            "Pod {}/{} cannot be told by an Event why it is not captured ({}): {failure}; `justmtls status` says it, and it is \
             tried again",
            found.namespace, found.name, found.why
        );
        Some(Problem::warning("Events of pods", message))
    }
}

/// Whether a pod is this replica's to tell of.
fn is_told_here(found: &Uncapturable, leads: bool) -> bool {
    leads || found.by_agent
}

/// Writes one, if it is not there.
async fn write(client: &Client, clock: &Clock, uid: &PodUid, found: &Uncapturable) -> Result<Written, Failure> {
    let seconds = i64::try_from(clock.now().as_secs()).unwrap_or_default();
    let now = Time(Timestamp::from_second(seconds).unwrap_or_default());
    let source = EventSource { component: Some("justmtls".to_owned()), host: Some(found.node.clone()) };
    let mut event = Event {
        metadata: metadata(&name(uid, found)),
        involved_object: ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            namespace: Some(found.namespace.clone()),
            name: Some(found.name.clone()),
            uid: Some(uid.to_string()),
            ..ObjectReference::default()
        },
        type_: Some("Warning".to_owned()),
        reason: Some("NotCaptured".to_owned()),
        message: Some(format!("not captured by justmtls, {}: {}", found.why, found.sentence)),
        source: Some(source),
        first_timestamp: Some(now.clone()),
        last_timestamp: Some(now),
        count: Some(1),
        ..Event::default()
    };
    event.metadata.namespace = Some(found.namespace.clone());
    let api: Api<Event> = Api::namespaced(client.clone(), &found.namespace);
    match ask(api.create(&parameters(), &event)).await {
        Ok(_) => Ok(Written::New),
        Err(Failure::Conflict) => Ok(Written::There),
        Err(failure) => Err(failure),
    }
}

/// As events are named: after their object, and what tells them apart.
fn name(uid: &PodUid, found: &Uncapturable) -> String {
    let hash = Sha256::new().chain_update(uid.as_str()).chain_update("/").chain_update(found.why).finalize();
    let hash = hash.iter().take(8).fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
    let kept: String = found.name.chars().take(MAX_NAME - hash.len() - 1).collect();
    format!("{}.{hash}", kept.trim_end_matches(['.', '-']))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::fake::Fake;
    use super::*;

    const EVENTS: &str = "/api/v1/namespaces/shop/events";

    struct Bed {
        fake: Fake,
        clock: Clock,
        events: Events,
    }

    impl Bed {
        fn new() -> Self {
            let (fake, clock) = (Fake::default(), Clock::default());
            let events = Events::new(fake.client(), clock.clone());
            Self { fake, clock, events }
        }

        /// After the time that a pod must be so.
        async fn look_later(&mut self, pods: &Uncapturables, leads: bool) -> Vec<Problem> {
            self.events.look(pods, leads).await;
            self.clock.advance(STANDS);
            self.events.look(pods, leads).await
        }

        fn event(&self, uid: &str, found: &Uncapturable) -> Option<Value> {
            self.fake.get(&format!("{EVENTS}/{}", name(&uid.into(), found)))
        }
    }

    fn found(name: &str, node: &str, by_agent: bool) -> Uncapturable {
        Uncapturable {
            namespace: "shop".to_owned(),
            name: name.to_owned(),
            node: node.to_owned(),
            why: if by_agent { "no-interface" } else { "not-capturable" },
            sentence: "do something".to_owned(),
            by_agent,
        }
    }

    fn pods(all: &[(&str, Uncapturable)]) -> Uncapturables {
        all.iter().map(|(uid, found)| (PodUid::from(*uid), found.clone())).collect()
    }

    #[tokio::test]
    async fn a_pod_that_stays_uncapturable_has_one_event_that_names_it_and_says_what_to_do() {
        let mut bed = Bed::new();
        let web = found("web", "node-a", true);
        let pods = pods(&[("uid-web", web.clone())]);
        assert_eq!(bed.events.look(&pods, true).await, []);
        bed.clock.advance(STANDS - Duration::from_secs(2));
        bed.events.look(&pods, true).await;
        assert_eq!(bed.fake.writes(), 0, "it may only be late");
        bed.clock.advance(Duration::from_secs(2));
        assert_eq!(bed.events.look(&pods, true).await, []);
        let event = bed.event("uid-web", &web).unwrap();
        let object = &event["involvedObject"];
        assert_eq!([&object["kind"], &object["name"], &object["uid"]], ["Pod", "web", "uid-web"]);
        assert_eq!([&object["namespace"], &event["metadata"]["namespace"]], ["shop", "shop"]);
        assert_eq!([&event["type"], &event["reason"]], ["Warning", "NotCaptured"]);
        assert_eq!(event["message"], "not captured by justmtls, no-interface: do something");
        assert_eq!((&event["count"], event["eventTime"].is_null()), (&json!(1), true));
        bed.clock.advance(ANEW - Duration::from_secs(2));
        bed.events.look(&pods, true).await;
        assert_eq!(bed.fake.writes(), 1, "once");

        // What the API server has forgotten is there again, and what it has not is left as it is.
        bed.fake.remove(&format!("{EVENTS}/{}", name(&"uid-web".into(), &web)));
        bed.clock.advance(Duration::from_secs(2));
        bed.events.look(&pods, true).await;
        assert_eq!((bed.event("uid-web", &web).is_some(), bed.fake.writes()), (true, 2));
        bed.clock.advance(ANEW);
        assert_eq!(bed.events.look(&pods, true).await, []);
        assert_eq!(bed.fake.writes(), 2);
    }

    #[tokio::test]
    async fn one_that_was_there_already_and_is_forgotten_is_soon_there_again() {
        let mut bed = Bed::new();
        let web = found("web", "node-a", true);
        let pods = pods(&[("uid-web", web.clone())]);
        bed.look_later(&pods, true).await;
        assert_eq!(bed.fake.writes(), 1);

        // A replica that begins when the Event is old.
        let mut next = Events::new(bed.fake.client(), bed.clock.clone());
        next.look(&pods, true).await;
        bed.clock.advance(STANDS);
        next.look(&pods, true).await;
        assert_eq!(bed.fake.writes(), 1, "it is there");
        bed.fake.remove(&format!("{EVENTS}/{}", name(&"uid-web".into(), &web)));
        bed.clock.advance(THERE);
        next.look(&pods, true).await;
        assert_eq!((bed.event("uid-web", &web).is_some(), bed.fake.writes()), (true, 2));
        // Now it is known how old it is.
        bed.fake.remove(&format!("{EVENTS}/{}", name(&"uid-web".into(), &web)));
        bed.clock.advance(THERE);
        next.look(&pods, true).await;
        assert_eq!(bed.fake.writes(), 2);
    }

    #[tokio::test]
    async fn one_that_is_over_in_time_has_none_and_another_reason_has_its_own() {
        let mut bed = Bed::new();
        let web = found("web", "node-a", true);
        let failing = pods(&[("uid-web", web.clone())]);
        for _ in 0..3 {
            bed.events.look(&failing, true).await;
            bed.clock.advance(STANDS - Duration::from_secs(2));
            bed.events.look(&Uncapturables::new(), true).await;
            assert!(bed.events.pods.is_empty(), "nothing is kept of a pod that is gone");
        }
        assert_eq!(bed.fake.writes(), 0);
        bed.look_later(&failing, true).await;
        let other = Uncapturable { why: "no-proxy", ..web.clone() };
        bed.clock.advance(PAUSE);
        bed.look_later(&pods(&[("uid-web", other.clone())]), true).await;
        // The next pod of that name.
        bed.look_later(&pods(&[("uid-next", other.clone())]), true).await;
        assert!(bed.event("uid-web", &web).is_some() && bed.event("uid-web", &other).is_some());
        assert_eq!((bed.event("uid-next", &other).is_some(), bed.fake.writes()), (true, 3));
    }

    #[tokio::test]
    async fn an_agent_that_goes_from_reason_to_reason_has_one_event_written_of_a_pod_in_a_time() {
        let mut bed = Bed::new();
        let reasons = ["netlink", "socket", "links", "mark", "no-proxy", "resources"];
        let mut all = reasons.iter().map(|why| Uncapturable { why, ..found("web", "node-a", true) });
        let first = pods(&[("uid-web", all.next().unwrap())]);
        bed.look_later(&first, true).await;
        assert_eq!(bed.fake.writes(), 1);
        let mut last = first;
        for other in all {
            // Nothing is said for a moment: what was written is remembered all the same.
            bed.events.look(&Uncapturables::new(), true).await;
            last = pods(&[("uid-web", other)]);
            bed.look_later(&last, true).await;
        }
        assert_eq!(bed.fake.writes(), 1);
        bed.clock.advance(PAUSE);
        bed.events.look(&last, true).await;
        assert_eq!(bed.fake.writes(), 2, "what stays is told");
        bed.clock.advance(PAUSE);
        bed.events.look(&Uncapturables::new(), true).await;
        assert!(bed.events.told.is_empty(), "nothing is kept for longer than it counts");
    }

    #[tokio::test]
    async fn the_leader_writes_what_all_replicas_know_and_each_what_its_agents_found() {
        let fake = Fake::default();
        let clock = Clock::default();
        let [mut one, mut two] = [(); 2].map(|()| Events::new(fake.client(), clock.clone()));
        let (known, said) = (found("db", "node-a", false), found("web", "node-b", true));
        let (at_one, at_two) = (pods(&[("uid-db", known.clone())]), pods(&[("uid-db", known), ("uid-web", said)]));
        for _ in 0..2 {
            one.look(&at_one, false).await;
            two.look(&at_two, false).await;
            clock.advance(STANDS);
        }
        assert_eq!(fake.writes(), 1, "the agent's");
        one.look(&at_one, true).await;
        assert_eq!(fake.writes(), 2);
        // It leads now, and there is nothing to be written that is not there.
        two.look(&at_two, true).await;
        two.look(&at_two, true).await;
        assert_eq!(fake.writes(), 2);
    }

    #[tokio::test]
    async fn a_look_writes_few_and_no_node_keeps_another_from_its_turn() {
        let mut bed = Bed::new();
        let mut all = Uncapturables::new();
        for number in 0..100 {
            let web = found(&format!("web-{number}"), "node-a", true);
            all.insert(PodUid::from(format!("uid-a-{number}").as_str()), web);
        }
        let others: Vec<_> = (0..8).map(|number| format!("node-{number}")).collect();
        for node in &others {
            all.insert(PodUid::from(format!("uid-{node}").as_str()), found(node, node, true));
        }
        bed.look_later(&all, true).await;
        assert_eq!(bed.fake.writes(), OF_A_LOOK);
        bed.events.look(&all, true).await;
        assert_eq!(bed.fake.writes(), 9, "one of each node has had its turn");
        assert!(others.iter().all(|node| bed.event(&format!("uid-{node}"), &found(node, node, true)).is_some()));
        for written in 10..=12 {
            bed.events.look(&all, true).await;
            assert_eq!(bed.fake.writes(), written, "one of a node in a look");
        }
    }

    #[tokio::test]
    async fn what_could_not_be_written_is_a_problem_and_is_tried_again() {
        let mut bed = Bed::new();
        let web = found("web", "node-a", true);
        let pods = pods(&[("uid-web", web.clone())]);
        bed.fake.fail_with(Some(403));
        let problems = bed.look_later(&pods, true).await;
        assert_eq!(problems.len(), 1);
        let problem = problems[0].to_string();
        assert!(problem.contains("Pod shop/web") && problem.contains("it is made to fail"), "{problem}");
        assert_eq!(bed.events.look(&pods, true).await, problems, "it stays until it is done");
        bed.fake.fail_with(None);
        bed.events.look(&pods, true).await;
        assert_eq!(bed.fake.writes(), 0, "not at once");
        bed.clock.advance(AGAIN);
        assert_eq!(bed.events.look(&pods, true).await, []);
        assert!(bed.event("uid-web", &web).is_some());
        bed.fake.fail_with(Some(403));
        bed.clock.advance(ANEW);
        assert_eq!(bed.events.look(&pods, true).await.len(), 1);
        assert_eq!(bed.events.look(&Uncapturables::new(), true).await, [], "it goes with its pod");
    }

    #[tokio::test]
    async fn what_is_not_answered_is_a_problem_the_second_time_in_a_row() {
        let mut bed = Bed::new();
        let pods = pods(&[("uid-web", found("web", "node-a", true))]);
        for code in [429, 500] {
            bed.fake.fail_with(Some(code));
            assert_eq!(bed.look_later(&pods, true).await, [], "an API server may be away for a moment");
            bed.clock.advance(AGAIN);
            assert_eq!(bed.events.look(&pods, true).await.len(), 1);
            bed.clock.advance(AGAIN);
            assert_eq!(bed.events.look(&pods, true).await.len(), 1, "and stays one");
            bed.fake.fail_with(None);
            bed.clock.advance(AGAIN);
            assert_eq!(bed.events.look(&pods, true).await, []);
            bed.clock.advance(ANEW);
        }
        assert_eq!(bed.fake.writes(), 1);
    }

    #[tokio::test]
    async fn who_does_not_lead_any_more_has_no_problem_with_what_the_leader_tells() {
        let mut bed = Bed::new();
        let pods = pods(&[("uid-db", found("db", "node-a", false)), ("uid-web", found("web", "node-b", true))]);
        let of = |problems: Vec<Problem>| problems[0].to_string();
        bed.fake.fail_with(Some(403));
        assert!(of(bed.look_later(&pods, true).await).contains("Pod shop/db"));
        assert!(of(bed.events.look(&pods, false).await).contains("Pod shop/web"), "that is its own");
        let known = self::pods(&[("uid-db", found("db", "node-a", false))]);
        assert_eq!(bed.events.look(&known, true).await.len(), 1);
        assert_eq!(bed.events.look(&known, false).await, []);
    }

    #[tokio::test]
    async fn a_namespace_that_is_going_is_passed_over() {
        let mut bed = Bed::new();
        let pods = pods(&[("uid-web", found("web", "node-a", true))]);
        bed.fake.terminate("shop");
        assert_eq!(bed.look_later(&pods, true).await, []);
        bed.clock.advance(THERE);
        assert_eq!((bed.events.look(&pods, true).await, bed.fake.writes()), (vec![], 0));
    }

    #[test]
    fn a_name_is_one_that_an_object_may_have() {
        let short = name(&"uid-web".into(), &found("web", "node-a", true));
        assert!(short.starts_with("web.") && short.len() == 20, "{short}");
        let long = format!("{}-.{}", "w".repeat(235), "x".repeat(16));
        let long = name(&"uid-web".into(), &found(&long, "node-a", true));
        assert!(long.len() <= MAX_NAME && long.starts_with("www") && !long.contains("-."), "{long}");
    }
}
