//! Child processes: cargo and friends, with their output passed through as it comes.

use anyhow::{Context, Result};
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};

/// The cargo that runs this program, so that the toolchain file is honoured once and for all.
///
/// It is not told of the package that this program is: build scripts ask to be run again where that changes, and what was built
/// by `cargo build` would be built anew.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    for name in names.filter(|name| ["CARGO_PKG_", "CARGO_MANIFEST_"].iter().any(|it| name.starts_with(it))) {
        command.env_remove(name);
    }
    command
}

/// Runs a command with inherited output; `true` if it succeeded.
///
/// Standard input is closed: nothing that this program starts may stop to ask a question.
pub(crate) fn succeeds(command: &mut Command) -> Result<bool> {
    let status = command.stdin(Stdio::null()).status().with_context(|| format!("cannot start {}", name(command)))?;
    Ok(status.success())
}

/// As [`succeeds`], with this as its standard input.
pub(crate) fn succeeds_with_input(command: &mut Command, input: &str) -> Result<bool> {
    let mut child = command.stdin(Stdio::piped()).spawn().with_context(|| format!("cannot start {}", name(command)))?;
    child.stdin.take().context("the child has no standard input")?.write_all(input.as_bytes())?;
    Ok(child.wait()?.success())
}

/// Runs a command, passes each line of its standard output on at once and gives it to `line`, too.
pub(crate) fn succeeds_with_lines(command: &mut Command, mut line: impl FnMut(&str)) -> Result<bool> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", name(command)))?;
    let output = child.stdout.take().context("the child has no standard output")?;
    for text in BufReader::new(output).split(b'\n') {
        // A test may print bytes that are not UTF-8; they must not end the run.
        let text = String::from_utf8_lossy(&text?).into_owned();
        println!("{text}");
        line(&text);
    }
    Ok(child.wait()?.success())
}

/// Runs a command and gives each line of its standard output to `line`; `true` if it succeeded. All that it prints is kept
/// in `kept`, its standard error after that.
pub(crate) fn succeeds_silently(command: &mut Command, kept: &mut String, mut line: impl FnMut(&str)) -> Result<bool> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", name(command)))?;
    let output = child.stdout.take().context("the child has no standard output")?;
    let errors = child.stderr.take().context("the child has no standard error")?;
    // Both at once: a pipe that nobody reads stops who writes to it.
    let errors = std::thread::spawn(move || {
        let mut all = Vec::new();
        BufReader::new(errors).read_to_end(&mut all).map(|_| all)
    });
    for text in BufReader::new(output).split(b'\n') {
        let text = String::from_utf8_lossy(&text?).into_owned();
        line(&text);
        kept.push_str(&text);
        kept.push('\n');
    }
    let errors = errors.join().map_err(|_| anyhow::anyhow!("reading standard error failed"))??;
    kept.push_str(&String::from_utf8_lossy(&errors));
    Ok(child.wait()?.success())
}

/// What a command prints on standard output; an error if it fails.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {}", name(command)))?;
    anyhow::ensure!(output.status.success(), "{} failed ({})", name(command), output.status);
    String::from_utf8(output.stdout).with_context(|| format!("{} printed what is not UTF-8", name(command)))
}

/// Process ids of `parent`'s children, their children and so on, nearest first.
pub(crate) fn descendants(parent: u32) -> Vec<u32> {
    let parents: Vec<(u32, u32)> = std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|pid: u32| Some((pid, parent_of(pid)?)))
        .collect();
    let mut found = vec![parent];
    let mut next = 0;
    while let Some(&of) = found.get(next) {
        found.extend(parents.iter().filter(|(_, parent)| *parent == of).map(|(pid, _)| *pid));
        next += 1;
    }
    found.remove(0);
    found
}

fn parent_of(pid: u32) -> Option<u32> {
    stat(pid)?.get(1)?.parse().ok()
}

/// What the kernel says of a process, from its state on (`proc_pid_stat(5)`, field 3); `None` if there is none.
pub(crate) fn stat(pid: u32) -> Option<Vec<String>> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses and may itself contain blanks and parentheses.
    Some(stat.rsplit_once(')')?.1.split_whitespace().map(str::to_owned).collect())
}

fn name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_is_given_on_and_the_exit_status_counts() {
        let mut lines = Vec::new();
        let ok = succeeds_with_lines(Command::new("printf").arg("one\\ntwo\\n"), |line| lines.push(line.to_owned()));
        assert!(ok.unwrap());
        assert_eq!(lines, ["one", "two"]);
        assert!(!succeeds(&mut Command::new("false")).unwrap());
    }

    #[test]
    fn a_program_reads_what_it_is_given() {
        let given = |input: &str| succeeds_with_input(Command::new("grep").args(["-q", "^two$"]), input).unwrap();
        assert!(given("one\ntwo\n") && !given("one\n"));
    }

    #[test]
    fn what_is_not_shown_is_kept_with_its_errors() {
        let (mut kept, mut lines) = (String::new(), 0);
        let mut command = Command::new("sh");
        command.args(["-c", "echo one; echo two >&2; echo three; exit 3"]);
        assert!(!succeeds_silently(&mut command, &mut kept, |_| lines += 1).unwrap());
        assert_eq!((lines, kept.as_str()), (2, "one\nthree\ntwo\n"));
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = succeeds(&mut Command::new("no-such-program-here")).unwrap_err();
        assert!(format!("{error:#}").contains("no-such-program-here"), "{error:#}");
    }

    #[test]
    fn descendants_include_a_child_that_waits() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let found = descendants(std::process::id());
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(found.contains(&child.id()));
    }
}
