//! Manifests of the user, or the built-in ones: text in, objects and sentences out.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use manifests::{Location, Object, Parsed, Problem, Set, validate_for_box};

/// The cluster that one gets without saying anything.
const DEFAULT: &str = include_str!("shop.yaml");

/// Objects in the order of their text, and what is wrong with others.
#[derive(Debug, Default)]
pub(crate) struct Manifest {
    pub(crate) objects: Vec<(Object, Location)>,
    pub(crate) problems: Vec<Problem>,
    /// To find what is written twice.
    seen: Set,
}

impl Manifest {
    /// The built-in one.
    pub(crate) fn built_in() -> Manifest {
        Manifest::from_text("shop.yaml", DEFAULT)
    }

    /// The built-in one as it is before the shop joins the mesh: its namespace is still opted out.
    pub(crate) fn before_capture() -> Manifest {
        let mut manifest = Manifest::built_in();
        for (object, _) in &mut manifest.objects {
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
        self.problems.extend(parsed.problems);
        for (object, location) in parsed.objects {
            let mut found = validate_for_box(&object, &location);
            found.extend(self.seen.insert(object.clone(), location.clone()));
            if !found.iter().any(Problem::is_error) {
                self.objects.push((object, location));
            }
            self.problems.extend(found);
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
        assert_eq!(manifest.problems, []);
        assert!(manifest.objects.len() > 5);
    }

    #[test]
    fn what_is_wrong_is_said_and_what_is_right_is_taken() {
        let text = "{apiVersion: v1, kind: Namespace, metadata: {name: shop}}\n---\n\
             {apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, spec: {ports: [{port: 70000}]}}\n---\n\
             {apiVersion: v1, kind: Pod, metadata: {name: web, namespace: shop}, spec: {containers: [{name: web, image: nginx}]}}";
        let manifest = Manifest::from_text("mine.yaml", text);
        assert_eq!(manifest.objects.len(), 1);
        let said: Vec<_> = manifest.problems.iter().map(ToString::to_string).collect();
        assert!(said.iter().any(|one| one.contains("70000")), "{said:?}");
        assert!(said.iter().any(|one| one.contains("command")), "{said:?}");
    }

    #[test]
    fn of_two_files_with_the_same_object_the_first_counts_and_both_are_named() {
        let place = tempfile::tempdir().unwrap();
        let service = |port: u16| {
            format!(
                "{{apiVersion: v1, kind: Service, metadata: {{name: web, namespace: shop}}, spec: {{ports: [{{port: {port}}}]}}}}"
            )
        };
        fs::write(place.path().join("a.yaml"), service(80)).unwrap();
        fs::write(place.path().join("b.yaml"), service(81)).unwrap();
        let manifest = Manifest::from_path(place.path()).unwrap();
        assert_eq!(manifest.objects.len(), 1);
        assert!(manifest.objects[0].1.file.ends_with("a.yaml"));
        let said = manifest.problems[0].to_string();
        assert!(said.contains("a.yaml") && said.contains("b.yaml"), "{said}");
    }

    #[test]
    fn a_folder_without_manifests_is_an_error() {
        let place = tempfile::tempdir().unwrap();
        assert!(Manifest::from_path(place.path()).unwrap_err().to_string().contains("there is no .yaml"));
        assert!(Manifest::from_path(&place.path().join("none")).is_err());
    }
}
