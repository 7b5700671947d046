//! What the documents claim, held against the tree.

use super::Violation;
use super::lexer::{Views, is_word, line_of, word_offsets};
use super::modules::{Declarations, top_level};
use super::tree::Tree;
use std::collections::BTreeSet;

const SPECIFICATION: &str = "SPECIFICATION.md";
const ARCHITECTURE: &str = "ARCHITECTURE.md";

/// A promise without a test is a hope: each row `| P<n> |` names tests, each row `| T<n> |` or `| D<n> |` names tests or
/// says that it is a limit, and each test named anywhere exists.
pub(crate) fn promises_name_tests(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (index, line) in tree.text(SPECIFICATION).lines().enumerate() {
        let tests: Vec<(&str, &str)> = code_spans(line).filter_map(test_reference).collect();
        if row_id(line).is_some_and(|id| id.starts_with('P')) && tests.is_empty() {
            let remedy = "add the test as `path/file.rs::function`, or move the row to what is not promised yet";
            violations.push(Violation::new(SPECIFICATION, index + 1, "a promise that no test holds", remedy));
        }
        if row_id(line).is_some_and(|id| id.starts_with(['T', 'D'])) && tests.is_empty() && !line.contains("**Limit**")
        {
            let remedy = "add the test, or say in the row what the **Limit** is";
            violations.push(Violation::new(SPECIFICATION, index + 1, "a trap or decision that nothing holds", remedy));
        }
        for (file, function) in tests {
            let exists = Declarations::of(tree.text(file)).tests.iter().any(|(name, _)| name == function);
            if !exists {
                let what = format!("there is no test `{function}` in {file}");
                violations.push(Violation::new(SPECIFICATION, index + 1, what, "name the test that holds this now"));
            }
        }
    }
    if !tree.files.contains_key(SPECIFICATION) {
        violations.push(Violation::new(
            SPECIFICATION,
            0,
            "the file is missing",
            "write down what the product promises",
        ));
    }
    violations
}

/// A comment may cite a rule by its id, a `T` or `D` and a number, only if the reader can look it up.
pub(crate) fn cited_rules_are_explained(tree: &Tree) -> Vec<Violation> {
    let explained: BTreeSet<&str> = tree.text(SPECIFICATION).lines().filter_map(row_id).collect();
    let mut violations = Vec::new();
    for (path, text) in tree.rust_files() {
        let comments = Views::of(text).comments;
        for (offset, id) in citations(&comments).filter(|(_, id)| !explained.contains(id)) {
            let what = format!("`{id}` is explained nowhere");
            violations.push(Violation::new(
                path,
                line_of(text, offset),
                what,
                "add its row to SPECIFICATION.md, or say it in words",
            ));
        }
    }
    violations
}

/// A section between `<!-- names of FILE TYPE -->` and `<!-- end of names -->` lists, in the first cell of its rows,
/// all names that the `as_str` of that type gives, and no other.
pub(crate) fn closed_sets_are_complete(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    let mut section: Option<(&str, usize, BTreeSet<String>)> = None;
    for (index, line) in tree.text(SPECIFICATION).lines().enumerate() {
        if let Some(source) = line.strip_prefix("<!-- names of ").and_then(|rest| rest.strip_suffix(" -->")) {
            section = Some((source, index + 1, BTreeSet::new()));
        } else if line == "<!-- end of names -->" {
            let Some((source, start, listed)) = section.take() else {
                continue;
            };
            let (file, kind) = source.split_once(' ').unwrap_or((source, ""));
            let given = names_given_by(tree.text(file), kind);
            for missing in given.difference(&listed) {
                let what = format!("`{missing}` of {kind} is not listed");
                violations.push(Violation::new(
                    SPECIFICATION,
                    start,
                    what,
                    "add its row: when it happens and what to do",
                ));
            }
            for unknown in listed.difference(&given) {
                let what = format!("{kind} of {file} gives no name `{unknown}`");
                violations.push(Violation::new(SPECIFICATION, start, what, "take its row out"));
            }
        } else if let (Some((_, _, listed)), Some(cell)) = (&mut section, line.strip_prefix('|')) {
            let cell = cell.split('|').next().unwrap_or("");
            listed.extend(code_spans(cell).map(str::to_owned));
        }
    }
    violations
}

