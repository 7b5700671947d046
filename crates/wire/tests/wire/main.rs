//! The crate from outside: hellos and frames byte by byte, and a control plane with nodes over real TLS.

mod calls;
mod control;
mod files;
mod flood;
mod hello;
mod pki;
mod tunnel;
