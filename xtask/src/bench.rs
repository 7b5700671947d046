//! `cargo xtask bench`: builds the product and the crate `bench`, and runs the latter.

use crate::process::{cargo, succeeds};
use crate::product::{self, Architecture};
use crate::test::target_folder;
use anyhow::Result;
use std::path::Path;
use std::process::{Command, ExitCode};

pub(crate) fn run(root: &Path, arguments: &[String]) -> Result<ExitCode> {
    let product = product::build(root, Architecture::native()?)?;
    let build = ["build", "--release", "--package", "bench"];
    if !succeeds(cargo().current_dir(root).args(build))? {
        return Ok(ExitCode::FAILURE);
    }
    let binaries = target_folder(root).join("release");
    let mut bench = Command::new(binaries.join("bench"));
    let good = succeeds(bench.args(arguments).env("JUSTMTLS_BIN", product))?;
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