/// ARCHITECTURE.md names every crate and every module at the top of one as `` `crate` `` and `` `crate::module` ``,
/// and no module that is not there.
pub(crate) fn the_map_is_true(tree: &Tree) -> Vec<Violation> {
    let map = tree.text(ARCHITECTURE);
    let named: BTreeSet<&str> = map.lines().flat_map(code_spans).collect();
    let mut violations = Vec::new();
    for member in &tree.crates {
        let modules = top_level(tree, member);
        let missing = std::iter::once(member.name.clone())
            .chain(modules.keys().map(|module| format!("{}::{module}", member.name)));
        for name in missing.filter(|name| !named.contains(name.as_str())) {
            let remedy = "give it its sentence: what it is and what it does not know";
            violations.push(Violation::new(ARCHITECTURE, 0, format!("`{name}` is not on the map"), remedy));
        }
        let root = member.root().map_or("", |root| tree.text(root));
        for (index, line) in map.lines().enumerate() {
            for span in code_spans(line) {
                let Some((name, rest)) = span.split_once("::").filter(|(name, _)| *name == member.name) else {
                    continue;
                };
                let first: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                let re_exported = root.split(|c: char| !(c.is_alphanumeric() || c == '_')).any(|word| word == first);
                if !modules.contains_key(&first) && !re_exported {
                    let what = format!("`{name}::{first}` does not exist");
                    violations.push(Violation::new(ARCHITECTURE, index + 1, what, "name what is there"));
                }
            }
        }
    }
    violations
}

/// A link to a file of the repository leads to one.
pub(crate) fn links_lead_somewhere(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (path, text) in tree.files.iter().filter(|(path, _)| path.ends_with(".md")) {
        let folder = path.rsplit_once('/').map_or(String::new(), |(folder, _)| format!("{folder}/"));
        for (index, line) in text.lines().enumerate() {
            let targets = line.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target);
            for target in targets.filter(|target| !target.contains("://") && !target.starts_with('#')) {
                let file = format!("{folder}{}", target.split('#').next().unwrap_or(target).trim_end_matches('/'));
                let exists = tree.files.contains_key(&file)
                    || tree.files.keys().any(|path| path.starts_with(&format!("{file}/")));
                if !exists {
                    violations.push(Violation::new(
                        path,
                        index + 1,
                        format!("a link to `{target}`, which is not there"),
                        "mend it",
                    ));
                }
            }
        }
    }
    violations
}

/// The id of a table row such as `| P4 | … |`: one of `P`, `T`, `D` and a number.
fn row_id(line: &str) -> Option<&str> {
    let cell = line.strip_prefix('|')?.split('|').next()?.trim();
    let digits = cell.strip_prefix(['P', 'T', 'D'])?;
    (!digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())).then_some(cell)
}

