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
        self.program().args(["--quick", "--connections", "64", "--pods", "2"]).args(arguments)
    }

    fn program(&self) -> Program {
        let beside = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("bench");
        assert!(beside.is_file(), "build it first: `cargo build --release -p bench`, as `cargo xtask test` does");
        Program::new(beside).env("TMPDIR", self.0.path()).env("JUSTMTLS_BIN", binary()).within(RUN)
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

#[test]
fn the_control_plane_of_a_cluster_that_changes_tells_every_node_what_it_is_to_know() {
    needs!("root", "ip", "ss");
    let place = Place::new();
    let file = place.0.path().join("control.json");
    let small = ["control", "--nodes", "20", "--pods", "1000", "--churn", "100", "--seconds", "3", "--json"];
    // It fails where one node knows anything else in the end than is so.
    let table = place.program().args(small).args([&file]).run().ok();
    assert!(table.contains("resident, churn, most"), "{table}");

    let run: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(run["replaced"], 300, "{run:#}");
    // Each pod is on a node, whose agent and proxy hear of it; and five of twenty Services are dialled from each of the others.
    let at_least = [("placed", 300), ("with_address", 1000), ("gone", 1000)];
    for (delay, least) in at_least {
        assert!(run[delay]["count"].as_u64().unwrap() >= least, "{delay} of at least {least}: {run:#}");
        assert!(run[delay]["p50"].as_f64().unwrap() > 0.0, "{run:#}");
    }
    for number in ["ready_after", "resident_ready", "churn_processor", "bytes_per_node", "told"] {
        assert!(run[number].as_f64().unwrap() > 0.0, "{number}: {run:#}");
    }
    assert_eq!(run["lists_again"], 0.0, "changes came by watches: {run:#}");
    assert_eq!(place.entries(), [file], "only what was asked for is left");
}
