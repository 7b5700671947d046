//! The plugin as a runtime runs it, against an agent that says what a test wants.

use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use linux::channel::{Channel, Listener};
use serde_json::json;
use tempfile::TempDir;
use wire::pods::MAX_MESSAGE;

use super::*;

const SHORT: Patience = Patience { there: Duration::from_millis(300), answer: Duration::from_secs(10) };

struct World {
    files: TempDir,
    environment: Vec<(&'static str, String)>,
    config: Value,
}

impl World {
    fn new(command: &str) -> Self {
        let files = tempfile::tempdir().unwrap();
        let arguments = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID=0d2b";
        let environment = vec![
            ("CNI_COMMAND", command.to_owned()),
            ("CNI_CONTAINERID", "3f".into()),
            ("CNI_NETNS", "/proc/thread-self/ns/net".into()),
            ("CNI_IFNAME", "eth0".into()),
            ("CNI_ARGS", arguments.into()),
        ];
        let config = json!({
            "cniVersion": "1.0.0",
            "name": "net",
            "type": "justmtls",
            "socket": files.path().join("cni.sock"),
            "exempt": ["kube-system"],
            "prevResult": { "cniVersion": "1.0.0", "ips": [{ "address": "10.0.0.5/24" }] },
        });
        Self { files, environment, config }
    }

    fn socket(&self) -> PathBuf {
        self.files.path().join("cni.sock")
    }

    fn set(&mut self, name: &'static str, value: &str) {
        self.environment.retain(|(known, _)| *known != name);
        self.environment.push((name, value.into()));
    }

    fn call(&self) -> Result<String, Refusal> {
        let value =
            |name: &str| self.environment.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone());
        answer(value, self.config.to_string().as_bytes(), SHORT)
    }

    fn records(&self) -> Records {
        Records::beside(&self.socket())
    }

    /// An agent that gives these answers, each on a connection of its own; `None` closes it without one.
    fn agent(&self, answers: Vec<Option<CniResult>>) -> JoinHandle<Vec<(CniRequest, usize)>> {
        let listener = Listener::bind(&self.socket(), 0o600).unwrap();
        std::thread::spawn(move || {
            answers.into_iter().map(|answer| serve(&listener.accept().unwrap(), answer)).collect()
        })
    }
}

fn serve(channel: &Channel, answer: Option<CniResult>) -> (CniRequest, usize) {
    let mut buffer = vec![0; MAX_MESSAGE];
    let (length, descriptors) = channel.recv(&mut buffer).unwrap();
    if let Some(answer) = answer {
        channel.send(&answer.encode(), &[]).unwrap();
    }
    let own = NetNs::current().unwrap();
    let namespaces =
        descriptors.into_iter().filter(|it| NetNs::from_fd(it.try_clone().unwrap()).unwrap() == own).count();
    (CniRequest::decode(&buffer[..length]).unwrap(), namespaces)
}

fn added() -> CniAdd {
    CniAdd {
        pod: PodUid::from("0d2b"),
        namespace: "shop".into(),
        name: "web".into(),
        netns: "/proc/thread-self/ns/net".into(),
        container: "3f".into(),
        addresses: vec!["10.0.0.5".parse().unwrap()],
    }
}

#[test]
fn a_captured_pod_gets_what_the_plugin_before_said() {
    let world = World::new("ADD");
    let agent = world.agent(vec![Some(CniResult::Captured)]);
    let result: Value = serde_json::from_str(&world.call().unwrap()).unwrap();
    assert_eq!(result, world.config["prevResult"]);
    // The namespace itself went along: the path is the host's, and says nothing to the agent.
    assert_eq!(agent.join().unwrap(), [(CniRequest::Add(added()), 1)]);
    assert!(world.records().has("3f"));
}

#[test]
fn what_the_agent_says_against_it_ends_in_the_event() {
    let world = World::new("ADD");
    let agent = world.agent(vec![Some(CniResult::Failed("pod shop/web is not captured: no".into()))]);
    let refusal = world.call().unwrap_err();
    assert_eq!((refusal.code, refusal.sentence.as_str()), (NOT_CAPTURED, "pod shop/web is not captured: no"));
    let text: Value = serde_json::from_str(&refusal.to_json()).unwrap();
    assert_eq!(text, json!({ "cniVersion": "1.0.0", "code": 100, "msg": "pod shop/web is not captured: no" }));
    agent.join().unwrap();
}

