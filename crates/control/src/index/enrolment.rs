//! Which pods are captured, and why the others are not (D14, T13).

use manifests::{Kind, SYSTEM_NAMESPACES};
use mesh::{Mode, Modes, Uncaptured};

use super::facts::{Foreign, ModeLabel, Namespace, Pod};
use crate::ROOT_NAMESPACE;
use crate::problem::{Problem, quoted};

/// Why a pod is not to be captured; `None` where it is.
///
/// `captured` says that it is captured already: what is strict and captured is never let go.
pub(crate) fn exemption(
    pod: &Pod,
    namespace: &Namespace,
    modes: &Modes,
    captured: bool,
    problems: &mut Vec<Problem>,
) -> Option<Uncaptured> {
    if pod.host_network {
        return Some(Uncaptured::HostNetwork);
    }
    let object = || pod.name.as_kind(Kind::Pod);
    let is_strict = modes.default == Mode::Strict || modes.ports.values().any(|mode| *mode == Mode::Strict);
    // A guess is overridden by who knows better, and what is strict and captured has shown that it can be.
    let is_guess = matches!(pod.foreign, Some(Foreign::Runtime(_)));
    let overridden = is_guess && pod.mode == Some(ModeLabel::On) || is_strict && captured;
    if let Some(foreign) = pod.foreign.as_ref().filter(|_| !overridden) {
        if is_strict {
            let message = match foreign {
                Foreign::Mesh(mesh) => format!(
                    "is STRICT by a PeerAuthentication, which we do not enforce: it is in {mesh}, and that has to; take it out of \
                     that mesh to have it captured"
                ),
                Foreign::Runtime(what) => format!(
                    "is STRICT by a PeerAuthentication, which nothing enforces: {} means a network stack that its node does not see \
                     into; take it off that, or label the pod justmtls.dev/mode: on if that is not so",
                    quoted(what)
                ),
            };
            problems.push(Problem::warning(object(), message));
        }
        return Some(Uncaptured::NotCapturable);
    }
    let wanted = wanted_exemption(pod, namespace, problems)?;
    match wanted {
        Uncaptured::OptedOut if is_strict => {
            let message = "opts out by justmtls.dev/mode: off, and a STRICT PeerAuthentication selects it: strict \
                           wins and it is captured; make its ports PERMISSIVE, or remove the label";
            problems.push(Problem::warning(object(), message));
            None
        }
        Uncaptured::SystemNamespace if is_strict && captured && !is_own(pod) => {
            let message = "is STRICT by a PeerAuthentication and captured, and stays so although it is in a system \
                           namespace and no label justmtls.dev/mode: on says so any more; make its ports PERMISSIVE to let it go";
            problems.push(Problem::warning(object(), message));
            None
        }
        Uncaptured::SystemNamespace if is_strict && !is_own(pod) => {
            let message = "is STRICT by a PeerAuthentication, which nothing enforces: pods of system namespaces are \
                           captured only with the label justmtls.dev/mode: on";
            problems.push(Problem::warning(object(), message));
            Some(wanted)
        }
        _ => Some(wanted),
    }
}

/// Whether labels and namespaces say that a pod is to be captured, if it can be.
pub(crate) fn is_enrolled(pod: &Pod, namespace: &Namespace) -> bool {
    !pod.host_network && wanted_exemption(pod, namespace, &mut Vec::new()).is_none()
}

/// Whether a pod is of the product, or beside it: what captures needs no capture to come about (T48).
fn is_own(pod: &Pod) -> bool {
    pod.name.namespace == ROOT_NAMESPACE
}

/// What labels and namespaces say.
fn wanted_exemption(pod: &Pod, namespace: &Namespace, problems: &mut Vec<Problem>) -> Option<Uncaptured> {
    if is_own(pod) {
        if [namespace.mode, pod.mode].contains(&Some(ModeLabel::On)) {
            let message = "has the label justmtls.dev/mode: on, or its namespace has, which counts for no pod of justmtls: a node \
                           whose agent or proxy is gone would have no way to the control plane; remove the label";
            problems.push(Problem::warning(pod.name.as_kind(Kind::Pod), message));
        }
        return Some(Uncaptured::SystemNamespace);
    }
    // What a cluster needs to start is not captured unless somebody says so.
    let is_system = SYSTEM_NAMESPACES.contains(&pod.name.namespace.as_str());
    let by_namespace = match namespace.mode {
        Some(ModeLabel::On) => None,
        Some(ModeLabel::Off) => Some(Uncaptured::OptedOut),
        None => is_system.then_some(Uncaptured::SystemNamespace),
    };
    match pod.mode {
        Some(ModeLabel::On) => None,
        Some(ModeLabel::Off) if namespace.allows_opt_out => Some(Uncaptured::OptedOut),
        Some(ModeLabel::Off) => {
            if by_namespace.is_none() {
                let message = "opts out by justmtls.dev/mode: off, which its namespace does not allow: it is captured; \
                               label the namespace justmtls.dev/allow-opt-out: \"true\" to allow it";
                problems.push(Problem::warning(pod.name.as_kind(Kind::Pod), message));
            }
            by_namespace
        }
        None => by_namespace,
    }
}
