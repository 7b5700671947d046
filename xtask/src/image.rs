//! `cargo xtask image`: the product as an image that holds one static program and nothing else: no shell, no C library,
//! no package that could be out of date.
//!
//! The same tree, compiler and place give the same bytes.

use crate::oci::{Image, program};
use crate::process::succeeds;
use crate::product::{Architecture, build};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, ExitCode};

/// Without the tag, which is the version.
const REPOSITORY: &str = "ghcr.io/justmtls/justmtls";

/// The kind of a program header that names a dynamic loader (`PT_INTERP` of the ELF specification).
const INTERPRETER: u32 = 3;

/// What was asked for.
#[derive(Debug, PartialEq, Eq)]
struct Request {
    output: String,
    architecture: Architecture,
}

impl Request {
    fn parse(arguments: &[String]) -> Result<Self> {
        let mut output = None;
        let mut architecture = Architecture::native()?;
        let mut rest = arguments.iter();
        while let Some(word) = rest.next() {
            let (name, given) = word.split_once('=').map_or((word.as_str(), None), |(name, value)| (name, Some(value)));
            let mut value =
                || given.or_else(|| rest.next().map(String::as_str)).with_context(|| format!("`{name}` takes a value"));
            match name {
                "--output" => output = Some(value()?.to_owned()),
                "--arch" => architecture = Architecture::named(value()?)?,
                _ => bail!("`image` takes `--output FILE` and `--arch amd64|arm64`, not `{word}`"),
            }
        }
        let output = output.context("`image` takes `--output FILE`: where the archive is written")?;
        Ok(Self { output, architecture })
    }
}

pub(crate) fn run(root: &Path, arguments: &[String]) -> Result<ExitCode> {
    let request = Request::parse(arguments)?;
    let built = build(root, request.architecture)?;
    let stripped = built.with_extension("stripped");
    let tool = request.architecture.tool("strip")?;
    // Where lines are is for whoever debugs, and is most of the file; names of functions stay, for traces.
    let done = succeeds(
        Command::new(&tool).args(["--strip-debug", "--enable-deterministic-archives", "-o"]).arg(&stripped).arg(&built),
    )
    .with_context(|| format!("`{tool}` is of binutils, like the linker: install that package"))?;
    ensure!(done, "{tool} failed on {}", built.display());
    let content = std::fs::read(&stripped).with_context(|| format!("cannot read {}", stripped.display()))?;
    ensure!(is_static(&content)?, "{} needs a dynamic loader, which the image does not have", built.display());
    let size = content.len();
    let image = image(request.architecture, content);
    std::fs::write(&request.output, image.archive()?).with_context(|| format!("cannot write {}", request.output))?;
    println!("{}: {} for linux/{}, {size} bytes of program", request.output, image.reference, image.architecture);
    Ok(ExitCode::SUCCESS)
}

fn image(architecture: Architecture, content: Vec<u8>) -> Image {
    let version = env!("CARGO_PKG_VERSION");
    let label = |name: &str, value: &str| (format!("org.opencontainers.image.{name}"), value.to_owned());
    Image {
        reference: format!("{REPOSITORY}:{version}"),
        architecture: architecture.oci,
        entrypoint: vec!["/justmtls".to_owned()],
        environment: Vec::new(),
        labels: BTreeMap::from([
            label("title", "justmtls"),
            label("version", version),
            label("licenses", "Apache-2.0"),
        ]),
        entries: BTreeMap::from([("justmtls".to_owned(), program(content))]),
    }
}

/// Whether a 64-bit little-endian ELF file, as both architectures have it, asks for no dynamic loader.
fn is_static(file: &[u8]) -> Result<bool> {
    ensure!(file.starts_with(b"\x7fELF\x02\x01"), "this is no 64-bit little-endian ELF file");
    let number = |offset: usize, length: usize| -> Result<usize> {
        let bytes = file.get(offset..offset + length).context("the ELF file ends too early")?;
        Ok(bytes.iter().rev().fold(0, |sum, byte| sum << 8 | usize::from(*byte)))
    };
    let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    for index in 0..count {
        if number(table + index * size, 4)? == INTERPRETER as usize {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Request> {
        Request::parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn the_file_must_be_named_and_the_architecture_known() {
        assert_eq!(parse("--output x.tar --arch=arm64").unwrap().architecture.oci, "arm64");
        assert_eq!(parse("--output=x.tar").unwrap().output, "x.tar");
        for (line, wanted) in [
            ("", "--output"),
            ("--output", "takes a value"),
            ("--output x --arch sparc", "`sparc`"),
            ("--output x --tag y", "`--tag`"),
        ] {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.contains(wanted), "{line}: {error}");
        }
    }

    #[test]
    fn a_program_that_needs_a_loader_is_seen() {
        // Any machine's shell is linked dynamically.
        assert!(!is_static(&std::fs::read("/bin/sh").unwrap()).unwrap());
        assert!(is_static(b"#!/bin/sh").is_err());
        // The header of an ELF file without program headers.
        let mut header = vec![0; 64];
        header[..6].copy_from_slice(b"\x7fELF\x02\x01");
        assert!(is_static(&header).unwrap());
        assert!(is_static(&header[..40]).is_err());
    }

    #[test]
    fn the_image_is_the_program_and_nothing_else() {
        let architecture = Architecture::named("amd64").unwrap();
        let archive = image(architecture, b"program".to_vec()).archive().unwrap();
        assert_eq!(archive, image(architecture, b"program".to_vec()).archive().unwrap());
        let text = String::from_utf8_lossy(&archive);
        assert!(text.contains(r#""Entrypoint":["/justmtls"]"#) && text.contains("ghcr.io/justmtls/justmtls:0."));
        assert!(!text.contains(r#""User""#));
    }
}
