//! Rules that one file can break by itself.

use super::Violation;
use super::house::SYSCALL_ROOM;
use super::lexer::{Views, line_of, tokens, word_offsets};
use super::modules::TestCode;
use super::tree::Tree;

/// Longer files are read by nobody from top to bottom.
const MOST_LINES: usize = 600;

/// Files that others wrote, or that a tool writes.
const NOT_OURS: &[&str] = &["LICENSE", "Cargo.lock"];

pub(crate) fn files_are_short(tree: &Tree) -> Vec<Violation> {
    let long =
        tree.rust_files().map(|(path, text)| (path, text.lines().count())).filter(|(_, lines)| *lines > MOST_LINES);
    let remedy = "split it where its two subjects part";
    long.map(|(path, lines)| Violation::new(path, lines, format!("{lines} lines, more than {MOST_LINES}"), remedy))
        .collect()
}

pub(crate) fn unsafe_stays_in_its_room(tree: &Tree) -> Vec<Violation> {
    let room = format!("crates/{SYSCALL_ROOM}/src/");
    let remedy = format!("put a safe function into {room} and call it");
    let mut violations = Vec::new();
    for (path, text) in tree.rust_files().filter(|(path, _)| !path.starts_with(&room)) {
        for offset in word_offsets(&Views::of(text).code, "unsafe") {
            violations.push(Violation::new(
                path,
                line_of(text, offset),
                "unsafe code outside the syscall room",
                remedy.clone(),
            ));
        }
    }
    violations
}

/// A finished handshake does not show who judged it: the proof that `identity` makes of one is worth something only
/// while no other code can give rustls a verifier.
pub(crate) fn verifiers_stay_in_their_room(tree: &Tree) -> Vec<Violation> {
    const ROOM: &str = "crates/identity/";
    let mut violations = Vec::new();
    for (path, text) in tree.rust_files().filter(|(path, _)| path.starts_with("crates/") && !path.starts_with(ROOM)) {
        let code = Views::of(text).code;
        for name in
            ["dangerous", "with_custom_certificate_verifier", "with_client_cert_verifier", "with_no_client_auth"]
        {
            for offset in word_offsets(&code, name) {
                let what = format!("`{name}` outside {ROOM}");
                violations.push(Violation::new(
                    path,
                    line_of(text, offset),
                    what,
                    "take the configuration from identity::tls",
                ));
            }
        }
    }
    violations
}

pub(crate) fn unsafe_gives_its_reason(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (path, text) in tree.rust_files() {
        let views = Views::of(text);
        let comments: Vec<&str> = views.comments.lines().collect();
        let tokens = tokens(&views.code);
        for pair in
            tokens.windows(2).filter(|pair| pair[0].text == "unsafe" && (pair[1].text == "{" || pair[1].text == "impl"))
        {
            let line = line_of(text, pair[0].offset);
            let above = &comments[line.saturating_sub(8)..line];
            if !above.iter().any(|comment| comment.contains("SAFETY:")) {
                let remedy = "say above it in a `// SAFETY:` comment why no rule of the language is broken";
                violations.push(Violation::new(path, line, "unsafe without its reason", remedy));
            }
        }
    }
    violations
}

pub(crate) fn no_unfinished_work(tree: &Tree) -> Vec<Violation> {
    // Put together here, so that this file does not contain them.
    let marks = [concat!("FIX", "ME"), concat!("XX", "X"), concat!("TO", "DO")];
    let macros = ["todo", "unimplemented", "dbg"];
    let mut violations = Vec::new();
    for (path, text) in tree.rust_files() {
        let views = Views::of(text);
        for mark in marks {
            for offset in word_offsets(&views.comments, mark) {
                let remedy = "finish it, or name the limit in SPECIFICATION.md";
                violations.push(Violation::new(path, line_of(text, offset), format!("`{mark}`"), remedy));
            }
        }
        for name in macros {
            for offset in word_offsets(&views.code, name) {
                if views.code[offset + name.len()..].starts_with('!') {
                    violations.push(Violation::new(
                        path,
                        line_of(text, offset),
                        format!("`{name}!`"),
                        "finish it, or take it out",
                    ));
                }
            }
        }
        for pair in tokens(&views.code).windows(3).filter(|three| three[0].text == "#" && three[1].text == "[") {
            if pair[2].text == "ignore" {
                let remedy = "make it run everywhere, or let it announce its skip with a reason";
                violations.push(Violation::new(path, line_of(text, pair[0].offset), "an ignored test", remedy));
            }
        }
    }
    violations
}