#[test]
fn without_an_agent_only_exempt_namespaces_and_what_is_no_pod_start() {
    let mut world = World::new("ADD");
    let refusal = world.call().unwrap_err();
    assert_eq!(refusal.code, TRY_AGAIN);
    for part in ["the agent of justmtls on this node does not answer at", "the pod waits"] {
        assert!(refusal.sentence.contains(part), "{}", refusal.sentence);
    }
    world.set("CNI_ARGS", "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=dns;K8S_POD_UID=1");
    assert!(world.call().is_ok());
    world.set("CNI_ARGS", "");
    assert!(world.call().is_ok());
    // Half a pod is no excuse.
    world.set("CNI_ARGS", "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web");
    assert_eq!(world.call().unwrap_err().code, ENVIRONMENT);
}

#[test]
fn an_agent_that_goes_meanwhile_is_asked_again() {
    let world = World::new("ADD");
    let agent = world.agent(vec![None, Some(CniResult::NotCaptured("opted-out".into()))]);
    assert!(world.call().is_ok());
    assert_eq!(agent.join().unwrap().len(), 2);
}

#[test]
fn deleting_never_fails_and_tells_the_agent_which_sandbox() {
    let mut world = World::new("DEL");
    world.records().add("3f").unwrap();
    let agent = world.agent(vec![Some(CniResult::Deleted)]);
    assert_eq!(world.call(), Ok(String::new()));
    let gone = CniRequest::Del { pod: PodUid::from("0d2b"), container: "3f".into() };
    assert_eq!(agent.join().unwrap(), [(gone, 0)]);
    assert!(!world.records().has("3f"));
    std::fs::remove_file(world.socket()).unwrap();
    assert_eq!(world.call(), Ok(String::new()));
    world.config = json!("nothing that a runtime would say");
    assert_eq!(world.call(), Ok(String::new()));
}

#[test]
fn a_check_is_the_agents_word() {
    let world = World::new("CHECK");
    let agent = world.agent(vec![Some(CniResult::Captured), Some(CniResult::Failed("it is not".into()))]);
    assert_eq!(world.call(), Ok(String::new()));
    assert_eq!(world.call().unwrap_err().sentence, "it is not");
    assert_eq!(agent.join().unwrap()[0].0, CniRequest::Check { pod: PodUid::from("0d2b") });
}

#[test]
fn a_collection_forgets_sandboxes_that_the_runtime_does_not_have() {
    let mut world = World::new("GC");
    world.config["cniVersion"] = "1.1.0".into();
    for sandbox in ["3f", "4a"] {
        world.records().add(sandbox).unwrap();
    }
    assert_eq!(world.call(), Ok(String::new()));
    assert!(world.records().has("4a"), "nothing was said of what is there");
    world.config["cni.dev/valid-attachments"] = json!([{ "containerID": "3f", "ifname": "eth0" }]);
    assert_eq!(world.call(), Ok(String::new()));
    assert_eq!([world.records().has("3f"), world.records().has("4a")], [true, false]);
}

#[test]
fn a_node_is_never_unready_for_want_of_the_agent_and_the_versions_are_told() {
    assert_eq!(World::new("STATUS").call(), Ok(String::new()));
    let versions: Value = serde_json::from_str(&World::new("VERSION").call().unwrap()).unwrap();
    let all = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];
    assert_eq!(versions, json!({ "cniVersion": "1.0.0", "supportedVersions": all }));
}

#[test]
fn what_is_not_understood_is_refused_with_the_code_of_the_specification() {
    let code = |change: &dyn Fn(&mut World)| {
        let mut world = World::new("ADD");
        change(&mut world);
        world.call().unwrap_err().code
    };
    assert_eq!(code(&|world| world.config["cniVersion"] = "0.2.0".into()), INCOMPATIBLE);
    assert_eq!(code(&|world| world.config["prevResult"] = Value::Null), CONFIGURATION);
    assert_eq!(code(&|world| world.config = json!([])), UNDECODABLE);
    assert_eq!(code(&|world| world.set("CNI_COMMAND", "MAKE")), ENVIRONMENT);
    assert_eq!(code(&|world| world.set("CNI_CONTAINERID", "")), ENVIRONMENT);
    assert_eq!(code(&|world| world.set("CNI_CONTAINERID", "../x")), TRY_AGAIN);
    assert_eq!(code(&|world| world.set("CNI_NETNS", "/nonexistent")), ENVIRONMENT);
    let endless = std::io::repeat(b' ');
    let refusal = answer(|_| Some("ADD".into()), endless, SHORT).unwrap_err();
    assert_eq!(refusal.code, CONFIGURATION);
}
