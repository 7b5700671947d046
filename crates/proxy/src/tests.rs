//! The data path over real sockets and real certificates, both sides of it in one process.

pub(crate) mod world;

mod attacker;
mod captured;
mod certificates;
mod hostile;
mod in_clear;
mod pool;
mod probes;
mod seen;
mod whole_path;
