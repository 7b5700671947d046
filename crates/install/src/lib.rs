//! THE INSTALLATION: the verbs that run on a laptop with a kubeconfig.
//!
//! ```text
//! values ─► objects ─► render, chart
//!                 └──► apply ─► wait                  install, upgrade, uninstall
//! API server, admin pages of the nodes ─► pure judgements ─► check, status, coverage
//! ```
//!
//! Invariants, stated as absences:
//! - no object is made anywhere but in `objects`: what is applied, printed, compared and put into the chart is one list;
//! - nothing of others is changed: their fields are conflicts, their definitions are left alone, their objects keep what they are in;
//! - no Secret is read, and no process is started but in the DaemonSet's own pods;
//! - nothing that hangs ends in silence.

#![forbid(unsafe_code)]

mod values;

mod distribution;
mod objects;
mod render;
mod source;

mod before;
mod cluster;

mod apply;
mod drift;
mod hang;
mod looks;
mod wait;
mod warn;

mod install;
mod leaving;
mod uninstall;

mod pages;

mod check;
mod coverage;
mod status;
mod version;

mod table;

use std::path::PathBuf;

use clap::Subcommand;

use values::{Key, Values};

pub use before::Before;
pub use warn::Judge;

/// The oldest Kubernetes that has what we need: a node's name in tokens, and profiles of AppArmor as fields.
const MINIMUM_KUBERNETES: &str = "1.30";

/// What can be done to a cluster.
#[derive(Subcommand, Clone, Debug)]
pub enum Verb {
    /// Install onto a cluster, and wait until every node is ready.
    Install(install::Arguments),
    /// Bring what is installed to this version.
    Upgrade(install::Arguments),
    /// Take everything off a cluster again.
    Uninstall(uninstall::Arguments),
    /// Print all objects as YAML, or write the Helm chart.
    Render(RenderArguments),
    /// Look at everything that must hold: 0 is all well, 1 is a failure, 2 is warnings.
    Check(check::Arguments),
    /// Nodes, and pods with identity, capture and mode.
    Status(status::Arguments),
    /// Who talked to whom, with mTLS or in clear and why.
    Coverage(coverage::Arguments),
    /// The version of this binary, and of what runs in the cluster.
    Version(version::Arguments),
}

/// What `render` takes.
#[derive(clap::Args, Clone, Debug)]
pub struct RenderArguments {
    /// KEY=VALUE; can be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Write the Helm chart into this folder instead.
    #[arg(long, value_name = "DIR")]
    pub chart: Option<PathBuf>,
    /// List the keys instead, with their defaults and meanings.
    #[arg(long, conflicts_with = "chart")]
    pub keys: bool,
    /// List what the two service accounts may do instead, and why.
    #[arg(long, conflicts_with_all = ["chart", "keys"])]
    pub permissions: bool,
}

/// Does it. `judge` is the control plane's own judgement of policies.
///
/// # Errors
/// One sentence: what, where, what to do.
pub fn run(verb: Verb, judge: Judge) -> anyhow::Result<i32> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match verb {
            Verb::Install(arguments) => install::run(install::Verb::Install, &arguments, judge).await,
            Verb::Upgrade(arguments) => install::run(install::Verb::Upgrade, &arguments, judge).await,
            Verb::Uninstall(arguments) => uninstall::run(&arguments).await,
            Verb::Render(arguments) => render(&arguments),
            Verb::Check(arguments) => check::run(&arguments).await,
            Verb::Status(arguments) => status::run(&arguments).await,
            Verb::Coverage(arguments) => coverage::run(&arguments).await,
            Verb::Version(arguments) => version::run(&arguments).await,
        }
    })
}

fn render(arguments: &RenderArguments) -> anyhow::Result<i32> {
    let values = Values::from_words(&arguments.set)?;
    for warning in warn::of_values(&values) {
        warn::say(&warning);
    }
    if arguments.keys {
        let mut table = table::Table::new(&["KEY", "DEFAULT", "MEANING"]);
        for key in Key::ALL {
            table.row([key.as_str(), key.default_value(), key.about()].map(str::to_owned));
        }
        table.print();
    } else if arguments.permissions {
        objects::permissions().iter().for_each(|row| anstream::println!("{row}"));
    } else if let Some(folder) = &arguments.chart {
        let files = render::write_chart(&values, folder)?;
        anstream::println!("{} files in {}", files, folder.display());
    } else {
        anstream::print!("{}", render::yaml(&values)?);
    }
    Ok(0)
}
