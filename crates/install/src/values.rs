//! What can be set about an installation: a closed list of keys, each with its form, its default and its meaning.

mod schema;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Map, Value, json};

pub(crate) use schema::schema;

/// The version of this binary, of the objects that it makes and of the image that they name.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The form of a value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    /// A name of an image.
    Image,
    /// One of a few words.
    Word(&'static [&'static str]),
    /// A trust domain, in the one spelling that it has.
    TrustDomain,
    /// Ranges of addresses, with commas between them.
    Ranges,
    /// Addresses and ranges, with commas between them.
    Addresses,
    /// Ports, with commas between them.
    Ports,
    /// A whole number, from and to.
    Number(u64, u64),
    /// A whole number with a unit of time, from and to, in seconds.
    Time(u64, u64),
    /// A directory or file of the node.
    Path,
    /// Names of namespaces, with commas between them.
    Namespaces,
    /// An amount, as Kubernetes writes it.
    Quantity,
}

macro_rules! keys {
    ($($variant:ident = $name:literal, $form:expr, $default:expr, $about:literal;)*) => {
        /// A key of `--set`, of `values.yaml` and of nothing else.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        pub(crate) enum Key { $(#[doc = $about] $variant,)* }

        impl Key {
            /// All keys, in the order of the documentation.
            pub(crate) const ALL: &[Self] = &[$(Self::$variant,)*];

            /// As it is written.
            pub(crate) fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// What it is for.
            pub(crate) fn about(self) -> &'static str {
                match self { $(Self::$variant => $about,)* }
            }

            fn form(self) -> Form {
                match self { $(Self::$variant => $form,)* }
            }

            /// What it is where nobody says.
            pub(crate) fn default_value(self) -> &'static str {
                match self { $(Self::$variant => $default,)* }
            }
        }
    };
}

keys! {
    Image = "image", Form::Image, concat!("ghcr.io/justmtls/justmtls:", env!("CARGO_PKG_VERSION")),
        "The one image, of all containers.";
    ImagePullPolicy = "imagePullPolicy", Form::Word(&["IfNotPresent", "Always", "Never"]), "IfNotPresent",
        "When kubelet pulls the image.";
    TrustDomain = "trustDomain", Form::TrustDomain, "cluster.local",
        "The first part of all identities. It cannot be changed later.";
    InsideRanges = "insideCIDRs", Form::Ranges, "",
        "Ranges of pods alone, in addition to those that Nodes name.";
    MixedRanges = "mixedCIDRs", Form::Ranges, "",
        "Ranges that pods share with other machines, as in VPC networks.";
    ServiceRanges = "serviceCIDRs", Form::Ranges, "",
        "Ranges of Services.";
    ExcludedPorts = "excludedPorts", Form::Ports, "",
        "Ports that are captured in no pod.";
    ApiServerAddresses = "apiServerAddresses", Form::Addresses, "",
        "Addresses and ranges from which API servers call webhooks and aggregated APIs, in addition to those that are learned.";
    ViewLifetime = "viewLifetime", Form::Time(1, 300), "30s",
        "How old a node's view may be before it counts as stale.";
    WholeMeshUpTo = "wholeMeshUpTo", Form::Number(0, 10_000_000), "5000",
        "Up to how many workloads each proxy is told of the whole mesh.";
    LeafValidity = "leafValidity", Form::Time(60, 30 * 86_400), "24h",
        "How long a workload's certificate lives.";
    Drain = "drain", Form::Number(0, 86_400), "1800",
        "Seconds that open connections may take to end when a proxy is replaced.";
    Replicas = "replicas", Form::Number(1, 9), "2",
        "Replicas of the control plane.";
    CniBinDir = "cni.binDir", Form::Path, "/opt/cni/bin",
        "The node's directory of CNI plugins. Detected for known distributions.";
    CniConfDir = "cni.confDir", Form::Path, "/etc/cni/net.d",
        "The node's directory of CNI configurations. Detected likewise.";
    CniExempt = "cni.exempt", Form::Namespaces, "kube-system",
        "Namespaces, beside justmtls-system, whose pods start while the agent does not answer.";
    CriSocket = "cri.socket", Form::Path, "/run/containerd/containerd.sock",
        "The container runtime's socket. Detected likewise.";
    CriticalPodsQuota = "criticalPodsQuota", Form::Word(&["true", "false"]), "false",
        "Add the ResourceQuota that GKE demands for critical pods outside of kube-system. Detected likewise.";
    ControlCpu = "resources.control.cpu", Form::Quantity, "100m",
        "CPU that each replica of the control plane requests.";
    ControlMemory = "resources.control.memory", Form::Quantity, "64Mi",
        "Memory that each replica of the control plane requests.";
    AgentCpu = "resources.agent.cpu", Form::Quantity, "20m",
        "CPU that each agent requests.";
    AgentMemory = "resources.agent.memory", Form::Quantity, "32Mi",
        "Memory that each agent requests.";
    ProxyCpu = "resources.proxy.cpu", Form::Quantity, "100m",
        "CPU that each proxy requests.";
    ProxyMemory = "resources.proxy.memory", Form::Quantity, "64Mi",
        "Memory that each proxy requests.";
}

