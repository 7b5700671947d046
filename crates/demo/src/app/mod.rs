//! The programs of the default pods, which know nothing of TLS: a web server and a client.

mod load;
mod pattern;
mod serve;

pub use load::{LoadOptions, load};
pub use serve::{ServeOptions, serve};
