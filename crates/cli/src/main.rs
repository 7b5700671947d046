//! THE BINARY: `justmtls` and its subcommands.
//!
//! Every process of the product is a subcommand of this one file. Nothing here starts a thread before the
//! subcommand is known: boxes and privileges need a process without any.

#![forbid(unsafe_code)]

mod admin;
mod app;
mod demo;
mod log;
mod manual;
mod supervise;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// All traffic between the pods of a cluster as mutually authenticated TLS, and nothing else.
#[derive(Debug, Parser)]
#[command(name = "justmtls", version, propagate_version = true)]
struct Arguments {
    /// How the processes write their log.
    #[arg(long, value_name = "FORMAT", default_value = "json", hide = true)]
    log_format: log::Format,
    #[command(flatten)]
    before: install::Before,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    Cluster(install::Verb),
    /// A two-node cluster in a box on this machine, with or without root.
    Demo(demo::Arguments),
    /// The control plane: from Kubernetes objects to what each node knows, and the certificates of its pods.
    Control(control::Args),
    /// The privileged half of a node: captures pods and makes their sockets.
    Agent(agent::Args),
    /// The data path of a node, without privileges.
    Proxy(proxy::Args),
    /// A script that completes this command line in a shell.
    Completions(manual::CompletionsArguments),
    /// Manual pages, one for each verb.
    Man(manual::ManArguments),
    /// What the container runtime runs for each pod: asks the agent to capture it.
    #[command(hide = true)]
    Cni,
    /// The first process of a container: runs another verb, and starts it again when it dies.
    #[command(hide = true)]
    Supervise(supervise::Arguments),
    /// Prints a page of a process' admin socket.
    #[command(hide = true)]
    Admin(admin::Arguments),
    /// Programs of the box's default pods.
    #[command(hide = true)]
    DemoApp(app::Arguments),
}

impl Command {
    /// As it is called, where it has nothing to do with a cluster.
    fn name(&self) -> &'static str {
        match self {
            Self::Cluster(_) => "justmtls",
            Self::Demo(_) => "demo",
            Self::Control(_) => "control",
            Self::Agent(_) => "agent",
            Self::Proxy(_) => "proxy",
            Self::Completions(_) => "completions",
            Self::Man(_) => "man",
            Self::Cni => "cni",
            Self::Supervise(_) => "supervise",
            Self::Admin(_) => "admin",
            Self::DemoApp(_) => "demo-app",
        }
    }
}

fn main() -> ExitCode {
    // A container runtime gives its plugins no arguments.
    if std::env::args_os().len() == 1 && std::env::var_os("CNI_COMMAND").is_some() {
        return ExitCode::from(u8::try_from(agent::plugin::run()).unwrap_or(1));
    }
    let arguments = Arguments::parse();
    let log = arguments.log_format;
    let result = supervise::let_signals_in().and_then(|()| run(arguments.command, arguments.before, log));
    match result {
        Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(1)),
        Err(error) => {
            anstream::eprintln!("{ERROR}error{ERROR:#}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut command: Command, before: install::Before, log: log::Format) -> anyhow::Result<i32> {
    match &mut command {
        Command::Cluster(verb) => before.give(verb)?,
        other => before.refuse(other.name())?,
    }
    match command {
        Command::Cluster(verb) => install::run(verb, control::unenforceable),
        Command::Demo(arguments) => demo::run(arguments),
        Command::Control(arguments) => process(log, || control::run(arguments)),
        Command::Agent(arguments) => process(log, || agent::run(arguments)),
        Command::Proxy(arguments) => process(log, || proxy::run(arguments)),
        Command::Completions(arguments) => manual::completions(&arguments, Arguments::command()),
        Command::Man(arguments) => manual::man(&arguments, Arguments::command()),
        Command::Cni => Ok(agent::plugin::run()),
        Command::Supervise(arguments) => log::begin(log).and_then(|()| supervise::run(&arguments)),
        Command::Admin(arguments) => admin::run(&arguments),
        Command::DemoApp(arguments) => app::run(&arguments),
    }
}

/// A process of the product: it says what it does in its log.
fn process(format: log::Format, run: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<i32> {
    log::begin(format)?;
    run().map(|()| 0)
}

const ERROR: anstyle::Style = anstyle::AnsiColor::Red.on_default().bold();
