//! The product on a cluster: installed, looked at, and its processes.

use serde_json::Value;

use super::{Kubernetes, SOON};
use crate::view::text;
use crate::wait::wait_until;

/// The namespace of the product.
pub(crate) const OURS: &str = "justmtls-system";

/// A row of `justmtls coverage --json`.
pub type Edge = Value;

impl Kubernetes {
    /// Installs the product with its settings (`key=value`), and waits until every node is ready.
    #[track_caller]
    pub fn install(&self, settings: &[&str]) -> String {
        let image = format!("image={}", self.image);
        let all = std::iter::once(image.as_str()).chain(settings.iter().copied());
        let all = all.flat_map(|setting| ["--set", setting]);
        self.justmtls(&["install"]).args(all).within(SOON * 2).run().ok()
    }

    /// What a verb says with `--json`.
    #[track_caller]
    pub fn says(&self, verb: &[&str]) -> Value {
        let said = self.justmtls(verb).args(["--json"]).run();
        serde_json::from_str(&said.stdout).unwrap_or_else(|error| panic!("{error}: {said}"))
    }

    /// Waits until the pod is captured, as its node's kernel says.
    #[track_caller]
    pub fn wait_captured(&self, pod: &str) {
        wait_until(&format!("{pod} to be captured"), SOON, || {
            let status = self.says(&["status"]);
            let pods = status["pods"].as_array().into_iter().flatten();
            let named = |it: &&Value| format!("{}/{}", text(it, "namespace"), text(it, "name")) == pod;
            match pods.clone().find(named).map(|it| text(it, "capture").to_owned()) {
                Some(state) if state == "captured" => Ok(()),
                other => Err(format!("{other:?} of {status}")),
            }
        });
    }

    /// Rows of `coverage` with this source, destination and port.
    #[track_caller]
    pub fn edges(&self, source: &str, destination: &str) -> Vec<Edge> {
        let coverage = self.says(&["coverage"]);
        let all = coverage["edges"].as_array().expect("edges are a list").iter();
        all.filter(|it| it["source"] == source && it["destination"] == destination).cloned().collect()
    }

    /// The product's pods of a node's part, by the name of the node.
    #[track_caller]
    pub fn node_pod(&self, node: &str) -> String {
        let selector = ["-l", "app.kubernetes.io/name=justmtls-node", "--field-selector"];
        let on = format!("spec.nodeName={node},status.phase=Running");
        let pods = self.get(&[&["-n", OURS, "pods"], &selector[..], &[&on]].concat());
        let all = pods["items"].as_array().into_iter().flatten();
        let staying = all.filter(|pod| pod["metadata"].get("deletionTimestamp").is_none());
        let names: Vec<_> = staying.filter_map(|pod| pod["metadata"]["name"].as_str()).collect();
        assert_eq!(names.len(), 1, "{names:?} on {node}");
        names[0].to_owned()
    }

    /// A page of a process's admin socket: `agent` or `proxy` of a node.
    #[track_caller]
    pub fn page(&self, node: &str, container: &str, page: &str) -> Value {
        let pod = self.node_pod(node);
        let socket = match container {
            "agent" => format!("/run/justmtls/agent/{pod}.sock"),
            _ => "/run/justmtls/own/proxy.sock".to_owned(),
        };
        let exec = ["-n", OURS, "exec", &pod, "-c", container, "--", "/justmtls", "admin", &socket, page];
        serde_json::from_str(&self.kubectl(&exec).run().ok()).expect("pages are JSON")
    }
}
