//! Why something does not get ready: from pods and events to sentences with what to do. Pure.

use k8s_openapi::api::core::v1::{ContainerStatus, Event, Pod};

use crate::objects::{CONTROL, NAMESPACE};
use crate::table::printable;

/// What holds one pod, or one workload, up.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Hang {
    /// Who: a pod and its node, or a workload.
    pub(crate) who: String,
    /// A stable word for it.
    pub(crate) kind: &'static str,
    /// What is wrong.
    pub(crate) what: String,
    /// What to do.
    pub(crate) hint: &'static str,
    /// The container whose log would say more: pod, container, and whether it is the one before.
    pub(crate) log: Option<(String, String, bool)>,
}

/// What holds a workload up, by its pods and by the events of the namespace.
pub(crate) fn hangs(workload: &str, pods: &[Pod], events: &[Event]) -> Vec<Hang> {
    let mut found: Vec<_> = pods.iter().filter_map(|pod| of_pod(workload, pod, events)).collect();
    found.extend(refused(workload, events));
    found.sort();
    found
}

/// What keeps pods from ending, as their nodes' kubelets say.
pub(crate) fn endings(pods: &[Pod], events: &[Event]) -> Vec<String> {
    let of_pod = |pod: &Pod| {
        pod.metadata.deletion_timestamp.as_ref()?;
        let (name, node) = (pod.metadata.name.as_deref()?, pod.spec.as_ref()?.node_name.as_deref()?);
        let is_why = |event: &&Event| {
            event.involved_object.name.as_deref() == Some(name) && event.reason.as_deref() == Some("FailedKillPod")
        };
        let event = latest(events.iter().filter(is_why))?;
        Some(format!("{name} on {node}: {}", printable(event.message.as_deref()?)))
    };
    pods.iter().filter_map(of_pod).collect()
}

/// Pods that the API server refuses to make.
fn refused(workload: &str, events: &[Event]) -> Option<Hang> {
    let of_workload = |event: &&Event| {
        let name = event.involved_object.name.as_deref().unwrap_or_default();
        event.reason.as_deref() == Some("FailedCreate")
            && (name == workload || name.strip_prefix(workload).is_some_and(|rest| rest.starts_with('-')))
    };
    let event = latest(events.iter().filter(of_workload))?;
    let message = event.message.as_deref().unwrap_or_default();
    let (kind, hint) = if message.contains("PodSecurity") {
        (
            "pod-security",
            "the namespace must have the label pod-security.kubernetes.io/enforce: privileged; look who takes it away",
        )
    } else if message.contains("quota") || message.contains("priority class") {
        ("quota", "critical pods need a ResourceQuota here: --set criticalPodsQuota=true")
    } else {
        ("pods-refused", "look at that webhook, quota or policy of the cluster")
    };
    Some(Hang { who: workload.to_owned(), kind, what: printable(message), hint, log: None })
}

