//! What the container runtime does: it asks the node's agent to capture a pod before its programs start.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, bail};
use linux::channel::Channel;
use mesh::PodUid;
use wire::pods::{CniAdd, CniRequest, CniResult, MAX_MESSAGE};

use crate::cluster::PodPlan;
use crate::processes::cni_socket;

/// The agent that answers on a node, by its socket: another one makes another.
pub(crate) type Agent = (u64, i64, i64);

/// Who answers for the pod now.
pub(crate) fn agent(plan: &PodPlan) -> Option<Agent> {
    let socket = std::fs::metadata(cni_socket(&plan.node.name)).ok()?;
    Some((socket.ino(), socket.ctime(), socket.ctime_nsec()))
}

/// `CNI ADD`: returns when the node's agent has captured the pod, or has said that it is not to be captured.
pub(crate) async fn add(plan: &PodPlan, namespace: &Path) -> anyhow::Result<()> {
    let request = CniRequest::Add(CniAdd {
        pod: PodUid::from(plan.uid.as_str()),
        namespace: plan.namespace.clone(),
        name: plan.name.clone(),
        netns: namespace.to_owned(),
        container: String::new(),
        addresses: Vec::new(),
    });
    match ask(plan, request).await? {
        CniResult::Captured => Ok(()),
        CniResult::NotCaptured(why) => {
            tracing::info!(pod = plan.name, why, "not captured");
            Ok(())
        }
        CniResult::Failed(why) => bail!("{why}"),
        CniResult::Deleted => bail!("the agent answered another question"),
    }
}

/// `CNI DEL`: never fails, as a pod that cannot be forgotten must still be removed.
pub(crate) async fn remove(plan: &PodPlan) {
    let request = CniRequest::Del { pod: PodUid::from(plan.uid.as_str()), container: String::new() };
    if let Err(error) = ask(plan, request).await {
        tracing::warn!(pod = plan.name, %error, "the agent was not told that a pod is gone");
    }
}

async fn ask(plan: &PodPlan, request: CniRequest) -> anyhow::Result<CniResult> {
    let socket = cni_socket(&plan.node.name);
    let node = plan.node.name.clone();
    // The channel blocks, for as long as the agent takes.
    tokio::task::spawn_blocking(move || {
        let agent = Channel::connect(&socket).with_context(|| format!("the agent of {node} does not answer"))?;
        agent.send(&request.encode(), &[])?;
        let mut buffer = vec![0; MAX_MESSAGE];
        let (length, _) = agent.recv(&mut buffer)?;
        if length == 0 {
            bail!("the agent of {node} closed the connection");
        }
        Ok(CniResult::decode(&buffer[..length])?)
    })
    .await?
}
