//! `justmtls demo`: the cluster in a box.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::bail;
use clap::{Args, Subcommand};
use demo::{ExecOptions, Options, Outcome, Place, ProcessArgument, StateDirectory, Story};
use serde_json::Value;

use crate::ERROR;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The box's directory: one for each box. A default of the user's own otherwise.
    #[arg(long, global = true, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Kubernetes objects of your own, instead of the built-in ones.
    #[arg(long, global = true, value_name = "DIR")]
    manifests: Option<PathBuf>,
    /// Longest life of a pod's certificate, such as 20s: what takes a day is then seen in seconds.
    #[arg(long, global = true, value_name = "TIME", value_parser = control::lifetime)]
    leaf_lifetime: Option<Duration>,
    /// A word for the command line of each process of a kind, as in proxy=--cores=1. Can be repeated.
    #[arg(long = "process-argument", global = true, value_name = "PROCESS=ARGUMENT")]
    process_arguments: Vec<ProcessArgument>,
    /// Machine-readable output.
    #[arg(long, global = true)]
    json: bool,
    /// Tell the story, then end the box; fails if a step does not show what it should.
    #[arg(long)]
    once: bool,
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make a box in the background.
    Start,
    /// End the box, and leave nothing behind.
    Stop,
    /// Nodes, processes, pods and Services.
    Status,
    /// Run a program of this machine in a pod.
    Exec {
        /// NAMESPACE/POD.
        #[arg(value_name = "NAMESPACE/POD", required_unless_present = "node")]
        pod: Option<String>,
        /// Run on a node instead (node-a, node-b), or at `control` or `outside`.
        #[arg(long, conflicts_with = "pod")]
        node: Option<String>,
        /// Run as this user; needs a box of root.
        #[arg(long, value_name = "UID")]
        user: Option<u32>,
        /// Keep all capabilities, as a privileged container would.
        #[arg(long)]
        privileged: bool,
        /// The program and its arguments.
        #[arg(last = true, required = true, value_name = "PROGRAM")]
        command: Vec<OsString>,
    },
    /// Create or change objects.
    Apply {
        /// The manifest; `-` is standard input.
        #[arg(short, long = "filename", value_name = "FILE")]
        file: PathBuf,
    },
    /// Remove objects.
    Delete {
        /// The manifest; `-` is standard input.
        #[arg(short, long = "filename", value_name = "FILE")]
        file: PathBuf,
    },
    /// Kill a process of the product, as `kill -9` would. The box starts it again, as kubelet would.
    Kill {
        /// A node, for its proxy; `agent@NODE`, or `control`.
        process: String,
        /// Do not start it again until `resume`.
        #[arg(long)]
        hold: bool,
    },
    /// Start a process again that is held down.
    Resume {
        /// A node, for its proxy; `agent@NODE`, or `control`.
        process: String,
    },
    /// Put a new process in the place of one that runs: it takes over, and the old one drains.
    Upgrade {
        /// A node, for its proxy; `agent@NODE`.
        process: String,
        /// The new one's binary; the old one's otherwise.
        #[arg(long, value_name = "FILE")]
        binary: Option<PathBuf>,
    },
    /// Print a page of a process' admin socket, such as `node-a /metrics`, or what it wrote: `/log`.
    Admin {
        /// A node, for its proxy; `agent@NODE`, or `control`.
        process: String,
        /// The page.
        path: String,
    },
}

pub(crate) fn run(arguments: Arguments) -> anyhow::Result<i32> {
    let state = arguments.state.clone().unwrap_or_else(StateDirectory::default_path);
    let mut options = Options {
        state: Some(state.clone()),
        manifests: arguments.manifests,
        story: None,
        process_arguments: arguments.process_arguments,
    };
    options.process_arguments.extend(arguments.leaf_lifetime.map(|lifetime| ProcessArgument {
        process: "control".to_owned(),
        argument: format!("--leaf-validity={}s", lifetime.as_secs()),
    }));
    let Some(verb) = arguments.verb else {
        options.story = Some(Story { once: arguments.once, json: arguments.json });
        return demo::run_foreground(options);
    };
    if arguments.once {
        bail!("--once tells the story and ends the box: it goes with no verb, as in `justmtls demo --once`");
    }
    match verb {
        Verb::Start => {
            demo::start(options)?;
            say(arguments.json, "the box is up", &demo::status(&state)?);
        }
        Verb::Stop => anstream::println!("{}", demo::stop(&state)?),
        Verb::Status => {
            let status = demo::status(&state)?;
            if arguments.json { anstream::println!("{status:#}") } else { print_status(&status) }
        }
        Verb::Exec { pod, node, user, privileged, command } => {
            let place = place(pod, node)?;
            return demo::exec(&state, &ExecOptions { place, user, privileged, command });
        }
        Verb::Apply { file } => return Ok(print_outcome(&demo::apply(&state, &file)?)),
        Verb::Delete { file } => return Ok(print_outcome(&demo::delete(&state, &file)?)),
        Verb::Kill { process, hold } => say_process(arguments.json, &demo::kill(&state, &process, hold)?),
        Verb::Resume { process } => say_process(arguments.json, &demo::resume(&state, &process)?),
        Verb::Upgrade { process, binary } => {
            say_process(arguments.json, &demo::upgrade(&state, &process, binary.as_deref())?);
        }
        Verb::Admin { process, path } => anstream::print!("{}", demo::admin(&state, &process, &path)?),
    }
    Ok(0)
}