fn of_pod(workload: &str, pod: &Pod, events: &[Event]) -> Option<Hang> {
    let name = pod.metadata.name.clone().unwrap_or_default();
    let spec = pod.spec.as_ref()?;
    let status = pod.status.as_ref()?;
    // One that ends holds nobody up.
    if pod.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let node = spec.node_name.as_deref();
    let who = node.map_or_else(|| name.clone(), |node| format!("{name} on {node}"));
    let hang = |kind, what: &str, hint, log| Some(Hang { who: who.clone(), kind, what: printable(what), hint, log });
    let condition = |kind: &str| {
        let conditions = status.conditions.iter().flatten();
        conditions.clone().find(|condition| condition.type_ == kind)
    };
    if condition("Ready").is_some_and(|condition| condition.status == "True") {
        return None;
    }
    if let Some(unscheduled) = condition("PodScheduled").filter(|condition| condition.status == "False") {
        let why = unscheduled.message.as_deref().unwrap_or("no node takes it");
        let hint = if workload == CONTROL {
            "its replicas are spread over the nodes: make room on one that has none of them, have fewer by --set replicas=1, or ask for \
             less by --set resources.control.…"
        } else {
            "make room on a node, or ask for less by --set resources.…"
        };
        return hang("unschedulable", why, hint, None);
    }
    let of_pod = |event: &&Event, reason: &str| {
        event.involved_object.name.as_deref() == Some(&name) && event.reason.as_deref() == Some(reason)
    };
    let waiting: Vec<_> = status.container_statuses.iter().flatten().filter(|it| !it.ready).collect();
    for container in &waiting {
        let log = |previous| Some((name.clone(), container.name.clone(), previous));
        let state = container.state.as_ref();
        if let Some(wait) = state.and_then(|state| state.waiting.as_ref()) {
            let message = wait.message.as_deref().unwrap_or_default();
            match wait.reason.as_deref().unwrap_or_default() {
                reason @ ("ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "RegistryUnavailable") => {
                    let what = format!("the image {} cannot be pulled ({reason}): {message}", container.image);
                    return hang(
                        "image",
                        &what,
                        "check the name and the registry, or name another one by --set image=…",
                        None,
                    );
                }
                "ErrImageNeverPull" => {
                    let what = format!("the image {} is not on the node, and is never pulled", container.image);
                    return hang("image", &what, "load it onto the node, or --set imagePullPolicy=IfNotPresent", None);
                }
                "CrashLoopBackOff" => {
                    let what = format!("the container {} ends again and again{}", container.name, last_exit(container));
                    return hang("crash", &what, "its last line says why", log(true));
                }
                reason @ ("CreateContainerConfigError" | "CreateContainerError" | "RunContainerError") => {
                    let what = format!("the container {} cannot be made ({reason}): {message}", container.name);
                    return hang("container", &what, "look at the node's kubelet and container runtime", None);
                }
                _ => {}
            }
        }
    }
    if let Some(event) = latest(events.iter().filter(|event| of_pod(event, "FailedMount"))) {
        let message = event.message.as_deref().unwrap_or_default();
        let (kind, hint) = if message.contains("hostPath type check failed") {
            (
                "directory",
                "the node keeps it elsewhere: run `justmtls uninstall`, and name it by --set cni.binDir=…, cni.confDir=… or cri.socket=…",
            )
        } else if message.contains(crate::objects::TRUST_BUNDLE) {
            ("trust-bundle", "the control plane has not published the roots yet: look at it first")
        } else {
            ("mount", "look at the node's kubelet")
        };
        return hang(kind, message, hint, None);
    }
    if let Some(event) = latest(events.iter().filter(|event| of_pod(event, "FailedCreatePodSandBox"))) {
        let message = event.message.as_deref().unwrap_or_default();
        return hang("sandbox", message, "look at the node's container runtime and CNI plugins", None);
    }
    let Some(container) = waiting.first() else {
        let (what, hint) = match node {
            None => ("no node was chosen for it yet", "look at the scheduler, or make room on a node"),
            Some(_) => ("its node's kubelet has said nothing of it yet", "look at whether that node is up"),
        };
        return hang("not-begun", what, hint, None);
    };
    let running = container.state.as_ref().is_some_and(|state| state.running.is_some());
    let what = match running {
        true => format!("the container {} runs and is not ready yet", container.name),
        false => format!("the container {} has not started yet", container.name),
    };
    let log = running.then(|| (name.clone(), container.name.clone(), false));
    hang("not-ready", &what, "its log may say why", log)
}

fn last_exit(container: &ContainerStatus) -> String {
    let ended = container.last_state.as_ref().and_then(|state| state.terminated.as_ref());
    ended.map_or_else(String::new, |ended| match ended.reason.as_deref() {
        Some("OOMKilled") => ", for want of memory".to_owned(),
        _ => format!(", with status {}", ended.exit_code),
    })
}

fn latest<'a>(events: impl Iterator<Item = &'a Event>) -> Option<&'a Event> {
    events.max_by_key(|event| {
        let series = event.series.as_ref().and_then(|series| series.last_observed_time.as_ref()).map(|time| time.0);
        let seen = event.last_timestamp.as_ref().map(|time| time.0);
        series.or(seen).or_else(|| event.event_time.as_ref().map(|time| time.0))
    })
}

/// The line of a log that says why: the last one that is an error, or else a warning, or the last one.
pub(crate) fn telling_line(log: &str) -> Option<String> {
    let lines: Vec<_> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    let last_of = |words: &[&str]| lines.iter().rev().find(|line| words.iter().any(|word| line.contains(word)));
    let worst = last_of(&["ERROR", "error"]).or_else(|| last_of(&["WARN"]));
    worst.or(lines.last()).map(|line| printable(line).chars().take(400).collect())
}

