//! The walls of the house: which crate may know which, and which may know nothing of the world.

use super::Violation;
use super::features;
use super::lexer::{Views, line_of, word_offsets};
use super::modules::{TestCode, files_of};
use super::tree::{Crate, Tree};
use std::collections::BTreeSet;

/// Each crate and the crates of ours that it may use.
const MAY_KNOW: &[(&str, &[&str])] = &[
    ("identity", &[]),
    ("mesh", &["identity"]),
    ("wire", &["identity", "mesh"]),
    ("linux", &[]),
    ("manifests", &[]),
    ("proxy", &["identity", "mesh", "wire", "linux"]),
    ("agent", &["identity", "mesh", "wire", "linux"]),
    ("control", &["identity", "mesh", "wire", "linux", "manifests"]),
    ("demo", &["identity", "mesh", "wire", "linux", "manifests"]),
    ("install", &["manifests"]),
    ("cli", &["identity", "mesh", "wire", "linux", "manifests", "proxy", "agent", "control", "demo", "install"]),
    ("bench", &["mesh", "wire", "linux"]),
    ("e2e", &["identity", "mesh", "wire", "linux", "manifests"]),
    ("fuzzing", &["identity", "wire", "manifests"]),
    ("workspace-hack", &[]),
    ("xtask", &[]),
];

/// Crates that decide and do nothing else, and what would let the world in.
const PURE: &[&str] = &["identity", "mesh"];
const WORLDLY: &[&str] = &[
    "tokio",
    "tokio-rustls",
    "prost",
    "tonic",
    "k8s-openapi",
    "nix",
    "libc",
    "socket2",
    "mio",
    "hyper",
    "axum",
    "serde-saphyr",
];

/// What pure code may not name: clocks, files, sockets, the environment, other processes and threads.
const WORLDLY_NAMES: &[&str] = &[
    "SystemTime::now",
    "Instant::now",
    "std::fs",
    "std::env",
    "std::process",
    "std::thread",
    "TcpStream",
    "UdpSocket",
    "UnixStream",
    "TcpListener",
];

/// Packages whose library has another name than its package.
const LIBRARY_NAMES: &[(&str, &str)] = &[("rustls-webpki", "webpki")];

/// Packages that only generated code names, which no file of the tree shows.
const USED_BY_GENERATED_CODE: &[&str] = &["tonic-prost"];

/// The only crate that may contain `unsafe`: every system call that needs it sits there.
pub(crate) const SYSCALL_ROOM: &str = "linux";

pub(crate) fn dependency_direction(tree: &Tree) -> Vec<Violation> {
    let ours: BTreeSet<&str> = tree.crates.iter().map(|member| member.name.as_str()).collect();
    let mut violations = Vec::new();
    for member in &tree.crates {
        let Some((_, allowed)) = MAY_KNOW.iter().find(|(name, _)| *name == member.name) else {
            let remedy =
                "say in xtask/src/tidy/house.rs which crates it may use, and why it is a crate in ARCHITECTURE.md";
            violations.push(Violation::new(
                &member.manifest,
                0,
                format!("crate `{}` has no place in the house", member.name),
                remedy,
            ));
            continue;
        };
        for dependency in &member.dependencies {
            let name = dependency.name.as_str();
            if ours.contains(name) && name != features::COMMON && !allowed.contains(&name) {
                let what = format!("`{}` must not know `{name}`", member.name);
                let remedy = "move what both need to the crate below them, or pass it as a value";
                violations.push(Violation::new(&member.manifest, line_of_dependency(tree, member, name), what, remedy));
            }
        }
    }
    violations
}

pub(crate) fn pure_crates(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for member in tree.crates.iter().filter(|member| PURE.contains(&member.name.as_str())) {
        for dependency in member.dependencies.iter().filter(|dependency| !dependency.only_for_tests) {
            if WORLDLY.contains(&dependency.name.as_str()) {
                let what =
                    format!("`{}` decides and does nothing else; `{}` is of the world", member.name, dependency.name);
                let line = line_of_dependency(tree, member, &dependency.name);
                violations.push(Violation::new(
                    &member.manifest,
                    line,
                    what,
                    "do it in the process and pass the result as a value",
                ));
            }
        }
    }
    violations
}

pub(crate) fn pure_code(tree: &Tree) -> Vec<Violation> {
    let test_code = TestCode::of(tree);
    let mut violations = Vec::new();
    for member in tree.crates.iter().filter(|member| PURE.contains(&member.name.as_str())) {
        for file in files_of(tree, member).into_keys() {
            let text = tree.text(&file);
            let code = Views::of(text).code;
            for name in WORLDLY_NAMES {
                for line in word_offsets(&code, name).into_iter().map(|offset| line_of(text, offset)) {
                    if !test_code.contains(&file, line) {
                        let what = format!("`{}` names `{name}`, which is of the world", member.name);
                        violations.push(Violation::new(&file, line, what, "take the value as an argument"));
                    }
                }
            }
        }
    }
    violations
}

