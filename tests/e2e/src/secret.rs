//! The private keys that a proxy has, and where in memory and files they are to be found.
//!
//! A key is looked for by its own bytes, in each form that it could be written in: what looks for the words of a PEM alone sees no
//! key that leaks as a number.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
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

/// What cannot be read of a page is not read of its neighbours either; and the unit of what is passed over.
const PAGE: u64 = 4096;
/// How much of a process's memory may be there and not readable, in bytes: the guards of its threads' stacks, a page each.
const GUARDS: u64 = 16 * PAGE;

/// All that a process can write to, and what is mapped for it alone and of no file, whatever it may do there by now: what it can
/// have in memory that others have not.
///
/// # Panics
/// There is no such process, or its memory cannot be read: what was not looked at is not known to be clean.
#[must_use]
pub fn memory(of: Pid) -> Vec<u8> {
    let maps = || mappings(&fs::read_to_string(format!("/proc/{of}/maps")).expect("a process that runs"));
    let file = File::open(format!("/proc/{of}/mem")).expect("root may read it");
    let mut memory = Vec::new();
    let mut missed = Vec::new();
    for (from, to) in maps() {
        read(&file, from, to, &mut memory, &mut missed);
    }
    // A mapping that has gone meanwhile has nothing any more; what is there still, or anew, can be read, or is a guard.
    let there = maps();
    let mut unread = Vec::new();
    for page in missed.into_iter().filter(|page| there.iter().any(|(from, to)| (from..to).contains(&page))) {
        read(&file, page, page + PAGE, &mut memory, &mut unread);
    }
    let bytes = unread.len() as u64 * PAGE;
    assert!(
        bytes <= GUARDS,
        "{bytes} bytes of the memory of {of} are there and cannot be read, from {:x?} on",
        unread[0]
    );
    assert!(memory.len() > 1 << 16, "the memory of {of} has {} bytes", memory.len());
    memory
}

/// The mappings that [`memory`] is about, of a process's list of all.
fn mappings(maps: &str) -> Vec<(u64, u64)> {
    let mapping = |line: &str| {
        let mut fields = line.split_whitespace();
        let (range, permissions) = (fields.next()?, fields.next()?);
        let (inode, name) = (fields.nth(2)?, fields.next().unwrap_or_default());
        let is_private = permissions.starts_with('r') && permissions.ends_with('p') && inode == "0";
        // The kernel's own clocks: nobody else writes there, and nobody reads them from outside.
        if name.starts_with("[vvar") || !(permissions.starts_with("rw") || is_private) {
            return None;
        }
        let (from, to) = range.split_once('-').expect("a range");
        let [from, to] = [from, to].map(|text| u64::from_str_radix(text, 16).expect("an address"));
        Some((from, to))
    };
    maps.lines().filter_map(mapping).collect()
}

/// Reads a range of a process's memory, and names the pages of it that cannot be read.
fn read(file: &File, from: u64, to: u64, memory: &mut Vec<u8>, missed: &mut Vec<u64>) {
    let mut chunk = vec![0; 1 << 20];
    let mut at = from;
    while at < to {
        let wanted = chunk.len().min((to - at) as usize);
        match file.read_at(&mut chunk[..wanted], at) {
            Ok(some) if some > 0 => {
                memory.extend_from_slice(&chunk[..some]);
                at += some as u64;
            }
            _ => {
                missed.push(at - at % PAGE);
                at += PAGE - at % PAGE;
            }
        }
    }
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
    use std::process::Command;

    use super::*;

    #[test]
    fn what_a_process_can_have_for_itself_is_looked_at_and_what_it_shares_or_cannot_read_is_not() {
        let maps = "\
1000-2000 r--p 00000000 08:01 12 /bin/x
2000-3000 rw-p 00001000 08:01 12 /bin/x
3000-4000 r--p 00000000 00:00 0
4000-5000 r-xp 00000000 00:00 0 [anon: code]
5000-6000 ---p 00000000 00:00 0
6000-7000 rw-s 00000000 00:01 7 /memfd:x (deleted)
7000-8000 r--s 00000000 08:01 9 /etc/x
8000-9000 r--p 00000000 00:00 0 [vvar]
9000-a000 rw-p 00000000 00:00 0 [stack]
";
        let found: Vec<_> = mappings(maps).into_iter().map(|(from, to)| (from >> 12, to - from)).collect();
        assert_eq!(found, [2, 3, 4, 6, 9].map(|page| (page, 0x1000)));
    }

    #[test]
    fn what_a_process_was_told_is_found_in_its_memory() {
        let needle = format!("needle-{}", std::process::id());
        let mut child = Command::new("sleep").arg("60").env("NEEDLE", &needle).spawn().expect("sleep");
        let memory = memory(Pid::from_raw(child.id() as i32));
        child.kill().expect("a child of ours");
        child.wait().expect("a child of ours");
        assert!(contains(&memory, needle.as_bytes()));
        assert!(!contains(&memory, b"needle that nobody told it"));
    }

    #[test]
    fn what_cannot_be_read_is_named_and_what_follows_it_is_read() {
        let (mut memory, mut missed) = (Vec::new(), Vec::new());
        let file = File::open("/proc/self/mem").expect("our own memory");
        // Nothing is mapped at address 0.
        read(&file, 0, 2 * PAGE, &mut memory, &mut missed);
        assert_eq!((memory.len(), missed), (0, vec![0, PAGE]));
    }

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
