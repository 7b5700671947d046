//! What the container runtime runs for each pod, last in the node's CNI chain (CNI 0.3.1 to 1.1): it asks the agent to
//! capture the pod, and the pod's programs start when it has its answer.
//!
//! It fails closed: without an answer the sandbox fails, with a sentence that ends in the pod's event, and kubelet tries
//! again. Only pods of the namespaces that its configuration exempts start without the agent, as ours is one of them.
//! Deleting never fails, and no node is ever told to be unready: one that is starts no pod, the agent's own neither.

mod ask;
pub(crate) mod conflist;
pub(crate) mod place;
pub(crate) mod records;

#[cfg(test)]
mod tests;

use std::io::{Read, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use linux::netns::NetNs;
use mesh::PodUid;
use serde::Deserialize;
use serde_json::{Value, json};
use wire::pods::{CniAdd, CniRequest, CniResult};

pub use ask::Patience;
use records::Records;

/// The plugin's `type`, and the name of its file.
pub(crate) const NAME: &str = "justmtls";
/// The versions of the protocol that are spoken, oldest first.
const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// The most of a configuration that is read, in bytes.
const LARGEST: u64 = 4 * 1024 * 1024;

/// Error codes of the CNI specification.
const INCOMPATIBLE: u32 = 1;
const ENVIRONMENT: u32 = 4;
const UNREADABLE: u32 = 5;
const UNDECODABLE: u32 = 6;
const CONFIGURATION: u32 = 7;
const TRY_AGAIN: u32 = 11;
/// The first that is the plugin's own: the agent refuses.
const NOT_CAPTURED: u32 = 100;

/// Answers the runtime as its environment and standard input say, and returns the exit status.
pub fn run() -> i32 {
    let answer = answer(|name| std::env::var(name).ok(), std::io::stdin().lock(), Patience::default());
    let (text, status) = match answer {
        Ok(text) => (text, 0),
        Err(refusal) => (refusal.to_json(), 1),
    };
    // Where nobody reads it the status still tells.
    let _ = std::io::stdout().write_all(text.as_bytes());
    status
}

/// Why the runtime is refused: the specification's error.
#[derive(Debug, PartialEq, Eq)]
struct Refusal {
    code: u32,
    sentence: String,
    version: String,
}

impl Refusal {
    fn new(code: u32, sentence: impl Into<String>) -> Self {
        Self { code, sentence: sentence.into(), version: "1.1.0".into() }
    }

    fn to_json(&self) -> String {
        json!({ "cniVersion": self.version, "code": self.code, "msg": self.sentence }).to_string()
    }
}

/// What the runtime gives on standard input: our entry of the conflist, with what the runtime adds to it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    #[serde(default)]
    cni_version: String,
    #[serde(default)]
    socket: PathBuf,
    #[serde(default)]
    exempt: Vec<String>,
    prev_result: Option<Value>,
    /// What is still there, for GC.
    #[serde(rename = "cni.dev/valid-attachments")]
    valid: Option<Vec<Attachment>>,
}

#[derive(Debug, Deserialize)]
struct Attachment {
    #[serde(rename = "containerID")]
    container: String,
}

/// The pod that a call is about, by `CNI_ARGS`.
#[derive(Debug, Default)]
struct Pod {
    uid: String,
    namespace: String,
    name: String,
}

impl Pod {
    fn of(arguments: &str) -> Self {
        let mut pod = Self::default();
        for (key, value) in arguments.split(';').filter_map(|pair| pair.split_once('=')) {
            match key {
                "K8S_POD_UID" => pod.uid = value.to_owned(),
                "K8S_POD_NAMESPACE" => pod.namespace = value.to_owned(),
                "K8S_POD_NAME" => pod.name = value.to_owned(),
                _ => {}
            }
        }
        pod
    }

    /// Something that is no pod of Kubernetes has none of the three, and is not ours to capture.
    fn is_none(&self) -> bool {
        self.uid.is_empty() && self.namespace.is_empty() && self.name.is_empty()
    }
}

