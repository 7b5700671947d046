//! The load: a client and a server that run in pods, the same ones for every contender.
//!
//! The client is told what to do, one order a line on standard input, and answers each with one line. A slice of a
//! measurement is two orders: [`Order::Prepare`], which opens what is needed, and [`Order::Go`], which is measured. Both
//! programs end when their standard input does, so that none outlives who started it.

pub(crate) mod client;
pub(crate) mod server;

use std::io::Read;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// The first byte of a connection says what it is for; the server sends it back when it has read it, so that a client
/// knows that its connection leads all the way.
pub(crate) const ECHO: u8 = b'E';
/// The server reads until the end, and answers with how many bytes came, in 8 bytes, least first.
pub(crate) const SINK: u8 = b'S';

/// What a client does between two answers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Work {
    /// So many streams send as fast as they can.
    Bulk {
        /// How many.
        streams: usize,
    },
    /// One byte string there and back, again and again, with so many bulk streams beside it.
    Ping {
        /// Bytes each way.
        size: usize,
        /// How many others send as fast as they can meanwhile.
        beside: usize,
    },
    /// Connect, one byte there and back, close, again and again.
    Connect {
        /// How many of them at once.
        at_once: usize,
    },
    /// The same, once to each of so many ports, from the server's first on: whatever a proxy keeps for a destination, it
    /// has nothing for these.
    ConnectCold {
        /// How many ports.
        ports: u16,
    },
    /// So many connections are opened and used once, and then kept until the next order.
    Hold {
        /// How many.
        connections: usize,
    },
}

/// A line to the client.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Order {
    /// Opens what the work needs, and closes what was kept.
    Prepare {
        /// What will be done.
        work: Work,
        /// With whom.
        to: SocketAddr,
        /// For how long, in milliseconds, where the work has no end of its own.
        milliseconds: u64,
    },
    /// Does it.
    Go,
}

/// A line from the client.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// How long it took, all answers of the server included.
    pub(crate) seconds: f64,
    /// Payload that the server has confirmed.
    pub(crate) bytes: u64,
    /// Round trips or connections.
    pub(crate) count: u64,
    /// Half of them took no longer, in microseconds.
    pub(crate) p50_us: f64,
    /// And 99 of 100.
    pub(crate) p99_us: f64,
    /// Why it was not done.
    pub(crate) error: Option<String>,
}

/// The address of a port.
pub(crate) fn at(host: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(host, port)
}

/// Ends this process when its standard input ends: whoever started it is gone.
pub(crate) fn end_with_the_caller() {
    std::thread::spawn(|| {
        let mut nothing = [0; 64];
        while std::io::stdin().read(&mut nothing).is_ok_and(|length| length > 0) {}
        std::process::exit(0);
    });
}
