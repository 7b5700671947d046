//! Names, namespaces and labels of any object.

use crate::names::{LABEL, LABEL_KEY, SERVICE, SUBDOMAIN};
use crate::object::{Kind, Object};

use super::Checker;

pub(super) fn check(checker: &mut Checker<'_>, object: &Object) {
    let kind = object.kind();
    let metadata = object.metadata();
    let form = match kind {
        Kind::Namespace => LABEL,
        Kind::Service => SERVICE,
        _ => SUBDOMAIN,
    };
    checker.key("metadata", |checker| {
        checker.name("name", metadata.name.as_deref().unwrap_or_default(), &form);
        match metadata.namespace.as_deref() {
            Some(namespace) if kind.is_namespaced() => checker.name("namespace", namespace, &LABEL),
            Some(_) => checker
                .key("namespace", |checker| checker.error(format!("a {kind} is in no namespace"), "remove the field")),
            None => {}
        }
        checker.labels("labels", metadata.labels.as_ref());
        checker.key("annotations", |checker| {
            for key in metadata.annotations.iter().flat_map(|annotations| annotations.keys()) {
                // The API server takes capitals in the domain of an annotation, and only there.
                if !(LABEL_KEY.matches)(&key.to_ascii_lowercase()) {
                    checker.key(key, |checker| checker.error("the key is not that of an annotation", LABEL_KEY.remedy));
                }
            }
        });
    });
}
