//! `justmtls version`: of this binary, and of what runs in the cluster.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use serde_json::json;

use crate::cluster::{Cluster, Place};
use crate::objects::{CONTROL, NODE};
use crate::values::VERSION;
use crate::wait::pods_of;

/// What the verb takes.
#[derive(clap::Args, Clone, Debug)]
pub struct Arguments {
    /// Of this binary alone; no cluster is asked.
    #[arg(long)]
    pub client: bool,
    /// Output for programs.
    #[arg(long)]
    pub json: bool,
    /// Which cluster is meant.
    #[command(flatten)]
    pub place: Place,
}

/// Says the versions.
pub(crate) async fn run(arguments: &Arguments) -> anyhow::Result<i32> {
    let mut versions = vec![("client", BTreeMap::from([(VERSION.to_owned(), 1)]))];
    let shown = |(name, counts): &(&str, BTreeMap<String, usize>)| {
        anstream::println!("{name}: {}", sentence(name, counts));
    };
    // First, so that it is known also where no cluster is.
    if !arguments.json {
        versions.iter().for_each(shown);
    }
    if !arguments.client {
        let cluster = Cluster::connect(&arguments.place).await?;
        let (control, nodes) = (pods_of(&cluster, CONTROL).await?, pods_of(&cluster, NODE).await?);
        versions.push(("control plane", counted(&control)));
        versions.push(("nodes", counted(&nodes)));
    }
    if arguments.json {
        let versions: serde_json::Map<_, _> =
            versions.into_iter().map(|(name, counts)| (name.replace(' ', "_"), json!(counts))).collect();
        anstream::println!("{:#}", serde_json::Value::Object(versions));
        return Ok(0);
    }
    versions[1..].iter().for_each(shown);
    Ok(0)
}

/// How many pods of each version there are.
fn counted(pods: &[Pod]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for pod in pods {
        let version = pod.metadata.labels.as_ref().and_then(|labels| labels.get("app.kubernetes.io/version"));
        *counts.entry(version.cloned().unwrap_or_else(|| "unknown".to_owned())).or_default() += 1;
    }
    counts
}

fn sentence(name: &str, counts: &BTreeMap<String, usize>) -> String {
    let one = |(version, count): (&String, &usize)| match name {
        "client" => version.clone(),
        _ => format!("{version} ({count} pods)"),
    };
    if counts.is_empty() { "not installed".to_owned() } else { counts.iter().map(one).collect::<Vec<_>>().join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_counted_by_version() {
        let pod = |version: &str| -> Pod {
            serde_json::from_value(json!({ "metadata": { "labels": { "app.kubernetes.io/version": version } } }))
                .unwrap()
        };
        let counts = counted(&[pod("0.1.0"), pod("0.1.0"), pod("0.0.9")]);
        assert_eq!(sentence("nodes", &counts), "0.0.9 (1 pods), 0.1.0 (2 pods)");
        assert_eq!(sentence("nodes", &BTreeMap::new()), "not installed");
    }
}
