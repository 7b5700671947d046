//! The log of the product's processes, on standard error.

use anyhow::anyhow;
use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Format {
    /// One JSON object.
    Json,
    /// Text for people.
    Text,
}

/// What is logged, as `justmtls=debug` or `proxy=trace,info`.
const FILTER: &str = "JUSTMTLS_LOG";

/// Begins to log.
pub(crate) fn begin(format: Format) -> anyhow::Result<()> {
    let filter = match std::env::var(FILTER) {
        Ok(text) => text.parse().map_err(|error| anyhow!("{FILTER}={text}: {error}; write LEVEL or CRATE=LEVEL,…"))?,
        Err(_) => EnvFilter::new("info"),
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let begun = match format {
        Format::Json => builder.json().flatten_event(true).try_init(),
        Format::Text => builder.with_ansi(false).try_init(),
    };
    begun.map_err(|error| anyhow!("cannot begin to log: {error}"))
}