/// Where the last lines of a container's log are.
pub(crate) fn log_path(pod: &str, container: &str, previous: bool) -> String {
    format!(
        "/api/v1/namespaces/{NAMESPACE}/pods/{pod}/log?container={container}&previous={previous}&tailLines=20&limitBytes=65536"
    )
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(status: Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": { "name": "justmtls-node-x" },
            "spec": { "nodeName": "a", "containers": [] },
            "status": status,
        }))
        .unwrap()
    }

    fn waiting(reason: &str) -> Pod {
        pod(json!({ "containerStatuses": [{
            "name": "agent", "image": "x:1", "imageID": "", "ready": false, "restartCount": 3,
            "state": { "waiting": { "reason": reason, "message": "because" } },
            "lastState": { "terminated": { "exitCode": 2 } },
        }] }))
    }

    fn event(object: &str, reason: &str, message: &str, at: &str) -> Event {
        serde_json::from_value(json!({
            "metadata": {}, "involvedObject": { "name": object }, "reason": reason, "message": message, "lastTimestamp": at,
        }))
        .unwrap()
    }

    fn kind(pods: &[Pod], events: &[Event]) -> &'static str {
        match &hangs("justmtls-node", pods, events)[..] {
            [hang] => hang.kind,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_keeps_a_pod_from_ending_is_told_of_pods_that_are_to_end() {
        let kill = |message: &str| event("justmtls-node-x", "FailedKillPod", message, "2026-01-01T00:00:00Z");
        let (stays, mut ends) = (pod(json!({})), pod(json!({})));
        ends.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
        assert_eq!(endings(&[stays], &[kill("no plugin")]), Vec::<String>::new());
        assert_eq!(endings(std::slice::from_ref(&ends), &[]), Vec::<String>::new());
        assert_eq!(endings(&[ends], &[kill("no plugin")]), ["justmtls-node-x on a: no plugin"]);
    }

    #[test]
    fn each_way_to_hang_is_told() {
        assert_eq!(kind(&[waiting("ImagePullBackOff")], &[]), "image");
        assert_eq!(kind(&[waiting("ErrImageNeverPull")], &[]), "image");
        assert_eq!(kind(&[waiting("CrashLoopBackOff")], &[]), "crash");
        assert_eq!(kind(&[waiting("CreateContainerError")], &[]), "container");
        assert_eq!(kind(&[waiting("ContainerCreating")], &[]), "not-ready");
        let mount = |message: &str| event("justmtls-node-x", "FailedMount", message, "2026-01-01T00:00:00Z");
        let creating = [waiting("ContainerCreating")];
        assert_eq!(
            kind(&creating, &[mount("hostPath type check failed: /opt/cni/bin is not a directory")]),
            "directory"
        );
        assert_eq!(kind(&creating, &[mount("configmap \"justmtls-trust-bundle\" not found")]), "trust-bundle");
        assert_eq!(kind(&creating, &[mount("something else")]), "mount");
        let sandbox = event("justmtls-node-x", "FailedCreatePodSandBox", "no network", "2026-01-01T00:00:00Z");
        assert_eq!(kind(&creating, &[sandbox]), "sandbox");
        let unscheduled =
            pod(json!({ "conditions": [{ "type": "PodScheduled", "status": "False", "message": "0/2 nodes" }] }));
        let [of_control] = &hangs(CONTROL, std::slice::from_ref(&unscheduled), &[])[..] else { panic!("one") };
        assert!(of_control.kind == "unschedulable" && of_control.hint.contains("--set replicas=1"), "{of_control:?}");
        assert_eq!(kind(&[unscheduled], &[]), "unschedulable");
        let refused = |message: &str| event("justmtls-node-abc", "FailedCreate", message, "2026-01-01T00:00:00Z");
        assert_eq!(kind(&[], &[refused("pods \"x\" is forbidden: violates PodSecurity \"baseline\"")]), "pod-security");
        assert_eq!(kind(&[], &[refused("insufficient quota to match these scopes")]), "quota");
        assert_eq!(kind(&[], &[refused("denied the request")]), "pods-refused");
    }

    #[test]
    fn who_is_ready_or_ends_holds_nobody_up() {
        let ready = pod(json!({ "conditions": [{ "type": "Ready", "status": "True" }] }));
        let mut ending = waiting("CrashLoopBackOff");
        ending.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
        let other = event("other", "FailedCreate", "x", "2026-01-01T00:00:00Z");
        assert_eq!(hangs("justmtls-node", &[ready, ending], &[other]), []);
    }

    #[test]
    fn the_last_event_counts_and_the_hint_says_what_to_do() {
        let old = event("justmtls-node-x", "FailedMount", "old", "2026-01-01T00:00:00Z");
        let new = event("justmtls-node-x", "FailedMount", "hostPath type check failed: /x", "2026-01-02T00:00:00Z");
        let [hang] = &hangs("justmtls-node", &[waiting("ContainerCreating")], &[new, old])[..] else { panic!("one") };
        assert!(hang.what.contains("/x") && hang.hint.contains("--set cni.binDir"));
        assert_eq!(hang.who, "justmtls-node-x on a");
        let [crash] = &hangs("justmtls-node", &[waiting("CrashLoopBackOff")], &[])[..] else { panic!("one") };
        assert!(crash.what.contains("with status 2"));
        assert_eq!(crash.log, Some(("justmtls-node-x".to_owned(), "agent".to_owned(), true)));
    }

    #[test]
    fn the_line_that_says_why_is_the_last_error_or_else_a_warning() {
        assert_eq!(telling_line("WARN a\nerror: b\nWARN c\nd").as_deref(), Some("error: b"));
        assert_eq!(telling_line("WARN a\nWARN b\nINFO c").as_deref(), Some("WARN b"));
        assert_eq!(telling_line("a\nerror: b\nc\n\n").as_deref(), Some("error: b"));
        assert_eq!(telling_line("a\nb\n").as_deref(), Some("b"));
        assert_eq!(telling_line("\n"), None);
    }
}
