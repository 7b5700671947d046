//! What the control plane says is not as somebody wants it to be: policies that it cannot read or enforce, kinds that it cannot
//! follow, addresses that two pods claim, the end of its authority.

use std::collections::BTreeSet;

use serde_json::Value;

use super::finding::{Finding, all_or, failed, warning};
use super::ids::Id;
use crate::cluster::Cluster;
use crate::objects::CONTROL;
use crate::pages::{self, Process};
use crate::wait;

/// Problems are warnings: nothing of the product fails by what somebody has written, and each says what refuses because of it.
pub(super) async fn findings(cluster: &Cluster) -> Vec<Finding> {
    let pods = match wait::pods_of(cluster, CONTROL).await {
        Ok(pods) => pods,
        Err(error) => return vec![failed(Id::ControlProblems, format!("{error:#}"))],
    };
    let mut said = Vec::new();
    for name in pods.iter().filter(|pod| wait::runs(pod)).filter_map(|pod| pod.metadata.name.as_deref()) {
        said.push(pages::ask(cluster, name, Process::Control, "/problems").await.map_err(|error| format!("{error:#}")));
    }
    judge(&said)
}

/// Each once, whichever replicas say it.
fn judge(said: &[Result<Value, String>]) -> Vec<Finding> {
    if said.is_empty() {
        let message = "no replica of the control plane runs, so that nobody could be asked what is wrong with policies";
        return vec![warning(Id::ControlProblems, message).advised("look at `control-replicas`")];
    }
    let sentences = |page: &Value| -> Vec<String> {
        let all = page.as_array().into_iter().flatten();
        all.filter_map(|problem| problem["sentence"].as_str()).map(str::to_owned).collect()
    };
    let all: BTreeSet<_> = said
        .iter()
        .flat_map(|page| match page {
            Ok(page) => sentences(page),
            Err(why) => vec![why.clone()],
        })
        .collect();
    let wrong = all.into_iter().map(|sentence| warning(Id::ControlProblems, sentence)).collect();
    all_or(Id::ControlProblems, wrong, "the control plane has nothing to say of what it reads")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::finding::State;
    use super::*;

    #[test]
    fn what_replicas_say_is_said_once_and_who_does_not_answer_is_named() {
        let problem = json!([{ "severity": "error", "sentence": "PeerAuthentication shop/x: MAYBE is no mode" }]);
        let found = judge(&[Ok(problem.clone()), Ok(problem), Err("b does not answer".to_owned())]);
        let told: Vec<_> = found.iter().map(|it| (it.state, it.message.as_str())).collect();
        let expected = ["PeerAuthentication shop/x: MAYBE is no mode", "b does not answer"];
        assert_eq!(told, expected.map(|message| (State::Warning, message)));
        assert_eq!(judge(&[Ok(json!([])), Ok(json!([]))])[0].state, State::Ok);
        // Nobody has nothing to say.
        assert_eq!(judge(&[])[0].state, State::Warning);
    }
}
