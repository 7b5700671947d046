//! The product on a cluster: installed, looked at, and its processes.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{Kubernetes, SOON, is_given};
use crate::program::Program;
use crate::view::text;
use crate::wait::wait_until;

/// What others on a given cluster have open holds the end of a test for as long, and by default that is half an hour.
const DRAIN_WHERE_GIVEN: &str = "drain=15";
/// The namespace of the product.
pub(crate) const OURS: &str = "justmtls-system";

impl Kubernetes {
    /// Installs the product with its settings (`key=value`), and waits until every node is ready.
    #[track_caller]
    pub fn install(&self, settings: &[&str]) -> String {
        let image = format!("image={}", self.image);
        // What comes later has the last word.
        let before = if is_given() { vec![&image[..], DRAIN_WHERE_GIVEN] } else { vec![&image[..]] };
        let all = before.into_iter().chain(settings.iter().copied());
        let all = all.flat_map(|setting| ["--set", setting]);
        self.justmtls(&["install"]).args(all).within(SOON * 2).run().ok()
    }

    /// Gives the product's image another name on all nodes, which is returned; the nodes of a given cluster keep the one they
    /// have.
    #[track_caller]
    pub fn same_image_as(&self, name: &str) -> String {
        if is_given() {
            return self.image.clone();
        }
        for node in self.nodes() {
            self.on_node(&node, &["ctr", "--namespace", "k8s.io", "images", "tag", &self.image, name]).run().ok();
        }
        name.to_owned()
    }

    /// The images that the product's pods run on.
    #[track_caller]
    pub fn images_of_ours(&self) -> BTreeSet<String> {
        let pods = self.get(&["-n", OURS, "pods"]);
        let pods = pods["items"].as_array().into_iter().flatten();
        pods.flat_map(|pod| pod["spec"]["containers"].as_array().into_iter().flatten())
            .map(|container| text(container, "image").to_owned())
            .collect()
    }

    /// Which pods of the product there are, each by what no other one ever has.
    #[track_caller]
    pub fn pods_of_ours(&self) -> BTreeSet<String> {
        let pods = self.get(&["-n", OURS, "pods"]);
        let pods = pods["items"].as_array().into_iter().flatten();
        pods.map(|pod| text(&pod["metadata"], "uid").to_owned()).collect()
    }

    /// The control plane's replicas.
    #[track_caller]
    fn replicas(&self) -> Vec<Value> {
        let pods = self.get(&["-n", OURS, "pods", "-l", "app.kubernetes.io/name=justmtls-control"]);
        pods["items"].as_array().expect("pods").clone()
    }

    /// The nodes of the control plane's replicas.
    #[track_caller]
    pub fn nodes_of_control(&self) -> BTreeSet<String> {
        self.replicas().iter().map(|pod| text(&pod["spec"], "nodeName").to_owned()).collect()
    }

    /// What the control planes have counted in `justmtls_control_METRIC_total` by this outcome.
    #[track_caller]
    pub fn control_counts(&self, metric: &str, outcome: &str) -> u64 {
        let (name, wanted) = (format!("justmtls_control_{metric}_total"), format!("outcome=\"{outcome}\""));
        let of = |pod: &Value| {
            let (_forward, here) = self.forward(&format!("{OURS}/{}", text(&pod["metadata"], "name")), 15014);
            let url = format!("http://{here}/metrics");
            let page = Program::new("curl").args(["-sS", "--max-time", "5", &url]).run().ok();
            let lines = page.lines().filter(|line| line.starts_with(&name) && line.contains(&wanted));
            lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum::<u64>()
        };
        self.replicas().iter().map(of).sum()
    }

    /// What a verb says with `--json`.
    #[track_caller]
    pub fn says(&self, verb: &[&str]) -> Value {
        let said = self.justmtls(verb).args(["--json"]).run();
        serde_json::from_str(&said.stdout).unwrap_or_else(|error| panic!("{error}: {said}"))
    }

    /// How far the capture of a pod is, as its node's kernel says; else what is shown of all pods.
    #[track_caller]
    pub fn capture(&self, pod: &str) -> Result<String, String> {
        let status = self.says(&["status"]);
        let mut pods = status["pods"].as_array().into_iter().flatten();
        let named = |it: &&Value| format!("{}/{}", text(it, "namespace"), text(it, "name")) == pod;
        pods.find(named).map(|it| text(it, "capture").to_owned()).ok_or_else(|| status.to_string())
    }

