//! AN IMAGE IS A VALUE: an OCI image layout of one layer in one tar archive, made from a list of entries.
//!
//! The same entries give the same bytes: entries are sorted, owned by nobody in particular (uid and gid 0), dated to
//! the epoch, and nothing is compressed, because what a compressor makes changes with its version.
//! Formats: OCI image-spec 1.1 (layout, index, manifest, configuration), POSIX.1-2017 `pax`, section "ustar".

use anyhow::{Result, ensure};
use aws_lc_rs::digest::{SHA256, digest};
use serde_json::json;
use std::collections::BTreeMap;

/// What is at a path of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Entry {
    Folder { mode: u32 },
    File { mode: u32, content: Vec<u8> },
    Link { target: String },
}

/// A program that everybody may run.
pub(crate) fn program(content: Vec<u8>) -> Entry {
    Entry::File { mode: 0o755, content }
}

/// An image: where it is from, what it is called, what it holds and how it starts.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    /// The full reference, with the tag.
    pub(crate) reference: String,
    /// As OCI calls it: `amd64` or `arm64`.
    pub(crate) architecture: &'static str,
    pub(crate) entrypoint: Vec<String>,
    pub(crate) environment: Vec<String>,
    pub(crate) labels: BTreeMap<String, String>,
    /// By path from the root, without a leading `/`.
    pub(crate) entries: BTreeMap<String, Entry>,
}

impl Image {
    /// The archive, ready to be imported by a container runtime or copied to a registry.
    pub(crate) fn archive(&self) -> Result<Vec<u8>> {
        let layer = tar(&self.entries)?;
        let configuration = json!({
            "architecture": self.architecture,
            "os": "linux",
            "config": {"Entrypoint": self.entrypoint, "Env": self.environment, "Labels": self.labels},
            "rootfs": {"type": "layers", "diff_ids": [named(&layer)]},
        });
        let configuration = serde_json::to_vec(&configuration)?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", &configuration),
            "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer)],
        });
        let manifest = serde_json::to_vec(&manifest)?;
        let mut described = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
        described["platform"] = json!({"architecture": self.architecture, "os": "linux"});
        let tag = self.reference.rsplit_once(':').map_or("latest", |(_, tag)| tag);
        // The first is the standard's, the second what containerd calls the image after an import.
        described["annotations"] =
            json!({"org.opencontainers.image.ref.name": tag, "io.containerd.image.name": self.reference});
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [described],
        });
        let mut files = BTreeMap::from([
            ("oci-layout".to_owned(), plain(br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec())),
            ("index.json".to_owned(), plain(serde_json::to_vec(&index)?)),
        ]);
        for blob in [layer, configuration, manifest] {
            files.insert(format!("blobs/sha256/{}", sha256(&blob)), plain(blob));
        }
        tar(&files)
    }
}

fn plain(content: Vec<u8>) -> Entry {
    Entry::File { mode: 0o644, content }
}

fn descriptor(media_type: &str, content: &[u8]) -> serde_json::Value {
    json!({"mediaType": media_type, "digest": named(content), "size": content.len()})
}

fn named(content: &[u8]) -> String {
    format!("sha256:{}", sha256(content))
}

/// The hash of bytes, in lower-case hexadecimal digits.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    digest(&SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

const BLOCK: usize = 512;

/// A tar archive of these entries, in the order of their paths.
fn tar(entries: &BTreeMap<String, Entry>) -> Result<Vec<u8>> {
    let mut archive = Vec::new();
    for (path, entry) in entries {
        let (kind, mode, target, content): (u8, u32, &str, &[u8]) = match entry {
            Entry::Folder { mode } => (b'5', *mode, "", &[]),
            Entry::File { mode, content } => (b'0', *mode, "", content),
            Entry::Link { target } => (b'2', 0o777, target, &[]),
        };
        archive.extend_from_slice(&header(path, kind, mode, target, content.len())?);
        archive.extend_from_slice(content);
        archive.resize(archive.len().next_multiple_of(BLOCK), 0);
    }
    // The end of an archive is two blocks of zeros.
    archive.resize(archive.len() + 2 * BLOCK, 0);
    Ok(archive)
}

fn header(path: &str, kind: u8, mode: u32, target: &str, size: usize) -> Result<[u8; BLOCK]> {
    ensure!(path.len() < 100 && target.len() < 100, "`{path}` or what it links to is too long for a tar archive");
    let mut header = [0; BLOCK];
    let mut put = |offset: usize, bytes: &[u8]| header[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0, path.as_bytes());
    put(100, format!("{mode:07o}\0").as_bytes());
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    put(124, format!("{size:011o}\0").as_bytes());
    put(136, b"00000000000\0");
    // The checksum counts itself as blanks.
    put(148, b"        ");
    put(156, &[kind]);
    put(157, target.as_bytes());
    put(257, b"ustar\x0000");
    let sum: u32 = header.iter().copied().map(u32::from).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    fn image() -> Image {
        Image {
            reference: "example.org/thing:1".to_owned(),
            architecture: "amd64",
            entrypoint: vec!["/thing".to_owned()],
            environment: Vec::new(),
            labels: BTreeMap::new(),
            entries: BTreeMap::from([
                ("thing".to_owned(), program(b"#!/bin/sh\n".to_vec())),
                ("etc".to_owned(), Entry::Folder { mode: 0o755 }),
                ("bin".to_owned(), Entry::Link { target: "usr/bin".to_owned() }),
            ]),
        }
    }

    #[test]
    fn the_same_entries_give_the_same_bytes() {
        let one = image().archive().unwrap();
        assert_eq!(one, image().archive().unwrap());
        let mut other = image();
        other.entries.insert("thing".to_owned(), program(b"#!/bin/bash\n".to_vec()));
        assert_ne!(one, other.archive().unwrap());
    }

    #[test]
    fn the_archive_is_one_that_tar_reads() {
        let mut tar = Command::new("tar")
            .args(["-tvf", "-", "--utc", "--numeric-owner"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        tar.stdin.take().unwrap().write_all(&super::tar(&image().entries).unwrap()).unwrap();
        let output = tar.wait_with_output().unwrap();
        assert!(output.status.success());
        let listing = String::from_utf8(output.stdout).unwrap();
        let fields: Vec<Vec<&str>> = listing.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(fields[0], ["lrwxrwxrwx", "0/0", "0", "1970-01-01", "00:00", "bin", "->", "usr/bin"]);
        assert_eq!(fields[1], ["drwxr-xr-x", "0/0", "0", "1970-01-01", "00:00", "etc"]);
        assert_eq!(fields[2], ["-rwxr-xr-x", "0/0", "10", "1970-01-01", "00:00", "thing"]);
    }

    #[test]
    fn every_blob_is_where_its_digest_says() {
        let image = image();
        let layer = super::tar(&image.entries).unwrap();
        let archive = image.archive().unwrap();
        let name = format!("blobs/sha256/{}", sha256(&layer));
        let at = archive.windows(name.len()).position(|window| window == name.as_bytes()).unwrap();
        assert_eq!(archive[at + BLOCK..at + BLOCK + layer.len()], layer);
        let text = String::from_utf8_lossy(&archive);
        assert!(text.contains(&named(&layer)) && text.contains(r#""io.containerd.image.name":"example.org/thing:1""#));
    }

    #[test]
    fn what_does_not_fit_into_a_header_is_refused() {
        let entries = BTreeMap::from([("x".repeat(100), Entry::Folder { mode: 0o755 })]);
        assert!(super::tar(&entries).is_err());
    }
}
