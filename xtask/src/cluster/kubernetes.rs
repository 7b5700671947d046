//! Kubernetes itself: one Go program from the module in `xtask/cluster/kubernetes`. Which Kubernetes that is, its `go.mod` says, or
//! whoever asks for another one ([`super::version`]).

use super::version;
use crate::go::{self, Build, NO_SYMBOLS};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// Where the module is in the tree.
const MODULE: &str = "xtask/cluster/kubernetes";

/// The folder with the built programs: `kubernetes`, which is all components, and `pause`.
pub(super) fn programs(root: &Path) -> Result<PathBuf> {
    let module = root.join(MODULE);
    let own = go::required(&module, "k8s.io/kubernetes")?;
    let other = version::asked_for(&own)?;
    let version = other.as_ref().unwrap_or(&own);
    let build = Build {
        name: "Kubernetes",
        version,
        module: &module,
        sources: &["go.mod", "go.sum", "main.go", "pause/main.go"],
        packages: &[".", "./pause"],
        linker: &linker_flags(version)?,
    };
    match &other {
        None => build.programs(),
        Some(other) => build.programs_of(|go, folder| {
            version::make_module(go, &module, folder, other)?;
            Ok(folder.to_owned())
        }),
    }
}

/// A component that does not know its own version is refused by the others.
fn linker_flags(version: &str) -> Result<String> {
    let (major, rest) = version.split_once('.').context("a version of Kubernetes has three parts")?;
    let (minor, _) = rest.split_once('.').context("a version of Kubernetes has three parts")?;
    let mut flags = NO_SYMBOLS.to_owned();
    for package in ["k8s.io/component-base/version", "k8s.io/client-go/pkg/version"] {
        for (name, value) in
            [("gitVersion", format!("v{version}")), ("gitMajor", major.into()), ("gitMinor", minor.into())]
        {
            flags.push_str(&format!(" -X {package}.{name}={value}"));
        }
    }
    Ok(flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_told_its_version() {
        let flags = linker_flags("1.37.2").unwrap();
        assert!(flags.contains("k8s.io/component-base/version.gitVersion=v1.37.2"), "{flags}");
        assert!(flags.contains("k8s.io/client-go/pkg/version.gitMinor=37"), "{flags}");
        assert!(linker_flags("1").is_err());
    }
}
