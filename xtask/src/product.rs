//! The product, built: one static program, which the tests drive, the measurement runs and the image holds.

use crate::process::{cargo, succeeds};
use crate::test::target_folder;
use anyhow::{Result, bail, ensure};
use std::path::{Path, PathBuf};

/// What the product is built for, as Rust and as OCI call it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Architecture {
    rust: &'static str,
    pub(crate) oci: &'static str,
}

const ARCHITECTURES: &[Architecture] =
    &[Architecture { rust: "x86_64", oci: "amd64" }, Architecture { rust: "aarch64", oci: "arm64" }];

impl Architecture {
    /// The one of this machine.
    pub(crate) fn native() -> Result<Self> {
        Self::find(|architecture| architecture.rust == std::env::consts::ARCH, std::env::consts::ARCH)
    }

    /// The one that a person named, by either name.
    pub(crate) fn named(name: &str) -> Result<Self> {
        Self::find(|architecture| architecture.rust == name || architecture.oci == name, name)
    }

    fn find(is_it: impl Fn(&Self) -> bool, name: &str) -> Result<Self> {
        match ARCHITECTURES.iter().copied().find(is_it) {
            Some(architecture) => Ok(architecture),
            None => bail!("justmtls is built for amd64 and arm64, not for `{name}`"),
        }
    }

    /// The program of binutils for this architecture, which has a prefix where the machine is another one.
    pub(crate) fn tool(self, name: &str) -> Result<String> {
        Ok(if self == Self::native()? { name.to_owned() } else { format!("{}-linux-gnu-{name}", self.rust) })
    }
}

/// Builds it and returns where it is.
///
/// Only its last crate is compiled for a static program: the others are the same either way, and are shared with
/// every other build of the workspace.
pub(crate) fn build(root: &Path, architecture: Architecture) -> Result<PathBuf> {
    let target = format!("{}-unknown-linux-gnu", architecture.rust);
    let mut command = cargo();
    command.current_dir(root).args(["rustc", "--release", "--package", "cli", "--bin", "justmtls"]);
    let mut folder = target_folder(root);
    if architecture != Architecture::native()? {
        let linker = format!("CARGO_TARGET_{}_LINKER", target.to_uppercase().replace('-', "_"));
        command.args(["--target", &target]).env(linker, architecture.tool("gcc")?);
        folder.push(&target);
    }
    command.args(["--", "-C", "target-feature=+crt-static"]);
    ensure!(succeeds(&mut command)?, "justmtls did not build; what the compiler said is above");
    Ok(folder.join("release/justmtls"))
}
