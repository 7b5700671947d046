//! What a node has on disk.

use std::net::SocketAddr;

use tempfile::TempDir;
use wire::client::{ControlPlane, Role};

use crate::control::TOKEN;
use crate::pki::{Authority, clock};

/// Bundle and token of a node.
pub(crate) struct Files(TempDir);

impl Files {
    pub(crate) fn new(authority: &Authority) -> Self {
        let files = Self(TempDir::new().unwrap());
        files.write("bundle.pem", &authority.bundle.to_pem());
        files.write("token", &format!("{TOKEN}\n"));
        files
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        std::fs::write(self.0.path().join(name), text).unwrap();
    }

    pub(crate) fn remove(&self, name: &str) {
        std::fs::remove_file(self.0.path().join(name)).unwrap();
    }

    pub(crate) fn control_plane(&self, address: SocketAddr) -> ControlPlane {
        ControlPlane {
            address,
            bundle_file: self.0.path().join("bundle.pem"),
            token_file: self.0.path().join("token"),
            node: "node-a".to_owned(),
            role: Role::Proxy,
            time: clock(),
        }
    }
}
