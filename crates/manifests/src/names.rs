//! The forms of names that the API server takes, and the names that it gives.

/// The namespaces that every cluster has for itself.
pub const SYSTEM_NAMESPACES: [&str; 3] = ["kube-system", "kube-public", "kube-node-lease"];

/// A form of name: what it is called, and who has it.
pub(crate) struct Form {
    /// Says what is allowed, after "use".
    pub(crate) remedy: &'static str,
    pub(crate) matches: fn(&str) -> bool,
}

/// RFC 1123 label: names of namespaces, containers and ports of Services.
pub(crate) const LABEL: Form = Form {
    remedy: "use at most 63 of a-z, 0-9 and -, with a letter or digit first and last",
    matches: |name| name.len() <= 63 && is_label(name),
};

/// RFC 1035 label: names of Services.
pub(crate) const SERVICE: Form = Form {
    remedy: "use at most 63 of a-z, 0-9 and -, with a letter first and no - last",
    matches: |name| name.len() <= 63 && is_label(name) && name.starts_with(|first: char| first.is_ascii_lowercase()),
};

/// RFC 1123 subdomain: names of most objects.
pub(crate) const SUBDOMAIN: Form = Form {
    remedy: "use at most 253 of a-z, 0-9, - and ., with a letter or digit first and last in each part",
    matches: |name| name.len() <= 253 && name.split('.').all(is_label),
};

/// RFC 6335 service name: names of ports of containers.
pub(crate) const PORT: Form = Form {
    remedy: "use at most 15 of a-z, 0-9 and single -, at least one letter, and no - first or last",
    matches: |name| {
        name.len() <= 15 && is_label(name) && !name.contains("--") && name.contains(|c: char| c.is_ascii_lowercase())
    },
};

/// Values of labels.
pub(crate) const LABEL_VALUE: Form = Form {
    remedy: "use at most 63 letters, digits, -, _ and ., with a letter or digit first and last",
    matches: |value| value.is_empty() || is_qualified(value),
};

/// Keys of labels and annotations: a name, after a subdomain and a slash if it is not the user's own.
pub(crate) const LABEL_KEY: Form = Form {
    remedy: "use at most 63 letters, digits, -, _ and ., after a domain and / if there is one",
    matches: |key| match key.split_once('/') {
        Some((prefix, name)) => (SUBDOMAIN.matches)(prefix) && is_qualified(name),
        None => is_qualified(key),
    },
};

/// Keys of a ConfigMap.
pub(crate) const CONFIG_KEY: Form = Form {
    remedy: "use at most 253 letters, digits, -, _ and .",
    matches: |key| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !key.is_empty() && key.len() <= 253 && key.chars().all(allowed) && !key.starts_with("..") && key != "."
    },
};

fn is_label(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    !name.is_empty() && name.bytes().all(inner) && !name.starts_with('-') && !name.ends_with('-')
}

fn is_qualified(name: &str) -> bool {
    let end = |c: char| c.is_ascii_alphanumeric();
    name.len() <= 63
        && name.starts_with(end)
        && name.ends_with(end)
        && name.chars().all(|c| end(c) || "-_.".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_as_the_api_server_takes_them() {
        let rows: &[(&Form, &[&str], &[&str])] = &[
            (&LABEL, &["a", "0", "a-b", "9a"], &["", "-a", "a-", "A", "a.b", "a_b", "é"]),
            (&SERVICE, &["a", "a-1"], &["1a", "", "a.b", "a-"]),
            (&SUBDOMAIN, &["a", "a.b", "0.1-2"], &["", ".", "a..b", "a.", "-a.b", "A"]),
            (&PORT, &["http", "a1", "1a"], &["1", "a--b", "http-", "HTTP", "sixteen-letters-", "sixteenlettersab"]),
            (&LABEL_VALUE, &["", "A.b_c-d", "1"], &["*", "-a", "a b", "a/b"]),
            (&LABEL_KEY, &["app", "justmtls.dev/mode", "a_b"], &["", "/a", "a/", "a/b/c", "A.B/c"]),
            (&CONFIG_KEY, &["trustDomain", ".x", "a_b.c"], &["", ".", "..", "..a", "a b", "a/b"]),
        ];
        for (form, good, bad) in rows {
            for name in *good {
                assert!((form.matches)(name), "{name}: {}", form.remedy);
            }
            for name in *bad {
                assert!(!(form.matches)(name), "{name}: {}", form.remedy);
            }
        }
        let long = "a".repeat(64);
        assert!(
            !(LABEL.matches)(&long)
                && (SUBDOMAIN.matches)(&long)
                && !(LABEL_VALUE.matches)(&long)
                && !(LABEL_KEY.matches)(&long)
        );
    }
}