impl Key {
    /// The key of that name.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|key| key.as_str() == name)
    }

    /// A value of it as JSON, in the type that Helm's values have.
    pub(crate) fn typed(self, text: &str) -> Value {
        match self.form() {
            Form::Number(..) => text.parse::<u64>().map_or_else(|_| json!(text), |number| json!(number)),
            Form::Word(words) if words.contains(&"true") => json!(text == "true"),
            _ => json!(text),
        }
    }

    /// Whether its values are numbers.
    pub(crate) fn is_number(self) -> bool {
        matches!(self.form(), Form::Number(..))
    }
}

/// A value that cannot be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct WrongValue(String);

impl fmt::Display for WrongValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for WrongValue {}

/// What an installation is made of: the default of each key, unless something else was said.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(crate) struct Values {
    set: BTreeMap<Key, String>,
}

impl Values {
    /// From the words of `--set`.
    ///
    /// # Errors
    /// The first word that is none, in one sentence.
    pub(crate) fn from_words(words: &[String]) -> Result<Self, WrongValue> {
        let mut values = Self::default();
        for word in words {
            let Some((name, text)) = word.split_once('=') else {
                return Err(WrongValue(format!(
                    "--set {word}: there is no `=`; write KEY=VALUE, as in --set replicas=3"
                )));
            };
            let Some(key) = Key::from_name(name) else {
                let all: Vec<_> = Key::ALL.iter().map(|key| key.as_str()).collect();
                return Err(WrongValue(format!("--set {word}: there is no key {name}; there are {}", all.join(", "))));
            };
            values.set(key, text).map_err(|WrongValue(why)| WrongValue(format!("--set {word}: {why}")))?;
        }
        Ok(values)
    }

    /// Sets one.
    ///
    /// # Errors
    /// It cannot be that.
    pub(crate) fn set(&mut self, key: Key, text: &str) -> Result<(), WrongValue> {
        let text = text.trim();
        check(key.form(), text).map_err(|what| WrongValue(format!("{text:?} is not {what}")))?;
        // One spelling of a number, as Helm has it.
        let text = if key.is_number() { key.typed(text).to_string() } else { text.to_owned() };
        self.set.insert(key, text);
        Ok(())
    }

    /// Sets one where nobody said anything; gives whether it did.
    pub(crate) fn suggest(&mut self, key: Key, text: &str) -> bool {
        !self.set.contains_key(&key) && text != key.default_value() && self.set(key, text).is_ok()
    }

    /// Whether somebody said what this is.
    pub(crate) fn is_set(&self, key: Key) -> bool {
        self.set.contains_key(&key)
    }

    /// The value, as text.
    pub(crate) fn get(&self, key: Key) -> &str {
        self.set.get(&key).map_or(key.default_value(), String::as_str)
    }

    /// How long a proxy that ends goes on with what is open, in seconds.
    pub(crate) fn drain(&self) -> u64 {
        // The key takes numbers alone.
        self.get(Key::Drain).parse().unwrap_or(0)
    }

    /// These, and over them what the other ones say.
    pub(crate) fn overlaid(&self, other: &Self) -> Self {
        let mut set = self.set.clone();
        set.extend(other.set.iter().map(|(key, text)| (*key, text.clone())));
        Self { set }
    }

    /// From [`Values::record`] of some version. What was the default of that version is not remembered for its image: a new
    /// version has a new one. A key that there is no more is passed over.
    ///
    /// # Errors
    /// It is no record, or names what cannot be.
    pub(crate) fn from_record(text: &str, version: &str) -> Result<Self, WrongValue> {
        let root: Value = serde_json::from_str(text).map_err(|error| WrongValue(error.to_string()))?;
        let mut values = Self::default();
        for key in Key::ALL {
            let text = match root.pointer(&format!("/{}", key.as_str().replace('.', "/"))) {
                Some(Value::String(text)) => text.clone(),
                Some(other @ (Value::Number(_) | Value::Bool(_))) => other.to_string(),
                _ => continue,
            };
            let default = key.default_value().replace(VERSION, version);
            if text != key.default_value() && (*key != Key::Image || text != default) {
                values.set(*key, &text)?;
            }
        }
        Ok(values)
    }

