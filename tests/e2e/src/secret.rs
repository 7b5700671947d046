//! The private keys that a proxy has, and where in memory and files they are to be found.
//!
//! A key is looked for by its own bytes, in each form that it could be written in: what looks for the words of a PEM alone sees no
//! key that leaks as a number.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use nix::unistd::Pid;
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject;

/// Bytes of a private key of P-256.
const LENGTH: usize = 32;
/// What stands before them in an ECPrivateKey in DER (RFC 5915): version 1, and an octet string of that length.
const BEFORE: &[u8] = &[0x02, 0x01, 0x01, 0x04, LENGTH as u8];
/// Where a key begins as PEM (RFC 7468).
const BEGIN: &[u8] = b"-----BEGIN PRIVATE KEY-----";
const BASE64: [&[u8; 64]; 2] = [
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/",
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_",
];

/// A private key, as the forms that it could be written in.
pub struct Secret {
    /// As it is in memory: its bytes, from either end.
    plain: [Vec<u8>; 2],
    /// As text.
    texts: Vec<Vec<u8>>,
}

impl Secret {
    fn of(key: &[u8]) -> Secret {
        let backwards: Vec<u8> = key.iter().rev().copied().collect();
        let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        let list = key.iter().map(u8::to_string).collect::<Vec<_>>().join(", ");
        let mut texts = vec![hex.to_uppercase().into_bytes(), hex.into_bytes(), list.into_bytes()];
        for alphabet in BASE64 {
            texts.extend((0..3).map(|before| base64(key, before, alphabet)));
        }
        Secret { plain: [key.to_vec(), backwards], texts }
    }

    /// Whether it is there as bytes.
    #[must_use]
    pub fn is_plain_in(&self, place: &[u8]) -> bool {
        self.plain.iter().any(|form| contains(place, form))
    }

    /// Whether it is written there.
    #[must_use]
    pub fn is_text_in(&self, place: &[u8]) -> bool {
        self.texts.iter().any(|form| contains(place, form))
    }

    /// Whether it is there in any form.
    #[must_use]
    pub fn is_in(&self, place: &[u8]) -> bool {
        self.is_plain_in(place) || self.is_text_in(place)
    }
}

/// The digits of a key in base64 (RFC 4648) that depend on nothing but it, where so many bytes of something else come before it in
/// its group of three.
fn base64(key: &[u8], before: usize, alphabet: &[u8; 64]) -> Vec<u8> {
    let bits: Vec<u8> = key.iter().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1)).collect();
    let skipped = [0, 4, 2][before];
    let digits = bits[skipped..].chunks_exact(6);
    digits.map(|digit| alphabet[digit.iter().fold(0, |number, bit| number << 1 | usize::from(*bit))]).collect()
}

fn contains(place: &[u8], form: &[u8]) -> bool {
    // A search for the first byte is quick; memory is large.
    let mut rest = place;
    while let Some(at) = rest.iter().position(|byte| *byte == form[0]) {
        if rest[at..].starts_with(form) {
            return true;
        }
        rest = &rest[at + 1..];
    }
    false
}

/// The keys in memory that a process holds sealed, without reading it, for another one.
#[must_use]
pub fn keys_held_by(holder: Pid) -> Vec<Secret> {
    let descriptors = fs::read_dir(format!("/proc/{holder}/fd")).expect("a process of ours").flatten();
    let sealed = descriptors.filter(|it| {
        fs::read_link(it.path()).is_ok_and(|to| to.as_os_str().as_encoded_bytes().starts_with(b"/memfd:"))
    });
    let mut keys = Vec::new();
    for descriptor in sealed {
        let content = fs::read(descriptor.path()).unwrap_or_default();
        // Each text stands behind its length, which is no line.
        for at in (0..content.len()).filter(|at| content[*at..].starts_with(BEGIN)) {
            let key = PrivatePkcs8KeyDer::from_pem_slice(&content[at..]).expect("a key of its proxy");
            let key = key.secret_pkcs8_der();
            let at = key.windows(BEFORE.len()).position(|it| it == BEFORE).expect("a key of P-256") + BEFORE.len();
            keys.push(Secret::of(&key[at..at + LENGTH]));
        }
    }
    keys
}

/// All that a process can write to, and what is mapped for it alone: what it can have in memory that others have not.
///
/// # Panics
/// There is no such process, or its memory cannot be read: what was not looked at is not known to be clean.
#[must_use]
pub fn memory(of: Pid) -> Vec<u8> {
    let maps = fs::read_to_string(format!("/proc/{of}/maps")).expect("a process that runs");
    let mut file = File::open(format!("/proc/{of}/mem")).expect("root may read it");
    let mut memory = Vec::new();
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let (Some(range), Some(permissions)) = (fields.next(), fields.next()) else { continue };
        if !permissions.starts_with("rw") {
            continue;
        }
        let (from, to) = range.split_once('-').expect("a range");
        let [from, to] = [from, to].map(|text| u64::from_str_radix(text, 16).expect("an address"));
        file.seek(SeekFrom::Start(from)).expect("an address");
        // A mapping that has gone meanwhile, or a guard, cannot be read.
        let _ = (&mut file).take(to - from).read_to_end(&mut memory);
    }
    assert!(memory.len() > 1 << 16, "the memory of {of} has {} bytes", memory.len());
    memory
}

/// All files below a folder, with their contents.
#[must_use]
pub fn files_below(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => files.extend(files_below(&entry.path())),
            Ok(kind) if kind.is_file() => files.push((entry.path(), fs::read(entry.path()).unwrap_or_default())),
            _ => {}
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_in_each_form_and_what_is_not_there_is_not() {
        let key: Vec<u8> = (100..132).collect();
        let secret = Secret::of(&key);
        assert!(secret.is_plain_in(&[&[1, 2, 100], &key[..], &[3]].concat()));
        assert!(secret.is_in(&key.iter().rev().copied().collect::<Vec<_>>()));
        assert!(!secret.is_in(&key[1..]));
        assert!(secret.is_in(format!("key={key:?}").as_bytes()));
        // As `base64` of coreutils has `dddd…` with no, one and two bytes before.
        for text in [
            "ZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXp7fH1+f4CBgoM=",
            "eGRlZmdoaWprbG1ub3BxcnN0dXZ3eHl6e3x9fn+AgYKD",
            "eHhkZWZnaGlqa2xtbm9wcXJzdHV2d3h5ent8fX5/gIGCgw==",
            "ZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXp7fH1-f4CBgoM",
        ] {
            assert!(secret.is_in(text.as_bytes()), "{text}");
        }
        assert!(!secret.is_in(b"ZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXp7fH1"));
    }
}
