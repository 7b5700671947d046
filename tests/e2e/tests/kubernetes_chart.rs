//! The chart, by a real Helm: `helm template deploy/chart` gives the objects of `justmtls render`, for the values as they are, and
//! for another one of every key. It needs Go, of which Helm is built, and no cluster.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use e2e::{Program, binary, needs, xtask};
use serde_json::Value;
use tempfile::TempDir;

/// Helm is built at the first call on a machine.
const BUILT: Duration = Duration::from_secs(20 * 60);
/// The oldest one that the chart takes: what Helm makes must not depend on which Kubernetes it takes for granted.
const KUBERNETES: &str = "--kube-version=1.30.0";

/// One value of each key at least, other than its default; with what YAML, Go's templates and Helm's own syntax may trip over.
const OTHERS: &[(&str, &str)] = &[
    ("image", "localhost:5000/justmtls@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"),
    ("imagePullPolicy", "Never"),
    ("trustDomain", "1e3"),
    ("trustDomain", "1_000"),
    ("trustDomain", "on"),
    ("trustDomain", "example.org"),
    ("insideCIDRs", "10.0.0.0/8"),
    ("mixedCIDRs", "172.16.0.0/12, fd00::/48"),
    ("serviceCIDRs", "10.96.0.0/12,fd00::/108"),
    ("excludedPorts", "22"),
    ("excludedPorts", "22,2049"),
    ("apiServerAddresses", "10.0.0.1,fd00::/64"),
    ("viewLifetime", "1m"),
    ("wholeMeshUpTo", "0"),
    ("wholeMeshUpTo", "10000000"),
    ("leafValidity", "30d"),
    ("drain", "0"),
    ("drain", "86400"),
    ("replicas", "9"),
    ("cni.binDir", "/var/lib/rancher/k3s/data/cni"),
    ("cni.confDir", "/var/lib/rancher/k3s/agent/etc/cni/net.d"),
    ("cni.exempt", "on"),
    ("cni.exempt", "kube-system,webhooks"),
    ("cri.socket", "/containerd.sock"),
    ("cri.socket", "/run/.//k3s/containerd.sock"),
    ("cri.socket", "/var/run/crio/crio.sock"),
    ("criticalPodsQuota", "true"),
    ("resources.control.cpu", "1"),
    ("resources.control.memory", "1Gi"),
    ("resources.agent.cpu", "0.5"),
    ("resources.agent.memory", "1000000"),
    ("resources.proxy.cpu", "1500m"),
    ("resources.proxy.memory", "2G"),
];

/// Values that `--set` refuses.
const WRONG: &[(&str, &str)] = &[
    ("drian", "30"),
    ("cni.bin", "/opt/cni/bin"),
    ("image", ""),
    ("image", "a b"),
    ("imagePullPolicy", "always"),
    ("trustDomain", "Example.org"),
    ("insideCIDRs", "10.0.0.0"),
    ("excludedPorts", "0"),
    ("excludedPorts", "70000"),
    ("apiServerAddresses", "kubernetes.default"),
    ("viewLifetime", "5"),
    ("viewLifetime", "301s"),
    ("leafValidity", "59s"),
    ("cni.binDir", "/opt/../etc"),
    ("drain", "30m"),
    ("replicas", "0"),
    ("wholeMeshUpTo", "-1"),
    ("cni.binDir", "opt/cni"),
    ("cni.exempt", "kube-system, a"),
    ("criticalPodsQuota", "yes"),
    ("resources.proxy.cpu", "-1"),
    ("resources.proxy.memory", "64mb"),
];

/// Objects by kind, namespace and name.
type Objects = BTreeMap<String, Value>;

/// A Helm that knows nothing of who runs it.
struct Helm {
    program: PathBuf,
    home: TempDir,
}

impl Helm {
    #[track_caller]
    fn build() -> Helm {
        let program = PathBuf::from(xtask().args(["helm"]).within(BUILT).run().ok().trim());
        Helm { program, home: tempfile::tempdir().expect("a folder") }
    }

    fn run(&self, arguments: &[&str]) -> Program {
        let mut helm = Program::new(&self.program).args(arguments).env("KUBECONFIG", "/dev/null");
        for variable in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            helm = helm.env(variable, self.home.path());
        }
        helm
    }

    #[track_caller]
    fn template(&self, chart: &Path, values: &[String]) -> Objects {
        let all = self.run(&["template", "justmtls", "--namespace=justmtls-system", "--include-crds", KUBERNETES]);
        objects(&all.args(values).args([chart]).run().ok())
    }
}

/// What `justmtls render` prints.
#[track_caller]
fn rendered(values: &[(&str, &str)]) -> Objects {
    objects(&Program::new(binary()).args(["render"]).args(words(values)).run().ok())
}

/// How our own program is told values.
fn words(values: &[(&str, &str)]) -> Vec<String> {
    values.iter().map(|(key, value)| format!("--set={key}={value}")).collect()
}

