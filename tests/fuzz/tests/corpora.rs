//! The kept corpora, and thousands of changes to them, through every parser that faces a stranger.
//!
//! `JUSTMTLS_FUZZ_SECONDS` makes each of them go on for so long, from a seed of the moment that it prints.

#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fuzzing::mutate::{Dice, mutated};
use fuzzing::{TARGETS, Target};

/// Changed inputs for each target in an ordinary run.
const CHANGED: usize = 20_000;

fn corpus(target: &Target) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target.name);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    // The order in a folder is nobody's promise.
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// Runs one input, and shows it where something does not hold.
fn check(target: &Target, input: &[u8]) {
    let shown = Shown(target.name, input);
    (target.check)(input);
    std::mem::forget(shown);
}

struct Shown<'a>(&'static str, &'a [u8]);

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        eprintln!("the input for {} ({} bytes): {:02x?}", self.0, self.1.len(), self.1);
    }
}

/// The most memory that this process has ever had, in KiB.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn run(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    let known = corpus(target);
    assert!(known.len() >= 3, "{name}: a corpus of {}", known.len());
    known.iter().for_each(|input| check(target, input));
    check(target, &[]);
    let mut dice = Dice::new(0x5eed);
    for _ in 0..CHANGED {
        check(target, &mutated(&known, &mut dice));
    }
    if let Ok(seconds) = std::env::var("JUSTMTLS_FUZZ_SECONDS") {
        let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
        let (mut dice, mut count) = (Dice::new(seed), 0_u64);
        let end = Instant::now() + Duration::from_secs(seconds.parse().unwrap());
        while Instant::now() < end {
            check(target, &mutated(&known, &mut dice));
            count += 1;
        }
        println!("{name}: {count} inputs from seed {seed}");
    }
    let peak = peak();
    assert!(peak < 512 * 1024, "{name}: inputs of 70 KB made this process have {peak} KiB");
}

macro_rules! targets {
    ($($name:ident),* $(,)?) => {
        $(#[test] fn $name() { run(stringify!($name)); })*

        #[test]
        fn every_target_has_its_test_and_its_libfuzzer_program() {
            assert_eq!(TARGETS.iter().map(|target| target.name).collect::<Vec<_>>(), [$(stringify!($name)),*]);
            for target in TARGETS {
                let program = format!("{}/../../fuzz/fuzz_targets/{}.rs", env!("CARGO_MANIFEST_DIR"), target.name);
                assert!(fs::exists(&program).unwrap(), "{program}");
            }
        }
    };
}

targets!(hello, frames, discovery_client, discovery_server, pods, probe, csr, manifests);