pub(crate) fn dependencies_are_used(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    let mut wanted = BTreeSet::new();
    for member in &tree.crates {
        let files = files_of(tree, member);
        for name in member.dependencies.iter().map(|dependency| dependency.name.as_str()) {
            wanted.insert(name);
            let library =
                LIBRARY_NAMES.iter().find(|(package, _)| *package == name).map_or(name, |(_, library)| library);
            let word = library.replace('-', "_");
            let used = files.keys().any(|file| !word_offsets(tree.text(file), &word).is_empty())
                || [name, &member.name].contains(&features::COMMON);
            if !used && !USED_BY_GENERATED_CODE.contains(&name) {
                let what = format!("`{}` does not use `{name}`", member.name);
                let line = line_of_dependency(tree, member, name);
                violations.push(Violation::new(&member.manifest, line, what, "take the dependency out"));
            }
        }
    }
    let shared =
        tree.text("Cargo.toml").lines().enumerate().skip_while(|(_, line)| *line != "[workspace.dependencies]");
    for (index, line) in shared.skip(1).take_while(|(_, line)| !line.starts_with('[')) {
        let name = line.split([' ', '=', '.', '#']).next().unwrap_or("");
        if !name.is_empty() && !wanted.contains(name) {
            let what = format!("no crate depends on `{name}`");
            violations.push(Violation::new(
                "Cargo.toml",
                index + 1,
                what,
                "take it out of the workspace's dependencies",
            ));
        }
    }
    violations
}

pub(crate) fn unsafe_is_forbidden(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for member in tree.crates.iter().filter(|member| member.name != SYSCALL_ROOM) {
        let compiled = member.targets.iter().filter(|target| target.kind == "lib" || target.kind == "bin");
        for target in compiled.filter(|target| !tree.text(&target.root).contains("#![forbid(unsafe_code)]")) {
            let remedy = "add `#![forbid(unsafe_code)]` under the crate's documentation";
            violations.push(Violation::new(&target.root, 0, "the crate does not forbid unsafe code", remedy));
        }
    }
    violations
}

fn line_of_dependency(tree: &Tree, member: &Crate, name: &str) -> usize {
    let stands_here = |line: &str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['.', ' ', '=']));
    tree.text(&member.manifest).lines().position(stands_here).map_or(0, |index| index + 1)
}

#[cfg(test)]
mod tests {
    use super::super::tree::fake::{files, library};
    use super::*;

    #[test]
    fn a_dependency_upwards_is_a_violation_and_downwards_is_none() {
        let mut tree = files(&[("crates/mesh/Cargo.toml", "[dependencies]\nwire.workspace = true\n")]);
        tree.crates =
            vec![library("identity", &[]), library("mesh", &["identity", "wire"]), library("wire", &["mesh"])];
        let violations = dependency_direction(&tree);
        assert_eq!(violations.len(), 1);
        assert_eq!((violations[0].file.as_str(), violations[0].line), ("crates/mesh/Cargo.toml", 2));
        tree.crates[1] = library("mesh", &["identity"]);
        assert_eq!(dependency_direction(&tree), []);
    }

    #[test]
    fn processes_do_not_know_each_other() {
        let mut tree = Tree { crates: vec![library("proxy", &[]), library("agent", &["proxy"])], ..Tree::default() };
        assert_eq!(dependency_direction(&tree).len(), 1);
        tree.crates[1] = library("agent", &["anyhow"]);
        assert_eq!(dependency_direction(&tree), []);
    }

    #[test]
    fn a_crate_without_a_place_is_named() {
        let tree = Tree { crates: vec![library("common", &[])], ..Tree::default() };
        assert!(dependency_direction(&tree)[0].what.contains("common"));
    }

    #[test]
    fn a_pure_crate_may_use_values_but_not_the_world() {
        let mut tree = Tree { crates: vec![library("mesh", &["ipnet", "tokio"])], ..Tree::default() };
        assert_eq!(pure_crates(&tree).len(), 1);
        tree.crates = vec![library("mesh", &["ipnet"]), library("proxy", &["tokio"])];
        assert_eq!(pure_crates(&tree), []);
    }

    #[test]
    fn pure_code_reads_no_clock_but_its_tests_may() {
        let text = "//! mesh\nfn a() { SystemTime::now() }\n#[cfg(test)]\nmod tests { fn b() { std::fs::read() } }\n";
        let mut tree = files(&[("crates/mesh/src/lib.rs", text)]);
        tree.crates = vec![library("mesh", &[])];
        let violations = pure_code(&tree);
        assert_eq!(violations.iter().map(|violation| violation.line).collect::<Vec<_>>(), [2]);
        tree.crates = vec![library("proxy", &[])];
        assert_eq!(pure_code(&tree), []);
    }

    #[test]
    fn a_dependency_that_nobody_uses_is_named() {
        let shared =
            "[workspace.dependencies]\n# values\nserde_json = \"1\"\nipnet = \"2\"\n[profile.release]\ndebug = 1\n";
        let lib = "use serde_json::Value;\nuse webpki::x;\n";
        let mut tree = files(&[("Cargo.toml", shared), ("crates/mesh/src/lib.rs", lib)]);
        tree.crates = vec![library("mesh", &["serde_json", "rustls-webpki", "anyhow"])];
        let violations = dependencies_are_used(&tree);
        let named: Vec<&str> = violations.iter().map(|violation| violation.what.as_str()).collect();
        assert_eq!(named, ["`mesh` does not use `anyhow`", "no crate depends on `ipnet`"]);
    }

    #[test]
    fn every_crate_but_the_syscall_room_forbids_unsafe() {
        let mut tree = files(&[("crates/mesh/src/lib.rs", "//! mesh\n"), ("crates/linux/src/lib.rs", "//! linux\n")]);
        tree.crates = vec![library("mesh", &[]), library("linux", &[])];
        assert_eq!(unsafe_is_forbidden(&tree).len(), 1);
        tree.files.insert("crates/mesh/src/lib.rs".into(), "//! mesh\n#![forbid(unsafe_code)]\n".into());
        assert_eq!(unsafe_is_forbidden(&tree), []);
    }
}
