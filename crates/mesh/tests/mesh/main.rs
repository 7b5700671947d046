//! The decisions, as tables over a small world, and the view against a reference model.

mod authorize;
mod expect;
mod model;
mod peers;
mod policy;
mod probe;
mod route;
mod view;
mod world;