fn place(pod: Option<String>, node: Option<String>) -> anyhow::Result<Place> {
    if let Some(node) = node {
        return Ok(Place::Node(node));
    }
    let pod = pod.unwrap_or_default();
    match pod.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {
            Ok(Place::Pod { namespace: namespace.to_owned(), name: name.to_owned() })
        }
        _ => {
            bail!("{pod} is not a pod's name: write NAMESPACE/POD, as in `justmtls demo exec shop/client -- curl web`")
        }
    }
}

fn say(json: bool, sentence: &str, status: &Value) {
    if json {
        anstream::println!("{status:#}");
    } else {
        anstream::println!("{sentence}");
        print_status(status);
    }
}

/// What became of a process.
fn say_process(json: bool, answer: &Value) {
    if json {
        anstream::println!("{answer:#}");
        return;
    }
    let pid = answer["pid"].as_u64().map_or_else(String::new, |pid| format!(", as process {pid}"));
    anstream::println!("{}{pid}", answer["sentence"].as_str().unwrap_or_default());
}

/// Gives the exit status: 1 where something was refused.
fn print_outcome(outcome: &Outcome) -> i32 {
    for line in &outcome.done {
        anstream::println!("{line}");
    }
    for sentence in &outcome.notes {
        anstream::eprintln!("warning: {sentence}");
    }
    for sentence in &outcome.refused {
        anstream::eprintln!("{ERROR}error{ERROR:#}: {sentence}");
    }
    i32::from(!outcome.refused.is_empty())
}

fn print_status(status: &Value) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let list = |value: &Value| value.as_array().into_iter().flatten().map(text).collect::<Vec<_>>().join(" ");
    anstream::println!("{HEAD}{:14} {:10} {:8} {:9} ADDRESSES{HEAD:#}", "NODE", "PROCESS", "PID", "STATE");
    let control = [("control", &status["control"])];
    let nodes = status["nodes"].as_array().into_iter().flatten();
    let nodes = nodes.map(|node| (node["name"].as_str().unwrap_or_default(), node));
    for (name, place) in control.into_iter().chain(nodes) {
        for process in place["processes"].as_array().into_iter().flatten() {
            let (role, state) = (text(&process["role"]), text(&process["state"]));
            let pid = process["pid"].as_u64().map_or_else(String::new, |pid| pid.to_string());
            let end = history(process);
            anstream::println!("{name:14} {role:10} {pid:8} {state:9} {} {end}", list(&place["addresses"]));
        }
    }
    anstream::println!("{HEAD}{:26} {:8} {:10} {:17} {:10} ADDRESSES{HEAD:#}", "POD", "NODE", "STATE", "MESH", "MODE");
    for pod in status["pods"].as_array().into_iter().flatten() {
        let state = match (pod["ready"].as_bool(), pod["ending"].as_bool()) {
            (_, Some(true)) => "ending".to_owned(),
            (Some(true), _) => "ready".to_owned(),
            _ => text(&pod["phase"]).to_lowercase(),
        };
        let mesh = match pod["captured"].as_bool() {
            Some(true) => "captured".to_owned(),
            Some(false) => text(&pod["uncaptured"]),
            None => "unknown".to_owned(),
        };
        let name = format!("{}/{}", text(&pod["namespace"]), text(&pod["name"]));
        let (node, mode) = (text(&pod["node"]), text(&pod["mode"]));
        let line = format!("{name:26} {node:8} {state:10} {mesh:17} {mode:10} {}", list(&pod["addresses"]));
        anstream::println!("{line}  {}", text(&pod["message"]));
    }
    anstream::println!("{HEAD}{:52} ADDRESSES{HEAD:#}", "SERVICE");
    for service in status["services"].as_array().into_iter().flatten() {
        let name = format!("{}.{}", text(&service["name"]), text(&service["namespace"]));
        anstream::println!("{name:52} {}", list(&service["addresses"]));
    }
    for problem in status["problems"].as_array().into_iter().flatten() {
        anstream::println!("{}: {}", text(&problem["severity"]), text(&problem["sentence"]));
    }
}

/// How often a process was started again, and how its predecessor ended.
fn history(process: &Value) -> String {
    let restarts = process["restarts"].as_u64().unwrap_or(0);
    match process["lastExit"].as_str() {
        Some(how) => format!("restarts: {restarts}, last exit: {how}"),
        None => String::new(),
    }
}

const HEAD: anstyle::Style = anstyle::Style::new().bold();