#[track_caller]
fn objects(yaml: &str) -> Objects {
    let documents: Vec<Value> = serde_saphyr::from_multiple(yaml).expect("YAML");
    let mut all = Objects::new();
    for object in documents {
        let part = |pointer| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        let name = format!("{} {}/{}", part("/kind"), part("/metadata/namespace"), part("/metadata/name"));
        assert!(all.insert(name.clone(), object).is_none(), "{name} is there twice");
    }
    all
}

#[track_caller]
fn assert_same(what: &str, by_helm: &Objects, by_us: &Objects) {
    let names = |all: &Objects| all.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(by_helm), names(by_us), "{what}: other objects");
    for (name, object) in by_us {
        assert!(by_helm[name] == *object, "{what}: {name} by Helm is {:#}\nand by us {object:#}", by_helm[name]);
    }
}

fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/chart")
}

/// The keys of the chart with their defaults, the dots between the parts of a key.
fn defaults() -> BTreeMap<String, Value> {
    fn flatten(prefix: &str, value: Value, into: &mut BTreeMap<String, Value>) {
        let Value::Object(inner) = value else {
            into.insert(prefix.to_owned(), value);
            return;
        };
        for (name, value) in inner {
            let key = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
            flatten(&key, value, into);
        }
    }
    let text = fs::read_to_string(chart().join("values.yaml")).expect("the chart's values");
    let mut all = BTreeMap::new();
    flatten("", serde_saphyr::from_str(&text).expect("YAML"), &mut all);
    all
}

/// How Helm is told a value: a text as such, whatever it looks like, and all else as what it looks like.
fn for_helm(defaults: &BTreeMap<String, Value>, (key, value): (&str, &str)) -> String {
    let option = if defaults.get(key).is_some_and(Value::is_string) { "--set-string" } else { "--set" };
    format!("{option}={key}={}", value.replace(',', "\\,"))
}

/// The chart of this program with these values as its own, in a folder for tests.
#[track_caller]
fn chart_with(values: &[(&str, &str)]) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    Program::new(binary()).args(["render", "--chart"]).args([folder.path()]).args(words(values)).run().ok();
    folder
}

#[test]
fn helm_makes_of_the_chart_what_render_prints() {
    needs!("go");
    let (helm, defaults) = (Helm::build(), defaults());
    let by_default = rendered(&[]);
    assert_same("the defaults", &helm.template(&chart(), &[]), &by_default);

    let untried: Vec<_> = defaults.keys().filter(|key| !OTHERS.iter().any(|(other, _)| other == key)).collect();
    assert!(untried.is_empty(), "no value is tried of {untried:?}");
    for values in OTHERS.chunks(1).chain([OTHERS]) {
        let what = format!("{values:?}");
        let by_us = rendered(values);
        assert!(by_us != by_default, "{what} changes nothing");
        let words: Vec<_> = values.iter().map(|value| for_helm(&defaults, *value)).collect();
        assert_same(&format!("{what} by --set"), &helm.template(&chart(), &words), &by_us);
        let folder = chart_with(values);
        let file = format!("--values={}", folder.path().join("values.yaml").display());
        assert_same(&format!("{what} by a file"), &helm.template(&chart(), &[file]), &by_us);
    }
}

#[test]
fn helm_refuses_what_set_refuses() {
    needs!("go");
    let (helm, defaults) = (Helm::build(), defaults());
    for (key, value) in WRONG {
        Program::new(binary()).args(["render"]).args(words(&[(key, value)])).run().fails();
        let word = for_helm(&defaults, (key, value));
        let said = helm.run(&["template", "justmtls", KUBERNETES, &word]).args([chart()]).run().fails();
        let last = key.rsplit('.').next().expect("a name");
        assert!(said.contains("values don't meet the specifications") && said.contains(last), "{word}: {said}");
    }
    let said = helm.run(&["template", "justmtls", KUBERNETES, "--set=replicas=null"]).args([chart()]).run().fails();
    assert!(said.contains("replicas"), "{said}");
}

#[test]
fn a_chart_with_one_other_expression_gives_another_object() {
    needs!("go");
    let (helm, by_us, folder) = (Helm::build(), rendered(&[]), chart_with(&[]));
    assert_same("what is written", &helm.template(folder.path(), &[]), &by_us);

    let template = folder.path().join("templates/15-daemonset-justmtls-node.yaml");
    let text = fs::read_to_string(&template).expect("the template");
    let other = text.replace("{{ add .Values.drain 30 }}", "{{ add .Values.drain 31 }}");
    assert_ne!(other, text, "the expression is there");
    fs::write(&template, other).expect("our own folder");
    let by_helm = helm.template(folder.path(), &[]);
    let differing: Vec<_> = by_us.iter().filter(|(name, object)| by_helm[*name] != **object).collect();
    let names: Vec<_> = differing.into_iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["DaemonSet justmtls-system/justmtls-node"]);
}
