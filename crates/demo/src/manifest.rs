//! Manifests of the user, or the built-in ones: text in, objects and sentences out.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use manifests::{Object, Parsed, validate_for_box};

/// The cluster that one gets without saying anything.
const DEFAULT: &str = include_str!("shop.yaml");

/// Objects in the order of their text, and what is wrong with others.
#[derive(Debug, Default)]
pub(crate) struct Manifest {
    pub(crate) objects: Vec<Object>,
    /// One sentence each.
    pub(crate) problems: Vec<String>,
}

impl Manifest {
    /// The built-in one.
    pub(crate) fn built_in() -> Manifest {
        Manifest::from_text("shop.yaml", DEFAULT)
    }

    /// The built-in one as it is before the shop joins the mesh: its namespace is still opted out.
    pub(crate) fn before_capture() -> Manifest {
        let mut manifest = Manifest::built_in();
        for object in &mut manifest.objects {
            if let Object::Namespace(namespace) = object
                && namespace.metadata.name.as_deref() == Some("shop")
            {
                let labels = namespace.metadata.labels.get_or_insert_default();
                labels.insert("justmtls.dev/mode".to_owned(), "off".to_owned());
            }
        }
        manifest
    }

    /// One text.
    pub(crate) fn from_text(file: &str, text: &str) -> Manifest {
        let mut manifest = Manifest::default();
        manifest.take(manifests::parse(file, text));
        manifest
    }

    /// A file, or all `.yaml`, `.yml` and `.json` files of a folder in the order of their names.
    pub(crate) fn from_path(path: &Path) -> anyhow::Result<Manifest> {
        let mut manifest = Manifest::default();
        for file in files(path)? {
            let text = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
            manifest.take(manifests::parse(&file.display().to_string(), text));
        }
        Ok(manifest)
    }

    fn take(&mut self, parsed: Parsed) {
        self.problems.extend(parsed.problems.iter().map(ToString::to_string));
        for (object, location) in parsed.objects {
            let found = validate_for_box(&object, &location);
            self.problems.extend(found.iter().map(ToString::to_string));
            if !found.iter().any(manifests::Problem::is_error) {
                self.objects.push(object);
            }
        }
    }
}

fn files(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let found = fs::metadata(path).with_context(|| format!("cannot read manifests from {}", path.display()))?;
    if !found.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let is_manifest = |path: &PathBuf| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        matches!(extension, Some("yaml" | "yml" | "json"))
    };
    let entries = fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut all: Vec<_> = entries.flatten().map(|entry| entry.path()).filter(is_manifest).collect();
    if all.is_empty() {
        bail!("there is no .yaml, .yml or .json file in {}", path.display());
    }
    all.sort();
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_manifest_has_no_problem() {
        let manifest = Manifest::built_in();
        assert_eq!(manifest.problems, [""; 0]);
        assert!(manifest.objects.len() > 5);
    }

    #[test]
    fn what_is_wrong_is_said_and_what_is_right_is_taken() {
        let text = "{apiVersion: v1, kind: Namespace, metadata: {name: shop}}\n---\n\
             {apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, spec: {ports: [{port: 70000}]}}\n---\n\
             {apiVersion: v1, kind: Pod, metadata: {name: web, namespace: shop}, spec: {containers: [{name: web, image: nginx}]}}";
        let manifest = Manifest::from_text("mine.yaml", text);
        assert_eq!(manifest.objects.len(), 1);
        assert!(manifest.problems.iter().any(|one| one.contains("70000")), "{:?}", manifest.problems);
        assert!(manifest.problems.iter().any(|one| one.contains("command")), "{:?}", manifest.problems);
    }

    #[test]
    fn a_folder_without_manifests_is_an_error() {
        let place = tempfile::tempdir().unwrap();
        assert!(Manifest::from_path(place.path()).unwrap_err().to_string().contains("there is no .yaml"));
        assert!(Manifest::from_path(&place.path().join("none")).is_err());
    }
}
