//! Walks an object and notes what is wrong, by path.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::names::{self, Form};
use crate::path::{Path, Step};
use crate::problem::{Severity, quoted};
use crate::tree::Node;

/// What is wrong with a field.
pub(crate) struct Finding {
    pub(crate) severity: Severity,
    pub(crate) path: Path,
    pub(crate) message: String,
    pub(crate) remedy: String,
}

impl Finding {
    pub(crate) fn error(path: Path, message: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding { severity: Severity::Error, path, message: message.into(), remedy: remedy.into() }
    }

    pub(crate) fn warning(path: Path, message: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding { severity: Severity::Warning, path, message: message.into(), remedy: remedy.into() }
    }
}

/// Where in the object a check is, and what was found so far.
pub(crate) struct Checker<'a> {
    tree: Option<&'a Node>,
    path: Path,
    found: Vec<Finding>,
}

impl<'a> Checker<'a> {
    pub(crate) fn new(tree: Option<&'a Node>) -> Checker<'a> {
        Checker { tree, path: Path::default(), found: Vec::new() }
    }

    pub(crate) fn finish(self) -> Vec<Finding> {
        self.found
    }

    /// Checks a member.
    pub(crate) fn key<T>(&mut self, key: &str, check: impl FnOnce(&mut Checker<'a>) -> T) -> T {
        self.below(Step::Key(key.to_owned()), check)
    }

    /// Checks a member of a member.
    pub(crate) fn keys<T>(&mut self, keys: &[&str], check: impl FnOnce(&mut Checker<'a>) -> T) -> T {
        match keys {
            [] => check(self),
            [key, rest @ ..] => self.key(key, |checker| checker.keys(rest, check)),
        }
    }

    /// Checks each item of a list.
    pub(crate) fn each<'i, I: 'i>(
        &mut self,
        key: &str,
        items: impl IntoIterator<Item = &'i I>,
        mut check: impl FnMut(&mut Checker<'a>, &'i I),
    ) {
        self.key(key, |checker| {
            for (index, item) in items.into_iter().enumerate() {
                checker.below(Step::Index(index), |checker| check(checker, item));
            }
        });
    }

    fn below<T>(&mut self, step: Step, check: impl FnOnce(&mut Checker<'a>) -> T) -> T {
        self.path.0.push(step);
        let result = check(self);
        self.path.0.pop();
        result
    }

    pub(crate) fn error(&mut self, message: impl Into<String>, remedy: impl Into<String>) {
        self.found.push(Finding::error(self.path.clone(), message, remedy));
    }

    /// A field that must be there is not.
    pub(crate) fn missing(&mut self, key: &str, remedy: impl Into<String>) {
        self.key(key, |checker| checker.error("is missing", remedy));
    }

    /// Whether the field is known not to be written. Types that cannot say "absent" hold 0 or "" then.
    fn is_absent(&self) -> bool {
        self.tree.is_some_and(|tree| tree.find(&self.path).is_none())
    }

    pub(crate) fn port(&mut self, key: &str, port: i32) {
        self.key(key, |checker| {
            if !(1..=65535).contains(&port) {
                let message = if port == 0 && checker.is_absent() {
                    "is missing".to_owned()
                } else {
                    format!("{port} is not a port")
                };
                checker.error(message, "use a number from 1 to 65535");
            }
        });
    }

    /// A port where 0 and absence mean "none".
    pub(crate) fn optional_port(&mut self, key: &str, port: Option<i32>) {
        if let Some(port) = port.filter(|port| *port != 0) {
            self.port(key, port);
        }
    }

    /// A port of a container by number or by name.
    pub(crate) fn target_port(&mut self, key: &str, port: &IntOrString) {
        match port {
            IntOrString::Int(port) => self.port(key, *port),
            IntOrString::String(name) => self.name(key, name, &names::PORT),
        }
    }

    pub(crate) fn name(&mut self, key: &str, name: &str, form: &Form) {
        self.key(key, |checker| {
            if name.is_empty() && checker.is_absent() {
                checker.error("is missing", form.remedy);
            } else if !(form.matches)(name) {
                let name = if name.is_empty() { "an empty name".to_owned() } else { quoted(name) };
                checker.error(format!("{name} is not allowed"), form.remedy);
            }
        });
    }

    pub(crate) fn optional_name(&mut self, key: &str, name: Option<&str>, form: &Form) {
        if let Some(name) = name.filter(|name| !name.is_empty()) {
            self.name(key, name, form);
        }
    }

    /// Labels, by keys and values.
    pub(crate) fn labels(&mut self, key: &str, labels: Option<&BTreeMap<String, String>>) {
        self.key(key, |checker| {
            for (label, value) in labels.into_iter().flatten() {
                checker.key(label, |checker| {
                    if !(names::LABEL_KEY.matches)(label) {
                        checker.error("the key is not that of a label", names::LABEL_KEY.remedy);
                    }
                    if !(names::LABEL_VALUE.matches)(value) {
                        checker
                            .error(format!("{} is not the value of a label", quoted(value)), names::LABEL_VALUE.remedy);
                    }
                });
            }
        });
    }

    /// One of a closed set of words.
    pub(crate) fn word(&mut self, key: &str, word: Option<&str>, known: &[&str]) {
        if let Some(word) = word.filter(|word| !known.contains(word)) {
            self.key(key, |checker| {
                checker.error(format!("{} is not known", quoted(word)), format!("use {}", known.join(" or ")))
            });
        }
    }

    pub(crate) fn protocol(&mut self, protocol: Option<&str>) {
        self.word("protocol", protocol, &["TCP", "UDP", "SCTP"]);
    }

    pub(crate) fn address(&mut self, key: &str, address: Option<&str>) {
        if let Some(address) = address.filter(|address| !address.is_empty() && address.parse::<IpAddr>().is_err()) {
            self.key(key, |checker| {
                checker.error(format!("{} is not an IP address", quoted(address)), "write an IPv4 or IPv6 address");
            });
        }
    }

    pub(crate) fn addresses<'i>(&mut self, key: &str, addresses: Option<&'i Vec<String>>) {
        self.each(key, addresses.into_iter().flatten(), |checker, address: &'i String| {
            if address.parse::<IpAddr>().is_err() {
                checker.error(format!("{} is not an IP address", quoted(address)), "write an IPv4 or IPv6 address");
            }
        });
    }

    /// A user or group id.
    pub(crate) fn id(&mut self, key: &str, id: Option<i64>) {
        if let Some(id) = id.filter(|id| !(0..=i64::from(i32::MAX)).contains(id)) {
            self.key(key, |checker| {
                checker.error(format!("{id} is not a user or group id"), "use a number from 0 to 2147483647")
            });
        }
    }

    /// Notes a value that was there before in a list.
    pub(crate) fn unique<T: Ord>(&mut self, key: &str, seen: &mut BTreeSet<T>, value: T, shown: &str) {
        if !seen.insert(value) {
            self.key(key, |checker| {
                checker.error(format!("{} is there twice", quoted(shown)), "change or remove one of the two")
            });
        }
    }
}
