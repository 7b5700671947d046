//! No code: the features that all selections of the workspace's packages have in common (`Cargo.toml`).

#![forbid(unsafe_code)]
