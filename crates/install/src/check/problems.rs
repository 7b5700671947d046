//! What the control plane says is not as somebody wants it to be: policies that it cannot read or enforce, kinds that it cannot
//! follow, addresses that two pods claim, the end of its authority.

use std::collections::BTreeSet;

use serde_json::Value;

use super::finding::{Finding, all_or, failed, warning};
use super::ids::Id;
use super::{AGAIN, LOOKS};
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
    let names: Vec<_> =
        pods.iter().filter(|pod| wait::runs(pod)).filter_map(|pod| pod.metadata.name.as_deref()).collect();
    let mut said = ask(cluster, &names).await;
    if said.iter().flatten().any(|page| problems(page).any(is_of_pod)) {
        tokio::time::sleep(AGAIN * LOOKS as u32).await;
        let before = std::mem::replace(&mut said, ask(cluster, &names).await);
        said.iter_mut().flatten().for_each(|page| retain(page, &before));
        // Who does not answer any more has said what is of no pod.
        let unheard: Vec<_> =
            said.iter().zip(before).filter(|(now, _)| now.is_err()).map(|(_, before)| before).collect();
        for mut page in unheard.into_iter().flatten() {
            retain(&mut page, &[]);
            said.push(Ok(page));
        }
    }
    judge(&said)
}

async fn ask(cluster: &Cluster, names: &[&str]) -> Vec<Result<Value, String>> {
    let mut said = Vec::new();
    for name in names {
        said.push(pages::ask(cluster, name, Process::Control, "/problems").await.map_err(|error| format!("{error:#}")));
    }
    said
}

fn problems(page: &Value) -> impl Iterator<Item = &Value> {
    page.as_array().into_iter().flatten()
}

/// Whether a problem is that of a pod, which may be about to end.
fn is_of_pod(problem: &Value) -> bool {
    problem["subject"].as_str().is_some_and(|subject| subject.starts_with("Pod "))
}

/// Takes out what is said of pods and was not said before by anybody.
fn retain(page: &mut Value, before: &[Result<Value, String>]) {
    if let Some(all) = page.as_array_mut() {
        let is_old = |problem: &Value| {
            before.iter().flatten().any(|page| problems(page).any(|old| old["subject"] == problem["subject"]))
        };
        all.retain(|problem| !is_of_pod(problem) || is_old(problem));
    }
}

/// Each once, whichever replicas say it.
fn judge(said: &[Result<Value, String>]) -> Vec<Finding> {
    if said.is_empty() {
        let message = "no replica of the control plane runs, so that nobody could be asked what is wrong with policies";
        return vec![warning(Id::ControlProblems, message).advised("look at `control-replicas`")];
    }
    let sentences = |page: &Value| -> Vec<String> {
        problems(page).filter_map(|problem| problem["sentence"].as_str()).map(str::to_owned).collect()
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

    #[test]
    fn what_is_said_of_a_pod_counts_when_it_is_said_twice() {
        let of = |subject: &str, sentence: &str| json!({ "subject": subject, "sentence": sentence });
        let (ends, stays, policy) = (of("Pod a/ends", "1"), of("Pod a/stays", "2"), of("PeerAuthentication a/x", "3"));
        let mut page = json!([ends, stays, policy]);
        let before = of("Pod a/stays", "in other words");
        retain(&mut page, &[Err("b does not answer".to_owned()), Ok(json!([before]))]);
        assert_eq!(page, json!([stays, policy]));
    }
}