/// The ids of rules in comments: a `T` or `D` and up to two digits.
fn citations(comments: &str) -> impl Iterator<Item = (usize, &str)> {
    let bytes = comments.as_bytes();
    comments.match_indices(['T', 'D']).filter_map(move |(at, _)| {
        let digits = bytes[at + 1..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        let end = at + 1 + digits;
        let alone = !(at > 0 && (is_word(bytes[at - 1]) || bytes[at - 1] == b'-'))
            && !bytes.get(end).is_some_and(|byte| is_word(*byte));
        ((1..=2).contains(&digits) && alone).then(|| (at, &comments[at..end]))
    })
}

fn code_spans(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

fn test_reference(span: &str) -> Option<(&str, &str)> {
    let (file, function) = span.split_once("::")?;
    file.ends_with(".rs").then_some((file, function))
}

/// The kebab-case names that a type's `as_str` gives, or that a macro gives to it in `Type { Variant = "name", … }`.
fn names_given_by(text: &str, kind: &str) -> BTreeSet<String> {
    let code = Views::of(text).code;
    let mut names = BTreeSet::new();
    for start in word_offsets(&code, kind) {
        let after = &code[start + kind.len()..];
        let open = start + kind.len() + (after.len() - after.trim_start().len());
        if !code[open..].starts_with('{') {
            continue;
        }
        let before = code[..start].split_whitespace().next_back().unwrap_or("");
        let block = open..open + block_length(&code[open..]);
        let block = match (before, code[block.clone()].find("fn as_str")) {
            ("enum" | "struct" | "for", _) | ("impl", None) => continue,
            (_, None) => block,
            (_, Some(function)) => {
                let function = open + function;
                let body = function + code[function..].find('{').unwrap_or(0);
                body..body + block_length(&code[body..])
            }
        };
        // In the code view a quote is always the edge of a literal, whatever comments say in between.
        let quotes: Vec<usize> = code[block.clone()].match_indices('"').map(|(at, _)| block.start + at).collect();
        let literals = quotes.chunks_exact(2).map(|pair| &text[pair[0] + 1..pair[1]]);
        names.extend(literals.filter(|name| is_kebab(name)).map(str::to_owned));
    }
    names
}

/// The length of the block whose opening brace is first.
fn block_length(code: &str) -> usize {
    let mut depth = 0_usize;
    let end = code.bytes().position(|byte| {
        depth += usize::from(byte == b'{');
        depth -= usize::from(byte == b'}').min(depth);
        depth == 0
    });
    end.unwrap_or(0)
}

fn is_kebab(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

#[cfg(test)]
mod tests {
    use super::super::tree::fake::{files, library};
    use super::*;

    #[test]
    fn a_promise_needs_a_test_and_the_test_must_exist() {
        let mut tree = files(&[
            (SPECIFICATION, "| P1 | No change. | `tests/e2e/tests/a.rs::works` |\n"),
            ("tests/e2e/tests/a.rs", "#[test]\nfn works() {}\nfn not_a_test() {}\n"),
        ]);
        assert_eq!(promises_name_tests(&tree), []);
        for wrong in [
            "| P1 | No change. | none |",
            "| T1 | No lies. | |",
            "| D1 | One way. |",
            "| P1 | x | `tests/e2e/tests/a.rs::not_a_test` |",
            "see `b.rs::gone`",
        ] {
            tree.files.insert(SPECIFICATION.into(), wrong.into());
            assert_eq!(promises_name_tests(&tree).len(), 1, "{wrong}");
        }
        tree.files.insert(SPECIFICATION.into(), "| T3 | **Limit**: x. | |".into());
        assert_eq!(promises_name_tests(&tree), []);
        tree.files.remove(SPECIFICATION);
        assert_eq!(promises_name_tests(&tree).len(), 1);
    }

    #[test]
    fn a_cited_rule_must_have_a_row() {
        let tree = files(&[
            (SPECIFICATION, "| T7 | Ports do not collide. |\n"),
            ("a.rs", "// (T7), as T46 says\nstruct T9;\n"),
        ]);
        let violations = cited_rules_are_explained(&tree);
        assert_eq!(violations.len(), 1);
        assert!(violations[0].what.contains("T46"));
    }

    #[test]
    fn a_closed_set_is_listed_without_more_or_less() {
        let matched = "enum R { A, B }\nimpl R { fn as_str(self) -> &'static str { match self { A => \"no-such\", B => { \"bypass\" } } }\n\
                       fn other() { \"other\" } }\nimpl fmt::Display for R { fn fmt() { \"third\" } }\n";
        let by_macro = "names! {\n /// A \"quoted\" word.\n R { A = \"no-such\", B = \"bypass\", }\n}\nnames! { S { C = \"other\", } }\n";
        let listing =
            |rows: &str| format!("<!-- names of a.rs R -->\n| Name | When |\n{rows}\n<!-- end of names -->\n");
        for code in [matched, by_macro] {
            let mut tree =
                files(&[("a.rs", code), (SPECIFICATION, &listing("| `bypass` | x `y` |\n| `no-such` | x |"))]);
            assert_eq!(closed_sets_are_complete(&tree), []);
            tree.files.insert(SPECIFICATION.into(), listing("| `bypass` | x |\n| `gone` | x |"));
            assert_eq!(closed_sets_are_complete(&tree).len(), 2);
        }
    }

    #[test]
    fn the_map_names_what_is_there_and_nothing_else() {
        let mut tree = files(&[
            ("crates/mesh/src/lib.rs", "pub mod view;\npub use view::apply;\n"),
            ("crates/mesh/src/view.rs", ""),
            (ARCHITECTURE, "`mesh` has `mesh::view` and `mesh::apply(x)`.\n"),
        ]);
        tree.crates = vec![library("mesh", &[])];
        assert_eq!(the_map_is_true(&tree), []);
        tree.files.insert(ARCHITECTURE.into(), "`mesh` has `mesh::gone`.\n".into());
        assert_eq!(the_map_is_true(&tree).len(), 2);
    }

    #[test]
    fn a_link_to_nothing_is_named() {
        let tree = files(&[
            ("README.md", "[a](STYLE.md#x) [b](crates) [c](https://example.org)\n"),
            ("STYLE.md", ""),
            ("crates/a", ""),
        ]);
        assert_eq!(links_lead_somewhere(&tree), []);
        assert_eq!(links_lead_somewhere(&files(&[("README.md", "[a](gone.md)\n")])).len(), 1);
    }
}
