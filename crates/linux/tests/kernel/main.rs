//! The parts of this crate that only a kernel can judge, each in network namespaces of its own.

mod namespace;
mod nft;
mod routes;
mod sockets;
