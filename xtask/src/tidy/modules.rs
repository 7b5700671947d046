//! The tree of modules, read as rustc reads it: which files a crate is made of, and which of them are tests.

use super::Violation;
use super::lexer::{Token, Views, line_of, tokens};
use super::tree::{Crate, Tree};
use std::collections::{BTreeMap, BTreeSet};

/// What one file declares.
#[derive(Debug, Default)]
pub(crate) struct Declarations {
    modules: Vec<Module>,
    /// First and last line of each inline `#[cfg(test)] mod`.
    test_regions: Vec<(usize, usize)>,
    /// Names and lines of functions marked as tests.
    pub(crate) tests: Vec<(String, usize)>,
}

/// A `mod name;`, perhaps inside inline modules.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Module {
    /// The inline modules around it.
    inside: Vec<String>,
    name: String,
    /// The file that a `#[path]` attribute names.
    file: Option<String>,
    public: bool,
    test: bool,
}

/// A file of a crate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Role {
    /// Compiled only for tests.
    pub(crate) test: bool,
}

impl Declarations {
    pub(crate) fn of(text: &str) -> Self {
        let code = Views::of(text).code;
        let tokens = tokens(&code);
        let mut found = Self::default();
        // Open inline modules: name, depth of braces inside, and the first line if it is the outermost test module.
        let mut open: Vec<(String, usize, Option<usize>)> = Vec::new();
        let mut depth = 0_usize;
        let mut attributes = String::new();
        let mut public = false;
        let mut at = 0;
        while let Some(token) = tokens.get(at) {
            at += 1;
            match token.text {
                "#" => {
                    let end = attribute_end(&tokens, at);
                    let last = tokens.get(end.saturating_sub(1)).map_or(text.len(), |token| token.offset + 1);
                    let attribute = text[token.offset..last].replace(char::is_whitespace, "");
                    attributes.push_str(&attribute);
                    at = end;
                }
                "pub" => {
                    public = true;
                    if tokens.get(at).is_some_and(|token| token.text == "(") {
                        public = false;
                        at += tokens[at..].iter().position(|token| token.text == ")").map_or(0, |offset| offset + 1);
                    }
                }
                "mod" => {
                    let Some([name, delimiter]) = tokens.get(at..at + 2) else {
                        break;
                    };
                    let test = is_test_only(&attributes);
                    if delimiter.text == ";" {
                        let in_test = open.iter().any(|(_, _, line)| line.is_some());
                        found.modules.push(Module {
                            inside: open.iter().map(|(name, _, _)| name.clone()).collect(),
                            name: name.text.to_owned(),
                            file: path_attribute(&attributes),
                            public,
                            test: test || in_test,
                        });
                    } else if delimiter.text == "{" {
                        depth += 1;
                        let already = open.iter().any(|(_, _, line)| line.is_some());
                        let line = (test && !already).then(|| line_of(text, token.offset));
                        open.push((name.text.to_owned(), depth, line));
                    }
                    at += 2;
                    (attributes, public) = (String::new(), false);
                }
                "fn" => {
                    if let Some(name) = tokens.get(at).filter(|_| marks_a_test(&attributes)) {
                        found.tests.push((name.text.to_owned(), line_of(text, name.offset)));
                    }
                    (attributes, public) = (String::new(), false);
                }
                "{" => depth += 1,
                "}" => {
                    if let Some((_, _, first)) = open.pop_if(|(_, inside, _)| *inside == depth) {
                        found.test_regions.extend(first.map(|first| (first, line_of(text, token.offset))));
                    }
                    depth = depth.saturating_sub(1);
                }
                ";" | "struct" | "enum" | "use" | "impl" | "const" | "static" | "type" | "trait" => {
                    // An attribute of something else; `const fn` and the like carry no test attribute.
                    (attributes, public) = (String::new(), false);
                }
                _ => {}
            }
        }
        found
    }
}

