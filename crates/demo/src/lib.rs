//! CLUSTER IN A BOX: two nodes, a control plane and pods out of network namespaces, on any Linux machine.
//!
//! It plays what is not the product: kubelet and container runtime, the API server's defaults, the
//! controllers, DNS, and kube-proxy for pods that are not captured. Control plane, agents and proxies are
//! the real ones, started as processes of their own, and see Kubernetes objects and nothing else.
//!
//! Outside of the box there is a starter (one process) and a state directory (a lock and a socket).
//! Inside there is an init that holds everything else.
//!
//! Invariants, stated as absences:
//! - no interface, mount, rule or process of a box exists outside its namespaces;
//! - nothing of a box is written to a disk but the lock and the socket of the state directory;
//! - neither starter nor init outlives the other, and the state directory outlives neither;
//! - nothing here decides about traffic between captured pods.

#![forbid(unsafe_code)]

// Outside
mod client;
mod conversation;
mod exec;
mod starter;
mod state;

// Inside: init and what it plays
mod addresses;
mod admin;
mod boot;
mod children;
mod cluster;
mod complaints;
mod endpoints;
mod folder;
mod kube_proxy;
mod kubelet;
mod manifest;
mod network;
mod probes;
mod processes;
mod programs;
mod runtime;
mod server;
mod supervisor;

// Telling
mod dns;
mod report;
mod story;
mod wiretap;

/// The programs of the default pods.
pub mod app;

use std::path::PathBuf;

pub use client::{Outcome, admin, apply, delete, kill, resume, status, upgrade};
pub use conversation::Place;
pub use exec::{ExecOptions, exec};
pub use starter::{run_foreground, start, stop};
pub use state::{StateDirectory, StateError};
pub use story::Story;

/// What kind of box to make.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The state directory; `None` is the user's default.
    pub state: Option<PathBuf>,
    /// A file or folder with Kubernetes objects instead of the built-in ones.
    pub manifests: Option<PathBuf>,
    /// The story to be told, in the foreground.
    pub story: Option<Story>,
    /// What processes of the product are started with beside what the box needs.
    pub process_arguments: Vec<ProcessArgument>,
}

/// An argument of every process of a kind: `proxy=--cores=1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessArgument {
    /// `control`, `agent` or `proxy`.
    pub process: String,
    /// One word of its command line.
    pub argument: String,
}

impl std::str::FromStr for ProcessArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('=').filter(|(process, _)| ["control", "agent", "proxy"].contains(process));
        match parts {
            Some((process, argument)) if argument.starts_with('-') => {
                Ok(Self { process: process.to_owned(), argument: argument.to_owned() })
            }
            _ => Err("write PROCESS=ARGUMENT with control, agent or proxy, as in proxy=--cores=1".to_owned()),
        }
    }
}
