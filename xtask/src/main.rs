//! THE REPOSITORY'S OWN HAND: `cargo xtask test | ci | tidy | bench | cluster | helm | image`.
//!
//! - `tidy`: the repository checks its own shape ([`tidy`]).
//! - `test`: the tests in groups, the programs they need, one summary ([`mod@test`]).
//! - `bench`: the product's speed beside other ways, measured by the crate of that name ([`mod@bench`]).
//! - `cluster`: a real Kubernetes on this machine ([`mod@cluster`]).
//! - `helm`: the Helm that the tests run the chart with ([`mod@helm`]).
//! - `image`: the product as an image ([`mod@image`]).
//! - `ci`: everything that must hold before a change is taken, with the seconds of each stage ([`ci`]).
//!
//! Invariants, stated as absences: no other crate of the workspace is linked in, so that this builds in seconds and
//! can judge a tree that does not compile; no shell; no network but `apt-get`, `cargo` and `go`.

#![forbid(unsafe_code)]

mod bench;
mod ci;
mod cluster;
mod go;
mod helm;
mod image;
mod oci;
mod process;
mod product;
mod programs;
mod results;
mod test;
mod tidy;

use anyhow::{Result, bail};
use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask <command>

  tidy                                   check the shape of the repository
  test [GROUP…] [PATTERN…] [--repeat N] [--required]
                                         run the tests; groups: unit, e2e, kubernetes (default: all);
                                         kubernetes, asked for by name, uses the cluster that KUBECONFIG names
                                         (README.md says what it does there), with the image JUSTMTLS_TEST_IMAGE;
                                         a PATTERN selects tests by a part of their name;
                                         --repeat N runs them N times, or until a run fails, which is shown;
                                         --required makes a skipped test a failure
  bench [--quick] [--check] [--json FILE] [--compare BEFORE AFTER] …
                                         measure speed and memory (PERFORMANCE.md); `bench --help` lists all options
  cluster [--name NAME] up | down | status | crash NODE | boot NODE | exec NODE -- PROGRAM… | load ARCHIVE
                                         a real Kubernetes of two nodes on this machine; NAME is `dev` if none is given
  helm                                   print the path of a Helm, for the tests of the chart; it is built the first time
  image --output FILE [--arch amd64|arm64]
                                         the product as an OCI image archive
  ci [STAGE…]                            all that must hold before a change is taken, or some stages of it:
                                         format, tidy, clippy, docs, test, licences
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match dispatch(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(arguments: &[String]) -> Result<ExitCode> {
    let Some((command, rest)) = arguments.split_first() else {
        eprint!("{USAGE}");
        return Ok(ExitCode::from(2));
    };
    match command.as_str() {
        "tidy" if rest.is_empty() => tidy::run(&root()),
        "test" => test::run(&root(), &test::Request::parse(rest)?),
        "bench" => bench::run(&root(), rest),
        "cluster" => cluster::run(&root(), rest),
        "helm" if rest.is_empty() => helm::run(&root()),
        "image" => image::run(&root(), rest),
        "ci" => ci::run(&root(), rest),
        "help" | "--help" | "-h" => {
            print!("{USAGE}");
            Ok(ExitCode::SUCCESS)
        }
        "helm" | "tidy" => bail!("`{command}` takes no arguments, got `{}`", rest.join(" ")),
        other => bail!("there is no command `{other}`; `cargo xtask help` lists them"),
    }
}

/// The folder of the workspace: cargo tells a program that it runs where its manifest is.
fn root() -> PathBuf {
    let manifest =
        std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest.parent().map_or(manifest.clone(), PathBuf::from)
}
