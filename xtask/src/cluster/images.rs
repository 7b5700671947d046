//! The images that a cluster has without a registry: what holds a pod's namespaces, and one for any program of this machine.

use crate::oci::{Entry, Image, program};
use crate::product::Architecture;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::path::Path;

pub(super) const PAUSE: &str = "localhost/pause:1";
/// Links into `/usr` and little else: with this machine's `/usr` as a hostPath volume, each program of it runs.
pub(super) const MACHINE: &str = "localhost/machine:1";

/// The archives that each node imports when it starts, by file name.
pub(super) fn archives(programs: &Path) -> Result<Vec<(&'static str, Vec<u8>)>> {
    Ok(vec![("pause.tar", pause(programs)?), ("machine.tar", machine()?)])
}

fn pause(programs: &Path) -> Result<Vec<u8>> {
    let file = programs.join("pause");
    let content = std::fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
    archive(PAUSE, vec!["/pause".to_owned()], BTreeMap::from([("pause".to_owned(), program(content))]))
}

fn machine() -> Result<Vec<u8>> {
    let mut entries = BTreeMap::new();
    for folder in ["dev", "etc", "proc", "root", "run", "sys", "usr", "var", "var/cache", "var/lib", "var/log"] {
        entries.insert(folder.to_owned(), Entry::Folder { mode: 0o755 });
    }
    for folder in ["tmp", "var/tmp"] {
        entries.insert(folder.to_owned(), Entry::Folder { mode: 0o1777 });
    }
    entries.insert("var/run".to_owned(), Entry::Link { target: "/run".to_owned() });
    for link in ["bin", "sbin", "lib", "lib32", "lib64"] {
        entries.insert(link.to_owned(), Entry::Link { target: format!("usr/{link}") });
    }
    // Users that programs change to, and which of several programs a name means.
    for file in ["passwd", "group", "nsswitch.conf", "ld.so.cache", "mime.types"] {
        if let Ok(content) = std::fs::read(Path::new("/etc").join(file)) {
            entries.insert(format!("etc/{file}"), Entry::File { mode: 0o644, content });
        }
    }
    entries.insert("etc/alternatives".to_owned(), Entry::Folder { mode: 0o755 });
    for alternative in std::fs::read_dir("/etc/alternatives").into_iter().flatten() {
        let alternative = alternative?;
        if let (Ok(target), Ok(name)) = (std::fs::read_link(alternative.path()), alternative.file_name().into_string())
        {
            let target = target.to_string_lossy().into_owned();
            // The manual pages of what was replaced have long names, and nobody reads them in a pod.
            if !target.contains("/man/") && target.len() < 100 && name.len() < 80 {
                entries.insert(format!("etc/alternatives/{name}"), Entry::Link { target });
            }
        }
    }
    archive(MACHINE, Vec::new(), entries)
}

fn archive(reference: &str, entrypoint: Vec<String>, entries: BTreeMap<String, Entry>) -> Result<Vec<u8>> {
    let image = Image {
        reference: reference.to_owned(),
        architecture: Architecture::native()?.oci,
        entrypoint,
        environment: vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin".to_owned()],
        labels: BTreeMap::new(),
        entries,
    };
    image.archive()
}
