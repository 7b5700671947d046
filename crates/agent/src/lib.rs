//! THE NODE: pods are captured, their sockets are made, their rules are kept.
//!
//! The one process of the product with privileges, and it reads nothing from the network but the control plane's stream.
//! [`Args`] and [`run`] are the process; its decisions are in `pods`, its hands in [`capture`] and [`rules`].
//!
//! Invariants, stated as absences:
//! - no byte of a connection is read here;
//! - no rule is made outside a pod's own network namespace;
//! - no rule is loaded before the listeners that it leads to are held by a proxy;
//! - no pod is reported as captured before its rules were read back;
//! - no namespace is taken for a pod's that does not have the pod's addresses, or that another pod has;
//! - nothing here keeps a namespace alive whose pod is gone.

#![forbid(unsafe_code)]

mod process;

mod cluster;

mod node;

mod pods;

mod failure;

mod cni;

pub mod plugin;

mod keeper;

mod running;

mod api_server;

mod proxy;

mod proxies;

mod estate;

mod door;

mod watched;

mod discovery;

mod verify;

pub mod capture;

pub mod listeners;

pub mod rules;

pub mod guard;

mod journal;

mod metrics;

mod admin;

pub use cluster::{Args as ClusterArgs, DaemonSet};
pub use process::{Args, run};
