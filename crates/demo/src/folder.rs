//! The control plane's input: a folder with one file for each object, each replaced by rename, so that
//! who watches the folder never reads half an object.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use manifests::{Object, ObjectKey};

/// The folder and what is in it.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    written: BTreeMap<ObjectKey, String>,
}

impl Folder {
    /// Makes the folder.
    pub(crate) fn create(path: PathBuf) -> io::Result<Folder> {
        fs::create_dir_all(&path)?;
        Ok(Folder { path, written: BTreeMap::new() })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the folder hold exactly `objects`; only what is different is touched. After an error the
    /// next call tries again.
    pub(crate) fn hold<'a>(&mut self, objects: impl Iterator<Item = (&'a ObjectKey, &'a Object)>) -> io::Result<()> {
        let mut superfluous: Vec<_> = self.written.keys().cloned().collect();
        for (key, object) in objects {
            superfluous.retain(|present| present != key);
            let text = object.to_yaml();
            if self.written.get(key) != Some(&text) {
                // A leading dot: not a manifest until it has its name.
                let draft = self.path.join(format!(".{}", file_name(key)));
                fs::write(&draft, &text)?;
                fs::rename(&draft, self.path.join(file_name(key)))?;
                self.written.insert(key.clone(), text);
            }
        }
        for key in superfluous {
            fs::remove_file(self.path.join(file_name(&key)))?;
            self.written.remove(&key);
        }
        Ok(())
    }
}

/// Names of objects are DNS names, so the parts can be told apart by what these cannot have.
fn file_name(key: &ObjectKey) -> String {
    let kind = key.kind.as_str().to_lowercase();
    match &key.namespace {
        Some(namespace) => format!("{kind}_{namespace}_{}.yaml", key.name),
        None => format!("{kind}_{}.yaml", key.name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objects(yaml: &str) -> Vec<(ObjectKey, Object)> {
        let parsed = manifests::parse("test", yaml);
        parsed.objects.into_iter().map(|(object, _)| (object.key(), object)).collect()
    }

    #[test]
    fn the_folder_holds_what_it_was_told_and_reads_back_as_the_same_objects() {
        let place = tempfile::tempdir().unwrap();
        let mut folder = Folder::create(place.path().join("objects")).unwrap();
        let both = objects(
            "{apiVersion: v1, kind: Namespace, metadata: {name: shop}}\n---\n\
             {apiVersion: v1, kind: ServiceAccount, metadata: {name: web, namespace: shop}}",
        );
        folder.hold(both.iter().map(|(key, object)| (key, object))).unwrap();
        let text = fs::read_to_string(place.path().join("objects/serviceaccount_shop_web.yaml")).unwrap();
        assert_eq!(objects(&text), both[1..]);

        folder.hold(both[..1].iter().map(|(key, object)| (key, object))).unwrap();
        let left: Vec<_> = fs::read_dir(place.path().join("objects")).unwrap().flatten().collect();
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].file_name(), "namespace_shop.yaml");
    }
}
