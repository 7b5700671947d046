//! The data path over real sockets and real certificates, both sides of it in one process.

mod world;

mod captured;
mod certificates;
mod hostile;
mod in_clear;
mod whole_path;
