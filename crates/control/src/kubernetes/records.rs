//! The record of captured pods in ConfigMaps, one for each node.
//!
//! There is one path for all replicas: what an agent reports is written here, every replica reads it back by its watch, the
//! index is told by that, and only then the agent has its confirmation. So nothing is published that a restart would forget
//! (T47), and no replica knows of a capture that another one does not.
//!
//! Reports only add. What is gone is taken out by the leader, when its pods have been missing for a while; what is to leave by
//! the replica that serves its node's agent, before it is released.

use std::collections::{BTreeMap, BTreeSet};

use kube::api::{DeleteParams, Preconditions};
use kube::{Api, Client};
use manifests::k8s_openapi::api::core::v1::ConfigMap;
use mesh::PodUid;
use sha2::{Digest, Sha256};

use super::{Failure, ask, metadata, parameters};
use crate::ROOT_NAMESPACE;

/// The label of a record, and what it says.
const LABEL: (&str, &str) = ("justmtls.dev/record", "captured");
const PREFIX: &str = "justmtls-captured-";
/// The keys of its data.
const NODE: &str = "node";
const PODS: &str = "pods";
/// The longest name of an object.
const MAX_NAME: usize = 253;
/// The longest UID that is taken.
const MAX_UID: usize = 64;
/// Pods that one record may name: more than a node can have, and those that are gone and not taken out yet.
pub(crate) const MAX_PODS: usize = 12_288;

/// What a record says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Record {
    pub(crate) node: String,
    pub(crate) pods: BTreeSet<PodUid>,
}

/// What is to become of a node's record.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(crate) struct Change {
    /// Pods that it is to name.
    pub(crate) add: BTreeSet<PodUid>,
    /// Pods that are gone, or leave.
    pub(crate) take_out: BTreeSet<PodUid>,
    /// The node is gone: without pods its record goes, too.
    pub(crate) node_is_gone: bool,
}

/// The name of a node's record.
pub(crate) fn name(node: &str) -> String {
    let name = format!("{PREFIX}{node}");
    if name.len() <= MAX_NAME {
        return name;
    }
    let hash =
        Sha256::digest(node.as_bytes()).iter().take(16).fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
    format!("{PREFIX}{hash}")
}

/// What a ConfigMap of our namespace says, if it is a record.
pub(crate) fn read(config: &ConfigMap) -> Option<Record> {
    let labelled = config.metadata.labels.as_ref().and_then(|labels| labels.get(LABEL.0));
    let data = config.data.as_ref()?;
    let node = data.get(NODE).filter(|node| !node.is_empty())?;
    let is_record = labelled.is_some_and(|value| value == LABEL.1)
        && config.metadata.namespace.as_deref() == Some(ROOT_NAMESPACE)
        && config.metadata.name.as_deref() == Some(&name(node));
    is_record.then(|| Record { node: node.clone(), pods: pods(config) })
}

fn pods(config: &ConfigMap) -> BTreeSet<PodUid> {
    let text = config.data.as_ref().and_then(|data| data.get(PODS)).map_or("", String::as_str);
    let uids = text.split_whitespace().filter(|uid| is_uid(uid));
    uids.take(MAX_PODS).map(PodUid::from).collect()
}

fn is_uid(uid: &str) -> bool {
    !uid.is_empty() && uid.len() <= MAX_UID && !uid.contains(char::is_whitespace)
}

impl Change {
    /// Whether there is nothing to do.
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Adds what another one asks for.
    pub(crate) fn merge(&mut self, other: Self) {
        // What is reported lives, whatever was thought before.
        self.take_out.extend(other.take_out);
        self.add.extend(other.add);
        self.take_out.retain(|uid| !self.add.contains(uid));
        self.node_is_gone = other.node_is_gone;
    }

    /// Writes it, once: [`Failure::Conflict`] asks to be tried again.
    pub(crate) async fn write(&self, client: &Client, node: &str) -> Result<(), Failure> {
        let api: Api<ConfigMap> = Api::namespaced(client.clone(), ROOT_NAMESPACE);
        let name = name(node);
        let found = ask(api.get_opt(&name)).await?;
        let old = found.as_ref().map(pods).unwrap_or_default();
        let new: BTreeSet<_> =
            old.iter().filter(|uid| !self.take_out.contains(uid)).chain(&self.add).cloned().collect();
        if new.len() > MAX_PODS {
            return Err(Failure::Refused(format!("a node's record names at most {MAX_PODS} pods")));
        }
        match found {
            Some(config) if new.is_empty() && self.node_is_gone => {
                let is_as_read =
                    Preconditions { resource_version: config.metadata.resource_version, uid: config.metadata.uid };
                let parameters = DeleteParams { preconditions: Some(is_as_read), ..DeleteParams::default() };
                ask(api.delete(&name, &parameters)).await.map(drop)
            }
            None if new.is_empty() => Ok(()),
            Some(_) if new == old => Ok(()),
            Some(mut config) => {
                config.data = Some(data(node, &new));
                ask(api.replace(&name, &parameters(), &config)).await.map(drop)
            }
            None => {
                let mut metadata = metadata(&name);
                metadata.labels.get_or_insert_default().insert(LABEL.0.to_owned(), LABEL.1.to_owned());
                let config = ConfigMap { metadata, data: Some(data(node, &new)), ..ConfigMap::default() };
                ask(api.create(&parameters(), &config)).await.map(drop)
            }
        }
    }
}