pub(crate) fn no_sleeping_tests(tree: &Tree) -> Vec<Violation> {
    let test_code = TestCode::of(tree);
    let remedy = "wait for the condition itself: a readiness line, a channel, a socket";
    let mut violations = Vec::new();
    for (path, text) in tree.rust_files() {
        let code = Views::of(text).code;
        for offset in word_offsets(&code, "sleep") {
            let line = line_of(text, offset);
            let called = ["thread::", "time::"].iter().any(|module| code[..offset].ends_with(module));
            if called && test_code.contains(path, line) {
                violations.push(Violation::new(path, line, "a test that sleeps", remedy));
            }
        }
    }
    violations
}

pub(crate) fn no_machine_paths(tree: &Tree) -> Vec<Violation> {
    let folders = ["root", "home", "work", "tmp"].map(|name| format!("/{name}/"));
    let remedy = "take the place from the environment, an argument or a temporary folder";
    let mut violations = Vec::new();
    for (path, text) in tree.files.iter().filter(|(path, _)| !NOT_OURS.contains(&path.as_str())) {
        for (index, line) in text.lines().enumerate() {
            for folder in &folders {
                if line.match_indices(folder).any(|(at, _)| starts_a_path(line, at)) {
                    violations.push(Violation::new(
                        path,
                        index + 1,
                        format!("a path of one machine, `{folder}`"),
                        remedy,
                    ));
                }
            }
        }
    }
    violations
}

/// Whether the `/` at this place begins a path, rather than being inside a longer one.
fn starts_a_path(line: &str, at: usize) -> bool {
    !line[..at]
        .ends_with(|before: char| before.is_alphanumeric() || matches!(before, '.' | '_' | '-' | '/' | '}' | '>'))
}

#[cfg(test)]
mod tests {
    use super::super::tree::fake::{files, library};
    use super::*;

    fn one(path: &str, text: &str) -> Tree {
        Tree { crates: vec![library("mesh", &[]), library("linux", &[])], ..files(&[(path, text)]) }
    }

    #[test]
    fn a_long_file_is_named_and_one_at_the_limit_is_not() {
        assert_eq!(files_are_short(&one("crates/mesh/src/lib.rs", &"\n".repeat(601))).len(), 1);
        assert_eq!(files_are_short(&one("crates/mesh/src/lib.rs", &"\n".repeat(600))), []);
    }

    #[test]
    fn unsafe_is_seen_in_code_and_not_in_words() {
        assert_eq!(unsafe_stays_in_its_room(&one("crates/mesh/src/lib.rs", "fn a() { unsafe { b() } }")).len(), 1);
        let harmless = "#![forbid(unsafe_code)]\n// unsafe\nconst A: &str = \"unsafe\";";
        assert_eq!(unsafe_stays_in_its_room(&one("crates/mesh/src/lib.rs", harmless)), []);
        assert_eq!(unsafe_stays_in_its_room(&one("crates/linux/src/lib.rs", "unsafe fn a() {}")), []);
    }

    #[test]
    fn only_identity_gives_rustls_a_verifier() {
        let code = "fn a() { builder.dangerous().with_custom_certificate_verifier(b) }";
        assert_eq!(verifiers_stay_in_their_room(&one("crates/proxy/src/tunnel.rs", code)).len(), 2);
        assert_eq!(verifiers_stay_in_their_room(&one("crates/identity/src/tls.rs", code)), []);
    }

    #[test]
    fn unsafe_needs_a_reason_above_it() {
        assert_eq!(unsafe_gives_its_reason(&one("crates/linux/src/lib.rs", "fn a() {\n unsafe { b() }\n}")).len(), 1);
        let reasoned = "fn a() {\n // SAFETY: b has no conditions.\n unsafe { b() }\n}";
        assert_eq!(unsafe_gives_its_reason(&one("crates/linux/src/lib.rs", reasoned)), []);
    }

    #[test]
    fn unfinished_work_is_named() {
        let unfinished = format!("fn a() {{ todo!() }} // {}\n#[ignore = \"x\"]\nfn b() {{}}", concat!("FIX", "ME"));
        assert_eq!(no_unfinished_work(&one("crates/mesh/src/lib.rs", &unfinished)).len(), 3);
        assert_eq!(no_unfinished_work(&one("crates/mesh/src/lib.rs", "fn todo() { ignore(\"todo!\") }")), []);
    }

    #[test]
    fn only_tests_may_not_sleep() {
        let product = "fn a() { std::thread::sleep(x) }\n";
        assert_eq!(no_sleeping_tests(&one("crates/mesh/src/lib.rs", product)), []);
        let test = format!("#[cfg(test)]\nmod tests {{\n{product}}}\n");
        assert_eq!(no_sleeping_tests(&one("crates/mesh/src/lib.rs", &test))[0].line, 3);
    }

    #[test]
    fn paths_of_one_machine_are_seen_wherever_they_are() {
        let place = concat!("/ho", "me/");
        assert_eq!(no_machine_paths(&one("README.md", &format!("see `{place}me/x`"))).len(), 1);
        assert_eq!(no_machine_paths(&one("README.md", &format!("https://example.org{place}x and a{place}b"))), []);
    }
}