/// The index after an attribute whose `#` is before `at`.
fn attribute_end(tokens: &[Token<'_>], mut at: usize) -> usize {
    at += usize::from(tokens.get(at).is_some_and(|token| token.text == "!"));
    if tokens.get(at).is_none_or(|token| token.text != "[") {
        return at;
    }
    let mut depth = 0_usize;
    while let Some(token) = tokens.get(at) {
        at += 1;
        match token.text {
            "[" => depth += 1,
            "]" if depth == 1 => return at,
            "]" => depth -= 1,
            _ => {}
        }
    }
    at
}

fn is_test_only(attributes: &str) -> bool {
    attributes.contains("cfg(test)") || attributes.contains("cfg(all(test")
}

fn marks_a_test(attributes: &str) -> bool {
    attributes.contains("#[test]") || attributes.contains("::test]") || attributes.contains("::test(")
}

fn path_attribute(attributes: &str) -> Option<String> {
    let (_, rest) = attributes.split_once("#[path=\"")?;
    Some(rest.split_once('"')?.0.to_owned())
}

/// All files that the targets of a crate are made of.
pub(crate) fn files_of(tree: &Tree, member: &Crate) -> BTreeMap<String, Role> {
    let mut files = BTreeMap::new();
    for target in &member.targets {
        let test = target.kind == "test" || target.kind == "bench" || member.name == "e2e";
        follow(tree, &target.root, true, Role { test }, &mut files);
    }
    files
}

fn follow(tree: &Tree, file: &str, is_root: bool, role: Role, files: &mut BTreeMap<String, Role>) {
    // A file that two targets share is product code if one of them is the product.
    let known = files.get(file).copied();
    if known.is_some_and(|known| known.test <= role.test) || !tree.files.contains_key(file) {
        return;
    }
    files.insert(file.to_owned(), role);
    for module in Declarations::of(tree.text(file)).modules {
        let role = Role { test: role.test || module.test };
        for candidate in candidates(file, is_root, &module) {
            follow(tree, &candidate, false, role, files);
        }
    }
}

/// Where rustc looks for a module that `file` declares.
fn candidates(file: &str, is_root: bool, module: &Module) -> Vec<String> {
    let (folder, name) = file.rsplit_once('/').unwrap_or(("", file));
    let stem = name.strip_suffix(".rs").unwrap_or(name);
    if let Some(path) = &module.file {
        return vec![format!("{folder}/{path}")];
    }
    let mut base = if is_root || stem == "mod" { folder.to_owned() } else { format!("{folder}/{stem}") };
    for inline in &module.inside {
        base = format!("{base}/{inline}");
    }
    vec![format!("{base}/{}.rs", module.name), format!("{base}/{}/mod.rs", module.name)]
}

/// Top-level modules of a crate that are part of its product, with whether other crates see them.
pub(crate) fn top_level(tree: &Tree, member: &Crate) -> BTreeMap<String, bool> {
    let Some(root) = member.root() else {
        return BTreeMap::new();
    };
    let modules = Declarations::of(tree.text(root)).modules;
    modules.into_iter().filter(|module| !module.test).map(|module| (module.name, module.public)).collect()
}

/// Which lines of which files are test code.
pub(crate) struct TestCode {
    whole: BTreeSet<String>,
    regions: BTreeMap<String, Vec<(usize, usize)>>,
}

impl TestCode {
    pub(crate) fn of(tree: &Tree) -> Self {
        let mut whole = BTreeSet::new();
        for member in &tree.crates {
            whole.extend(files_of(tree, member).into_iter().filter(|(_, role)| role.test).map(|(file, _)| file));
        }
        let regions =
            tree.rust_files().map(|(path, text)| (path.to_owned(), Declarations::of(text).test_regions)).collect();
        Self { whole, regions }
    }

    pub(crate) fn contains(&self, file: &str, line: usize) -> bool {
        let inside = |(first, last): &(usize, usize)| (*first..=*last).contains(&line);
        self.whole.contains(file) || self.regions.get(file).is_some_and(|regions| regions.iter().any(inside))
    }
}

pub(crate) fn every_file_is_reached(tree: &Tree) -> Vec<Violation> {
    let reached: BTreeSet<String> = tree.crates.iter().flat_map(|member| files_of(tree, member).into_keys()).collect();
    let dead = tree.rust_files().map(|(path, _)| path).filter(|path| !reached.contains(*path));
    // libFuzzer's programs are a workspace of their own, for a compiler of their own.
    let dead = dead.filter(|path| !path.starts_with("fuzz/"));
    let remedy = "declare it with `mod` in the file above it, or delete it";
    dead.map(|path| Violation::new(path, 0, "no crate is made of this file", remedy)).collect()
}

pub(crate) fn every_module_says_what_it_is(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for member in &tree.crates {
        for (file, role) in files_of(tree, member) {
            let first = tree.text(&file).lines().find(|line| !line.trim().is_empty()).unwrap_or("");
            // A file of tests says what it is by the names of its tests.
            if !first.starts_with("//!") && !role.test {
                let remedy = "open it with `//!` and one sentence: what it is and what it does not do";
                violations.push(Violation::new(&file, 0, "the module does not say what it is", remedy));
            }
        }
    }
    violations
}

#[cfg(test)]
mod tests {
    use super::super::tree::fake::{files, library};
    use super::*;

    fn tree(list: &[(&str, &str)]) -> Tree {
        Tree { crates: vec![library("mesh", &[])], ..files(list) }
    }

    #[test]
    fn a_file_that_no_module_declares_is_dead() {
        let lib = "//! mesh\npub mod view;\n// mod gone;\nmod a { mod deep; }\n#[cfg(test)]\nmod tests;\n";
        let mut tree = tree(&[
            ("crates/mesh/src/lib.rs", lib),
            ("crates/mesh/src/view.rs", "//! view\nmod part;"),
            ("crates/mesh/src/view/part.rs", "//! part"),
            ("crates/mesh/src/a/deep.rs", "//! deep"),
            ("crates/mesh/src/tests.rs", ""),
            ("crates/mesh/src/gone.rs", "//! gone"),
        ]);
        let dead = every_file_is_reached(&tree);
        assert_eq!(
            dead.iter().map(|violation| violation.file.as_str()).collect::<Vec<_>>(),
            ["crates/mesh/src/gone.rs"]
        );
        tree.files.remove("crates/mesh/src/gone.rs");
        assert_eq!(every_file_is_reached(&tree), []);
    }

    #[test]
    fn a_path_attribute_is_followed() {
        let tree = tree(&[
            ("crates/mesh/src/lib.rs", "//! mesh\n#[path = \"other.rs\"]\nmod x;"),
            ("crates/mesh/src/other.rs", "//! other"),
        ]);
        assert_eq!(every_file_is_reached(&tree), []);
    }

    #[test]
    fn a_module_without_a_head_is_named() {
        let tree = tree(&[("crates/mesh/src/lib.rs", "//! mesh\nmod a;"), ("crates/mesh/src/a.rs", "fn a() {}")]);
        assert_eq!(every_module_says_what_it_is(&tree).len(), 1);
    }

    #[test]
    fn test_code_is_told_from_the_product() {
        let lib =
            "//! m\nfn a() { b(); }\n#[cfg(test)]\nmod tests {\n  use x;\n  mod inner { fn c() {} }\n}\nfn d() {}\n";
        let tree = tree(&[("crates/mesh/src/lib.rs", lib)]);
        let code = TestCode::of(&tree);
        let lines: Vec<usize> = (1..=8).filter(|line| code.contains("crates/mesh/src/lib.rs", *line)).collect();
        assert_eq!(lines, [4, 5, 6, 7]);
    }

    #[test]
    fn test_functions_are_found_by_their_attribute() {
        let text = "#[test]\nfn one() {}\nfn two() {}\n#[tokio::test(flavor = \"x\")]\nasync fn three() {}\nproptest! {\n#[test]\nfn four(a in 0..1) {} }";
        let names: Vec<String> = Declarations::of(text).tests.into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["one", "three", "four"]);
    }

    #[test]
    fn top_level_modules_leave_out_tests() {
        let tree =
            tree(&[("crates/mesh/src/lib.rs", "pub mod view;\npub(crate) mod hidden;\n#[cfg(test)]\nmod tests;")]);
        let modules = top_level(&tree, &tree.crates[0]);
        assert_eq!(modules.into_iter().collect::<Vec<_>>(), [("hidden".to_owned(), false), ("view".to_owned(), true)]);
    }
}
