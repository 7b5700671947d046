//! Pods of the tests, and what is done in them.

use std::net::IpAddr;
use std::time::Duration;

use super::{Kubernetes, SOON};
use crate::load::{Load, Report};
use crate::program::{Finished, Program, Running};
use crate::wait::wait_until;

/// A client and a server on different nodes, each with a service account of its own, and a client outside of the mesh.
pub const SHOP: &str = include_str!("../../manifests/kubernetes.yaml");

/// Nothing in clear in the namespace of [`SHOP`]'s client and server.
pub const SHOP_IS_STRICT: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: default, namespace: shop }
spec: { mtls: { mode: STRICT } }
";

impl Kubernetes {
    /// A command in a pod (`NAMESPACE/POD`), with its standard input.
    #[must_use]
    pub fn exec(&self, pod: &str, command: &[&str]) -> Program {
        let (namespace, name) = pod.split_once('/').expect("NAMESPACE/POD");
        self.kubectl(&["-n", namespace, "exec", "-i", name, "--"]).args(command)
    }

    /// A load from a pod that runs the product's image.
    pub fn load(&self, pod: &str, to: &str) -> Load {
        Load::of(self.exec(pod, &["/justmtls", "demo-app", "load"]), to)
    }

    /// The same as its node starts it, without the API server: `kubectl exec` is a stream through that.
    pub fn load_from_node(&self, node: &str, pod: &str, to: &str) -> Load {
        let pid = self.process_of(node, pod);
        let inside = ["nsenter", "-t", &pid, "-n", "-m", "/justmtls", "demo-app", "load"];
        Load::of(self.on_node(node, &inside), to)
    }

    /// The process id, on its node, of the program of a pod that runs the product's image.
    #[track_caller]
    pub fn process_of(&self, node: &str, pod: &str) -> String {
        let address = self.addresses(pod)[0];
        let find = format!(
            "for p in $(pgrep -f 'demo-app serve'); do nsenter -t $p -n ip -o addr | grep -qF ' {address}/' && echo $p && break; done"
        );
        let found = self.on_node(node, &["sh", "-c", &find]).run().stdout.trim().to_owned();
        assert!(!found.is_empty(), "no program of {pod} runs on {node}");
        found
    }

    /// A stranger asks `shop/web` again and again while `what` happens, each time on a connection of its own, and is never
    /// answered: strict is in force.
    #[track_caller]
    pub fn besieged(&self, marker: &str, what: impl FnOnce()) {
        // By the Service's name: the pod's address is another one after a crash.
        let mut stranger = self
            .exec("outside/stranger", &["/justmtls", "demo-app", "load", "--controlled", "--to", "web.shop:80"])
            .args(["--short", "2", "--rate", "40", "--patience", "500", "--marker", marker])
            .spawn();
        stranger.wait_for("\"failed\":");
        what();
        stranger.write("end\n");
        let report = Report::of(&stranger.finish(Duration::from_secs(60)));
        assert!(report.of_work("short").failed > 50, "it tried too seldom to prove anything: {report}");
        assert_eq!(report.answered(), 0, "a stranger was served under strict: {report}");
    }

    /// One request of a pod that runs the product's image; it ends well where it is answered in time.
    #[track_caller]
    pub fn ask(&self, pod: &str, to: &str, patience: Duration) -> Finished {
        let patience = patience.as_millis().to_string();
        let ask =
            ["/justmtls", "demo-app", "load", "--count", "1", "--short", "1", "--patience", &patience, "--to", to];
        self.exec(pod, &ask).run()
    }

    /// A port of a pod (`NAMESPACE/POD`, or `NAMESPACE/deployment/NAME`) as a port of this machine's loopback, while the program
    /// runs.
    #[track_caller]
    pub fn forward(&self, to: &str, port: u16) -> (Running, String) {
        let (namespace, name) = to.split_once('/').expect("NAMESPACE/POD");
        let mut forward = self.kubectl(&["-n", namespace, "port-forward", name, &format!(":{port}")]).spawn();
        forward.wait_for("Forwarding from 127.0.0.1:");
        let said = forward.stdout();
        let here = said.split("127.0.0.1:").nth(1).and_then(|rest| rest.split(' ').next()).expect("a port");
        (forward, format!("127.0.0.1:{here}"))
    }

    /// The addresses of a pod.
    #[track_caller]
    pub fn addresses(&self, pod: &str) -> Vec<IpAddr> {
        let (namespace, name) = pod.split_once('/').expect("NAMESPACE/POD");
        let pod = self.get(&["-n", namespace, "pod", name]);
        let all = pod["status"]["podIPs"].as_array().into_iter().flatten();
        all.filter_map(|it| it["ip"].as_str()?.parse().ok()).collect()
    }

    /// Waits until all pods of a namespace are ready.
    #[track_caller]
    pub fn wait_ready(&self, namespace: &str) {
        self.wait_for(&format!("all pods of {namespace} to be ready"), &["-n", namespace, "pods"], |pods| {
            let mut all = pods["items"].as_array().into_iter().flatten().peekable();
            all.peek().is_some()
                && all.all(|pod| {
                    let mut conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
                    pod["status"]["phase"] == "Succeeded"
                        || conditions.any(|it| it["type"] == "Ready" && it["status"] == "True")
                })
        });
    }

    /// The events of a pod, as sentences.
    #[track_caller]
    pub fn events(&self, pod: &str) -> String {
        let (namespace, name) = pod.split_once('/').expect("NAMESPACE/POD");
        let selector = format!("involvedObject.name={name}");
        let events = self.get(&["-n", namespace, "events", "--field-selector", &selector]);
        let all = events["items"].as_array().into_iter().flatten();
        all.filter_map(|event| event["message"].as_str()).collect::<Vec<_>>().join("\n")
    }

    /// Waits until a pod's events say something.
    #[track_caller]
    pub fn wait_for_event(&self, pod: &str, words: &str) {
        wait_until(&format!("an event of {pod} that says {words:?}"), SOON, || {
            let said = self.events(pod);
            if said.contains(words) { Ok(()) } else { Err(said) }
        });
    }
}
