//! `cargo xtask test`: the tests in two groups, and one summary that counts what was skipped and why.

use crate::process::{cargo, succeeds, succeeds_with_lines};
use crate::programs;
use crate::results::{Group, Summary};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// What the command line asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    unit: bool,
    e2e: bool,
    patterns: Vec<String>,
    repeat: u32,
    required: bool,
}

impl Request {
    /// Everything once, and nothing may be skipped: what CI runs.
    pub(crate) fn everything_required() -> Self {
        Self { unit: true, e2e: true, patterns: Vec::new(), repeat: 1, required: true }
    }

    /// Reads the arguments after `test`. A word that names no group is a pattern.
    pub(crate) fn parse(arguments: &[String]) -> Result<Self> {
        let mut request = Self { unit: false, e2e: false, patterns: Vec::new(), repeat: 1, required: false };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "unit" => request.unit = true,
                "e2e" => request.e2e = true,
                "--required" => request.required = true,
                "--repeat" => {
                    let count = arguments.next().context("--repeat needs a number of runs")?;
                    request.repeat =
                        count.parse().with_context(|| format!("--repeat needs a number of runs, got `{count}`"))?;
                }
                flag if flag.starts_with('-') => {
                    bail!("`test` has no option `{flag}`; it has --repeat N and --required")
                }
                pattern => request.patterns.push(pattern.to_owned()),
            }
        }
        if !request.unit && !request.e2e {
            (request.unit, request.e2e) = (true, true);
        }
        Ok(request)
    }
}

pub(crate) fn run(root: &Path, request: &Request) -> Result<ExitCode> {
    let missing = if request.e2e { programs::provide()? } else { Vec::new() };
    if !missing.is_empty() {
        println!("not installed here: {}; the tests that use them are skipped", missing.join(", "));
    }
    let mut good = true;
    for round in 1..=request.repeat {
        let mut summary = Summary::default();
        if request.unit {
            summary.groups.push(unit(root, request)?);
        }
        if request.e2e {
            summary.groups.push(e2e(root, request)?);
        }
        if request.repeat > 1 {
            println!("\nround {round} of {}", request.repeat);
        }
        print!("\n{summary}");
        good &= summary.is_good(request.required);
        if !good {
            break;
        }
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The tests beside the code: any user, any Linux, no program but cargo.
fn unit(root: &Path, request: &Request) -> Result<Group> {
    let mut group = Group::named("unit");
    cargo_test(root, request, &mut group, &["--workspace", "--exclude", "e2e"], &[])?;
    Ok(group)
}

/// The real binary in namespaces, and the programs that drive it there. Tests whose bound is a time run last and alone, so that no neighbour makes them late.
fn e2e(root: &Path, request: &Request) -> Result<Group> {
    let mut group = Group::named("e2e");
    let built =
        succeeds(cargo().current_dir(root).args(["build", "--release", "--package", "cli", "--package", "bench"]))?;
    if !built {
        group.note_exit(false);
        return Ok(group);
    }
    let skips = target_folder(root).join("skipped-tests");
    std::fs::create_dir_all(target_folder(root))?;
    std::fs::write(&skips, "")?;
    let binaries = test_binaries(&root.join("tests/e2e/tests"))?;
    let (alone, together): (Vec<_>, Vec<_>) = binaries.into_iter().partition(|name| name.starts_with("alone_"));
    let mut targets = vec!["--package".to_owned(), "e2e".to_owned(), "--lib".to_owned()];
    targets.extend(together.into_iter().flat_map(|name| ["--test".to_owned(), name]));
    cargo_test(root, request, &mut group, &refs(&targets), &[])?;
    if !alone.is_empty() {
        let mut targets = vec!["--package".to_owned(), "e2e".to_owned()];
        targets.extend(alone.into_iter().flat_map(|name| ["--test".to_owned(), name]));
        cargo_test(root, request, &mut group, &refs(&targets), &["--test-threads=1"])?;
    }
    group.read_skips(&skips);
    Ok(group)
}

fn cargo_test(root: &Path, request: &Request, group: &mut Group, targets: &[&str], harness: &[&str]) -> Result<()> {
    let mut command: Command = cargo();
    command
        .current_dir(root)
        .args(["test", "--release", "--no-fail-fast"])
        .args(targets)
        .arg("--")
        .args(&request.patterns)
        .args(harness)
        .env("JUSTMTLS_TEST_SKIPS", target_folder(root).join("skipped-tests"));
    let failures = group.failures.len();
    let success = succeeds_with_lines(&mut command, |line| group.read_line(line))?;
    group.note_exit(success || group.failures.len() > failures);
    Ok(())
}

/// Names of the test programs in a folder: each `.rs` file, and each folder with a `main.rs`, as cargo finds them.
fn test_binaries(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    let entries = std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        let is_test = path.extension().is_some_and(|extension| extension == "rs") || path.join("main.rs").is_file();
        if let (true, Some(name)) = (is_test, path.file_stem().and_then(|name| name.to_str())) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

pub(crate) fn target_folder(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |folder| root.join(folder))
}

fn refs(strings: &[String]) -> Vec<&str> {
    strings.iter().map(String::as_str).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Request> {
        Request::parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn without_arguments_both_groups_run_once() {
        let request = parse("").unwrap();
        assert!(request.unit && request.e2e && !request.required);
        assert_eq!(request.repeat, 1);
    }

    #[test]
    fn a_group_a_pattern_and_options_are_told_apart() {
        let request = parse("e2e half_close --repeat 3 --required").unwrap();
        assert!(!request.unit && request.e2e && request.required);
        assert_eq!((request.repeat, request.patterns.as_slice()), (3, &["half_close".to_owned()][..]));
    }

    #[test]
    fn a_wrong_option_or_count_is_said() {
        assert!(format!("{:#}", parse("--fast").unwrap_err()).contains("--fast"));
        assert!(format!("{:#}", parse("--repeat many").unwrap_err()).contains("many"));
        assert!(format!("{:#}", parse("--repeat").unwrap_err()).contains("number"));
    }
}