/// The addresses that the plugins before gave the pod, by their result; what is none is left out, and the agent looks whether
/// the namespace has those that it hears of.
fn addresses_in(result: &Value) -> Vec<IpAddr> {
    let all = result["ips"].as_array().into_iter().flatten();
    let texts = all.filter_map(|ip| ip["address"].as_str());
    texts.filter_map(|text| text.split('/').next()?.parse().ok()).collect()
}

fn answer(
    environment: impl Fn(&str) -> Option<String>,
    input: impl Read,
    patience: Patience,
) -> Result<String, Refusal> {
    let command = environment("CNI_COMMAND").unwrap_or_default();
    // Whatever it is about: what is to go, goes.
    let deletes = ["DEL", "GC"].contains(&command.as_str());
    let config = match read(input) {
        Ok(config) => config,
        Err(_) if deletes => return Ok(String::new()),
        Err(refusal) => return Err(refusal),
    };
    let version =
        if VERSIONS.contains(&config.cni_version.as_str()) { config.cni_version.clone() } else { "1.1.0".into() };
    let call = Call { config: &config, patience, environment };
    let answered = match command.as_str() {
        "ADD" => call.add(),
        "CHECK" => call.check(),
        "DEL" => Ok(call.delete()),
        "GC" => Ok(call.collect()),
        "STATUS" => Ok(String::new()),
        "VERSION" => Ok(json!({ "cniVersion": version, "supportedVersions": VERSIONS }).to_string()),
        other => Err(Refusal::new(
            ENVIRONMENT,
            format!(
                "CNI_COMMAND is {other:?}; it is ADD, CHECK, DEL, GC, STATUS or VERSION, and a container runtime sets it"
            ),
        )),
    };
    answered.map_err(|refusal| Refusal { version, ..refusal })
}

fn read(input: impl Read) -> Result<Config, Refusal> {
    let mut text = String::new();
    let read = input.take(LARGEST + 1).read_to_string(&mut text);
    read.map_err(|error| Refusal::new(UNREADABLE, format!("the configuration cannot be read: {error}")))?;
    if text.len() as u64 > LARGEST {
        return Err(Refusal::new(CONFIGURATION, format!("the configuration is longer than {LARGEST} bytes")));
    }
    serde_json::from_str(&text)
        .map_err(|error| Refusal::new(UNDECODABLE, format!("the configuration is not what a runtime gives: {error}")))
}

struct Call<'a, E> {
    config: &'a Config,
    patience: Patience,
    environment: E,
}

