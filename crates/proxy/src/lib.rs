//! THE DATA PATH: every byte between a captured pod and the rest of the world.
//!
//! A connection's life is one function: `outbound`'s `serve` for what a pod makes, `inbound`'s for what it is to
//! accept. Each reads from top to bottom: what the connection is, what may happen to it, the two legs, and the bytes.
//!
//! Invariants, stated as absences:
//! - no privileged call: sockets of pods come from the agent, ready made;
//! - no byte reaches a pod without an [`mesh::Allowed`], or an [`mesh::AllowedProbe`] that says which bytes, and none leaves it in clear without a named reason;
//! - no connection is served by two threads at once, and nothing of it is locked while bytes are copied;
//! - no payer has more than two turns while another one waits for its first (`turns`, `offload`);
//! - no connection ends early without a name (`reasons`), and none that died looks as if it had ended in order;
//! - nothing that a stranger sends is queued without a bound;
//! - no private key is shown by this process, or leaves it but for its own node's agent, sealed, for the next proxy.

#![forbid(unsafe_code)]

mod access_log;
mod admin;
mod agent;
mod batch;
mod budgets;
mod certs;
mod clock;
mod connections;
mod control_plane;
mod cores;
mod coverage;
mod estate;
mod first_bytes;
mod inbound;
mod judge;
mod legs;
mod metrics;
mod node;
mod offload;
mod outbound;
mod pod;
mod pods;
mod pool;
mod probe;
mod process;
mod questions;
mod reasons;
mod redirect;
mod shares;
mod splice;
mod stash;
mod tunnel;
mod turns;
mod view;
mod watched;

#[cfg(test)]
mod tests;

pub use process::{Args, run};
