//! `cargo xtask bench` measures what it says, and leaves nothing. Its numbers are no test's business: how fast a shared
//! machine is, is not the product's doing.

#![forbid(unsafe_code)]

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use e2e::{Program, binary, needs, wait_until};
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

/// Three boxes and all slices, on a busy machine.
const RUN: Duration = Duration::from_secs(120);

/// A folder in which the measurement makes its boxes.
struct Place(TempDir);

impl Place {
    fn new() -> Place {
        Place(tempfile::Builder::new().prefix("justmtls-e2e-").tempdir().unwrap())
    }

    fn bench(&self, arguments: &[&str]) -> Program {
        let beside = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("bench");
        assert!(beside.is_file(), "build it first: `cargo build --release -p bench`, as `cargo xtask test` does");
        let all = ["--quick", "--connections", "64", "--pods", "2"];
        Program::new(beside)
            .env("TMPDIR", self.0.path())
            .env("JUSTMTLS_BIN", binary())
            .args(all)
            .args(arguments)
            .within(RUN)
    }

    fn entries(&self) -> Vec<PathBuf> {
        fs::read_dir(self.0.path()).unwrap().map(|entry| entry.unwrap().path()).collect()
    }
}

#[test]
fn every_measure_has_numbers_of_every_contender() {
    needs!("root", "ip", "ss");
    let place = Place::new();
    let file = place.0.path().join("run.json");
    let table = place.bench(&["--json", file.to_str().unwrap()]).run().ok();
    assert!(table.contains("justmtls / double"), "{table}");

    let run: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    let rounds = run["rounds"].as_array().unwrap();
    assert_eq!(rounds.len(), 2 * 7, "two layouts of seven measures: {rounds:?}");
    for round in rounds {
        for contender in ["direct", "double", "justmtls"] {
            let numbers = round["numbers"][contender].as_object().unwrap();
            assert!(numbers.len() >= 3, "{round:#}");
            for (name, number) in numbers {
                // Without a proxy there is none that takes time; and the kernel counts the machine's in steps of 10 ms.
                let may_be_zero = name.starts_with("machine") || contender == "direct" && name.starts_with("proxies");
                let number = number.as_f64().unwrap_or_else(|| panic!("{name} of {contender} is no number: {round:#}"));
                assert!(number > 0.0 || may_be_zero, "{name} of {contender}: {round:#}");
            }
        }
        // Two proxies more on the way take time; a "double" that is none would show here.
        let time = |contender: &str| round["numbers"][contender]["proxies_cpu_us_each"].as_f64();
        assert!(
            time("double").is_none_or(|time| time > 1.0) && time("direct").is_none_or(|time| time == 0.0),
            "{round:#}"
        );
    }
    assert!(run["memory"]["proxy"]["resident"].as_u64().unwrap() > 1_000_000, "{run:#}");
    assert_eq!(place.entries(), [file], "only what was asked for is left");
}

#[test]
fn a_check_fails_where_a_mark_was_missed_or_not_measured() {
    needs!("root", "ip", "ss");
    let place = Place::new();
    place.bench(&["--only", "connect-cold"]).run().ok();
    let checked = place.bench(&["--only", "connect-cold", "--check"]).run();
    assert!(!checked.success() && checked.stdout.contains("not measured"), "it measured, and then failed: {checked}");
    assert!(place.entries().is_empty(), "{:?}", place.entries());
}

#[test]
fn ctrl_c_in_the_middle_leaves_nothing() {
    needs!("root", "ip", "ss");
    let place = Place::new();
    let mut running = place.bench(&["--rounds", "1000", "--slice", "100", "--only", "ping"]).spawn();
    // The box is up and all contenders are in it.
    running.wait_for_within("one-cpu ping", RUN);
    assert_eq!(place.entries().len(), 1, "the box has its folder");
    running.signal(Signal::SIGINT);
    let finished = running.finish(RUN);
    assert!(!finished.success(), "{finished}");
    wait_until("the box's folder to go", RUN, || match place.entries() {
        left if left.is_empty() => Ok(()),
        left => Err(format!("{left:?}")),
    });
}