impl<E: Fn(&str) -> Option<String>> Call<'_, E> {
    /// The pod's network is there, and its programs wait.
    fn add(&self) -> Result<String, Refusal> {
        let version = self.version()?;
        let Some(before) = &self.config.prev_result else {
            let sentence =
                "justmtls makes no network and needs a plugin before it in the chain (prevResult is missing)";
            return Err(Refusal::new(CONFIGURATION, sentence));
        };
        let mut result = before.clone();
        if let Some(fields) = result.as_object_mut() {
            fields.insert("cniVersion".into(), version.into());
        }
        let result = result.to_string();
        let pod = self.pod();
        if pod.is_none() {
            return Ok(result);
        }
        let container = self.variable("CNI_CONTAINERID")?;
        // Before anything else: a sandbox without a record is one that nobody asked us about (T9).
        if let Err(error) = self.records().add(&container) {
            let sentence = format!("cannot note the sandbox beside {}: {error}", self.config.socket.display());
            return Err(Refusal::new(TRY_AGAIN, sentence));
        }
        let exempt = self.is_exempt(&pod);
        match self.capture(&pod, container) {
            Ok(()) => Ok(result),
            // The agent finds it when it is there, and captures it then if that is what its namespace wants.
            Err(_) if exempt => Ok(result),
            Err(refusal) => Err(refusal),
        }
    }

    fn capture(&self, pod: &Pod, container: String) -> Result<(), Refusal> {
        for (value, name) in [(&pod.uid, "UID"), (&pod.namespace, "NAMESPACE"), (&pod.name, "NAME")] {
            if value.is_empty() {
                let sentence =
                    format!("CNI_ARGS has no K8S_POD_{name}; justmtls needs containerd 1.6, CRI-O 1.22 or later");
                return Err(Refusal::new(ENVIRONMENT, sentence));
            }
        }
        let netns: PathBuf = self.variable("CNI_NETNS")?.into();
        // Opened here, on the host, as the agent sees other paths.
        let namespace = NetNs::open(&netns).map_err(|error| Refusal::new(ENVIRONMENT, error.to_string()))?;
        let (uid, namespace_name, name) = (PodUid::from(pod.uid.as_str()), pod.namespace.clone(), pod.name.clone());
        let addresses = self.config.prev_result.as_ref().map_or_else(Vec::new, addresses_in);
        let add = CniAdd { pod: uid, namespace: namespace_name, name, netns, container, addresses };
        let patience = if self.is_exempt(pod) { self.patience.brief() } else { self.patience };
        self.asked(&CniRequest::Add(add), Some(&namespace), patience)
    }

    /// Is the pod as it was made?
    fn check(&self) -> Result<String, Refusal> {
        self.version()?;
        let pod = self.pod();
        if pod.uid.is_empty() || self.is_exempt(&pod) {
            return Ok(String::new());
        }
        let check = CniRequest::Check { pod: PodUid::from(pod.uid.as_str()) };
        self.asked(&check, None, self.patience).map(|()| String::new())
    }

    /// The agent's answer: whether the pod may go on.
    fn asked(&self, request: &CniRequest, namespace: Option<&NetNs>, patience: Patience) -> Result<(), Refusal> {
        match ask::ask(&self.config.socket, request, namespace, patience) {
            Ok(CniResult::Captured | CniResult::NotCaptured(_)) => Ok(()),
            Ok(CniResult::Failed(sentence)) => Err(Refusal::new(NOT_CAPTURED, sentence)),
            Ok(CniResult::Deleted) => Err(Refusal::new(NOT_CAPTURED, "the agent answered another question")),
            Err(because) => Err(self.nobody(&because)),
        }
    }

    /// The pod's network goes when this has returned, so the agent is told first. One that is not there finds out by itself.
    fn delete(&self) -> String {
        let container = (self.environment)("CNI_CONTAINERID").unwrap_or_default();
        let pod = self.pod();
        if !pod.uid.is_empty() {
            let gone = CniRequest::Del { pod: PodUid::from(pod.uid.as_str()), container: container.clone() };
            let _ = ask::ask(&self.config.socket, &gone, None, self.patience.brief());
        }
        let _ = self.records().remove(&container);
        String::new()
    }

    /// What the runtime does not have any more needs no record. Pods that are gone the agent finds by itself.
    fn collect(&self) -> String {
        if let Some(valid) = &self.config.valid {
            let valid: Vec<_> = valid.iter().map(|attachment| attachment.container.as_str()).collect();
            let _ = self.records().keep_only(&valid);
        }
        String::new()
    }

    fn version(&self) -> Result<&str, Refusal> {
        let version = self.config.cni_version.as_str();
        let refused = || {
            let sentence = format!("the CNI version is {version:?}; justmtls speaks {}", VERSIONS.join(", "));
            Refusal::new(INCOMPATIBLE, sentence)
        };
        VERSIONS.contains(&version).then_some(version).ok_or_else(refused)
    }

    fn pod(&self) -> Pod {
        Pod::of(&(self.environment)("CNI_ARGS").unwrap_or_default())
    }

    fn is_exempt(&self, pod: &Pod) -> bool {
        !pod.namespace.is_empty() && self.config.exempt.contains(&pod.namespace)
    }

    fn variable(&self, name: &str) -> Result<String, Refusal> {
        let value = (self.environment)(name).filter(|value| !value.is_empty());
        value.ok_or_else(|| Refusal::new(ENVIRONMENT, format!("{name} is not set; a container runtime sets it")))
    }

    fn records(&self) -> Records {
        Records::beside(&self.config.socket)
    }

    fn nobody(&self, because: &str) -> Refusal {
        let socket: &Path = &self.config.socket;
        Refusal::new(
            TRY_AGAIN,
            format!(
                "the agent of justmtls on this node does not answer at {} ({because}); the pod waits: look at the pod \
                 justmtls-node of this node in justmtls-system",
                socket.display()
            ),
        )
    }
}
