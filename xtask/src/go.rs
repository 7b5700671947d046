//! Programs of other people that are built from Go modules in the tree, once per version of such a module, and kept outside the
//! tree.

use crate::oci::sha256;
use crate::process::{output, succeeds};
use anyhow::{Context, Result, bail};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// How all are built: no C, nothing of this machine's paths, no symbols ([`NO_SYMBOLS`]).
const ARGUMENTS: &[&str] = &["build", "-trimpath", "-buildvcs=false"];

/// What the linker is told at least.
pub(crate) const NO_SYMBOLS: &str = "-s -w";

/// What is built of a module, and how.
pub(crate) struct Build<'a> {
    /// As people write it.
    pub(crate) name: &'a str,
    pub(crate) version: &'a str,
    /// Where the module is in the tree.
    pub(crate) module: &'a Path,
    /// All that is in it.
    pub(crate) sources: &'a [&'a str],
    /// The programs, as `go build` takes them.
    pub(crate) packages: &'a [&'a str],
    pub(crate) linker: &'a str,
}

impl Build<'_> {
    /// The folder with the built programs. What is printed meanwhile goes to standard error.
    pub(crate) fn programs(&self) -> Result<PathBuf> {
        self.programs_of(|_, _| Ok(self.module.to_owned()))
    }

    /// The same of another module than the tree's, which `make` makes, given Go and a folder for it.
    pub(crate) fn programs_of(&self, make: impl FnOnce(&Path, &Path) -> Result<PathBuf>) -> Result<PathBuf> {
        let (name, version) = (self.name, self.version);
        let cache = cache()?;
        let built = cache.join(format!("{}-{version}-{}", name.to_lowercase(), &self.hash()?[..12]));
        if built.is_dir() {
            return Ok(built);
        }
        let go = go(name, self.module)?;
        std::fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
        // Two callers do not build twice: the second one waits here and finds it done.
        let lock = File::open(&cache)?;
        lock.lock().with_context(|| format!("cannot lock {}", cache.display()))?;
        if built.is_dir() {
            return Ok(built);
        }
        eprintln!("building {name} {version} once, into {}: this takes minutes", built.display());
        let unfinished = built.with_extension("unfinished");
        let _ = std::fs::remove_dir_all(&unfinished);
        std::fs::create_dir(&unfinished)?;
        let made = unfinished.join("module");
        let module = make(&go, &made)?;
        let done = succeeds(
            Command::new(&go)
                .args(ARGUMENTS)
                .args(["-ldflags", self.linker, "-o"])
                .arg(&unfinished)
                .args(self.packages)
                .current_dir(&module)
                .env("CGO_ENABLED", "0")
                .env("GOTOOLCHAIN", "local"),
        )?;
        if !done {
            let _ = std::fs::remove_dir_all(&unfinished);
            bail!("{name} {version} did not build in {}: what `go build` said is above", module.display());
        }
        if made.is_dir() {
            std::fs::remove_dir_all(&made)?;
        }
        std::fs::rename(&unfinished, &built)?;
        Ok(built)
    }

    /// Of all that decides what comes out.
    fn hash(&self) -> Result<String> {
        let mut all = Vec::new();
        for name in self.sources {
            let file = self.module.join(name);
            all.extend(std::fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?);
        }
        all.extend_from_slice(self.linker.as_bytes());
        Ok(sha256(&all))
    }
}

/// The version of `wanted` that a module requires, without its `v`.
pub(crate) fn required(module: &Path, wanted: &str) -> Result<String> {
    let file = module.join("go.mod");
    let go_mod = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    version_of(&go_mod, wanted).with_context(|| format!("{} requires no {wanted}", file.display()))
}

fn version_of(go_mod: &str, wanted: &str) -> Option<String> {
    go_mod.lines().find_map(|line| {
        let line = line.trim().trim_start_matches("require ");
        let version = line.strip_prefix(wanted)?.strip_prefix(" v")?;
        version.split(' ').next().map(str::to_owned)
    })
}

/// Where what is built once is kept, as the XDG base directories have it.
fn cache() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|folder| Path::new(folder).is_absolute()) {
        Some(folder) => PathBuf::from(folder),
        None => {
            let home = std::env::var_os("HOME")
                .context("neither XDG_CACHE_HOME nor HOME is set: what is built has no place")?;
            PathBuf::from(home).join(".cache")
        }
    };
    Ok(base.join("justmtls"))
}

/// A Go that is new enough: of `PATH`, or where Go's own archive puts it.
fn go(name: &str, module: &Path) -> Result<PathBuf> {
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
        "{name} is built from source by Go {wanted} or newer, which is not here{instead}: \
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
        let of = |go_mod, wanted| version_of(go_mod, wanted).unwrap_or_default();
        assert_eq!(of("module m\n\nrequire k8s.io/kubernetes v1.37.2\n", "k8s.io/kubernetes"), "1.37.2");
        assert_eq!(of("require (\n\tk8s.io/kubernetes v1.35.4\n)\n", "k8s.io/kubernetes"), "1.35.4");
        assert_eq!(
            of("tool a.b/c/cmd/c\n\nrequire (\n\ta.b/c/d v1.0.0\n\ta.b/c v2.0.0 // indirect\n)\n", "a.b/c"),
            "2.0.0"
        );
        assert_eq!(of("module m\n", "k8s.io/kubernetes"), "");
    }

    #[test]
    fn versions_are_compared_by_their_numbers() {
        assert!(numbers("1.26.8") >= numbers("1.26.0"));
        assert!(numbers("1.9") < numbers("1.26.0"));
    }
}
