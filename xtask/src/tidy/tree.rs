//! The repository as values: its text files, and its crates as cargo sees them.

use crate::process::{cargo, output};
use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// All that the rules look at.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    /// Text files by their path from the root, with `/`.
    pub(crate) files: BTreeMap<String, String>,
    pub(crate) crates: Vec<Crate>,
}

/// A crate of the workspace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Crate {
    pub(crate) name: String,
    /// Path of its `Cargo.toml` from the root.
    pub(crate) manifest: String,
    pub(crate) targets: Vec<Target>,
    /// Names of packages that it depends on, in builds and in tests.
    pub(crate) dependencies: Vec<Dependency>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Dependency {
    pub(crate) name: String,
    pub(crate) only_for_tests: bool,
}

/// Something that cargo compiles from one root file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// `lib`, `bin`, `test`, `bench`, `example` or `custom-build`.
    pub(crate) kind: String,
    /// Path of its root file from the root of the repository.
    pub(crate) root: String,
}

impl Crate {
    /// The root file of the library, or of the program where there is no library.
    pub(crate) fn root(&self) -> Option<&str> {
        let of_kind = |kind| self.targets.iter().find(|target| target.kind == kind);
        of_kind("lib").or_else(|| of_kind("bin")).map(|target| target.root.as_str())
    }
}

impl Tree {
    /// Reads the tree below `root` and asks cargo for its crates; nothing is downloaded.
    pub(crate) fn read(root: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        read_folder(root, "", &mut files)?;
        let arguments = ["metadata", "--format-version", "1", "--no-deps", "--offline"];
        let metadata = output(cargo().current_dir(root).args(arguments))?;
        let crates = crates(&serde_json::from_str(&metadata)?).context("cargo metadata has an unexpected form")?;
        Ok(Self { files, crates })
    }

    /// The Rust files, by path.
    pub(crate) fn rust_files(&self) -> impl Iterator<Item = (&str, &str)> {
        self.files.iter().filter(|(path, _)| path.ends_with(".rs")).map(|(path, text)| (path.as_str(), text.as_str()))
    }

    pub(crate) fn text(&self, path: &str) -> &str {
        self.files.get(path).map_or("", String::as_str)
    }
}

/// Reads all text files of a folder and those below it, but what git and cargo keep for themselves.
fn read_folder(root: &Path, folder: &str, files: &mut BTreeMap<String, String>) -> Result<()> {
    let absolute = root.join(folder);
    for entry in std::fs::read_dir(&absolute).with_context(|| format!("cannot read {}", absolute.display()))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
        let kind = entry.file_type()?;
        if kind.is_dir() && name != ".git" && path != "target" {
            read_folder(root, &path, files)?;
        } else if kind.is_file()
            && let Ok(text) = String::from_utf8(std::fs::read(entry.path())?)
        {
            files.insert(path, text);
        }
    }
    Ok(())
}

/// Reads what `cargo metadata` printed; `None` if a field is missing.
fn crates(metadata: &Value) -> Option<Vec<Crate>> {
    let root = metadata["workspace_root"].as_str()?;
    let relative = |path: &Value| Some(path.as_str()?.strip_prefix(root)?.trim_start_matches('/').to_owned());
    let mut crates = Vec::new();
    for package in metadata["packages"].as_array()? {
        let mut targets = Vec::new();
        for target in package["targets"].as_array()? {
            targets.push(Target { kind: target["kind"][0].as_str()?.to_owned(), root: relative(&target["src_path"])? });
        }
        let mut dependencies = Vec::new();
        for dependency in package["dependencies"].as_array()? {
            let name = dependency["name"].as_str()?.to_owned();
            dependencies.push(Dependency { name, only_for_tests: dependency["kind"] == "dev" });
        }
        let name = package["name"].as_str()?.to_owned();
        crates.push(Crate { name, manifest: relative(&package["manifest_path"])?, targets, dependencies });
    }
    Some(crates)
}

/// Small trees for the tests of the rules.
#[cfg(test)]
pub(crate) mod fake {
    use super::*;

    /// A tree of these files, without crates.
    pub(crate) fn files(files: &[(&str, &str)]) -> Tree {
        let files = files.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect();
        Tree { files, crates: Vec::new() }
    }

    /// A library crate at `crates/<name>` with these dependencies.
    pub(crate) fn library(name: &str, dependencies: &[&str]) -> Crate {
        Crate {
            name: name.to_owned(),
            manifest: format!("crates/{name}/Cargo.toml"),
            targets: vec![Target { kind: "lib".to_owned(), root: format!("crates/{name}/src/lib.rs") }],
            dependencies: dependencies
                .iter()
                .map(|name| Dependency { name: (*name).to_owned(), only_for_tests: false })
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_becomes_crates_with_paths_from_the_root() {
        let metadata = serde_json::json!({
            "workspace_root": "/repository",
            "packages": [{
                "name": "mesh",
                "manifest_path": "/repository/crates/mesh/Cargo.toml",
                "targets": [{"kind": ["lib"], "src_path": "/repository/crates/mesh/src/lib.rs"}],
                "dependencies": [{"name": "identity", "kind": null}, {"name": "proptest", "kind": "dev"}],
            }],
        });
        let mut expected = fake::library("mesh", &["identity"]);
        expected.dependencies.push(Dependency { name: "proptest".to_owned(), only_for_tests: true });
        assert_eq!(crates(&metadata), Some(vec![expected]));
        assert_eq!(crates(&serde_json::json!({})), None);
    }
}
