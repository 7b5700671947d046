//! Helm, the program of others that makes objects of our chart: built from the module in `xtask/cluster/helm`, whose `go.mod` says
//! which Helm that is. It is for tests; nothing of the product runs it.

use crate::go::{self, Build, NO_SYMBOLS};
use anyhow::Result;
use std::path::Path;
use std::process::ExitCode;

/// Where the module is in the tree.
const MODULE: &str = "xtask/cluster/helm";

/// Prints the path of the program, which is built first where it is not there yet.
pub(crate) fn run(root: &Path) -> Result<ExitCode> {
    let module = root.join(MODULE);
    let build = Build {
        name: "Helm",
        version: &go::required(&module, "helm.sh/helm/v4")?,
        module: &module,
        sources: &["go.mod", "go.sum"],
        // What go.mod has in its line `tool`.
        packages: &["tool"],
        linker: NO_SYMBOLS,
    };
    println!("{}", build.programs()?.join("helm").display());
    Ok(ExitCode::SUCCESS)
}
