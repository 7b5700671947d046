//! Whether the mesh is being uninstalled: the settings say so from the first step of `justmtls uninstall` on, also where that was interrupted.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;

use crate::cluster::Cluster;
use crate::objects::{NAMESPACE, SETTINGS};

/// The field of the settings, as [`crate::drift`] names it.
pub(crate) const FIELD: &str = "data.leaving";
/// Why a pod is not captured that would be, were the mesh not being uninstalled. Agents know no such reason: they are told that
/// it opted out.
pub(crate) const REASON: &str = "leaving-mesh";
/// The reason of agents that it stands in the place of.
const OPTED_OUT: &str = "opted-out";
/// The label by which a namespace or a pod says whether it is to be captured.
pub(crate) const MODE: &str = "justmtls.dev/mode";
/// That of a namespace whose pods may opt out.
const ALLOWS: &str = "justmtls.dev/allow-opt-out";

/// Where the settings are.
pub(crate) fn place() -> String {
    format!("/api/v1/namespaces/{NAMESPACE}/configmaps/{SETTINGS}")
}

/// How far an uninstallation is.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) enum Stage {
    /// Nobody uninstalls.
    #[default]
    No,
    /// No policy is enforced any more.
    Announced,
    /// Every pod is to leave.
    Begun,
}

impl Stage {
    /// From the settings. A word that is none changes nothing for the control plane either.
    pub(crate) fn of(settings: &Value) -> Self {
        match settings["data"]["leaving"].as_str().map(str::trim) {
            Some("announced") => Self::Announced,
            Some("begun") => Self::Begun,
            _ => Self::No,
        }
    }

    /// What is so while it is; nothing where nobody uninstalls.
    pub(crate) fn sentence(self) -> Option<&'static str> {
        match self {
            Self::No => None,
            Self::Announced => {
                Some("the mesh is about to be uninstalled: plaintext is let in everywhere, and no policy is enforced")
            }
            Self::Begun => {
                Some("the mesh is being uninstalled: every pod has left it or is leaving it, and talks in clear")
            }
        }
    }
}

/// An uninstallation, and who is out of the mesh without it.
#[derive(Clone, Default, Debug)]
pub(crate) struct Leaving {
    pub(crate) stage: Stage,
    /// Namespaces that opted out by themselves.
    out: BTreeSet<String>,
    /// Namespaces whose pods may.
    allowing: BTreeSet<String>,
}

impl Leaving {
    /// Asks. Who may not read the settings is told what the agents say.
    pub(crate) async fn look(cluster: &Cluster) -> Self {
        let settings = cluster.get(&place()).await.ok().flatten().unwrap_or_default();
        let stage = Stage::of(&settings);
        let mut namespaces = Vec::new();
        if stage == Stage::Begun {
            namespaces = cluster.list::<Value>("/api/v1/namespaces", "").await.unwrap_or_default();
        }
        Self::of(stage, &namespaces)
    }

    fn of(stage: Stage, namespaces: &[Value]) -> Self {
        let labelled = |label: &str, value: &str| {
            let with = namespaces.iter().filter(|it| it["metadata"]["labels"][label] == value);
            with.filter_map(|it| it["metadata"]["name"].as_str().map(str::to_owned)).collect()
        };
        Self { stage, out: labelled(MODE, "off"), allowing: labelled(ALLOWS, "true") }
    }

    /// Why a pod is not captured, where its agent gives this reason.
    pub(crate) fn reason(&self, pod: &Pod, said: String) -> String {
        let metadata = &pod.metadata;
        let label = metadata.labels.as_ref().and_then(|labels| labels.get(MODE)).map(String::as_str);
        let is_in = |names: &BTreeSet<String>| metadata.namespace.as_ref().is_some_and(|name| names.contains(name));
        let by_itself = match label {
            Some("on") => false,
            Some("off") if is_in(&self.allowing) => true,
            _ => is_in(&self.out),
        };
        if self.stage == Stage::Begun && said == OPTED_OUT && !by_itself { REASON.to_owned() } else { said }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_settings_say_how_far_it_is_and_each_step_has_its_sentence() {
        let stage = |word: &str| Stage::of(&json!({ "data": { "leaving": word } }));
        assert_eq!(
            ["announced", "begun", "no", "x"].map(stage),
            [Stage::Announced, Stage::Begun, Stage::No, Stage::No]
        );
        assert_eq!(Stage::of(&json!({ "data": {} })), Stage::No);
        assert_eq!(Stage::No.sentence(), None);
        assert!(Stage::Begun.sentence().unwrap().contains("in clear"));
    }

    #[test]
    fn who_opted_out_by_himself_has_not_left_because_of_it() {
        let pod = |namespace: &str, mode: Option<&str>| -> Pod {
            let labels = mode.map(|mode| json!({ "justmtls.dev/mode": mode }));
            serde_json::from_value(json!({ "metadata": { "name": "a", "namespace": namespace, "labels": labels } }))
                .unwrap()
        };
        let namespace =
            |name: &str, label: &str, value: &str| json!({ "metadata": { "name": name, "labels": { label: value } } });
        let namespaces = [namespace("legacy", MODE, "off"), namespace("free", ALLOWS, "true")];
        let leaving = Leaving::of(Stage::Begun, &namespaces);
        let reason = |pod: &Pod, said: &str| leaving.reason(pod, said.to_owned());
        for left in [pod("shop", None), pod("shop", Some("off")), pod("legacy", Some("on")), pod("free", None)] {
            assert_eq!(reason(&left, "opted-out"), REASON);
        }
        for out in [pod("free", Some("off")), pod("legacy", None)] {
            assert_eq!(reason(&out, "opted-out"), "opted-out");
        }
        assert_eq!(reason(&pod("shop", None), "host-network"), "host-network");
        assert_eq!(Leaving::default().reason(&pod("shop", None), "opted-out".to_owned()), "opted-out");
    }
}
