//! THE KERNEL: everything that justmtls asks of Linux, behind safe functions.
//!
//! Network namespaces, links, routes and policy rules over netlink, nftables batches, the socket
//! options that the data path needs, sockets that carry sockets, and what a process may give up.
//!
//! Invariants, stated as absences:
//! - no other crate of the workspace contains `unsafe` or speaks netlink;
//! - no C library but libc, and no program is called at run time;
//! - nothing here knows a workload, a policy or a certificate.

pub mod bpf;
pub mod capture;
pub mod changes;
pub mod channel;
pub mod clock;
pub mod diag;
pub mod flows;
pub mod links;
pub mod netlink;
pub mod netns;
pub mod nft;
pub mod privileges;
pub mod routes;
pub mod sandbox;
pub mod sealed;
pub mod sockets;
pub mod tc;
