//! `justmtls install` and `justmtls upgrade`: the control plane first, then the nodes.

use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::jiff::Timestamp;
use serde_json::Value;

use crate::apply::{self, Outcome};
use crate::cluster::{Cluster, Place, path};
use crate::looks::Looks;
use crate::objects::{CONTROL, NAMESPACE, NODE, Object, SETTINGS, all, definitions, objects};
use crate::source::Source;
use crate::table::printable;
use crate::uninstall::{is_going, namespace_place, nodes_place};
use crate::values::{Key, VERSION, Values};
use crate::wait::LOOK;
use crate::warn::{self, Judge};
use crate::{distribution, wait};

/// What the two verbs take.
#[derive(clap::Args, Clone, Debug)]
pub struct Arguments {
    /// KEY=VALUE; can be repeated. `justmtls render --keys` lists all keys.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Forget what earlier installations set.
    #[arg(long)]
    pub reset_values: bool,
    /// Change nothing: let the API server say what would change.
    #[arg(long)]
    pub dry_run: bool,
    /// Do not wait until everything is ready.
    #[arg(long)]
    pub no_wait: bool,
    /// How long to wait, as 90s or 5m.
    #[arg(long, default_value_t = 300, value_name = "TIME", value_parser = crate::values::patience)]
    pub timeout: u64,
    /// Which cluster is meant.
    #[command(flatten)]
    pub place: Place,
}

/// Which of the two it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verb {
    /// Over nothing, or over the same.
    Install,
    /// Over what is installed: fields that others set since are taken over.
    Upgrade,
}

/// Installs, or upgrades.
pub(crate) async fn run(verb: Verb, arguments: &Arguments, judge: Judge) -> anyhow::Result<i32> {
    let given = Values::from_words(&arguments.set)?;
    let cluster = Cluster::connect(&arguments.place).await?;
    let (numbers, version) = cluster.version().await?;
    supported(numbers, &version)?;
    let goes = |namespace: &Option<Value>| match namespace.as_ref().is_some_and(is_going) {
        true => bail!("the namespace {NAMESPACE} is being deleted; wait until it is gone, and run the command again"),
        false => Ok(()),
    };
    goes(&cluster.get(&namespace_place()).await?)?;
    let until = Instant::now() + Duration::from_secs(arguments.timeout);
    let installed = standing_nodes(&cluster, arguments.dry_run, until).await?;
    if verb == Verb::Upgrade && installed.is_none() {
        bail!("there is nothing to upgrade: no DaemonSet {NODE} in {NAMESPACE}; `justmtls install` installs");
    }
    // After the wait, in which an uninstallation may have gone on.
    let namespace = cluster.get(&namespace_place()).await?;
    goes(&namespace)?;
    let recorded =
        namespace.as_ref().filter(|_| !arguments.reset_values).map(recorded).transpose()?.unwrap_or_default();
    let mut values = recorded.overlaid(&given);
    let nodes: Vec<Node> = cluster.list("/api/v1/nodes", "").await?;
    if let Some(sentence) = distribution::fill_in(&mut values, &nodes).map_err(|sentence| anyhow!(sentence))? {
        anstream::eprintln!("{sentence}");
    }
    // By what is installed, whatever is recorded of it and also where that is set aside.
    let settings = cluster.get(&format!("/api/v1/namespaces/{NAMESPACE}/configmaps/{SETTINGS}")).await?;
    if let Some(sentence) = other_trust_domain(settings.as_ref(), &values) {
        bail!("{sentence}");
    }
    if let Some(sentence) = installed.as_ref().and_then(|it| other_folders(it, &values)) {
        bail!("{sentence}");
    }
    for warning in warn::warnings(&warn::gather(&cluster).await?, &values, judge) {
        warn::say(&warning);
    }
    let mut work = Work { cluster, verb, dry_run: arguments.dry_run, changed: 0 };
    work.definitions().await?;
    let wanted = objects(&values);
    let (nodes, control): (Vec<_>, Vec<_>) = wanted.iter().partition(|object| object.kind() == "DaemonSet");
    for object in control {
        work.make(object).await?;
    }
    let waits = !arguments.no_wait && !arguments.dry_run;
    if waits {
        wait::ready(&work.cluster, "deployments", CONTROL, until).await?;
    }
    for object in nodes {
        let outcome = work.make(object).await?;
        if outcome == Outcome::Unchanged && work.is_elsewhere().await? {
            work.restart(object).await?;
        }
    }
    work.take_away(&wanted).await?;
    if waits {
        wait::ready(&work.cluster, "daemonsets", NODE, until).await?;
    }
    if !arguments.dry_run {
        let namespace = work.cluster.get(&namespace_place()).await?.unwrap_or_default();
        let record = |namespace: &Value| namespace["metadata"]["annotations"][crate::objects::VALUES].clone();
        if wanted.iter().any(|object| object.kind() == "Namespace" && record(&object.value) != record(&namespace)) {
            bail!(
                "somebody else has installed with other values meanwhile: objects may be of either; run the command again when \
                 nobody else does"
            );
        }
    }
    anstream::println!("{}", last_word(arguments, work.changed));
    Ok(0)
}

