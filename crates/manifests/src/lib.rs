//! Kubernetes objects, read from YAML or JSON text and written back as YAML.
//!
//! Text goes in with a label (a file's name), and typed objects come out, each with the place it was written at, beside
//! [`Problem`]s: one sentence each, with the file, the line, the object, the field and the remedy.
//!
//! What this crate never does:
//! - It opens no file, watches no folder and reads no clock.
//! - It knows nothing of meshes: what an object means for traffic is said elsewhere.
//! - A malformed document hides no other document, and no text, however hostile, makes it panic or grow without bound.
//! - Nothing that was written is dropped in silence: it is an object, or a problem, or both.
//! - It never lets an object vanish because its new text cannot be read (see [`Set`]).
#![forbid(unsafe_code)]

mod path;
mod problem;

pub mod istio;
mod object;

mod documents;
mod explain;
mod parse;
mod tree;

mod names;
mod select;
mod validate;

mod review;
mod set;

pub use names::SYSTEM_NAMESPACES;
pub use object::{Kind, Object, ObjectKey};
pub use parse::{MAX_DOCUMENTS, MAX_FILE_BYTES, Parsed, parse, parse_policy};
pub use problem::{Location, Problem, Severity};
pub use select::selects;
pub use set::{Change, Reloaded, Set};
pub use validate::{validate, validate_for_box};

/// The Kubernetes types that [`Object`] is made of, so that users of this crate name the same version.
pub use k8s_openapi;