    /// All values as one text, for whoever comes later and must know them.
    pub(crate) fn record(&self) -> String {
        self.nested().to_string()
    }

    /// As Helm has them: nested by the dots of the keys.
    pub(crate) fn nested(&self) -> Value {
        let mut root = Map::new();
        for key in Key::ALL {
            let parts: Vec<_> = key.as_str().split('.').collect();
            insert(&mut root, &parts, key.typed(self.get(*key)));
        }
        Value::Object(root)
    }
}

/// Puts a value at a path. No key is the beginning of another one, which a test holds.
fn insert(map: &mut Map<String, Value>, path: &[&str], value: Value) {
    match path {
        [last] => {
            map.insert((*last).to_owned(), value);
        }
        [first, rest @ ..] => {
            let inner = map.entry(*first).or_insert_with(|| Value::Object(Map::new()));
            if let Value::Object(inner) = inner {
                insert(inner, rest, value);
            }
        }
        [] => {}
    }
}

/// Whether a text has a form; the error is what it should be.
fn check(form: Form, text: &str) -> Result<(), String> {
    let list = || text.split(',').map(str::trim).filter(|entry| !entry.is_empty());
    let (fits, what) = match form {
        Form::Image => (
            !text.is_empty()
                && text.len() <= 512
                && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-/:@".contains(c))
                && text.starts_with(|c: char| c.is_ascii_alphanumeric()),
            "an image, such as registry.example.org/justmtls:0.1.0".to_owned(),
        ),
        Form::Word(words) => (words.contains(&text), format!("one of {}", words.join(", "))),
        Form::TrustDomain => (
            !text.is_empty()
                && text.len() <= 255
                && text.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || b".-_".contains(&c)),
            "a trust domain: letters in lower case, digits, dots, dashes and underscores".to_owned(),
        ),
        Form::Ranges => (
            list().all(|entry| entry.parse::<IpNet>().is_ok()),
            "a list of ranges with commas between them, such as 10.0.0.0/8,fd00::/48".to_owned(),
        ),
        Form::Addresses => (
            list().all(|entry| entry.parse::<IpNet>().is_ok() || entry.parse::<IpAddr>().is_ok()),
            "a list of addresses and ranges with commas between them, such as 10.0.0.1,fd00::/64".to_owned(),
        ),
        Form::Ports => (
            list().all(|entry| entry.parse::<u16>().is_ok_and(|port| port != 0)),
            "a list of ports from 1 to 65535 with commas between them".to_owned(),
        ),
        Form::Number(from, to) => (
            text.parse::<u64>().is_ok_and(|number| (from..=to).contains(&number)),
            format!("a whole number from {from} to {to}"),
        ),
        Form::Time(from, to) => (
            seconds(text).is_some_and(|seconds| (from..=to).contains(&seconds)),
            format!("a time from {from}s to {to}s: a whole number with s, m, h or d behind it"),
        ),
        Form::Path => (
            text.starts_with('/')
                && text.len() > 1
                && !text.ends_with('/')
                && text.len() <= 256
                && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-/".contains(c))
                && text.split('/').all(|part| part != ".."),
            "an absolute path of the node, such as /opt/cni/bin".to_owned(),
        ),
        Form::Namespaces => (
            !text.is_empty()
                && text.split(',').all(|name| {
                    !name.is_empty()
                        && name.len() <= 63
                        && !name.starts_with('-')
                        && !name.ends_with('-')
                        && name.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-')
                }),
            "a list of namespaces with commas and nothing else between them".to_owned(),
        ),
        Form::Quantity => (is_quantity(text), "an amount, such as 100m or 64Mi".to_owned()),
    };
    if fits { Ok(()) } else { Err(what) }
}

/// A time to wait as a command line says it: seconds, or a whole number with a unit as kubectl has it.
///
/// # Errors
/// What to write instead.
pub(crate) fn patience(text: &str) -> Result<u64, &'static str> {
    const WRONG: &str = "write a whole number of seconds, or one with s, m, h or d behind it, such as 90s or 5m";
    text.parse().ok().or_else(|| seconds(text)).filter(|seconds| *seconds <= 86_400).ok_or(WRONG)
}

/// The seconds of a whole number with a unit.
fn seconds(text: &str) -> Option<u64> {
    let unit = match text.chars().next_back()? {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return None,
    };
    text[..text.len() - 1].parse::<u64>().ok()?.checked_mul(unit)
}

