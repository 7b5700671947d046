//! Kubernetes itself: one Go program from the module in `xtask/cluster/kubernetes`, built once per version of that
//! module and kept outside the tree. Which Kubernetes that is, its `go.mod` says, or whoever asks for another one
//! ([`super::version`]).

use super::version;
use crate::oci::sha256;
use crate::process::{output, succeeds};
use anyhow::{Context, Result, bail};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the module is in the tree.
const MODULE: &str = "xtask/cluster/kubernetes";
const SOURCES: &[&str] = &["go.mod", "go.sum", "main.go", "pause/main.go"];

/// How it is built: no C, nothing of this machine's paths, no symbols.
const ARGUMENTS: &[&str] = &["build", "-trimpath", "-buildvcs=false"];

/// The folder with the built programs: `kubernetes`, which is all components, and `pause`.
pub(super) fn programs(root: &Path) -> Result<PathBuf> {
    let module = root.join(MODULE);
    let mut all = Vec::new();
    for name in SOURCES {
        let file = module.join(name);
        all.extend(std::fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?);
    }
    let own = required(&std::fs::read_to_string(module.join("go.mod"))?)?;
    let other = version::asked_for(&own)?;
    let version = other.clone().unwrap_or(own);
    let linker = linker_flags(&version)?;
    all.extend_from_slice(linker.as_bytes());
    let cache = cache()?;
    let built = cache.join(format!("kubernetes-{version}-{}", &sha256(&all)[..12]));
    if built.is_dir() {
        return Ok(built);
    }
    let go = go(&module)?;
    std::fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
    // Two callers do not build twice: the second one waits here and finds it done.
    let lock = File::open(&cache)?;
    lock.lock().with_context(|| format!("cannot lock {}", cache.display()))?;
    if built.is_dir() {
        return Ok(built);
    }
    println!("building Kubernetes {version} once, into {}: this takes minutes", built.display());
    let unfinished = built.with_extension("unfinished");
    let _ = std::fs::remove_dir_all(&unfinished);
    std::fs::create_dir(&unfinished)?;
    let made = unfinished.join("module");
    let module = match other {
        None => module,
        Some(other) => {
            version::make_module(&go, &module, &made, &other)?;
            made.clone()
        }
    };
    let done = succeeds(
        Command::new(&go)
            .args(ARGUMENTS)
            .args(["-ldflags", &linker, "-o"])
            .arg(&unfinished)
            .args([".", "./pause"])
            .current_dir(&module)
            .env("CGO_ENABLED", "0")
            .env("GOTOOLCHAIN", "local"),
    )?;
    if !done {
        let _ = std::fs::remove_dir_all(&unfinished);
        bail!("Kubernetes {version} did not build in {}: what `go build` said is above", module.display());
    }
    if made.is_dir() {
        std::fs::remove_dir_all(&made)?;
    }
    std::fs::rename(&unfinished, &built)?;
    Ok(built)
}

/// The version that the module requires, without its `v`.
fn required(go_mod: &str) -> Result<String> {
    let of_kubernetes = |line: &str| {
        let line = line.trim().trim_start_matches("require ");
        line.strip_prefix("k8s.io/kubernetes v").map(str::to_owned)
    };
    go_mod.lines().find_map(of_kubernetes).context("go.mod requires no k8s.io/kubernetes")
}

/// A component that does not know its own version is refused by the others.
fn linker_flags(version: &str) -> Result<String> {
    let (major, rest) = version.split_once('.').context("a version of Kubernetes has three parts")?;
    let (minor, _) = rest.split_once('.').context("a version of Kubernetes has three parts")?;
    let mut flags = "-s -w".to_owned();
    for package in ["k8s.io/component-base/version", "k8s.io/client-go/pkg/version"] {
        for (name, value) in
            [("gitVersion", format!("v{version}")), ("gitMajor", major.into()), ("gitMinor", minor.into())]
        {
            flags.push_str(&format!(" -X {package}.{name}={value}"));
        }
    }
    Ok(flags)
}

/// Where what is built once is kept, as the XDG base directories have it.
fn cache() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|folder| Path::new(folder).is_absolute()) {
        Some(folder) => PathBuf::from(folder),
        None => {
            let home =
                std::env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set: Kubernetes has no place")?;
            PathBuf::from(home).join(".cache")
        }
    };
    Ok(base.join("justmtls"))
}

/// A Go that is new enough: of `PATH`, or where Go's own archive puts it.
fn go(module: &Path) -> Result<PathBuf> {
    let wanted = std::fs::read_to_string(module.join("go.mod"))?;
    let wanted =
        wanted.lines().find_map(|line| line.strip_prefix("go ")).context("go.mod names no version of Go")?.to_owned();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut found = Vec::new();
    for folder in std::env::split_paths(&path).chain(["/usr/local/go/bin".into(), "/usr/lib/go/bin".into()]) {
        let go = folder.join("go");
        if !go.is_file() {
            continue;
        }
        // Its own version: by default it would fetch another one over the network.
        let version =
            output(Command::new(&go).args(["env", "GOVERSION"]).current_dir("/").env("GOTOOLCHAIN", "local"))?;
        if numbers(version.trim().trim_start_matches("go")) >= numbers(&wanted) {
            return Ok(go);
        }
        found.push(version.trim().to_owned());
    }
    let instead = if found.is_empty() { String::new() } else { format!(" (here is {})", found.join(", ")) };
    bail!(
        "Kubernetes is built from source by Go {wanted} or newer, which is not here{instead}: \
         install it from https://go.dev/dl to /usr/local/go, or put it into PATH"
    )
}

fn numbers(version: &str) -> Vec<u32> {
    version.split('.').map_while(|part| part.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_the_one_that_the_module_requires() {
        assert_eq!(required("module m\n\nrequire k8s.io/kubernetes v1.37.2\n").unwrap(), "1.37.2");
        assert_eq!(required("require (\n\tk8s.io/kubernetes v1.35.4\n)\n").unwrap(), "1.35.4");
        assert!(required("module m\n").is_err());
    }

    #[test]
    fn the_program_is_told_its_version() {
        let flags = linker_flags("1.37.2").unwrap();
        assert!(flags.contains("k8s.io/component-base/version.gitVersion=v1.37.2"), "{flags}");
        assert!(flags.contains("k8s.io/client-go/pkg/version.gitMinor=37"), "{flags}");
        assert!(linker_flags("1").is_err());
    }

    #[test]
    fn versions_are_compared_by_their_numbers() {
        assert!(numbers("1.26.8") >= numbers("1.26.0"));
        assert!(numbers("1.9") < numbers("1.26.0"));
    }
}
