//! `justmtls demo-app`: what runs in the box's default pods.

use std::time::Duration;

use clap::{Args, Subcommand};
use demo::app::{LoadOptions, ServeOptions, load, serve};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    program: Program,
}

#[derive(Debug, Subcommand)]
enum Program {
    /// A small web server.
    Serve {
        /// The port, on all addresses.
        #[arg(long)]
        port: u16,
    },
    /// A client that asks again and again and counts for itself: on short connections (one, if nothing else is asked for), on
    /// long ones, and with bulk. Prints JSON.
    Load {
        /// HOST:PORT to ask.
        #[arg(long)]
        to: String,
        /// So many ask at the same time, each request on a connection of its own.
        #[arg(long, value_name = "N")]
        short: Option<usize>,
        /// Requests a second on short connections; 0 is as many as possible.
        #[arg(long, default_value_t = 50)]
        rate: u32,
        /// Stop after so many short connections; 0 is never.
        #[arg(long, default_value_t = 0)]
        count: u64,
        /// Connections that are opened at the start and never again.
        #[arg(long, value_name = "N", default_value_t = 0)]
        long: usize,
        /// How often each of those asks, and the pause between two transfers of bulk, in milliseconds.
        #[arg(long, value_name = "MS", default_value = "100", value_parser = milliseconds)]
        every: Duration,
        /// Connections that carry bulk, down and up in turn.
        #[arg(long, value_name = "N", default_value_t = 0)]
        bulk: usize,
        /// Bytes of a transfer.
        #[arg(long, value_name = "BYTES", default_value_t = 8 << 20)]
        bulk_bytes: u64,
        /// How long a connect or an answer may take, in milliseconds.
        #[arg(long, value_name = "MS", default_value = "10000", value_parser = milliseconds)]
        patience: Duration,
        /// A word for every request and answer.
        #[arg(long, default_value = "hello")]
        marker: String,
        /// Read `event`, `over` and `end` from standard input: what is counted before, during and after is kept apart.
        #[arg(long)]
        controlled: bool,
    },
}

fn milliseconds(text: &str) -> Result<Duration, std::num::ParseIntError> {
    text.parse().map(Duration::from_millis)
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<i32> {
    match &arguments.program {
        Program::Serve { port } => serve(&ServeOptions { port: *port }).map(|()| 0)?,
        Program::Load { to, short, rate, count, long, every, bulk, bulk_bytes, patience, marker, controlled } => {
            let options = LoadOptions {
                to: to.clone(),
                short: short.unwrap_or(usize::from(*long == 0 && *bulk == 0)),
                rate: *rate,
                count: *count,
                long: *long,
                every: *every,
                bulk: *bulk,
                bulk_bytes: *bulk_bytes,
                patience: *patience,
                marker: marker.clone(),
                controlled: *controlled,
            };
            return Ok(if load(&options)? { 0 } else { 1 });
        }
    };
    Ok(0)
}
