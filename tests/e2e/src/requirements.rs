//! What a test needs of the machine, and how a test that cannot have it says so.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::kubernetes::is_given;
use crate::program::Program;

/// The user that root becomes for a test of an ordinary user's box.
const NOBODY: u32 = 65534;
/// Where xtask reads the skips.
const SKIPS: &str = "JUSTMTLS_TEST_SKIPS";

/// The first of these that is not here, as a reason. `"root"` stands for being root, `"user-namespaces"` for an ordinary user's
/// right to make them, `"grpc"` for Debian's Python module,
/// `"postgres"` for the server, which is in nobody's `PATH`, `"cluster"` for a Kubernetes, and `"nodes"` for reaching into its
/// nodes: their processes, files, links and power.
#[must_use]
pub fn missing(needs: &[&str]) -> Option<String> {
    needs.iter().find_map(|need| match *need {
        "root" => (!nix::unistd::geteuid().is_root()).then(|| "only root can do this".to_owned()),
        "user-namespaces" => {
            (!has_user_namespaces()).then(|| "an ordinary user may not make namespaces here".to_owned())
        }
        "grpc" => (!has_python_module("grpc")).then(|| "python3-grpcio is not installed".to_owned()),
        // One that is given runs already; a test's own is made of these.
        "cluster" if is_given() => missing(&["kubectl"]),
        "cluster" => missing(&["root", "go", "containerd", "runc"]),
        "nodes" => {
            is_given().then(|| "this reaches into nodes, and those of a given cluster are not a test's".to_owned())
        }
        "postgres" => postgres().is_none().then(|| "postgresql is not installed".to_owned()),
        program => (!is_program(program)).then(|| format!("{program} is not installed")),
    })
}

/// The folder with PostgreSQL's server and `initdb`.
#[must_use]
pub fn postgres() -> Option<std::path::PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").ok()?;
    let folders = versions.flatten().map(|version| version.path().join("bin"));
    folders.filter(|folder| folder.join("initdb").is_file()).max()
}

fn has_user_namespaces() -> bool {
    as_ordinary_user(Path::new("unshare")).args(["--user", "--map-root-user", "--net", "true"]).run().success()
}

/// A program as an ordinary user: the caller, or the user that root becomes for it.
#[must_use]
pub fn as_ordinary_user(program: &Path) -> Program {
    if !nix::unistd::geteuid().is_root() {
        return Program::new(program);
    }
    let id = NOBODY.to_string();
    Program::new("setpriv").args(["--reuid", &id, "--regid", &id, "--clear-groups", "--"]).args([program])
}

fn has_python_module(name: &str) -> bool {
    let mut python = Command::new("/usr/bin/python3");
    python.args(["-c", &format!("import {name}")]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    python.status().is_ok_and(|status| status.success())
}

fn is_program(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let administrators = ["/usr/sbin", "/sbin"].into_iter().map(Into::into);
    std::env::split_paths(&path).chain(administrators).any(|folder| Path::new(&folder).join(name).is_file())
}

/// Says that a test did not run, to the reader and to xtask.
pub fn announce_skip(test: &str, reason: &str) {
    announce(&format!("SKIPPED {test}: {reason}"));
}

/// The same of a part of a test whose rest runs: xtask counts the skip, and the test by how it ends.
pub fn announce_skipped_part(part: &str, reason: &str) {
    announce(&format!("SKIPPED PART {part}: {reason}"));
}

fn announce(line: &str) {
    println!("{line}");
    let Some(file) = std::env::var_os(SKIPS) else { return };
    let written = OpenOptions::new().append(true).create(true).open(file);
    written.and_then(|mut file| writeln!(file, "{line}")).expect("a skip must be counted");
}

/// The path of the function that `here` is declared in.
#[must_use]
pub fn name_of<F: Fn()>(_here: &F) -> &'static str {
    std::any::type_name::<F>().trim_end_matches("::here")
}
