//! One set of artefacts: whatever packages are selected, a crate is compiled with the same features.

use super::Violation;
use crate::process::{cargo, output};
use anyhow::Result;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The crate in which features are brought into line. It has no code, and everybody may use it.
pub(crate) const COMMON: &str = "workspace-hack";

/// What is built by itself, and the dependencies that count there.
const SELECTIONS: &[(&str, &str)] =
    &[("cli", "normal,build"), ("bench", "normal,build"), ("xtask", "normal,build"), ("e2e", "normal,build,dev")];

/// By crate and version, the sets of features with which it is compiled.
type Features = BTreeMap<String, BTreeSet<String>>;

pub(super) fn are_the_same_for_all_selections(root: &Path) -> Result<Vec<Violation>> {
    let all = features(root, &["--workspace", "--edges", "normal,build,dev"])?;
    let mut violations = Vec::new();
    for (package, edges) in SELECTIONS {
        let some = features(root, &["--package", package, "--edges", edges])?;
        violations.extend(differences(&all, &some).into_iter().map(|what| {
            let what = format!("where `{package}` is built alone, {what}");
            let remedy = "name the features there: otherwise this and all above it is compiled twice";
            Violation::new("workspace-hack/Cargo.toml", 0, what, remedy)
        }));
    }
    Ok(violations)
}

fn features(root: &Path, selection: &[&str]) -> Result<Features> {
    let mut command = cargo();
    command.current_dir(root).args(["tree", "--locked", "--quiet", "--prefix", "none", "--format", "{p}|{f}"]);
    Ok(parse(&output(command.args(selection))?))
}

/// Lines such as `rustix v1.1.6|fs,std (*)`; those of our own crates have a path.
fn parse(tree: &str) -> Features {
    let mut all = Features::new();
    for line in tree.lines().map(|line| line.trim_end_matches(" (*)")) {
        if let (Some((package, features)), false) = (line.split_once('|'), line.contains("(/")) {
            let name = package.split(' ').take(2).collect::<Vec<_>>().join(" ");
            all.entry(name).or_default().insert(features.to_owned());
        }
    }
    all
}

/// What is compiled in the selection, and not in the whole.
fn differences(all: &Features, some: &Features) -> Vec<String> {
    let mut found = Vec::new();
    for (name, sets) in some {
        let whole = all.get(name).cloned().unwrap_or_default();
        let union: BTreeSet<&str> = whole.iter().flat_map(|set| set.split(',')).collect();
        for set in sets.difference(&whole) {
            let missing: Vec<_> = union.iter().copied().filter(|it| !set.split(',').any(|has| has == *it)).collect();
            found.push(format!("`{name}` has other features: not {}", missing.join(", ")));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crate_with_other_features_in_a_selection_is_named_with_them() {
        let all =
            parse("cli v0.1.0 (/x/cli)|\nrustix v1.1.6|fs,std,termios\nsyn v2.0.1|full\nsyn v2.0.1|full,visit (*)\n");
        assert_eq!(differences(&all, &parse("rustix v1.1.6|fs,std,termios (*)\nsyn v2.0.1|full\n")), [""; 0]);
        let found = differences(&all, &parse("rustix v1.1.6|std\n"));
        assert_eq!(found, ["`rustix v1.1.6` has other features: not fs, termios"]);
    }
}
