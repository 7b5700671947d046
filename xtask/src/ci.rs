//! `cargo xtask ci`: everything that must hold before a change is taken, cheapest first, each stage timed.

use crate::process::{cargo, descendants, output, succeeds};
use crate::{test, tidy};
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

/// A run that takes longer fails: a slow CI is one that people learn to go around.
const BUDGET: Duration = Duration::from_secs(58 * 60);

const CARGO_DENY: &str = "0.20.2";

type Stage = (&'static str, fn(&Path) -> Result<bool>);

const STAGES: &[Stage] = &[
    ("format", format),
    ("tidy", |root| Ok(tidy::run(root)? == ExitCode::SUCCESS)),
    ("clippy", clippy),
    ("docs", docs),
    ("test", |root| Ok(test::run(root, &test::Request::everything_required())? == ExitCode::SUCCESS)),
    ("licences", licences),
];

/// Runs the named stages, in the order of the table; all of them if none is named.
pub(crate) fn run(root: &Path, only: &[String]) -> Result<ExitCode> {
    let names: Vec<&str> = STAGES.iter().map(|(name, _)| *name).collect();
    if let Some(unknown) = only.iter().find(|stage| !names.contains(&stage.as_str())) {
        bail!("there is no stage `{unknown}`; the stages are {}", names.join(", "));
    }
    let start = Instant::now();
    std::thread::spawn(give_up_at_the_budget);
    let mut report = Vec::new();
    let mut good = true;
    for (name, stage) in STAGES.iter().filter(|(name, _)| only.is_empty() || only.iter().any(|stage| stage == name)) {
        println!("\n=== {name}");
        let began = Instant::now();
        let outcome = stage(root);
        if let Err(error) = &outcome {
            eprintln!("{name}: {error:#}");
        }
        good = matches!(outcome, Ok(true));
        report.push(format!("{name:<10} {:>5} s  {}", began.elapsed().as_secs(), if good { "ok" } else { "FAILED" }));
        if !good {
            break;
        }
    }
    report.push(format!("{:<10} {:>5} s  of {} s", "total", start.elapsed().as_secs(), BUDGET.as_secs()));
    println!("\n=== stages\n{}", report.join("\n"));
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Ends the run, and what it started, when the budget is spent: a hanging test must not hold a machine for hours.
fn give_up_at_the_budget() {
    std::thread::sleep(BUDGET);
    eprintln!("xtask: the run took more than {} minutes; it is ended here", BUDGET.as_secs() / 60);
    let pids: Vec<String> = descendants(std::process::id()).iter().map(u32::to_string).collect();
    let _ = Command::new("kill").arg("-KILL").args(pids).status();
    std::process::exit(1);
}

fn format(root: &Path) -> Result<bool> {
    succeeds(cargo().current_dir(root).args(["fmt", "--all", "--check"]))
}

fn clippy(root: &Path) -> Result<bool> {
    let arguments = ["clippy", "--release", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"];
    succeeds(cargo().current_dir(root).args(arguments))
}

fn docs(root: &Path) -> Result<bool> {
    let arguments = ["doc", "--release", "--workspace", "--no-deps", "--document-private-items", "--locked"];
    succeeds(cargo().current_dir(root).args(arguments).env("RUSTDOCFLAGS", "-D warnings"))
}

/// Licences, banned crates and sources by `deny.toml`. Advisories need a database from the network, which a machine
/// that runs this may not reach; they are the business of a scheduled job, and this says that it did not look.
fn licences(root: &Path) -> Result<bool> {
    let deny = cargo_deny()?;
    println!("advisories are not checked here: their database is fetched from the network");
    succeeds(Command::new(deny).current_dir(root).args(["--all-features", "check", "licenses", "bans", "sources"]))
}

/// The path of cargo-deny, built once per version and kept beside cargo's own files, outside the tree.
fn cargo_deny() -> Result<PathBuf> {
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")))
        .context("neither CARGO_HOME nor HOME is set: there is no place to keep cargo-deny")?;
    let tools = home.join("justmtls-tools");
    let deny = tools.join("bin/cargo-deny");
    let wanted = format!("cargo-deny {CARGO_DENY}");
    if deny.is_file() && output(Command::new(&deny).arg("--version"))?.trim() == wanted {
        return Ok(deny);
    }
    println!("building {wanted} once, into {}", tools.display());
    let build = tools.join("build");
    // Its own release profile asks for whole-program optimisation: minutes for a tool that runs for a second.
    let built = succeeds(
        cargo()
            .args(["install", "cargo-deny", "--locked", "--version", CARGO_DENY, "--root"])
            .arg(&tools)
            .env("CARGO_TARGET_DIR", &build)
            .env("CARGO_PROFILE_RELEASE_LTO", "off")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "64")
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0")
            .env("CARGO_PROFILE_RELEASE_DEBUG", "false"),
    )?;
    // The half gigabyte of objects has no second use.
    let _ = std::fs::remove_dir_all(&build);
    ensure!(built, "cargo-deny {CARGO_DENY} did not build");
    Ok(deny)
}