/// The DaemonSet that is installed. One that is being deleted is waited for: what is changed in it is not made.
async fn standing_nodes(cluster: &Cluster, dry_run: bool, until: Instant) -> anyhow::Result<Option<Value>> {
    let (mut looks, mut said) = (Looks::default(), false);
    loop {
        match looks.heard(cluster.get(&nodes_place()).await)? {
            Some(Some(there)) if is_going(&there) => {
                let hint = "its pods end when their open connections have, or the drain time is over";
                if dry_run || Instant::now() >= until {
                    bail!("the DaemonSet {NODE} is being deleted ({hint}); run the command again when it is gone");
                }
                if !std::mem::replace(&mut said, true) {
                    anstream::eprintln!("waiting until the DaemonSet {NODE}, which is being deleted, is gone: {hint}");
                }
            }
            Some(found) => return Ok(found),
            None => {}
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn last_word(arguments: &Arguments, changed: usize) -> String {
    match (arguments.dry_run, changed, arguments.no_wait) {
        (true, 0, _) => "nothing would change".to_owned(),
        (true, some, _) => format!("{some} objects would change; nothing was changed"),
        (false, 0, _) => "nothing changed".to_owned(),
        (false, _, true) => format!("justmtls {VERSION} is applied; `justmtls check --wait` says when it is ready"),
        (false, _, false) => format!(
            "justmtls {VERSION} is installed; `justmtls check` looks at everything, `justmtls coverage` at traffic"
        ),
    }
}

struct Work {
    cluster: Cluster,
    verb: Verb,
    dry_run: bool,
    changed: usize,
}

impl Work {
    async fn make(&mut self, object: &Object) -> anyhow::Result<Outcome> {
        let force = self.verb == Verb::Upgrade;
        let outcome = match self.dry_run {
            true => apply::plan(&self.cluster, object, force).await?,
            false => apply::make(&self.cluster, object, force).await?,
        };
        self.changed += usize::from(outcome != Outcome::Unchanged);
        for line in lines(&object.title(), &outcome) {
            anstream::println!("{line}");
        }
        Ok(outcome)
    }

    /// Whether the control plane's Service is younger than pods of nodes, whose containers were given the address of the one that was
    /// there when they were made.
    async fn is_elsewhere(&self) -> anyhow::Result<bool> {
        let service = self.cluster.get(&format!("/api/v1/namespaces/{NAMESPACE}/services/{CONTROL}")).await?;
        let made = service.as_ref().and_then(|service| service["metadata"]["creationTimestamp"].as_str());
        // A dry run does not make it.
        let Some(made) = made.and_then(|made| made.parse::<Timestamp>().ok()) else { return Ok(true) };
        let pods = wait::pods_of(&self.cluster, NODE).await?;
        let pods = pods.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none());
        Ok(pods.filter_map(|pod| pod.metadata.creation_timestamp.as_ref()).any(|time| time.0 < made))
    }

    /// Has the pods of a workload made anew.
    async fn restart(&self, object: &Object) -> anyhow::Result<()> {
        let why = "the control plane's Service is newer, and may have another address";
        if self.dry_run {
            anstream::println!("{}: its pods would be made anew: {why}", object.title());
        } else {
            self.cluster.restart(&path(object)).await?;
            anstream::println!("{}: its pods are made anew: {why}", object.title());
        }
        Ok(())
    }

    /// The definitions of Istio's kinds: only where there are none, and changed only where they are ours.
    async fn definitions(&mut self) -> anyhow::Result<()> {
        for definition in definitions() {
            match self.cluster.get(&path(&definition)).await? {
                Some(is) if !is_ours(&is) => {
                    anstream::println!("{}: there already, and left alone", definition.title())
                }
                _ => drop(self.make(&definition).await?),
            }
        }
        Ok(())
    }

    /// What an earlier version, or other values, made.
    async fn take_away(&mut self, wanted: &[Object]) -> anyhow::Result<()> {
        let all = all(Source::Values(&Values::default()));
        for (title, place) in apply::leftovers(&self.cluster, &all, wanted).await? {
            self.changed += 1;
            if self.dry_run {
                anstream::println!("{title}: would be deleted, as no longer wanted");
            } else if self.cluster.delete(&place).await? {
                anstream::println!("{title}: deleted, as no longer wanted");
            }
        }
        Ok(())
    }
}

/// Whether a definition is one that we made.
pub(crate) fn is_ours(definition: &Value) -> bool {
    definition["metadata"]["labels"][crate::objects::MANAGED_BY] == "justmtls"
}

/// What is said about an object.
fn lines(title: &str, outcome: &Outcome) -> Vec<String> {
    match outcome {
        Outcome::Created => vec![format!("{title}: new")],
        Outcome::Unchanged => Vec::new(),
        Outcome::Changed(differences) => {
            let mut lines = vec![format!("{title}: changed")];
            lines.extend(differences.iter().map(|difference| format!("    {difference}")));
            lines
        }
    }
}

/// Why these values cannot be installed over nodes that use other CNI folders. An agent sees the folders that it was made with:
/// the next one could not take out what it put there, and no pod starts where a configuration names a plugin that is gone.
fn other_folders(daemonset: &Value, values: &Values) -> Option<String> {
    let volumes = daemonset["spec"]["template"]["spec"]["volumes"].as_array()?;
    [("cni-bin", Key::CniBinDir), ("cni-conf", Key::CniConfDir)].into_iter().find_map(|(volume, key)| {
        let is = volumes.iter().find(|it| it["name"] == volume)?["hostPath"]["path"].as_str()?;
        let wanted = values.get(key);
        (is != wanted).then(|| {
            format!(
                "{} is {} here and cannot become {wanted} while it is installed, as a CNI plugin that stands would stay behind; \
                 run `justmtls uninstall` first, or leave it",
                key.as_str(),
                printable(is)
            )
        })
    })
}

/// Why these values cannot be installed over settings of another trust domain.
fn other_trust_domain(settings: Option<&Value>, values: &Values) -> Option<String> {
    let (is, wanted) = (settings?["data"]["trustDomain"].as_str()?, values.get(Key::TrustDomain));
    (is != wanted).then(|| {
        format!(
            "trustDomain is {} here and cannot become {wanted}: every identity would change; uninstall first, or leave it",
            printable(is)
        )
    })
}

/// The values that the installation was made with.
pub(crate) fn recorded(namespace: &Value) -> anyhow::Result<Values> {
    let metadata = &namespace["metadata"];
    let version = metadata["labels"]["app.kubernetes.io/version"].as_str().unwrap_or(VERSION);
    match metadata["annotations"][crate::objects::VALUES].as_str() {
        Some(text) => Values::from_record(text, version).map_err(|error| {
            anyhow!("the annotation {} of Namespace {NAMESPACE} cannot be read: {error}; say --reset-values and all --set again", crate::objects::VALUES)
        }),
        None => Ok(Values::default()),
    }
}

/// Whether an API server of this version is new enough.
pub(crate) fn supported(numbers: (u32, u32), version: &str) -> anyhow::Result<()> {
    let (major, minor) = crate::MINIMUM_KUBERNETES.split_once('.').unwrap_or_default();
    let minimum = (major.parse().unwrap_or(0), minor.parse().unwrap_or(0));
    if numbers < minimum {
        bail!("Kubernetes {version} is too old; justmtls needs {} or newer", crate::MINIMUM_KUBERNETES);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::drift::differences;

    #[test]
    fn each_change_is_a_line_and_no_change_is_none() {
        assert!(lines("Service a", &Outcome::Unchanged).is_empty());
        assert_eq!(lines("Service a", &Outcome::Created), ["Service a: new"]);
        let changed =
            Outcome::Changed(differences(&json!({ "spec": { "replicas": 1 } }), &json!({ "spec": { "replicas": 2 } })));
        assert_eq!(lines("Deployment a", &changed), ["Deployment a: changed", "    spec.replicas: 1 → 2"]);
    }

    #[test]
    fn values_are_remembered_by_the_namespace_and_a_new_version_brings_its_own_image() {
        let mut values = Values::default();
        values.set(Key::Drain, "60").unwrap();
        let namespace = objects(&values).remove(0).value;
        assert_eq!(recorded(&namespace).unwrap(), values);
        let mut older = namespace.clone();
        let text = older["metadata"]["annotations"][crate::objects::VALUES].as_str().unwrap().replace(VERSION, "0.0.9");
        older["metadata"]["annotations"][crate::objects::VALUES] = json!(text);
        older["metadata"]["labels"]["app.kubernetes.io/version"] = json!("0.0.9");
        assert_eq!(recorded(&older).unwrap(), values);
        assert_eq!(recorded(&json!({ "metadata": {} })).unwrap(), Values::default());
        assert!(recorded(&json!({ "metadata": { "annotations": { crate::objects::VALUES: "x" } } })).is_err());
    }

    #[test]
    fn the_cni_folders_of_what_is_installed_stay() {
        let all = objects(&Values::default());
        let daemonset = all.into_iter().find(|object| object.kind() == "DaemonSet").unwrap().value;
        let other = |word: &str| Values::from_words(&[word.to_owned()]).unwrap();
        assert_eq!(other_folders(&daemonset, &Values::default()), None);
        assert_eq!(other_folders(&daemonset, &other("drain=60")), None);
        for word in ["cni.binDir=/other", "cni.confDir=/other"] {
            let sentence = other_folders(&daemonset, &other(word)).unwrap();
            let key = word.split('=').next().unwrap();
            assert!(sentence.starts_with(key) && sentence.contains("cannot become /other"), "{sentence}");
        }
    }

    #[test]
    fn the_trust_domain_of_what_is_installed_stays_whatever_was_recorded() {
        let values = Values::from_words(&["trustDomain=example.org".to_owned()]).unwrap();
        let installed = |domain: &str| serde_json::json!({ "data": { "trustDomain": domain } });
        assert_eq!(other_trust_domain(None, &values), None);
        assert_eq!(other_trust_domain(Some(&installed("example.org")), &values), None);
        let sentence = other_trust_domain(Some(&installed("example.org")), &Values::default()).unwrap();
        assert!(sentence.contains("example.org here and cannot become cluster.local"), "{sentence}");
    }
}
