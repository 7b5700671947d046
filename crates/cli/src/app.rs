//! `justmtls demo-app`: what runs in the box's default pods.

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
    /// A client that asks again and again.
    Load {
        /// HOST:PORT to ask.
        #[arg(long)]
        to: String,
        /// Requests a second; 0 is as many as possible.
        #[arg(long, default_value_t = 50)]
        rate: u32,
        /// Stop after so many requests; 0 is never.
        #[arg(long, default_value_t = 0)]
        count: u64,
        /// A word for every request and answer.
        #[arg(long, default_value = "hello")]
        marker: String,
        /// All requests on one connection.
        #[arg(long)]
        keep: bool,
    },
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<i32> {
    match &arguments.program {
        Program::Serve { port } => serve(&ServeOptions { port: *port }).map(|()| 0)?,
        Program::Load { to, rate, count, marker, keep } => {
            let options =
                LoadOptions { to: to.clone(), rate: *rate, count: *count, marker: marker.clone(), keep: *keep };
            return Ok(if load(&options)? { 0 } else { 1 });
        }
    };
    Ok(0)
}
