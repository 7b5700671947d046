//! WHAT MAY HAPPEN: the nouns of the mesh and every decision about a connection.
//!
//! A node knows a [`View`]; from it [`route()`] says where an outgoing connection goes and how,
//! [`expect()`] says how long an incoming one may keep us waiting for its TLS hello, and
//! [`authorize()`] says whether it may reach the pod. All three are pure functions over values.
//!
//! Invariants, stated as absences:
//! - no clock, socket, file, runtime, protobuf or Kubernetes type;
//! - no principal is ever derived from an address: only a [`identity::VerifiedPeer`] names one;
//! - nothing but [`authorize()`] makes an [`Allowed`], and nothing but [`authorize_probe()`] an [`AllowedProbe`];
//! - plaintext is never a default: each is a [`PlaintextReason`].

#![forbid(unsafe_code)]

mod authorize;
mod claims;
mod expect;
mod policy;
mod probe;
mod reason;
mod route;
mod service;
mod settings;
mod view;
mod workload;

pub use authorize::{Allowed, Denied, Incoming, Security, authorize};
pub use expect::{Expectation, expect};
pub use policy::{Action, Clause, Match, Policy, PolicyName, Rule, Scope, ServiceAccountMatch, StringMatch};
pub use probe::{
    AllowedProbe, Check, HttpProbe, MOST_PROBE_TEXT, MOST_PROBES, MaybeProbe, OwnNode, Passes, Probe, Probes, Request,
    Said, authorize_probe, may_be_probe, probe_refused_now,
};
pub use reason::{PlaintextReason, RefuseReason};
pub use route::{Fallback, Outgoing, Route, Target, route};
pub use service::{Affinity, Reach, Service, ServiceName, ServicePort};
pub use settings::{AddressClass, MeshSettings, VIEW_LIFETIME};
pub use view::{Resource, ResourceKey, View};
pub use workload::{Canonical, Endpoint, EndpointPort, Mode, Modes, PodUid, Speaks, Uncaptured, Workload, WorkloadUid};
