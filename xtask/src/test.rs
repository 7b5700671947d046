//! `cargo xtask test`: the tests in three groups, and one summary that counts what was skipped and why.

use crate::process::{cargo, succeeds, succeeds_silently, succeeds_with_lines};
use crate::product::{self, Architecture};
use crate::programs;
use crate::results::{Group, Summary};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

/// How the names of tests begin that need a real Kubernetes.
const ON_KUBERNETES: &str = "kubernetes_";

/// What the command line asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    unit: bool,
    e2e: bool,
    kubernetes: bool,
    /// The group was asked for by name: only then may it touch a cluster that is there already.
    kubernetes_named: bool,
    patterns: Vec<String>,
    repeat: u32,
    required: bool,
}

impl Request {
    /// Everything once, and nothing may be skipped: what CI runs.
    pub(crate) fn everything_required() -> Self {
        Self {
            unit: true,
            e2e: true,
            kubernetes: true,
            kubernetes_named: false,
            patterns: Vec::new(),
            repeat: 1,
            required: true,
        }
    }

    /// Reads the arguments after `test`. A word that names no group is a pattern.
    pub(crate) fn parse(arguments: &[String]) -> Result<Self> {
        let mut request =
            Self { unit: false, e2e: false, kubernetes: false, required: false, ..Self::everything_required() };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "unit" => request.unit = true,
                "e2e" => request.e2e = true,
                "kubernetes" => (request.kubernetes, request.kubernetes_named) = (true, true),
                "--required" => request.required = true,
                "--repeat" => {
                    let count = arguments.next().context("--repeat needs a number of runs")?;
                    let parsed = count.parse().ok().filter(|count| *count > 0);
                    request.repeat =
                        parsed.with_context(|| format!("--repeat needs a number of runs, got `{count}`"))?;
                }
                flag if flag.starts_with('-') => {
                    bail!("`test` has no option `{flag}`; it has --repeat N and --required")
                }
                pattern => request.patterns.push(pattern.to_owned()),
            }
        }
        if !request.unit && !request.e2e && !request.kubernetes {
            (request.unit, request.e2e, request.kubernetes) = (true, true, true);
        }
        Ok(request)
    }

    /// The kubeconfig of the cluster that the tests may use, which is none where the group is not named. Tests run in folders of
    /// their own: the path is made absolute.
    fn given_cluster(&self) -> Result<Option<PathBuf>> {
        let named = std::env::var_os("KUBECONFIG").filter(|path| self.kubernetes_named && !path.is_empty());
        named.map(|path| std::path::absolute(path).context("KUBECONFIG names no file")).transpose()
    }

    /// What is run, for the line that says how often.
    fn name(&self) -> String {
        if self.patterns.is_empty() { "all tests".to_owned() } else { self.patterns.join(" ") }
    }
}