fn data(node: &str, pods: &BTreeSet<PodUid>) -> BTreeMap<String, String> {
    let lines =
        pods.iter().filter(|uid| is_uid(uid.as_str())).fold(String::new(), |text, uid| text + uid.as_str() + "\n");
    BTreeMap::from([(NODE.to_owned(), node.to_owned()), (PODS.to_owned(), lines)])
}

#[cfg(test)]
mod tests {
    use kube::api::ObjectMeta;

    use super::super::fake::Fake;
    use super::*;

    fn uids(names: &[&str]) -> BTreeSet<PodUid> {
        names.iter().map(|name| PodUid::from(*name)).collect()
    }

    fn add(names: &[&str]) -> Change {
        Change { add: uids(names), ..Change::default() }
    }

    async fn stored(fake: &Fake, node: &str) -> Option<Record> {
        let api: Api<ConfigMap> = Api::namespaced(fake.client(), ROOT_NAMESPACE);
        api.get_opt(&name(node)).await.unwrap().map(|config| read(&config).expect("it is a record"))
    }

    #[tokio::test]
    async fn a_record_only_grows_until_what_is_gone_is_taken_out() {
        let fake = Fake::default();
        let client = fake.client();
        add(&["one", "two"]).write(&client, "node-a").await.unwrap();
        add(&["three"]).write(&client, "node-a").await.unwrap();
        let pods = |record: Option<Record>| record.unwrap().pods;
        assert_eq!(pods(stored(&fake, "node-a").await), uids(&["one", "two", "three"]));
        let writes = fake.writes();
        add(&["one"]).write(&client, "node-a").await.unwrap();
        assert_eq!(fake.writes(), writes, "what is there is not written again");
        let out = Change { take_out: uids(&["one", "two", "three"]), ..Change::default() };
        out.write(&client, "node-a").await.unwrap();
        assert!(pods(stored(&fake, "node-a").await).is_empty(), "the node is there, and so is its record");
        Change { node_is_gone: true, ..Change::default() }.write(&client, "node-a").await.unwrap();
        assert_eq!(stored(&fake, "node-a").await, None);
    }

    #[tokio::test]
    async fn of_two_replicas_that_write_at_once_neither_is_lost() {
        let fake = Fake::default();
        let write = async |name: &str| {
            while let Err(failure) = add(&[name]).write(&fake.client(), "node-a").await {
                assert_eq!(failure, Failure::Conflict);
            }
        };
        tokio::join!(write("one"), write("two"), write("three"));
        assert_eq!(stored(&fake, "node-a").await.unwrap().pods, uids(&["one", "two", "three"]));
    }

    #[test]
    fn what_is_reported_while_it_is_to_be_taken_out_stays() {
        let mut change = Change { take_out: uids(&["one", "two"]), node_is_gone: true, ..Change::default() };
        change.merge(add(&["two"]));
        assert_eq!((change.add, change.take_out, change.node_is_gone), (uids(&["two"]), uids(&["one"]), false));
    }

    #[test]
    fn a_stranger_in_our_namespace_is_no_record() {
        let record = |name: &str, label: &str| ConfigMap {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                namespace: Some(ROOT_NAMESPACE.to_owned()),
                labels: Some(BTreeMap::from([(LABEL.0.to_owned(), label.to_owned())])),
                ..ObjectMeta::default()
            },
            data: Some(data("node-a", &uids(&["one"]))),
            ..ConfigMap::default()
        };
        assert!(read(&record("justmtls-captured-node-a", "captured")).is_some());
        assert!(read(&record("justmtls-captured-node-b", "captured")).is_none());
        assert!(read(&record("justmtls-captured-node-a", "other")).is_none());
        let long = "n".repeat(MAX_NAME);
        assert!(name(&long).len() <= MAX_NAME && name(&long) != name(&long[1..]));
    }
}
