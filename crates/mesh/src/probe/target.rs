//! The target of a probe's request, as the kubelet makes it of the path that is declared: by Go's `net/url`, which takes it for
//! a URL, and where it is none for a path.

/// What stands in the request line; `None` where no server would read it, or it is not to be foreseen.
pub(super) fn requested(declared: &str) -> Option<String> {
    let as_path = || Some(rooted(escaped(declared.as_bytes())));
    let (url, fragment) = declared.split_once('#').unwrap_or((declared, ""));
    let scheme = scheme(url);
    // Behind a scheme that is followed by no slash everything goes into the request as it stands, and its Host is empty.
    let rest = &url[scheme..];
    if scheme > 0 && !rest.starts_with('/') {
        return None;
    }
    let (path, query) = parts(rest);
    let path = match path.strip_prefix("//") {
        Some(after) if scheme > 0 || !after.starts_with('/') => {
            let (host, path) = after.split_at(after.find('/').unwrap_or(after.len()));
            // The pod's own address takes its place. In others there may be a port, or what makes it no host.
            let is_plain = host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-.".contains(&byte));
            is_plain.then_some(path)?
        }
        _ => path,
    };
    let is_relative = scheme == 0 && !path.starts_with('/');
    let has_colon = path.split('/').next().is_some_and(|first| first.contains(':'));
    let has_control = url.bytes().any(|byte| byte.is_ascii_control());
    if has_control || !is_escaped(path) || !is_escaped(fragment) || (is_relative && has_colon) {
        return as_path();
    }
    let mut target = rooted(if path.bytes().all(may_stay) { path.to_owned() } else { escaped(&unescaped(path)) });
    if let Some(query) = query {
        // A blank would end the target.
        if query.contains(' ') {
            return None;
        }
        target.push('?');
        target.push_str(query);
    }
    Some(target)
}

/// Whether it is the target of a request: one word, from the root.
pub(super) fn is_one(target: &str) -> bool {
    target.starts_with('/') && !target.bytes().any(|byte| byte <= b' ' || byte == 0x7f || byte == b'#')
}

/// Whether two targets are the same but for the way in which they are escaped. What is sent is the declared one.
pub(super) fn is_same(one: &str, other: &str) -> bool {
    let unescaped = |target| {
        let (path, query) = parts(target);
        (unescaped(path), query.map(unescaped))
    };
    unescaped(one) == unescaped(other)
}

/// Path and query.
fn parts(target: &str) -> (&str, Option<&str>) {
    target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)))
}

/// How long the scheme is that a URL begins with, its colon included: 0 where there is none.
fn scheme(url: &str) -> usize {
    let name = |byte: u8| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte);
    match url.bytes().position(|byte| !name(byte)) {
        Some(end) if url.as_bytes()[end] == b':' && url.starts_with(|first: char| first.is_ascii_alphabetic()) => {
            end + 1
        }
        _ => 0,
    }
}

fn rooted(path: String) -> String {
    if path.starts_with('/') { path } else { format!("/{path}") }
}

/// Whether each `%` has two digits behind it.
fn is_escaped(text: &str) -> bool {
    let mut rest = text.as_bytes();
    while let Some(at) = rest.iter().position(|byte| *byte == b'%') {
        let Some([_, high, low]) = rest[at..].first_chunk::<3>() else { return false };
        if !high.is_ascii_hexdigit() || !low.is_ascii_hexdigit() {
            return false;
        }
        rest = &rest[at + 3..];
    }
    true
}

/// Whether a path with this byte is left as it was declared.
fn may_stay(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-_.~!$&'()*+,;=:@[]/%".contains(&byte)
}

/// A path of which something had to be escaped.
fn escaped(path: &[u8]) -> String {
    let mut escaped = String::new();
    for byte in path {
        if byte.is_ascii_alphanumeric() || b"-_.~$&+,/:;=@".contains(byte) {
            escaped.push(char::from(*byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

fn unescaped(text: &str) -> Vec<u8> {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    loop {
        let hex = |digit: &u8| char::from(*digit).to_digit(16).and_then(|number| u8::try_from(number).ok());
        rest = match rest {
            [] => return bytes,
            [b'%', high, low, after @ ..] if hex(high).is_some() && hex(low).is_some() => {
                bytes.push(hex(high).unwrap_or_default() << 4 | hex(low).unwrap_or_default());
                after
            }
            [byte, after @ ..] => {
                bytes.push(*byte);
                after
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What Go 1.26 makes of them, by `url.Parse`, `URL.String` and `http.NewRequest`, as the kubelet uses those.
    #[test]
    fn a_target_is_what_go_makes_of_the_path() {
        for (declared, requested) in [
            ("", "/"),
            ("foo", "/foo"),
            ("*", "/*"),
            ("?a", "/?a"),
            ("/q?", "/q?"),
            ("/q??", "/q??"),
            ("/q?x=a|b", "/q?x=a|b"),
            ("/q?x={a}", "/q?x={a}"),
            ("/q?x=\"a\"", "/q?x=\"a\""),
            ("/q?x=100%", "/q?x=100%"),
            ("/q?x=ü", "/q?x=ü"),
            ("/q?`^\\<>", "/q?`^\\<>"),
            ("/q?a=%zz&b", "/q?a=%zz&b"),
            ("/q?a\tb", "/q%3Fa%09b"),
            ("/q?a#f?g", "/q?a"),
            ("/x%zz?a=b#c", "/x%25zz%3Fa=b%23c"),
            ("/a#b%zz", "/a%23b%25zz"),
            ("/a#\t", "/a"),
            ("/a b/ü%2f%zz", "/a%20b/%C3%BC%252f%25zz"),
            ("/a[1]'", "/a[1]'"),
            ("/a%5B", "/a%5B"),
            ("/%ff", "/%ff"),
            ("/{x}", "/%7Bx%7D"),
            ("/a*(b)!$&'+,;=@~", "/a*(b)!$&'+,;=@~"),
            ("/%2e%2e/../x", "/%2e%2e/../x"),
            ("/a:b", "/a:b"),
            ("1a:b", "/1a:b"),
            ("/a//b", "/a//b"),
            ("///x", "///x"),
            ("//healthz", "/"),
            ("//healthz/x?y", "/x?y"),
            ("http://example.com/x", "/x"),
        ] {
            assert_eq!(super::requested(declared).as_deref(), Some(requested), "{declared}");
        }
        for none in ["foo:bar", "a:b/c", "/q?a b", "//[::1", "//x:y/z"] {
            assert_eq!(super::requested(none), None, "{none}");
        }
    }

    proptest! {
        #[test]
        fn a_target_is_one_word_that_begins_with_a_slash(declared in r#"[a/:?#%"| \t\n\r{}\[\]é2f]{0,12}"#) {
            if let Some(target) = requested(&declared) {
                prop_assert!(is_one(&target), "{target}");
            }
        }
    }
}