fn is_quantity(text: &str) -> bool {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = &text[digits.len()..];
    let is_number = digits.bytes().all(|c| c.is_ascii_digit() || c == b'.')
        && digits.starts_with(|c: char| c.is_ascii_digit())
        && digits.ends_with(|c: char| c.is_ascii_digit());
    is_number
        && digits.parse::<f64>().is_ok_and(|number| number > 0.0)
        && ["", "m", "k", "M", "G", "Ki", "Mi", "Gi"].contains(&unit)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn words(words: &[&str]) -> Result<Values, WrongValue> {
        Values::from_words(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn a_time_to_wait_is_seconds_or_has_a_unit() {
        assert_eq!((patience("40"), patience("40s"), patience("2m")), (Ok(40), Ok(40), Ok(120)));
        for wrong in ["", "s", "2w", "-1", "1.5m", "25h"] {
            assert!(patience(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn each_default_has_the_form_of_its_key() {
        for key in Key::ALL {
            assert_eq!(check(key.form(), key.default_value()), Ok(()), "{}", key.as_str());
            assert!(key.about().ends_with('.'), "{}", key.as_str());
        }
    }

    #[test]
    fn no_key_is_the_beginning_of_another() {
        for key in Key::ALL {
            let within = format!("{}.", key.as_str());
            assert!(!Key::ALL.iter().any(|other| other.as_str().starts_with(&within)), "{}", key.as_str());
        }
        assert_eq!(Values::default().nested()["cni"]["binDir"], "/opt/cni/bin");
        assert_eq!(Values::default().nested()["replicas"], 2);
        assert_eq!(Values::default().nested()["criticalPodsQuota"], false);
    }

    #[test]
    fn a_wrong_word_is_one_sentence_with_what_there_is() {
        let refused = |word: &str| words(&[word]).unwrap_err().to_string();
        assert_eq!(refused("replicas"), "--set replicas: there is no `=`; write KEY=VALUE, as in --set replicas=3");
        assert!(refused("replica=3").contains("there is no key replica; there are image, "));
        assert_eq!(refused("replicas=0"), "--set replicas=0: \"0\" is not a whole number from 1 to 9");
        for wrong in [
            "image=",
            "image=a b",
            "imagePullPolicy=always",
            "trustDomain=Example.org",
            "insideCIDRs=10.0.0.0",
            "excludedPorts=0",
            "apiServerAddresses=10.0.0",
            "apiServerAddresses=kubernetes.default",
            "viewLifetime=5",
            "viewLifetime=301s",
            "leafValidity=59s",
            "drain=30m",
            "cni.binDir=opt/cni",
            "cni.binDir=/opt/../etc",
            "cni.exempt=kube-system, a",
            "resources.proxy.memory=64mb",
            "resources.proxy.cpu=-1",
            "criticalPodsQuota=yes",
        ] {
            assert!(words(&[wrong]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_last_word_for_a_key_counts() {
        let values = words(&["replicas=3", "replicas=04", "insideCIDRs=10.0.0.0/8, fd00::/48"]).unwrap();
        assert_eq!(values.get(Key::Replicas), "4", "in one spelling");
        assert_eq!(values.get(Key::InsideRanges), "10.0.0.0/8, fd00::/48");
    }

    #[test]
    fn what_was_said_is_not_overruled_by_what_was_detected() {
        let mut values = words(&["cni.binDir=/my/bin"]).unwrap();
        assert!(!values.suggest(Key::CniBinDir, "/other/bin"));
        assert!(values.suggest(Key::CniConfDir, "/other/conf"));
        assert_eq!((values.get(Key::CniBinDir), values.get(Key::CniConfDir)), ("/my/bin", "/other/conf"));
    }

    #[test]
    fn a_record_is_read_back_as_the_values() {
        let values = words(&["replicas=3", "cni.binDir=/x", "criticalPodsQuota=true", "image=a:1"]).unwrap();
        assert_eq!(Values::from_record(&values.record(), VERSION), Ok(values));
        assert!(Values::from_record("{", VERSION).is_err());
        assert!(Values::from_record("{\"replicas\":77}", VERSION).is_err());
        assert_eq!(Values::from_record("{\"gone\":1}", VERSION), Ok(Values::default()));
    }

    #[test]
    fn what_is_said_now_is_over_what_was_said_then() {
        let then = words(&["replicas=3", "drain=5"]).unwrap();
        let both = then.overlaid(&words(&["replicas=4"]).unwrap());
        assert_eq!((both.get(Key::Replicas), both.get(Key::Drain)), ("4", "5"));
    }

    proptest! {
        #[test]
        fn any_word_is_taken_or_refused_in_one_line(word in "\\PC{0,40}", key in 0..Key::ALL.len()) {
            let word = format!("{}={word}", Key::ALL[key].as_str());
            if let Err(why) = Values::from_words(std::slice::from_ref(&word)) {
                prop_assert!(!why.to_string().contains('\n'));
            }
        }
    }
}
