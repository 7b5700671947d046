//! THE CONTROL PLANE: from Kubernetes objects to what each node knows, and the certificates of its pods.
//!
//! ```text
//! watch ─Batch─► control ─► index ─Touched─► publication ─► discovery ─► nodes
//!   ▲              ▲  ▲                                        report ─┘ (captured)
//!   │       ca ────┘  └──── admin
//!   └──── kubernetes (what replicas agree on)
//! ```
//!
//! One task owns the index and is woken by one closed `enum Event`; everything else asks it, or reads what it published.
//!
//! Invariants, stated as absences:
//! - the index knows no client, no clock and no stream, and Kubernetes ends at its `apply`;
//! - nothing is served before every object has been listed once, and a control plane that follows another one tells nobody
//!   anything while it cannot read what that one may have read;
//! - no removal is derived from something that could not be read: the last good state stays;
//! - a policy is never dropped and never weakened: what cannot be enforced refuses what it selects;
//! - no pod that was published as captured is ever published as anything else while it lives;
//! - no certificate names what a request asked for: subject and validity are decided here, the root's key is nowhere;
//! - a malformed object, request or token affects only itself.

#![forbid(unsafe_code)]

mod clock;
mod problem;

mod captures;
mod index;
mod kubernetes;
mod leaving;
mod publication;
mod watch;

mod ca;
mod discovery;
mod nodes;
mod refusals;
mod report;
mod server;
mod uncaptured;

mod admin;
mod control;
mod metrics;
mod probes;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

pub use control::run;
pub use index::unenforceable;

/// The namespace of the product itself, and of policies that speak for the whole mesh (D14).
const ROOT_NAMESPACE: &str = "justmtls-system";
/// The control plane's own service account.
const CONTROL_SERVICE_ACCOUNT: &str = "justmtls-control";
/// The ConfigMap with the settings of the mesh.
const SETTINGS_NAME: &str = "justmtls";

/// The labels of every object that we make.
fn labels() -> BTreeMap<String, String> {
    let labels = [("app.kubernetes.io/part-of", "justmtls"), ("app.kubernetes.io/version", env!("CARGO_PKG_VERSION"))];
    labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into()
}

/// What the control plane is started with: a cluster's API server (`--kubernetes`), or the files of a cluster in a box.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Follow the API server of the cluster that this process is a pod of.
    #[arg(long, conflicts_with_all = ["objects", "tokens", "ca", "publish_bundle"])]
    pub kubernetes: bool,
    /// Another cluster than that which this process is a pod of, for tests.
    #[arg(long, value_name = "FILE", hide = true, requires = "kubernetes")]
    pub kubeconfig: Option<PathBuf>,
    /// This replica's name among those of the control plane: its pod's.
    #[arg(long, value_name = "NAME", env = "POD_NAME", default_value = "justmtls-control")]
    pub identity: String,
    /// Folder of Kubernetes YAML: the objects of the cluster. A change counts when a file is closed or renamed into it.
    #[arg(long, value_name = "DIR", required_unless_present = "kubernetes")]
    pub objects: Option<PathBuf>,
    /// Address to serve nodes on.
    #[arg(long, value_name = "ADDR", default_value = "[::]:15012")]
    pub listen: SocketAddr,
    /// File of lines `token,role,node`, where the role is agent or proxy. It is read again when it changes.
    #[arg(long, value_name = "FILE", required_unless_present = "kubernetes")]
    pub tokens: Option<PathBuf>,
    /// Folder of the certificate authority, made and filled if it is empty: root.pem, intermediate.pem, intermediate.key, and
    /// the record of captured pods.
    #[arg(long, value_name = "DIR", required_unless_present = "kubernetes")]
    pub ca: Option<PathBuf>,
    /// File to publish the roots in, as PEM.
    #[arg(long, value_name = "FILE", required_unless_present = "kubernetes")]
    pub publish_bundle: Option<PathBuf>,
    /// Unix socket for dumps, which is made here.
    #[arg(long, value_name = "SOCKET", default_value = "/run/justmtls/admin.sock")]
    pub admin: PathBuf,
    /// Address for /metrics, /livez and /readyz, over HTTP.
    #[arg(long, value_name = "ADDR", default_value_if("kubernetes", "true", "[::]:15014"))]
    pub metrics: Option<SocketAddr>,
    /// Longest life of a workload's certificate, as 24h, 90m or 20s.
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = lifetime)]
    pub leaf_validity: Duration,
}

/// Where everything comes from.
enum Source {
    /// The files of a cluster in a box.
    Files(Files),
    /// The API server.
    Kubernetes,
}

/// The files of a cluster in a box.
struct Files {
    objects: PathBuf,
    tokens: PathBuf,
    ca: PathBuf,
    publish_bundle: PathBuf,
}

impl Args {
    fn source(&self) -> anyhow::Result<Source> {
        if self.kubernetes {
            return Ok(Source::Kubernetes);
        }
        let given = (self.objects.clone(), self.tokens.clone(), self.ca.clone(), self.publish_bundle.clone());
        let (Some(objects), Some(tokens), Some(ca), Some(publish_bundle)) = given else {
            anyhow::bail!("give --kubernetes, or all of --objects, --tokens, --ca and --publish-bundle");
        };
        Ok(Source::Files(Files { objects, tokens, ca, publish_bundle }))
    }
}

/// A whole number of seconds, minutes, hours or days, as a command line says it.
///
/// # Errors
/// What to write instead.
pub fn lifetime(text: &str) -> Result<Duration, String> {
    const WRONG: &str = "write a whole number with s, m, h or d behind it, such as 24h";
    let unit = text.chars().next_back().ok_or(WRONG)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 24 * 3600,
        _ => return Err(WRONG.to_owned()),
    };
    let number: u64 = text[..text.len() - 1].parse().map_err(|_| WRONG)?;
    let life = number.checked_mul(seconds).filter(|life| *life > 0).ok_or("a certificate lives for at least 1s")?;
    Ok(Duration::from_secs(life))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lifetime_is_a_number_with_a_unit() {
        assert_eq!(lifetime("24h"), Ok(Duration::from_secs(86_400)));
        assert_eq!(lifetime("20s"), Ok(Duration::from_secs(20)));
        assert_eq!(lifetime("90m"), Ok(Duration::from_secs(5_400)));
        assert_eq!(lifetime("2d"), Ok(Duration::from_secs(172_800)));
        for wrong in ["", "24", "h", "0s", "-1h", "1.5h", "1w", "99999999999999999999s", "9999999999999999999d"] {
            assert!(lifetime(wrong).is_err(), "{wrong}");
        }
    }
}
