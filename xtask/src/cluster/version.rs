//! Another version of Kubernetes than the one that the tree's module requires: a module is made for it, with the same programs and
//! what that version itself requires.

use crate::process::output;
use anyhow::{Context, Result, bail};
use std::path::Path;
use std::process::Command;

/// Says which version to build, as `1.35.4`.
const VARIABLE: &str = "KUBERNETES_VERSION";

/// The version that somebody asks for, where it is another one than `own`.
pub(super) fn asked_for(own: &str) -> Result<Option<String>> {
    let Some(asked) = std::env::var_os(VARIABLE) else { return Ok(None) };
    let version = asked.to_string_lossy();
    let version = version.trim_start_matches('v');
    let is_version =
        version.split('.').count() == 3 && version.split('.').all(|part| part.parse::<u32>().is_ok_and(|it| it < 1000));
    if !is_version {
        bail!(
            "{VARIABLE} is {version:?}, which is no version of Kubernetes; say one with three numbers, as in {VARIABLE}={own}"
        );
    }
    Ok((version != own).then(|| version.to_owned()))
}

/// Makes `folder` a module of that version, out of the tree's `module`.
pub(super) fn make_module(go: &Path, module: &Path, folder: &Path, version: &str) -> Result<()> {
    std::fs::create_dir_all(folder.join("pause"))?;
    for source in ["main.go", "pause/main.go"] {
        std::fs::copy(module.join(source), folder.join(source))?;
    }
    let name = format!("k8s.io/kubernetes@v{version}");
    let go = |arguments: &[&str]| {
        output(
            Command::new(go).args(arguments).current_dir(folder).env("GOTOOLCHAIN", "local").env("GOFLAGS", "-mod=mod"),
        )
    };
    // To be in a module, whichever it is.
    std::fs::write(folder.join("go.mod"), "module m\n")?;
    let fetched = go(&["mod", "download", "-json", &name]).with_context(|| format!("cannot fetch {name}"))?;
    let fetched: serde_json::Value = serde_json::from_str(&fetched).context("Go says no JSON")?;
    let its = fetched["GoMod"].as_str().with_context(|| format!("Go has no go.mod of {name}"))?;
    let (own, its) = (std::fs::read_to_string(module.join("go.mod"))?, std::fs::read_to_string(its)?);
    std::fs::write(folder.join("go.mod"), go_mod(&own, &its, version))?;
    go(&["mod", "tidy"]).with_context(|| format!("the modules of {name} do not fit together"))?;
    Ok(())
}

/// What the tree's module requires by itself, of that version, with the parts of Kubernetes that it is published in: `its` is
/// the go.mod of Kubernetes.
fn go_mod(own: &str, its: &str, version: &str) -> String {
    let of_parts = format!("v0.{}", version.split_once('.').map_or("", |(_, rest)| rest));
    let go = own.lines().find(|line| line.starts_with("go ")).unwrap_or_default();
    let mut made = format!("module justmtls.dev/xtask/kubernetes\n\n{go}\n\nrequire (\n");
    let requires = own.lines().filter(|line| !line.contains("// indirect") && !line.contains("=>"));
    for line in requires.map(|line| line.trim().trim_start_matches("require ")) {
        let Some((module, required)) = line.split_once(" v") else { continue };
        let required = match module.strip_prefix("k8s.io/") {
            Some("kubernetes") => format!("v{version}"),
            Some(_) => of_parts.clone(),
            None => format!("v{required}"),
        };
        made.push_str(&format!("\t{module} {required}\n"));
    }
    made.push_str(")\n\nreplace (\n");
    for line in its.lines().filter(|line| line.contains("=> ./staging/")) {
        let part = line.trim().split(' ').next().unwrap_or_default();
        made.push_str(&format!("\t{part} => {part} {of_parts}\n"));
    }
    made.push_str(")\n");
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_of_another_version_requires_what_ours_does_and_replaces_what_that_one_is_made_of() {
        let own = "module justmtls.dev/xtask/kubernetes\n\ngo 1.26.0\n\nrequire k8s.io/kubernetes v1.37.2\n\nrequire (\n\
                   \tgithub.com/spf13/cobra v1.10.2\n\tk8s.io/component-base v0.37.2\n\tk8s.io/kubectl v0.0.0\n)\n\n\
                   require (\n\tgithub.com/opencontainers/cgroups v0.0.6 // indirect\n)\n\n\
                   replace k8s.io/streaming => k8s.io/streaming v0.37.2\n";
        let its = "module k8s.io/kubernetes\n\nreplace (\n\tk8s.io/api => ./staging/src/k8s.io/api\n\
                   \tk8s.io/kubectl => ./staging/src/k8s.io/kubectl\n)\n";
        let made = "module justmtls.dev/xtask/kubernetes\n\ngo 1.26.0\n\nrequire (\n\tk8s.io/kubernetes v1.35.4\n\
                    \tgithub.com/spf13/cobra v1.10.2\n\tk8s.io/component-base v0.35.4\n\tk8s.io/kubectl v0.35.4\n)\n\n\
                    replace (\n\tk8s.io/api => k8s.io/api v0.35.4\n\tk8s.io/kubectl => k8s.io/kubectl v0.35.4\n)\n";
        assert_eq!(go_mod(own, its, "1.35.4"), made);
    }
}