pub(crate) fn run(root: &Path, request: &Request) -> Result<ExitCode> {
    let missing = programs::provide(&wanted(request, request.given_cluster()?.is_some()))?;
    if !missing.is_empty() {
        println!("not installed here: {}; the tests that use them are skipped", missing.join(", "));
    }
    let good = if request.repeat == 1 {
        let summary = once(root, request, &mut Output::Shown)?;
        print!("\n{summary}");
        summary.is_good(request.required)
    } else {
        repeat(root, request)?
    };
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The programs of other people that the tests use. A cluster that is given needs none of what ours are made of.
fn wanted(request: &Request, is_given: bool) -> Vec<programs::Program> {
    let makes_clusters = request.kubernetes && !is_given;
    let of_tests = programs::PROGRAMS.iter().filter(|_| request.e2e || makes_clusters);
    let of_clusters = programs::OF_A_CLUSTER.iter().filter(|_| makes_clusters);
    let of_given = programs::ON_A_GIVEN_CLUSTER.iter().filter(|_| request.kubernetes && is_given);
    let mut wanted = Vec::new();
    for program in of_tests.chain(of_clusters).chain(of_given) {
        if !wanted.contains(program) {
            wanted.push(*program);
        }
    }
    wanted
}

/// Runs again and again, a line for each run, until one fails: that one is shown whole.
fn repeat(root: &Path, request: &Request) -> Result<bool> {
    for run in 1..=request.repeat {
        let (began, mut output) = (Instant::now(), Output::Kept(String::new()));
        let summary = once(root, request, &mut output)?;
        let good = summary.is_good(request.required);
        if let (false, Output::Kept(text)) = (good, &output) {
            print!("\n{text}\n{summary}");
        }
        let verdict = if good { "ok" } else { "FAILED" };
        println!(
            "run {run:>3} of {}: {verdict}, {}, {} s",
            request.repeat,
            summary.counts(),
            began.elapsed().as_secs()
        );
        if !good {
            println!("\nREPEATED {}: run {run} of {} failed", request.name(), request.repeat);
            return Ok(false);
        }
    }
    println!("\nREPEATED {}: all {} runs passed", request.name(), request.repeat);
    Ok(true)
}

/// All that was asked for, once.
fn once(root: &Path, request: &Request, output: &mut Output) -> Result<Summary> {
    let mut summary = Summary::default();
    if request.unit {
        summary.groups.push(unit(root, request, output)?);
    }
    if request.e2e {
        summary.groups.push(e2e(root, request, output)?);
    }
    if request.kubernetes {
        summary.groups.push(kubernetes(root, request, output)?);
    }
    Ok(summary)
}

/// Where the tests' own output goes.
enum Output {
    Shown,
    Kept(String),
}

/// The tests beside the code: any user, any Linux, no program but cargo.
fn unit(root: &Path, request: &Request, output: &mut Output) -> Result<Group> {
    let mut group = Group::named("unit");
    cargo_test(root, request, &mut group, output, &["--workspace", "--exclude", "e2e"], &[])?;
    Ok(group)
}

/// The real binary in namespaces, and the programs that drive it there. Tests whose bound is a time run last and alone, so that no neighbour makes them late.
fn e2e(root: &Path, request: &Request, output: &mut Output) -> Result<Group> {
    let mut group = Group::named("e2e");
    let Some(skips) = prepare(root, &mut group)? else { return Ok(group) };
    let mut binaries = test_binaries(&root.join("tests/e2e/tests"))?;
    binaries.retain(|name| !name.starts_with(ON_KUBERNETES));
    let (alone, together): (Vec<_>, Vec<_>) = binaries.into_iter().partition(|name| name.starts_with("alone_"));
    cargo_test(root, request, &mut group, output, &[targets(&together), vec!["--lib"]].concat(), &[])?;
    if !alone.is_empty() {
        cargo_test(root, request, &mut group, output, &targets(&alone), &["--test-threads=1"])?;
    }
    group.read_skips(&skips);
    Ok(group)
}

/// Tests on a real Kubernetes, one at a time: a cluster has the whole machine. A cluster that is there already is used where
/// the group was asked for by name, and never by accident.
fn kubernetes(root: &Path, request: &Request, output: &mut Output) -> Result<Group> {
    let mut group = Group::named("kubernetes");
    let Some(skips) = prepare(root, &mut group)? else { return Ok(group) };
    let mut binaries = test_binaries(&root.join("tests/e2e/tests"))?;
    binaries.retain(|name| name.starts_with(ON_KUBERNETES));
    cargo_test(root, request, &mut group, output, &targets(&binaries), &["--test-threads=1"])?;
    group.read_skips(&skips);
    Ok(group)
}

/// Builds what the end-to-end tests run, and returns the file in which they say what they skipped; `None` where it does not build.
fn prepare(root: &Path, group: &mut Group) -> Result<Option<PathBuf>> {
    product::build(root, Architecture::native()?)?;
    if !succeeds(cargo().current_dir(root).args(["build", "--release", "--package", "bench", "--package", "xtask"]))? {
        group.note_exit(false);
        return Ok(None);
    }
    let skips = target_folder(root).join("skipped-tests");
    std::fs::create_dir_all(target_folder(root))?;
    std::fs::write(&skips, "")?;
    Ok(Some(skips))
}

fn cargo_test(
    root: &Path,
    request: &Request,
    group: &mut Group,
    output: &mut Output,
    targets: &[&str],
    harness: &[&str],
) -> Result<()> {
    let mut command: Command = cargo();
    command
        .current_dir(root)
        .args(["test", "--release", "--no-fail-fast"])
        .args(targets)
        .arg("--")
        .args(&request.patterns)
        .args(harness)
        .env("JUSTMTLS_TEST_SKIPS", target_folder(root).join("skipped-tests"));
    match request.given_cluster()? {
        Some(kubeconfig) => command.env("KUBECONFIG", kubeconfig),
        None => command.env_remove("KUBECONFIG"),
    };
    let failures = group.failures.len();
    let success = match output {
        Output::Shown => succeeds_with_lines(&mut command, |line| group.read_line(line))?,
        Output::Kept(kept) => succeeds_silently(&mut command, kept, |line| group.read_line(line))?,
    };
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

/// What cargo is told of these test programs of the package `e2e`.
fn targets(binaries: &[String]) -> Vec<&str> {
    let tests = binaries.iter().flat_map(|name| ["--test", name]);
    ["--package", "e2e"].into_iter().chain(tests).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Request> {
        Request::parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn without_arguments_all_groups_run_once() {
        let request = parse("").unwrap();
        assert!(request.unit && request.e2e && request.kubernetes && !request.required);
        assert_eq!(request.repeat, 1);
    }

    #[test]
    fn a_cluster_that_is_there_is_touched_only_where_the_group_is_named() {
        assert!(!parse("").unwrap().kubernetes_named && !parse("e2e").unwrap().kubernetes);
        let request = parse("kubernetes").unwrap();
        assert!(request.kubernetes && request.kubernetes_named && !request.e2e && !request.unit);
    }

    #[test]
    fn a_given_cluster_needs_no_program_that_clusters_are_made_of() {
        let names = |line: &str, is_given| format!("{:?}", wanted(&parse(line).unwrap(), is_given));
        let (given, own) = (names("kubernetes", true), names("kubernetes", false));
        assert!(given.contains("curl") && !given.contains("containerd") && !given.contains("nginx"), "{given}");
        assert!(own.contains("curl") && own.contains("containerd") && own.contains("nginx"), "{own}");
        let both = names("e2e kubernetes", true);
        assert!(both.contains("nginx") && !both.contains("containerd"), "{both}");
        assert_eq!(names("unit", false), "[]");
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
        assert!(format!("{:#}", parse("--repeat 0").unwrap_err()).contains("got `0`"), "no run at all passes nothing");
    }
}
