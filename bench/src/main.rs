//! `bench`: what justmtls costs, beside a plaintext double proxy and beside no proxy, measured in one run on one machine.
//! PERFORMANCE.md says what is measured and how to read it; `cargo xtask bench` builds what it needs and runs it.
//!
//! Everything happens in a box of `justmtls demo`: two nodes, and for each contender a pod with a client on one and a pod
//! with a server on the other. The programs in these pods are this same program, by its other subcommands.
//!
//! Invariants, stated as absences: no address but those of the box; no wait without an end; no round left out but for
//! other programs' load, which is counted and printed; nothing stays when it ends, also by Ctrl-C.

#![forbid(unsafe_code)]
// One object of Kubernetes is one `json!`.
#![recursion_limit = "256"]

// The control plane, by itself
mod control;
// What is measured, and who
mod contender;
mod plan;
// How
mod memory;
mod run;
// What came out
mod compare;
mod marks;
mod results;
// In the pods
mod double;
mod load;
// The world
mod cluster;
mod congestion;
mod ending;
mod processor;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};

use crate::cluster::Cluster;
use crate::ending::Ending;
use crate::plan::Layout;
use crate::results::{Machine, Results};
use crate::run::Settings;

#[derive(Debug, Parser)]
#[command(name = "bench", about = "Measures justmtls beside a plaintext double proxy and beside no proxy.")]
struct Arguments {
    #[command(subcommand)]
    part: Option<Part>,
    #[command(flatten)]
    measuring: Measuring,
}

#[derive(Debug, Args)]
struct Measuring {
    /// A few short slices: shows that everything works, and says nothing about speed.
    #[arg(long)]
    quick: bool,
    /// Fail when a mark is missed by more than 15 %.
    #[arg(long)]
    check: bool,
    /// Write all that was measured to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Compare two such files instead of measuring.
    #[arg(long, num_args = 2, value_names = ["BEFORE", "AFTER"])]
    compare: Option<Vec<PathBuf>>,
    /// Rounds of each measure; 8 where it is not said.
    #[arg(long)]
    rounds: Option<usize>,
    /// The length of a slice, in milliseconds; 500 where it is not said.
    #[arg(long, value_name = "MS")]
    slice: Option<u64>,
    /// How much of a processor other programs may use in a round before it is done again; 0.1 where it is not said.
    #[arg(long, value_name = "PROCESSORS")]
    foreign: Option<f64>,
    /// Only measures whose name contains this; `memory` for memory alone.
    #[arg(long, default_value = "", value_name = "PART")]
    only: String,
    /// Idle connections to measure memory with.
    #[arg(long, default_value_t = 1000)]
    connections: usize,
    /// Idle pods to measure memory with.
    #[arg(long, default_value_t = 20)]
    pods: usize,
    /// The product's binary.
    #[arg(long, env = "JUSTMTLS_BIN", value_name = "FILE")]
    binary: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// Measure the control plane alone, with a simulated API server and simulated nodes.
    Control(control::Args),
    /// In a pod: the server.
    #[command(hide = true)]
    Serve(load::server::Args),
    /// In a pod: the client.
    #[command(hide = true)]
    Drive,
    /// In a pod: one half of the plaintext double proxy.
    #[command(hide = true)]
    Double(double::Args),
}

/// The longest that a run may take.
const LIMIT: Duration = Duration::from_secs(30 * 60);

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match &arguments.part {
        Some(Part::Control(args)) => control::run(args).map(|()| true),
        Some(Part::Serve(args)) => load::server::run(args).map(|()| true),
        Some(Part::Drive) => load::client::run().map(|()| true),
        Some(Part::Double(args)) => double::run(args).map(|()| true),
        None => match arguments.measuring.compare.as_deref() {
            Some([before, after]) => compare_files(before, after).map(|()| true),
            _ => measure(&arguments.measuring),
        },
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Gives whether nothing failed and, where that was asked for, no mark was missed.
fn measure(options: &Measuring) -> Result<bool> {
    ensure!(nix::unistd::geteuid().is_root(), "this has to run as root: it binds processes to processors");
    let processors = processor::two_processors()?;
    let binary = product(options.binary.as_deref())?;
    let ending = Ending::watch(binary.clone(), LIMIT)?;
    let start = |manifest: &str| Cluster::start(&binary, manifest, &ending);

    let mut results = Results { machine: Machine::here(), ..Results::default() };
    let settings = Settings {
        rounds: options.rounds.unwrap_or(if options.quick { 1 } else { 8 }),
        slice: Duration::from_millis(options.slice.unwrap_or(if options.quick { 50 } else { 500 })),
        foreign: options.foreign.unwrap_or(if options.quick { f64::INFINITY } else { 0.1 }),
        only: options.only.clone(),
        layouts: Layout::ALL.to_vec(),
    };
    let everything = options.only.is_empty();
    if everything || options.only == "memory" {
        eprintln!("memory");
        results.memory = Some(memory::measure(start, options.connections, options.pods)?);
    }
    if options.only != "memory" {
        // What is started on one processor stays there, and has as many threads as one processor asks for.
        let cluster = processor::pinned(processors[1], || start(&run::objects()))??;
        run::run(&cluster, processors, &settings, &mut results)?;
    }
    print!("{}", results.table());
    let marks = marks::marks(&results);
    println!();
    marks.iter().for_each(|mark| println!("{mark}"));
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&results)?;
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let missed = options.check && marks.iter().any(marks::Mark::is_missed);
    Ok(results.failed.is_empty() && !missed)
}

/// The product's binary: the one that was given, or the one beside this program.
fn product(given: Option<&Path>) -> Result<PathBuf> {
    let binary = match given {
        Some(path) => path.to_owned(),
        None => std::env::current_exe()?.with_file_name("justmtls"),
    };
    ensure!(binary.is_file(), "there is no {}: build it first, as `cargo xtask bench` does", binary.display());
    Ok(binary)
}

fn compare_files(before: &Path, after: &Path) -> Result<()> {
    let read = |path: &Path| -> Result<Results> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is not of this program", path.display()))
    };
    print!("{}", compare::compare(&read(before)?, &read(after)?));
    Ok(())
}