    /// Waits until the pod is captured, as its node's kernel says.
    #[track_caller]
    pub fn wait_captured(&self, pod: &str) {
        wait_until(&format!("{pod} to be captured"), SOON, || match self.capture(pod) {
            Ok(state) if state == "captured" => Ok(()),
            other => Err(format!("{other:?}")),
        });
    }

    /// How many lines of the control planes' logs have all of these words.
    #[track_caller]
    pub fn control_logged(&self, words: &[&str]) -> usize {
        let log = self.control_log();
        log.lines().filter(|line| words.iter().all(|word| line.contains(word))).count()
    }

    /// What the control planes have logged.
    #[track_caller]
    pub fn control_log(&self) -> String {
        let pods = ["-l", "app.kubernetes.io/name=justmtls-control", "--tail=-1"];
        self.kubectl(&["-n", OURS, "logs"]).args(pods).run().ok()
    }

    /// Whether `coverage` shows an edge that passes so, and for that reason where one is named; else what it shows of the two.
    #[track_caller]
    pub fn edge(&self, from: &str, to: &str, security: &str, reason: Option<&str>) -> Result<(), String> {
        let coverage = self.says(&["coverage"]);
        let all = coverage["edges"].as_array().expect("edges are a list").iter();
        let edges: Vec<_> = all.filter(|edge| edge["source"] == from && edge["destination"] == to).collect();
        let is_so =
            |edge: &&Value| edge["security"] == security && reason.is_none_or(|reason| edge["reason"] == reason);
        if edges.iter().any(is_so) { Ok(()) } else { Err(format!("{edges:?}")) }
    }

    /// The pods of the nodes' part that are not being deleted.
    #[track_caller]
    pub fn pods_of_nodes(&self) -> Vec<String> {
        self.staying(&[])
    }

    /// The same, of those that are selected by more, too.
    #[track_caller]
    fn staying(&self, more: &[&str]) -> Vec<String> {
        let pods = self.get(&[&["-n", OURS, "pods", "-l", "app.kubernetes.io/name=justmtls-node"], more].concat());
        let all = pods["items"].as_array().into_iter().flatten();
        let staying = all.filter(|pod| pod["metadata"].get("deletionTimestamp").is_none());
        staying.map(|pod| text(&pod["metadata"], "name").to_owned()).collect()
    }

    /// A page of the agent in this pod; empty where there is no answer.
    #[track_caller]
    pub fn agent_page(&self, pod: &str, page: &str) -> String {
        let socket = format!("/run/justmtls/agent/{pod}.sock");
        let ask = ["-n", OURS, "exec", pod, "-c", "agent", "--", "/justmtls", "admin", &socket, page];
        self.kubectl(&ask).run().stdout
    }

    /// The pod whose agent has given its place to another one and waits whether that stays.
    ///
    /// # Errors
    /// There is none; what each says.
    #[track_caller]
    pub fn standing_by(&self) -> Result<String, String> {
        let mut said = Vec::new();
        for pod in self.pods_of_nodes() {
            let answer = self.agent_page(&pod, "/version");
            match serde_json::from_str::<Value>(&answer) {
                Ok(page) if page["stands_by"] == true => return Ok(pod),
                _ => said.push(format!("{pod}: {answer}")),
            }
        }
        Err(said.join(", "))
    }

    /// How many connections have ended on the edges between the two that passed so.
    #[track_caller]
    pub fn ended(&self, from: &str, to: &str, security: &str) -> u64 {
        let coverage = self.says(&["coverage"]);
        let all = coverage["edges"].as_array().expect("edges are a list").iter();
        let edges = all.filter(|edge| edge["source"] == from && edge["destination"] == to);
        edges.filter(|edge| edge["security"] == security).filter_map(|edge| edge["ended"].as_u64()).sum()
    }

    /// The product's pods of a node's part, by the name of the node.
    #[track_caller]
    pub fn node_pod(&self, node: &str) -> String {
        let on = format!("spec.nodeName={node},status.phase=Running");
        let names = self.staying(&["--field-selector", &on]);
        assert_eq!(names.len(), 1, "{names:?} on {node}");
        names[0].clone()
    }
}
