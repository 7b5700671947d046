//! The programs of other people that are driven here, and how Debian provides them.

use crate::process::succeeds;
use anyhow::Result;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// Where Debian puts the PostgreSQL server, which is in nobody's `PATH`.
const POSTGRES: &str = "/usr/lib/postgresql";

/// Where Debian has the plugins that connect pods.
pub(crate) const NETWORK_PLUGINS: &str = "/usr/lib/cni";

/// What is needed and the Debian package that has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Program {
    name: &'static str,
    package: &'static str,
    look: Look,
}

/// How to see that a program is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    InPath,
    Folder(&'static str),
    PythonModule(&'static str),
}

const fn in_path(name: &'static str, package: &'static str) -> Program {
    Program { name, package, look: Look::InPath }
}

/// All that the end-to-end tests use. A test that misses one of them says so by the program's name and is skipped.
pub(crate) const PROGRAMS: &[Program] = &[
    in_path("curl", "curl"),
    in_path("nginx", "nginx"),
    in_path("iperf3", "iperf3"),
    in_path("redis-server", "redis-server"),
    in_path("redis-cli", "redis-tools"),
    in_path("psql", "postgresql-client"),
    Program { name: "postgres", package: "postgresql", look: Look::Folder(POSTGRES) },
    in_path("nc", "netcat-openbsd"),
    in_path("tshark", "tshark"),
    in_path("ip", "iproute2"),
    in_path("nft", "nftables"),
    in_path("openssl", "openssl"),
    in_path("ps", "procps"),
    in_path("unshare", "util-linux"),
    in_path("python3", "python3"),
    // Debian's modules belong to Debian's interpreter, whatever another `python3` earlier in PATH is.
    Program { name: "python3-grpcio", package: "python3-grpcio", look: Look::PythonModule("grpc") },
];

/// What the tests use on a cluster that is given to them, besides `kubectl`, which its owner has.
pub(crate) const ON_A_GIVEN_CLUSTER: &[Program] = &[in_path("curl", "curl")];

/// What the nodes of a cluster run besides Kubernetes.
pub(crate) const OF_A_CLUSTER: &[Program] = &[
    in_path("containerd", "containerd"),
    in_path("ctr", "containerd"),
    in_path("runc", "runc"),
    Program {
        name: "containernetworking-plugins",
        package: "containernetworking-plugins",
        look: Look::Folder(NETWORK_PLUGINS),
    },
    in_path("nft", "nftables"),
    in_path("ip", "iproute2"),
    in_path("conntrack", "conntrack"),
    in_path("nsenter", "util-linux"),
    in_path("sysctl", "procps"),
];

/// Installs what is missing of these if this is Debian and we are root; returns the names of what is still missing.
pub(crate) fn provide(programs: &[Program]) -> Result<Vec<&'static str>> {
    let missing: Vec<Program> = programs.iter().copied().filter(|program| !is_there(*program)).collect();
    if missing.is_empty() {
        return Ok(Vec::new());
    }
    let names = |programs: &[Program]| programs.iter().map(|program| program.name).collect::<Vec<_>>();
    if !is_debian(&std::fs::read_to_string("/etc/os-release").unwrap_or_default()) || !is_root() {
        return Ok(names(&missing));
    }
    println!("installing what is missing: {}", names(&missing).join(" "));
    let mut packages: Vec<&str> = missing.iter().map(|program| program.package).collect();
    packages.dedup();
    // Lists may be absent (a container image) or old; failing to renew them matters only if the installation fails.
    succeeds(apt_get().args(["update", "--quiet=2"]))?;
    succeeds(apt_get().args(["install", "--quiet=2", "--yes", "--no-install-recommends"]).args(&packages))?;
    Ok(programs.iter().filter(|program| !is_there(**program)).map(|program| program.name).collect())
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}

fn is_there(program: Program) -> bool {
    match program.look {
        Look::InPath => path_folders().any(|folder| folder.join(program.name).is_file()),
        Look::Folder(folder) => Path::new(folder).is_dir(),
        Look::PythonModule(module) => Command::new("/usr/bin/python3")
            .args(["-c", &format!("import {module}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success()),
    }
}

/// `PATH` and the folders of the administrator's programs, which an ordinary user's `PATH` may lack.
fn path_folders() -> impl Iterator<Item = std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<_> = std::env::split_paths(&path).collect();
    folders.into_iter().chain(["/usr/sbin".into(), "/sbin".into()])
}

pub(crate) fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

/// Debian, or a system that says that it is like Debian.
fn is_debian(os_release: &str) -> bool {
    os_release.lines().any(|line| {
        let Some((key, value)) = line.split_once('=') else {
            return false;
        };
        matches!(key, "ID" | "ID_LIKE") && value.trim_matches('"').split(' ').any(|word| word == "debian")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debian_and_what_is_like_it_are_recognised() {
        assert!(is_debian("NAME=\"Debian GNU/Linux\"\nID=debian\n"));
        assert!(is_debian("ID=ubuntu\nID_LIKE=debian\n"));
        assert!(is_debian("ID=mint\nID_LIKE=\"ubuntu debian\"\n"));
        assert!(!is_debian("ID=fedora\nHOME_URL=debian\n"));
        assert!(!is_debian(""));
    }

    #[test]
    fn a_program_is_seen_where_it_is_and_missed_where_it_is_not() {
        assert!(is_there(in_path("sh", "dash")));
        assert!(!is_there(in_path("no-such-program-here", "none")));
        assert!(!is_there(Program { name: "x", package: "x", look: Look::Folder("/no/such/folder") }));
    }
}
