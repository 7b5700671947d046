//! The crate from outside: a small trust domain, its handshakes in memory, and those who try to get in.

mod api_server;
mod authority;
mod bundles;
mod estates;
mod handshakes;
mod issuing;
mod mesh;
mod requests;
mod standing;
mod strangers;
mod svids;
mod wire;
